"""scripts/python-environment with a pip that only talks: what a person sees while the libraries are compiled."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PIP = """#!/bin/sh
case "$*" in
  *"import torch"*) exit 0 ;;
  *importlib*) echo torch==2.13.0 ;;
  *"install -v"*)
    echo "  Requirement already satisfied: numpy"
    echo "Collecting onnx"
    echo "  [1/2] Building CXX object cpp/error.cpp.o"
    echo "  -- Looking for something"
    {ends}
    ;;
esac
"""


def start(folder, ends):
    """A copy of the script at work in a folder where the virtual environment's Python is ``PIP``."""
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP.format(ends=ends))
    python.chmod(0o755)
    (folder / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts" / "python-environment", folder / "scripts")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return subprocess.Popen([script, ".venv", "test"], stdout=subprocess.PIPE, text=True)


def test_what_is_downloaded_and_compiled_is_shown_and_nothing_else(tmp_path):
    run = start(tmp_path, "echo '  [2/2] Linking CXX shared library libpykd.so'")
    shown = [line.strip() for line in run.communicate()[0].splitlines()]
    assert run.returncode == 0
    assert shown[-3:] == [
        "Collecting onnx",
        "[1/2] Building CXX object cpp/error.cpp.o",
        "[2/2] Linking CXX shared library libpykd.so",
    ]
    assert "Looking for something" in (tmp_path / "build" / "install.pip.log").read_text()


def test_lines_come_while_the_compiler_is_at_work(tmp_path):
    """The first one lets the second be compiled; were they kept in a buffer, both would wait."""
    with start(
        tmp_path,
        "n=0; until [ -e seen ]; do sleep 0.1; n=$((n + 1)); [ $n -lt 300 ] || exit 1; done; echo '  [2/2] Linking'",
    ) as run:
        for line in run.stdout:
            if "[1/2]" in line:
                (tmp_path / "seen").touch()
    assert run.returncode == 0


@pytest.mark.parametrize("ends", ["echo 'error: no compiler'; exit 1", "exit 2"])
def test_a_build_that_fails_shows_all_of_it(ends, tmp_path):
    run = start(tmp_path, ends)
    shown = run.communicate()[0]
    assert run.returncode != 0
    assert "-- Looking for something" in shown and ("no compiler" in shown) == ("no compiler" in ends)
