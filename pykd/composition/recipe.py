"""Recipes: a loss as data. ``pykd export --recipe recipe.toml --out dir`` reads one; ``loss.recipe()`` gives one.

A recipe is a table (TOML, JSON or a dictionary) of one of three forms::

    loss = "soft_target"                     [terms.hard]                       [distillation_loss]
    settings = {temperature = 2.0}           loss = "hard_target"               logit_loss = "soft_entropy"
                                             weight = 1.0                       lambda2 = 0
                                             [terms.soft]                       tau = 2
                                             loss = "soft_target"               aux_loss = "l1"
                                             weight = 0.5
                                             settings = {temperature = 2.0}

and, in each, an optional table ``[export]`` with the arguments of :func:`pykd.export` (``layouts``,
``optional_inputs``, ``per_sample``, ``dtype``, ``kernels``, ``parameters``). A term of several losses has ``parts``, a list of tables with ``loss``,
``settings``, ``weight``, ``weight_name``, ``inputs`` and ``axes``, as in :class:`pykd.Part`.
"""

import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import tomli_w

from pykd import files
from pykd.composition.composition import Composition, as_composition
from pykd.composition.distillation_loss import DistillationLoss
from pykd.composition.terms import MAX_PARTS, Part, Term
from pykd.definition import Loss, registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_SIZE = 256 * 1024  # of a file; a recipe of a hundred terms has 16 KiB
_MAX_DOTS = 100  # in a line: what tomllib does with a.b.c.d takes time by the square of its length


def load(path: str | Path) -> dict[str, Any]:
    """Reads a recipe from a TOML file of at most 256 KiB."""
    data = files.read(path, MAX_SIZE)
    if any(line.count(b".") > _MAX_DOTS for line in data.split(b"\n")):
        raise ValueError(f"expected at most {_MAX_DOTS} dots in a line of {path}, got more; break the line")
    try:
        return dict(tomllib.loads(data.decode()))
    except (ValueError, RecursionError) as error:  # of which TOMLDecodeError is one
        raise ValueError(f"expected {path} to be TOML, got {error}; correct the file") from error


def dumps(recipe: Mapping[str, Any]) -> str:
    """A recipe as TOML."""
    return tomli_w.dumps(dict(recipe))


def build(recipe: Mapping[str, Any]) -> Composition:
    """The loss that a recipe describes.

    A recipe is data: it names registered losses, and nothing in it is run. Whatever it holds, this gives a composition
    or raises a ValueError.
    """
    table_of(recipe, "a recipe")
    forms = [form for form in ("loss", "terms", "distillation_loss") if form in recipe]
    if len(forms) != 1:
        raise ValueError(
            f"expected a recipe with exactly one of 'loss', 'terms' and 'distillation_loss', got {forms or 'none of them'}; "
            "see pykd.recipe"
        )
    registry.load_all()
    if "loss" in recipe:
        _known(recipe, ("loss", "settings", "export"), "a recipe of one loss")
        return as_composition(_loss(recipe))
    if "distillation_loss" in recipe:
        _known(recipe, ("distillation_loss", "export"), "a recipe of a DistillationLoss")
        arguments = table_of(recipe["distillation_loss"], "distillation_loss")
        return DistillationLoss(**arguments_of(DistillationLoss, arguments, "the arguments of pykd.DistillationLoss"))
    _known(recipe, ("terms", "students", "share_ignored", "export"), "a recipe of terms")
    terms = []
    tables = table_of(recipe["terms"], "terms")
    _few(tables, "terms")
    for name, table in tables.items():
        what = f"the term {name!r}"
        _known(table, ("loss", "settings", "weight", "parts"), what)
        if "parts" in table and ("loss" in table or "settings" in table):
            raise ValueError(f"expected either 'parts' or 'loss' in {what}, got both; correct the recipe")
        parts = table.get("parts", [{key: table[key] for key in ("loss", "settings") if key in table}])
        _few(_checked(parts, list[Any], f"the parts of {what}"), f"parts of {what}")
        made = tuple(map(_part, parts))
        terms.append(Term(name, made, _number(table, f"the weight of {what}")))
    students = _checked(recipe.get("students", False), bool, "students")
    share_ignored = _checked(recipe.get("share_ignored", True), bool, "share_ignored")
    return Composition(terms, students=students, share_ignored=share_ignored)


def arguments_of(
    function: Callable[..., Any], given: Mapping[str, Any], what: str, without: Sequence[str] = ()
) -> dict[str, Any]:
    """``given``, if ``function`` has arguments of these names and types; a ValueError names the one that is wrong.

    Args:
        function: its annotations say the types; ``float`` takes whole numbers, too.
        given: the arguments by name.
        what: how messages call them, such as ``"the settings of soft_target"``.
        without: arguments that are not to be given.
    """
    kinds = {name: p.annotation for name, p in inspect.signature(function).parameters.items() if name not in without}
    known = list(kinds)
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"expected {what}, got {name!r}; it takes {', '.join(known)}")
        _checked(value, kinds[name], f"{name} among {what}")
    return dict(given)


def _loss(table: Mapping[str, Any]) -> Loss:
    cls = registry.get(_checked(table.get("loss"), str, "loss"))
    settings = table_of(table.get("settings", {}), f"the settings of {cls.name}")
    return cls(**arguments_of(cls, settings, f"the settings of {cls.name}"))


def _part(table: Mapping[str, Any]) -> Part:
    _known(table, ("loss", "settings", "weight", "weight_name", "inputs", "axes"), "a part of a term")
    if "loss" not in table:
        raise ValueError("expected 'loss' in a part of a term, got none; name a registered loss")
    return Part(
        _loss(table),
        _number(table, "the weight of a part"),
        table.get("weight_name"),
        dict(table_of(table.get("inputs", {}), "the inputs of a part")),
        dict(table_of(table.get("axes", {}), "the axes of a part")),
    )


def table_of(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"expected {what} to be a table, got {_shown(value)}; correct the recipe")
    return value


def _known(table: object, keys: tuple[str, ...], what: str) -> None:
    unknown = [key for key in table_of(table, what) if key not in keys]
    if unknown:
        raise ValueError(
            f"expected {what} to have only {', '.join(keys)}, got {', '.join(unknown)}; correct the recipe"
        )


def _few(items: Sized, what: str) -> None:
    if len(items) > MAX_PARTS:
        raise ValueError(f"expected at most {MAX_PARTS} {what}, got {len(items)}; split the recipe")


def _number(table: Mapping[str, Any], what: str) -> float:
    return float(_checked(table.get("weight", 1.0), float, what))


def _checked(value: Any, kind: Any, what: str) -> Any:
    """``value``, if it is of the type that an annotation names."""
    if not _fits(value, kind):
        raise ValueError(f"expected {what} to be {_name_of(kind)}, got {_shown(value)}; correct the recipe")
    return value


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin in _LISTS:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if kind is float:
        return _is_int(value) or (isinstance(value, float) and math.isfinite(value))
    if kind is int:
        return _is_int(value)
    return isinstance(value, kind)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


_LISTS = (list, Sequence, Iterable)


def _name_of(kind: Any) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_name_of(one) for one in typing.get_args(kind) if one is not types.NoneType)
    if typing.get_origin(kind) in _LISTS:
        (item,) = typing.get_args(kind)
        return "a list" if item is Any else f"a list, each of it {_name_of(item)}"
    if typing.get_origin(kind) is Mapping:
        return "a table of strings"
    words = {float: "a finite number", int: "a whole number of 64 bits", str: "a string", bool: "true or false"}
    return words.get(kind, str(kind))


def _shown(value: object) -> str:
    if isinstance(value, str | float | bool | None):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}…"
    return {dict: "a table", list: "a list", int: "a whole number"}.get(type(value), f"a {type(value).__name__}")
