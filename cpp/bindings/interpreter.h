// File: bindings/interpreter.h
//
// What the bindings need to know of Python itself: the GIL around the end of the process, and text.
//
// While the interpreter ends, other threads may still be in here (daemon threads). The first of them that wants the GIL
// back is then ended by Python with pthread_exit(), which unwinds the stack: into destructors that must not throw, and
// that give Python objects back without the GIL. Neither can end well. Such a thread sleeps instead, until the
// process is gone; Python from 3.14 on does the same.
#ifndef PYKD_BINDINGS_INTERPRETER_H_
#define PYKD_BINDINGS_INTERPRETER_H_

#include <pybind11/pybind11.h>
#include <unistd.h>

#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace pykd::bindings {

// Calls `body`, in which Python code runs or the GIL is taken; it owns nothing that needs a destructor.
template <class Body>
auto in_python(const Body& body) -> decltype(body()) {
#ifdef __GLIBCXX__
  try {
    return body();
  } catch (const abi::__forced_unwind&) {  // pthread_exit()
    for (;;) ::pause();
  }
#else
  return body();
#endif
}

// Calls `body` while other threads may run Python; it throws nothing.
template <class Body>
void without_gil(const Body& body) {
  PyThreadState* const state = PyEval_SaveThread();
  body();
  in_python([state] { PyEval_RestoreThread(state); });
}

// ---- What callers give ---------------------------------------------------------------------------
// Each throws TypeError or ValueError, which names `what`.

// The UTF-8 of a str without NUL characters; it lives as long as that str.
const char* text_of(pybind11::handle text, const char* what);
// The same, or nullptr for None.
const char* text_or_null(pybind11::handle text, const char* what);
// A path as bytes (os.fsencode), or nullptr for None.
const char* path_or_null(pybind11::handle path, const char* what);
// An int of Python from `least` to `most`.
std::int64_t integer_of(pybind11::handle number, const char* what, std::int64_t least, std::int64_t most);
// Anything that is a number to Python; text is none.
double number_of(pybind11::handle number, const std::string& what);
bool bool_of(pybind11::handle object, const char* what);

// The entries of a dict, which may change as soon as Python code runs: they are held here.
struct Item {
  pybind11::object key, value;
  const char* name;  // the key's text
};
std::vector<Item> items_of(const pybind11::dict& dict, const char* what);

// ---- What they get -------------------------------------------------------------------------------

std::string type_name(pybind11::handle object);
// str(object), in which nothing is that UTF-8 cannot write.
std::string printable(pybind11::handle object);
// Throws `type` with that text, whatever bytes it holds.
[[noreturn]] void raise(PyObject* type, const char* text);

// Leaves the making of objects of a class to C++: Python can neither make one without its contents, nor derive a class
// from it, nor turn another object into one.
void seal(pybind11::handle type);

}  // namespace pykd::bindings

#endif  // PYKD_BINDINGS_INTERPRETER_H_
