#include "runtime/artefact/files.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "base/error.h"
#include "runtime/artefact/merged_contents.h"
#include "runtime/artefact/source.h"

namespace pykd::internal {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kZipMagic = "PK\x03\x04";
constexpr std::size_t kMaxTorchScriptSize = 1u << 30;

ArtefactFile read_file(const fs::path& path) {
  ArtefactFile file;
  file.label = path.string();
  std::uint64_t size = 0;
  std::ifstream stream = open_regular(file.label, size);
  char magic[4] = {};
  stream.read(magic, sizeof magic);
  const auto start = static_cast<std::size_t>(stream.gcount());
  file.format = detect_format({magic, start});
  check_size(file.label, file.format, size);
  file.bytes.assign(magic, start);
  if (size > start) {
    file.bytes.resize(static_cast<std::size_t>(size));
    stream.read(&file.bytes[start], static_cast<std::streamsize>(size - start));
    file.bytes.resize(start + static_cast<std::size_t>(stream.gcount()));
  }
  if (stream.bad()) cannot_read(file.label, "an error while reading it");
  return file;
}

std::optional<ArtefactFile> find_member(const fs::path& folder, const char* name, FileFormat format,
                                        const Manifest& manifest) {
  std::error_code error;
  if (!fs::exists(folder / name, error)) return std::nullopt;
  ArtefactFile file;
  file.label = (folder / name).string();
  file.format = format;
  file.unread = true;
  for (const ManifestEntry& entry : manifest.files) {
    if (entry.name == name) file.described = entry;
  }
  if (!file.described) not_of_the_manifest(file.label, "which lists every file", "one that is not in it");
  return file;
}

std::string read_manifest(const fs::path& folder) { return read_file(folder / "manifest.json").bytes; }

Artefact read_folder(const fs::path& folder) {
  std::error_code error;
  const fs::path manifest_path = folder / "manifest.json";
  if (!fs::exists(manifest_path, error)) {
    fail(PYKD_NOT_FOUND, "a folder that pykd.export wrote at " + folder.string(), "one without manifest.json",
         "give the folder that was exported, or one of its files by its path");
  }
  Artefact artefact;
  artefact.folder = folder.string();
  artefact.manifest = read_manifest(folder);
  Manifest manifest;
  try {
    manifest = parse_manifest(artefact.manifest);
  } catch (const Failure& failure) {
    throw Failure(failure.status(), manifest_path.string() + ": " + failure.what());
  }
  artefact.value = find_member(folder, "loss.onnx", FileFormat::kOnnx, manifest);
  artefact.gradient = find_member(folder, "loss.grad.onnx", FileFormat::kOnnx, manifest);
  artefact.torchscript = find_member(folder, "loss.pt", FileFormat::kTorchScript, manifest);
  artefact.score = find_member(folder, "score.onnx", FileFormat::kOnnx, manifest);
  if (artefact.score && (artefact.value || artefact.gradient || artefact.torchscript)) {
    fail(PYKD_BAD_ARTEFACT, "score.onnx alone, or the files of a loss, in " + folder.string(), "both",
         "export each into a folder of its own");
  }
  if (!artefact.has_onnx() && !artefact.torchscript) {
    fail(PYKD_NOT_FOUND, "loss.onnx, loss.grad.onnx, loss.pt or score.onnx in " + folder.string(), "none of them",
         "export the loss again");
  }
  return artefact;
}

bool is_scorer(Source& source) {
  char magic[kZipMagic.size()] = {};
  const auto start = static_cast<std::size_t>(std::min<std::uint64_t>(source.size(), sizeof magic));
  source.read(0, magic, start);
  return detect_format({magic, start}) == FileFormat::kOnnx && is_merged(source);
}

Artefact single(ArtefactFile file) {
  Artefact artefact;
  (file.format == FileFormat::kOnnx ? artefact.value : artefact.torchscript) = std::move(file);
  return artefact;
}

}  // namespace

void not_of_the_manifest(const std::string& label, const std::string& expected, const std::string& got) {
  fail(PYKD_BAD_ARTEFACT, label + " to be the file of manifest.json beside it, " + expected, got,
       "the files of this folder do not belong together: copy the whole folder, or export the loss again");
}

void check_size(const std::string& label, FileFormat format, std::uintmax_t size) {
  const std::size_t limit = format == FileFormat::kOnnx ? kMaxOnnxSize : kMaxTorchScriptSize;
  if (size > limit) {
    fail(PYKD_BAD_ARTEFACT,
         std::string(format == FileFormat::kOnnx ? "an ONNX" : "a TorchScript") + " file of at most " +
             std::to_string(limit >> 20) + " MiB at " + label,
         std::to_string(size) + " bytes",
         "load a file that pykd.export wrote; they hold no weights (a scorer of pykd merge does: this is none, or is "
         "cut)");
  }
}

void refuse_merged(const MergedFile& file) {
  fail(PYKD_BAD_ARTEFACT, "a loss that pykd.export wrote at " + file.source->label(),
       "a scorer that pykd merge wrote, which holds whole models and is not looked through",
       "in C and C++ set trust_merged in the load options where you trust whoever wrote it; elsewhere run it in a "
       "session "
       "of ONNX Runtime's");
}

FileFormat detect_format(std::string_view bytes) {
  return bytes.substr(0, kZipMagic.size()) == kZipMagic ? FileFormat::kTorchScript : FileFormat::kOnnx;
}

Artefact read_artefact(const std::string& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) {
    fail(PYKD_NOT_FOUND, "a folder that pykd.export wrote, or one of its files, at " + path,
         error && error != std::errc::no_such_file_or_directory ? error.message() : "nothing there", "check the path");
  }
  if (fs::is_directory(status)) return read_folder(path);
  auto file = std::make_unique<FileSource>(path);
  Artefact artefact;
  if (is_scorer(*file)) {
    artefact.merged = MergedFile{std::move(file), path, {}};
    return artefact;
  }
  return single(read_file(path));
}

void read_contents(ArtefactFile& file) {
  if (!file.unread) return;
  ArtefactFile read = read_file(file.label);
  if (read.format != file.format) {
    fail(PYKD_BAD_ARTEFACT,
         std::string(file.format == FileFormat::kOnnx ? "an ONNX" : "a TorchScript") + " file at " + file.label,
         file.format == FileFormat::kOnnx ? "a ZIP archive" : "no ZIP archive", "export the loss again");
  }
  file.bytes = std::move(read.bytes);
  file.unread = false;
}

bool was_replaced(const Artefact& artefact) {
  return !artefact.folder.empty() && read_manifest(artefact.folder) != artefact.manifest;
}

void check_sizes(const Artefact& artefact) {
  for (const std::optional<ArtefactFile>* file :
       {&artefact.value, &artefact.gradient, &artefact.torchscript, &artefact.score}) {
    if (!file->has_value() || !(*file)->described) continue;
    std::error_code error;
    const std::uintmax_t size = fs::file_size((*file)->label, error);
    if (error) cannot_read((*file)->label, error.message());
    if (size != (*file)->described->bytes) {
      not_of_the_manifest((*file)->label, std::to_string((*file)->described->bytes) + " bytes long",
                          std::to_string(size) + " bytes");
    }
  }
}

Artefact wrap_artefact(const void* bytes, std::size_t size) {
  ArtefactFile file;
  file.label = "the bytes that were given";
  const std::string_view view(static_cast<const char*>(bytes), size);
  auto source = std::make_unique<MemorySource>(view, file.label);
  if (is_scorer(*source)) {
    Artefact artefact;
    artefact.merged = MergedFile{std::move(source), "", view};
    return artefact;
  }
  file.format = detect_format(view);
  check_size(file.label, file.format, size);
  file.bytes = view;
  return single(std::move(file));
}

}  // namespace pykd::internal
