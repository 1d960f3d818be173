/* File: pykd/pykd.h
 *
 * The C interface of pykd: load an exported knowledge-distillation loss, give it the teacher's and
 * the student's tensors by name, take the value and the gradient with respect to the student.
 *
 *     pykd_loss* loss = NULL;
 *     if (pykd_load("recipe", NULL, &loss) != PYKD_OK) { puts(pykd_last_error()); return 1; }
 *
 *     float student[2 * 3] = {1, 2, 3, 3, 2, 1}, teacher[2 * 3] = {0, 2, 4, 4, 2, 0};
 *     int64_t shape[2] = {2, 3};
 *     pykd_tensor in[2] = {
 *         {"student_logits", student, PYKD_FLOAT32, 2, shape, NULL, PYKD_CPU, 0, NULL},
 *         {"teacher_logits", teacher, PYKD_FLOAT32, 2, shape, NULL, PYKD_CPU, 0, NULL}};
 *
 *     float value, gradient[2 * 3];
 *     pykd_tensor out[2] = {
 *         {"loss", &value, PYKD_FLOAT32, 0, NULL, NULL, PYKD_CPU, 0, NULL},
 *         {"grad_student_logits", gradient, PYKD_FLOAT32, 2, shape, NULL, PYKD_CPU, 0, NULL}};
 *     if (pykd_run(loss, in, 2, NULL, 0, out, 2) != PYKD_OK) puts(pykd_last_error());
 *     pykd_free(loss);
 *
 * Rules that hold for every function:
 *
 *  - A function that can fail returns a pykd_status. On anything but PYKD_OK nothing was written to
 *    the output arguments (after PYKD_ENGINE_FAILURE, which comes from the middle of a run, do not
 *    rely on what the outputs hold), and pykd_last_error() tells, on this thread, what was expected,
 *    what came, and what to do.
 *  - Tensors are views. The library never owns, frees or keeps the memory behind a pykd_tensor
 *    beyond the call.
 *  - A pykd_loss is immutable after pykd_load(). Any number of threads may run the same one at once.
 *  - No function prints, exits or aborts.
 *  - Structs grow at their end. Those that start with struct_size tell their size: start from their
 *    ..._INIT, and an older program runs with a newer library, and the other way round where the
 *    newer fields are not set. A pykd_tensor, which comes in arrays, keeps its size: what a later
 *    version says of a tensor hangs on its `extension`.
 *  - In a child of fork() a loss of the parent runs on the CPU alone: with ONNX Runtime if it was
 *    loaded with one thread (else that is an error), with TorchScript on one thread. pykd_free()
 *    leaves it alone there. What the child loads itself is as everywhere. A process may end while
 *    threads are at work in here.
 *
 * C++ users want pykd/pykd.hpp (standard C++17) or pykd/torch.hpp (LibTorch); both sit on this file.
 */
#ifndef PYKD_PYKD_H_
#define PYKD_PYKD_H_

#include <stddef.h>
#include <stdint.h>

#if defined(PYKD_HIDDEN) /* a static libpykd, while it is compiled */
#define PYKD_API
#elif defined(_WIN32)
#if defined(PYKD_BUILD)
#define PYKD_API __declspec(dllexport)
#else
#define PYKD_API __declspec(dllimport)
#endif
#else
#define PYKD_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this interface. It grows when a struct or a function changes its meaning; programs
 * built with one number run with libraries that answer the same number. It is the number in the name
 * libpykd.so.2, by which the dynamic linker tells them apart; pykd_load() compares it, too, with that
 * of the load options, and pykd.hpp with every load. */
#define PYKD_ABI_VERSION 2

/* What kind of thing went wrong. The Python module raises the exception named on the right. */
typedef enum pykd_status {
  PYKD_OK = 0,
  PYKD_INVALID_VALUE = 1,  /* a name, shape, stride, label or setting is wrong        ValueError */
  PYKD_INVALID_TYPE = 2,   /* a dtype or a device is wrong                            TypeError */
  PYKD_NOT_FOUND = 3,      /* the file or folder does not exist or cannot be read     FileNotFoundError */
  PYKD_BAD_ARTEFACT = 4,   /* damaged, not made by pykd, newer than this library      ValueError */
  PYKD_UNAVAILABLE = 5,    /* an engine, device or library is not to be had here      RuntimeError */
  PYKD_ENGINE_FAILURE = 6, /* the engine reported an error while it ran               RuntimeError */
  PYKD_INTERNAL = 7        /* a mistake in pykd itself: please report it              RuntimeError */
} pykd_status;

typedef enum pykd_dtype {
  PYKD_FLOAT16 = 1,
  PYKD_BFLOAT16 = 2,
  PYKD_FLOAT32 = 3,
  PYKD_FLOAT64 = 4,
  PYKD_INT64 = 5,
  PYKD_INT8 = 6, /* from here on: of the models in merged scorers alone */
  PYKD_UINT8 = 7,
  PYKD_INT16 = 8,
  PYKD_UINT16 = 9,
  PYKD_INT32 = 10,
  PYKD_UINT32 = 11,
  PYKD_UINT64 = 12,
  PYKD_BOOL = 13 /* one byte, 0 or 1 */
} pykd_dtype;

typedef enum pykd_device { PYKD_CPU = 0, PYKD_CUDA = 1 } pykd_device;

/* A named view of a tensor. It owns nothing. */
typedef struct pykd_tensor {
  const char* name;       /* as in the artefact: "student_logits", "loss", "grad_student_logits" */
  void* data;             /* first element, aligned for its dtype; never NULL */
  pykd_dtype dtype;       /* what lies at `data` */
  int32_t rank;           /* number of axes; 0 is a scalar */
  const int64_t* shape;   /* `rank` lengths; may be NULL for a scalar */
  const int64_t* strides; /* `rank` steps in elements, or NULL for contiguous (last axis fastest).
                             Only contiguous tensors are taken; strides that say otherwise are an error. */
  pykd_device device;     /* where `data` lies */
  int32_t device_id;      /* which one, for PYKD_CUDA */
  const void* extension;  /* NULL: this version knows none */
} pykd_tensor;

/* A value for one of the loss's parameters (a temperature, a weight): it replaces the default that
 * the artefact carries, for this call alone. */
typedef struct pykd_parameter {
  const char* name;
  double value;
} pykd_parameter;

/* How to load. Start from PYKD_LOAD_OPTIONS_INIT and change what you need. */
typedef struct pykd_load_options {
  size_t struct_size;              /* sizeof(pykd_load_options); lets the struct grow */
  const char* engine;              /* "onnxruntime", "torchscript", or NULL: the one whose library is named
                                      below; else the first of the two for which the file is there and
                                      the engine can be opened (pykd_passed_over() tells why not) */
  const char* device;              /* "cpu" (default when NULL), "cuda" or "cuda:<id>" */
  const char* onnxruntime_library; /* path of libonnxruntime.so; NULL: see pykd_load() */
  const char* torch_library;       /* path of libpykd_torch.so; NULL: see pykd_load() */
  int32_t threads;                 /* threads of one ONNX Runtime session, up to 1024; 0: one per core. LibTorch's
                                      threads belong to the process: at::set_num_threads() */
  int32_t skip_integrity_check;    /* not 0: accept a file that was changed after its export */
  void* cuda_stream;               /* the cudaStream_t that ONNX Runtime's work is queued on; CUDA's
                                      default stream by its name cudaStreamLegacy. NULL: a stream of
                                      its own, synchronised before pykd_run() returns. TorchScript
                                      uses LibTorch's current stream */
  const char* kernels;             /* whether ONNX files run with pykd's fused kernels. "auto" (default when
                                      NULL): wherever the file has a node that a kernel of this library
                                      computes on that device. "on": the same, and an error where there is
                                      none, or a node that no kernel computes. "off": the portable body that
                                      the file carries */
  uint32_t abi_version;            /* PYKD_ABI_VERSION of the header that the program was built with */
  int64_t trust_merged; /* not 0: load merged scorers, too, from a source you trust: see "Merged scorers". (64
                           bits: in an older struct there is padding behind abi_version) */
} pykd_load_options;

#define PYKD_LOAD_OPTIONS_INIT \
  { sizeof(pykd_load_options), NULL, NULL, NULL, NULL, 0, 0, NULL, NULL, PYKD_ABI_VERSION, 0 }

/* A loaded loss. */
typedef struct pykd_loss pykd_loss;

/* One input or output of a loss. All pointers live as long as the pykd_loss. Start from
 * PYKD_TENSOR_INFO_INIT. */
typedef struct pykd_tensor_info {
  size_t struct_size; /* sizeof(pykd_tensor_info) */
  const char* name;
  int32_t rank;
  const char* const* axes;      /* `rank` names; equal names mean equal lengths, across all tensors */
  uint32_t dtypes;              /* the dtypes it may have: bit (1u << pykd_dtype). All floating tensors of
                                   one call have the same dtype, but for those of merged scorers */
  int32_t has_gradient;         /* input: "grad_<name>" is among the outputs. output: it is such a gradient */
  const int64_t* least_lengths; /* `rank` lengths, at least 1: what is shorter along that axis is refused */
  const int64_t* lengths;       /* `rank` lengths: the only one that the axis may have, or 0 for any (merged scorers:
                                   what the models fix) */
} pykd_tensor_info;

#define PYKD_TENSOR_INFO_INIT \
  { sizeof(pykd_tensor_info), NULL, 0, NULL, 0, 0, NULL, NULL }

/* One parameter of a loss. Start from PYKD_PARAMETER_INFO_INIT. */
typedef struct pykd_parameter_info {
  size_t struct_size; /* sizeof(pykd_parameter_info) */
  const char* name;
  double default_value;
  double minimum;            /* -INFINITY where there is none */
  int32_t minimum_exclusive; /* not 0: the value must be greater than `minimum` */
  double maximum;            /* INFINITY where there is none */
} pykd_parameter_info;

#define PYKD_PARAMETER_INFO_INIT \
  { sizeof(pykd_parameter_info), NULL, 0.0, 0.0, 0, 0.0 }

/* PYKD_ABI_VERSION of the library that is running, and its release, such as "0.1.0". */
PYKD_API uint32_t pykd_abi_version(void);
PYKD_API const char* pykd_version(void);

/* What went wrong in the last failed call on this thread; never NULL. Valid until the next failure
 * on this thread. */
PYKD_API const char* pykd_last_error(void);

/* Loads a loss from `path`: a folder that pykd.export() wrote, or one of its files
 * (loss.onnx: the value alone; loss.grad.onnx: value and gradient; loss.pt: both; score.onnx, of an
 * export of kind "score": "loss_per_sample" and the like alone, no "loss" and no gradient).
 *
 * A library that is named is used, or the load fails: ONNX Runtime's (1.21 or newer) by
 * options->onnxruntime_library, else by the environment variable PYKD_ONNXRUNTIME_LIBRARY;
 * libpykd_torch by options->torch_library, else by PYKD_TORCH_LIBRARY; libpykd_cuda by
 * PYKD_CUDA_LIBRARY. The options name the engine with its library (of both libraries it is ONNX
 * Runtime's, where there is an ONNX file; an engine that is named makes the other's library of no
 * account); the variables do not.
 *
 * Where ONNX Runtime is not named, the first that can be used of these is: a libonnxruntime.so that
 * this process has loaded already; one in the folder of libpykd; that of a Python wheel onnxruntime
 * installed beside pykd's (../../onnxruntime/capi, seen from the folder of libpykd); the one that the
 * dynamic linker finds. The other two lie beside libpykd. Each is opened once per process and stays
 * open.
 *
 * TorchScript files are programs: load them only from a source you trust. ONNX files are checked
 * before ONNX Runtime sees them: size, integrity, operators, no external data. Merged scorers are refused
 * unless the options say otherwise: see below. */
PYKD_API pykd_status pykd_load(const char* path, const pykd_load_options* options, pykd_loss** loss);

/* The same for one file that is in memory already. The bytes may be freed after the call. */
PYKD_API pykd_status pykd_load_bytes(const void* bytes, size_t size, const pykd_load_options* options,
                                     pykd_loss** loss);

/* The checks of an ONNX file that pykd_load() makes before an engine sees it, without an engine: for
 * files that somebody else wrote and that something else is to run. */
PYKD_API pykd_status pykd_check_onnx(const void* bytes, size_t size);

/* Frees a loss; NULL is allowed. No thread may be running it. */
PYKD_API void pykd_free(pykd_loss* loss);

/* What the artefact says of itself, as JSON (docs/artefacts.md); the engine that runs it
 * ("onnxruntime", "torchscript"), that engine's version, and the device as it was asked for. */
PYKD_API const char* pykd_metadata(const pykd_loss* loss);
PYKD_API const char* pykd_engine(const pykd_loss* loss);
PYKD_API const char* pykd_engine_version(const pykd_loss* loss);
PYKD_API const char* pykd_device_name(const pykd_loss* loss);

/* The kernels that run it, with the dtype of their tensors, separated by spaces
 * ("soft_target_float32"); "" where it runs without. */
PYKD_API const char* pykd_kernels_in_use(const pykd_loss* loss);

/* Why it runs on its engine, or without kernels, where that was left to the library: what was tried
 * before and could not be had, such as "onnxruntime: expected ..., got ...". "" where nothing was. */
PYKD_API const char* pykd_passed_over(const pykd_loss* loss);

/* The signature, by index. An index that is too large gives PYKD_INVALID_VALUE. Outputs come in the
 * order: "loss", the terms, the per-sample vectors, the gradients; a score has the vectors alone. */
PYKD_API size_t pykd_num_inputs(const pykd_loss* loss);
PYKD_API size_t pykd_num_outputs(const pykd_loss* loss);
PYKD_API size_t pykd_num_parameters(const pykd_loss* loss);
PYKD_API pykd_status pykd_input_info(const pykd_loss* loss, size_t index, pykd_tensor_info* info);
PYKD_API pykd_status pykd_output_info(const pykd_loss* loss, size_t index, pykd_tensor_info* info);
PYKD_API pykd_status pykd_get_parameter_info(const pykd_loss* loss, size_t index, pykd_parameter_info* info);

/* The rank, shape and dtype that the output `name` will have for these inputs, which are checked on
 * the way exactly as pykd_run() does. `shape` has room for 8 lengths. */
PYKD_API pykd_status pykd_output_shape(const pykd_loss* loss, const pykd_tensor* inputs, size_t num_inputs,
                                       const char* name, int64_t* shape, int32_t* rank, pykd_dtype* dtype);

/* Runs the loss.
 *
 * inputs:     every input of the signature, once, in any order. Labels on the CPU are checked
 *             against the number of classes; on a GPU a label out of range makes the loss NaN.
 * parameters: those that differ from their default, in any order; NULL when there are none.
 * outputs:    those you want, in any order; the library writes into their memory. Any "grad_..."
 *             among them makes it a run with gradient. Scalars may lie on the CPU whatever the
 *             device; arrays lie on the device of the loss.
 *
 * The gradient is d(loss)/d(input), for an upstream gradient of 1; the parameter "grad_scale"
 * multiplies it before it is rounded to the input's dtype (loss scaling for float16).
 * NaN in an input gives NaN in the loss. */
PYKD_API pykd_status pykd_run(const pykd_loss* loss, const pykd_tensor* inputs, size_t num_inputs,
                              const pykd_parameter* parameters, size_t num_parameters, const pykd_tensor* outputs,
                              size_t num_outputs);

/* ---- Scores of rows ----
 *
 * A file of any number of rows, scored in blocks of the caller's: memory is that of one block.
 *
 *     pykd_score_summary sum = PYKD_SCORE_SUMMARY_INIT;
 *     while (read_block(inputs, &rows)) {                       (your own: views of up to a few thousand rows)
 *       if (pykd_score(loss, inputs, 2, NULL, 0, &scores, 1, status, &sum) != PYKD_OK) puts(pykd_last_error());
 *     }
 *     printf("mean %g of %lld rows\n", sum.mean, (long long)sum.by_status[PYKD_ROW_OK]);
 */

/* What a row can be. All but the first are kept out of the summary, and counted. */
typedef enum pykd_row_status {
  PYKD_ROW_OK = 0,
  PYKD_ROW_NAN = 1,      /* there is NaN in the row's tensors */
  PYKD_ROW_INFINITE = 2, /* there is +infinity, or a tensor with nothing but -infinity, whatever the loss makes of it */
  PYKD_ROW_INFINITE_SCORE =
      3, /* a score is not finite without these: the student, say, rules out a class that the teacher does not */
  PYKD_ROW_LABEL_OUT_OF_RANGE = 4, /* a label outside of the classes */
  PYKD_ROW_IGNORED = 5             /* every label of the row is the one that says so, -100 */
} pykd_row_status;

/* "ok", "nan", "infinite", ...: as `pykd score` calls them. "" for any other number. */
PYKD_API const char* pykd_row_status_name(int32_t status);

/* What has been scored so far. Start from PYKD_SCORE_SUMMARY_INIT, one for each thread; several are added up by adding
 * all but the mean, which is (total + lost) / by_status[PYKD_ROW_OK]. */
typedef struct pykd_score_summary {
  size_t struct_size;   /* sizeof(pykd_score_summary) */
  int64_t rows;         /* all of them */
  int64_t by_status[8]; /* how many of each pykd_row_status */
  double mean;          /* of "loss_per_sample" over the rows that are PYKD_ROW_OK; 0 where there are none */
  double total, lost;   /* the sum of these rows, and what rounding has taken from it */
} pykd_score_summary;

#define PYKD_SCORE_SUMMARY_INIT \
  { sizeof(pykd_score_summary), 0, {0, 0, 0, 0, 0, 0, 0, 0}, 0.0, 0.0, 0.0 }

/* Scores the rows of one block: pykd_run() of a loss on the CPU whose "loss_per_sample" has one number per row (an
 * export of kind "score", or with values per sample; a merged scorer), where a bad row is told in place of an error,
 * and spoils no other.
 *
 * outputs: "loss_per_sample", and any other vector of the same rows. Bad rows are NaN there.
 * status:  a pykd_row_status for each row of the block; NULL where it is not wanted.
 * summary: what the block is added to; NULL where it is not wanted. The numbers do not depend on how the
 *          rows are cut into blocks, beyond what the scores themselves do. */
PYKD_API pykd_status pykd_score(const pykd_loss* loss, const pykd_tensor* inputs, size_t num_inputs,
                                const pykd_parameter* parameters, size_t num_parameters, const pykd_tensor* outputs,
                                size_t num_outputs, uint8_t* status, pykd_score_summary* summary);

/* ---- Merged scorers ----
 *
 * What `pykd merge` writes: teacher, student and loss in one ONNX file, the models' inputs in, scores out. With
 * trust_merged in the load options it loads as any other file and is for pykd_run() and pykd_score():
 *
 *     pykd_load_options options = PYKD_LOAD_OPTIONS_INIT;
 *     options.trust_merged = 1;
 *     if (pykd_load("scorer.onnx", &options, &loss) != PYKD_OK) puts(pykd_last_error());
 *
 * pykd_input_info() tells what to give: for each input its dtype, which may be any pykd_dtype, its axes and the lengths
 * that the models fix. An axis of the models' inputs that is free and comes first counts the samples, and is that of
 * "loss_per_sample" (where the models fix it, all of them to one length, it has that length). Names of their other
 * axes are "<input>.<name>", for names mean the same within one tensor alone. Labels are checked where the models fix
 * the number of classes. Outputs of the models that were kept are outputs, too, where their lengths follow from the
 * inputs'.
 *
 * Models have operators of any kind and weights of any size, so that the file is not held to the bounds of a loss, and
 * costs to open and to run what its models do: load what you would give to a session of ONNX Runtime's. It is data all
 * the same. What is checked is its form, its checksum, its metadata against its graph, and that weights outside of it
 * lie beside it, under a plain name, and are long enough (their contents are not looked at). ONNX Runtime opens it by
 * its path; pykd_load_bytes() takes one without weights outside. */

/* Memory for results on the CPU: at least `bytes` of it, aligned to 256, not cleared; NULL where there is
 * none. It is for outputs that are new in every step, such as gradients: what pykd_deallocate() was given
 * is kept for the next request of about that size, because large memory that comes fresh from the system takes as long
 * to touch for the first time as a loss to compute. Kept and in use together are never more than twice what was in use
 * at some time; at most 1 GiB is kept, and nothing that 64 large requests have passed by. Any thread may call them.
 * pykd_deallocate(NULL) does nothing. pykd_trim_memory() gives everything that is kept back to the system now. */
#define PYKD_KEPT_FROM 131072 /* bytes; of smaller requests nothing is kept */
PYKD_API void* pykd_allocate(size_t bytes);
PYKD_API void pykd_deallocate(void* memory);
PYKD_API void pykd_trim_memory(void);

/* What a host program does itself, for the whole process. Start from PYKD_HOOKS_INIT. */
typedef enum pykd_log_level { PYKD_LOG_INFO = 0, PYKD_LOG_WARNING = 1, PYKD_LOG_ERROR = 2 } pykd_log_level;

typedef struct pykd_hooks {
  size_t struct_size; /* sizeof(pykd_hooks) */
  void* state;        /* the first argument of each function */
  /* Memory for results and for the kernels' scratch: at least `bytes`, aligned to `alignment` (a power of two); NULL
   * where there is none. Nothing is kept from step to step then, because such an allocator does that itself. Both
   * functions or neither. Engines have their own memory. */
  void* (*allocate)(void* state, size_t bytes, size_t alignment);
  void (*deallocate)(void* state, void* memory, size_t bytes);
  /* What happens at a load (the engine and its library, what was passed over), and what ONNX Runtime would print. It
   * warns of each parameter that a call may set ("appears in graph inputs"): nothing is wrong then. One line without a
   * line feed; it may be called from any thread, and must not call pykd. */
  void (*log)(void* state, pykd_log_level level, const char* line);
} pykd_hooks;

#define PYKD_HOOKS_INIT \
  { sizeof(pykd_hooks), NULL, NULL, NULL, NULL }

/* Sets them; NULL sets none. Memory goes back to the allocator that it came from. Those who set it before the first
 * load see everything. */
PYKD_API pykd_status pykd_set_hooks(const pykd_hooks* hooks);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* PYKD_PYKD_H_ */
