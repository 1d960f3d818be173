/* File: pykd/kernels.h
 *
 * The fused kernels themselves, for programs that hold raw memory and want neither ONNX Runtime nor LibTorch in
 * between. Whoever loads an exported loss (pykd.h) gets them without this header.
 *
 *     float student[2 * 3] = {1, 2, 3, 3, 2, 1}, teacher[2 * 3] = {0, 2, 4, 4, 2, 0}, temperature = 2;
 *     float weight[2] = {0.5f, 0.5f}, value[2], gradient[2 * 3];  // a mean over two rows: each weighs 1/2
 *     int64_t rows = 2, matrix[2] = {2, 3};
 *     pykd_tensor in[4] = {{"student", student, PYKD_FLOAT32, 2, matrix, NULL, PYKD_CPU, 0, NULL},
 *                          {"teacher", teacher, PYKD_FLOAT32, 2, matrix, NULL, PYKD_CPU, 0, NULL},
 *                          {"temperature", &temperature, PYKD_FLOAT32, 0, NULL, NULL, PYKD_CPU, 0, NULL},
 *                          {"soft_weight", weight, PYKD_FLOAT32, 1, &rows, NULL, PYKD_CPU, 0, NULL}};
 *     pykd_tensor out[2] = {{"soft", value, PYKD_FLOAT32, 1, &rows, NULL, PYKD_CPU, 0, NULL},
 *                           {"grad_student", gradient, PYKD_FLOAT32, 2, matrix, NULL, PYKD_CPU, 0, NULL}};
 *     if (pykd_kernel_run("soft_target", in, 4, NULL, 0, out, 2, NULL) != PYKD_OK) puts(pykd_last_error());
 *
 * The rules of pykd.h hold: errors, views, threads.
 */
#ifndef PYKD_KERNELS_H_
#define PYKD_KERNELS_H_

#include "pykd/pykd.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A setting of a kernel. Those with choices take `choice`, the others `value`. */
typedef struct pykd_kernel_attribute {
  const char* name;
  double value;
  const char* choice; /* NULL: `value` holds */
} pykd_kernel_attribute;

/* Where a kernel runs. Start from PYKD_KERNEL_HOST_INIT. */
typedef struct pykd_kernel_host {
  size_t struct_size; /* sizeof(pykd_kernel_host) */
  int32_t threads;    /* that may work at once on the CPU; 0: one per core */
  /* Threads of your own: calls task(state, 0) ... task(state, count - 1), in any order and on any thread, and returns
   * after the last. NULL: pykd's own threads. */
  void (*parallel)(void* pool, int64_t count, void (*task)(void* state, int64_t index), void* state);
  void* pool;        /* the first argument of parallel() */
  void* cuda_stream; /* the cudaStream_t on which CUDA work is queued; NULL: the default stream */
} pykd_kernel_host;

#define PYKD_KERNEL_HOST_INIT \
  { sizeof(pykd_kernel_host), 0, NULL, NULL, NULL }

/* How many kernels there are, and what one is, as JSON:
 *     {"name", "inputs": [{"name", "axes": ["batch", "classes"], "role", "optional"}], "outputs": [{"name", "axes",
 *      "role"}], "attributes": [{"name", "default", "choices"}], "dtypes": ["float32", …]}
 * role: "tensor" (one of `dtypes`, the same for all), "float32", "number" (one float32 without axes, on the CPU
 * whatever the device) or "index" (int64). NULL for an index that is too large. */
PYKD_API size_t pykd_num_kernels(void);
PYKD_API const char* pykd_kernel_description(size_t index);

/* Runs a kernel: inputs in any order, optional ones left out; outputs those you want; attributes those that differ
 * from their default; host NULL for the defaults. On CUDA it returns as soon as the work is queued. A call that no
 * kernel covers (a dtype, a device without libpykd_cuda) is an error that says why. */
PYKD_API pykd_status pykd_kernel_run(const char* kernel, const pykd_tensor* inputs, size_t num_inputs,
                                     const pykd_kernel_attribute* attributes, size_t num_attributes,
                                     const pykd_tensor* outputs, size_t num_outputs, const pykd_kernel_host* host);

/* The SIMD instruction sets that the CPU kernels were compiled for and this processor has, best first, separated by
 * spaces ("AVX3_ZEN4 AVX3 AVX2 SSE4 SSSE3 SSE2"), and a way to use a certain one (NULL: the best), for tests and
 * measurements. Not while a kernel runs. PYKD_INVALID_VALUE for a name that is not in the list. */
PYKD_API const char* pykd_kernel_simd(void);
PYKD_API pykd_status pykd_kernel_use_simd(const char* target);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* PYKD_KERNELS_H_ */
