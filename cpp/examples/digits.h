// File: digits.h
//
// What the two trainers share: the data, the options of the command line, the order of the batches,
// and the report. Nothing in here is about distillation.
//
// The data are scikit-learn's handwritten digits in the low-resolution setting of Wang et al.
// (ICCVW 2019): the teacher saw 8×8 pixels; the student gets 4×4 and what the teacher said.
#ifndef PYKD_EXAMPLES_DIGITS_H_
#define PYKD_EXAMPLES_DIGITS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tensor_file.h"

namespace examples {

// ---- Data ---------------------------------------------------------------------------------------

struct Digits {
  std::int64_t train = 0, test = 0;                    // number of images
  std::int64_t pixels = 0, classes = 0, features = 0;  // 16, 10 and 64
  std::vector<float> train_images, test_images;        // (images, pixels)
  std::vector<std::int64_t> train_labels, test_labels;
  std::vector<float> teacher_logits;    // (train, classes)
  std::vector<float> teacher_features;  // (train, 1, features)
};

// Reads the file that `python -m pykd demo` writes, digits.bin. Throws std::runtime_error.
inline Digits read_digits(const std::string& path) {
  const StoredTensors tensors = read_tensors(path);
  auto find = [&](const std::string& name, pykd_dtype dtype, std::size_t rank) -> const StoredTensor& {
    const auto found = tensors.find(name);
    if (found == tensors.end() || found->second.dtype != dtype || found->second.shape.size() != rank) {
      throw std::runtime_error("expected \"" + path + "\" to hold \"" + name + "\" as " +
                               (dtype == PYKD_INT64 ? "int64" : "float32") + " with " + std::to_string(rank) +
                               " axes; write it anew with `python -m pykd demo`");
    }
    return found->second;
  };
  const StoredTensor& train_images = find("train_images", PYKD_FLOAT32, 2);
  const StoredTensor& train_labels = find("train_labels", PYKD_INT64, 1);
  const StoredTensor& teacher_logits = find("teacher_logits", PYKD_FLOAT32, 2);
  const StoredTensor& teacher_features = find("teacher_features", PYKD_FLOAT32, 3);
  const StoredTensor& test_images = find("test_images", PYKD_FLOAT32, 2);
  const StoredTensor& test_labels = find("test_labels", PYKD_INT64, 1);

  Digits digits;
  digits.train = train_images.shape[0];
  digits.test = test_images.shape[0];
  digits.pixels = train_images.shape[1];
  digits.classes = teacher_logits.shape[1];
  digits.features = teacher_features.shape[2];
  if (train_labels.shape[0] != digits.train || teacher_logits.shape[0] != digits.train ||
      teacher_features.shape[0] != digits.train || teacher_features.shape[1] != 1 ||
      test_labels.shape[0] != digits.test || test_images.shape[1] != digits.pixels) {
    throw std::runtime_error("expected the tensors of \"" + path +
                             "\" to speak of the same images; write it anew with `python -m pykd demo`");
  }
  digits.train_images = train_images.as<float>();
  digits.test_images = test_images.as<float>();
  digits.train_labels = train_labels.as<std::int64_t>();
  digits.test_labels = test_labels.as<std::int64_t>();
  digits.teacher_logits = teacher_logits.as<float>();
  digits.teacher_features = teacher_features.as<float>();
  return digits;
}

// ---- Options ------------------------------------------------------------------------------------

struct Options {
  std::string loss = "build/demo/recipe";      // what pykd.export() wrote
  std::string data = "build/demo/digits.bin";  // what read_digits() reads
  std::string engine;                          // "onnxruntime", "torchscript"; empty: the trainer chooses
  std::string out;                             // a CSV file with one row per epoch; empty: none
  int seeds = 10;
  int epochs = 60;
  std::int64_t batch = 64;
  double learning_rate = 3e-3;  // of Adam
  bool check = false;           // train_eigen: check its gradient instead of training
};

inline Options parse_options(int argc, char** argv) {
  Options options;
  auto whole = [](const std::string& name, const std::string& text) {
    char* end = nullptr;
    const long value = std::strtol(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0' || value < 1 || value > 1000000) {
      throw std::runtime_error("expected " + name + " to be a whole number from 1 to 1000000, got \"" + text +
                               "\"; pass another one");
    }
    return static_cast<int>(value);
  };
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--check") {
      options.check = true;
      continue;
    }
    static const char* const kNames[] = {"--loss",  "--data",   "--engine", "--out",
                                         "--seeds", "--epochs", "--batch",  "--learning-rate"};
    const bool known = std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
    if (!known || i + 1 == argc) {
      throw std::runtime_error("usage: " + std::string(argv[0]) +
                               " [--loss recipe] [--data digits.bin] [--engine name] [--out curves.csv]"
                               " [--seeds n] [--epochs n] [--batch n] [--learning-rate x] [--check]\n"
                               "got \"" +
                               name + (known ? "\" without a value" : "\""));
    }
    const std::string value = argv[++i];
    if (name == "--loss") options.loss = value;
    if (name == "--data") options.data = value;
    if (name == "--engine") options.engine = value;
    if (name == "--out") options.out = value;
    if (name == "--seeds") options.seeds = whole(name, value);
    if (name == "--epochs") options.epochs = whole(name, value);
    if (name == "--batch") options.batch = whole(name, value);
    if (name == "--learning-rate") {
      char* end = nullptr;
      options.learning_rate = std::strtod(value.c_str(), &end);
      if (*end != '\0' || !(options.learning_rate > 0) || !std::isfinite(options.learning_rate)) {
        throw std::runtime_error("expected --learning-rate to be a positive number, got \"" + value +
                                 "\"; pass another one");
      }
    }
  }
  return options;
}

// ---- With and without distillation --------------------------------------------------------------

// Settings under which the loss is the hard target's alone: every other weight is 0 in this call.
// No second export is needed for the comparison.
inline pykd::Parameters without_distillation(const pykd::Loss& loss) {
  pykd::Parameters parameters;
  for (const pykd_parameter_info& info : loss.parameters()) {
    const std::string name = info.name;
    const bool is_weight = name.size() > 7 && name.compare(name.size() - 7, 7, "_weight") == 0;
    if (is_weight && name != "hard_weight") parameters[name] = 0.0;
  }
  return parameters;
}

// Leaves out of a map by name what the loss does not know: one without a feature term takes no
// features, and gives no gradient for them.
template <class Tensors>
void keep_known(const std::vector<pykd_tensor_info>& signature, Tensors& tensors) {
  for (auto tensor = tensors.begin(); tensor != tensors.end();) {
    const bool known = std::any_of(signature.begin(), signature.end(),
                                   [&](const pykd_tensor_info& info) { return tensor->first == info.name; });
    tensor = known ? std::next(tensor) : tensors.erase(tensor);
  }
}

// The numbers 0 … n − 1 in an order that depends on the generator alone. (std::shuffle may differ
// between standard libraries; std::mt19937 may not.)
inline std::vector<std::int64_t> shuffled(std::int64_t n, std::mt19937& random) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  return order;
}

// ---- Report -------------------------------------------------------------------------------------

// Collects what the runs achieve, writes the learning curves, prints the comparison.
class Report {
 public:
  explicit Report(const std::string& csv) {
    if (csv.empty()) return;
    csv_.open(csv);
    if (!csv_) throw std::runtime_error("could not write \"" + csv + "\"; does its folder exist?");
    csv_ << "distillation,seed,epoch,train_loss,test_accuracy\n";
  }

  // After each epoch. `accuracy` is a share of the test images, 0 to 1.
  void epoch(bool distillation, int seed, int number, double train_loss, double accuracy) {
    if (!std::isfinite(train_loss)) {
      throw std::runtime_error("the training loss is not finite any more; lower --learning-rate");
    }
    if (csv_.is_open()) {
      csv_ << (distillation ? "with" : "without") << ',' << seed << ',' << number << ',' << train_loss << ','
           << accuracy << '\n';
    }
    last_ = 100 * accuracy;
  }

  // After each run: its last epoch counts, whatever came before.
  void finished(bool distillation) { (distillation ? with_ : without_).push_back(last_); }

  // After both runs of a seed.
  void print_seed(int seed) const {
    std::printf("  seed %2d: without %.2f %%, with %.2f %%\n", seed, without_.back(), with_.back());
    std::fflush(stdout);
  }

  void print_table(std::int64_t test_images) const {
    std::vector<double> gain;
    for (std::size_t i = 0; i < with_.size(); ++i) gain.push_back(with_[i] - without_[i]);
    std::printf("test accuracy on %lld images, mean ± standard deviation over %zu seeds\n",
                static_cast<long long>(test_images), with_.size());
    std::printf("  without distillation  %5.2f %% ± %.2f\n", mean(without_), deviation(without_));
    std::printf("  with distillation     %5.2f %% ± %.2f\n", mean(with_), deviation(with_));
    std::printf("  gain, seed by seed    %+5.2f   ± %.2f (standard error %.2f)\n", mean(gain), deviation(gain),
                deviation(gain) / std::sqrt(static_cast<double>(gain.size())));
  }

 private:
  static double mean(const std::vector<double>& values) {
    return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  }
  // Of the sample, so divided by n − 1; NaN for a single value.
  static double deviation(const std::vector<double>& values) {
    if (values.size() < 2) return std::nan("");
    const double center = mean(values);
    double squares = 0;
    for (double value : values) squares += (value - center) * (value - center);
    return std::sqrt(squares / static_cast<double>(values.size() - 1));
  }

  std::ofstream csv_;
  std::vector<double> without_, with_;
  double last_ = 0;
};

}  // namespace examples

#endif  // PYKD_EXAMPLES_DIGITS_H_
