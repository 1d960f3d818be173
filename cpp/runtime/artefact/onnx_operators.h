// File: runtime/artefact/onnx_operators.h
//
// The standard operators that an ONNX file of pykd may hold, with their attributes: more than pykd's own losses are
// made of, since others register theirs. What is not here is refused before an engine sees it: control flow, random
// numbers, strings, sequences, and whatever makes a large tensor out of a few bytes. To let another one in, add a line.
#ifndef PYKD_RUNTIME_ARTEFACT_ONNX_OPERATORS_H_
#define PYKD_RUNTIME_ARTEFACT_ONNX_OPERATORS_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace pykd::internal {

constexpr std::int64_t kOnnxOpset = 18;  // which gives the operators their meaning
constexpr std::int64_t kPykdOpset = 1;

// Of an operator whose result may be larger than its inputs, or than all of them broadcast together: engines must not
// come to compute it from constants alone.
constexpr bool kMayGrow = true;

struct OnnxOperator {
  std::string_view name;
  std::size_t max_inputs;
  // "name:type" each, with the letters of attribute_types.
  std::string_view attributes = "";
  bool may_grow = false;
  std::size_t max_outputs = 1;
};

constexpr std::size_t kAnyNumber = 256;  // of inputs, which Concat, Max and Min take as many of as they are given

constexpr OnnxOperator kOnnxOperators[] = {
    {"Abs", 1},
    {"Add", 2},
    {"And", 2},
    {"ArgMax", 1, "axis:i keepdims:i select_last_index:i"},
    {"ArgMin", 1, "axis:i keepdims:i select_last_index:i"},
    {"Cast", 1, "to:i"},
    {"Ceil", 1},
    {"Clip", 3},
    {"Concat", kAnyNumber, "axis:i", kMayGrow},
    {"Constant", 0, "value:t"},
    {"Cos", 1},
    {"CumSum", 2, "exclusive:i reverse:i"},
    {"Div", 2},
    {"Elu", 1, "alpha:f"},
    {"Equal", 2},
    {"Erf", 1},
    {"Exp", 1},
    {"Expand", 2, "", kMayGrow},
    {"Flatten", 1, "axis:i"},
    {"Floor", 1},
    {"Gather", 2, "axis:i", kMayGrow},
    {"GatherElements", 2, "axis:i", kMayGrow},
    {"GatherND", 2, "batch_dims:i", kMayGrow},
    {"Gemm", 3, "alpha:f beta:f transA:i transB:i", kMayGrow},
    {"Greater", 2},
    {"GreaterOrEqual", 2},
    {"Identity", 1},
    {"IsInf", 1, "detect_negative:i detect_positive:i"},
    {"IsNaN", 1},
    {"LeakyRelu", 1, "alpha:f"},
    {"Less", 2},
    {"LessOrEqual", 2},
    {"Log", 1},
    {"LogSoftmax", 1, "axis:i"},
    {"MatMul", 2, "", kMayGrow},
    {"Max", kAnyNumber},
    {"Min", kAnyNumber},
    {"Mod", 2, "fmod:i"},
    {"Mul", 2},
    {"Neg", 1},
    {"Not", 1},
    {"Or", 2},
    {"PRelu", 2},
    {"Pow", 2},
    {"Range", 3, "", kMayGrow},
    {"Reciprocal", 1},
    {"ReduceL1", 2, "keepdims:i noop_with_empty_axes:i"},
    {"ReduceL2", 2, "keepdims:i noop_with_empty_axes:i"},
    {"ReduceLogSum", 2, "keepdims:i noop_with_empty_axes:i"},
    {"ReduceLogSumExp", 2, "keepdims:i noop_with_empty_axes:i"},
    {"ReduceMax", 2, "keepdims:i noop_with_empty_axes:i"},
    {"ReduceMean", 2, "keepdims:i noop_with_empty_axes:i"},
    {"ReduceMin", 2, "keepdims:i noop_with_empty_axes:i"},
    {"ReduceProd", 2, "keepdims:i noop_with_empty_axes:i"},
    {"ReduceSum", 2, "keepdims:i noop_with_empty_axes:i"},
    {"ReduceSumSquare", 2, "keepdims:i noop_with_empty_axes:i"},
    {"Relu", 1},
    {"Reshape", 2, "allowzero:i"},
    {"Round", 1},
    {"ScatterElements", 3, "axis:i reduction:s", kMayGrow},
    {"ScatterND", 3, "reduction:s", kMayGrow},
    {"Shape", 1, "end:i start:i", kMayGrow},
    {"Sigmoid", 1},
    {"Sign", 1},
    {"Sin", 1},
    {"Size", 1, "", kMayGrow},
    {"Slice", 5},
    {"Softmax", 1, "axis:i"},
    {"Softplus", 1},
    {"Split", 2, "axis:i num_outputs:i", kMayGrow, kAnyNumber},
    {"Sqrt", 1},
    {"Squeeze", 2},
    {"Sub", 2},
    {"Sum", kAnyNumber},
    {"Tan", 1},
    {"Tanh", 1},
    {"ThresholdedRelu", 1, "alpha:f"},
    {"TopK", 2, "axis:i largest:i sorted:i", kMayGrow, 2},
    {"Transpose", 1, "perm:I"},
    {"Trilu", 2, "upper:i"},
    {"Unsqueeze", 2},
    {"Where", 3},
    {"Xor", 2},
};

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_ARTEFACT_ONNX_OPERATORS_H_
