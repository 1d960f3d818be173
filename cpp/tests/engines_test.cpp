// Finding and opening engines: what is tried, in which order, and what is said where one cannot be
// had.
//
// An engine that has been opened stays for the life of the process. The tests therefore run in the
// order in which they stand here: first what cannot be opened, then what can.
#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>

#include "pykd/pykd.hpp"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace pykd::tests {
namespace {

#define EXPECT_ERROR(expected_status, statement, ...) EXPECT_FAILS_WITH(Error, expected_status, statement, __VA_ARGS__)

json torchscript_metadata() {
  json metadata = tiny_metadata(true);
  metadata["kind"] = "torchscript";
  for (const char* list : {"inputs", "outputs"}) {
    for (json& item : metadata[list]) item["dtype"] = "float";
  }
  return metadata;
}

class Engines : public testing::Test {
 protected:
  void SetUp() override {
    write_tiny_folder(folder);
    folder.write("loss.pt", fake_torchscript(torchscript_metadata()));
    folder.write_manifest();
    torchscript.engine = "torchscript";
    onnxruntime.engine = "onnxruntime";
  }

  Loss load(const LoadOptions& options) { return Loss::load(folder.path(), options); }
  Tensors inputs() const { return {{"student_logits", view(x, {2, 3})}, {"teacher_logits", view(x, {2, 3})}}; }

  TemporaryFolder folder;
  LoadOptions torchscript, onnxruntime;
  std::vector<float> x = {1, 2, 3, 3, 2, 1};
};

TEST_F(Engines, SaysThatLibpykdTorchIsAbsent) {
  torchscript.torch_library = folder.path("libpykd_torch.so");
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(torchscript), "no file at ", "PYKD_TORCH=ON", "PYKD_TORCH_LIBRARY");
}

TEST_F(Engines, SaysThatLibpykdTorchCannotBeOpened) {
  folder.write("libpykd_torch.so", "not a library");
  torchscript.torch_library = folder.path("libpykd_torch.so");
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(torchscript), "to open", "LD_LIBRARY_PATH");
}

TEST_F(Engines, SaysThatLibpykdTorchIsOfAnotherVersion) {
  torchscript.torch_library = FAKE_TORCH_OLD;
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(torchscript), "interface version 4", "got 5", "one build");
  torchscript.torch_library = FAKE_TORCH_EMPTY;
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(torchscript), "a library without one", "one build");
}

TEST_F(Engines, SaysWhatLibpykdTorchSays) {
  torchscript.torch_library = FAKE_TORCH_REFUSING;
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(torchscript), "torch is asleep");
}

// A message of three parts is passed on as it is, and not as one part of another.
TEST_F(Engines, NestsNoMessageOfLibpykdTorchInItsOwn) {
  torchscript.torch_library = FAKE_TORCH_OTHER_TORCH;
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(torchscript), "expected LibTorch 2.13, got 2.12; install it");
  try {
    load(torchscript);
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find("got expected"), std::string::npos) << error.what();
  }
}

TEST_F(Engines, SaysThatOnnxRuntimeIsTooOld) {
  onnxruntime.onnxruntime_library = FAKE_ONNXRUNTIME;
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(onnxruntime), "1.21 or newer", "1.20.3", "pip install onnxruntime");
}

TEST_F(Engines, SaysThatOnnxRuntimeIsNotThere) {
  onnxruntime.onnxruntime_library = folder.path("libonnxruntime.so");
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(onnxruntime), "libonnxruntime.so", "the load options", "pip install onnxruntime");
  onnxruntime.onnxruntime_library = FAKE_TORCH_EMPTY;
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(onnxruntime), "OrtGetApiBase");
}

// A name is used, or it is an error: TorchScript, which could be had, is not taken instead.
TEST_F(Engines, NeverPassesOverALibraryThatIsNamed) {
  const Variable torch("PYKD_TORCH_LIBRARY", FAKE_TORCH_GOOD);
  LoadOptions options;
  options.onnxruntime_library = folder.path("libonnxruntime.so");
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(options), "libonnxruntime.so", "the load options");
  options.onnxruntime_library = FAKE_ONNXRUNTIME;
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(options), "1.21 or newer", "1.20.3");
  const Variable variable("PYKD_ONNXRUNTIME_LIBRARY", folder.path("libonnxruntime.so").c_str());
  EXPECT_ERROR(PYKD_UNAVAILABLE, load({}), "libonnxruntime.so", "PYKD_ONNXRUNTIME_LIBRARY");
}

TEST_F(Engines, TakesTheEngineWhoseLibraryIsNamed) {
  LoadOptions options;
  options.torch_library = folder.path("libpykd_torch.so");
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(options), "libpykd_torch.so", "no file at");
  std::filesystem::remove(folder.path("loss.pt"));
  EXPECT_ERROR(PYKD_NOT_FOUND, load(options), "\"torchscript\"", "ONNX alone");
}

TEST_F(Engines, SaysWhyNeitherCanBeHad) {
  if (::dlopen("libonnxruntime.so", RTLD_LAZY) != nullptr) GTEST_SKIP() << "this system has an ONNX Runtime";
  const Variable onnxruntime_variable("PYKD_ONNXRUNTIME_LIBRARY", nullptr);
  const Variable torch("PYKD_TORCH_LIBRARY", FAKE_TORCH_REFUSING);
  EXPECT_ERROR(PYKD_UNAVAILABLE, load({}), "one of the two engines", "onnxruntime:", "has loaded none",
               "onnxruntime/capi", "the dynamic linker", "torchscript:", "torch is asleep");
}

TEST_F(Engines, ABadFileIsABadFileWithoutAnEngine) {
  onnxruntime.onnxruntime_library = folder.path("libonnxruntime.so");
  folder.write("loss.onnx", "damaged");
  folder.write_manifest();
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(onnxruntime), "loss.onnx");
}

// From here on engines are opened.

TEST_F(Engines, PassesOverAnEngineThatCannotBeHadAndSaysWhy) {
  if (::dlopen("libonnxruntime.so", RTLD_LAZY) != nullptr) GTEST_SKIP() << "this system has an ONNX Runtime";
  const Variable variable("PYKD_ONNXRUNTIME_LIBRARY", nullptr);
  const Variable torch("PYKD_TORCH_LIBRARY", FAKE_TORCH_GOOD);
  const std::string old = folder.path("libonnxruntime.so.1.20.3");
  std::filesystem::copy_file(FAKE_ONNXRUNTIME, old);
  ASSERT_NE(::dlopen(old.c_str(), RTLD_NOW), nullptr) << ::dlerror();
  const Loss loss = load({});
  EXPECT_EQ(loss.engine(), "torchscript");
  EXPECT_EQ(loss.engine_version(), "0.fake");
  EXPECT_EQ(loss.value(inputs()).value("loss"), 7.0);
  expect_words(loss.passed_over(), {"onnxruntime: expected", "got ONNX Runtime 1.20.3", old.c_str()});
  EXPECT_EQ(load(torchscript).passed_over(), "");
}

TEST_F(Engines, NeverFallsBackFromAnExplicitRequest) {
  onnxruntime.onnxruntime_library = folder.path("libonnxruntime.so");
  onnxruntime.torch_library = FAKE_TORCH_GOOD;
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(onnxruntime), "libonnxruntime.so");
}

TEST_F(Engines, NeverFallsBackFromABadFile) {
  folder.write("loss.onnx", "damaged");
  folder.write_manifest();
  const Variable torch("PYKD_TORCH_LIBRARY", FAKE_TORCH_GOOD);
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load({}), "loss.onnx");
}

TEST_F(Engines, RunsTorchScriptThroughItsLibrary) {
  torchscript.torch_library = FAKE_TORCH_GOOD;
  const Loss loss = load(torchscript);
  EXPECT_EQ(loss.value(inputs()).value("error"), 7.0);
  EXPECT_ERROR(PYKD_ENGINE_FAILURE, loss.value(inputs(), {{"weight", 13.0}}), "dislikes 13");
  torchscript.torch_library = FAKE_TORCH_OLD;
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(torchscript), "uses already");
}

TEST_F(Engines, RefusesATorchScriptFileWithoutMetadata) {
  torchscript.torch_library = FAKE_TORCH_GOOD;
  folder.write("loss.pt", fake_torchscript(nullptr));
  folder.write_manifest();
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(torchscript), "loss.pt", "object");
  folder.write("loss.pt", fake_torchscript(tiny_metadata(true)));
  folder.write_manifest();
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(torchscript), "kind");
}

TEST_F(Engines, NeedsTheFilesOfTheEngineAlone) {
  std::filesystem::remove(folder.path("loss.onnx"));
  std::filesystem::remove(folder.path("loss.grad.onnx"));
  torchscript.torch_library = FAKE_TORCH_GOOD;
  EXPECT_EQ(load(torchscript).engine(), "torchscript");
  EXPECT_ERROR(PYKD_NOT_FOUND, load(onnxruntime), "\"onnxruntime\"", "TorchScript alone");
  write_tiny_folder(folder);
  folder.write_manifest();
  std::filesystem::remove(folder.path("loss.pt"));
  EXPECT_EQ(load(onnxruntime).engine(), "onnxruntime");
  EXPECT_ERROR(PYKD_NOT_FOUND, load(torchscript), "\"torchscript\"", "ONNX alone");
}

TEST_F(Engines, PrefersOnnxRuntime) {
  const Loss loss = load({});
  EXPECT_EQ(loss.engine(), "onnxruntime");
  EXPECT_EQ(loss.passed_over(), "");
  EXPECT_EQ(loss.value(inputs()).value("loss"), 0.0);
}

TEST_F(Engines, UsesOneOnnxRuntimePerProcess) {
  onnxruntime.onnxruntime_library = FAKE_ONNXRUNTIME;
  EXPECT_ERROR(PYKD_UNAVAILABLE, load(onnxruntime), "uses already", "one ONNX Runtime per process");
  const char* path = std::getenv("PYKD_ONNXRUNTIME_LIBRARY");
  if (path == nullptr) return;  // found by the dynamic linker
  onnxruntime.onnxruntime_library = path;
  EXPECT_EQ(load(onnxruntime).engine(), "onnxruntime");
  EXPECT_EQ(load({}).engine(), "onnxruntime");
  const Variable variable("PYKD_ONNXRUNTIME_LIBRARY", FAKE_ONNXRUNTIME);
  EXPECT_ERROR(PYKD_UNAVAILABLE, load({}), "PYKD_ONNXRUNTIME_LIBRARY", "uses already");
}

}  // namespace
}  // namespace pykd::tests
