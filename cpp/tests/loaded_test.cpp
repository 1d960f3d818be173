// A libonnxruntime.so that the program has loaded already is the one that pykd uses.
#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "pykd/pykd.hpp"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace pykd::tests {
namespace {

TEST(LoadedOnnxRuntime, IsReused) {
  const char* variable = std::getenv("PYKD_ONNXRUNTIME_LIBRARY");
  const std::string path = variable == nullptr ? "libonnxruntime.so" : variable;
  ASSERT_NE(::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL), nullptr) << ::dlerror();
  ::unsetenv("PYKD_ONNXRUNTIME_LIBRARY");
  TemporaryFolder folder;
  write_tiny_folder(folder);
  EXPECT_EQ(Loss::load(folder.path()).engine(), "onnxruntime");
}

}  // namespace
}  // namespace pykd::tests
