// File: bench/libtorch_bench.cpp
//
// Seconds of loss and backward() in a LibTorch program: pykd::TorchLoss over a loaded artefact.
//
//     libtorch_bench <artefact> <dtype> batch=256 classes=1000 …
//
// The student's and teacher's tensors are random; labels as timing.h says. Prints one number. Threads: as LibTorch has
// them.
#include <torch/types.h>

#include <cstdio>
#include <string>

#include "bench/timing.h"
#include "pykd/torch.hpp"

int main(int argc, char** argv) try {
  if (argc < 4) throw std::invalid_argument("expected <artefact> <dtype> axis=length …");
  pykd::LoadOptions options;
  options.engine = "onnxruntime";
  options.kernels = "on";
  const auto loss = pykd::TorchLoss::load(argv[1], options);
  const auto dtype = std::string(argv[2]) == "bfloat16" ? torch::kBFloat16 : torch::kFloat32;
  const auto lengths = pykd::bench::lengths_from(argc - 3, argv + 3);

  pykd::TorchTensors tensors;
  std::vector<at::Tensor> students;
  for (const pykd_tensor_info& info : loss.loss().inputs()) {
    std::vector<std::int64_t> shape;
    shape.reserve(static_cast<std::size_t>(info.rank));
    for (int axis = 0; axis < info.rank; ++axis) shape.push_back(lengths.at(info.axes[axis]));
    at::Tensor& tensor = tensors[info.name];
    if ((info.dtypes & 1u << PYKD_INT64) != 0) {
      const auto group = lengths.find("labels");
      tensor = group == lengths.end() ? torch::zeros(shape, torch::kLong)
                                      : torch::arange(shape.at(0)).floor_divide(group->second);
    } else {
      tensor = (2 * torch::randn(shape)).to(dtype).requires_grad_(info.has_gradient != 0);
      if (info.has_gradient) students.push_back(tensor);
    }
  }
  std::printf("%.9f\n", pykd::bench::median_seconds([&] {
                for (at::Tensor& student : students) student.mutable_grad() = at::Tensor();
                loss(tensors).backward();
              }));
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
