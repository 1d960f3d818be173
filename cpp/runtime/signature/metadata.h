// File: runtime/signature/metadata.h
//
// Reading what an artefact says of itself: the JSON inside its files, and the manifest beside them
// (docs/artefacts.md). Both may come from a hostile file.
#ifndef PYKD_RUNTIME_SIGNATURE_METADATA_H_
#define PYKD_RUNTIME_SIGNATURE_METADATA_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "runtime/signature/signature.h"

namespace pykd::internal {

constexpr int kFormatVersion = 2;  // the newest metadata that this library understands

// Reads the metadata of one artefact. Throws Failure(PYKD_BAD_ARTEFACT) that names the field which
// is missing, has the wrong type or contradicts another one.
Signature parse_signature(std::string json);

// Throws Failure(PYKD_BAD_ARTEFACT) where loss.onnx and loss.grad.onnx are not of one export: all that
// both say is the same, so that the gradient's file has every input, parameter and output of the other.
void check_one_export(const Signature& value, const Signature& gradient);

// What a merged scorer says of itself.
struct ScorerMetadata {
  Signature loss;                               // of which the file has the scores
  std::map<std::string, std::int64_t> lengths;  // of those axes of the loss that the models fix
  std::vector<std::string> outputs;             // of the file
};

// Reads it. Throws Failure(PYKD_BAD_ARTEFACT).
ScorerMetadata parse_scorer(const std::string& text);

// What manifest.json says of one file.
struct ManifestEntry {
  std::string name;
  std::uint64_t bytes = 0;
  std::string sha256;
};

struct Manifest {
  std::string export_id;  // empty: written before there was one
  std::vector<ManifestEntry> files;
};

// Reads manifest.json. Throws Failure(PYKD_BAD_ARTEFACT).
Manifest parse_manifest(const std::string& text);

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_SIGNATURE_METADATA_H_
