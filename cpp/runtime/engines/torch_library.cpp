// Opens libpykd_torch, which holds the TorchScript engine.
#include <filesystem>
#include <mutex>
#include <string_view>

#include "base/error.h"
#include "base/fork.h"
#include "base/shared_library.h"
#include "runtime/engines/engines.h"

namespace pykd::internal {
namespace {

struct TorchLibrary {
  SharedLibrary library;
  std::string path;
  Engine* engine = nullptr;
};

std::string default_path() {
  // The address of a hidden function: that of an exported one may lie in the program that links us.
  const std::filesystem::path self = library_path_of(reinterpret_cast<const void*>(&torchscript_engine));
  return (self.parent_path() / "libpykd_torch.so").string();
}

// The library that somebody named; empty where nobody did.
std::string named_library(const std::string& in_options) {
  return in_options.empty() ? environment("PYKD_TORCH_LIBRARY") : in_options;
}

[[noreturn]] void unavailable(const std::string& expected, const std::string& got, const std::string& remedy) {
  fail(PYKD_UNAVAILABLE, expected + " for the engine \"torchscript\"", got, remedy);
}

// Absent, not loadable, not of this version, refused by itself: four things a user does different
// things about.
TorchLibrary open_torch_library(const std::string& path) {
  TorchLibrary result;
  result.path = path;
  std::error_code error;
  const bool is_path = path.find('/') != std::string::npos;
  if (is_path && !std::filesystem::exists(path, error)) {
    unavailable("the library libpykd_torch.so", "no file at " + path,
                "build pykd with PYKD_TORCH=ON, or name the library in the load options or in the "
                "environment variable PYKD_TORCH_LIBRARY");
  }
  if (!result.library.open(path)) {
    unavailable("to open " + path, result.library.error(),
                "make LibTorch visible to the dynamic linker (LD_LIBRARY_PATH, or import torch "
                "first), in the version that pykd was built with");
  }
  const auto interface_version =
      reinterpret_cast<decltype(&pykd_torch_interface_version)>(result.library.symbol("pykd_torch_interface_version"));
  const auto make_engine = reinterpret_cast<decltype(&pykd_torch_engine)>(result.library.symbol("pykd_torch_engine"));
  const std::uint32_t version = interface_version == nullptr ? 0 : interface_version();
  if (version != PYKD_ENGINE_INTERFACE_VERSION || make_engine == nullptr) {
    unavailable("interface version " + std::to_string(PYKD_ENGINE_INTERFACE_VERSION) + " of " + path,
                interface_version == nullptr ? "a library without one" : std::to_string(version),
                "use libpykd and libpykd_torch of one build");
  }
  char message[512] = "";
  result.engine = make_engine(message, sizeof message);
  if (result.engine == nullptr && std::string_view(message).substr(0, 9) == "expected ") {  // it says everything
    throw Failure(PYKD_UNAVAILABLE, message);
  }
  if (result.engine == nullptr) {
    unavailable("a LibTorch that works", message, "check the installation of torch");
  }
  return result;
}

}  // namespace

Engine& torchscript_engine(const std::string& library) {
  static StaticMutex& mutex = *new StaticMutex;
  static TorchLibrary* opened = nullptr;  // never freed: its engine lives until the process ends
  const std::lock_guard<StaticMutex> lock(mutex);
  const std::string named = named_library(library);
  if (opened == nullptr) {
    opened = new TorchLibrary(open_torch_library(named.empty() ? default_path() : named));
  } else if (!named.empty()) {
    SharedLibrary wanted;
    if (!wanted.open_loaded(named) || !(wanted == opened->library)) {
      unavailable(named, opened->path + ", which this process uses already", "name one library per process");
    }
  }
  return *opened->engine;
}

}  // namespace pykd::internal
