// File: base/shared_library.h
//
// Opening a shared library that then stays open until the process ends.
#ifndef PYKD_BASE_SHARED_LIBRARY_H_
#define PYKD_BASE_SHARED_LIBRARY_H_

#include <string>

namespace pykd::internal {

class SharedLibrary {
 public:
  SharedLibrary() = default;

  // Opens `path` as the dynamic linker does. False where that fails; error() then tells why.
  bool open(const std::string& path);
  // The same for a library that this process has loaded already, and for nothing else.
  bool open_loaded(const std::string& path);

  // The address of a function; nullptr where there is none of that name.
  void* symbol(const char* name) const;

  const std::string& error() const { return error_; }
  bool operator==(const SharedLibrary& other) const { return handle_ == other.handle_; }

 private:
  void* handle_ = nullptr;  // never closed
  std::string error_;
};

// The file that the code or data at `address` came from; empty where that is unknown.
std::string library_path_of(const void* address);

// The path of a library that this process has loaded and whose file name starts with `prefix`;
// empty where there is none.
std::string find_loaded_library(const std::string& prefix);

// The environment variable `name`; empty where it is not set.
std::string environment(const char* name);

}  // namespace pykd::internal

#endif  // PYKD_BASE_SHARED_LIBRARY_H_
