// The metadata of an artefact: any text is a signature or a Failure(PYKD_BAD_ARTEFACT).
#include "runtime/signature/metadata.h"
#include "base/error.h"
#include "fuzz/fuzz.h"
#include "runtime/signature/call.h"
#include "tests/tiny_model.h"

pykd::fuzz::Form pykd::fuzz::form() { return Form::kBytes; }

std::vector<std::string> pykd::fuzz::seeds() {
  tests::json labels = tests::tiny_metadata(true);
  labels["inputs"][1] = {{"name", "labels"},  {"axes", {"batch"}},     {"dtype", "int64"},
                         {"gradient", false}, {"index_of", "classes"}, {"ignore_index", -100}};
  tests::json script = tests::tiny_metadata(true);
  script["kind"] = "torchscript";
  labels["least_lengths"] = {{"classes", 2}};
  labels["parameters"][0]["maximum"] = 2.0;
  return {tests::tiny_metadata(true).dump(), tests::tiny_metadata(false).dump(2), labels.dump(), script.dump()};
}

std::vector<std::string> pykd::fuzz::words() {
  return {"\"name\"", "\"axes\"", "\"gradient_of\"", "\"minimum\"", "\"maximum\"",         "\"least_lengths\"",
          "null",     "true",     "1e999",           "-1",          "9223372036854775808", "[[[[",
          "{\"a\":",  "\\u0000",  "\\ud800",         "\"float\"",   "\"batch\"",           ","};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const pykd::internal::Signature signature =
        pykd::internal::parse_signature(std::string(reinterpret_cast<const char*>(data), size));
    for (const auto& output : signature.outputs) {
      if (pykd::internal::find_output(signature, output.name.c_str()) >= signature.outputs.size()) std::abort();
    }
  } catch (const pykd::internal::Failure& failure) {
    if (failure.status() != PYKD_BAD_ARTEFACT) throw;
  }
  return 0;
}
