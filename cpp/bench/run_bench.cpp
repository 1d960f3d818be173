// File: bench/run_bench.cpp
//
// Seconds of one pykd_run() with value and gradient: a loaded artefact in a program that holds raw memory.
//
//     run_bench <artefact> auto|on|off <dtype> batch=8 classes=10 …
//
// The student's and teacher's tensors are random; labels as timing.h says. Prints one number.
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "bench/timing.h"
#include "pykd/pykd.hpp"

int main(int argc, char** argv) try {
  if (argc < 5) throw std::invalid_argument("expected <artefact> auto|on|off <dtype> axis=length …");
  pykd::LoadOptions options;
  options.engine = "onnxruntime";
  options.kernels = argv[2];
  const pykd::Loss loss = pykd::Loss::load(argv[1], options);
  const auto lengths = pykd::bench::lengths_from(argc - 4, argv + 4);

  const bool halves = std::string(argv[3]) == "bfloat16";

  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 2);
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<std::int64_t>> integers, shapes;
  const auto tensor_for = [&](const pykd_tensor_info& info) {
    std::int64_t elements = 1;
    shapes.emplace_back();
    for (int axis = 0; axis < info.rank; ++axis) {
      shapes.back().push_back(lengths.at(info.axes[axis]));
      elements *= shapes.back().back();
    }
    pykd_tensor tensor = {info.name, nullptr, PYKD_FLOAT32, info.rank, shapes.back().data(), nullptr,
                          PYKD_CPU,  0,       nullptr};
    if ((info.dtypes & 1u << PYKD_INT64) != 0) {
      integers.emplace_back(static_cast<std::size_t>(elements), 0);
      const auto group = lengths.find("labels");
      for (std::int64_t i = 0; i < elements && group != lengths.end(); ++i) integers.back()[i] = i / group->second;
      tensor.dtype = PYKD_INT64;
      tensor.data = integers.back().data();
    } else {
      floats.emplace_back(static_cast<std::size_t>(elements));
      for (float& value : floats.back()) value = normal(random);
      tensor.data = floats.back().data();
      if (halves && (info.dtypes & 1u << PYKD_BFLOAT16) != 0) {  // the upper half of a float32 is one
        tensor.dtype = PYKD_BFLOAT16;
        auto* bytes = reinterpret_cast<unsigned char*>(tensor.data);
        for (std::int64_t i = 0; i < elements; ++i) std::memmove(bytes + 2 * i, bytes + 4 * i + 2, 2);
      }
    }
    return tensor;
  };
  std::vector<pykd_tensor> inputs, outputs;
  floats.reserve(64), integers.reserve(64), shapes.reserve(64);
  for (const pykd_tensor_info& info : loss.inputs()) inputs.push_back(tensor_for(info));
  for (const pykd_tensor_info& info : loss.outputs()) outputs.push_back(tensor_for(info));

  std::printf("%.9f\n", pykd::bench::median_seconds([&] {
                const pykd_status status =
                    pykd_run(loss.c(), inputs.data(), inputs.size(), nullptr, 0, outputs.data(), outputs.size());
                if (status != PYKD_OK) throw std::runtime_error(pykd_last_error());
              }));
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
