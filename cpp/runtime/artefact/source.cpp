#include "runtime/artefact/source.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "base/error.h"

namespace pykd::internal {

void cannot_read(const std::string& path, const std::string& why) {
  fail(PYKD_NOT_FOUND, "a file that can be read at " + path, why, "check the path and its permissions");
}

std::ifstream open_regular(const std::string& path, std::uint64_t& size) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) cannot_read(path, "no regular file there");
  std::ifstream stream(path, std::ios::binary);
  if (!stream) cannot_read(path, std::strerror(errno));
  const std::streamoff end = stream.seekg(0, std::ios::end).tellg();
  if (end < 0) cannot_read(path, "no size");
  stream.seekg(0);
  size = static_cast<std::uint64_t>(end);
  return stream;
}

FileSource::FileSource(const std::string& path) : path_(path), stream_(open_regular(path, size_)) {}

void FileSource::read(std::uint64_t offset, char* to, std::size_t count) {
  stream_.clear();
  stream_.seekg(static_cast<std::streamoff>(offset));
  stream_.read(to, static_cast<std::streamsize>(count));
  // A file that became shorter since it was opened, or a disk that fails.
  if (static_cast<std::size_t>(stream_.gcount()) != count) cannot_read(path_, "an error while reading it");
}

}  // namespace pykd::internal
