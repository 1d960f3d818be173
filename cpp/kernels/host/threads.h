// File: kernels/host/threads.h
//
// pykd's own threads, for callers that lend none: the C interface. ONNX Runtime and LibTorch lend theirs.
//
// They are made when a kernel first wants more than one, one per core less the caller's own, and sleep when idle. Any
// number of threads may run kernels at once: the first gets the helpers, the others work alone meanwhile, so that the
// cores are never asked for twice. Nothing needs to be shut down: at the end of the process they are asleep, and what
// they sleep on is never destroyed. A child after fork() makes its own.
#ifndef PYKD_KERNELS_HOST_THREADS_H_
#define PYKD_KERNELS_HOST_THREADS_H_

#include "kernels/kernel.h"

namespace pykd::kernels {

// A way to at most `threads` of them, the caller's own among them; 0: one per core.
Parallel own_threads(int threads);

}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_HOST_THREADS_H_
