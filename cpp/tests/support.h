// File: support.h
//
// Small helpers that the tests share.
#ifndef PYKD_TESTS_SUPPORT_H_
#define PYKD_TESTS_SUPPORT_H_

#include <gtest/gtest.h>

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

}  // namespace pykd::tests

#endif  // PYKD_TESTS_SUPPORT_H_
