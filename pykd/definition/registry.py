"""The registry: exporters, tests, tables, benchmarks and the command line find every loss here, and name none."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import Tensor

from pykd.definition.loss import Loss
from pykd.definition.spec import Alias, Case

_HOME = "pykd.losses"
_LOSSES: dict[str, type[Loss]] = {}
_WITH_SETTINGS: dict[tuple[type[Loss], Alias], type[Loss]] = {}  # by aliases that choose some
L = TypeVar("L", bound=type[Loss])


def register(formula: Callable[..., Tensor]) -> Callable[[L], L]:
    """Class decorator: makes a loss known to everything, under the name of its formula, a function in the same file."""
    if not inspect.isfunction(formula):
        raise TypeError(f"expected the formula of a loss, a function, got {formula!r}; see pykd/losses/_template.py")
    name = formula.__name__

    def add(cls: L) -> L:
        if isinstance(cls.aliases, str):
            raise TypeError(f"expected the aliases of {cls.__qualname__} as a tuple, got {cls.aliases!r}; add a comma")
        for called in (name, cls.__name__, *cls.aliases):
            known, _ = _find(called)
            if known is not None and (known.name, known.__qualname__) != (name, cls.__qualname__):
                raise ValueError(
                    f"expected a new name for {cls.__module__}.{cls.__qualname__}, got {called!r}, which "
                    f"{known.__module__}.{known.__qualname__} has; choose another"
                )
        missing = [] if cls.inputs else ["inputs"]
        if "reference" not in cls.__dict__:
            missing.append("reference")
        if missing:
            raise TypeError(
                f"expected {cls.__qualname__} to declare {' and '.join(missing)}, got nothing; "
                "see pykd/losses/_template.py"
            )
        cls.takes(formula)
        _check_reference(cls)
        _check_settings(cls)
        cls.name = name
        home, _, file = cls.__module__.removeprefix(f"{_HOME}.").rpartition(".")
        cls.family = home if cls.__module__.startswith(f"{_HOME}.") and file else ""
        _LOSSES[name] = cls
        return cls

    return add


def load_all(package: str = _HOME) -> None:
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
    """The loss class called ``name``: by its own name, its class's, or an alias; capitals, ``-`` and ``_`` do not count.

    Where an alias means settings (``"RKL"``: ``form="reverse_kl"``), this is the class with these as its defaults; what it makes are
    instances of the class itself.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a loss, got {name!r}; pass a string, such as 'soft_target'")
    found, alias = _find(name)
    if found is None:
        load_all()
        found, alias = _find(name)
    if found is None:
        names = {_plain(called): called for cls in _LOSSES.values() for called in (*cls.aliases, cls.name)}
        near = [names[one] for one in difflib.get_close_matches(_plain(name), names, 1)]
        raise ValueError(
            f"expected the name of a loss ({', '.join(registered())}) or an alias, got {name!r}; "
            f"{f'did you mean {near[0]}? ' if near else ''}`pykd list` shows all of them"
        )
    if alias is None:
        return found
    if (found, alias) not in _WITH_SETTINGS:
        _WITH_SETTINGS[found, alias] = found.with_defaults(alias.settings)
    return _WITH_SETTINGS[found, alias]


def _check_reference(cls: type[Loss]) -> None:
    """The reference takes the inputs by their names, and does without those that may be missing."""
    parameters = inspect.signature(cls.reference).parameters
    required = [name for name in cls.inputs if not cls.declared(name)[0].optional]
    for given in (cls.inputs, required):
        try:
            inspect.signature(cls.reference).bind(None, **dict.fromkeys(given))
        except TypeError as error:
            wanted = [name if name in required else f"{name}=None" for name in cls.inputs]
            raise TypeError(
                f"expected the reference of {cls.__qualname__} to take the inputs by their names (self, {', '.join(wanted)}), got "
                f"({', '.join(map(str, parameters.values()))}); correct one of them"
            ) from error


def _check_settings(cls: type[Loss]) -> None:
    """The settings that aliases mean are settings of the class, and allowed."""
    for alias in cls.aliases:
        if isinstance(alias, Alias):
            cls(**alias.settings)


def search(words: Iterable[str]) -> dict[str, list[type[Loss]]]:
    """The losses in whose names, aliases, family or first line every one of ``words`` stands, by family (or ``"elsewhere"``)."""
    load_all()
    found: dict[str, list[type[Loss]]] = {}
    for cls in sorted(_LOSSES.values(), key=lambda cls: (cls.family or "~", cls.name)):
        family = cls.family or "elsewhere"
        text = " ".join([family, cls.name, cls.__name__, *cls.aliases, (inspect.getdoc(cls) or "").split("\n")[0]])
        if all(word.casefold() in text.casefold() for word in words):
            found.setdefault(family, []).append(cls)
    return found


def every_case() -> Iterator[tuple[type[Loss], Case]]:
    """Every loss with every case that it declares."""
    for cls in registered().values():
        for case in cls.cases:
            yield cls, case


def _find(called: str) -> tuple[type[Loss] | None, Alias | None]:
    """The loss, and the alias by which it was called where that means settings."""
    if called in _LOSSES:
        return _LOSSES[called], None
    key = _plain(called)
    for cls in _LOSSES.values():
        for name in (cls.name, cls.__name__, *cls.aliases):
            if key == _plain(name):
                return cls, name if isinstance(name, Alias) else None
    return None, None


def _plain(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "")
