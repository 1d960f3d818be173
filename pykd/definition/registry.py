"""The registry: exporters, tests, tables, benchmarks and the command line find every loss here, and name none."""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from pykd.definition.loss import Loss
from pykd.definition.spec import Case

_LOSSES: dict[str, type[Loss]] = {}
L = TypeVar("L", bound=type[Loss])


def register(name: str) -> Callable[[L], L]:
    """Class decorator: makes a loss known to everything, under ``name``."""

    def add(cls: L) -> L:
        known = _LOSSES.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(
                f"expected a new name, got {name!r}, which {known.__module__}.{known.__qualname__} has; choose another"
            )
        missing = [what for what in ("inputs", "paper") if not getattr(cls, what)]
        if "reference" not in cls.__dict__:
            missing.append("reference")
        if missing:
            raise TypeError(
                f"expected {cls.__qualname__} to declare {', '.join(missing)}, got nothing; "
                "see pykd/losses/_template.py"
            )
        formula = getattr(sys.modules[cls.__module__], name, None)
        if not inspect.isfunction(formula):
            raise TypeError(
                f"expected a function {name} beside {cls.__qualname__}, got none; see pykd/losses/_template.py"
            )
        cls.takes(formula)
        cls.name = name
        _LOSSES[name] = cls
        return cls

    return add


def load_all(package: str = "pykd.losses") -> None:
    """Imports every file of a package of losses, families (packages inside) included; names with an underscore in front are left out."""
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        if info.name.startswith("_"):
            continue
        if info.ispkg:
            load_all(f"{package}.{info.name}")
        else:
            importlib.import_module(f"{package}.{info.name}")


def registered() -> dict[str, type[Loss]]:
    """Every registered loss by name, in alphabetical order."""
    return dict(sorted(_LOSSES.items()))


def is_registered(name: str) -> bool:
    """Whether a loss of this name has been registered."""
    return name in _LOSSES


def get(name: str) -> type[Loss]:
    """The loss class called ``name``."""
    if name not in _LOSSES:
        raise ValueError(
            f"expected the name of a loss ({', '.join(registered())}), got {name!r}; `pykd list` tells more"
        )
    return _LOSSES[name]


def every_case() -> Iterator[tuple[type[Loss], Case]]:
    """Every loss with every case that it declares."""
    for cls in registered().values():
        for case in cls.cases:
            yield cls, case
