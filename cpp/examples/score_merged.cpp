// Scores a stream through teacher, student and loss at once, without Python: a number for each row.
//
//     score_merged scorer.onnx pixels.f32 labels.i64 > scores.txt
//
// scorer.onnx: what `pykd merge` wrote, of models that you trust; then raw rows for each of its inputs, in their order.
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "pykd/pykd.hpp"

// The next rows of an input, at most `count`, read into `memory`; none at the end.
pykd::Tensor read_rows(std::FILE* file, const pykd_tensor_info& input, std::size_t count, std::vector<char>& memory) {
  std::vector<std::int64_t> shape(input.lengths, input.lengths + input.rank);  // 0: the models leave it free
  std::size_t row = shape.empty() ? 0 : pykd::size_of(pykd::dtype_of(input));
  for (std::size_t axis = 1; axis < shape.size(); ++axis) row *= static_cast<std::size_t>(shape[axis]);
  if (row == 0) throw std::runtime_error(std::string("expected rows of one length, got others for ") + input.name);
  if (!file) throw std::runtime_error(std::string("expected a file that can be read for ") + input.name);
  memory.resize(count * row);
  const std::size_t read = std::fread(memory.data(), 1, memory.size(), file);
  if (std::ferror(file) || read % row != 0) throw std::runtime_error("expected whole rows, got a file that is cut off");
  shape[0] = static_cast<std::int64_t>(read / row);
  return pykd::Tensor(memory.data(), pykd::dtype_of(input), shape);
}

int main(int argc, char** argv) try {
  pykd::LoadOptions options;
  options.trust_merged = true;
  const pykd::Loss loss = pykd::Loss::load(argc > 1 ? argv[1] : "", options);
  const std::vector<pykd_tensor_info> inputs = loss.inputs();
  std::vector<std::unique_ptr<std::FILE, int (*)(std::FILE*)>> files;
  for (int i = 2; i < argc; ++i) files.emplace_back(std::fopen(argv[i], "rb"), &std::fclose);
  if (files.size() != inputs.size()) throw std::runtime_error("expected a file for every input of the models");
  pykd::Scorer scorer(loss);
  std::vector<std::vector<char>> memory(inputs.size());  // of one block
  for (pykd::Tensors rows;;) {
    std::size_t ended = 0;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const pykd::Tensor& block = rows[inputs[i].name] = read_rows(files[i].get(), inputs[i], 256, memory[i]);
      ended += block.shape()[0] == 0;
    }
    if (ended == inputs.size()) break;
    if (ended != 0) throw std::runtime_error("expected as many rows for every input, got a file that ends early");
    const pykd::Result block = scorer.score(rows);
    const float* score = block.data<float>("loss_per_sample");
    for (const auto status : scorer.status()) std::printf("%.9g %s\n", *score++, pykd_row_status_name(status));
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout))
    throw std::runtime_error("expected room for the scores, got none");
  std::fprintf(stderr, "mean %.9g\n", scorer.summary().mean);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
