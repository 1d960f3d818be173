/* Runs an exported loss of two logits from C: prints the value, then d(loss)/d(student_logits). */
#include <pykd/pykd.h>
#include <stdio.h>

int main(int argc, char** argv) {
  if (argc != 2) {
    fputs("usage: from_c <artefact>\n", stderr);
    return 2;
  }
  pykd_loss* loss = NULL;
  if (pykd_load(argv[1], NULL, &loss) != PYKD_OK) {
    fprintf(stderr, "%s\n", pykd_last_error());
    return 1;
  }

  float student[6] = {1, 2, 3, 3, 2, 1}, teacher[6] = {0, 2, 4, 4, 2, 0}, gradient[6], value;
  const int64_t shape[2] = {2, 3};
  const pykd_tensor in[2] = {{"student_logits", student, PYKD_FLOAT32, 2, shape, NULL, PYKD_CPU, 0},
                             {"teacher_logits", teacher, PYKD_FLOAT32, 2, shape, NULL, PYKD_CPU, 0}};
  const pykd_tensor out[2] = {{"loss", &value, PYKD_FLOAT32, 0, NULL, NULL, PYKD_CPU, 0},
                              {"grad_student_logits", gradient, PYKD_FLOAT32, 2, shape, NULL, PYKD_CPU, 0}};
  const pykd_status status = pykd_run(loss, in, 2, NULL, 0, out, 2);
  if (status == PYKD_OK) {
    printf("%.9g\n", value);
    for (int i = 0; i < 6; ++i) printf("%.9g\n", gradient[i]);
  } else {
    fprintf(stderr, "%s\n", pykd_last_error());
  }
  pykd_free(loss);
  return status == PYKD_OK ? 0 : 1;
}
