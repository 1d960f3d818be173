// Distillation with LibTorch: an ordinary C++ training loop in which the loss comes from a file.
//
//     train_libtorch --loss build/demo/recipe --data build/demo/digits.bin
//
// pykd::TorchLoss takes and gives at::Tensor and takes part in autograd, so that the loop reads as
// always: forward, loss, backward, step. --engine onnxruntime trains the same from the ONNX file.
#include <torch/torch.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "digits.h"
#include "pykd/torch.hpp"

namespace {

using examples::Digits;
using examples::Options;

// The data as tensors; views of the memory in Digits, which must outlive them.
struct Data {
  explicit Data(Digits& digits)
      : train_images(torch::from_blob(digits.train_images.data(), {digits.train, digits.pixels})),
        test_images(torch::from_blob(digits.test_images.data(), {digits.test, digits.pixels})),
        train_labels(torch::from_blob(digits.train_labels.data(), {digits.train}, torch::kInt64)),
        test_labels(torch::from_blob(digits.test_labels.data(), {digits.test}, torch::kInt64)),
        teacher_logits(torch::from_blob(digits.teacher_logits.data(), {digits.train, digits.classes})),
        teacher_features(torch::from_blob(digits.teacher_features.data(), {digits.train, 1, digits.features})) {}

  torch::Tensor train_images, test_images, train_labels, test_labels;
  torch::Tensor teacher_logits, teacher_features;
};

// pixels → hidden → features → classes, with a ReLU after the first two layers.
struct StudentImpl : torch::nn::Module {
  explicit StudentImpl(const Digits& digits)
      : first(register_module("first", torch::nn::Linear(digits.pixels, 64))),
        second(register_module("second", torch::nn::Linear(64, digits.features))),
        third(register_module("third", torch::nn::Linear(digits.features, digits.classes))) {}

  struct Output {
    torch::Tensor logits;    // (batch, classes)
    torch::Tensor features;  // (batch, 1, features): one token per image
  };
  Output forward(const torch::Tensor& images) {
    const torch::Tensor features = torch::relu(second(torch::relu(first(images))));
    return {third(features), features.unsqueeze(1)};
  }

  torch::nn::Linear first, second, third;
};
TORCH_MODULE(Student);

double accuracy(const Data& data, Student& student) {
  const torch::NoGradGuard no_grad;
  const torch::Tensor guesses = student->forward(data.test_images).logits.argmax(1);
  return guesses.eq(data.test_labels).to(torch::kFloat64).mean().item<double>();
}

// Trains one student. The seed decides its first weights and the order of the batches.
void train(const pykd::TorchLoss& loss, const Digits& digits, const Data& data, const Options& options,
           bool distillation, int seed, examples::Report& report) {
  const pykd::Parameters parameters = distillation ? pykd::Parameters() : examples::without_distillation(loss.loss());

  torch::manual_seed(static_cast<std::uint64_t>(seed));
  std::mt19937 random(static_cast<std::uint32_t>(seed));
  Student student(digits);
  torch::optim::Adam optimizer(student->parameters(), torch::optim::AdamOptions(options.learning_rate));

  for (int epoch = 1; epoch <= options.epochs; ++epoch) {
    std::vector<std::int64_t> order = examples::shuffled(digits.train, random);
    const torch::Tensor indices = torch::from_blob(order.data(), {digits.train}, torch::kInt64);
    double sum = 0;
    for (const torch::Tensor& rows : indices.split(options.batch)) {
      const StudentImpl::Output output = student->forward(data.train_images.index_select(0, rows));
      pykd::TorchTensors tensors = {
          {"student_logits", output.logits},
          {"teacher_logits", data.teacher_logits.index_select(0, rows)},
          {"labels", data.train_labels.index_select(0, rows)},
          {"student_features_0", output.features},
          {"teacher_features_0", data.teacher_features.index_select(0, rows)},
      };
      examples::keep_known(loss.loss().inputs(), tensors);
      const torch::Tensor value = loss(tensors, parameters);
      optimizer.zero_grad();
      value.backward();
      optimizer.step();
      sum += value.item<double>() * static_cast<double>(rows.size(0));
    }
    report.epoch(distillation, seed, epoch, sum / static_cast<double>(digits.train), accuracy(data, student));
  }
  report.finished(distillation);
}

}  // namespace

int main(int argc, char** argv) try {
  const Options options = examples::parse_options(argc, argv);
  at::set_num_threads(1);  // a batch of 64 is too small to share out
  Digits digits = examples::read_digits(options.data);
  const Data data(digits);
  pykd::LoadOptions load_options;
  load_options.engine = options.engine.empty() ? "torchscript" : options.engine;
  load_options.threads = 1;
  const pykd::TorchLoss loss = pykd::TorchLoss::load(options.loss, load_options);

  std::printf("LibTorch student, loss by %s %s, %lld training images, %d epochs\n", loss.loss().engine().c_str(),
              loss.loss().engine_version().c_str(), static_cast<long long>(digits.train), options.epochs);
  examples::Report report(options.out);
  for (int seed = 0; seed < options.seeds; ++seed) {
    train(loss, digits, data, options, false, seed, report);
    train(loss, digits, data, options, true, seed, report);
    report.print_seed(seed);
  }
  report.print_table(digits.test);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "train_libtorch: %s\n", error.what());
  return 1;
}
