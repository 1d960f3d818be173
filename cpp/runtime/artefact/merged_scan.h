// File: runtime/artefact/merged_scan.h
//
// A merged scorer without ONNX Runtime: what it takes and returns, and whether its weights are there. Its operators are
// those of any model, and not looked at: whoever loads one trusts whoever wrote it with that.
#ifndef PYKD_RUNTIME_ARTEFACT_MERGED_SCAN_H_
#define PYKD_RUNTIME_ARTEFACT_MERGED_SCAN_H_

#include <string>

#include "runtime/artefact/onnx_scan.h"
#include "runtime/artefact/source.h"
#include "runtime/signature/signature.h"

namespace pykd::internal {

// The signature: inputs of the models by the types and lengths that the graph gives them, those of the loss by its
// metadata. `folder` is where its weights lie; empty: the file is in memory, and must hold them itself. Fills in
// `nodes`. Throws Failure(PYKD_BAD_ARTEFACT), or Failure(PYKD_NOT_FOUND) where a file with weights is not there.
Signature scan_merged(Source& source, const std::string& folder, PykdNodes& nodes);

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_ARTEFACT_MERGED_SCAN_H_
