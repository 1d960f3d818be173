// File: kernels/host/hooks.h
//
// What a host has set with pykd_set_hooks(): its own allocator and where it wants to read what happens.
#ifndef PYKD_KERNELS_HOST_HOOKS_H_
#define PYKD_KERNELS_HOST_HOOKS_H_

#include <string>

#include "pykd/pykd.h"

namespace pykd::kernels {

// Those in force; each function is null where it was not set. The reference stays good.
const pykd_hooks& hooks();

// Sets a copy of them.
void set_hooks(const pykd_hooks& hooks);

// Hands `text` to the host's log; nothing where there is none.
void log(pykd_log_level level, const std::string& text) noexcept;

}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_HOST_HOOKS_H_
