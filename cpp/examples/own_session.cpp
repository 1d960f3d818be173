// An ONNX Runtime session of one's own that runs an exported loss with pykd's fused kernels: libpykd is
// registered as a library of custom operators. Without it the session runs the portable body of each kernel.
//
//     own_session recipe/loss.grad.onnx path/of/libpykd.so.2
//
// The file is that of a loss of two logits: pykd.export(pykd.SoftTarget(temperature=2.0), "recipe").
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::fputs("usage: own_session <loss.grad.onnx> <libpykd>\n", stderr);
    return 2;
  }
  const Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "own_session");
  Ort::SessionOptions options;
  options.RegisterCustomOpsLibrary(argv[2]);
  Ort::Session session(env, argv[1], options);

  std::vector<float> student = {1, 2, 3, 3, 2, 1}, teacher = {0, 2, 4, 4, 2, 0};
  const std::array<std::int64_t, 2> shape = {2, 3};
  const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  std::array<Ort::Value, 2> inputs = {
      Ort::Value::CreateTensor<float>(memory, student.data(), student.size(), shape.data(), shape.size()),
      Ort::Value::CreateTensor<float>(memory, teacher.data(), teacher.size(), shape.data(), shape.size())};
  const std::array<const char*, 2> input_names = {"student_logits", "teacher_logits"};
  const std::array<const char*, 2> output_names = {"loss", "grad_student_logits"};
  const std::vector<Ort::Value> outputs = session.Run(Ort::RunOptions(nullptr), input_names.data(), inputs.data(),
                                                      inputs.size(), output_names.data(), output_names.size());

  std::printf("%.9g\n", *outputs[0].GetTensorData<float>());
  const float* gradient = outputs[1].GetTensorData<float>();
  for (int i = 0; i < 6; ++i) std::printf("%.9g\n", gradient[i]);
} catch (const Ort::Exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
