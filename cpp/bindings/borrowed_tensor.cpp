#include "bindings/borrowed_tensor.h"

#include "bindings/interpreter.h"

#include <string>
#include <unordered_map>
#include <utility>

namespace pykd::bindings {
namespace {

namespace py = pybind11;

// "int32" and the like.
std::string dtype_text(const dlpack::DataType& dtype) {
  const std::string bits = std::to_string(dtype.bits);
  switch (dtype.code) {
    case dlpack::kInt:
      return "int" + bits;
    case dlpack::kUnsigned:
      return "uint" + bits;
    case dlpack::kFloat:
      return "float" + bits;
    case dlpack::kBfloat:
      return "bfloat" + bits;
    case dlpack::kComplex:
      return "complex" + bits;
    case dlpack::kBool:
      return "bool";
    default:
      return "DLPack type " + std::to_string(dtype.code) + " of " + bits + " bits";
  }
}

pykd_dtype dtype_of(const dlpack::DataType& dtype, bool bfloat16_as_uint16, const char* name) {
  if (dtype.lanes == 1) {
    if (bfloat16_as_uint16 && dtype.code == dlpack::kUnsigned && dtype.bits == 16) return PYKD_BFLOAT16;
    if (dtype.code == dlpack::kFloat && dtype.bits == 32) return PYKD_FLOAT32;
    if (dtype.code == dlpack::kInt && dtype.bits == 64) return PYKD_INT64;
    if (dtype.code == dlpack::kFloat && dtype.bits == 64) return PYKD_FLOAT64;
    if (dtype.code == dlpack::kFloat && dtype.bits == 16) return PYKD_FLOAT16;
    if (dtype.code == dlpack::kBfloat && dtype.bits == 16) return PYKD_BFLOAT16;
  }
  const std::string lanes = dtype.lanes == 1 ? "" : " in vectors of " + std::to_string(dtype.lanes);
  throw py::type_error("expected float16, bfloat16, float32, float64 or int64 for " + std::string(name) + ", got " +
                       dtype_text(dtype) + lanes + "; cast it first");
}

// What is asked of a type once, because asking takes longer than borrowing a tensor.
struct Facts {
  const dlpack::Exchange* exchange;  // what objects of this very type offer to C; null: nothing
  bool is_torchs;                    // they may be negated lazily, or require a gradient
};

Facts facts_of(PyTypeObject* type) {
  static auto* const known = new std::unordered_map<PyTypeObject*, Facts>;
  const auto found = known->find(type);
  if (found != known->end()) return found->second;
  const auto object = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
  Facts facts = {nullptr, py::hasattr(object, "is_neg") && py::hasattr(object, "requires_grad")};
  const py::object own = object.attr("__dict__");  // a subclass may do something else
  if (own.contains(dlpack::kExchangeAttribute)) {
    const py::object capsule = own[dlpack::kExchangeAttribute];
    if (PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeCapsule)) {
      facts.exchange =
          static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeCapsule));
    }
  }
  // Versions of the table, newest first; nobody has many.
  for (int older = 0; facts.exchange != nullptr && facts.exchange->major != dlpack::kMajor; ++older) {
    facts.exchange = older < 16 ? facts.exchange->older : nullptr;
  }
  if (facts.exchange != nullptr && facts.exchange->from_object == nullptr) facts.exchange = nullptr;
  if (known->size() < 64) {  // programs that make types without end are left with the slower way
    Py_INCREF(type);         // so that its address stays its own
    known->emplace(type, facts);
  }
  return facts;
}

// Memory that does not hold the values is shared all the same by `__dlpack__`.
void refuse_lazy_values(py::handle object, const char* name) {
  static PyObject* const method = PyUnicode_InternFromString("is_neg");
  const auto negated =
      py::reinterpret_steal<py::object>(in_python([&] { return PyObject_CallMethodNoArgs(object.ptr(), method); }));
  if (!negated) throw py::error_already_set();
  if (negated.ptr() == Py_False) return;
  throw py::type_error("expected a dense tensor for " + std::string(name) +
                       ", got a lazily negated one; call .resolve_neg() first");
}

// The tensor by way of C; null where `__dlpack__` must be asked, which also knows the reasons for a refusal.
dlpack::VersionedTensor* exchanged(py::handle object, const Facts& facts) {
  if (facts.exchange == nullptr) return nullptr;
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  if (facts.is_torchs) {
    const auto required =
        py::reinterpret_steal<py::object>(in_python([&] { return PyObject_GetAttr(object.ptr(), requires_grad); }));
    if (!required) throw py::error_already_set();
    if (required.ptr() != Py_False) return nullptr;
  }
  dlpack::VersionedTensor* tensor = nullptr;
  const int failed = in_python([&] { return facts.exchange->from_object(object.ptr(), &tensor); });
  if (failed != 0 || tensor == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  // Others' `__dlpack__` makes CUDA's default stream wait for theirs. Torch's work is put in order before we are asked
  // (pykd/runtime.py, pykd/kernels.py), and an event on the default stream would end a capture under way.
  const bool in_order = facts.is_torchs || tensor->tensor.device.type == dlpack::kCpu;
  if (tensor->major == dlpack::kMajor && in_order) return tensor;
  if (tensor->deleter != nullptr) tensor->deleter(tensor);
  return nullptr;
}

// object.__dlpack__(max_version=(1, 0)), or object.__dlpack__() where it knows no versions. Of torch with stream=-1,
// which says that no stream need wait: see exchanged().
py::object ask(py::handle object, const Facts& facts, const char* name) {
  static PyObject* const method = PyUnicode_InternFromString("__dlpack__");
  static PyObject* const one_keyword = py::make_tuple("max_version").release().ptr();
  static PyObject* const two_keywords = py::make_tuple("max_version", "stream").release().ptr();
  static PyObject* const version = py::make_tuple(1, 0).release().ptr();
  static PyObject* const no_stream = PyLong_FromLong(-1);
  PyObject* arguments[3] = {object.ptr(), version, no_stream};
  const auto call = [&arguments](PyObject* names) {
    return in_python([&] { return PyObject_VectorcallMethod(method, arguments, 1, names); });
  };
  PyObject* capsule = call(facts.is_torchs ? two_keywords : one_keyword);
  if (capsule == nullptr && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    capsule = call(nullptr);
  }
  if (capsule != nullptr) return py::reinterpret_steal<py::object>(capsule);

  py::error_already_set error;
  if (error.matches(PyExc_AttributeError)) {
    throw py::type_error("expected a tensor for " + std::string(name) +
                         " (a NumPy array, a torch tensor, anything with __dlpack__), got " + type_name(object) +
                         "; make it one, as with numpy.asarray()");
  }
  if (error.matches(PyExc_BufferError) || error.matches(PyExc_TypeError) || error.matches(PyExc_ValueError) ||
      error.matches(PyExc_RuntimeError)) {
    const std::string reason = printable(error.value());
    py::raise_from(
        error, PyExc_TypeError,
        ("expected a tensor for " + std::string(name) + " whose memory can be shared, got " + type_name(object) +
         " that says: " + reason + "; make it a plain dense array of float or int64 values")
            .c_str());
    throw py::error_already_set();
  }
  throw error;
}

}  // namespace

BorrowedTensor::BorrowedTensor(const char* name, py::handle object, bool writable) {
  const bool bfloat16 = PyTuple_CheckExact(object.ptr()) && PyTuple_GET_SIZE(object.ptr()) == 1;
  if (bfloat16) object = PyTuple_GET_ITEM(object.ptr(), 0);
  const Facts facts = facts_of(Py_TYPE(object.ptr()));
  if (facts.is_torchs) refuse_lazy_values(object, name);
  versioned_ = exchanged(object, facts);
  if (versioned_ == nullptr) take_over(ask(object, facts, name).ptr(), name, object);
  try {
    if (versioned_ != nullptr && versioned_->major != dlpack::kMajor) {
      throw py::type_error("expected a tensor in version 1 of DLPack for " + std::string(name) + ", got version " +
                           std::to_string(versioned_->major) + "; use a release of its library that speaks version 1");
    }
    if (writable && versioned_ != nullptr && (versioned_->flags & dlpack::kReadOnly) != 0) {
      throw py::value_error("expected memory to write to for " + std::string(name) +
                            ", got a read-only tensor; copy it first");
    }
    const dlpack::Tensor& tensor = versioned_ != nullptr ? versioned_->tensor : managed_->tensor;
    const std::int32_t device = tensor.device.type;
    if (device != dlpack::kCpu && device != dlpack::kCuda && device != dlpack::kCudaHost) {
      throw py::type_error("expected a tensor on the CPU or a CUDA device for " + std::string(name) +
                           ", got DLPack device type " + std::to_string(device) + "; copy it over first");
    }
    const bool cuda = device == dlpack::kCuda;
    view_ = {name,
             tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset,
             dtype_of(tensor.dtype, bfloat16, name),
             tensor.rank,
             tensor.shape,
             tensor.strides,
             cuda ? PYKD_CUDA : PYKD_CPU,
             cuda ? tensor.device.id : 0,
             nullptr};
  } catch (...) {
    give_back();  // no destructor follows a constructor that throws
    throw;
  }
}

BorrowedTensor::BorrowedTensor(BorrowedTensor&& other) noexcept
    : managed_(std::exchange(other.managed_, nullptr)),
      versioned_(std::exchange(other.versioned_, nullptr)),
      view_(other.view_) {}

BorrowedTensor::~BorrowedTensor() { give_back(); }

void BorrowedTensor::give_back() noexcept {
  auto* managed = std::exchange(managed_, nullptr);
  auto* versioned = std::exchange(versioned_, nullptr);
  if (managed != nullptr && managed->deleter != nullptr) managed->deleter(managed);
  if (versioned != nullptr && versioned->deleter != nullptr) versioned->deleter(versioned);
}

// From the renaming on, the managed tensor is ours to delete; before it, the capsule's.
void BorrowedTensor::take_over(PyObject* capsule, const char* name, py::handle object) {
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    auto* versioned = static_cast<dlpack::VersionedTensor*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    if (PyCapsule_SetName(capsule, "used_dltensor_versioned") != 0) throw py::error_already_set();
    versioned_ = versioned;
  } else if (PyCapsule_IsValid(capsule, "dltensor")) {
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    if (PyCapsule_SetName(capsule, "used_dltensor") != 0) throw py::error_already_set();
    managed_ = managed;
  } else {
    throw py::type_error("expected a fresh DLPack capsule from __dlpack__ of " + std::string(name) +
                         ", got something else from " + type_name(object) + "; this is a mistake of that library");
  }
}

}  // namespace pykd::bindings
