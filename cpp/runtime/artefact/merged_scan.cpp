// scan_merged(): the graph of a merged scorer against what the file says of its loss.
#include "runtime/artefact/merged_scan.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <protozero/exception.hpp>
#include <unordered_set>
#include <utility>

#include "base/error.h"
#include "base/tensor.h"
#include "runtime/artefact/merged_contents.h"
#include "runtime/artefact/onnx_contents.h"
#include "runtime/signature/metadata.h"

namespace pykd::internal {
namespace {

constexpr const char* kScores = "loss_per_sample";

// Such as messages and programs can show; a dot and a blank are common in names of models.
void check_name(const std::string& name) {
  const bool printable =
      std::all_of(name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) >= 0x20 && c != 0x7F; });
  if (name.empty() || name.size() > 200 || !printable) {
    refuse_in_scorer("names of at most 200 printable characters for inputs and outputs", in_quotes(name));
  }
}

// The dtype of a value that is described; none where it holds no numbers that a caller could give.
std::optional<pykd_dtype> dtype_of(const MergedValue& value) {
  for (const pykd_dtype dtype : kAllDtypes) {
    if (value.dtype == onnx::onnx_dtype(dtype)) return dtype;
  }
  return std::nullopt;
}

class Merger {
 public:
  Merger(Source& source, const MergedContents& contents, ScorerMetadata metadata)
      : source_(source), contents_(contents), metadata_(std::move(metadata)), loss_(metadata_.loss) {}

  Signature signature() {
    check_lists();
    signature_.kind = ArtefactKind::kScore;
    signature_.merged = true;
    signature_.name = loss_.name;
    signature_.parameter_form = loss_.parameter_form;
    signature_.parameter_dtype = loss_.parameter_dtype;
    for (const ParameterSpec& fixed : loss_.fixed) signature_.fixed.push_back(fixed);
    const std::size_t scores = find_spec(loss_.outputs, kScores);
    if (scores == kNone || loss_.outputs[scores].rank() != 1) {
      refuse_in_scorer("a loss with one number per sample, \"loss_per_sample\"",
                       scores == kNone ? "none" : "one of rank " + std::to_string(loss_.outputs[scores].rank()));
    }
    add_axis(loss_.outputs[scores].axes[0], rows_of_models());
    for (const MergedValue& value : contents_.inputs) add_input(value);
    for (const MergedValue& value : contents_.outputs) add_output(value);
    const std::size_t given = find_spec(signature_.outputs, kScores);
    if (given == kNone) refuse_in_scorer("the output \"loss_per_sample\"", "none");
    show_axes(signature_, least_);
    return std::move(signature_);
  }

 private:
  static constexpr std::size_t kRows = 0;  // the axis that counts the samples

  void check_lists() const {
    std::unordered_set<std::string> names;
    std::vector<std::string> outputs;
    for (const MergedValue& value : contents_.inputs) {
      check_name(value.name);
      if (!names.insert(value.name).second) refuse_in_scorer("every input once", in_quotes(value.name) + " twice");
    }
    names.clear();
    for (const MergedValue& value : contents_.outputs) {
      check_name(value.name);
      if (!names.insert(value.name).second) refuse_in_scorer("every output once", in_quotes(value.name) + " twice");
      outputs.push_back(value.name);
    }
    if (outputs != metadata_.outputs) {
      refuse_in_scorer("the outputs " + join(metadata_.outputs) + ", as its metadata says,",
                       outputs.empty() ? "none" : in_quotes(join(outputs)));
    }
  }

  bool is_of_loss(const MergedValue& value) const {
    return find_spec(loss_.inputs, value.name) != kNone || find_spec(loss_.parameters, value.name) != kNone;
  }

  // How many samples the models take at once: 0 where that is free, as it should be.
  std::int64_t rows_of_models() const {
    std::int64_t rows = 0;
    bool alike = true;
    for (const MergedValue& value : contents_.inputs) {
      if (is_of_loss(value) || value.lengths.empty()) continue;
      if (value.lengths[0] == 0) return 0;
      alike = alike && (rows == 0 || rows == value.lengths[0]);
      rows = value.lengths[0];
    }
    if (rows == 0 || !alike) {
      refuse_in_scorer("an input of the models with the samples along its first axis",
                       rows == 0 ? "none with axes" : "first axes of several fixed lengths");
    }
    return rows;
  }

  // The axis of that name; a length that the file fixes (0: it is free) is one of its own.
  std::size_t add_axis(const std::string& name, std::int64_t length) {
    for (std::size_t id = 0; id < signature_.axes.size(); ++id) {
      if (signature_.axes[id] == name) return id;
    }
    signature_.axes.push_back(name);
    signature_.fixed_lengths.push_back(length);
    least_.push_back(1);
    return signature_.axes.size() - 1;
  }

  // Whether a call tells its length.
  bool is_bound(std::size_t id) const {
    const auto has = [&](const InputSpec& input) {
      return std::find(input.axis_ids.begin(), input.axis_ids.end(), id) != input.axis_ids.end();
    };
    return signature_.fixed_lengths[id] != 0 || std::any_of(signature_.inputs.begin(), signature_.inputs.end(), has);
  }

  std::size_t axis_of_loss(const std::string& name) {
    const auto known = metadata_.lengths.find(name);
    return add_axis(name, known == metadata_.lengths.end() ? 0 : known->second);
  }

  void give_axis(TensorSpec& spec, std::size_t id) const {
    spec.axes.push_back(signature_.axes[id]);
    spec.axis_ids.push_back(id);
  }

  // Axes of one name have one length: in models that is certain within a tensor alone, since names come from whoever
  // exported the model, and those of two models know nothing of each other.
  std::size_t axis_of_model(const MergedValue& value, std::size_t axis) {
    const std::int64_t length = value.lengths[axis];
    if (axis == 0 && length == signature_.fixed_lengths[kRows]) return kRows;
    if (length != 0) return add_axis(std::to_string(length), length);
    const std::string& name = value.axes[axis];
    const bool shown = !name.empty() && name.size() <= 100 &&
                       std::all_of(name.begin(), name.end(), [](char c) { return c > 0x20 && c < 0x7F; });
    return add_axis(value.name + "." + (shown ? name : std::to_string(axis)), 0);
  }

  void add_input(const MergedValue& value) {
    if (!value.is_described)
      refuse_in_scorer("tensors with a type and a shape as inputs", in_quotes(value.name) + " without");
    const std::size_t parameter = find_spec(loss_.parameters, value.name);
    if (parameter != kNone) return add_parameter(loss_.parameters[parameter], value);
    if (contents_.initializers.count(value.name) != 0) {
      refuse_in_scorer("no default for the input " + in_quotes(value.name), "one");
    }
    const std::size_t input = find_spec(loss_.inputs, value.name);
    if (input != kNone) return add_input_of_loss(loss_.inputs[input], value);
    const std::optional<pykd_dtype> dtype = dtype_of(value);
    if (!dtype) {
      refuse_in_scorer("tensors of numbers as inputs",
                       in_quotes(value.name) + " of ONNX type " + std::to_string(value.dtype));
    }
    if (value.lengths.size() > kMaxRank) {
      refuse_in_scorer("inputs of at most 8 axes",
                       std::to_string(value.lengths.size()) + " of " + in_quotes(value.name));
    }
    InputSpec spec;
    spec.name = value.name;
    spec.dtypes = dtype_bit(*dtype);
    for (std::size_t axis = 0; axis < value.lengths.size(); ++axis) give_axis(spec, axis_of_model(value, axis));
    signature_.inputs.push_back(std::move(spec));
  }

  void check_as_declared(const TensorSpec& declared, const MergedValue& value) const {
    const std::optional<pykd_dtype> dtype = dtype_of(value);
    if (value.is_described && dtype && declared.dtypes == dtype_bit(*dtype) &&
        declared.rank() == value.lengths.size()) {
      return;
    }
    refuse_in_scorer(value.name + " of " + dtypes_text(declared.dtypes) + " and rank " +
                         std::to_string(declared.rank()) + ", as the loss has it,",
                     "ONNX type " + std::to_string(value.dtype) + " and rank " + std::to_string(value.lengths.size()));
  }

  void add_input_of_loss(const InputSpec& declared, const MergedValue& value) {
    check_as_declared(declared, value);
    InputSpec spec;
    spec.name = declared.name;
    spec.dtypes = declared.dtypes;
    spec.ignore_index = declared.ignore_index;
    for (std::size_t i = 0; i < declared.axes.size(); ++i) {
      const std::size_t id = axis_of_loss(declared.axes[i]);
      give_axis(spec, id);
      least_[id] = std::max(least_[id], declared.least_lengths[i]);
    }
    if (declared.index_axis != kNone) spec.index_axis = axis_of_loss(loss_.axes[declared.index_axis]);
    signature_.inputs.push_back(std::move(spec));
  }

  // Engines are given the parameters that differ from their default alone, and so the defaults are compared.
  void add_parameter(const ParameterSpec& declared, const MergedValue& value) {
    const bool wide = loss_.parameter_dtype == PYKD_FLOAT64;
    if (!value.lengths.empty() || dtype_of(value) != loss_.parameter_dtype) {
      refuse_in_scorer(
          "a number of " + std::string(dtype_name(loss_.parameter_dtype)) + " as the parameter " + declared.name,
          "another tensor");
    }
    const auto found = contents_.initializers.find(declared.name);
    if (loss_.parameter_form == ParameterForm::kInputs) {
      if (found != contents_.initializers.end()) refuse_in_scorer("no default for the input " + declared.name, "one");
    } else {
      const double expected =
          wide ? declared.default_value : static_cast<double>(static_cast<float>(declared.default_value));
      const std::optional<double> got =
          found == contents_.initializers.end() ? std::nullopt : number_at(source_, found->second);
      // NOLINTNEXTLINE(bugprone-suspicious-memory-comparison): −0 is not 0
      if (!got || std::memcmp(&*got, &expected, sizeof expected) != 0) {
        refuse_in_scorer(
            "the default " + number_text(expected) + " for the parameter " + declared.name + ", as the metadata says,",
            got ? number_text(*got) : "none");
      }
    }
    signature_.parameters.push_back(declared);
  }

  // One whose lengths the inputs do not tell is left out: there is no memory to give for it before the run. So is an
  // input that a model returns as it is, which nobody computes.
  void add_output(const MergedValue& value) {
    const std::size_t of_loss = find_spec(loss_.outputs, value.name);
    OutputSpec spec;
    spec.name = value.name;
    bool known =
        find_spec(signature_.inputs, value.name) == kNone && find_spec(signature_.parameters, value.name) == kNone;
    if (of_loss != kNone) {
      const OutputSpec& declared = loss_.outputs[of_loss];
      check_as_declared(declared, value);
      spec.dtypes = declared.dtypes;
      for (const std::string& axis : declared.axes) {
        const std::size_t id = axis_of_loss(axis);
        known = known && is_bound(id);
        give_axis(spec, id);
      }
    } else {
      const std::optional<pykd_dtype> dtype = dtype_of(value);
      known = known && value.is_described && dtype && value.lengths.size() <= kMaxRank;
      for (std::size_t axis = 0; known && axis < value.lengths.size(); ++axis) {
        known = value.lengths[axis] != 0 || axis == 0;
        if (known) give_axis(spec, value.lengths[axis] == 0 ? kRows : axis_of_model(value, axis));
      }
      if (known) spec.dtypes = dtype_bit(*dtype);
    }
    if (!known) return signature_.shapeless.push_back(value.name);
    signature_.outputs.push_back(std::move(spec));
  }

  Source& source_;
  const MergedContents& contents_;
  ScorerMetadata metadata_;
  const Signature& loss_;
  Signature signature_;
  std::vector<std::int64_t> least_;
};

void check_weights(const MergedContents& contents, const std::string& folder, const std::string& label) {
  for (const auto& [name, least] : contents.weights) {
    if (folder.empty()) {
      fail(PYKD_BAD_ARTEFACT, "a scorer that holds its weights",
           "one with weights in the file " + in_quotes(name) + " beside it", "load it by its path");
    }
    std::uint64_t size = 0;
    const std::string path = (std::filesystem::path(folder) / name).string();
    open_regular(path, size);
    if (size >= least) continue;
    fail(PYKD_BAD_ARTEFACT,
         "the weights of " + label + " in " + path + ", at least " + std::to_string(least) + " bytes",
         std::to_string(size), "copy the file again, or write the scorer again with pykd merge");
  }
}

}  // namespace

Signature scan_merged(Source& source, const std::string& folder, PykdNodes& nodes) {
  try {
    MergedContents contents = read_merged(source);
    if (!contents.metadata) refuse_in_scorer("the metadata entry \"pykd.scorer\"", "none");
    Signature signature = Merger(source, contents, parse_scorer(*contents.metadata)).signature();
    check_weights(contents, folder, source.label());
    signature.metadata = std::move(*contents.metadata);
    nodes = std::move(contents.nodes);
    return signature;
  } catch (const protozero::exception& error) {
    fail(PYKD_BAD_ARTEFACT, "an ONNX file at " + source.label(),
         std::string("bytes that are none (") + error.what() + ")", "write it again with pykd merge");
  } catch (const Failure& failure) {
    throw Failure(failure.status(), source.label() + ": " + failure.what());
  }
}

}  // namespace pykd::internal
