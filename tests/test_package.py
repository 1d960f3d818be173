"""The package as its users meet it: a C, C++ and LibTorch project outside this tree, and machines without pykd."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import pykd
from pykd import config

HERE = Path(__file__).parent
BUILD_TREE = HERE.parent / "build" / "python"

STUDENT = np.array([[1, 2, 3], [3, 2, 1]], np.float32)
TEACHER = np.array([[0, 2, 4], [4, 2, 0]], np.float32)
# float32 on both sides, in different orders of summation.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    return pykd.export(
        pykd.SoftTarget(temperature=2.0), tmp_path_factory.mktemp("artefact"), progress=lambda line: None
    )


@pytest.fixture(scope="module")
def eager():
    """Value and gradient by the module itself: seven numbers."""
    student = torch.tensor(STUDENT, requires_grad=True)
    value = pykd.SoftTarget(temperature=2.0)(student, torch.tensor(TEACHER))
    value.backward()
    return np.array([value.item(), *student.grad.flatten().tolist()])


def build(pykd_dir, folder, torch_too=False):
    """Builds tests/consumer against one pykd, in a folder outside the tree."""
    options = [f"-Dpykd_DIR={pykd_dir}", f"-DCONSUMER_TORCH={'ON' if torch_too else 'OFF'}"]
    if torch_too:  # the one beside pykd is found, and not by asking a Python
        options.append("-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON")
    return cmake(HERE / "consumer", folder, *options)


def cmake(source, folder, *options):
    """Configures and builds a project."""
    run(["cmake", "-S", source, "-B", folder, "-G", "Ninja", *options])
    run(["cmake", "--build", folder])
    return folder


def run_for_both(command, **environment):
    """What it prints to stdout, and to stderr. A variable that is None is not set."""
    variables = {**os.environ, **environment}
    done = subprocess.run(
        [str(word) for word in command],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def run(command, **environment):
    return run_for_both(command, **environment)[0]


def bare_python():
    """A Python with NumPy and onnxruntime alone, in the versions that are here; made once, so that later runs fetch nothing."""
    wheels = [f"{name}=={version(name)}" for name in ("numpy", "onnxruntime")]
    folder = HERE.parent / "build" / "-".join(["bare", sys.implementation.cache_tag, *wheels]).replace("==", "-")
    if not (folder / "complete").exists():
        run([sys.executable, "-m", "venv", "--clear", folder])
        run([folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", *wheels])
        (folder / "complete").touch()
    return folder / "bin" / "python"


def numbers(program, *arguments):
    library = str(config.onnxruntime_library())
    return np.array(run([program, *arguments], PYKD_ONNXRUNTIME_LIBRARY=library).split(), float)


def check_fast_route(program, artefact, eager):
    """Nothing is set and nothing is named: ONNX Runtime's wheel beside pykd is found, and the kernels run."""
    printed, said = run_for_both([program, artefact], PYKD_ONNXRUNTIME_LIBRARY=None, LD_LIBRARY_PATH=None)
    np.testing.assert_allclose(np.array(printed.split(), float), eager, **CLOSE)
    assert f"onnxruntime {version('onnxruntime')}, kernels: soft_target_float32\npassed over: \n" in said


@pytest.mark.slow
def test_a_project_outside_the_tree_finds_the_installed_package(artefact, eager, tmp_path):
    programs = build(config.cmake_dir(), tmp_path, torch_too=True)
    check_fast_route(programs / "from_cpp", artefact, eager)
    np.testing.assert_allclose(numbers(programs / "from_c", artefact), eager, **CLOSE)
    np.testing.assert_allclose(numbers(programs / "from_cpp", artefact), eager, **CLOSE)
    np.testing.assert_allclose(numbers(programs / "from_cpp", artefact, "torchscript"), eager, **CLOSE)
    for engine in ("onnxruntime", "torchscript"):
        np.testing.assert_allclose(numbers(programs / "from_libtorch", artefact, engine), eager, **CLOSE)


@pytest.mark.slow
@pytest.mark.skipif(not (BUILD_TREE / "pykdConfig.cmake").exists(), reason="pykd was not built by `make` in this tree")
def test_a_project_outside_the_tree_finds_the_build_folder(artefact, eager, tmp_path):
    programs = build(BUILD_TREE, tmp_path)
    np.testing.assert_allclose(numbers(programs / "from_c", artefact), eager, **CLOSE)
    np.testing.assert_allclose(numbers(programs / "from_cpp", artefact), eager, **CLOSE)


@pytest.mark.slow
@pytest.mark.skipif(not (BUILD_TREE / "pykdConfig.cmake").exists(), reason="pykd was not built by `make` in this tree")
def test_the_installed_package_can_be_moved(artefact, eager, tmp_path):
    prefix = tmp_path / "before"
    run(["cmake", "--install", BUILD_TREE, "--prefix", prefix])
    for file in sorted((prefix / "lib" / "cmake").rglob("*.cmake")):
        for place in (tmp_path, BUILD_TREE, HERE.parent):
            assert str(place) not in file.read_text(), f"{file.name} names {place}"
    moved = prefix.rename(tmp_path / "after")
    programs = build(moved / "lib" / "cmake" / "pykd", tmp_path / "build")
    np.testing.assert_allclose(numbers(programs / "from_cpp", artefact), eager, **CLOSE)


@pytest.mark.parametrize("way", ["add_subdirectory", "FetchContent"])
def test_a_project_that_takes_the_sources_in_stays_as_it_is(tmp_path, way):
    """Configured alone: the build type stays unset, nothing is looked for that was not asked for, nothing is installed."""
    options = [f"-DHOST_PYKD={HERE.parent}", f"-DHOST_FETCH={'ON' if way == 'FetchContent' else 'OFF'}"]
    run(["cmake", "-S", HERE / "subproject", "-B", tmp_path, "-G", "Ninja", *options], CMAKE_BUILD_TYPE=None)
    cache = (tmp_path / "CMakeCache.txt").read_text()
    for line in (
        "CMAKE_BUILD_TYPE:STRING=", "PYKD_INSTALL:BOOL=OFF", "PYKD_TORCH:BOOL=OFF", "PYKD_CUDA:STRING=OFF",
        "PYKD_STATIC:BOOL=OFF",
    ):  # fmt: skip
        assert f"{line}\n" in cache
    for word in ("CMAKE_CUDA_COMPILER", "PYKD_NVCC", "LibTorch_"):
        assert word not in cache
    assert not (tmp_path / "compile_commands.json").exists()
    scripts = "".join(path.read_text() for path in tmp_path.rglob("cmake_install.cmake"))
    assert "libpykd" not in scripts and "pykd.h" not in scripts


@pytest.mark.slow
def test_a_static_library_inside_a_project_and_installed_with_it(artefact, eager, tmp_path):
    folder, prefix = tmp_path / "host", tmp_path / "prefix"
    options = [f"-DHOST_PYKD={HERE.parent}", "-DBUILD_SHARED_LIBS=OFF", "-DPYKD_INSTALL=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    cmake(HERE / "subproject", folder, *options, "-DCMAKE_CXX_FLAGS_DEBUG=-O0", f"-DCMAKE_INSTALL_PREFIX={prefix}")
    np.testing.assert_allclose(numbers(folder / "host", artefact), eager, **CLOSE)
    assert not exports(folder / "host") & {"pykd_load", "pykd_run"}
    assert "libpykd" not in run(["ldd", folder / "host"])

    run(["cmake", "--install", folder])
    moved = prefix.rename(tmp_path / "moved")
    assert (moved / "lib" / "libpykd.a").is_file()
    programs = build(moved / "lib" / "cmake" / "pykd", tmp_path / "build")
    np.testing.assert_allclose(numbers(programs / "from_c", artefact), eager, **CLOSE)
    np.testing.assert_allclose(numbers(programs / "from_cpp", artefact), eager, **CLOSE)
    program = with_pkg_config(moved / "lib" / "pkgconfig", tmp_path / "from_pkg_config")
    np.testing.assert_allclose(numbers(program, artefact), eager, **CLOSE)


def with_pkg_config(folder, program):
    """The C program, built with what pkg-config says."""
    flags = run(["pkg-config", "--cflags", "--libs", "pykd"], PKG_CONFIG_PATH=str(folder)).split()
    run(["cc", HERE / "consumer" / "main.c", "-o", program, *flags])
    return program


def test_pkg_config_finds_the_installed_package(artefact, eager, tmp_path):
    program = with_pkg_config(config.pkgconfig_dir(), tmp_path / "from_c")
    printed = run([program, artefact], LD_LIBRARY_PATH=str(config.libdir()), PYKD_ONNXRUNTIME_LIBRARY=None)
    np.testing.assert_allclose(np.array(printed.split(), float), eager, **CLOSE)
    said = run(["pkg-config", "--modversion", "pykd"], PKG_CONFIG_PATH=str(config.pkgconfig_dir()))
    assert said.strip() == pykd.__version__


def test_the_flags_of_config_are_enough(artefact, eager, tmp_path, capsys):
    assert config.main(["--cflags", "--libs"]) == 0
    flags = capsys.readouterr().out.split()
    assert "-isystem" in flags
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wold-style-cast", "-Werror"]
    run(["c++", "-std=c++17", *warnings, HERE / "consumer" / "main.cpp", "-o", tmp_path / "from_cpp", *flags])
    check_fast_route(tmp_path / "from_cpp", artefact, eager)


def exports(library):
    return {line.split()[-1] for line in run(["nm", "-D", "--defined-only", library]).splitlines()}


@pytest.mark.parametrize("missing", [(), ("Eigen3",), ("LibTorch",), ("Eigen3", "LibTorch")], ids="+".join)
def test_the_examples_configure_without_what_some_of_them_need(missing, tmp_path):
    left_out = {{"Eigen3": "train_eigen", "LibTorch": "train_libtorch"}[name] for name in missing}
    disabled = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in missing]
    examples = HERE.parent / "cpp" / "examples"
    said = run(["cmake", "-S", examples, "-B", tmp_path, f"-Dpykd_DIR={config.cmake_dir()}", *disabled])
    assert set(re.findall(r"(\w+) is left out: it needs ", said)) == left_out
    targets = set(re.findall(r"\w+", run(["cmake", "--build", tmp_path, "--target", "help"])))
    assert targets >= {"run_loss", "score_stream", "train_eigen", "train_libtorch"} - left_out
    assert not targets & left_out


def test_the_libraries_export_their_c_interface_alone():
    names = exports(config.library())
    assert {"pykd_load", "pykd_run", "pykd_kernel_run", "pykd_last_error", "RegisterCustomOps"} <= names
    assert {name for name in names if not name.startswith("pykd_")} == {"RegisterCustomOps"}
    assert exports(config.libdir() / "libpykd_torch.so") == {"pykd_torch_engine", "pykd_torch_interface_version"}
    assert exports(config.torch_ops_path()) == set()


def test_the_name_of_the_library_holds_the_version_of_its_interface():
    header = (config.includedir() / "pykd" / "pykd.h").read_text()
    abi = re.search(r"#define PYKD_ABI_VERSION (\d+)", header)[1]
    assert config.library().name == f"libpykd.so.{abi}"
    assert f"SONAME               {config.library().name}\n" in run(["objdump", "-p", config.library()])


@pytest.mark.slow
@pytest.mark.skipif(not (BUILD_TREE / "CMakeCache.txt").exists(), reason="pykd was not built by `make` in this tree")
@pytest.mark.parametrize("language", ["c", "cpp"])
def test_a_session_of_ones_own_runs_the_kernels(artefact, eager, tmp_path, language):
    cache = (BUILD_TREE / "CMakeCache.txt").read_text()
    headers = re.search(r"^ONNXRUNTIME_INCLUDE_DIR:PATH=(.*)$", cache, re.MULTILINE)[1]
    library, program = config.onnxruntime_library(), tmp_path / "own_session"
    compiler = ["cc", "-std=c99"] if language == "c" else ["c++", "-std=c++17"]
    source = HERE.parent / "cpp" / "examples" / f"own_session.{language}"
    run([*compiler, source, "-o", program, "-isystem", headers, library, f"-Wl,-rpath,{library.parent}"])
    (tmp_path / library.name.rsplit(".", 2)[0]).symlink_to(library)  # its soname, which the wheel does not have
    found = {"LD_LIBRARY_PATH": str(tmp_path)}
    printed = run([program, artefact / "loss.grad.onnx", config.onnxruntime_ops_path()], **found)
    np.testing.assert_allclose(np.array(printed.split(), float), eager, **CLOSE)


@pytest.mark.slow
def test_plain_onnxruntime_runs_the_files(artefact, eager, tmp_path):
    python = bare_python()
    np.savez(tmp_path / "tensors.npz", student_logits=STUDENT, teacher_logits=TEACHER)
    answers = json.loads(run([python, HERE / "bare" / "run_onnx.py", artefact, tmp_path / "tensors.npz"]))

    np.testing.assert_allclose(answers["loss.onnx"]["loss"], eager[0], **CLOSE)
    np.testing.assert_allclose(answers["loss.grad.onnx"]["loss"], eager[0], **CLOSE)
    np.testing.assert_allclose(np.ravel(answers["loss.grad.onnx"]["grad_student_logits"]), eager[1:], **CLOSE)


def test_the_command_line_says_where_things_are(capsys):
    assert config.main(["--cmake-dir"]) == 0
    assert Path(capsys.readouterr().out.strip(), "pykdConfig.cmake").is_file()
    assert config.main(["--includedir"]) == 0
    assert Path(capsys.readouterr().out.strip(), "pykd", "pykd.h").is_file()
    assert config.main(["--libdir"]) == 0
    assert Path(capsys.readouterr().out.strip(), "libpykd.so").is_file()
    for option, file in (("--library", ""), ("--pkgconfig-dir", "pykd.pc")):
        assert config.main([option]) == 0
        assert Path(capsys.readouterr().out.strip(), file).is_file()
    assert config.main(["--cflags", "--libs"]) == 0
    assert " -lpykd " in capsys.readouterr().out


def test_pykd_config_and_pykd_load_need_no_torch():
    check = "import sys, pykd.config, pykd.runtime; sys.exit('torch' in sys.modules)"
    run([sys.executable, "-c", check])
