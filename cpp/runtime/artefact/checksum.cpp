#include "runtime/artefact/checksum.h"

#include <zlib.h>

#include <algorithm>
#include <protozero/pbf_reader.hpp>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "runtime/artefact/sha256.h"

namespace pykd::internal {
namespace {

// The trailers of docs/artefacts.md, without the eight digits that follow.
constexpr std::string_view kOnnxTrailer("\x72\x16\x0a\x0apykd.crc32\x12\x08", 16);
constexpr std::string_view kZipTrailer = "pykd.crc32=";
constexpr std::size_t kDigits = 8;

std::string hex_digits(unsigned long value) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string text(kDigits, '0');
  for (std::size_t i = 0; i < kDigits; ++i) text[i] = kHex[(value >> (28 - 4 * i)) & 15];
  return text;
}

[[noreturn]] void cut_short(const ArtefactFile& file) {
  fail(PYKD_BAD_ARTEFACT, "a whole file at " + file.label,
       "one that was cut short or is damaged (" + std::to_string(file.bytes.size()) + " bytes)", "copy it again");
}

// Whether the file ends in the middle of something. Called where the checksum is missing.
bool is_cut_short(const ArtefactFile& file) {
  if (file.format == FileFormat::kTorchScript) {
    // A ZIP archive ends with a record of at least 22 bytes and a comment of at most 65535.
    const std::size_t tail = std::min<std::size_t>(file.bytes.size(), 22 + 65535);
    return file.bytes.find("PK\x05\x06", file.bytes.size() - tail) == std::string::npos;
  }
  try {
    protozero::pbf_reader model(file.bytes);
    while (model.next()) model.skip();
    return false;
  } catch (const protozero::end_of_buffer_exception&) {
    return true;
  }
}

void compare(std::string_view written, unsigned long checksum, const std::string& label) {
  if (written == hex_digits(checksum)) return;
  fail(PYKD_BAD_ARTEFACT, "contents with the checksum " + in_quotes(written) + " at " + label,
       in_quotes(hex_digits(checksum)), "the file is damaged: copy it again");
}

}  // namespace

void check_integrity(Source& source) {
  constexpr std::size_t kLength = kOnnxTrailer.size() + kDigits;
  char trailer[kLength] = {};
  const std::uint64_t size = source.size();
  if (size >= kLength) source.read(size - kLength, trailer, kLength);
  if (std::string_view(trailer, kOnnxTrailer.size()) != kOnnxTrailer) {
    fail(PYKD_BAD_ARTEFACT, "pykd's checksum at the end of " + source.label(), "none",
         "it was cut short, was changed after pykd merge or is of an older one: merge the models again, or load it "
         "with the "
         "integrity check switched off if you changed it yourself");
  }
  std::vector<char> chunk(std::size_t{1} << 20);
  unsigned long checksum = crc32_z(0, nullptr, 0);
  for (std::uint64_t at = 0, end = size - kLength; at < end;) {
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(chunk.size(), end - at));
    source.read(at, chunk.data(), count);
    checksum = crc32_z(checksum, reinterpret_cast<const Bytef*>(chunk.data()), count);
    at += count;
  }
  compare({trailer + kOnnxTrailer.size(), kDigits}, checksum, source.label());
}

void check_integrity(const ArtefactFile& file) {
  const std::string_view bytes = file.bytes;
  const std::string_view trailer = file.format == FileFormat::kOnnx ? kOnnxTrailer : kZipTrailer;
  const std::size_t length = trailer.size() + kDigits;
  if (bytes.empty()) {
    fail(PYKD_BAD_ARTEFACT, "a whole file at " + file.label, "an empty one", "copy it again");
  }
  if (bytes.size() < length || bytes.substr(bytes.size() - length, trailer.size()) != trailer) {
    bool truncated = false;
    try {
      truncated = is_cut_short(file);
    } catch (const protozero::exception&) {
      fail(PYKD_BAD_ARTEFACT, "an ONNX or a TorchScript file at " + file.label, "neither",
           "load loss.grad.onnx, loss.onnx, loss.pt or score.onnx, or the folder that pykd.export wrote them to");
    }
    if (truncated) cut_short(file);
    fail(PYKD_BAD_ARTEFACT, "pykd's checksum at the end of " + file.label, "none",
         "it was not written by pykd.export or was changed afterwards: export the loss again, or "
         "load it with the integrity check switched off if you changed it yourself");
  }
  const std::size_t covered = bytes.size() - length;
  const unsigned long checksum = crc32_z(crc32_z(0, nullptr, 0), reinterpret_cast<const Bytef*>(bytes.data()), covered);
  compare(bytes.substr(bytes.size() - kDigits), checksum, file.label);
  if (!file.described) return;
  const std::string hash = Sha256::hex(bytes);
  if (hash != file.described->sha256) {
    not_of_the_manifest(file.label, "with the SHA-256 " + in_quotes(file.described->sha256), in_quotes(hash));
  }
}

}  // namespace pykd::internal
