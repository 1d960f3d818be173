/* A stand-in for an ONNX Runtime that is too old: the first two functions of OrtApiBase. */
#include <stddef.h>

struct base {
  const void* (*get_api)(unsigned);
  const char* (*get_version)(void);
};

static const void* get_api(unsigned version) {
  (void)version;
  return NULL;
}
static const char* get_version(void) { return "1.20.3"; }
static const struct base the_base = {get_api, get_version};

__attribute__((visibility("default"))) const struct base* OrtGetApiBase(void) { return &the_base; }
