// Stand-ins for libpykd_torch, so that opening it, its version check and the choice of an engine
// are tested without LibTorch. FAKE says which one this is.
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "runtime/engines/engine.h"

#define FAKE_GOOD 1
#define FAKE_OLD 2
#define FAKE_REFUSING 3
#define FAKE_EMPTY 4
#define FAKE_OTHER_TORCH 5

namespace pykd::internal {
namespace {

// Writes 7 to every scalar it is asked for; throws where the first parameter is negative.
class FakeSession : public Session {
 public:
  void run(const Request& request) const override {
    if (!request.parameters.empty() && request.parameters[0] == 13.0) {
      throw std::runtime_error("the fake engine dislikes 13");
    }
    for (const pykd_tensor& output : request.outputs) {
      if (output.rank == 0) *static_cast<float*>(output.data) = 7.0f;
    }
  }
};

class FakeEngine : public Engine {
 public:
  std::string version() const override { return "0.fake"; }
  std::string metadata(const void* bytes, std::size_t size) override {
    const std::string text(static_cast<const char*>(bytes), size);
    const std::size_t end = text.find("PK\x05\x06");
    if (end == std::string::npos) throw std::runtime_error("no metadata");
    return text.substr(4, end - 4);
  }
  std::unique_ptr<Session> open(const void*, std::size_t, const Signature&, const EngineOptions&) override {
    return std::make_unique<FakeSession>();
  }
};

}  // namespace
}  // namespace pykd::internal

#if FAKE != FAKE_EMPTY
std::uint32_t pykd_torch_interface_version(void) {
  return FAKE == FAKE_OLD ? PYKD_ENGINE_INTERFACE_VERSION + 1 : PYKD_ENGINE_INTERFACE_VERSION;
}

pykd::internal::Engine* pykd_torch_engine(char* error, std::size_t size) {
  if (FAKE == FAKE_REFUSING) {
    std::snprintf(error, size, "torch is asleep");
    return nullptr;
  }
  if (FAKE == FAKE_OTHER_TORCH) {
    std::snprintf(error, size, "expected LibTorch 2.13, got 2.12; install it");
    return nullptr;
  }
  static pykd::internal::FakeEngine engine;
  return &engine;
}
#endif
