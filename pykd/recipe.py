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
``optional_inputs``, ``per_sample``, ``dtype``). A term of several losses has ``parts``, a list of tables with ``loss``,
``settings``, ``weight``, ``weight_name``, ``inputs`` and ``axes``, as in :class:`pykd.Part`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from pykd import registry
from pykd.composition import Composition, Part, Term, as_composition

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load(path: str | Path) -> dict[str, Any]:
    """Reads a recipe from a TOML file."""
    with open(path, "rb") as file:
        try:
            return dict(tomllib.load(file))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"expected {path} to be TOML, got {error}; mend the file") from error


def dumps(recipe: Mapping[str, Any]) -> str:
    """A recipe as TOML."""
    return tomli_w.dumps(dict(recipe))


def build(recipe: Mapping[str, Any]) -> Composition:
    """The loss that a recipe describes."""
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
        from pykd.distillation_loss import DistillationLoss

        _known(recipe, ("distillation_loss", "export"), "a recipe of a DistillationLoss")
        try:
            return DistillationLoss(**recipe["distillation_loss"])
        except TypeError as error:
            raise ValueError(
                f"expected the arguments of pykd.DistillationLoss, got {error}; mend the recipe"
            ) from error
    _known(recipe, ("terms", "students", "export"), "a recipe of terms")
    terms = []
    for name, table in recipe["terms"].items():
        _known(table, ("loss", "settings", "weight", "parts"), f"the term {name!r}")
        parts = table.get("parts") or [{key: table[key] for key in ("loss", "settings") if key in table}]
        terms.append(Term(name, tuple(_part(part) for part in parts), float(table.get("weight", 1.0))))
    return Composition(terms, students=bool(recipe.get("students", False)))


def of_composition(composition: Composition) -> dict[str, Any]:
    """The recipe of a composition."""
    if composition.single:
        return _table_of_loss(composition.terms_[0].parts[0])
    terms: dict[str, Any] = {}
    for term in composition.terms_:
        plain = len(term.parts) == 1 and _table_of_part(term.parts[0]).keys() <= {"loss", "settings"}
        if plain:
            terms[term.name] = {**_table_of_loss(term.parts[0]), "weight": term.weight}
        else:
            terms[term.name] = {"weight": term.weight, "parts": [_table_of_part(part) for part in term.parts]}
    return {"terms": terms} | ({"students": True} if composition.students else {})


def _loss(table: Mapping[str, Any]) -> registry.Loss:
    cls = registry.get(table["loss"])
    try:
        return cls(**table.get("settings", {}))
    except TypeError as error:
        raise ValueError(f"expected the settings of {table['loss']}, got {error}; `pykd show` lists them") from error


def _part(table: Mapping[str, Any]) -> Part:
    _known(table, ("loss", "settings", "weight", "weight_name", "inputs", "axes"), "a part of a term")
    if "loss" not in table:
        raise ValueError("expected 'loss' in a part of a term, got none; name a registered loss")
    return Part(
        _loss(table),
        float(table.get("weight", 1.0)),
        table.get("weight_name"),
        dict(table.get("inputs", {})),
        dict(table.get("axes", {})),
    )


def _table_of_loss(part: Part) -> dict[str, Any]:
    settings = {name: value for name, value in part.loss.settings().items() if value is not None}
    return {"loss": part.loss.name, "settings": settings}


def _table_of_part(part: Part) -> dict[str, Any]:
    table = _table_of_loss(part)
    if part.weight != 1.0 or part.weight_name:
        table["weight"] = part.weight
    if part.weight_name:
        table["weight_name"] = part.weight_name
    if part.inputs:
        table["inputs"] = dict(part.inputs)
    if part.axes:
        table["axes"] = dict(part.axes)
    return table


def _known(table: Mapping[str, Any], keys: tuple[str, ...], what: str) -> None:
    unknown = [key for key in table if key not in keys]
    if unknown:
        raise ValueError(f"expected {what} to have only {', '.join(keys)}, got {', '.join(unknown)}; mend the recipe")
