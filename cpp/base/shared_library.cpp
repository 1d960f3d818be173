#include "base/shared_library.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdlib>
#include <string_view>

namespace pykd::internal {

bool SharedLibrary::open(const std::string& path) {
  handle_ = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle_ == nullptr) {
    const char* text = ::dlerror();
    error_ = text == nullptr ? "unknown error" : text;
  }
  return handle_ != nullptr;
}

bool SharedLibrary::open_loaded(const std::string& path) {
  handle_ = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  return handle_ != nullptr;
}

void* SharedLibrary::symbol(const char* name) const { return ::dlsym(handle_, name); }

std::string library_path_of(const void* address) {
  Dl_info info;
  if (::dladdr(address, &info) == 0 || info.dli_fname == nullptr) return "";
  return info.dli_fname;
}

std::string find_loaded_library(const std::string& prefix) {
  struct Search {
    std::string_view prefix;
    std::string found;
  } search{prefix, ""};
  auto visit = [](dl_phdr_info* info, std::size_t, void* data) {
    auto& wanted = *static_cast<Search*>(data);
    const std::string_view path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
    const std::string_view name = path.substr(path.rfind('/') + 1);
    if (name.substr(0, wanted.prefix.size()) != wanted.prefix) return 0;
    wanted.found = path;
    return 1;
  };
  ::dl_iterate_phdr(visit, &search);
  return search.found;
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace pykd::internal
