// Distillation without LibTorch: a small network with its own forward and backward pass, trained by
// an exported loss. This program links pykd and uses Eigen's headers; no torch is near it.
//
//     train_eigen --loss build/demo/recipe --data build/demo/digits.bin
//
// The interesting part is distill(): pykd takes the student's logits and features, and writes the
// loss and d(loss)/d(logits and features) into the student's own buffers. Student::backward()
// carries them on to the weights. Everything else is what any trainer has: layers, Adam, batches.
//
// With --check it compares Student::backward() with central differences instead of training; the
// loss must take float64 for that.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "digits.h"
#include "pykd/pykd.hpp"

namespace {

using examples::Digits;
using examples::Options;

// Rows are samples, and lie in memory as pykd wants them: (batch, channels), last axis fastest.
template <class Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// ---- The student --------------------------------------------------------------------------------

// Weights, their gradient, and what Adam remembers of the gradients before.
template <class Scalar>
struct Parameter {
  Parameter(const char* name_, Eigen::Index rows, Eigen::Index columns, double bound, std::mt19937& random)
      : name(name_),
        value(rows, columns),
        gradient(Matrix<Scalar>::Zero(rows, columns)),
        mean(Matrix<Scalar>::Zero(rows, columns)),
        square(Matrix<Scalar>::Zero(rows, columns)) {
    for (Eigen::Index i = 0; i < value.size(); ++i) {
      value.data()[i] = static_cast<Scalar>(bound * (2.0 * static_cast<double>(random()) / 4294967296.0 - 1.0));
    }
  }

  // One step of Adam (Kingma and Ba 2015, arXiv:1412.6980); `step` counts from 1.
  void update(double learning_rate, int step) {
    constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
    const auto rate = static_cast<Scalar>(learning_rate / (1 - std::pow(kBeta1, step)));
    const auto root = static_cast<Scalar>(std::sqrt(1 - std::pow(kBeta2, step)));
    mean = Scalar(kBeta1) * mean + Scalar(1 - kBeta1) * gradient;
    square = Scalar(kBeta2) * square + Scalar(1 - kBeta2) * gradient.cwiseAbs2();
    value.array() -= rate * mean.array() / (square.array().sqrt() / root + Scalar(1e-8));
  }

  const char* name;
  Matrix<Scalar> value, gradient, mean, square;
};

// y = x·Wᵀ + b for every row x.
template <class Scalar>
struct Linear {
  Linear(const char* weight_name, const char* bias_name, Eigen::Index inputs, Eigen::Index outputs,
         std::mt19937& random)
      : weight(weight_name, outputs, inputs, 1 / std::sqrt(static_cast<double>(inputs)), random),
        bias(bias_name, 1, outputs, 1 / std::sqrt(static_cast<double>(inputs)), random) {}

  void forward(const Matrix<Scalar>& x, Matrix<Scalar>& y) const {
    y.noalias() = x * weight.value.transpose();
    y.rowwise() += bias.value.row(0);
  }

  // From d(loss)/dy: keeps d(loss)/dW and d(loss)/db.
  void backward(const Matrix<Scalar>& x, const Matrix<Scalar>& grad_y) {
    weight.gradient.noalias() = grad_y.transpose() * x;
    bias.gradient = grad_y.colwise().sum();
  }

  Parameter<Scalar> weight, bias;
};

// pixels → hidden → features → classes, with a ReLU after the first two layers.
template <class Scalar>
class Student {
 public:
  Student(const Digits& digits, std::mt19937& random)
      : first_("first.weight", "first.bias", digits.pixels, 64, random),
        second_("second.weight", "second.bias", 64, digits.features, random),
        third_("third.weight", "third.bias", digits.features, digits.classes, random) {}

  // Fills `features` and `logits`. The buffers for their gradients get the same shapes, and 0,
  // which stays where the loss has no such gradient.
  void forward(const Matrix<Scalar>& images) {
    first_.forward(images, hidden_);
    hidden_ = hidden_.cwiseMax(Scalar(0));
    second_.forward(hidden_, features);
    features = features.cwiseMax(Scalar(0));
    third_.forward(features, logits);
    grad_features.setZero(features.rows(), features.cols());
    grad_logits.setZero(logits.rows(), logits.cols());
  }

  // From `grad_logits` and `grad_features` to the gradient of every parameter. The features reach
  // the loss on two ways, by themselves and through the logits, so that their gradients add up.
  void backward(const Matrix<Scalar>& images) {
    third_.backward(features, grad_logits);
    grad_second_.noalias() = grad_logits * third_.weight.value;
    grad_second_ += grad_features;
    grad_second_ = (features.array() > 0).select(grad_second_, Scalar(0));
    second_.backward(hidden_, grad_second_);
    grad_first_.noalias() = grad_second_ * second_.weight.value;
    grad_first_ = (hidden_.array() > 0).select(grad_first_, Scalar(0));
    first_.backward(images, grad_first_);
  }

  std::vector<Parameter<Scalar>*> parameters() {
    return {&first_.weight, &first_.bias, &second_.weight, &second_.bias, &third_.weight, &third_.bias};
  }

  Matrix<Scalar> features, logits;            // what the loss reads
  Matrix<Scalar> grad_features, grad_logits;  // what the loss writes

 private:
  Linear<Scalar> first_, second_, third_;
  Matrix<Scalar> hidden_, grad_second_, grad_first_;
};

// ---- The loss -----------------------------------------------------------------------------------

// Some images, their labels, and what the teacher said about them.
template <class Scalar>
struct Batch {
  Batch(const Digits& digits, const std::vector<std::int64_t>& order, std::size_t begin, std::size_t end)
      : images(end - begin, digits.pixels),
        teacher_logits(end - begin, digits.classes),
        teacher_features(end - begin, digits.features) {
    auto copy_row = [](const std::vector<float>& from, std::int64_t row, Matrix<Scalar>& to, Eigen::Index i) {
      for (Eigen::Index c = 0; c < to.cols(); ++c) {
        to(i, c) = static_cast<Scalar>(from[static_cast<std::size_t>(row * to.cols() + c)]);
      }
    };
    for (std::size_t i = 0; i < end - begin; ++i) {
      const std::int64_t row = order[begin + i];
      copy_row(digits.train_images, row, images, static_cast<Eigen::Index>(i));
      copy_row(digits.teacher_logits, row, teacher_logits, static_cast<Eigen::Index>(i));
      copy_row(digits.teacher_features, row, teacher_features, static_cast<Eigen::Index>(i));
      labels.push_back(digits.train_labels[static_cast<std::size_t>(row)]);
    }
  }

  Matrix<Scalar> images, teacher_logits, teacher_features;
  std::vector<std::int64_t> labels;
};

// The loss of a batch after Student::forward(). Its gradient lands in the student's buffers.
template <class Scalar>
Scalar distill(const pykd::Loss& loss, const pykd::Parameters& parameters, const Batch<Scalar>& batch,
               Student<Scalar>& student) {
  const std::int64_t n = student.logits.rows(), classes = student.logits.cols();
  const std::int64_t channels = student.features.cols();
  Scalar value = 0;

  pykd::Tensors inputs = {
      {"student_logits", pykd::view(student.logits.data(), {n, classes})},
      {"teacher_logits", pykd::view(batch.teacher_logits.data(), {n, classes})},
      {"labels", pykd::view(batch.labels, {n})},
      {"student_features_0", pykd::view(student.features.data(), {n, 1, channels})},
      {"teacher_features_0", pykd::view(batch.teacher_features.data(), {n, 1, channels})},
  };
  pykd::Tensors outputs = {
      {"loss", pykd::view(&value, {})},
      {"grad_student_logits", pykd::view(student.grad_logits.data(), {n, classes})},
      {"grad_student_features_0", pykd::view(student.grad_features.data(), {n, 1, channels})},
  };
  examples::keep_known(loss.inputs(), inputs);
  examples::keep_known(loss.outputs(), outputs);
  loss.run(inputs, outputs, parameters);
  return value;
}

// ---- Training -----------------------------------------------------------------------------------

double accuracy(const Digits& digits, Student<float>& student) {
  student.forward(Eigen::Map<const Matrix<float>>(digits.test_images.data(), digits.test, digits.pixels));
  int right = 0;
  for (Eigen::Index i = 0; i < student.logits.rows(); ++i) {
    Eigen::Index best = 0;
    student.logits.row(i).maxCoeff(&best);
    right += best == digits.test_labels[static_cast<std::size_t>(i)];
  }
  return static_cast<double>(right) / static_cast<double>(digits.test);
}

// Trains one student. The seed decides its first weights and the order of the batches.
void train(const pykd::Loss& loss, const Digits& digits, const Options& options, bool distillation, int seed,
           examples::Report& report) {
  const pykd::Parameters parameters = distillation ? pykd::Parameters() : examples::without_distillation(loss);

  std::mt19937 random(static_cast<std::uint32_t>(seed));
  Student<float> student(digits, random);
  int step = 0;
  for (int epoch = 1; epoch <= options.epochs; ++epoch) {
    const std::vector<std::int64_t> order = examples::shuffled(digits.train, random);
    double sum = 0;
    for (std::size_t begin = 0; begin < order.size();) {
      // The last batch is shorter. That is no matter: the exported loss takes any batch size.
      const std::size_t end = std::min(order.size(), begin + static_cast<std::size_t>(options.batch));
      const Batch<float> batch(digits, order, begin, end);
      student.forward(batch.images);
      sum += distill(loss, parameters, batch, student) * static_cast<double>(end - begin);
      student.backward(batch.images);
      ++step;
      for (Parameter<float>* parameter : student.parameters()) {
        parameter->update(options.learning_rate, step);
      }
      begin = end;
    }
    report.epoch(distillation, seed, epoch, sum / static_cast<double>(digits.train), accuracy(digits, student));
  }
  report.finished(distillation);
}

// ---- Gradient check -----------------------------------------------------------------------------

// Compares every entry of every parameter's gradient with (L(w + h) − L(w − h)) / 2h, relative to
// the largest entry of that parameter's gradient. Returns whether the largest difference is small.
// All in float64: in float32 a step that the loss can see is so long that it carries ReLUs over
// their kinks.
bool check_gradient(const pykd::Loss& loss, const Digits& digits) {
  constexpr double kStep = 1e-6, kTolerance = 1e-5;
  std::mt19937 random(0);
  Student<double> student(digits, random);
  const auto samples = static_cast<std::size_t>(std::min<std::int64_t>(digits.train, 29));
  const Batch<double> batch(digits, examples::shuffled(digits.train, random), 0, samples);
  auto value = [&] {
    student.forward(batch.images);
    return distill(loss, {}, batch, student);
  };
  value();
  student.backward(batch.images);

  double worst = 0;
  for (Parameter<double>* parameter : student.parameters()) {
    const Matrix<double>& gradient = parameter->gradient;  // stays, since only forward() runs below
    const double largest = gradient.cwiseAbs().maxCoeff();
    double worst_here = 0;
    for (Eigen::Index i = 0; i < gradient.size(); ++i) {
      double& weight = parameter->value.data()[i];
      const double before = weight;
      weight = before + kStep;
      const double up = value();
      weight = before - kStep;
      const double down = value();
      weight = before;
      const double error = std::abs((up - down) / (2 * kStep) - gradient.data()[i]) / largest;
      if (!(error <= worst_here)) worst_here = error;  // lets NaN through
    }
    std::printf("%-14s %5td entries, largest |gradient| %.2e, largest relative error %.1e\n", parameter->name,
                gradient.size(), largest, worst_here);
    if (!(worst_here <= worst)) worst = worst_here;
  }
  const bool good = worst <= kTolerance;
  std::printf("largest relative error %.1e, accepted up to %.0e: %s\n", worst, kTolerance, good ? "good" : "BAD");
  return good;
}

}  // namespace

int main(int argc, char** argv) try {
  const Options options = examples::parse_options(argc, argv);
  const Digits digits = examples::read_digits(options.data);
  pykd::LoadOptions load_options;
  load_options.engine = options.engine.empty() ? "onnxruntime" : options.engine;
  load_options.threads = 1;  // a batch of 64 is too small to share out
  const pykd::Loss loss = pykd::Loss::load(options.loss, load_options);

  if (options.check) {
    for (const pykd_tensor_info& input : loss.inputs()) {
      if (input.has_gradient && (input.dtypes & (1u << PYKD_FLOAT64)) == 0) {
        throw std::runtime_error("expected a loss that takes float64 for --check, got \"" + options.loss +
                                 "\", which does not; export it with dtype=\"float64\", or pass --engine "
                                 "torchscript, whose file takes every type");
      }
    }
    return check_gradient(loss, digits) ? 0 : 1;
  }

  std::printf("Eigen student, loss by %s %s, %lld training images, %d epochs\n", loss.engine().c_str(),
              loss.engine_version().c_str(), static_cast<long long>(digits.train), options.epochs);
  examples::Report report(options.out);
  for (int seed = 0; seed < options.seeds; ++seed) {
    train(loss, digits, options, false, seed, report);
    train(loss, digits, options, true, seed, report);
    report.print_seed(seed);
  }
  report.print_table(digits.test);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "train_eigen: %s\n", error.what());
  return 1;
}
