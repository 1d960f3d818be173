/* A stand-in for the CUDA driver, as far as libpykd speaks to it: which context is current on the thread. */
#include <stddef.h>

static _Thread_local void* current = NULL;

__attribute__((visibility("default"))) int cuCtxGetCurrent(void** context) {
  *context = current;
  return 0;
}
__attribute__((visibility("default"))) int cuCtxSetCurrent(void* context) {
  current = context;
  return 0;
}
