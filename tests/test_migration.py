"""docs/migration.md is run: in each row the other library's call and ours give the same value and gradient."""

import ast
import functools
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import pykd
from tests import oracles

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PIN = re.compile(r"\(`([\w-]+)==([\w.]+)`\)")
RELATION = re.compile(r"`([^`]+)`(?: within (\d+e-\d+))?")
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the value, and to the largest entry of a gradient


@dataclass
class Row:
    section: str
    there: str
    here: str
    relation: str  # the value there, by the number `here`; nothing where it is another loss
    within: float

    def __str__(self):
        return f"{self.section.split(' (')[0]}-{self.there}".replace(" ", "")


def _sections():
    parts = SECTION.split(PAGE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _cells(text):
    """The cells of a section's tables, without the lines that name the columns."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def _code(cell):
    assert re.fullmatch("`[^`]+`", cell), f"{cell} is not one piece of code"
    return cell.strip("`")


def _rows():
    rows = []
    for section, text in SECTIONS.items():
        if not section.startswith("Read"):
            for there, here, relation, *_ in _cells(text):
                number = RELATION.fullmatch(relation)
                assert number or relation == "another loss", f"{section}, {there}: {relation} is no number by `here`"
                code, within = number.groups() if number else ("", None)
                rows.append(Row(section, _code(there), _code(here), code, float(within or 0)))
    return rows


SECTIONS = _sections()
ROWS = _rows()


def _tensors(dtype):
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        names = {}
        exec(BLOCK.findall(SECTIONS["The tensors"])[0], names)
    finally:
        torch.set_default_dtype(torch.float32)
    return names


def _distribution(section):
    return PIN.search(section)[1] if PIN.search(section) else None


@functools.cache
def _setup(section):
    """What a section's first block makes; it sees no tensors."""
    names = {}
    for block in BLOCK.findall(SECTIONS[section]):
        with oracles.importable(_distribution(section)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(block, names)
    return names


def _value_and_gradients(value, students):
    gradients = torch.autograd.grad(value, students.values(), allow_unused=True)
    return {name: g for name, g in zip(students, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_both_sides_of_a_row_agree(row, dtype):
    distribution = _distribution(row.section)
    why = oracles.missing(distribution) if distribution else ""
    if why:
        assert os.environ.get("CI") != "true", why
        pytest.skip(why)
    tensors = _tensors(dtype)
    names = {**(_setup(row.section) if distribution else {}), **tensors}
    students = {name: value for name, value in tensors.items() if getattr(value, "requires_grad", False)}
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            there = eval(row.there, names)
        here = eval(row.here, names)
        if row.relation:
            here = eval(row.relation, {**names, "here": here})
    finally:
        torch.set_default_dtype(torch.float32)
    if not row.relation:
        assert abs(there.item() - here.item()) > 1e-2 * abs(there.item())
        return
    limit = max(LIMITS[dtype], row.within)
    assert there.numel() == 1 and here.numel() == 1 and here.dtype == dtype
    assert abs(there.item() - here.item()) <= limit * max(abs(there.item()), 1e-3), f"{there.item()} ≠ {here.item()}"
    theirs, ours = _value_and_gradients(there, students), _value_and_gradients(here, students)
    assert set(theirs) == set(ours)
    for name, gradient in theirs.items():
        largest = gradient.abs().max()
        assert largest > 0
        error = (gradient - ours[name]).abs().max()
        assert error <= limit * largest, f"d/d{name}: off by {error / largest} of the largest entry"


def test_versions_are_those_that_are_installed():
    pins = {section: PIN.search(section) for section in SECTIONS}
    assert {pin[1]: pin[2] for pin in pins.values() if pin} == oracles.PINS


def test_no_stand_in_stays():
    before = dict(sys.modules)
    with oracles.importable("trl"):
        import transformers  # a stand-in

        assert not transformers.is_anything_available()
        transformers = sys.modules["transformers"]
    assert sys.modules.get("transformers") is before.get("transformers") is not transformers


def test_every_library_has_rows():
    assert {_distribution(row.section) for row in ROWS} - {None} == set(oracles.LIBRARIES) == set(oracles.PINS)


def test_what_was_read_names_what_there_is():
    """Rows that cannot be run say so; what they advise is there all the same."""
    (text,) = [text for section, text in SECTIONS.items() if section.startswith("Read")]
    for _, here, *_ in _cells(text):
        loss = eval(_code(here), {"pykd": pykd})
        assert isinstance(loss, pykd.Loss)


def _losses_and_choices(row):
    """The classes that a row makes losses of, each with the choices and flags that it is given."""
    for call in ast.walk(ast.parse(row.here)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and hasattr(pykd, call.func.attr):
            constants = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
            yield getattr(pykd, call.func.attr), {n: v for n, v in constants.items() if isinstance(v, str | bool)}


def test_a_name_that_another_library_gave_a_loss_means_the_choices_made_there():
    """At least one row of a library's class is what the alias of that name makes, but for numbers."""
    found = {}
    for row in ROWS:
        for loss, choices in _losses_and_choices(row) if row.relation else ():
            for alias in loss.aliases:
                if row.there.startswith(f"{alias}("):
                    means = {
                        name: value
                        for name, value in pykd.get(alias)().settings().items()
                        if isinstance(value, str | bool)
                    }
                    found.setdefault((row.section, str(alias)), []).append(
                        means == {n: loss().settings()[n] for n in means} | choices
                    )
    assert len(found) > 3
    assert not [names for names, agree in found.items() if not any(agree)]
