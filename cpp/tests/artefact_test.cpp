// The loader against damaged, foreign and hostile files: every one is refused with a Failure that
// says why, and none of them crashes the scanner. No engine takes part.
#include "runtime/artefact/checksum.h"
#include "runtime/artefact/files.h"
#include "runtime/artefact/onnx_scan.h"

#include <random>

#include "base/error.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace pykd::internal {
namespace {

using tests::attribute_with;
using tests::call_of;
using tests::fake_torchscript;
using tests::function;
using tests::kFloat;
using tests::node;
using tests::opset;
using tests::property;
using tests::scalar;
using tests::sealed;
using tests::TemporaryFolder;
using tests::tiny_metadata;
using tests::tiny_model;
using tests::TinyModel;
using tests::value_info;

#define EXPECT_BAD(statement, ...) EXPECT_FAILS_WITH(Failure, PYKD_BAD_ARTEFACT, statement, __VA_ARGS__)
#define EXPECT_NOT_FOUND(statement, ...) EXPECT_FAILS_WITH(Failure, PYKD_NOT_FOUND, statement, __VA_ARGS__)

ArtefactFile file_of(const std::string& bytes) {
  ArtefactFile file;
  file.label = "test.onnx";
  file.format = detect_format(bytes);
  file.bytes = bytes;
  return file;
}
Signature scan(const TinyModel& model) { return scan_onnx(file_of(model.bytes())); }

// True where the scan refuses the bytes as it should; any other exception, or a crash, is a bug.
bool is_refused(const std::string& bytes) {
  try {
    scan_onnx(file_of(bytes));
    return false;
  } catch (const Failure& failure) {
    EXPECT_EQ(failure.status(), PYKD_BAD_ARTEFACT) << failure.what();
    return true;
  }
}

// ---- Integrity ----------------------------------------------------------------------------------

TEST(Integrity, AcceptsWhatExportWrites) {
  check_integrity(file_of(sealed(tiny_model(true).bytes())));
  check_integrity(file_of(fake_torchscript(tiny_metadata(true))));
}

TEST(Integrity, TellsThreeKindsOfDamageApart) {
  const std::string good = sealed(tiny_model(true).bytes());
  EXPECT_BAD(check_integrity(file_of(good.substr(0, good.size() / 2))), "cut short", "copy it again");
  std::string damaged = good;
  damaged[damaged.size() / 2] ^= 1;
  EXPECT_BAD(check_integrity(file_of(damaged)), "checksum", "damaged", "copy it again");
  EXPECT_BAD(check_integrity(file_of(tiny_model(true).bytes())), "none", "not written by pykd.export",
             "changed afterwards");
  EXPECT_BAD(check_integrity(file_of("")), "empty");
  EXPECT_BAD(check_integrity(file_of("\x07 is no protobuf tag")), "neither", "load loss.grad.onnx");
}

TEST(Integrity, TellsThreeKindsOfDamageApartInArchives) {
  const std::string good = fake_torchscript(tiny_metadata(true));
  EXPECT_BAD(check_integrity(file_of(good.substr(0, good.size() / 2))), "cut short");
  std::string damaged = good;
  damaged[damaged.size() / 2] ^= 1;
  EXPECT_BAD(check_integrity(file_of(damaged)), "damaged");
  EXPECT_BAD(check_integrity(file_of(good + "x")), "not written by pykd.export");
}

TEST(Integrity, RefusesEveryTruncation) {
  for (const std::string& good : {sealed(tiny_model(true).bytes()), fake_torchscript(tiny_metadata(true))}) {
    for (std::size_t size = 0; size < good.size(); ++size) {
      EXPECT_THROW(check_integrity(file_of(good.substr(0, size))), Failure) << size;
    }
  }
}

TEST(Integrity, RefusesEveryFlippedBit) {
  for (const std::string& good : {sealed(tiny_model(true).bytes()), fake_torchscript(tiny_metadata(true))}) {
    for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
      std::string damaged = good;
      damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
      EXPECT_THROW(check_integrity(file_of(damaged)), Failure) << bit;
    }
  }
}

// ---- The scanner on bytes that nothing vouches for ----------------------------------------------

TEST(Scan, AcceptsWhatExportWrites) {
  EXPECT_EQ(scan(tiny_model(true)).outputs.size(), 4u);
  EXPECT_EQ(scan(tiny_model(false)).kind, ArtefactKind::kValue);
}

TEST(Scan, SurvivesEveryTruncation) {
  const std::string good = tiny_model(true).bytes();
  for (std::size_t size = 0; size < good.size(); ++size) {
    EXPECT_TRUE(is_refused(good.substr(0, size))) << size;
  }
}

TEST(Scan, SurvivesEveryFlippedBit) {
  const std::string good = tiny_model(true).bytes();
  int refused = 0;
  for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string damaged = good;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
    refused += is_refused(damaged);
  }
  EXPECT_GT(refused, 0);
}

TEST(Scan, SurvivesRandomDamage) {
  const std::string good = tiny_model(true).bytes();
  std::mt19937 random(7);
  for (int round = 0; round < 20000; ++round) {
    std::string damaged = good;
    for (std::size_t change = 1 + random() % 6; change > 0; --change) {
      const std::size_t at = random() % damaged.size();
      switch (random() % 3) {
        case 0:
          damaged[at] = static_cast<char>(random());
          break;
        case 1:
          damaged.erase(at, 1 + random() % 8);
          break;
        default:
          damaged.insert(at, damaged.substr(random() % damaged.size(), random() % 16));
      }
      if (damaged.empty()) damaged = "x";
    }
    is_refused(damaged);
  }
}

TEST(Scan, SurvivesNoise) {
  std::mt19937 random(11);
  for (int round = 0; round < 20000; ++round) {
    std::string noise(random() % 200, '\0');
    for (char& byte : noise) byte = static_cast<char>(random());
    EXPECT_TRUE(is_refused(noise));
  }
}

TEST(Scan, RefusesFilesThatAreTooLarge) {
  EXPECT_BAD(scan_onnx(file_of(std::string(kMaxOnnxSize + 1, '\0'))), "at most 16 MiB");
  const std::string large(kMaxOnnxSize + 1, '\0');
  EXPECT_BAD(wrap_artefact(large.data(), large.size()), "at most 16 MiB");
}

// ---- Things that ONNX allows and pykd does not --------------------------------------------------

std::string external_tensor() {
  std::string bytes = scalar("weight", 1.0f);
  tests::pbf_writer(bytes).add_message(13, property("location", "/etc/passwd"));
  return bytes;
}

TEST(Scan, RefusesExternalData) {
  TinyModel model = tiny_model(true);
  model.initializers[0] = external_tensor();
  EXPECT_BAD(scan(model), "external data");

  model = tiny_model(true);
  tests::pbf_writer(model.initializers[0]).add_enum(14, 1);
  EXPECT_BAD(scan(model), "external data");

  model = tiny_model(true);
  model.nodes.push_back(node("Constant", {}, "c", {attribute_with(5, external_tensor())}));
  EXPECT_BAD(scan(model), "external data");

  model = tiny_model(true);
  model.nodes.push_back(node("Constant", {}, "c", {attribute_with(10, external_tensor())}));
  EXPECT_BAD(scan(model), "attributes that are a number, a string, a list of numbers or a tensor");

  model = tiny_model(true);
  model.functions = {function("pykd", "f", {node("Constant", {}, "y", {attribute_with(5, external_tensor())})})};
  EXPECT_BAD(scan(model), "external data");
}

TEST(Scan, RefusesForeignOperators) {
  TinyModel model = tiny_model(true);
  model.nodes.push_back(node("Inverse", {"d"}, "x", {}, "com.microsoft"));
  EXPECT_BAD(scan(model), "com.microsoft");

  model = tiny_model(true);
  model.opsets.push_back(opset("ai.onnx.ml", 3));
  EXPECT_BAD(scan(model), "ai.onnx.ml");

  model = tiny_model(true);
  model.functions = {function("pykd", "f", {node("Inverse", {"x"}, "y", {}, "evil")})};
  EXPECT_BAD(scan(model), "evil");

  model = tiny_model(true);
  model.functions = {function("", "Mul", {node("Add", {"x", "x"}, "y")})};
  EXPECT_BAD(scan(model), "functions of domain");
}

TEST(Scan, RefusesADomainThatIsWrittenTwice) {
  TinyModel model = tiny_model(true);
  std::string two = node("Inverse", {"d"}, "x", {}, "pykd");
  tests::pbf_writer(two).add_string(7, "com.microsoft");
  model.nodes.push_back(two);
  EXPECT_BAD(scan(model), "domain of a node", "twice");
}

TEST(Scan, RefusesSubgraphsAndSparseTensors) {
  TinyModel model = tiny_model(true);
  model.nodes.push_back(node("If", {"d"}, "x", {attribute_with(6, tiny_model(true).graph())}));
  EXPECT_BAD(scan(model), "subgraphs");

  model = tiny_model(true);
  model.nodes.push_back(node("If", {"d"}, "x", {attribute_with(11, "")}));
  EXPECT_BAD(scan(model), "subgraphs");

  model = tiny_model(true);
  model.nodes.push_back(node("Constant", {}, "x", {attribute_with(22, "")}));
  EXPECT_BAD(scan(model), "sparse");

  model = tiny_model(true);
  tests::pbf_writer(model.graph_extra).add_message(15, std::string());
  EXPECT_BAD(scan(model), "sparse");
}

TEST(Scan, RefusesASecondGraph) {
  TinyModel model = tiny_model(true);
  tests::pbf_writer(model.model_extra).add_message(7, tiny_model(false).graph());
  EXPECT_BAD(scan(model), "one graph");
}

TEST(Scan, RefusesTrainingInformation) {
  TinyModel model = tiny_model(true);
  tests::pbf_writer(model.model_extra).add_message(20, std::string());
  EXPECT_BAD(scan(model), "training information");
}

TEST(Scan, AcceptsFunctionsOfPykd) {
  TinyModel model = tiny_model(true);
  model.opsets.push_back(opset("pykd", 1));
  model.functions = {function("pykd", "f", {node("Mul", {"x", "x"}, "y")}),
                     function("pykd", "g", {node("f", {"x"}, "y", {}, "pykd")})};
  model.nodes[1] = node("g", {"d"}, "dd", {}, "pykd");
  scan(model);
}

TEST(Scan, FindsFunctionsByName) {
  TinyModel model = tiny_model(true);
  model.opsets.push_back(opset("pykd", 1));
  model.functions = {function("pykd", "f", {node("Mul", {"x", "x"}, "y")}),
                     function("pykd", "g", {node("f", {"x"}, "y", {}, "pykd")})};
  model.nodes[1] = node("f", {"d"}, "dd", {}, "pykd");
  model.nodes.push_back(node("g", {"d"}, "x", {}, "pykd"));
  scan(model);
  model.functions.push_back(function("pykd", "f", {node("Sub", {"x", "x"}, "y")}));
  EXPECT_BAD(scan(model), "every function once", "\"f\" twice");
}

// Which of several bodies runs is a question that engines answer differently.
TEST(Scan, RefusesOverloads) {
  TinyModel model = tiny_model(true);
  model.opsets.push_back(opset("pykd", 1));
  model.functions = {function("pykd", "f", {node("Mul", {"x", "x"}, "y")}, "a")};
  EXPECT_BAD(scan(model), "functions without overloads", "\"a\"");
  model.functions = {function("pykd", "f", {node("Mul", {"x", "x"}, "y")})};
  model.nodes[1] = call_of("f", "a", {"d"}, "dd");
  EXPECT_BAD(scan(model), "operators without overloads", "\"a\"");
}

TEST(Scan, RefusesCallsWithoutAFunction) {
  TinyModel model = tiny_model(true);
  model.nodes[1] = node("soft_target_float32", {"d"}, "dd", {}, "pykd");
  EXPECT_BAD(scan(model), "a function for every operator of domain \"pykd\"", "none for \"soft_target_float32\"");
  model.functions = {function("pykd", "soft_target_float32", {node("g", {"x"}, "y", {}, "pykd")})};
  EXPECT_BAD(scan(model), "none for \"g\"");
}

// Engines look functions up by "name:overload".
TEST(Scan, RefusesColonsInNamesOfFunctions) {
  TinyModel model = tiny_model(true);
  for (const char* name : {"f:a", "", "f a", "f.a"}) {
    model.functions = {function("pykd", name, {node("Mul", {"x", "x"}, "y")})};
    EXPECT_BAD(scan(model), "letters, digits and underscores in names of functions");
  }
}

TEST(Scan, TellsWhichOpsWouldRun) {
  TinyModel model = tiny_model(true);
  model.opsets.push_back(opset("pykd", 1));
  model.functions = {function("pykd", "inner", {node("Mul", {"x", "x"}, "y")}),
                     function("pykd", "outer", {node("inner", {"x"}, "y", {}, "pykd")}),
                     function("pykd", "alone", {node("inner", {"x"}, "y", {}, "pykd")})};
  model.nodes[1] = node("outer", {"d"}, "dd", {}, "pykd");
  PykdNodes nodes;
  scan_onnx(file_of(model.bytes()), &nodes);
  using Names = std::set<std::string>;
  EXPECT_EQ(nodes.in_graph, Names{"outer"});
  EXPECT_EQ(nodes.that_run({"outer", "inner", "alone"}), Names{"outer"});
  EXPECT_EQ(nodes.that_run({"inner", "alone"}), Names{"inner"});
  EXPECT_EQ(nodes.that_run({"alone"}), Names{});
}

TEST(Scan, RefusesFunctionsThatNeverEnd) {
  TinyModel model = tiny_model(true);
  model.functions = {function("pykd", "f", {node("f", {"x"}, "y", {}, "pykd")})};
  EXPECT_BAD(scan(model), "earlier ones alone");
  model.functions = {function("pykd", "f", {node("g", {"x"}, "y", {}, "pykd")}),
                     function("pykd", "g", {node("f", {"x"}, "y", {}, "pykd")})};
  EXPECT_BAD(scan(model), "earlier ones alone");
}

TEST(Scan, RefusesFunctionsThatExplode) {
  TinyModel model = tiny_model(true);
  model.functions = {function("pykd", "f0", {node("Mul", {"x", "x"}, "y")})};
  for (int level = 1; level < 30; ++level) {
    const std::string below = "f" + std::to_string(level - 1);
    model.functions.push_back(function("pykd", "f" + std::to_string(level),
                                       {node(below, {"x"}, "a", {}, "pykd"), node(below, {"a"}, "y", {}, "pykd")}));
  }
  EXPECT_BAD(scan(model), "at most 60000 nodes with functions expanded");
}

TEST(Scan, ComparesTheGraphWithItsMetadata) {
  TinyModel model = tiny_model(true);
  model.metadata = nullptr;
  EXPECT_BAD(scan(model), "metadata entry");

  model = tiny_model(true);
  tests::pbf_writer(model.model_extra).add_message(14, property("pykd", tiny_metadata(false).dump()));
  EXPECT_BAD(scan(model), "metadata \"pykd\" once");

  model = tiny_model(true);
  model.metadata["kind"] = "torchscript";
  EXPECT_BAD(scan(model), "kind");

  model = tiny_model(true);
  model.inputs[1] = value_info("teacher", kFloat, {"batch", "classes"});
  EXPECT_BAD(scan(model), "teacher_logits", "none of that name");

  model = tiny_model(true);
  model.inputs[1] = value_info("teacher_logits", tests::kInt64, {"batch", "classes"});
  EXPECT_BAD(scan(model), "teacher_logits of float32 and rank 2", "ONNX type 7");

  model = tiny_model(true);
  model.inputs[1] = value_info("teacher_logits", kFloat, {"batch"});
  EXPECT_BAD(scan(model), "teacher_logits of float32 and rank 2", "rank 1");

  model = tiny_model(true);
  model.inputs.push_back(value_info("more", kFloat, {}));
  EXPECT_BAD(scan(model), "4 inputs", "5");

  model = tiny_model(true);
  model.initializers.push_back(scalar("teacher_logits", 0.0f));
  EXPECT_BAD(scan(model), "no default for the input teacher_logits");

  model = tiny_model(true);
  model.initializers.erase(model.initializers.begin());
  EXPECT_BAD(scan(model), "a default for the parameter weight");

  model = tiny_model(true);
  model.outputs.pop_back();
  EXPECT_BAD(scan(model), "4 outputs", "3");

  model = tiny_model(true);
  model.outputs[1] = value_info("loss", kFloat, {});
  EXPECT_BAD(scan(model), "output");
}

// Engines are given the parameters that differ from the metadata's default alone, so the graph's is the same.
TEST(Scan, TheDefaultsOfTheGraphAreThoseOfTheMetadata) {
  TinyModel model = tiny_model(false);
  model.metadata["parameters"][0]["default"] = 2.0;
  EXPECT_BAD(scan(model), "the default 2 for the parameter weight, as the metadata says", "got 1.5");
  model = tiny_model(false);
  model.initializers[0] = scalar("weight", 2.0f);
  EXPECT_BAD(scan(model), "the default 1.5 for the parameter weight", "got 2");
  // Rounded to the file's dtype they are equal: 0.3 is no float32.
  model.metadata["parameters"][0]["default"] = 0.3;
  model.initializers[0] = scalar("weight", 0.3f);
  EXPECT_NO_THROW(scan(model));
  model.initializers[0] = scalar("weight", std::nextafter(0.3f, 1.0f));
  EXPECT_BAD(scan(model), "the default 0.300000012 for the parameter weight");
  // No number, and two of one name.
  std::string two;
  protozero::pbf_writer(two).add_int64(1, 2);
  protozero::pbf_writer(two).add_int32(2, kFloat);
  protozero::pbf_writer(two).add_string(8, "weight");
  protozero::pbf_writer(two).add_bytes(9, std::string(8, '\0'));
  model.initializers[0] = two;
  EXPECT_BAD(scan(model), "for the parameter weight", "a tensor that is no number of float32");
  model.initializers[0] = scalar("weight", 0.3f);
  model.initializers.push_back(scalar("weight", 0.4f));
  EXPECT_BAD(scan(model), "every initializer once", "\"weight\" twice");
}

// ---- Folders ------------------------------------------------------------------------------------

TEST(Folder, FindsItsFiles) {
  TemporaryFolder folder;
  tests::write_tiny_folder(folder);
  const Artefact artefact = read_artefact(folder.path());
  EXPECT_TRUE(artefact.value && artefact.gradient && !artefact.torchscript);
  EXPECT_TRUE(read_artefact(folder.path("loss.grad.onnx")).value);
}

TEST(Folder, SaysWhatIsMissing) {
  TemporaryFolder folder;
  EXPECT_NOT_FOUND(read_artefact(folder.path("none")), "none", "check the path");
  EXPECT_NOT_FOUND(read_artefact(folder.path()), "manifest.json");
  folder.write_manifest();
  EXPECT_NOT_FOUND(read_artefact(folder.path()), "loss.onnx, loss.grad.onnx, loss.pt or score.onnx");
  EXPECT_NOT_FOUND(read_artefact("/dev/zero"), "no regular file");
}

TEST(Folder, SaysWhenAFileIsOfAnotherKind) {
  TemporaryFolder folder;
  folder.write("loss.onnx", fake_torchscript(tiny_metadata(true)));
  folder.write_manifest();
  Artefact artefact = read_artefact(folder.path());
  EXPECT_BAD(read_contents(*artefact.value), "an ONNX file", "a ZIP archive");
}

TEST(Folder, RefusesADamagedManifest) {
  TemporaryFolder folder;
  tests::write_tiny_folder(folder);
  for (const char* text : {"", "{", "[]", "{}", R"({"format": "pykd", "format_version": 1})",
                           R"({"format": "pykd", "format_version": 1, "files": []})",
                           R"({"format": "pykd", "format_version": 1, "files": {"loss.onnx": 7}})",
                           R"({"format": "pykd", "format_version": 1, "files": {"loss.onnx": {}}})",
                           R"({"format": "pykd", "format_version": 1, "files": {"loss.onnx": {"bytes": -1}}})"}) {
    folder.write("manifest.json", text);
    EXPECT_BAD(read_artefact(folder.path()), "manifest.json");
  }
  folder.write("manifest.json", R"({"format": "pykd", "format_version": 1, "files": {}})");
  EXPECT_BAD(read_artefact(folder.path()), "loss.onnx", "not in it");
}

TEST(Folder, NoticesThatItWasReplaced) {
  TemporaryFolder folder;
  tests::write_tiny_folder(folder);
  const Artefact artefact = read_artefact(folder.path());
  EXPECT_FALSE(was_replaced(artefact));
  folder.write_manifest({{"export_id", "another"}});
  EXPECT_TRUE(was_replaced(artefact));
  EXPECT_FALSE(was_replaced(read_artefact(folder.path("loss.onnx"))));
}

TEST(Hash, IsSha256) {  // the examples of FIPS 180-4, and the lengths around a block
  EXPECT_EQ(Sha256::hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256::hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sha256::hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(Sha256::hex(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  for (const auto& [length, hash] :
       {std::pair<std::size_t, const char*>{55, "d5e285683cd4efc02d021a5c62014694958901005d6f71e89e0989fac77e4072"},
        std::pair<std::size_t, const char*>{56, "04c26261370ee7541549d16dee320c723e3fd14671e66a099afe0a377c16888e"},
        std::pair<std::size_t, const char*>{63, "75220b47218278e656f2013bb8f0c455a25eaf01e86c64924e9d48d89776d6f2"},
        std::pair<std::size_t, const char*>{64, "7ce100971f64e7001e8fe5a51973ecdfe1ced42befe7ee8d5fd6219506b5393c"},
        std::pair<std::size_t, const char*>{119, "000b48d4edf0fa7bee3c6236ecd2785baa5db4eeb8bb54341b029e0d9fa5fb0c"},
        std::pair<std::size_t, const char*>{120, "13f05a0b594787f5ecd315edc96141bd3243203d1b7d4f0836f37308b276ba98"}}) {
    EXPECT_EQ(Sha256::hex(std::string(length, 'x')), hash) << length;
  }
}

}  // namespace
}  // namespace pykd::internal
