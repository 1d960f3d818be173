"""What a loss declares about itself, and the registry that makes the declaration enough.

A loss is one file in ``pykd/losses/``. Exporters, tests, the table in the README, the benchmark and the
command line find it here; none of them names it. ``pykd/losses/_template.py`` is the file to copy.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pykd import checks

REDUCTIONS = ("mean", "sum", "none")


@dataclasses.dataclass(frozen=True)
class Spec:
    """One tensor input of a loss.

    Attributes:
        axes: names separated by spaces, such as ``"batch classes"``. Equal names mean equal lengths.
            The names become the dynamic axes of the ONNX file and the words of error messages.
        grad: whether the student is behind this tensor, so that it receives the gradient.
        dtype: ``"float"`` (any floating type, the same for all inputs of a call), ``"int64"``, or ``"weight"``: numbers of
            at least 0 of any floating type, or a mask of True and False (or of 1 and 0), whatever the type of the other
            inputs; exported files take float32.
        index_of: for integers: the axis whose entries they count, such as ``"classes"``.
        optional: whether the input may be left out.
        draw: how examples and tests draw it: ``"normal"``, ``"probabilities"`` (sum to 1 along the last
            axis), ``"indices"`` or ``"weights"`` (non-negative, some of them 0; always float32).
    """

    axes: str
    grad: bool = False
    dtype: str = "float"
    index_of: str | None = None
    optional: bool = False
    draw: str = "normal"

    @property
    def names(self) -> tuple[str, ...]:
        """The axes as a tuple."""
        return tuple(self.axes.split())

    def over(self, samples: str) -> "Spec":
        """The same input where these axes count its samples in the place of ``"batch"``; as it is where it has them."""
        if self.names[0] != "batch" or self.axes == samples or self.axes.startswith(f"{samples} "):
            return self
        return dataclasses.replace(self, axes=" ".join([samples, *self.names[1:]]))

    def rename(self, axes: Mapping[str, str]) -> "Spec":
        """The same input with some axes called otherwise."""
        return dataclasses.replace(
            self,
            axes=" ".join(axes.get(axis, axis) for axis in self.names),
            index_of=None if self.index_of is None else axes.get(self.index_of, self.index_of),
        )


Layouts = tuple[Spec, ...]  # the forms that one input may take; the first is the default


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A setting that can change in every call without a new export: a temperature, a weight."""

    minimum: float = float("-inf")
    exclusive: bool = False

    def check(self, name: str, value: Any) -> float:
        """``value`` as a float; a ValueError that names ``name`` where it is out of range."""
        if isinstance(value, str | bytes):
            raise TypeError(f"expected {name} to be a number, got {value[:40]!r}; pass a number")
        try:
            number = float(value)
        except OverflowError:  # of a whole number
            number = float("inf")
        low = number <= self.minimum if self.exclusive else number < self.minimum
        if not np.isfinite(number) or low:
            bound = f"greater than {self.minimum:g}" if self.exclusive else f"of at least {self.minimum:g}"
            if self.minimum == float("-inf"):
                bound = "that is finite"
            raise ValueError(f"expected {name} to be a number {bound}, got {number:g}; pass another {name}")
        if number != 0 and not _LEAST <= abs(number) <= _MOST:
            raise ValueError(
                f"expected {name} to be 0 or from {_LEAST:g} to {_MOST:g} but for its sign, as float32 holds "
                f"numbers in full precision, got {number:g}; pass another {name}"
            )
        return number

    def moved(self, default: float, number: int) -> float:
        """The ``number``-th of numbers in range that verification and tests try instead of the default; 0: the default."""
        return default if number == 0 else default * (1 + 0.25 * number) if default != 0 else 0.25 * number


# What float32 holds in full precision, but for 0.
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings under which a loss is tested, exported and benchmarked."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional: Sequence[str] = ()

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.settings.items()]
        words += [f"{name}:{axes.replace(' ', '×')}" for name, axes in self.layouts.items()]
        words += [f"+{name}" for name in self.optional]
        return ",".join(words) or "default"


class Loss(nn.Module):
    """Base of every loss.

    A subclass declares, besides ``forward`` and a docstring that is its specification:

    Attributes:
        name: how it is called in recipes, files and tables. Set by :func:`register`.
        inputs: tensors by name, in the order of ``forward``; a tuple of Specs where one input may take
            several forms (class indices or probabilities, say).
        scalars: those constructor arguments that can change in every call. ``forward`` takes each as
            ``Optional[float] = None`` after the tensors, and uses the attribute of that name for None.
        cases: settings to test.
        sample_axes: the axes that may count the samples: ``"batch"``, and ``"batch tokens"`` where a sample may also be one
            token of a sequence; all inputs of a call agree on them, and values per sample have these axes.
        couples_batch: why there is no value per sample; empty where the loss splits over samples.
        paper: author, year, arXiv id.
    """

    name: ClassVar[str] = ""
    inputs: ClassVar[Mapping[str, Spec | Layouts]] = {}
    scalars: ClassVar[Mapping[str, Scalar]] = {}
    cases: ClassVar[Sequence[Case]] = (Case(),)
    sample_axes: ClassVar[Sequence[str]] = ("batch",)
    couples_batch: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    reduction: str
    _layouts: ClassVar[Mapping[str, Layouts]] = {}
    _forms: ClassVar[Mapping[str, Mapping[str, Sequence[str]]]] = {}
    _weight_input: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        over = {
            samples: {n: [spec.over(samples) for spec in cls.declared(n)] for n in cls.inputs}
            for samples in cls.sample_axes
        }
        cls._layouts = {
            name: tuple(dict.fromkeys(spec for specs in over.values() for spec in specs[name])) for name in cls.inputs
        }
        cls._weight_input = next(
            (
                name
                for name in cls.inputs
                if (spec := cls.declared(name)[0]).dtype == "weight" and spec.names[0] == "batch"
            ),
            None,
        )
        cls._forms = {
            samples: {name: [spec.axes for spec in own] for name, own in specs.items()}
            for samples, specs in over.items()
        }

    def __init__(self, reduction: str = "mean", **scalars: float) -> None:
        super().__init__()
        allowed = ("mean",) if self.couples_batch else REDUCTIONS
        if reduction not in allowed:
            why = f", since {type(self).__name__} {self.couples_batch}" if self.couples_batch else ""
            raise ValueError(
                f"expected reduction to be one of {', '.join(map(repr, allowed))}{why}, "
                f"got {reduction!r}; pass one of these"
            )
        self.reduction = reduction
        self.checks_inputs = True  # a loss graph, which checks for all its losses at once, turns it off
        for name, value in scalars.items():
            setattr(self, name, self.scalars[name].check(name, value))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Checks the tensors by their declared axes, then computes."""
        if self.checks_inputs:
            # By position as forward takes them; what it does not take, it refuses itself.
            by_position = dict(zip((*self.inputs, *self.scalars), args, strict=False))
            checks.check_call(self, {**by_position, **kwargs})
        return super().__call__(*args, **kwargs)

    def fused(self, kernel: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The same as ``forward``, with a fused kernel in the middle; see :mod:`pykd.kernel_point`. Losses without one have none."""
        raise NotImplementedError

    @classmethod
    def has_kernel(cls) -> bool:
        """Whether a fused kernel computes this loss."""
        return cls.fused is not Loss.fused

    def covered_by_kernel(self, given: Mapping[str, Spec]) -> bool:
        """Whether ``fused`` computes it with these settings and inputs; where not, the formula does."""
        return self.has_kernel()

    @classmethod
    def weight_input(cls) -> str | None:
        """The input that weighs samples, where there is one."""
        return cls._weight_input

    @staticmethod
    def reference(**inputs: Any) -> Any:
        """The same in NumPy float64, written from the paper, to be obvious."""
        raise NotImplementedError

    @staticmethod
    def constants(**inputs: Any) -> dict[str, Any]:
        """What the gradient treats as constant although it is computed from the inputs (a bandwidth, say).

        Takes the arguments of :meth:`reference` and returns further ones for it, so that differences of the
        reference can be taken with these held fast.
        """
        return {}

    def zero_when_equal(self) -> bool:
        """Whether the value is 0 when every student tensor equals the teacher's, under these settings."""
        return False

    def sees_masked_classes(self) -> bool:
        """Whether a class whose logits are −inf, for student and teacher, makes the loss infinite, where others leave it out."""
        return False

    @classmethod
    def declared(cls, name: str) -> Layouts:
        """The forms of the input ``name`` as ``inputs`` has them: one sample per entry of the batch."""
        spec = cls.inputs[name]
        return (spec,) if isinstance(spec, Spec) else tuple(spec)

    @classmethod
    def layouts(cls, name: str) -> Layouts:
        """The forms that the input ``name`` may take, over all ``sample_axes``; the first is the default."""
        return cls._layouts[name]

    @classmethod
    def forms(cls) -> Mapping[str, Mapping[str, Sequence[str]]]:
        """For each of ``sample_axes``: the axes that every input may have with it."""
        return cls._forms

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as this instance has them."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        return {name: getattr(self, name) for name in names}

    def with_settings(self, **changes: Any) -> "Loss":
        """A copy with other settings."""
        return type(self)(**{**self.settings(), **changes})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


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
        cls.name = name
        _LOSSES[name] = cls
        return cls

    return add


def load_all(package: str = "pykd.losses") -> None:
    """Imports every file of a package of losses; files that start with an underscore are left out."""
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        if not info.name.startswith("_"):
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


# Lengths for examples. No two axes share a length (tracing would take them for one axis), none is 1.
_SIZES = {"batch": 6, "classes": 10, "tokens": 5, "channels": 7, "students": 3}


def example_sizes(axes: Sequence[str]) -> dict[str, int]:
    """A length for each axis name, all different."""
    sizes: dict[str, int] = {}
    for axis in axes:
        size = _SIZES.get(axis, 8)
        while size in sizes.values():
            size += 1
        sizes.setdefault(axis, size)
    return sizes


def draw(spec: Spec, sizes: Mapping[str, int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A random tensor as ``spec`` describes it; exact in ``dtype``."""
    shape = [sizes[axis] for axis in spec.names]
    if spec.draw == "indices":
        limit = sizes[spec.index_of] if spec.index_of else 2
        return torch.randint(limit, shape, generator=generator)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if spec.draw == "probabilities":
        values = torch.softmax(2 * values, dim=-1)
    elif spec.draw == "weights":
        values = torch.clamp(values + 0.5, min=0.0)
        values.reshape(-1)[0] = 0.75  # at least one sample is kept
        return values.float()
    elif spec.draw == "normal":
        values = 2 * values
    else:
        raise ValueError(
            f"expected draw to be normal, probabilities, indices or weights, got {spec.draw!r}; mend the Spec"
        )
    return values.to(dtype)
