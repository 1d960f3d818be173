#include "base/error.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <new>

namespace pykd::internal {
namespace {

// A plain array: recording an error needs no memory, and a thread that ends has nothing to destroy.
constexpr std::size_t kMaxMessage = 4096;
thread_local char last_message[kMaxMessage] = "";

constexpr char kDigits[] = "0123456789abcdef";

// The bytes of the UTF-8 character at the start of `text`; 0 where there is none.
std::size_t character_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto follows = [&](std::size_t i, unsigned least = 0x80, unsigned most = 0xBF) {
    return byte(i) >= least && byte(i) <= most;
  };
  const unsigned first = byte(0);
  if (first < 0x80) return text.empty() ? 0 : 1;
  if (first >= 0xC2 && first <= 0xDF) return follows(1) ? 2 : 0;
  if (first >= 0xE0 && first <= 0xEF) {  // the bounds leave out long forms and surrogates
    return follows(1, first == 0xE0 ? 0xA0 : 0x80, first == 0xED ? 0x9F : 0xBF) && follows(2) ? 3 : 0;
  }
  if (first >= 0xF0 && first <= 0xF4) {
    return follows(1, first == 0xF0 ? 0x90 : 0x80, first == 0xF4 ? 0x8F : 0xBF) && follows(2) && follows(3) ? 4 : 0;
  }
  return 0;
}

// Keeps as much of the two texts as there is room for. What comes out is UTF-8, whatever bytes (of a path, of another
// library's message) go in: others are written as \xNN.
void set_last_error(std::string_view text, std::string_view more = "") noexcept {
  std::size_t length = 0;
  for (std::string_view rest : {text, more}) {
    while (!rest.empty()) {
      const std::size_t bytes = character_length(rest);
      const auto byte = static_cast<unsigned char>(rest.front());
      const char escape[] = {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
      const std::string_view next = bytes > 0 ? rest.substr(0, bytes) : std::string_view(escape, sizeof escape);
      if (length + next.size() >= kMaxMessage) break;
      std::memcpy(last_message + length, next.data(), next.size());
      length += next.size();
      rest.remove_prefix(std::max<std::size_t>(bytes, 1));
    }
  }
  last_message[length] = '\0';
}

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t substituted = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({row[j] + 1, row[j + 1] + 1, substituted});
    }
  }
  return row.back();
}

}  // namespace

Failure::Failure(pykd_status status, const std::string& what) : std::runtime_error(what), status_(status) {}
Failure::~Failure() = default;

void fail(pykd_status status, const std::string& expected, const std::string& got, const std::string& remedy) {
  throw Failure(status, "expected " + expected + ", got " + got + "; " + remedy);
}

std::string in_quotes(std::string_view text) {
  constexpr std::size_t kMaxQuoted = 100;
  std::string result = "\"";
  for (char c : text.substr(0, kMaxQuoted)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte >= 0x7F) {
      result += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
    } else {
      if (c == '"' || c == '\\') result += '\\';
      result += c;
    }
  }
  return result + (text.size() > kMaxQuoted ? "...\"" : "\"");
}

std::string number_text(double number) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, number, std::chars_format::general, 9);
  return {text, end.ptr};
}

bool tells_of_memory(std::string_view message) {
  // std::bad_alloc; ONNX Runtime's arena; LibTorch's allocator; CUDA; our own kernels (ops/onnxruntime/)
  for (const std::string_view words :
       {"bad_alloc", "Failed to allocate memory", "can't allocate memory", "out of memory", "expected enough memory"}) {
    if (message.find(words) != std::string_view::npos) return true;
  }
  return false;
}

void check_threads(std::int32_t threads) {
  constexpr std::int32_t kMost = 1024;
  if (threads >= 0 && threads <= kMost) return;
  fail(PYKD_INVALID_VALUE, "from 0 to " + std::to_string(kMost) + " threads", std::to_string(threads),
       "use 0 for one per core");
}

std::string nearest(std::string_view wrong, const std::vector<std::string>& names) {
  // A third of the letters may be wrong: "student_logit" is a slip, "teacher_logits" is another
  // name.
  std::size_t best = wrong.size() / 3 + 1;
  std::string found;
  if (wrong.size() > 100) return found;
  for (const std::string& name : names) {
    if (name.size() > 100) continue;
    const std::size_t distance = edit_distance(wrong, name);
    if (distance < best) {
      best = distance;
      found = name;
    }
  }
  return found;
}

const char* last_error() noexcept { return last_message; }

pykd_status record_exception() noexcept {
  try {
    throw;
  } catch (const Failure& failure) {
    set_last_error(failure.what());
    return failure.status();
  } catch (const std::bad_alloc&) {
    set_last_error("expected enough memory for this call, got too little; free some or use smaller tensors");
    return PYKD_UNAVAILABLE;
  } catch (const std::exception& error) {
    set_last_error("a mistake in pykd itself, please report it: ", error.what());
    return PYKD_INTERNAL;
  } catch (...) {
    set_last_error("a mistake in pykd itself, please report it: an exception of unknown type");
    return PYKD_INTERNAL;
  }
}

}  // namespace pykd::internal

extern "C" const char* pykd_last_error(void) { return pykd::internal::last_error(); }
