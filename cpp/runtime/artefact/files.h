// File: runtime/artefact/files.h
//
// The files that pykd.export wrote (docs/artefacts.md), as bytes: finding them in a folder, telling
// their kind, reading them. Whatever is wrong becomes a Failure(PYKD_BAD_ARTEFACT).
#ifndef PYKD_RUNTIME_ARTEFACT_FILES_H_
#define PYKD_RUNTIME_ARTEFACT_FILES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "runtime/artefact/source.h"
#include "runtime/signature/metadata.h"

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

// What `pykd merge` wrote. It may be large, and is not read as a whole.
struct MergedFile {
  std::unique_ptr<Source> source;
  std::string path;        // empty: it is in memory
  std::string_view bytes;  // there; of the caller
};

// What `path` offers: one file, or those of a folder.
struct Artefact {
  std::optional<ArtefactFile> value;        // loss.onnx, or a single ONNX file of any kind
  std::optional<ArtefactFile> gradient;     // loss.grad.onnx of a folder
  std::optional<ArtefactFile> torchscript;  // loss.pt
  std::optional<ArtefactFile> score;        // score.onnx of a folder, which has no other files then
  std::optional<MergedFile> merged;         // a single file, and no other then
  std::string folder;                       // empty: a single file
  std::string manifest;                     // the text of its manifest.json

  bool has_onnx() const { return value.has_value() || gradient.has_value() || score.has_value(); }
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

// The same for one file in memory, which is the caller's where it is a merged scorer.
Artefact wrap_artefact(const void* bytes, std::size_t size);

// Throws Failure(PYKD_BAD_ARTEFACT): a file is what `pykd merge` wrote, for those who did not ask for it.
[[noreturn]] void refuse_merged(const MergedFile& file);

FileFormat detect_format(std::string_view bytes);

// Throws Failure(PYKD_BAD_ARTEFACT): `label`, a file of a folder, is not the one that its manifest describes.
[[noreturn]] void not_of_the_manifest(const std::string& label, const std::string& expected, const std::string& got);

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_ARTEFACT_FILES_H_
