// File: fuzz/fuzz.h
//
// What a fuzz target is: a function of bytes, in the form that libFuzzer knows, and seeds to start from. main.cpp runs
// it with a mutator of our own; with clang, -fsanitize=fuzzer in place of main.cpp gives libFuzzer.
//
// A target returns 0. Whatever it must not do (crash, leak, throw anything else than it says) ends the process.
#ifndef PYKD_FUZZ_FUZZ_H_
#define PYKD_FUZZ_FUZZ_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace pykd::fuzz {

enum class Form { kBytes, kProtobuf };

// Of the target that this program is linked with.
Form form();
std::vector<std::string> seeds();
std::vector<std::string> words();  // that mean something in its inputs

}  // namespace pykd::fuzz

#endif  // PYKD_FUZZ_FUZZ_H_
