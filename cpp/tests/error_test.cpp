#include "base/error.h"

#include <new>
#include <thread>

#include "tests/support.h"

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

TEST(Guard, WritesBytesThatAreNoUtf8AsEscapes) {
  const auto kept = [](const std::string& text) {
    guarded([&] { throw Failure(PYKD_NOT_FOUND, text); });
    return std::string(last_error());
  };
  EXPECT_EQ(kept("caf\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80"), "caf\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80");
  EXPECT_EQ(kept("caf\xE9"), "caf\\xe9");
  EXPECT_EQ(kept("\x80 \xC0\xAF \xFF"), "\\x80 \\xc0\\xaf \\xff");
  EXPECT_EQ(kept("\xED\xA0\x80"), "\\xed\\xa0\\x80");           // a surrogate
  EXPECT_EQ(kept("\xF4\x90\x80\x80"), "\\xf4\\x90\\x80\\x80");  // beyond Unicode
  EXPECT_EQ(kept("\xE2\x82"), "\\xe2\\x82");                    // cut off
  guarded([] { throw std::logic_error("caf\xE9"); });
  tests::expect_words(last_error(), {"caf\\xe9"});
  EXPECT_LT(kept(std::string(4000, '\xFF')).size(), 4096u);
}

TEST(Message, TellsOfMemoryInTheWordsOfEveryEngine) {
  for (const char* words :
       {"std::bad_alloc", "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 2147483648",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000000000 bytes. Error code 12",
        "CUDA out of memory. Tried to allocate 20.00 GiB",
        "expected enough memory for this call, got too little; free some or use smaller tensors"}) {
    EXPECT_TRUE(tells_of_memory(words)) << words;
  }
  EXPECT_FALSE(tells_of_memory("Failed to find kernel for com.microsoft.FusedMatMul(1)"));
  EXPECT_FALSE(tells_of_memory(""));
  EXPECT_EQ(guarded([] { throw std::bad_alloc(); }), PYKD_UNAVAILABLE);
  EXPECT_STREQ(last_error(), "expected enough memory for this call, got too little; free some or use smaller tensors");
}

TEST(Message, WritesNumbersInTheSameWayInEveryLocale) {
  const tests::CommaLocale comma;
  EXPECT_EQ(number_text(1234.5), "1234.5");
  EXPECT_EQ(number_text(1e-300), "1e-300");
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
