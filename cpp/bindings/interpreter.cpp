#include "bindings/interpreter.h"

#include <cstring>

namespace pykd::bindings {
namespace {

namespace py = pybind11;

// As Python prints it in ASCII, in quotes: whatever is in it can be read.
std::string in_quotes(py::handle text) {
  constexpr std::size_t kMost = 100;
  const auto plain = py::reinterpret_steal<py::object>(PyUnicode_FromObject(text.ptr()));  // no subclass of str
  const auto ascii = py::reinterpret_steal<py::object>(plain ? PyObject_ASCII(plain.ptr()) : nullptr);
  if (!ascii) throw py::error_already_set();
  const std::string all = PyUnicode_AsUTF8(ascii.ptr());
  return all.size() > kMost ? all.substr(0, kMost) + "...'" : all;
}

}  // namespace

const char* text_of(py::handle text, const char* what) {
  if (!PyUnicode_Check(text.ptr())) {
    throw py::type_error(std::string("expected a str for ") + what + ", got " + type_name(text) + "; pass its text");
  }
  Py_ssize_t size = 0;
  const char* utf8 = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (utf8 != nullptr && std::strlen(utf8) == static_cast<std::size_t>(size)) return utf8;
  PyErr_Clear();
  throw py::value_error(std::string("expected text without NUL and lone surrogates for ") + what + ", got " +
                        in_quotes(text) + "; correct it");
}

const char* text_or_null(py::handle text, const char* what) { return text.is_none() ? nullptr : text_of(text, what); }

const char* path_or_null(py::handle path, const char* what) {
  if (path.is_none()) return nullptr;
  if (!PyBytes_Check(path.ptr())) {
    throw py::type_error(std::string("expected bytes for ") + what + ", got " + type_name(path) +
                         "; use os.fsencode()");
  }
  const char* bytes = PyBytes_AS_STRING(path.ptr());
  if (std::strlen(bytes) == static_cast<std::size_t>(PyBytes_GET_SIZE(path.ptr()))) return bytes;
  throw py::value_error(std::string("expected ") + what + " without NUL, got " + printable(py::repr(path)) +
                        "; correct the path");
}

std::int64_t integer_of(py::handle number, const char* what, std::int64_t least, std::int64_t most) {
  const auto index = py::reinterpret_steal<py::object>(in_python([&] { return PyNumber_Index(number.ptr()); }));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(std::string("expected an int for ") + what + ", got " + type_name(number) + "; pass one");
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow == 0 && value >= least && value <= most) return value;
  throw py::value_error("expected from " + std::to_string(least) + " to " + std::to_string(most) + " for " + what +
                        ", got " + (overflow == 0 ? std::to_string(value) : "a number beyond 64 bits") +
                        "; correct it");
}

double number_of(py::handle number, const std::string& what) {
  const double value = in_python([&] { return PyFloat_AsDouble(number.ptr()); });
  if (value != -1.0 || PyErr_Occurred() == nullptr) return value;
  const py::error_already_set error;
  if (error.matches(PyExc_OverflowError)) {
    throw py::value_error("expected a number that a float can hold for " + what + ", got a larger one; correct it");
  }
  if (!error.matches(PyExc_TypeError)) throw error;
  throw py::type_error("expected a number for " + what + ", got " + type_name(number) + "; pass a float");
}

bool bool_of(py::handle object, const char* what) {
  if (PyBool_Check(object.ptr())) return object.ptr() == Py_True;
  throw py::type_error(std::string("expected True or False for ") + what + ", got " + type_name(object) +
                       "; pass one of the two");
}

std::vector<Item> items_of(const py::dict& dict, const char* what) {
  std::vector<Item> items;
  items.reserve(dict.size());
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(dict.ptr(), &position, &key, &value) != 0;) {  // runs no Python code
    items.push_back({py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value), nullptr});
  }
  for (Item& item : items) item.name = text_of(item.key, what);
  return items;
}

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

std::string printable(py::handle object) {
  const auto text = py::reinterpret_steal<py::object>(in_python([&] { return PyObject_Str(object.ptr()); }));
  if (text) {
    const auto utf8 =
        py::reinterpret_steal<py::object>(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "backslashreplace"));
    if (utf8) return PyBytes_AS_STRING(utf8.ptr());
  }
  PyErr_Clear();
  return "(" + type_name(object) + " that cannot be printed)";
}

void raise(PyObject* type, const char* text) {
  const auto message = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(text, static_cast<Py_ssize_t>(std::strlen(text)), "backslashreplace"));
  if (message) PyErr_SetObject(type, message.ptr());
  throw py::error_already_set();
}

void seal(py::handle type) {
  auto* object = reinterpret_cast<PyTypeObject*>(type.ptr());
  object->tp_new = nullptr;  // __new__ of the base class refuses, as another one is expected
  object->tp_flags &= ~static_cast<unsigned long>(Py_TPFLAGS_BASETYPE);
  PyType_Modified(object);
  object->tp_flags |= Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE;
}

}  // namespace pykd::bindings
