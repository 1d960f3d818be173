// File: runtime/artefact/artefact.h
//
// The files that pykd.export wrote (docs/artefacts.md), as bytes: finding them in a folder, telling
// their kind, checking their integrity, and scanning ONNX files, all before an engine sees them.
// These functions meet hostile bytes first: whatever is wrong becomes a Failure(PYKD_BAD_ARTEFACT).
#ifndef PYKD_RUNTIME_ARTEFACT_ARTEFACT_H_
#define PYKD_RUNTIME_ARTEFACT_ARTEFACT_H_

#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>

#include "runtime/signature/signature.h"

namespace pykd::internal {

// An artefact that holds no weights is small; anything larger is not ours.
constexpr std::size_t kMaxOnnxSize = 16u << 20;

enum class FileFormat { kOnnx, kTorchScript };

// One file. `label` is how messages call it: its path, or "the bytes".
struct ArtefactFile {
  std::string label;
  FileFormat format = FileFormat::kOnnx;
  std::string bytes;
  bool unread = false;                     // a file of a folder, until read_contents()
  std::optional<ManifestEntry> described;  // by the manifest of its folder
};

// What `path` offers: one file, or those of a folder.
struct Artefact {
  std::optional<ArtefactFile> value;        // loss.onnx, or a single ONNX file of either kind
  std::optional<ArtefactFile> gradient;     // loss.grad.onnx of a folder
  std::optional<ArtefactFile> torchscript;  // loss.pt
  std::string folder;                       // empty: a single file
  std::string manifest;                     // the text of its manifest.json

  bool has_onnx() const { return value.has_value() || gradient.has_value(); }
};

// Reads the file `path`, or finds out what the folder `path` holds; a file that its manifest lists
// may be missing. Throws Failure(PYKD_NOT_FOUND) where there is nothing to load.
Artefact read_artefact(const std::string& path);

// Reads a file of a folder; does nothing where the bytes are there.
void read_contents(ArtefactFile& file);

// Whether another export has replaced the folder since read_artefact().
bool was_replaced(const Artefact& artefact);

// Compares the sizes of a folder's files, those that nobody reads included, with its manifest.
void check_sizes(const Artefact& artefact);

// Throws Failure(PYKD_BAD_ARTEFACT) where a file is larger than any of ours.
void check_size(const std::string& label, FileFormat format, std::uintmax_t size);

// The same for one file in memory.
Artefact wrap_artefact(const void* bytes, std::size_t size);

FileFormat detect_format(std::string_view bytes);

// Compares the checksum at the end with the bytes before it, and the whole with the manifest's hash.
// Tells a file that was cut short, one that was damaged, and one without a checksum apart.
void check_integrity(const ArtefactFile& file);

// The operators of domain "pykd" in an ONNX file, by the names of the functions that are their
// portable bodies.
struct PykdNodes {
  std::set<std::string> in_graph;
  std::map<std::string, std::set<std::string>> in_functions;  // by the function's name

  // Which of the ops an engine would run: it looks at a node's op first, and only where it does not
  // know that one does it go on to the nodes of the function.
  std::set<std::string> that_run(const std::set<std::string>& ops) const;
};

// Looks through an ONNX file without ONNX Runtime: the operators of onnx_operators.h and functions of
// domain "pykd" alone, in an order in which each has what it needs; a function for every operator of
// that domain; no external data, subgraphs or sparse tensors; bounded numbers of nodes and constants,
// and nothing large that depends on constants alone; inputs, outputs and defaults as its metadata
// says. Returns the signature in that metadata, and fills in `nodes` where it is wanted.
Signature scan_onnx(const ArtefactFile& file, PykdNodes* nodes = nullptr);

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_ARTEFACT_ARTEFACT_H_
