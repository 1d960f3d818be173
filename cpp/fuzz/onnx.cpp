// The scans of ONNX files and of merged scorers, and the checksum before them: any bytes are a signature or a
// Failure(PYKD_BAD_ARTEFACT).
#include "base/error.h"
#include "fuzz/fuzz.h"
#include "runtime/artefact/checksum.h"
#include "runtime/artefact/files.h"
#include "runtime/artefact/merged_contents.h"
#include "runtime/artefact/merged_scan.h"
#include "runtime/artefact/onnx_scan.h"
#include "tests/tiny_model.h"

namespace {

using pykd::tests::function;
using pykd::tests::node;
using pykd::tests::opset;
using pykd::tests::tiny_model;

template <class Body>
void expect_bad_artefact(Body body) {
  try {
    body();
  } catch (const pykd::internal::Failure& failure) {
    if (failure.status() != PYKD_BAD_ARTEFACT) throw;
  }
}

}  // namespace

pykd::fuzz::Form pykd::fuzz::form() { return Form::kProtobuf; }

std::vector<std::string> pykd::fuzz::seeds() {
  tests::TinyModel calls = tiny_model(true);
  calls.opsets.push_back(opset("pykd", 1));
  calls.functions = {function("pykd", "f", {node("Mul", {"x", "x"}, "y")}),
                     function("pykd", "g", {node("f", {"x"}, "y", {}, "pykd")})};
  calls.nodes[1] = node("g", {"d"}, "dd", {}, "pykd");
  tests::TinyModel scorer = tests::tiny_scorer();
  scorer.functions = calls.functions;
  std::string graph;
  tests::pbf_writer(graph).add_message(5, tests::tensor_outside("w", {{"location", "w.data"}, {"length", "8"}}));
  scorer.nodes.push_back(node("If", {"d"}, "e", {tests::attribute_with(6, graph)}));
  return {tiny_model(true).bytes(),     tiny_model(false).bytes(),    calls.bytes(),
          tests::sealed(calls.bytes()), tests::tiny_scorer().bytes(), scorer.bytes(),
          tests::sealed(scorer.bytes())};
}

std::vector<std::string> pykd::fuzz::words() {
  return {"pykd",  "Constant", "Expand",      "student_logits", "loss", "\x00\x00\x00\x80", std::string(8, '\xff'),
          "value", "axis",     "pykd.scorer", "lengths",        "../"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  pykd::internal::ArtefactFile file;
  file.label = "fuzz.onnx";
  file.bytes.assign(reinterpret_cast<const char*>(data), size);
  expect_bad_artefact([&] { pykd::internal::check_integrity(file); });
  expect_bad_artefact([&] {
    pykd::internal::PykdNodes nodes;
    pykd::internal::scan_onnx(file, &nodes);
    nodes.that_run({"f", "soft_target_float32"});
  });
  pykd::internal::MemorySource source(file.bytes, file.label);
  pykd::internal::is_merged(source);
  expect_bad_artefact([&] { pykd::internal::check_integrity(source); });
  expect_bad_artefact([&] {
    pykd::internal::PykdNodes nodes;
    const pykd::internal::Signature signature = pykd::internal::scan_merged(source, "", nodes);
    for (const auto& output : signature.outputs) {
      for (const std::size_t axis : output.axis_ids) {
        if (axis >= signature.axes.size()) std::abort();
      }
    }
  });
  return 0;
}
