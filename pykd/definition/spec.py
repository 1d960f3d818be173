"""What a loss declares of its inputs, its scalars and its test cases."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


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
    exclusive: bool = False  # whether the minimum itself is out of range
    maximum: float = float("inf")

    def check(self, name: str, value: Any) -> float:
        """``value`` as a float; a ValueError that names ``name`` where it is out of range."""
        if isinstance(value, str | bytes):
            raise TypeError(f"expected {name} to be a number, got {value[:40]!r}; pass a number")
        try:
            number = float(value)
        except OverflowError:  # of a whole number
            number = float("inf")
        low = number <= self.minimum if self.exclusive else number < self.minimum
        if not np.isfinite(number) or low or number > self.maximum:
            raise ValueError(f"expected {name} to be a number {self._bounds()}, got {number:g}; pass another {name}")
        if number != 0 and not _LEAST <= abs(number) <= _MOST:
            raise ValueError(
                f"expected {name} to be 0 or from {_LEAST:g} to {_MOST:g} but for its sign, as float32 holds "
                f"numbers in full precision, got {number:g}; pass another {name}"
            )
        return number

    def moved(self, default: float, number: int) -> float:
        """The ``number``-th of numbers in range that verification and tests try instead of the default; 0: the default."""
        value = default if number == 0 else default * (1 + 0.25 * number) if default != 0 else 0.25 * number
        if value <= self.maximum:
            return value
        end = self.maximum if default < self.maximum else max(self.minimum, default - 1.0)
        return default + (end - default) * number / (number + 4)

    def _bounds(self) -> str:
        bounds = []
        if self.minimum != float("-inf"):
            bounds.append(f"greater than {self.minimum:g}" if self.exclusive else f"of at least {self.minimum:g}")
        if self.maximum != float("inf"):
            bounds.append(f"of at most {self.maximum:g}")
        return " and ".join(bounds) or "that is finite"


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
