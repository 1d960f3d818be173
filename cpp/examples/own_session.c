/* An ONNX Runtime session of one's own that runs an exported loss with pykd's fused kernels: libpykd is
 * registered as a library of custom operators. Without it the session runs the portable body of each kernel.
 *
 *     own_session recipe/loss.grad.onnx path/of/libpykd.so.2
 *
 * The file is that of a loss of two logits: pykd.export(pykd.SoftTarget(temperature=2.0), "recipe"). */
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>

static const OrtApi* ort;

static void check(OrtStatus* status) {
  if (status == NULL) return;
  fprintf(stderr, "%s\n", ort->GetErrorMessage(status));
  exit(1);
}

int main(int argc, char** argv) {
  if (argc != 3) {
    fputs("usage: own_session <loss.grad.onnx> <libpykd>\n", stderr);
    return 2;
  }
  ort = OrtGetApiBase()->GetApi(21); /* of ONNX Runtime 1.21 or newer */
  if (ort == NULL) {
    fputs("expected ONNX Runtime 1.21 or newer\n", stderr);
    return 1;
  }

  OrtEnv* env;
  OrtSessionOptions* options;
  OrtSession* session;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "own_session", &env));
  check(ort->CreateSessionOptions(&options));
  check(ort->RegisterCustomOpsLibrary_V2(options, argv[2]));
  check(ort->CreateSession(env, argv[1], options, &session));

  float student[6] = {1, 2, 3, 3, 2, 1}, teacher[6] = {0, 2, 4, 4, 2, 0};
  const int64_t shape[2] = {2, 3};
  const char* input_names[2] = {"student_logits", "teacher_logits"};
  const char* output_names[2] = {"loss", "grad_student_logits"};
  OrtMemoryInfo* memory;
  OrtValue *inputs[2] = {NULL, NULL}, *outputs[2] = {NULL, NULL};
  check(ort->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory));
  check(ort->CreateTensorWithDataAsOrtValue(memory, student, sizeof student, shape, 2,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &inputs[0]));
  check(ort->CreateTensorWithDataAsOrtValue(memory, teacher, sizeof teacher, shape, 2,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &inputs[1]));
  check(ort->Run(session, NULL, input_names, (const OrtValue* const*)inputs, 2, output_names, 2, outputs));

  float *loss, *gradient;
  check(ort->GetTensorMutableData(outputs[0], (void**)&loss));
  check(ort->GetTensorMutableData(outputs[1], (void**)&gradient));
  printf("%.9g\n", *loss);
  for (int i = 0; i < 6; ++i) printf("%.9g\n", gradient[i]);

  for (int i = 0; i < 2; ++i) {
    ort->ReleaseValue(inputs[i]);
    ort->ReleaseValue(outputs[i]);
  }
  ort->ReleaseMemoryInfo(memory);
  ort->ReleaseSession(session);
  ort->ReleaseSessionOptions(options);
  ort->ReleaseEnv(env);
  return 0;
}
