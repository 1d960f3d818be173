// Runs an exported loss of two logits from C++: prints what runs it and its signature to stderr, then the value
// and d(loss)/d(student_logits). With "torchscript" as the second argument it takes that engine.
#include <cstdio>
#include <pykd/pykd.hpp>
#include <vector>

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fputs("usage: from_cpp <artefact> [<engine>]\n", stderr);
    return 2;
  }
  pykd::LoadOptions options;
  if (argc > 2) options.engine = argv[2];
  const pykd::Loss loss = pykd::Loss::load(argv[1], options);
  std::fprintf(stderr, "%s %s, kernels: %s\n", loss.engine().c_str(), loss.engine_version().c_str(),
               loss.kernels_in_use().c_str());
  std::fprintf(stderr, "passed over: %s\n", loss.passed_over().c_str());
  for (const pykd_tensor_info& info : loss.inputs()) {
    std::fprintf(stderr, "%s[", info.name);
    for (int axis = 0; axis < info.rank; ++axis) std::fprintf(stderr, " %s", info.axes[axis]);
    std::fprintf(stderr, " ]%s\n", info.has_gradient ? " gradient" : "");
  }

  const std::vector<float> student = {1, 2, 3, 3, 2, 1}, teacher = {0, 2, 4, 4, 2, 0};
  const pykd::Result result = loss.value_and_gradient(
      {{"student_logits", pykd::view(student, {2, 3})}, {"teacher_logits", pykd::view(teacher, {2, 3})}});
  std::printf("%.9g\n", result.value("loss"));
  const float* gradient = result.data<float>("grad_student_logits");
  for (int i = 0; i < 6; ++i) std::printf("%.9g\n", gradient[i]);
} catch (const pykd::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
