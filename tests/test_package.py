"""The package as its users meet it: a C, C++ and LibTorch project outside this tree, and machines without pykd."""

import json
import os
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
    if torch_too:
        options.append(f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    run(["cmake", "-S", HERE / "consumer", "-B", folder, "-G", "Ninja", *options])
    run(["cmake", "--build", folder])
    return folder


def run(command, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


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


@pytest.mark.slow
def test_a_project_outside_the_tree_finds_the_installed_package(artefact, eager, tmp_path):
    programs = build(config.cmake_dir(), tmp_path, torch_too=True)
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
    assert config.main(["--cflags", "--libs"]) == 0
    assert " -lpykd " in capsys.readouterr().out


def test_pykd_config_and_pykd_load_need_no_torch():
    check = "import sys, pykd.config, pykd.runtime; sys.exit('torch' in sys.modules)"
    run([sys.executable, "-c", check])
