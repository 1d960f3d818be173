// File: runtime/artefact/onnx_scan.h
//
// An ONNX file without ONNX Runtime. The scan meets hostile bytes first, before any engine sees them.
#ifndef PYKD_RUNTIME_ARTEFACT_ONNX_SCAN_H_
#define PYKD_RUNTIME_ARTEFACT_ONNX_SCAN_H_

#include <map>
#include <set>
#include <string>

#include "runtime/artefact/files.h"
#include "runtime/signature/signature.h"

namespace pykd::internal {

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

#endif  // PYKD_RUNTIME_ARTEFACT_ONNX_SCAN_H_
