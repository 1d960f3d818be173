// pykd._core: libpykd for Python. Tensors cross by DLPack, so that neither NumPy nor torch is needed to
// build it. pykd/runtime.py is the face that users see.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "borrowed_tensor.h"
#include "pykd/kernels.h"
#include "pykd/pykd.hpp"

namespace pykd::bindings {
namespace {

namespace py = pybind11;

// The exceptions that pykd.h names.
PyObject* exception_of(pykd_status status) {
  switch (status) {
    case PYKD_INVALID_VALUE:
    case PYKD_BAD_ARTEFACT:
      return PyExc_ValueError;
    case PYKD_INVALID_TYPE:
      return PyExc_TypeError;
    case PYKD_NOT_FOUND:
      return PyExc_FileNotFoundError;
    default:
      return PyExc_RuntimeError;
  }
}

// Throws what libpykd reported on this thread.
void check(pykd_status status) {
  if (status == PYKD_OK) return;
  PyErr_SetString(exception_of(status), pykd_last_error());
  throw py::error_already_set();
}

const char* text_of(py::handle name) {
  const char* text = PyUnicode_AsUTF8(name.ptr());
  if (text == nullptr) throw py::error_already_set();
  return text;
}

const char* dtype_name(pykd_dtype dtype) {
  switch (dtype) {
    case PYKD_FLOAT16:
      return "float16";
    case PYKD_BFLOAT16:
      return "bfloat16";
    case PYKD_FLOAT32:
      return "float32";
    case PYKD_FLOAT64:
      return "float64";
    case PYKD_INT64:
      return "int64";
  }
  return "unknown";
}

// A dict of tensors, borrowed for one call.
class Borrowed {
 public:
  Borrowed(const py::dict& tensors, bool writable) {
    reserve(tensors.size());
    for (const auto& entry : tensors) add(entry.first, entry.second, writable);
  }
  Borrowed() = default;
  void reserve(std::size_t count) {
    tensors_.reserve(count);
    views_.reserve(count);
  }
  // `name` is a str that outlives this object.
  void add(py::handle name, py::handle tensor, bool writable) {
    tensors_.emplace_back(text_of(name), tensor, writable);
    views_.push_back(tensors_.back().view());
  }
  const pykd_tensor* data() const { return views_.data(); }
  std::size_t size() const { return views_.size(); }

 private:
  std::vector<BorrowedTensor> tensors_;
  std::vector<pykd_tensor> views_;
};

std::vector<pykd_parameter> parameters_of(const py::dict& parameters) {
  std::vector<pykd_parameter> all;
  all.reserve(parameters.size());
  for (const auto& entry : parameters) {
    const double value = PyFloat_AsDouble(entry.second.ptr());
    if (value == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    all.push_back({text_of(entry.first), value});
  }
  return all;
}

// Memory for a result: a buffer of bytes. What is made of it (an array, a tensor) keeps it alive.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : start_(internal::allocate(bytes)), bytes_(bytes) {}

  py::buffer_info buffer() {
    return py::buffer_info(static_cast<unsigned char*>(start_.get()), static_cast<py::ssize_t>(bytes_));
  }

 private:
  std::shared_ptr<void> start_;
  std::size_t bytes_;
};

// A loaded loss. Immutable; the GIL is released while it loads and runs.
class CoreLoss {
 public:
  CoreLoss(const py::object& path_or_bytes, const std::optional<std::string>& engine, const std::string& device,
           const std::optional<std::string>& onnxruntime_library, const std::optional<std::string>& torch_library,
           int threads, bool check_integrity, std::uintptr_t cuda_stream, const std::string& kernels) {
    const auto text = [](const std::optional<std::string>& value) {
      return value.has_value() ? value->c_str() : nullptr;
    };
    pykd_load_options options = PYKD_LOAD_OPTIONS_INIT;
    options.engine = text(engine);
    options.device = device.c_str();
    options.onnxruntime_library = text(onnxruntime_library);
    options.torch_library = text(torch_library);
    options.threads = threads;
    options.skip_integrity_check = check_integrity ? 0 : 1;
    options.cuda_stream = reinterpret_cast<void*>(cuda_stream);
    options.kernels = kernels.c_str();

    pykd_status status;
    if (PyBytes_Check(path_or_bytes.ptr())) {
      const char* bytes = PyBytes_AS_STRING(path_or_bytes.ptr());
      const auto size = static_cast<std::size_t>(PyBytes_GET_SIZE(path_or_bytes.ptr()));
      const py::gil_scoped_release release;
      status = pykd_load_bytes(bytes, size, &options, &loss_);
    } else {
      const char* path = text_of(path_or_bytes);
      const py::gil_scoped_release release;
      status = pykd_load(path, &options, &loss_);
    }
    check(status);
  }
  CoreLoss(const CoreLoss&) = delete;
  CoreLoss& operator=(const CoreLoss&) = delete;
  ~CoreLoss() { pykd_free(loss_); }

  std::string metadata() const { return pykd_metadata(loss_); }
  std::string engine() const { return pykd_engine(loss_); }
  std::string engine_version() const { return pykd_engine_version(loss_); }
  std::string device() const { return pykd_device_name(loss_); }
  std::string kernels_in_use() const { return pykd_kernels_in_use(loss_); }
  std::string passed_over() const { return pykd_passed_over(loss_); }

  py::list inputs() const { return tensor_infos(pykd_num_inputs(loss_), &pykd_input_info); }
  py::list outputs() const { return tensor_infos(pykd_num_outputs(loss_), &pykd_output_info); }
  py::list parameters() const {
    py::list all;
    for (std::size_t i = 0; i < pykd_num_parameters(loss_); ++i) {
      pykd_parameter_info info = PYKD_PARAMETER_INFO_INIT;
      check(pykd_get_parameter_info(loss_, i, &info));
      all.append(py::make_tuple(info.name, info.default_value, info.minimum, info.minimum_exclusive != 0));
    }
    return all;
  }

  py::tuple output_shape(const py::dict& inputs, const std::string& name) const {
    const Borrowed in(inputs, false);
    return shape_of(in, name.c_str());
  }

  void run(const py::dict& inputs, const py::dict& parameters, const py::dict& outputs) const {
    const Borrowed in(inputs, false), out(outputs, true);
    run_borrowed(in, parameters, out);
  }

  py::dict run_into_new(const py::dict& inputs, const py::dict& parameters, const py::tuple& names,
                        const py::object& allocate) const {
    const Borrowed in(inputs, false);
    Borrowed out;
    out.reserve(names.size());
    py::dict results;
    for (const py::handle name : names) {
      const py::tuple shape = shape_of(in, text_of(name));
      const py::object array = allocate(shape[0], shape[1]);
      out.add(name, array, true);
      results[name] = PyTuple_CheckExact(array.ptr()) ? py::object(array[py::int_(0)]) : array;
    }
    run_borrowed(in, parameters, out);
    return results;
  }

 private:
  void run_borrowed(const Borrowed& in, const py::dict& parameters, const Borrowed& out) const {
    const std::vector<pykd_parameter> settings = parameters_of(parameters);
    pykd_status status;
    {
      const py::gil_scoped_release release;
      status = pykd_run(loss_, in.data(), in.size(), settings.data(), settings.size(), out.data(), out.size());
    }
    check(status);
  }

  // (shape, dtype)
  py::tuple shape_of(const Borrowed& in, const char* name) const {
    std::int64_t lengths[8];
    std::int32_t rank = 0;
    pykd_dtype dtype;
    check(pykd_output_shape(loss_, in.data(), in.size(), name, lengths, &rank, &dtype));
    py::tuple shape(static_cast<std::size_t>(rank));
    for (std::int32_t axis = 0; axis < rank; ++axis) {
      PyTuple_SET_ITEM(shape.ptr(), axis, PyLong_FromLongLong(lengths[axis]));
    }
    return py::make_tuple(std::move(shape), dtype_name(dtype));
  }

  template <class Info>
  py::list tensor_infos(std::size_t count, Info info_of) const {
    py::list all;
    for (std::size_t i = 0; i < count; ++i) {
      pykd_tensor_info info = PYKD_TENSOR_INFO_INIT;
      check(info_of(loss_, i, &info));
      py::tuple axes(static_cast<std::size_t>(info.rank));
      for (std::int32_t axis = 0; axis < info.rank; ++axis) {
        axes[static_cast<std::size_t>(axis)] = py::str(info.axes[axis]);
      }
      py::list names;
      for (const pykd_dtype dtype : {PYKD_FLOAT16, PYKD_BFLOAT16, PYKD_FLOAT32, PYKD_FLOAT64, PYKD_INT64}) {
        if ((info.dtypes & (1u << dtype)) != 0) names.append(dtype_name(dtype));
      }
      all.append(py::make_tuple(info.name, axes, py::tuple(names), info.has_gradient != 0));
    }
    return all;
  }

  pykd_loss* loss_ = nullptr;
};

// ---- Kernels -------------------------------------------------------------------------------------

std::vector<pykd_kernel_attribute> attributes_of(const py::dict& attributes) {
  std::vector<pykd_kernel_attribute> all;
  all.reserve(attributes.size());
  for (const auto& entry : attributes) {
    pykd_kernel_attribute attribute = {text_of(entry.first), 0.0, nullptr};
    if (PyUnicode_Check(entry.second.ptr())) {
      attribute.choice = text_of(entry.second);
    } else {
      attribute.value = PyFloat_AsDouble(entry.second.ptr());
      if (attribute.value == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    }
    all.push_back(attribute);
  }
  return all;
}

void run_kernel(const std::string& name, const py::dict& inputs, const py::dict& attributes, const py::dict& outputs,
                int threads, std::uintptr_t cuda_stream) {
  const Borrowed in(inputs, false), out(outputs, true);
  const std::vector<pykd_kernel_attribute> settings = attributes_of(attributes);
  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  host.threads = threads;
  host.cuda_stream = reinterpret_cast<void*>(cuda_stream);
  pykd_status status;
  {
    const py::gil_scoped_release release;
    status = pykd_kernel_run(name.c_str(), in.data(), in.size(), settings.data(), settings.size(), out.data(),
                             out.size(), &host);
  }
  check(status);
}

py::list kernel_descriptions() {
  py::list all;
  for (std::size_t i = 0; i < pykd_num_kernels(); ++i) all.append(py::str(pykd_kernel_description(i)));
  return all;
}

void use_simd(std::optional<std::string> target) {
  check(pykd_kernel_use_simd(target.has_value() ? target->c_str() : nullptr));
}

}  // namespace
}  // namespace pykd::bindings

PYBIND11_MODULE(_core, module) {
  namespace py = pybind11;
  using pykd::bindings::CoreLoss;
  module.doc() = "libpykd for Python; pykd.runtime is the face of it.";
  module.attr("version") = pykd_version();
  module.attr("kept_from") = PYKD_KEPT_FROM;
  if (pykd_abi_version() != PYKD_ABI_VERSION) {
    throw py::import_error("expected libpykd with interface " + std::to_string(PYKD_ABI_VERSION) + ", got " +
                           std::to_string(pykd_abi_version()) +
                           "; install pykd again, so that _core and libpykd are of one build");
  }
  py::class_<pykd::bindings::Memory>(module, "Memory", py::buffer_protocol())
      .def(py::init<std::size_t>(), py::arg("bytes"))
      .def_buffer(&pykd::bindings::Memory::buffer);
  py::class_<CoreLoss>(module, "Loss")
      .def(py::init<const py::object&, std::optional<std::string>, std::string, std::optional<std::string>,
                    std::optional<std::string>, int, bool, std::uintptr_t, std::string>(),
           py::arg("path_or_bytes"), py::arg("engine"), py::arg("device"), py::arg("onnxruntime_library"),
           py::arg("torch_library"), py::arg("threads"), py::arg("check_integrity"), py::arg("cuda_stream"),
           py::arg("kernels"))
      .def_property_readonly("metadata", &CoreLoss::metadata)
      .def_property_readonly("engine", &CoreLoss::engine)
      .def_property_readonly("engine_version", &CoreLoss::engine_version)
      .def_property_readonly("device", &CoreLoss::device)
      .def_property_readonly("kernels_in_use", &CoreLoss::kernels_in_use)
      .def_property_readonly("passed_over", &CoreLoss::passed_over)
      .def_property_readonly("inputs", &CoreLoss::inputs)
      .def_property_readonly("outputs", &CoreLoss::outputs)
      .def_property_readonly("parameters", &CoreLoss::parameters)
      .def("output_shape", &CoreLoss::output_shape, py::arg("inputs"), py::arg("name"))
      .def("run", &CoreLoss::run, py::arg("inputs"), py::arg("parameters"), py::arg("outputs"))
      .def("run_into_new", &CoreLoss::run_into_new, py::arg("inputs"), py::arg("parameters"), py::arg("names"),
           py::arg("allocate"));
  module.def("kernel_descriptions", &pykd::bindings::kernel_descriptions);
  module.def("run_kernel", &pykd::bindings::run_kernel, py::arg("name"), py::arg("inputs"), py::arg("attributes"),
             py::arg("outputs"), py::arg("threads") = 0, py::arg("cuda_stream") = 0);
  module.def("simd_targets", [] { return std::string(pykd_kernel_simd()); });
  module.def("use_simd", &pykd::bindings::use_simd, py::arg("target"));
}
