"""What is settled about a call before its numbers are looked at, and so needs to be settled once.

Shapes, types and devices decide which layout an input has, whether axes agree, and whether a kernel computes the call.
A :class:`Plan` is kept for every such combination; what depends on the data (indices in range) is checked in every call.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykd.definition import checks, routing
from pykd.definition.spec import Spec

_MOST = 256  # plans that are kept; a loss that sees more shapes than these plans anew


@dataclasses.dataclass
class Plan:
    """One combination of shapes, types and devices.

    Attributes:
        specs: the layout of every input that is there.
        counted: the inputs whose indices are checked in every call.
        refusal: why no kernel computes such a call; None while nobody has asked.
        alone: of a composition: whether one kernel call computes all of it, and so writes the only gradient.
        ways: through the kernels, by the numbers of the call; for whoever goes them.
        last: the numbers of the last call that had no way of its own.
    """

    specs: dict[str, Spec]
    counted: Sequence[checks.Counted]
    refusal: str | None = None
    alone: bool = False
    ways: dict[Any, Any] = dataclasses.field(default_factory=dict)
    last: Any = None

    def check_indices(self, tensors: Mapping[str, Any]) -> bool:
        """Raises where an index is out of range; whether it is known that none of them is ignored."""
        every = True
        for one in self.counted:
            tensor = tensors[one.name]
            if tensor.device.type != "cpu":
                every = False
                continue
            low, high = torch.aminmax(tensor)
            if low.item() < 0 or high.item() >= one.limit:
                checks.check_range(one.name, tensor, one.limit, one.axis, one.ignore_index)
                every = False
            elif one.ignore_index is not None and 0 <= one.ignore_index < one.limit:
                every = False
        return every


class PlannedCall(NamedTuple):
    """A call whose arguments were checked.

    Attributes:
        plan: of all calls like it.
        tensors: the inputs that are there, in the order of the plan.
        numbers: every scalar: a float, or a tensor that requires a gradient.
        kept: whether it is known that no index among the inputs is ignored.
    """

    plan: Plan
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    kept: bool


_changes = 0  # of settings, in this process


def forget_all() -> None:
    """Makes every plan that was kept count for nothing: a setting has changed, and nobody knows where it counts."""
    global _changes
    _changes += 1


class Plans:
    """Plans by what decides them. Threads may share it: at worst one of them is made twice."""

    def __init__(self) -> None:
        self._plans: dict[Any, Plan] = {}
        self._changes = _changes

    def find(self, key: Any) -> Plan | None:
        """The plan that was kept for a key."""
        if self._changes != _changes:
            self._changes = _changes
            self._plans = {}
        return self._plans.get(key)

    def keep(self, key: Any, specs: dict[str, Spec], tensors: Mapping[str, Tensor], ignore: Mapping[str, int]) -> Plan:
        """Makes a plan of inputs that were checked.

        Args:
            key: of :func:`key_of`.
            specs: the layout of every input.
            tensors: the inputs.
            ignore: the ignored index of inputs that have one.
        """
        plan = Plan(specs, checks.counted(specs, tensors, ignore))
        if len(self._plans) >= _MOST:
            self._plans = {}
        self._plans[key] = plan
        return plan


def key_of(tensors: Iterable[Any]) -> Any:
    """What decides the plan of a call with these inputs, each a tensor or None; None where there is more to them.

    That is where something is no ordinary tensor: the checks will say so, or it is a stand-in in a trace.
    """
    key: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            key.append(None)
        elif routing.is_ordinary(tensor) and not tensor.is_nested:
            key.append((tensor.shape, tensor.dtype, tensor.device, tensor.layout))
        else:
            return None
    return tuple(key)
