#include "error.h"

#include <new>
#include <thread>

#include "support.h"

namespace pykd::internal {
namespace {

TEST(Guard, TurnsEveryExceptionIntoAStatus) {
  EXPECT_EQ(guarded([] {}), PYKD_OK);
  EXPECT_EQ(guarded([] { fail(PYKD_INVALID_TYPE, "a", "b", "do c"); }), PYKD_INVALID_TYPE);
  EXPECT_STREQ(last_error(), "expected a, got b; do c");
  EXPECT_EQ(guarded([] { throw std::bad_alloc(); }), PYKD_UNAVAILABLE);
  EXPECT_EQ(guarded([] { throw std::logic_error("oops"); }), PYKD_INTERNAL);
  tests::expect_words(last_error(), {"oops", "report"});
  EXPECT_EQ(guarded([] { throw 42; }), PYKD_INTERNAL);
}

TEST(Guard, KeepsOneErrorPerThread) {
  guarded([] { throw Failure(PYKD_NOT_FOUND, "mine"); });
  std::thread([] {
    EXPECT_STREQ(last_error(), "");
    guarded([] { throw Failure(PYKD_NOT_FOUND, "yours"); });
    EXPECT_STREQ(last_error(), "yours");
  }).join();
  EXPECT_STREQ(last_error(), "mine");
}

TEST(Guard, CutsLongMessagesBetweenCharacters) {
  for (int shift = 0; shift < 3; ++shift) {
    const std::string prefix(shift, 'x');
    std::string text = prefix;
    while (text.size() < 10000) text += "\xE2\x82\xAC";  // a euro sign: three bytes
    guarded([&] { throw Failure(PYKD_NOT_FOUND, text); });
    const std::string kept = last_error();
    EXPECT_LT(kept.size(), 4096u);
    EXPECT_EQ((kept.size() - prefix.size()) % 3, 0u);
  }
}

TEST(Message, QuotesHostileText) {
  EXPECT_EQ(in_quotes("a\"b\\\n\x80"), "\"a\\\"b\\\\\\x0a\\x80\"");
  EXPECT_LT(in_quotes(std::string(1000, '\0')).size(), 500u);
}

TEST(Message, FindsTheNearestName) {
  const std::vector<std::string> names = {"student_logits", "teacher_logits", "labels"};
  EXPECT_EQ(nearest("student_logit", names), "student_logits");
  EXPECT_EQ(nearest("lables", names), "labels");
  EXPECT_EQ(nearest("student_features", names), "");
  EXPECT_EQ(nearest("", names), "");
  EXPECT_EQ(nearest("x", names), "");
}

}  // namespace
}  // namespace pykd::internal
