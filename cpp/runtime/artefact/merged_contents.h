// File: runtime/artefact/merged_contents.h
//
// What a merged scorer holds (`pykd merge`: teacher, student and loss in one ONNX file), as far as the loader has need
// of it: read from the file in small pieces, past the weights, and not judged yet.
#ifndef PYKD_RUNTIME_ARTEFACT_MERGED_CONTENTS_H_
#define PYKD_RUNTIME_ARTEFACT_MERGED_CONTENTS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime/artefact/onnx_scan.h"
#include "runtime/artefact/source.h"

namespace pykd::internal {

// An input or output of the graph.
struct MergedValue {
  std::string name;
  std::int64_t dtype = 0;             // onnx.TensorProto.DataType
  bool is_described = false;          // it is a tensor with an element type and a shape
  std::vector<std::string> axes;      // their names; empty where one has none
  std::vector<std::int64_t> lengths;  // 0 where the axis is free
};

// Where something lies in the file.
struct Place {
  std::uint64_t begin = 0, end = 0;
};

struct MergedContents {
  std::optional<std::string> metadata;
  std::vector<MergedValue> inputs, outputs;
  std::unordered_map<std::string, Place> initializers;  // of the graph
  PykdNodes nodes;
  // The files with weights, by the names that the file has for them, and how long they must be at least.
  std::map<std::string, std::uint64_t> weights;
};

// Whether a file is what `pykd merge` wrote: by its metadata, which are looked for past everything else.
bool is_merged(Source& source);

// Reads one. Operators, subgraphs and functions may be any, as those of models are. What would let the file be read in
// two ways is refused, and so are names of weights' files that are more than a name. Throws Failure(PYKD_BAD_ARTEFACT).
MergedContents read_merged(Source& source);

// The number that an initializer holds; none where it is no number of float32 or float64.
std::optional<double> number_at(Source& source, Place place);

[[noreturn]] void refuse_in_scorer(const std::string& expected, const std::string& got);

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_ARTEFACT_MERGED_CONTENTS_H_
