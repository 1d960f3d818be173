/* The example at the top of pykd.h, compiled as C: the header must be C, and the example must run.
 */
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
  pykd_tensor out[2] = {
      {"loss", &value, PYKD_FLOAT32, 0, NULL, NULL, PYKD_CPU, 0},
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
