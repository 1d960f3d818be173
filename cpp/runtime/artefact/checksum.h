// File: runtime/artefact/checksum.h
//
// Whether a file is what pykd.export wrote, all of it and unchanged (docs/artefacts.md).
#ifndef PYKD_RUNTIME_ARTEFACT_CHECKSUM_H_
#define PYKD_RUNTIME_ARTEFACT_CHECKSUM_H_

#include "runtime/artefact/files.h"

namespace pykd::internal {

// Compares the checksum at the end with the bytes before it, and the whole with the manifest's hash.
// Tells a file that was cut short, one that was damaged, and one without a checksum apart.
void check_integrity(const ArtefactFile& file);
// The same of a merged scorer, which is read in pieces. Weights that lie beside it have no checksum.
void check_integrity(Source& source);

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_ARTEFACT_CHECKSUM_H_
