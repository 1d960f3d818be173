// Scores a stream without Python: how far the student's logits are from the teacher's, a number for each row.
//
//     score_stream kd 1000 teacher.f32 student.f32 > scores.txt
//
// kd: what `pykd export --kind score` wrote; 1000: classes; then two files, or pipes, of raw float32 rows.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "pykd/pykd.hpp"

// Fills the block with whole rows, fewer of them at the end of the file, and returns how many.
std::size_t read_rows(std::FILE* file, std::vector<float>& block, std::size_t classes) {
  const std::size_t read = std::fread(block.data(), sizeof(float), block.size(), file);
  if (std::ferror(file) || read % classes != 0)
    throw std::runtime_error("expected whole rows, got a file that is cut off");
  return read / classes;
}

int main(int argc, char** argv) try {
  if (argc != 5) throw std::runtime_error("usage: score_stream <export> <classes> <teacher> <student>");
  const pykd::Loss loss = pykd::Loss::load(argv[1]);
  pykd::Scorer scorer(loss);
  const std::size_t classes = std::stoul(argv[2]);
  if (classes == 0) throw std::runtime_error("expected at least one class, got 0");
  const std::size_t most = 1 + (1 << 18) / classes;
  std::vector<float> teacher(most * classes), student(most * classes);  // memory does not grow with the files
  using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;
  const File files[] = {File(std::fopen(argv[3], "rb"), &std::fclose), File(std::fopen(argv[4], "rb"), &std::fclose)};
  if (!files[0] || !files[1]) throw std::runtime_error("expected two files that can be read, got others");

  while (true) {
    const std::size_t rows = read_rows(files[0].get(), teacher, classes);
    if (read_rows(files[1].get(), student, classes) != rows)
      throw std::runtime_error("expected as many rows of the student as of the teacher");
    if (rows == 0) break;
    const std::vector<std::int64_t> shape = {static_cast<std::int64_t>(rows), static_cast<std::int64_t>(classes)};
    const pykd::Result block = scorer.score(
        {{"teacher_logits", pykd::view(teacher.data(), shape)}, {"student_logits", pykd::view(student.data(), shape)}});
    for (std::size_t i = 0; i < rows; ++i) {
      std::printf("%.9g %s\n", block.data<float>("loss_per_sample")[i], pykd_row_status_name(scorer.status()[i]));
    }
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout))
    throw std::runtime_error("expected room for the scores, got none");
  const pykd_score_summary& sum = scorer.summary();
  std::fprintf(stderr, "%lld rows, mean %.9g of %lld\n", static_cast<long long>(sum.rows), sum.mean,
               static_cast<long long>(sum.by_status[PYKD_ROW_OK]));
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
