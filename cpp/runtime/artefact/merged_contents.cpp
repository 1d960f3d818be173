// read_merged(): an ONNX file with whole models in it, in memory that does not grow with their weights.
#include "runtime/artefact/merged_contents.h"

#include <algorithm>
#include <limits>
#include <protozero/exception.hpp>
#include <protozero/types.hpp>
#include <set>
#include <utility>

#include "base/error.h"
#include "runtime/artefact/onnx_contents.h"

namespace pykd::internal {
namespace {

using protozero::pbf_wire_type;
using protozero::tag_and_type;

constexpr std::uint32_t message(protozero::pbf_tag_type tag) {
  return tag_and_type(tag, pbf_wire_type::length_delimited);
}
constexpr std::uint32_t number(protozero::pbf_tag_type tag) { return tag_and_type(tag, pbf_wire_type::varint); }

constexpr std::uint64_t kMaxSize = (std::uint64_t{1} << 31) - 1;  // of a message of protobuf
constexpr std::uint64_t kMaxFields = 100000;                      // of the model, its graph's not counted
constexpr std::uint64_t kMaxProperty = 2u << 20;                  // the metadata and their key
constexpr std::uint64_t kMaxValueInfo = 1u << 20;
constexpr std::uint64_t kMaxName = 65536;
constexpr int kMaxDepth = 30;  // of graphs in graphs: protobuf reads 100 messages deep, and each takes three

// ---- A message of protobuf, field by field ------------------------------------------------------

struct Field {
  std::uint32_t key = 0;     // number and wire type
  std::uint64_t number = 0;  // of a varint
  std::uint64_t end = 0;     // where it ends; it begins where the reader is
};

class Reader {
 public:
  explicit Reader(Source& source) : source_(source), buffer_(1 << 14, '\0') {}

  std::uint64_t position() const { return position_; }
  void move_to(std::uint64_t position) { position_ = position; }

  // Calls body(field) for each field of the message that lies from here to `end`; body may read it.
  template <class Body>
  void fields(std::uint64_t end, Body body) {
    while (position_ < end) {
      const std::uint64_t key = varint(end);
      if (key > std::numeric_limits<std::uint32_t>::max() || key >> 3 == 0) malformed("a field without a number");
      Field field;
      field.key = static_cast<std::uint32_t>(key);
      std::uint64_t length = 0;
      switch (key & 7) {
        case 0:
          field.number = varint(end);
          break;
        case 1:
          length = 8;
          break;
        case 2:
          length = varint(end);
          break;
        case 5:
          length = 4;
          break;
        default:
          malformed("a field of an unknown kind");
      }
      if (length > end - position_) malformed("a field that is longer than what holds it");
      field.end = position_ + length;
      body(field);
      position_ = field.end;
    }
  }

  std::string text(const Field& field, std::uint64_t limit, const char* what) {
    const std::uint64_t length = field.end - position_;
    if (length > limit) {
      refuse_in_scorer(std::string(what) + " of at most " + std::to_string(limit) + " bytes", std::to_string(length));
    }
    std::string bytes(static_cast<std::size_t>(length), '\0');
    if (length > buffer_.size()) {
      source_.read(position_, bytes.data(), bytes.size());
      return bytes;
    }
    const std::uint64_t start = position_;
    for (char& byte : bytes) byte = static_cast<char>(next());
    position_ = start;
    return bytes;
  }

 private:
  [[noreturn]] static void malformed(const std::string& got) { refuse_in_scorer("the messages of an ONNX file", got); }

  std::uint64_t varint(std::uint64_t end) {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (position_ >= end) malformed("the end of it within a number");
      const std::uint64_t byte = next();
      value |= (byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    malformed("a number of more than 64 bits");
  }

  unsigned char next() {
    if (position_ < begin_ || position_ >= begin_ + filled_) {
      begin_ = position_;
      filled_ = static_cast<std::size_t>(std::min<std::uint64_t>(buffer_.size(), source_.size() - begin_));
      source_.read(begin_, buffer_.data(), filled_);
    }
    return static_cast<unsigned char>(buffer_[static_cast<std::size_t>(position_++ - begin_)]);
  }

  Source& source_;
  std::uint64_t position_ = 0;
  std::string buffer_;
  std::uint64_t begin_ = 0;  // of what is in the buffer
  std::size_t filled_ = 0;
};

// ---- An ONNX file -------------------------------------------------------------------------------

template <class T>
void set_once(std::optional<T>& field, T value, const char* name) {
  if (field) refuse_in_scorer(std::string(name) + " once", "it twice");
  field = std::move(value);
}

class Merged {
 public:
  Merged(Source& source, MergedContents& contents) : reader_(source), source_(source), contents_(contents) {}

  void read() {
    bool has_graph = false;
    reader_.fields(source_.size(), [&](const Field& field) {
      switch (field.key) {
        case message(7):
          if (has_graph) refuse_in_scorer("one graph", "two");
          has_graph = true;
          graph(field, 1);
          break;
        case message(14):
          property(field);
          break;
        case message(20):
          refuse_in_scorer("no training information", "some");
        case message(25):
          function(field);
          break;
        default:
          break;
      }
    });
    if (!has_graph) refuse_in_scorer("a graph", "none");
  }

 private:
  // `depth` 1 is the graph of the file; what lies deeper is in attributes.
  void graph(const Field& whole, int depth) {
    if (depth > kMaxDepth)
      refuse_in_scorer("graphs within graphs " + std::to_string(kMaxDepth) + " deep", "deeper ones");
    reader_.fields(whole.end, [&](const Field& field) {
      switch (field.key) {
        case message(1):
          node(field, depth, contents_.nodes.in_graph);
          break;
        case message(5): {
          const Place place{reader_.position(), field.end};
          std::string name = tensor(field);
          if (depth == 1 && !contents_.initializers.emplace(std::move(name), place).second) {
            refuse_in_scorer("every initializer once", "one twice");
          }
          break;
        }
        case message(11):
          if (depth == 1) contents_.inputs.push_back(value(field, "an input", contents_.inputs.size()));
          break;
        case message(12):
          if (depth == 1) contents_.outputs.push_back(value(field, "an output", contents_.outputs.size()));
          break;
        case message(15):
          sparse_tensor(field);
          break;
        default:
          break;
      }
    });
  }

  MergedValue value(const Field& field, const char* what, std::size_t before) {
    if (before >= onnx::kMaxArguments) {
      refuse_in_scorer("at most " + std::to_string(onnx::kMaxArguments) + " inputs and as many outputs", "more");
    }
    const std::string bytes = reader_.text(field, kMaxValueInfo, what);
    const onnx::ValueInfo info = onnx::read_value_info(bytes);
    MergedValue result;
    result.name = info.name;
    result.dtype = info.dtype;
    result.is_described = info.is_tensor && info.has_shape && info.dtype != 0;
    result.axes.assign(info.axes.begin(), info.axes.end());
    result.lengths = info.lengths;
    return result;
  }

  // Adds its operator to `calls` where it is one of pykd's.
  void node(const Field& whole, int depth, std::set<std::string>& calls) {
    std::string op, domain;
    reader_.fields(whole.end, [&](const Field& field) {
      if (field.key == message(4)) op = reader_.text(field, kMaxName, "the operator of a node");
      if (field.key == message(7)) domain = reader_.text(field, kMaxName, "the domain of a node");
      if (field.key == message(5)) attribute(field, depth);
    });
    if (domain == "pykd") calls.insert(std::move(op));
  }

  void attribute(const Field& whole, int depth) {
    bool has_tensor = false, has_graph = false;
    reader_.fields(whole.end, [&](const Field& field) {
      switch (field.key) {
        case message(5):
          if (has_tensor) refuse_in_scorer("the tensor of an attribute once", "it twice");
          has_tensor = true;
          tensor(field);
          break;
        case message(6):
          if (has_graph) refuse_in_scorer("the graph of an attribute once", "it twice");
          has_graph = true;
          graph(field, depth + 1);
          break;
        case message(10):
          tensor(field);
          break;
        case message(11):
          graph(field, depth + 1);
          break;
        case message(22):
        case message(23):
          sparse_tensor(field);
          break;
        default:
          break;
      }
    });
  }

  void function(const Field& whole) {
    std::string name, domain;
    std::set<std::string> calls;
    reader_.fields(whole.end, [&](const Field& field) {
      if (field.key == message(1)) name = reader_.text(field, kMaxName, "the name of a function");
      if (field.key == message(10)) domain = reader_.text(field, kMaxName, "the domain of a function");
      if (field.key == message(7)) node(field, 1, calls);
      if (field.key == message(11)) attribute(field, 1);
    });
    if (domain == "pykd") contents_.nodes.in_functions[name].merge(calls);
  }

  void sparse_tensor(const Field& whole) {
    reader_.fields(whole.end, [&](const Field& field) {
      if (field.key == message(1) || field.key == message(2)) tensor(field);
    });
  }

  // Its name. Its elements are passed by.
  std::string tensor(const Field& whole) {
    std::optional<std::string> name, location;
    std::optional<std::uint64_t> offset, length;
    bool outside = false;
    reader_.fields(whole.end, [&](const Field& field) {
      switch (field.key) {
        case message(8):
          set_once(name, reader_.text(field, kMaxName, "the name of a tensor"), "the name of a tensor");
          break;
        case message(13):
          external(field, location, offset, length);
          break;
        case number(14):
          outside = outside || field.number != 0;
          break;
        default:
          break;
      }
    });
    if (location) {
      const std::uint64_t start = offset.value_or(0), end = start + length.value_or(0);
      if (end < start) refuse_in_scorer("the place of a weight within its file", "one beyond all files");
      std::uint64_t& least = contents_.weights[*location];
      least = std::max(least, end);
    } else if (outside) {
      refuse_in_scorer("the file of the weight " + in_quotes(name.value_or("")) + ", which lies outside", "none");
    }
    return name.value_or("");
  }

  void external(const Field& field, std::optional<std::string>& location, std::optional<std::uint64_t>& offset,
                std::optional<std::uint64_t>& length) {
    const auto [key, value] = entry(field, kMaxName, "an entry of external_data");
    if (key == "location") {
      check_location(value);
      set_once(location, value, "the location of a weight");
    } else if (key == "offset") {
      set_once(offset, count(value), "the offset of a weight");
    } else if (key == "length") {
      set_once(length, count(value), "the length of a weight");
    }
  }

  // ONNX Runtime looks for it from the folder of the file on, and has names for places that are no files.
  static void check_location(const std::string& location) {
    const bool plain = !location.empty() && location != "." && location != ".." && location.size() <= 255 &&
                       location.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
    if (!plain) refuse_in_scorer("weights in a file beside the scorer, by its name alone", in_quotes(location));
  }

  static std::uint64_t count(const std::string& digits) {
    const bool whole = !digits.empty() && digits.size() <= 18 &&
                       std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (!whole) refuse_in_scorer("numbers of bytes as offsets and lengths of weights", in_quotes(digits));
    return std::stoull(digits);
  }

  // A key and a value.
  std::pair<std::string, std::string> entry(const Field& whole, std::uint64_t limit, const char* what) {
    std::optional<std::string> key, value;
    reader_.fields(whole.end, [&](const Field& field) {
      if (field.key == message(1)) set_once(key, reader_.text(field, limit, what), what);
      if (field.key == message(2)) set_once(value, reader_.text(field, limit, what), what);
    });
    return {key.value_or(""), value.value_or("")};
  }

  void property(const Field& field) {
    auto [key, value] = entry(field, kMaxProperty, "an entry of metadata");
    if (key == "pykd.scorer") set_once(contents_.metadata, std::move(value), "the metadata \"pykd.scorer\"");
  }

  Reader reader_;
  Source& source_;
  MergedContents& contents_;
};

}  // namespace

void refuse_in_scorer(const std::string& expected, const std::string& got) {
  fail(PYKD_BAD_ARTEFACT, expected + " in the merged scorer", got, "write it again with pykd merge");
}

bool is_merged(Source& source) {
  constexpr std::string_view kStart("\x0a\x0bpykd.scorer");  // its key
  if (source.size() > kMaxSize) return false;
  bool found = false;
  std::uint64_t count = 0;
  Reader reader(source);
  try {
    reader.fields(source.size(), [&](Field& field) {
      if (++count > kMaxFields) refuse_in_scorer("fewer fields", "more");
      if (field.key != message(14) || field.end - reader.position() < kStart.size()) return;
      Field start = field;
      start.end = reader.position() + kStart.size();
      found |= reader.text(start, kStart.size(), "metadata") == kStart;
    });
  } catch (const Failure& failure) {
    if (failure.status() != PYKD_BAD_ARTEFACT) throw;
  }
  return found;  // of a file that is cut short, too: what is wrong with it is said as of a scorer
}

MergedContents read_merged(Source& source) {
  if (source.size() > kMaxSize) {
    refuse_in_scorer("at most 2 GiB, as protobuf has it,", std::to_string(source.size()) + " bytes");
  }
  MergedContents contents;
  try {
    Merged(source, contents).read();
  } catch (const protozero::exception& error) {
    refuse_in_scorer("the messages of an ONNX file", std::string("bytes that are none (") + error.what() + ")");
  }
  return contents;
}

std::optional<double> number_at(Source& source, Place place) {
  if (place.end - place.begin > kMaxName) return std::nullopt;
  std::string bytes(static_cast<std::size_t>(place.end - place.begin), '\0');
  if (!bytes.empty()) source.read(place.begin, bytes.data(), bytes.size());
  return onnx::read_tensor(bytes).number;
}

}  // namespace pykd::internal
