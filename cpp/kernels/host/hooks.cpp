#include "kernels/host/hooks.h"

#include <atomic>
#include <deque>
#include <mutex>

namespace pykd::kernels {
namespace {

constexpr pykd_hooks kNone = PYKD_HOOKS_INIT;
std::atomic<const pykd_hooks*> the_hooks{&kNone};

}  // namespace

const pykd_hooks& hooks() { return *the_hooks.load(std::memory_order_acquire); }

// The hooks before stay where they are, until the process ends: another thread may be calling one of them.
void set_hooks(const pykd_hooks& hooks) {
  static std::mutex mutex;
  static auto* const all = new std::deque<pykd_hooks>;  // threads may outlive what static objects are destroyed
  const std::lock_guard<std::mutex> lock(mutex);
  the_hooks.store(&all->emplace_back(hooks), std::memory_order_release);
}

void log(pykd_log_level level, const std::string& text) noexcept {
  const pykd_hooks& set = hooks();
  if (set.log != nullptr) set.log(set.state, level, text.c_str());
}

}  // namespace pykd::kernels
