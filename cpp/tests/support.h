// File: tests/support.h
//
// Small helpers that the tests share.
#ifndef PYKD_TESTS_SUPPORT_H_
#define PYKD_TESTS_SUPPORT_H_

#include <gtest/gtest.h>

#include <cstdlib>
#include <locale>
#include <string>

// Runs `statement` and expects an exception of type `Exception` with that status whose text
// contains every one of the words.
#define EXPECT_FAILS_WITH(Exception, expected_status, statement, ...)     \
  do {                                                                    \
    try {                                                                 \
      statement;                                                          \
      ADD_FAILURE() << "expected an exception from " #statement;          \
    } catch (const Exception& exception) {                                \
      EXPECT_EQ(exception.status(), expected_status) << exception.what(); \
      ::pykd::tests::expect_words(exception.what(), {__VA_ARGS__});       \
    }                                                                     \
  } while (false)

namespace pykd::tests {

inline void expect_words(const std::string& text, std::initializer_list<const char*> words) {
  for (const char* word : words) {
    EXPECT_NE(text.find(word), std::string::npos) << "no " << word << " in: " << text;
  }
}

// An environment variable for the length of a scope; nullptr: it is not set.
class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name) {
    const char* before = std::getenv(name);
    was_set_ = before != nullptr;
    if (was_set_) before_ = before;
    set(value);
  }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;
  ~Variable() { set(was_set_ ? before_.c_str() : nullptr); }

 private:
  void set(const char* value) const {
    if (value == nullptr) {
      ::unsetenv(name_);
    } else {
      ::setenv(name_, value, 1);
    }
  }

  const char* name_;
  bool was_set_;
  std::string before_;
};

// C++'s global locale, for the length of a scope, as a host may set it: 1.234,5 instead of 1234.5.
class CommaLocale {
 public:
  CommaLocale() : before_(std::locale::global(std::locale(std::locale::classic(), new Comma))) {}
  CommaLocale(const CommaLocale&) = delete;
  CommaLocale& operator=(const CommaLocale&) = delete;
  ~CommaLocale() { std::locale::global(before_); }

 private:
  class Comma : public std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  std::locale before_;
};

}  // namespace pykd::tests

#endif  // PYKD_TESTS_SUPPORT_H_
