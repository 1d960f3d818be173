#include "kernels/simd/targets.h"

#include <hwy/targets.h>

namespace pykd::kernels {
namespace {

// Best first, as Highway numbers them. Asked once: SupportedTargets() tells what use_simd() left of them.
const std::vector<std::int64_t>& targets() {
  static const std::vector<std::int64_t> all = hwy::SupportedAndGeneratedTargets();
  return all;
}

}  // namespace

std::vector<std::string> simd_targets() {
  std::vector<std::string> names;
  for (const std::int64_t target : targets()) names.emplace_back(hwy::TargetName(target));
  return names;
}

bool use_simd(const char* name) {
  std::int64_t wanted = 0;  // all of them
  if (name != nullptr) {
    for (const std::int64_t target : targets()) {
      if (name == std::string(hwy::TargetName(target))) wanted = target;
    }
    if (wanted == 0) return false;
  } else {
    targets();
  }
  hwy::SetSupportedTargetsForTest(wanted);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return true;
}

}  // namespace pykd::kernels
