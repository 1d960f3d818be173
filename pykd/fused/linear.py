"""What a loss makes of values that a kernel is still to compute.

A loss is linear in what its kernel returns: it reduces values over the samples, and adds such sums up with factors. A
:class:`Linear` notes that while the loss's method ``fused`` runs on it as on a tensor. From it follow the weights that a
kernel wants beforehand, d(loss)/d(value), and afterwards the loss itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pykd import _core
from pykd.definition import ops
from pykd.fused.point import Value

Factor = float | Tensor
_MOST_ROWS = 1 << 12
Results = Sequence[Mapping[str, Tensor]]  # of every kernel call, its outputs by name


class Reduced:
    """Values of one kernel output, reduced over the samples (or not, yet): a piece of a linear form."""

    __slots__ = ("at_least_0", "device", "place", "reduction", "samples", "source", "weight")

    def __init__(self, place: int, source: Value, samples: Sequence[int], device: torch.device) -> None:
        self.place = place  # of the kernel call among the calls
        self.source = source
        self.samples = samples  # the lengths of the axes that count samples, where a row is one of tokens; else empty
        self.device = device
        self.at_least_0 = False
        self.weight: Tensor | None = None  # of every sample
        self.reduction = "none"

    def but(self, **changes: Any) -> "Reduced":
        """The same with other attributes."""
        other = Reduced(self.place, self.source, self.samples, self.device)
        other.at_least_0, other.weight, other.reduction = self.at_least_0, self.weight, self.reduction
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    @property
    def is_scalar(self) -> bool:
        """Whether it is one number, and not one per sample."""
        return self.reduction != "none" or not self.source.shape

    @property
    def is_even(self) -> bool:
        """Whether it is a sum over rows of which all count the same, and which are not too many to keep a weight for each."""
        shape = self.source.shape
        return self.weight is None and self.reduction != "none" and len(shape) == 1 and shape[0] <= _MOST_ROWS

    def weighted_sum(self, weight: Tensor, results: Results) -> float:
        """Σ weight · value over the rows, in float64."""
        return _core.weighted_sum(weight, results[self.place][self.source.output], self.at_least_0)

    def value(self, results: Results) -> Tensor:
        """Its value, from what the kernels returned."""
        values = results[self.place][self.source.output]
        if self.at_least_0:
            values = ops.at_least_0(values)
        if self.samples:
            values = values.reshape(self.samples)
        return ops.reduce(values, self.weight, self.reduction)

    def weights(self, upstream: Factor) -> Tensor:
        """d(loss)/d(value) of every row, as the kernel takes it, for d(loss)/d(this)."""
        shape = self.source.shape
        if self.weight is None:
            if self.reduction == "mean":
                upstream = upstream / max(1, math.prod(shape))
            if isinstance(upstream, Tensor):
                return upstream.to(torch.float32).reshape(shape) if upstream.dim() else upstream.float().expand(shape)
            return torch.full(shape, upstream, dtype=torch.float32, device=self.device)
        return (self.weight * upstream).to(torch.float32).reshape(shape)


class Linear:
    """A sum of pieces with factors, and of a tensor that has nothing to do with kernels."""

    __slots__ = ("pieces", "rest")

    def __init__(self, pieces: Sequence[tuple[Reduced, Factor]], rest: Tensor | None = None) -> None:
        self.pieces = pieces
        self.rest = rest

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """What torch and :mod:`pykd.definition.ops` do with it."""
        if function is ops.reduce:
            return args[0].reduced(*args[1:])
        if function is ops.at_least_0:
            return args[0].changed(at_least_0=True)
        if function in _ADD:
            return args[1] + args[0] if isinstance(args[1], Linear) else args[0] + args[1]
        if function in _MULTIPLY:
            return args[1] * args[0] if isinstance(args[1], Linear) else args[0] * args[1]
        raise TypeError(
            f"expected a loss to reduce what its kernel returns (ops.reduce), to multiply it by numbers and to add it, got "
            f"{getattr(function, '__name__', function)}; do the rest before the kernel, or in it"
        )

    def reduced(self, weight: Tensor | None, reduction: str, count: Tensor | None = None) -> "Linear":
        """:func:`pykd.definition.ops.reduce` of it."""
        if weight is not None:
            _refuse_gradient(weight)
            weight = ops.shares(weight.to(torch.float32), reduction, count)
            reduction = "sum" if reduction == "mean" else reduction  # of each one's share
        return self.changed(weight=weight, reduction=reduction)

    def changed(self, **changes: Any) -> "Linear":
        """The same with other attributes of its only piece, whose values were not reduced so far."""
        if len(self.pieces) != 1 or self.rest is not None:
            raise TypeError(
                "expected a loss to reduce what its kernel returns before it adds anything to it, got a sum; reduce each part "
                "by itself"
            )
        ((piece, factor),) = self.pieces
        return Linear([(piece.but(**changes), factor)])

    def __add__(self, other: Any) -> "Linear":
        if isinstance(other, Linear):
            rest = other.rest if self.rest is None else self.rest if other.rest is None else self.rest + other.rest
            return Linear([*self.pieces, *other.pieces], rest)
        return Linear(self.pieces, other if self.rest is None else self.rest + other)

    __radd__ = __add__

    def __mul__(self, factor: Factor) -> "Linear":
        if isinstance(factor, Tensor):
            _refuse_gradient(factor)
        rest = None if self.rest is None else self.rest * factor
        return Linear([(piece, own * factor) for piece, own in self.pieces], rest)

    __rmul__ = __mul__

    def even_sums(self) -> list[tuple[Reduced, Tensor]] | None:
        """The pieces with the weights of their rows, where these are few and depend on nothing but shapes and settings."""
        if self.rest is not None or not all(
            piece.is_even and isinstance(factor, float) for piece, factor in self.pieces
        ):
            return None
        return [(piece, piece.weights(factor)) for piece, factor in self.pieces]

    def value(self, known: dict[int, Tensor], results: Results) -> Tensor:
        """The part of it that kernels give; ``known`` are the values of pieces by id, and grow."""
        sums = self.even_sums()
        if sums is not None and self.pieces[0][0].device.type == "cpu" and not torch.is_grad_enabled():
            # Bit for bit what pykd.fused.eager gives where it knows the way.
            return torch.scalar_tensor(
                sum(piece.weighted_sum(weight, results) for piece, weight in sums), dtype=torch.float32, device="cpu"
            )
        total: Tensor | None = None
        for piece, factor in self.pieces:
            value = known.get(id(piece))
            if value is None:
                value = known[id(piece)] = piece.value(results)
            if isinstance(factor, Tensor) or factor != 1.0:
                value = value * factor
            total = value if total is None else total + value
        assert total is not None
        return total

    def add_weights(self, weights: list[dict[str, Tensor]], upstream: Factor) -> None:
        """Adds d(loss)/d(value) of every value to those of the kernel calls, for d(loss)/d(this)."""
        for piece, factor in self.pieces:
            own = piece.weights(factor * upstream)
            of_call, name = weights[piece.place], piece.source.weight
            of_call[name] = of_call[name] + own if name in of_call else own


def _refuse_gradient(weight: Tensor) -> None:
    if weight.requires_grad:
        raise TypeError(
            "expected a loss to multiply what its kernel returns by constants, got a tensor that requires a gradient; "
            "detach it, or leave such settings to the formula (covered_by_kernel)"
        )


_ADD = frozenset([torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__])
_MULTIPLY = frozenset([torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__])
