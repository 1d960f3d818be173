"""Exported losses that lie in build/vectors are made again where something that they are made of has changed."""

import inspect
import sys
from pathlib import Path

import pytest

import pykd
from pykd.definition import registry
from pykd.export import tracing
from tests import conftest, make_vectors
from tests.conftest import subjects
from tests.sources import used_by

SUBJECTS = subjects()


def made_again(changed):
    """Names of the subjects whose files are made again after a comment was added to this file."""
    changed = Path(changed).resolve()

    def read(path):
        return path.read_bytes() + (b"# a comment\n" if path.resolve() == changed else b"")

    return {s.name for s in SUBJECTS if make_vectors.stamp(s, read) != make_vectors.stamp(s)}


def with_a_loss(*classes):
    """Names of the subjects that have one of these losses."""
    return {
        subject.name
        for subject in SUBJECTS
        if any(isinstance(part.loss, classes) for term in subject.composition.named_terms for part in term.parts)
    }


@pytest.mark.parametrize("cls", [pykd.MKMMD, pykd.FeatureL1])
def test_a_change_of_a_loss_makes_its_own_files_again(cls):
    found = made_again(inspect.getsourcefile(cls))
    assert found == with_a_loss(cls)
    assert 0 < len(found) < len(SUBJECTS)


def test_a_change_of_a_formula_in_a_file_that_is_no_loss_reaches_those_that_use_it():
    shared = Path(inspect.getsourcefile(pykd.FeatureL1)).with_name("_shared.py")
    module = pykd.FeatureL1.__module__.rpartition(".")[0] + "._shared"
    users = [cls for cls in registry.registered().values() if module in used_by([cls.__module__])]
    assert pykd.FeatureL2 in users and pykd.SoftTarget not in users
    assert made_again(shared) == with_a_loss(*users)


@pytest.mark.parametrize(
    "module", [tracing, make_vectors, sys.modules[pykd.compose.__module__]], ids=lambda m: m.__name__
)
def test_a_change_of_what_makes_every_file_makes_all_of_them_again(module):
    assert made_again(module.__file__) == {subject.name for subject in SUBJECTS}


def test_a_change_of_what_makes_no_file_makes_none_again():
    assert made_again(conftest.__file__) == set()


def test_a_subject_with_other_settings_is_made_again():
    first, other = (
        conftest.Subject("one name", pykd.compose({"soft": (pykd.SoftTarget(temperature=t), 1.0)}), {}, ())
        for t in (1.0, 2.0)
    )
    assert make_vectors.stamp(first) != make_vectors.stamp(other)


def test_imports_are_found_through_modules_and_inside_functions(tmp_path, monkeypatch):
    (tmp_path / "begins.py").write_text(
        "from typing import TYPE_CHECKING\nimport pykd.definition.ops\nif TYPE_CHECKING:\n    import pykd.demo\n"
        "def f():\n    from pykd.definition import checks\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert {"begins", "pykd.definition.ops", "pykd.definition.checks"} <= used_by(["begins"]).keys()
    assert "pykd.demo" not in used_by(["begins"])
