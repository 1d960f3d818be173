"""The list of mutants is of the sources as they are: `make mutants`, which takes long, finds them there."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script():
    """scripts/mutants as a module."""
    loader = importlib.machinery.SourceFileLoader("pykd_mutants", str(ROOT / "scripts" / "mutants"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look there
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = written
    return module


MUTANTS = script().read()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_changes_one_line_that_is_there(mutant):
    sources = [ROOT / "cpp"] if mutant.is_compiled else [ROOT / "pykd", ROOT / "export"]
    assert mutant.problem(*sources) == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_that_kill_it_are_there(mutant):
    for test in mutant.tests:
        file, *inside = test.split("::")
        if mutant.is_compiled:
            suite, name = inside[0].split(".")
            text = (ROOT / "cpp" / "tests" / f"{file.removeprefix('pykd_')}.cpp").read_text()
            assert f"TEST({suite}, {name})" in text, test
            continue
        names = [name.split("[")[0] for name in inside]
        text = (ROOT / file).read_text()
        assert all(f"def {name}(" in text or f"class {name}" in text for name in names), test


def test_an_entry_that_no_longer_applies_says_so():
    mutant = script().Mutant("x", "ops.py", "def upcast(", "def upcast_(", ())
    assert mutant.problem(ROOT / "pykd") == ""
    for entry, words in (
        (dict(file="none.py"), "expected one file none.py, found 0"),
        (dict(old="no such text"), "found it 0 times"),
        (dict(new="def upcast("), "changes nothing"),
    ):
        changed = script().Mutant(**{**vars(mutant), **entry})
        assert words in changed.problem(ROOT / "pykd")
