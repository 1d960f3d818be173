// Calls of kernels by the C interface: names, dtypes, ranks, lengths, devices and data as the bytes say. What a kernel
// takes it computes inside of the memory that it was given; everything else is an error.
#include "pykd/kernels.h"

#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>

#include "fuzz/fuzz.h"

namespace {

using nlohmann::json;

// Reads the input byte by byte; zeros after its end.
class Source {
 public:
  Source(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  std::uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  bool rarely() { return byte() > 245; }
  std::size_t below(std::size_t limit) { return byte() % limit; }
  void fill(std::uint8_t* memory, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) memory[i] = byte();
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

const std::vector<json>& kernels() {
  static const std::vector<json> all = [] {
    std::vector<json> made;
    for (std::size_t i = 0; i < pykd_num_kernels(); ++i) made.push_back(json::parse(pykd_kernel_description(i)));
    return made;
  }();
  return all;
}

std::size_t size_of(pykd_dtype dtype) {
  return dtype == PYKD_FLOAT64 || dtype == PYKD_INT64 ? 8 : dtype == PYKD_FLOAT32 ? 4 : 2;
}

struct Tensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::unique_ptr<std::uint8_t[]> memory;  // as large as the tensor, so that a byte too far is noticed
  pykd_tensor view = {};
};

Tensor make(Source& source, const json& argument, const std::vector<std::int64_t>& lengths, pykd_dtype tensors) {
  Tensor tensor;
  tensor.name = source.rarely() ? "other" : argument["name"].get<std::string>();
  for (const json& name : argument["axes"]) {
    std::int64_t length = lengths[std::hash<std::string>()(name.get<std::string>()) % lengths.size()];
    if (source.rarely()) length = static_cast<std::int64_t>(source.below(5));
    tensor.shape.push_back(length);
  }
  if (source.rarely()) tensor.shape.push_back(1);
  const std::string role = argument["role"];
  pykd_dtype dtype = role == "tensor" ? tensors : role == "index" ? PYKD_INT64 : PYKD_FLOAT32;
  if (source.rarely()) dtype = static_cast<pykd_dtype>(source.byte() % 5);
  std::size_t count = 1;
  for (const std::int64_t length : tensor.shape) count *= static_cast<std::size_t>(length);
  const std::size_t bytes = count * size_of(dtype);
  tensor.memory = std::make_unique<std::uint8_t[]>(bytes);
  const std::uint8_t kind = source.byte();
  if (kind < 40) {
    source.fill(tensor.memory.get(), bytes);  // NaN, infinities and all
  } else if (dtype == PYKD_FLOAT32) {
    for (std::size_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(source.byte()) / 16 - 8;
      std::memcpy(tensor.memory.get() + 4 * i, &value, 4);
    }
  } else if (dtype == PYKD_INT64) {
    for (std::size_t i = 0; i < count; ++i) {
      const std::int64_t value = static_cast<std::int64_t>(source.below(6)) - (kind > 230 ? 2 : 0);
      std::memcpy(tensor.memory.get() + 8 * i, &value, 8);
    }
  }
  tensor.view.data = source.rarely() ? nullptr : tensor.memory.get();
  tensor.view.dtype = dtype;
  tensor.view.rank = static_cast<std::int32_t>(tensor.shape.size());
  tensor.view.device = source.rarely() ? PYKD_CUDA : PYKD_CPU;
  return tensor;
}

std::vector<pykd_tensor> views(std::vector<Tensor>& tensors) {
  std::vector<pykd_tensor> all;
  for (Tensor& tensor : tensors) {
    tensor.view.name = tensor.name.c_str();
    tensor.view.shape = tensor.shape.data();
    all.push_back(tensor.view);
  }
  return all;
}

}  // namespace

pykd::fuzz::Form pykd::fuzz::form() { return Form::kBytes; }

std::vector<std::string> pykd::fuzz::seeds() {
  std::vector<std::string> all;
  for (std::size_t i = 0; i < 64; ++i) {
    std::string seed(256, '\0');
    for (std::size_t j = 0; j < seed.size(); ++j) seed[j] = static_cast<char>((i * 37 + j * j * 11 + j * 101) % 240);
    all.push_back(seed);
  }
  return all;
}

std::vector<std::string> pykd::fuzz::words() { return {std::string(4, '\xff'), std::string(8, '\0'), "\x7f\x80"}; }

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Source source(data, size);
  const json& kernel = kernels()[source.below(kernels().size())];
  std::vector<std::int64_t> lengths;
  for (int i = 0; i < 4; ++i) lengths.push_back(1 + static_cast<std::int64_t>(source.below(source.rarely() ? 70 : 9)));
  const auto tensors = static_cast<pykd_dtype>(source.below(3));
  std::vector<Tensor> inputs, outputs;
  for (const json& input : kernel["inputs"]) {
    if (!(input["optional"] && source.below(2) == 0) && !source.rarely()) {
      inputs.push_back(make(source, input, lengths, tensors));
    }
  }
  for (const json& output : kernel["outputs"]) {
    if (source.below(4) != 0) outputs.push_back(make(source, output, lengths, tensors));
  }
  std::vector<pykd_kernel_attribute> attributes;
  std::vector<std::string> texts;
  texts.reserve(16);
  for (const json& attribute : kernel["attributes"]) {
    if (source.below(2) == 0) continue;
    texts.push_back(attribute["name"]);
    pykd_kernel_attribute given = {texts.back().c_str(), static_cast<double>(source.byte()) / 64, nullptr};
    if (source.rarely()) std::memcpy(&given.value, "\xff\xff\xff\xff\xff\xff\xef\x7f", 8);
    if (!attribute["choices"].empty() && !source.rarely()) {
      texts.push_back(attribute["choices"][source.below(attribute["choices"].size())]);
      given.choice = texts.back().c_str();
    }
    attributes.push_back(given);
  }
  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  host.threads = 1 + static_cast<std::int32_t>(source.below(2));
  const std::vector<pykd_tensor> in = views(inputs), out = views(outputs);
  pykd_kernel_run(kernel["name"].get<std::string>().c_str(), in.data(), in.size(), attributes.data(), attributes.size(),
                  out.data(), out.size(), &host);
  return 0;
}
