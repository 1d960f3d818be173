// Runs a fuzz target: the seeds and the files that are named, then mutants of them until the time is over.
//
//     fuzz_onnx [-seconds=20] [-seed=1] [file or folder …]
//
// The input that ends the process is left in crash-<target>; give that file alone to see it again.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <protozero/pbf_reader.hpp>
#include <protozero/varint.hpp>
#include <random>

#include "fuzz/fuzz.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

using Random = std::mt19937_64;

std::string current, target;

void keep_input() {
  const std::string path = "crash-" + target;
  std::ofstream(path, std::ios::binary) << current;
  std::fprintf(stderr, "the input is in %s (%zu bytes)\n", path.c_str(), current.size());
}

void run(const std::string& input) {
  current = input;
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(current.data()), current.size());
}

std::size_t below(Random& random, std::size_t limit) { return limit == 0 ? 0 : random() % limit; }

// ---- Changes to bytes ----------------------------------------------------------------------------

void mutate_bytes(std::string& bytes, Random& random, const std::vector<std::string>& corpus) {
  static const std::vector<std::string> words = pykd::fuzz::words();
  if (bytes.empty()) bytes = "x";
  const std::size_t at = below(random, bytes.size());
  switch (below(random, 7)) {
    case 0:
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(random, 8)));
      break;
    case 1:
      bytes[at] = static_cast<char>(random());
      break;
    case 2: {
      constexpr char kEdges[] = {0,   1,   2,   127, static_cast<char>(128), static_cast<char>(255), '0', '9',
                                 '-', '"', '[', '{'};
      bytes[at] = kEdges[below(random, sizeof kEdges)];
      break;
    }
    case 3:
      bytes.erase(at, 1 + below(random, 16));
      break;
    case 4:
      bytes.insert(at, bytes.substr(below(random, bytes.size()), below(random, 64)));
      break;
    case 5:
      if (!words.empty()) bytes.insert(at, words[below(random, words.size())]);
      break;
    default: {
      const std::string& other = corpus[below(random, corpus.size())];
      bytes = bytes.substr(0, at) + other.substr(below(random, other.size()));
    }
  }
}

// ---- Changes to a message of protobuf, whose lengths stay right ------------------------------------

struct Field {
  std::string head;  // tag and, of a nested one, what stands before its length
  std::string body;
  bool nested = false;
};

// The fields of a message; none where the bytes are no message.
std::vector<Field> split(const std::string& bytes) {
  std::vector<Field> fields;
  try {
    protozero::pbf_reader reader(bytes);
    std::size_t start = 0;
    while (reader.next()) {
      Field field;
      const std::size_t after_tag = bytes.size() - reader.length();
      field.head = bytes.substr(start, after_tag - start);
      field.nested = reader.wire_type() == protozero::pbf_wire_type::length_delimited;
      if (field.nested) {
        field.body = static_cast<std::string>(reader.get_view());
      } else {
        reader.skip();
        field.body = bytes.substr(after_tag, bytes.size() - reader.length() - after_tag);
      }
      start = bytes.size() - reader.length();
      fields.push_back(std::move(field));
    }
  } catch (const protozero::exception&) {
    return {};
  }
  return fields;
}

std::string join(const std::vector<Field>& fields) {
  std::string bytes;
  for (const Field& field : fields) {
    bytes += field.head;
    if (field.nested) protozero::write_varint(std::back_inserter(bytes), field.body.size());
    bytes += field.body;
  }
  return bytes;
}

void mutate_message(std::string& bytes, Random& random, const std::vector<std::string>& corpus, int depth = 0) {
  std::vector<Field> fields = split(bytes);
  if (fields.empty()) return mutate_bytes(bytes, random, corpus);
  const std::size_t at = below(random, fields.size());
  switch (below(random, depth < 6 ? 10 : 5)) {
    case 0:
      fields.erase(fields.begin() + static_cast<std::ptrdiff_t>(at));
      break;
    case 1:
      fields.insert(fields.begin() + static_cast<std::ptrdiff_t>(below(random, fields.size())), Field(fields[at]));
      break;
    case 2:
      std::swap(fields[at], fields[below(random, fields.size())]);
      break;
    case 3:
      fields[at].head = fields[below(random, fields.size())].head;
      break;
    case 4:
      std::swap(fields[at].body, fields[below(random, fields.size())].body);
      break;
    default:
      mutate_message(fields[at].body, random, corpus, depth + 1);
  }
  bytes = join(fields);
}

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

int main(int count, char** arguments) {
  double seconds = 20;
  std::uint64_t seed = 1;
  std::vector<std::string> corpus = pykd::fuzz::seeds();
  target = std::filesystem::path(arguments[0]).filename().string();
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument.rfind("-seconds=", 0) == 0) {
      seconds = std::atof(argument.c_str() + 9);
    } else if (argument.rfind("-seed=", 0) == 0) {
      seed = std::strtoull(argument.c_str() + 6, nullptr, 10);
    } else if (std::filesystem::is_directory(argument)) {
      for (const auto& entry : std::filesystem::recursive_directory_iterator(argument)) {
        if (entry.is_regular_file()) corpus.push_back(read(entry.path()));
      }
    } else {
      corpus.push_back(read(argument));
      if (count == 2) seconds = 0;
    }
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(keep_input);
#endif
  std::set_terminate([] {
    keep_input();
    std::abort();
  });
  for (const std::string& input : corpus) run(input);
  Random random(seed);
  const auto start = std::chrono::steady_clock::now();
  std::uint64_t runs = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    std::string input = corpus[below(random, corpus.size())];
    for (std::size_t change = 1 + below(random, 4); change > 0; --change) {
      if (pykd::fuzz::form() == pykd::fuzz::Form::kProtobuf && below(random, 4) != 0) {
        mutate_message(input, random, corpus);
      } else {
        mutate_bytes(input, random, corpus);
      }
    }
    if (input.size() > (1u << 20)) continue;
    run(input);
    ++runs;
  }
  std::printf("%s: %zu inputs, %llu mutants (seed %llu), nothing found\n", target.c_str(), corpus.size(),
              static_cast<unsigned long long>(runs), static_cast<unsigned long long>(seed));
  return 0;
}
