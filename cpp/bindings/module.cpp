// pykd._core: libpykd for Python. Tensors cross by DLPack, so that neither NumPy nor torch is needed to
// build it. pykd/runtime.py is the face that users see.
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/dtypes.h"
#include "bindings/arguments.h"
#include "bindings/interpreter.h"
#include "bindings/kernel_call.h"
#include "pykd/kernels.h"
#include "pykd/pykd.hpp"

namespace pykd::bindings {
namespace {

namespace py = pybind11;

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
  explicit CoreLoss(pykd_loss* loss) : loss_(loss) {}
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
      all.append(
          py::make_tuple(info.name, info.default_value, info.minimum, info.minimum_exclusive != 0, info.maximum));
    }
    return all;
  }

  py::tuple output_shape(const py::dict& inputs, const py::object& name) const {
    const Borrowed in(inputs, false);
    return shape_of(in, text_of(name, kNameOfTensor));
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
    for (const py::handle key : names) {
      const char* name = text_of(key, kNameOfTensor);
      const py::tuple shape = shape_of(in, name);
      const auto array = py::reinterpret_steal<py::object>(
          in_python([&] { return PyObject_Call(allocate.ptr(), shape.ptr(), nullptr); }));
      if (!array) throw py::error_already_set();
      out.add(name, array, true);
      results[key] = PyTuple_CheckExact(array.ptr()) ? py::object(array[py::int_(0)]) : array;
    }
    run_borrowed(in, parameters, out);
    return results;
  }

 private:
  void run_borrowed(const Borrowed& in, const py::dict& parameters, const Borrowed& out) const {
    const Settings settings(parameters, "the name of a parameter");
    const std::vector<pykd_parameter> numbers = settings.parameters();
    pykd_status status = PYKD_INTERNAL;
    without_gil([&] {
      status = pykd_run(loss_, in.data(), in.size(), numbers.data(), numbers.size(), out.data(), out.size());
    });
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
    return py::make_tuple(std::move(shape), pykd::internal::dtype_name(dtype));
  }

  template <class Info>
  py::list tensor_infos(std::size_t count, Info info_of) const {
    py::list all;
    for (std::size_t i = 0; i < count; ++i) {
      pykd_tensor_info info = PYKD_TENSOR_INFO_INIT;
      check(info_of(loss_, i, &info));
      const auto rank = static_cast<std::size_t>(info.rank);
      py::tuple axes(rank), least(rank);
      for (std::size_t axis = 0; axis < rank; ++axis) {
        axes[axis] = py::str(info.axes[axis]);
        least[axis] = py::int_(info.least_lengths[axis]);
      }
      py::list names;
      for (const pykd_dtype dtype : pykd::internal::kDtypes) {
        if ((info.dtypes & pykd::internal::dtype_bit(dtype)) != 0) names.append(pykd::internal::dtype_name(dtype));
      }
      all.append(py::make_tuple(info.name, axes, py::tuple(names), info.has_gradient != 0, least));
    }
    return all;
  }

  pykd_loss* loss_ = nullptr;
};

constexpr std::int64_t kLeastInt = std::numeric_limits<std::int32_t>::min();
constexpr std::int64_t kMostInt = std::numeric_limits<std::int32_t>::max();

void* stream_of(const py::object& cuda_stream) {
  const std::int64_t address = integer_of(cuda_stream, "cuda_stream", 0, std::numeric_limits<std::int64_t>::max());
  return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
}

// From a path, or from the bytes of a file where that is None. Texts are str, paths bytes.
std::unique_ptr<CoreLoss> load(const py::object& path, const py::object& contents, const py::object& engine,
                               const py::object& device, const py::object& onnxruntime_library,
                               const py::object& torch_library, const py::object& threads,
                               const py::object& check_integrity, const py::object& cuda_stream,
                               const py::object& kernels) {
  pykd_load_options options = PYKD_LOAD_OPTIONS_INIT;
  options.engine = text_or_null(engine, "engine");
  options.device = text_or_null(device, "device");
  options.onnxruntime_library = path_or_null(onnxruntime_library, "onnxruntime_library");
  options.torch_library = path_or_null(torch_library, "torch_library");
  options.threads = static_cast<std::int32_t>(integer_of(threads, "threads", kLeastInt, kMostInt));
  options.skip_integrity_check = bool_of(check_integrity, "check_integrity") ? 0 : 1;
  options.cuda_stream = stream_of(cuda_stream);
  options.kernels = text_or_null(kernels, "kernels");

  const char* file = path_or_null(path, "the path of an artefact");
  if (file == nullptr && !PyBytes_Check(contents.ptr())) {
    throw py::type_error("expected the bytes of an artefact, got " + type_name(contents) + "; pass a path or bytes");
  }
  pykd_loss* loss = nullptr;
  pykd_status status = PYKD_INTERNAL;
  without_gil([&] {
    status = file != nullptr
                 ? pykd_load(file, &options, &loss)
                 : pykd_load_bytes(PyBytes_AS_STRING(contents.ptr()),
                                   static_cast<std::size_t>(PyBytes_GET_SIZE(contents.ptr())), &options, &loss);
  });
  check(status);
  return std::make_unique<CoreLoss>(loss);
}

// A method for Python, to which None is no object of the class.
template <class Result, class... Arguments>
auto method(Result (CoreLoss::*function)(Arguments...) const) {
  return [function](const CoreLoss& loss, Arguments... arguments) {
    return (loss.*function)(std::forward<Arguments>(arguments)...);
  };
}

// ---- Kernels -------------------------------------------------------------------------------------

void run_kernel(const py::object& name, const py::dict& inputs, const py::dict& attributes, const py::dict& outputs,
                const py::object& threads, const py::object& cuda_stream) {
  const char* kernel = text_of(name, "the name of a kernel");
  const Borrowed in(inputs, false), out(outputs, true);
  const Settings settings(attributes, "the name of an attribute");
  const std::vector<pykd_kernel_attribute> chosen = settings.attributes();
  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  host.threads = static_cast<std::int32_t>(integer_of(threads, "threads", kLeastInt, kMostInt));
  host.cuda_stream = stream_of(cuda_stream);
  pykd_status status = PYKD_INTERNAL;
  without_gil([&] {
    status = pykd_kernel_run(kernel, in.data(), in.size(), chosen.data(), chosen.size(), out.data(), out.size(), &host);
  });
  check(status);
}

py::list kernel_descriptions() {
  py::list all;
  for (std::size_t i = 0; i < pykd_num_kernels(); ++i) all.append(py::str(pykd_kernel_description(i)));
  return all;
}

void use_simd(const py::object& target) { check(pykd_kernel_use_simd(text_or_null(target, "a SIMD target"))); }

}  // namespace
}  // namespace pykd::bindings

PYBIND11_MODULE(_core, module) {
  namespace py = pybind11;
  using namespace pykd::bindings;
  module.doc() = "libpykd for Python; pykd.runtime is the face of it.";
  module.attr("version") = pykd_version();
  module.attr("kept_from") = PYKD_KEPT_FROM;
  if (pykd_abi_version() != PYKD_ABI_VERSION) {
    throw py::import_error("expected libpykd with interface " + std::to_string(PYKD_ABI_VERSION) + ", got " +
                           std::to_string(pykd_abi_version()) +
                           "; install pykd again, so that _core and libpykd are of one build");
  }
  py::class_<Memory> memory(module, "Memory", py::buffer_protocol());
  memory.def_buffer(&Memory::buffer);
  seal(memory);
  module.def(
      "allocate", [](std::size_t bytes) { return std::make_unique<Memory>(bytes); }, py::arg("bytes"));

  py::class_<CoreLoss> loss(module, "Loss");
  loss.def_property_readonly("metadata", method(&CoreLoss::metadata))
      .def_property_readonly("engine", method(&CoreLoss::engine))
      .def_property_readonly("engine_version", method(&CoreLoss::engine_version))
      .def_property_readonly("device", method(&CoreLoss::device))
      .def_property_readonly("kernels_in_use", method(&CoreLoss::kernels_in_use))
      .def_property_readonly("passed_over", method(&CoreLoss::passed_over))
      .def_property_readonly("inputs", method(&CoreLoss::inputs))
      .def_property_readonly("outputs", method(&CoreLoss::outputs))
      .def_property_readonly("parameters", method(&CoreLoss::parameters))
      .def("output_shape", method(&CoreLoss::output_shape), py::arg("inputs"), py::arg("name"))
      .def("run", method(&CoreLoss::run), py::arg("inputs"), py::arg("parameters"), py::arg("outputs"))
      .def("run_into_new", method(&CoreLoss::run_into_new), py::arg("inputs"), py::arg("parameters"), py::arg("names"),
           py::arg("allocate"));
  seal(loss);
  module.def("load", &pykd::bindings::load, py::arg("path"), py::arg("contents"), py::arg("engine"), py::arg("device"),
             py::arg("onnxruntime_library"), py::arg("torch_library"), py::arg("threads"), py::arg("check_integrity"),
             py::arg("cuda_stream"), py::arg("kernels"));

  py::class_<KernelCall> call(module, "KernelCall");
  call.def("run", &KernelCall::run, py::arg("inputs"), py::arg("gradients"), py::arg("threads"));
  seal(call);
  module.def(
      "prepare_kernel",
      [](const py::str& kernel, const py::dict& numbers, const py::tuple& inputs, const py::dict& attributes,
         const py::dict& weights, const py::tuple& values, const py::tuple& gradients, const py::tuple& sums) {
        return std::make_unique<KernelCall>(kernel, numbers, inputs, attributes, weights, values, gradients, sums);
      },
      py::arg("kernel"), py::arg("numbers"), py::arg("inputs"), py::arg("attributes"), py::arg("weights"),
      py::arg("values"), py::arg("gradients"), py::arg("sums"));
  module.def("weighted_sum", &weighted_sum, py::arg("weights"), py::arg("values"), py::arg("at_least_0"));
  module.def("kernel_descriptions", &kernel_descriptions);
  module.def("run_kernel", &run_kernel, py::arg("name"), py::arg("inputs"), py::arg("attributes"), py::arg("outputs"),
             py::arg("threads") = 0, py::arg("cuda_stream") = 0);
  module.def(
      "check_onnx",
      [](const py::bytes& data) {
        const std::string_view bytes = data;
        check(pykd_check_onnx(bytes.data(), bytes.size()));
      },
      py::arg("data"));
  module.def("simd_targets", [] { return std::string(pykd_kernel_simd()); });
  module.def("use_simd", &use_simd, py::arg("target"));
}
