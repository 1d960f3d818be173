// File: bindings/kernel_call.h
//
// A kernel call that is made again and again with other tensors of the same shapes: everything else is given once.
#ifndef PYKD_BINDINGS_KERNEL_CALL_H_
#define PYKD_BINDINGS_KERNEL_CALL_H_

#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>
#include <vector>

#include "pykd/kernels.h"
#include "pykd/pykd.h"

namespace pykd::bindings {

// Σ weight · value in float64; `at_least_0` takes negative values for 0.
double weighted_sum(const pybind11::object& weights, const pybind11::object& values, bool at_least_0);

class KernelCall {
 public:
  // kernel: its name.
  // numbers: its inputs of that role, by name.
  // inputs: the names of its other inputs, in the order in which run() gets them.
  // attributes: by name.
  // weights: by name; they go in where gradients are wanted.
  // values: (name, rows) of every output that is a value.
  // gradients: the names of the outputs that are gradients.
  // sums: (which of the values, weights of its rows, whether negative values count as 0), each a result of run().
  KernelCall(const pybind11::str& kernel, const pybind11::dict& numbers, const pybind11::tuple& inputs,
             const pybind11::dict& attributes, const pybind11::dict& weights, const pybind11::tuple& values,
             const pybind11::tuple& gradients, const pybind11::tuple& sums);

  // Writes the gradients into these tensors (none: none is wanted) and returns the sums. Any number of threads may
  // be in here.
  pybind11::tuple run(const pybind11::tuple& inputs, const pybind11::tuple& gradients, int threads) const;

 private:
  struct Named {
    std::string name;
    std::vector<float> data;
    std::vector<std::int64_t> shape;
  };
  struct Attribute {
    std::string name;
    double value;
    std::string choice;
    bool is_choice;
  };
  struct Sum {
    std::size_t value;
    std::vector<float> weights;
    bool at_least_0;
  };

  std::string kernel_;
  std::vector<Named> numbers_, weights_;
  std::vector<Attribute> attributes_;
  std::vector<std::string> inputs_, gradients_;
  std::vector<Named> values_;  // without data
  std::vector<Sum> sums_;
  std::size_t rows_ = 0;  // of all values together
};

}  // namespace pykd::bindings

#endif  // PYKD_BINDINGS_KERNEL_CALL_H_
