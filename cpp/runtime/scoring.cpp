#include "runtime/scoring.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/error.h"
#include "base/struct_size.h"

namespace pykd::internal {
namespace {

constexpr const char* kScores = "loss_per_sample";

// ---- Numbers in memory of any floating type -----------------------------------------------------

// The bits of a floating type that tell infinities and NaN: all exponents set, and then a fraction or none.
template <class Bits>
struct Layout {
  Bits exponent, fraction;
};

struct Found {
  bool nan = false, infinite = false;
};

template <class Bits>
Found look(const void* data, std::size_t count, Layout<Bits> layout) {
  Found found;
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::size_t others = 0;  // counted without a branch: nearly all rows have finite numbers alone
  for (std::size_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, bytes + i * sizeof bits, sizeof bits);
    others += (bits & layout.exponent) == layout.exponent ? 1 : 0;
  }
  if (others == 0) return found;
  std::size_t negative = 0;
  for (std::size_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, bytes + i * sizeof bits, sizeof bits);
    if ((bits & layout.exponent) != layout.exponent) continue;
    if ((bits & layout.fraction) != 0) {
      found.nan = true;
    } else if ((bits & ~(layout.exponent | layout.fraction)) == 0) {
      found.infinite = true;
    } else {
      ++negative;
    }
  }
  found.infinite |= negative == count;  // a single one is a class that is masked
  return found;
}

Found look(const void* data, std::size_t count, pykd_dtype dtype) {
  switch (dtype) {
    case PYKD_FLOAT16:
      return look<std::uint16_t>(data, count, {0x7C00, 0x03FF});
    case PYKD_BFLOAT16:
      return look<std::uint16_t>(data, count, {0x7F80, 0x007F});
    case PYKD_FLOAT32:
      return look<std::uint32_t>(data, count, {0x7F800000u, 0x007FFFFFu});
    case PYKD_FLOAT64:
      return look<std::uint64_t>(data, count, {0x7FF0000000000000u, 0x000FFFFFFFFFFFFFu});
    default:
      return {};  // all numbers of that type are finite
  }
}

// What one row of a tensor has, and where it lies.
std::size_t row_elements(const pykd_tensor& tensor) {
  std::size_t count = 1;
  for (std::int32_t axis = 1; axis < tensor.rank; ++axis) count *= static_cast<std::size_t>(tensor.shape[axis]);
  return count;
}

const void* row_of(const pykd_tensor& tensor, std::size_t row) {
  return static_cast<const char*>(tensor.data) + row * row_elements(tensor) * dtype_size(tensor.dtype);
}

double score_at(const pykd_tensor& output, std::size_t row) {
  return output.dtype == PYKD_FLOAT64 ? static_cast<const double*>(output.data)[row]
                                      : static_cast<double>(static_cast<const float*>(output.data)[row]);
}

void clear_score(const pykd_tensor& output, std::size_t row) {
  if (output.dtype == PYKD_FLOAT64) {
    static_cast<double*>(output.data)[row] = std::numeric_limits<double>::quiet_NaN();
  } else {
    static_cast<float*>(output.data)[row] = std::numeric_limits<float>::quiet_NaN();
  }
}

// ---- One block ----------------------------------------------------------------------------------

class Block {
 public:
  Block(const Loss& loss, const pykd_tensor* inputs, std::size_t num_inputs) : signature_(loss.signature()) {
    if (loss.device().kind != PYKD_CPU) {
      fail(PYKD_INVALID_TYPE, "a loss on the CPU, where the rows are looked at", loss.device_name(),
           "load the loss with device \"cpu\"");
    }
    const std::size_t scores = find_spec(signature_.outputs, kScores);
    if (scores == kNone) {
      fail(PYKD_INVALID_VALUE, "an artefact with \"loss_per_sample\"", "one without a value per sample",
           "export the loss with kind \"score\"");
    }
    const OutputSpec& spec = signature_.outputs[scores];
    if (spec.rank() != 1) {
      fail(PYKD_INVALID_VALUE, "an artefact with one score per row",
           "\"loss_per_sample\" of rank " + std::to_string(spec.rank()),
           "export the loss for inputs whose rows are what is scored, such as tokens");
    }
    samples_ = spec.axis_ids[0];
    binding_ = loss.check_inputs(inputs, num_inputs, inputs_, LabelCheck::kSkip);
    status_.assign(static_cast<std::size_t>(binding_.lengths[samples_]), PYKD_ROW_OK);
    read_labels();
  }

  const std::vector<pykd_tensor>& inputs() const { return inputs_; }
  const std::vector<std::uint8_t>& status() const { return status_; }

  void check_outputs(const pykd_tensor* outputs, std::size_t num_outputs) const {
    bool scores = false;
    for (std::size_t i = 0; outputs != nullptr && i < num_outputs; ++i) {
      if (outputs[i].name == nullptr) continue;  // the run says so
      const std::size_t id = find_spec(signature_.outputs, outputs[i].name);
      scores |= std::strcmp(outputs[i].name, kScores) == 0;
      if (id == kNone) continue;
      const OutputSpec& spec = signature_.outputs[id];
      const bool numbers = (spec.dtypes & (dtype_bit(PYKD_FLOAT32) | dtype_bit(PYKD_FLOAT64))) != 0;
      if (spec.rank() == 1 && spec.axis_ids[0] == samples_ && numbers) continue;
      fail(PYKD_INVALID_VALUE, "outputs with a value per row", in_quotes(spec.name),
           "run the loss with pykd_run() for it");
    }
    if (!scores) fail(PYKD_INVALID_VALUE, "\"loss_per_sample\" among the outputs", "none", "give memory for it");
  }

  // Tells the bad rows by what went in, since a loss may give +infinity a finite score, and by what came out; clears
  // their scores.
  void judge(const pykd_tensor* outputs, std::size_t num_outputs) {
    for (std::size_t row = 0; row < status_.size(); ++row) {
      // Models may take what a loss may not, such as masks of -infinity: a merged scorer judges what the loss gets
      // itself.
      if (status_[row] == PYKD_ROW_OK && !signature_.merged) status_[row] = of_inputs(row);
      for (std::size_t i = 0; i < num_outputs && status_[row] == PYKD_ROW_OK; ++i) {
        if (std::isfinite(score_at(outputs[i], row))) continue;
        const std::uint8_t reason = of_inputs(row);
        status_[row] = reason == PYKD_ROW_OK ? std::uint8_t{PYKD_ROW_INFINITE_SCORE} : reason;
      }
      if (status_[row] == PYKD_ROW_OK) continue;
      for (std::size_t i = 0; i < num_outputs; ++i) clear_score(outputs[i], row);
    }
  }

 private:
  // Rows whose labels are bad. The engine gets 0 in place of a label that is none, in a copy.
  void read_labels() {
    for (std::size_t id = 0; id < inputs_.size(); ++id) {
      const InputSpec& spec = signature_.inputs[id];
      if (spec.index_axis == kNone || spec.rank() == 0 || spec.axis_ids[0] != samples_) continue;
      const std::size_t each = row_elements(inputs_[id]);
      const auto* labels = static_cast<const std::int64_t*>(inputs_[id].data);
      // 0 where the models alone know how many there are.
      const std::int64_t known = binding_.lengths[spec.index_axis];
      const std::int64_t classes = known == 0 ? std::numeric_limits<std::int64_t>::max() : known;
      std::vector<std::int64_t> mended;
      for (std::size_t row = 0; row < status_.size(); ++row) {
        std::size_t ignored = 0;
        for (std::size_t i = row * each; i < (row + 1) * each; ++i) {
          if (spec.ignore_index && labels[i] == *spec.ignore_index) {
            ++ignored;
          } else if (labels[i] < 0 || labels[i] >= classes) {
            if (mended.empty()) mended.assign(labels, labels + status_.size() * each);
            mended[i] = 0;
            status_[row] = PYKD_ROW_LABEL_OUT_OF_RANGE;
          }
        }
        if (ignored == each && status_[row] == PYKD_ROW_OK) status_[row] = PYKD_ROW_IGNORED;
      }
      if (mended.empty()) continue;
      mended_.push_back(std::move(mended));  // whose memory stays where it is
      inputs_[id].data = mended_.back().data();
    }
  }

  std::uint8_t of_inputs(std::size_t row) const {
    bool infinite = false;
    for (std::size_t id = 0; id < inputs_.size(); ++id) {
      const InputSpec& spec = signature_.inputs[id];
      if (!spec.is_float() || spec.rank() == 0 || spec.axis_ids[0] != samples_) continue;
      const Found found = look(row_of(inputs_[id], row), row_elements(inputs_[id]), inputs_[id].dtype);
      if (found.nan) return PYKD_ROW_NAN;
      infinite |= found.infinite;
    }
    return infinite ? PYKD_ROW_INFINITE : PYKD_ROW_OK;
  }

  const Signature& signature_;
  std::size_t samples_ = 0;  // the axis that counts the rows
  Binding binding_;
  std::vector<pykd_tensor> inputs_;
  std::vector<std::vector<std::int64_t>> mended_;
  std::vector<std::uint8_t> status_;
};

// ---- The summary --------------------------------------------------------------------------------

// One more number, and what the sum has lost of it (Neumaier): the mean of 10⁹ rows is as good as that of ten.
void add(double value, pykd_score_summary& summary) {
  const double total = summary.total + value;
  summary.lost +=
      std::fabs(summary.total) >= std::fabs(value) ? (summary.total - total) + value : (value - total) + summary.total;
  summary.total = total;
}

void add(const std::vector<std::uint8_t>& status, const pykd_tensor& scores, pykd_score_summary& summary) {
  for (std::size_t row = 0; row < status.size(); ++row) {
    ++summary.rows;
    ++summary.by_status[status[row]];
    if (status[row] == PYKD_ROW_OK) add(score_at(scores, row), summary);
  }
  const std::int64_t counted = summary.by_status[PYKD_ROW_OK];
  summary.mean = counted == 0 ? 0.0 : (summary.total + summary.lost) / static_cast<double>(counted);
}

}  // namespace

void score_rows(const Loss& loss, const pykd_tensor* inputs, std::size_t num_inputs, const pykd_parameter* parameters,
                std::size_t num_parameters, const pykd_tensor* outputs, std::size_t num_outputs, std::uint8_t* status,
                pykd_score_summary* summary) {
  const pykd_score_summary none = PYKD_SCORE_SUMMARY_INIT;
  pykd_score_summary sum =
      summary == nullptr ? none
                         : copy_sized(*summary, none, sizeof none, "a pykd_score_summary", "PYKD_SCORE_SUMMARY_INIT");
  Block block(loss, inputs, num_inputs);
  block.check_outputs(outputs, num_outputs);
  loss.run(block.inputs().data(), block.inputs().size(), parameters, num_parameters, outputs, num_outputs);
  block.judge(outputs, num_outputs);
  const pykd_tensor* scores = outputs;
  while (std::strcmp(scores->name, kScores) != 0) ++scores;
  add(block.status(), *scores, sum);
  if (status != nullptr) std::copy(block.status().begin(), block.status().end(), status);
  if (summary != nullptr) write_sized(sum, *summary, sizeof none, "a pykd_score_summary", "PYKD_SCORE_SUMMARY_INIT");
}

}  // namespace pykd::internal
