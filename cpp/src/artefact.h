// File: artefact.h
//
// The files that pykd.export wrote (docs/artefacts.md), as bytes: finding them in a folder, telling
// their kind, checking their integrity, and scanning ONNX files, all before an engine sees them.
// These functions meet hostile bytes first: whatever is wrong becomes a Failure(PYKD_BAD_ARTEFACT).
#ifndef PYKD_SRC_ARTEFACT_H_
#define PYKD_SRC_ARTEFACT_H_

#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>

#include "signature.h"

namespace pykd::internal {

// An artefact that holds no weights is small; anything larger is not ours.
constexpr std::size_t kMaxOnnxSize = 16u << 20;

enum class FileFormat { kOnnx, kTorchScript };

// One file. `label` is how messages call it: its path, or "the bytes".
struct ArtefactFile {
  std::string label;
  FileFormat format = FileFormat::kOnnx;
  std::string bytes;
};

// What `path` offers: one file, or those of a folder.
struct Artefact {
  std::optional<ArtefactFile> value;        // loss.onnx, or a single ONNX file of either kind
  std::optional<ArtefactFile> gradient;     // loss.grad.onnx of a folder
  std::optional<ArtefactFile> torchscript;  // loss.pt

  bool has_onnx() const { return value.has_value() || gradient.has_value(); }
};

// Reads the file or folder `path`. Throws Failure(PYKD_NOT_FOUND) where it is not there or a file
// that the folder's manifest lists is not.
Artefact read_artefact(const std::string& path);

// The same for one file in memory.
Artefact wrap_artefact(const void* bytes, std::size_t size);

FileFormat detect_format(std::string_view bytes);

// Compares the checksum at the end with the bytes before it. Tells a file that was cut short, one
// that was damaged, and one without a checksum apart.
void check_integrity(const ArtefactFile& file);

// The operators of domain "pykd" in an ONNX file, by the names of the functions that are their
// portable bodies. A function may have several bodies, called overloads.
struct PykdNodes {
  std::set<std::string> in_graph;
  std::map<std::string, std::set<std::string>> in_functions;  // by the function's name

  // Which of the ops an engine would run: it looks at a node's op first, and only where it does not
  // know that one does it go on to the nodes of the function.
  std::set<std::string> that_run(const std::set<std::string>& ops) const;
};

// Looks through an ONNX file without ONNX Runtime: nothing but standard operators and functions of
// domain "pykd", a function for every operator of that domain, no external data, no subgraphs, no
// sparse tensors; inputs and outputs as its metadata says. Returns the signature in that metadata,
// and fills in `nodes` where it is wanted.
Signature scan_onnx(const ArtefactFile& file, PykdNodes* nodes = nullptr);

}  // namespace pykd::internal

#endif  // PYKD_SRC_ARTEFACT_H_
