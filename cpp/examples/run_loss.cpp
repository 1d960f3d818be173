// Runs an exported loss: two samples, three classes, one feature vector of four channels each.
//
//     run_loss build/demo/recipe
#include <cstdint>
#include <cstdio>
#include <vector>

#include "pykd/pykd.hpp"

int main(int argc, char** argv) try {
  const pykd::Loss loss = pykd::Loss::load(argc > 1 ? argv[1] : "build/demo/recipe");

  const std::vector<float> student = {1, 2, 3, 3, 2, 1}, teacher = {0, 2, 4, 4, 2, 0};
  const std::vector<float> student_features = {1, 2, 2, 0, 0, 3, 4, 0};
  const std::vector<float> teacher_features = {0, 3, 0, 4, 2, 0, 1, 2};
  const std::vector<std::int64_t> labels = {2, 0};

  const pykd::Result result =
      loss.value_and_gradient({{"student_logits", pykd::view(student, {2, 3})},
                               {"teacher_logits", pykd::view(teacher, {2, 3})},
                               {"labels", pykd::view(labels, {2})},
                               {"student_features_0", pykd::view(student_features, {2, 1, 4})},
                               {"teacher_features_0", pykd::view(teacher_features, {2, 1, 4})}},
                              {{"logit_temperature", 4.0}});  // this call's alone; the file keeps its own

  std::printf("%s, kernels: %s\n", loss.engine().c_str(), loss.kernels_in_use().c_str());
  std::printf("loss %.4f\nd(loss)/d(student_logits)", result.value("loss"));
  const float* gradient = result.data<float>("grad_student_logits");
  for (int i = 0; i < 6; ++i) std::printf(" %+.4f", gradient[i]);
  std::printf("\n");
} catch (const pykd::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());  // expected …, got …; what to do
  return 1;
}
