// File: bench/llama_rows.cpp
//
// The loop over rows of `llama-perplexity --kl-divergence`, written anew to compare its speed: one row at a time,
// exponentials by expf, sums in double, the teacher's codes decoded on the way; threads are made for each chunk, and
// take the next row from a counter behind a mutex. The logits lie in memory, as a model has just left them there.
// Compile it alone, as benchmarks/scoring.py does.
//
//     llama_rows <teacher.kld> <student.kld> <threads> <rounds> <file of divergences, float32>
//
// prints the seconds of each round.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct File {
  std::int32_t context = 0, classes = 0, chunks = 0;
  std::vector<std::int32_t> tokens;
  std::vector<std::uint16_t> words;

  std::size_t rows_of_a_chunk() const { return static_cast<std::size_t>(context - 1 - context / 2); }
  std::size_t rows() const { return static_cast<std::size_t>(chunks) * rows_of_a_chunk(); }
  std::size_t row_words() const { return static_cast<std::size_t>(2 * ((classes + 1) / 2) + 4); }
};

File read(const char* path) {
  File file;
  std::ifstream stream(path, std::ios::binary);
  char magic[8];
  const auto get = [&](void* data, std::size_t bytes) {
    stream.read(static_cast<char*>(data), static_cast<std::streamsize>(bytes));
  };
  get(magic, sizeof magic);
  get(&file.context, 4);
  get(&file.classes, 4);
  get(&file.chunks, 4);
  if (!stream || std::memcmp(magic, "_logits_", 8) != 0 || file.context < 3 || file.classes < 1 || file.chunks < 1) {
    std::fprintf(stderr, "expected a base file at %s\n", path);
    std::exit(1);
  }
  file.tokens.resize(static_cast<std::size_t>(file.context) * static_cast<std::size_t>(file.chunks));
  get(file.tokens.data(), file.tokens.size() * 4);
  file.words.resize(file.rows() * file.row_words());
  get(file.words.data(), file.words.size() * 2);
  if (!stream) {
    std::fprintf(stderr, "expected %s to be whole\n", path);
    std::exit(1);
  }
  return file;
}

struct Numbers {
  float scale, least;
};

Numbers numbers_of(const std::uint16_t* row) {
  Numbers numbers;
  std::memcpy(&numbers, row, sizeof numbers);
  return numbers;
}

struct Sums {
  double nll = 0, base_nll = 0, divergence = 0, squares = 0;
  std::size_t same = 0;
};

double score(const float* logits, const std::uint16_t* base, int classes, int token, Sums& sums) {
  float top = logits[0];
  int best = 0;
  for (int i = 1; i < classes; ++i) {
    if (logits[i] > top) {
      top = logits[i];
      best = i;
    }
  }
  double sum = 0.0;
  for (int i = 0; i < classes; ++i) sum += std::exp(logits[i] - top);
  const float normaliser = top + static_cast<float>(std::log(sum));
  const Numbers numbers = numbers_of(base);
  const std::uint16_t* const codes = base + 4;
  double divergence = 0;
  float base_top = 0;
  int base_best = -1;
  for (int i = 0; i < classes; ++i) {
    const float log_p = numbers.scale * static_cast<float>(codes[i]) + numbers.least;
    if (i == 0 || log_p > base_top) {
      base_top = log_p;
      base_best = i;
    }
    if (log_p > -16.0f) divergence += std::exp(log_p) * (log_p - logits[i] + normaliser);
  }
  sums.nll += normaliser - logits[token];
  sums.base_nll -= numbers.scale * static_cast<float>(codes[token]) + numbers.least;
  sums.divergence += divergence;
  sums.squares += divergence * divergence;
  sums.same += best == base_best ? 1 : 0;
  return divergence;
}

void score_chunk(const File& base, const float* logits, std::size_t chunk, int threads, Sums& total, float* found) {
  const std::size_t rows = base.rows_of_a_chunk(), classes = static_cast<std::size_t>(base.classes);
  const std::int32_t* const tokens = base.tokens.data() + chunk * static_cast<std::size_t>(base.context) +
                                     static_cast<std::size_t>(base.context / 2) + 1;
  std::mutex mutex;
  std::size_t next = 0;
  const auto work = [&] {
    Sums own;
    for (;;) {
      std::size_t row;
      {
        const std::lock_guard<std::mutex> lock(mutex);
        row = next++;
        if (row >= rows) {
          total.nll += own.nll;
          total.base_nll += own.base_nll;
          total.divergence += own.divergence;
          total.squares += own.squares;
          total.same += own.same;
          return;
        }
      }
      const std::size_t at = chunk * rows + row;
      found[at] = static_cast<float>(
          score(logits + at * classes, base.words.data() + at * base.row_words(), base.classes, tokens[row], own));
    }
  };
  std::vector<std::thread> workers;
  for (int i = 1; i < threads; ++i) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
}

}  // namespace

int main(int count, char** words) {
  if (count != 6) {
    std::fprintf(stderr, "llama_rows <teacher.kld> <student.kld> <threads> <rounds> <file of divergences>\n");
    return 2;
  }
  const File base = read(words[1]);
  std::vector<float> logits;
  {
    const File student = read(words[2]);
    if (student.classes != base.classes || student.rows() != base.rows()) {
      std::fprintf(stderr, "expected two files of the same rows and classes\n");
      return 1;
    }
    logits.reserve(student.rows() * static_cast<std::size_t>(student.classes));
    for (std::size_t row = 0; row < student.rows(); ++row) {
      const std::uint16_t* const codes = student.words.data() + row * student.row_words();
      const Numbers numbers = numbers_of(codes);
      for (int i = 0; i < student.classes; ++i) {
        logits.push_back(numbers.scale * static_cast<float>(codes[4 + i]) + numbers.least);
      }
    }
  }
  std::vector<float> found(base.rows());
  Sums total;
  for (int round = 0; round < std::atoi(words[4]); ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (std::size_t chunk = 0; chunk < static_cast<std::size_t>(base.chunks); ++chunk) {
      score_chunk(base, logits.data(), chunk, std::atoi(words[3]), total, found.data());
    }
    std::printf("%.9f\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::fprintf(stderr, "%g %g %g %g %zu\n", total.nll, total.base_nll, total.divergence, total.squares, total.same);
  std::ofstream(words[5], std::ios::binary)
      .write(reinterpret_cast<const char*>(found.data()), static_cast<std::streamsize>(found.size() * sizeof(float)));
  return 0;
}
