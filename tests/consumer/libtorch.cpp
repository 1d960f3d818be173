// Runs an exported loss of two logits with LibTorch's autograd: prints the value and the gradient.
#include <torch/torch.h>

#include <cstdio>
#include <pykd/torch.hpp>

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fputs("usage: from_libtorch <artefact> [<engine>]\n", stderr);
    return 2;
  }
  pykd::LoadOptions options;
  if (argc > 2) options.engine = argv[2];
  const pykd::TorchLoss loss = pykd::TorchLoss::load(argv[1], options);

  torch::Tensor student = torch::tensor({{1.f, 2.f, 3.f}, {3.f, 2.f, 1.f}}).requires_grad_();
  const torch::Tensor teacher = torch::tensor({{0.f, 2.f, 4.f}, {4.f, 2.f, 0.f}});
  const torch::Tensor value = loss({{"student_logits", student}, {"teacher_logits", teacher}});
  value.backward();
  std::printf("%.9g\n", value.item<double>());
  const torch::Tensor gradient = student.grad().contiguous();
  for (int i = 0; i < 6; ++i) std::printf("%.9g\n", gradient.data_ptr<float>()[i]);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
