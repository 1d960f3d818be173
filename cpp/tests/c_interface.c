/* The examples at the top of pykd.h and kernels.h, compiled as C: the headers must be C, and the
 * examples must run. */
#include "pykd/kernels.h"
#include "pykd/pykd.h"

#include <stdio.h>
#include <string.h>

/* Returns 0 where everything went as the header says, else the line that did not. */
int run_c_example(const char* path, float* value_out, float gradient_out[6]) {
  pykd_loss* loss = NULL;
  if (pykd_load(path, NULL, &loss) != PYKD_OK) return __LINE__;

  float student[2 * 3] = {1, 2, 3, 3, 2, 1}, teacher[2 * 3] = {0, 2, 4, 4, 2, 0};
  int64_t shape[2] = {2, 3};
  pykd_tensor in[2] = {{"student_logits", student, PYKD_FLOAT32, 2, shape, NULL, PYKD_CPU, 0},
                       {"teacher_logits", teacher, PYKD_FLOAT32, 2, shape, NULL, PYKD_CPU, 0}};

  float value, gradient[2 * 3];
  pykd_tensor out[2] = {{"loss", &value, PYKD_FLOAT32, 0, NULL, NULL, PYKD_CPU, 0},
                        {"grad_student_logits", gradient, PYKD_FLOAT32, 2, shape, NULL, PYKD_CPU, 0}};
  if (pykd_run(loss, in, 2, NULL, 0, out, 2) != PYKD_OK) return __LINE__;
  *value_out = value;
  memcpy(gradient_out, gradient, sizeof gradient);

  pykd_parameter weight = {"weight", -1.0};
  if (pykd_run(loss, in, 2, &weight, 1, out, 2) != PYKD_INVALID_VALUE) return __LINE__;
  if (strstr(pykd_last_error(), "weight") == NULL) return __LINE__;
  pykd_free(loss);

  pykd_load_options options = PYKD_LOAD_OPTIONS_INIT;
  options.engine = "abacus";
  loss = NULL;
  if (pykd_load(path, &options, &loss) != PYKD_INVALID_VALUE || loss != NULL) return __LINE__;
  if (pykd_abi_version() != PYKD_ABI_VERSION) return __LINE__;
  return 0;
}

/* The example of pykd_score(): four rows in blocks of two. Returns the mean, or minus the line that went wrong. */
double run_c_score_example(const char* path) {
  float student[4][2] = {{1, 2}, {3, 4}, {0, 0}, {1, 1}}, teacher[4][2] = {{1, 4}, {3, 0}, {0, 0}, {1, 1}}, scores[2];
  int64_t matrix[2] = {2, 2}, rows = 2;
  pykd_score_summary sum = PYKD_SCORE_SUMMARY_INIT;
  pykd_loss* loss = NULL;
  if (pykd_load(path, NULL, &loss) != PYKD_OK) return -__LINE__;
  for (int block = 0; block < 2; ++block) {
    pykd_tensor in[2] = {{"student_logits", student[2 * block], PYKD_FLOAT32, 2, matrix, NULL, PYKD_CPU, 0, NULL},
                         {"teacher_logits", teacher[2 * block], PYKD_FLOAT32, 2, matrix, NULL, PYKD_CPU, 0, NULL}};
    pykd_tensor out = {"loss_per_sample", scores, PYKD_FLOAT32, 1, &rows, NULL, PYKD_CPU, 0, NULL};
    uint8_t status[2];
    if (pykd_score(loss, in, 2, NULL, 0, &out, 1, status, &sum) != PYKD_OK) return -__LINE__;
    if (status[0] != PYKD_ROW_OK || status[1] != PYKD_ROW_OK) return -__LINE__;
  }
  pykd_free(loss);
  return sum.rows == 4 && sum.by_status[PYKD_ROW_OK] == 4 ? sum.mean : -__LINE__;
}

/* The same for the example of kernels.h. */
int run_c_kernel_example(float value_out[2], float gradient_out[6]) {
  float student[2 * 3] = {1, 2, 3, 3, 2, 1}, teacher[2 * 3] = {0, 2, 4, 4, 2, 0}, temperature = 2;
  float weight[2] = {0.5f, 0.5f}, value[2], gradient[2 * 3];
  int64_t rows = 2, matrix[2] = {2, 3};
  pykd_tensor in[4] = {{"student", student, PYKD_FLOAT32, 2, matrix, NULL, PYKD_CPU, 0},
                       {"teacher", teacher, PYKD_FLOAT32, 2, matrix, NULL, PYKD_CPU, 0},
                       {"temperature", &temperature, PYKD_FLOAT32, 0, NULL, NULL, PYKD_CPU, 0},
                       {"soft_weight", weight, PYKD_FLOAT32, 1, &rows, NULL, PYKD_CPU, 0}};
  pykd_tensor out[2] = {{"soft", value, PYKD_FLOAT32, 1, &rows, NULL, PYKD_CPU, 0},
                        {"grad_student", gradient, PYKD_FLOAT32, 2, matrix, NULL, PYKD_CPU, 0}};
  if (pykd_kernel_run("soft_target", in, 4, NULL, 0, out, 2, NULL) != PYKD_OK) return __LINE__;
  memcpy(value_out, value, sizeof value);
  memcpy(gradient_out, gradient, sizeof gradient);

  pykd_kernel_attribute form = {"form", 0, "kl"};
  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  host.threads = 1;
  if (pykd_kernel_run("soft_target", in, 4, &form, 1, out, 1, &host) != PYKD_OK) return __LINE__;
  if (value[0] >= value_out[0]) return __LINE__; /* the entropy of the teacher less */
  return 0;
}
