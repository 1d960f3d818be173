// File: kernels/kernel.h
//
// What a fused kernel is: one loss (or a family of them), value and gradient, in one pass over raw memory. A kernel
// is an accelerator; the definition of the loss stays in pykd/losses/.
//
// To add one: a folder beside this file, with a .cpp that describes the kernel and registers it,
//
//     void run(const Call& call);  // value and gradient on the CPU
//     const bool registered = add({
//         "squared_error",
//         {{"student", "batch features", Role::kTensor},
//          {"teacher", "batch features", Role::kTensor},
//          {"weight", "batch", Role::kFloat32, kOptional}},
//         {{"value", "batch", Role::kFloat32}, {"grad_student", "batch features", Role::kTensor}},
//         {},  // attributes
//         kFloatAndHalves,
//         nullptr,  // covers every call whose arguments fit
//         run});
//
// and nothing else: the C interface, the ONNX Runtime and torch ops and the tests find it in the registry. A CUDA
// version lies in a .cu beside it and registers itself under the same name in libpykd_cuda (kernels/cuda/interface.h).
//
// What every kernel promises (tests/kernels_conformance_test.cpp takes each of them at its word):
//
//  - It computes in float32 (or better) whatever the dtype of the tensors.
//  - A gradient comes out multiplied by a weight that goes in: d(loss)/d(value), per row where the values are per row.
//    So it is written once, as the trainer needs it. A weight of 0 gives a gradient of exactly 0.
//  - An output that is not wanted (Array::given() is false) is not computed. Gradients are named grad_<input>.
//  - The result does not depend on the number of threads.
//  - It allocates little (what it needs is said in its header), throws nothing but std::bad_alloc, and keeps no state.
//
// This header needs the standard library and pykd.h alone.
#ifndef PYKD_KERNELS_KERNEL_H_
#define PYKD_KERNELS_KERNEL_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "pykd/pykd.h"

namespace pykd::kernels {

// ---- Arguments -----------------------------------------------------------------------------------

enum class Role {
  kTensor,   // the floating dtype of the call: float32, float16 or bfloat16
  kFloat32,  // float32 whatever the dtype of the call: values, weights
  kNumber,   // one float32 without axes, in the CPU's memory on every device: a temperature
  kIndex,    // int64: labels
};

// In a call whose tensors have the dtype `tensors`.
pykd_dtype dtype_of(Role role, pykd_dtype tensors);

constexpr bool kOptional = true;

struct Argument {
  const char* name;
  const char* axes;  // names separated by spaces; equal names mean equal lengths
  Role role;
  bool optional = false;  // inputs alone; every output may be left out
};

// A setting that is fixed when the kernel's node or op is made. With choices its value is the index of one.
struct Attribute {
  const char* name;
  double default_value = 0.0;
  std::vector<const char*> choices = {};
};

// A contiguous tensor (last axis fastest), or none.
struct Array {
  void* data = nullptr;
  pykd_dtype dtype = PYKD_FLOAT32;
  std::int32_t rank = 0;
  const std::int64_t* shape = nullptr;

  bool given() const { return data != nullptr; }
  std::int64_t length(int axis) const { return shape[axis]; }
  std::int64_t elements() const {
    std::int64_t count = 1;
    for (std::int32_t axis = 0; axis < rank; ++axis) count *= shape[axis];
    return count;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// ---- Threads, lent by whoever calls: ONNX Runtime's, ATen's, or our own (host/threads.h) ----------

struct Parallel {
  int threads = 1;  // that may work at once, the caller among them
  // Calls task(state, 0) … task(state, count - 1), in any order and on any thread, and returns after the last.
  void (*run)(void* pool, std::int64_t count, void (*task)(void* state, std::int64_t index), void* state) = nullptr;
  void* pool = nullptr;  // the first argument of run()

  // task(0) … task(count - 1). A task throws nothing.
  template <class Task>
  void for_each(std::int64_t count, const Task& task) const {
    if (count <= 1 || threads <= 1 || run == nullptr) {
      for (std::int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    run(
        pool, count, [](void* state, std::int64_t i) { (*static_cast<const Task*>(state))(i); },
        const_cast<void*>(static_cast<const void*>(&task)));
  }
};

// ---- One call ------------------------------------------------------------------------------------

// Everything in the order of the kernel's description. Checked: names, dtypes, axes, required inputs. Every axis has
// at least one entry.
struct Call {
  const Array* inputs = nullptr;
  const Array* outputs = nullptr;
  const double* attributes = nullptr;
  pykd_dtype dtype = PYKD_FLOAT32;  // of the tensors
  const Parallel* parallel = nullptr;

  float number(int input) const { return *inputs[input].as<const float>(); }  // Role::kNumber
  int choice(int attribute) const { return static_cast<int>(attributes[attribute]); }
};

// ---- The registry --------------------------------------------------------------------------------

constexpr std::uint32_t kFloat32Alone = 1u << PYKD_FLOAT32;
constexpr std::uint32_t kFloatAndHalves = kFloat32Alone | 1u << PYKD_FLOAT16 | 1u << PYKD_BFLOAT16;

struct Kernel {
  const char* name = nullptr;
  std::vector<Argument> inputs;
  std::vector<Argument> outputs;  // values first, gradients last
  std::vector<Attribute> attributes = {};
  std::uint32_t dtypes = kFloat32Alone;  // that the tensors may have, by bit
  // Why a call whose arguments fit is not covered all the same: "labels or label_probs, not both". nullptr: it is.
  const char* (*refuse)(const Call&) = nullptr;
  void (*cpu)(const Call&) = nullptr;
};

// Makes a kernel known. Called while the library is loaded.
bool add(Kernel kernel);
// The same of one that is no part of a loss: it is found by its name, and becomes no operator.
bool add_unlisted(Kernel kernel);
// Every kernel of a loss, by name.
const std::vector<Kernel>& all();
// The kernel of that name; nullptr where there is none.
const Kernel* find(const std::string& name);

// Throws pykd::internal::Failure, with a message that names the argument, where the arrays do not fit the description.
// Of the arrays it looks at everything but what lies in their memory, numbers and labels included.
void check(const Kernel& kernel, const Call& call);

}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_KERNEL_H_
