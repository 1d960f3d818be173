"""The public headers in the hands of strict compilers: no warning, in every language standard that they promise."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
INCLUDE = ROOT / "cpp" / "include"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]
OURS_IN_CPP = [*WARNINGS, "-Wold-style-cast"]

C = """
#include <pykd/kernels.h>
#include <pykd/pykd.h>
int use(void);
int use(void) {
  float x = 1;
  pykd_load_options options = PYKD_LOAD_OPTIONS_INIT;
  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  pykd_hooks hooks = PYKD_HOOKS_INIT;
  pykd_tensor_info tensor = PYKD_TENSOR_INFO_INIT;
  pykd_parameter_info parameter = PYKD_PARAMETER_INFO_INIT;
  pykd_tensor view = {"x", NULL, PYKD_FLOAT32, 0, NULL, NULL, PYKD_CPU, 0, NULL};
  view.data = &x;
  options.engine = "onnxruntime";
  return (int)(host.struct_size + hooks.struct_size + tensor.struct_size + parameter.struct_size) +
         (options.abi_version == pykd_abi_version() && (size_t)PYKD_KEPT_FROM > 0 && view.rank == 0);
}
"""

CPP = """
#include <pykd/kernels.hpp>
#include <pykd/pykd.hpp>
#include <array>
struct Dlpack {
  void* data;
  struct { int device_type, device_id; } device;
  int ndim;
  struct { unsigned char code, bits; unsigned short lanes; } dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
double use(const Dlpack& tensor);
double use(const Dlpack& tensor) {
  const pykd::Loss loss = pykd::Loss::load("recipe", pykd::LoadOptions());
  const std::vector<float> student(6);
  std::array<double, 2> out{};
  const pykd::Tensors inputs = {{"a", pykd::view(student, {2, 3})}, {"b", pykd::from_dlpack(tensor)}};
  loss.run(inputs, {{"loss", pykd::view(out, {2})}}, {{"t", 2.0}});
  const pykd::Result result = loss.value_and_gradient(inputs);
  pykd::KernelCall call(pykd::kernel("soft_target"));
  call.attribute("beta", 0.5);
  call.input("x", inputs.at("a").c("x"));
  call.run(PYKD_KERNEL_HOST_INIT);
  return result.value("loss") + static_cast<double>(*result.data<float>("a")) +
         static_cast<double>(*result.data<std::int64_t>("b")) + static_cast<double>(PYKD_KEPT_FROM + call.shape_of("x").size());
}
"""

TORCH = """
#include <pykd/torch.hpp>
#include <pykd/torch_kernels.hpp>
double use(const at::Tensor& tensor);
double use(const at::Tensor& tensor) {
  const pykd::TorchLoss loss = pykd::TorchLoss::load("recipe");
  at::Tensor value = loss({{"student_logits", tensor}}, {{"t", 2.0}}) + pykd::fused_loss("soft_target", {{"a", tensor}});
  value.backward();
  return loss.terms({}).at("loss").item<double>() + loss.value_and_gradient({}).at("loss").item<double>();
}
"""


def compilers(language: str) -> list[str]:
    names = {"c": ("gcc", "clang", "clang-14"), "c++": ("g++", "clang++", "clang++-14")}[language]
    found = {os.path.realpath(path): name for name in names if (path := shutil.which(name))}
    return sorted(found.values())


def compile_(text: str, compiler: str, *options: str) -> str:
    """What the compiler says about it."""
    language = "c++" if "++" in compiler else "c"
    command = [compiler, "-x", language, "-fsyntax-only", f"-I{INCLUDE}", *options, "-"]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    return done.stderr if done.returncode or done.stderr else ""


@pytest.mark.parametrize("standard", ["c89", "c99", "c11", "c17", "c2x"])
@pytest.mark.parametrize("compiler", compilers("c"))
def test_the_headers_of_c(compiler, standard):
    assert compile_(C, compiler, f"-std={standard}", "-pedantic-errors", *WARNINGS) == ""


@pytest.mark.parametrize("standard", ["c++17", "c++20", "c++2b"])
@pytest.mark.parametrize("compiler", compilers("c++"))
@pytest.mark.parametrize("text", [C, CPP], ids=["c", "c++"])
def test_the_headers_of_cpp(compiler, standard, text):
    warnings = WARNINGS if text == C else OURS_IN_CPP  # the text in C casts as C does
    assert compile_(text, compiler, f"-std={standard}", "-pedantic-errors", *warnings) == ""


@pytest.mark.slow
@pytest.mark.parametrize("compiler", compilers("c++"))
def test_the_headers_for_libtorch(compiler):
    folder = Path(torch.__file__).parent / "include"
    places = [f"-isystem{folder}", f"-isystem{folder / 'torch/csrc/api/include'}"]
    assert compile_(TORCH, compiler, "-std=c++20", *places, *OURS_IN_CPP) == ""


def test_every_header_stands_alone():
    for header in sorted((INCLUDE / "pykd").iterdir()):
        if header.name.startswith("torch"):
            continue
        compiler = "g++" if header.suffix == ".hpp" else "gcc"
        assert compile_(f"#include <pykd/{header.name}>\n", compiler, *WARNINGS) == ""


def test_old_style_casts_in_the_macros():
    text = "#include <pykd/pykd.hpp>\nstd::size_t bytes = PYKD_KEPT_FROM;\n"
    for compiler in compilers("c++"):
        assert compile_(text, compiler, "-std=c++17", *OURS_IN_CPP) == ""


def test_without_exceptions_the_header_says_what_to_do():
    for compiler in compilers("c++"):
        assert "use pykd/pykd.h" in compile_(CPP, compiler, "-std=c++17", "-fno-exceptions")
        assert compile_("#include <pykd/pykd.h>\n", compiler, "-std=c++17", "-fno-exceptions", *WARNINGS) == ""


def refused(statement: str) -> str:
    text = f"#include <pykd/pykd.hpp>\n#include <string>\nvoid use() {{ {statement} }}\n"
    said = compile_(text, compilers("c++")[0], "-std=c++17")
    assert said != "", f"{statement} compiles"
    return said


@pytest.mark.parametrize("type_", ["long double", "char", "long long", "char16_t"])
def test_element_types_that_pykd_does_not_know(type_):
    assert "float, double, bool and the integers of <cstdint>" in refused(f"{type_} x[2] = {{}}; pykd::view(x, {{2}});")
    assert "float, double, bool and the integers of <cstdint>" in refused(f'pykd::Result().data<{type_}>("loss");')


def test_a_view_of_a_temporary():
    assert "deleted" in refused("pykd::view(std::vector<float>(2), {2});")
    assert "deleted" in refused("auto make = []() -> const std::vector<float> { return {}; }; pykd::view(make(), {0});")


def thrown_in(header: Path) -> list[str]:
    """What the header throws, each as the text of its string literals."""
    texts = []
    for after in header.read_text().split("throw Error(")[1:]:
        literals = re.findall(r'"((?:[^"\\\n]|\\.)*)"', after.split(");\n", 1)[0])
        texts.append("".join(literals))
    return texts


@pytest.mark.parametrize("header", sorted((INCLUDE / "pykd").glob("*.hpp")), ids=lambda path: path.name)
def test_errors_have_three_parts(header):
    for text in thrown_in(header):
        if text:  # else the library's own
            parts = (text.count("expected "), text.count("got "), text.count("; "))
            assert parts[0] >= 1 and parts[0] == parts[1] <= parts[2], text
