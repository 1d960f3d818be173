// File: base/error.h
//
// How libpykd says that something went wrong. Inside the library a Failure is thrown; at the C
// boundary guarded() turns every exception into a pykd_status and keeps its text for
// pykd_last_error(). Nothing else may cross that boundary.
//
//     fail(PYKD_INVALID_VALUE, "student_logits with axes (batch, classes)", "rank 1 with shape
//     [4]",
//          "add the missing axis");
//     // expected student_logits with axes (batch, classes), got rank 1 with shape [4]; add the ...
#ifndef PYKD_BASE_ERROR_H_
#define PYKD_BASE_ERROR_H_

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "pykd/pykd.h"

namespace pykd::internal {

// The exception of the library's inside. libpykd_torch, which has a copy of this code, throws it into libpykd, too: on
// Linux a handler knows an exception by the name of its type.
class Failure : public std::runtime_error {
 public:
  Failure(pykd_status status, const std::string& what);
  ~Failure() override;
  pykd_status status() const noexcept { return status_; }

 private:
  pykd_status status_;
};

// Throws a Failure that reads "expected <expected>, got <got>; <remedy>".
[[noreturn]] void fail(pykd_status status, const std::string& expected, const std::string& got,
                       const std::string& remedy);

// `text` in double quotes, fit for a message: bytes that are not printable ASCII are escaped and
// anything longer than 100 bytes is cut, because the text may come from a hostile file.
std::string in_quotes(std::string_view text);

// The number with as many digits as a float32 has, in the same words whatever the locale says.
PYKD_API std::string number_text(double number);

// Whether an engine's message says that it got no memory.
PYKD_API bool tells_of_memory(std::string_view message);

// Throws where nobody can mean that many threads (pykd.h).
void check_threads(std::int32_t threads);

// The name in `names` that a person who wrote `wrong` may have meant; empty where none is near.
std::string nearest(std::string_view wrong, const std::vector<std::string>& names);

// The text behind pykd_last_error(), one per thread.
const char* last_error() noexcept;

// Records the exception that is being handled as this thread's last error and returns its status.
pykd_status record_exception() noexcept;

// Runs `body` at the C boundary: no exception leaves it.
template <class Body>
pykd_status guarded(Body&& body) noexcept {
  try {
    body();
    return PYKD_OK;
  } catch (...) {
    return record_exception();
  }
}

}  // namespace pykd::internal

#endif  // PYKD_BASE_ERROR_H_
