// File: bindings/dlpack_abi.h
//
// The part of the DLPack ABI by which Python objects hand over tensors (dmlc.github.io/dlpack, Python
// specification: `__dlpack__`). Declared here in our own words; the layout is that of DLPack 1.0.
//
// Who owns what: a capsule named "dltensor" or "dltensor_versioned" owns a managed tensor. Whoever takes
// it out renames the capsule to "used_" + its name and calls the deleter when done, once.
#ifndef PYKD_BINDINGS_DLPACK_ABI_H_
#define PYKD_BINDINGS_DLPACK_ABI_H_

#include <cstdint>

namespace pykd::dlpack {

struct Device {
  std::int32_t type;  // kCpu, ...
  std::int32_t id;
};
constexpr std::int32_t kCpu = 1, kCuda = 2, kCudaHost = 3;

struct DataType {
  std::uint8_t code;  // kInt, ...
  std::uint8_t bits;
  std::uint16_t lanes;
};
constexpr std::uint8_t kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6;

struct Tensor {
  void* data;
  Device device;
  std::int32_t rank;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: contiguous
  std::uint64_t byte_offset;
};

// In a capsule named "dltensor".
struct ManagedTensor {
  Tensor tensor;
  void* manager;
  void (*deleter)(ManagedTensor*);  // may be null
};

// In a capsule named "dltensor_versioned".
struct VersionedTensor {
  std::uint32_t major;  // of the producer; where it is not 1, only the deleter may be used
  std::uint32_t minor;
  void* manager;
  void (*deleter)(VersionedTensor*);  // may be null
  std::uint64_t flags;
  Tensor tensor;
};
constexpr std::uint32_t kMajor = 1;
constexpr std::uint64_t kReadOnly = 1;

// What a type of tensors offers to C, in a capsule of this name that is its attribute kExchangeAttribute (DLPack 1.3):
// the same as `__dlpack__`, without a call of Python. It waits for no stream.
struct Exchange {
  std::uint32_t major;  // where it is not 1, nothing but `older` may be used
  std::uint32_t minor;
  Exchange* older;
  void* allocate;
  int (*from_object)(void* object, VersionedTensor** tensor);  // 0; or -1 with a Python exception set
  void* to_object;
  void* view_of_object;
  void* current_stream;
};
constexpr char kExchangeAttribute[] = "__dlpack_c_exchange_api__";
constexpr char kExchangeCapsule[] = "dlpack_exchange_api";

}  // namespace pykd::dlpack

#endif  // PYKD_BINDINGS_DLPACK_ABI_H_
