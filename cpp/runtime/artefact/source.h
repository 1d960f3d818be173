// File: runtime/artefact/source.h
//
// Bytes that are read where they are wanted: of a file, which may be gigabytes of weights, or of memory.
#ifndef PYKD_RUNTIME_ARTEFACT_SOURCE_H_
#define PYKD_RUNTIME_ARTEFACT_SOURCE_H_

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <string>
#include <string_view>

namespace pykd::internal {

class Source {
 public:
  Source() = default;
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;
  virtual ~Source() = default;

  // How messages call it: the path of the file, or "the bytes that were given".
  virtual const std::string& label() const = 0;
  virtual std::uint64_t size() const = 0;
  // `count` bytes from `offset` on, all of them within size().
  virtual void read(std::uint64_t offset, char* to, std::size_t count) = 0;
};

// A regular file. Throws Failure(PYKD_NOT_FOUND) where it cannot be read.
class FileSource : public Source {
 public:
  explicit FileSource(const std::string& path);
  const std::string& label() const override { return path_; }
  std::uint64_t size() const override { return size_; }
  void read(std::uint64_t offset, char* to, std::size_t count) override;

 private:
  std::string path_;
  std::uint64_t size_ = 0;  // before the stream, which is opened with it
  std::ifstream stream_;
};

// Memory of somebody's, which outlives it.
class MemorySource : public Source {
 public:
  MemorySource(std::string_view bytes, std::string label) : bytes_(bytes), label_(std::move(label)) {}
  const std::string& label() const override { return label_; }
  std::uint64_t size() const override { return bytes_.size(); }
  void read(std::uint64_t offset, char* to, std::size_t count) override {
    bytes_.copy(to, count, static_cast<std::size_t>(offset));
  }

 private:
  std::string_view bytes_;
  std::string label_;
};

// Opens a file that is regular: a device or a pipe might never end. `size` becomes that of the file that is open, in
// whose place another may be put at any time. Throws Failure(PYKD_NOT_FOUND).
std::ifstream open_regular(const std::string& path, std::uint64_t& size);

[[noreturn]] void cannot_read(const std::string& path, const std::string& why);

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_ARTEFACT_SOURCE_H_
