// Structs that grow: a caller with an older or a newer header than the library's.
#include "base/struct_size.h"

#include "base/error.h"
#include "tests/support.h"

namespace pykd::internal {
namespace {

struct First {
  std::size_t struct_size = sizeof(First);
  std::int64_t a = 1;
};
struct Second {
  std::size_t struct_size = sizeof(Second);
  std::int64_t a = 1;
  std::int64_t b = 2;
};

// The memory of one, as that of the other.
template <class To, class From>
To& as(From& from) {
  return reinterpret_cast<To&>(from);
}

TEST(StructSize, AnOlderCallerKeepsTheDefaultOfWhatItLacks) {
  struct {
    First first;
    std::int64_t behind = 99;
  } caller;
  caller.first.a = 7;
  const Second copy = copy_sized(as<Second>(caller.first), Second{}, sizeof(First), "a thing", "THING_INIT");
  EXPECT_EQ(copy.a, 7);
  EXPECT_EQ(copy.b, 2);
}

TEST(StructSize, AnOlderCallerIsWrittenToNoFurtherThanItReaches) {
  struct {
    First first;
    std::int64_t behind = 99;
  } caller;
  write_sized(Second{0, 5, 6}, as<Second>(caller.first), sizeof(First), "a thing", "THING_INIT");
  EXPECT_EQ(caller.first.a, 5);
  EXPECT_EQ(caller.first.struct_size, sizeof(First));
  EXPECT_EQ(caller.behind, 99);
}

TEST(StructSize, ANewerCallerIsServedWhereItSetsNothingNew) {
  Second caller;
  caller.b = 0;
  EXPECT_EQ(copy_sized(as<First>(caller), First{}, sizeof(First), "a thing", "THING_INIT").a, 1);
  caller.b = 3;
  EXPECT_FAILS_WITH(Failure, PYKD_INVALID_VALUE,
                    copy_sized(as<First>(caller), First{}, sizeof(First), "a thing", "THING_INIT"), "a newer one");
  write_sized(First{0, 5}, as<First>(caller), sizeof(First), "a thing", "THING_INIT");
  EXPECT_EQ(caller.a, 5);
  EXPECT_EQ(caller.b, 3);
}

TEST(StructSize, RefusesASizeThatIsNone) {
  for (const std::size_t size : {std::size_t{0}, sizeof(First) - 1, std::size_t{4097}, static_cast<std::size_t>(-4)}) {
    First caller;
    caller.struct_size = size;
    EXPECT_FAILS_WITH(Failure, PYKD_INVALID_VALUE, copy_sized(caller, First{}, sizeof(First), "a thing", "THING_INIT"),
                      "THING_INIT");
    EXPECT_FAILS_WITH(Failure, PYKD_INVALID_VALUE, write_sized(First{}, caller, sizeof(First), "a thing", "THING_INIT"),
                      "THING_INIT");
  }
}

}  // namespace
}  // namespace pykd::internal
