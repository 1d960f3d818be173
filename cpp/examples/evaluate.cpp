// Evaluates an exported loss on tensors from a file, with no Python in the process.
//
//     evaluate --loss build/demo/recipe --data outputs.bin [--engine onnxruntime|torchscript]
//              [--device cpu] [--set soft_temperature=4 ...] [--out gradients.bin]
//
// The file (tensor_file.h) holds the loss's inputs by name. Prints the scalars, and writes all
// outputs, gradients included where the artefact has them, to a file of the same kind.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>

#include "pykd/pykd.hpp"
#include "tensor_file.h"

int main(int argc, char** argv) try {
  std::string path, data, out;
  pykd::LoadOptions options;
  pykd::Parameters parameters;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--loss") {
      path = value;
    } else if (name == "--data") {
      data = value;
    } else if (name == "--out") {
      out = value;
    } else if (name == "--engine") {
      options.engine = value;
    } else if (name == "--device") {
      options.device = value;
    } else if (name == "--set" && value.find('=') != std::string::npos) {
      const std::size_t equals = value.find('=');
      const std::string number = value.substr(equals + 1);
      char* end = nullptr;
      parameters[value.substr(0, equals)] = std::strtod(number.c_str(), &end);
      if (number.empty() || *end != '\0') {
        throw std::runtime_error("expected --set parameter=number, got \"" + value + "\"; pass a number");
      }
    } else {
      path.clear();
      break;
    }
  }
  if (path.empty() || data.empty() || argc % 2 == 0) {
    std::fprintf(stderr,
                 "usage: %s --loss recipe --data tensors.bin [--engine name] [--device name]"
                 " [--set parameter=number ...] [--out file]\n",
                 argv[0]);
    return 2;
  }

  const examples::StoredTensors stored = examples::read_tensors(data);
  pykd::Tensors inputs;
  for (const auto& [name, tensor] : stored) inputs[name] = tensor.view();

  const pykd::Loss loss = pykd::Loss::load(path, options);
  bool has_gradient = false;
  for (const pykd_tensor_info& output : loss.outputs()) has_gradient |= output.has_gradient != 0;
  const pykd::Result result =
      has_gradient ? loss.value_and_gradient(inputs, parameters) : loss.value(inputs, parameters);

  std::printf("engine %s %s\n", loss.engine().c_str(), loss.engine_version().c_str());
  examples::StoredTensors outputs;
  for (const std::string& name : result.names()) {
    if (result.shape(name).empty()) std::printf("%s %.9g\n", name.c_str(), result.value(name));
    examples::StoredTensor& output = outputs[name];
    output.dtype = result.dtype(name);
    output.shape = result.shape(name);
    std::size_t size = pykd::internal::size_of(output.dtype);
    for (std::int64_t extent : output.shape) size *= static_cast<std::size_t>(extent);
    const auto* bytes = static_cast<const unsigned char*>(result.raw(name));
    output.bytes.assign(bytes, bytes + size);
  }
  if (!out.empty()) examples::write_tensors(out, outputs);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "evaluate: %s\n", error.what());
  return 1;
}
