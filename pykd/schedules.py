"""Temperatures and weights that change while a student learns: numbers by the step, for the parameters of a loss.

    >>> import pykd
    >>> from pykd.schedules import cosine, linear, warm_up
    >>> numbers = pykd.schedules.Schedules(
    ...     logit_temperature=cosine(4.0, 1.0, steps=100), aux_weight=warm_up(linear(1.0, 0.5, steps=90), steps=10)
    ... )
    >>> numbers(0)
    {'logit_temperature': 4.0, 'aux_weight': 0.0}
    >>> numbers(50)
    {'logit_temperature': 2.5, 'aux_weight': 0.7777777777777778}

``loss(**tensors, **numbers(step))`` takes them, and so does an exported loss: parameters can change in every call without a
new export. The header ``pykd/schedules.hpp`` has the same functions for C++, and a test compares the numbers.

A schedule is a function of the step, which counts from 0 and may be a fraction (of epochs, say). This module needs no torch.
"""

import math
from collections.abc import Callable
from typing import Any

__all__ = ["Schedules", "constant", "cosine", "linear", "warm_up"]

Schedule = Callable[[float], float]


def constant(value: float) -> Schedule:
    """The same number always.

    Raises:
        TypeError, ValueError: for a ``value`` that is no finite number.
    """
    value = _finite("value", value)
    return lambda step: value


def linear(start: float, end: float, steps: float) -> Schedule:
    """In a straight line from ``start`` at step 0 to ``end`` at ``steps``, and ``end`` from there on.

    .. math:: f(t) = start + (end - start) \\min(t / steps, 1)

    Raises:
        TypeError, ValueError: where ``start`` or ``end`` is no finite number, or ``steps`` not greater than 0.
    """
    start, end, steps = _finite("start", start), _finite("end", end), _positive("steps", steps)
    # The end itself: the sum may be beside it by a rounding.
    return lambda step: end if step >= steps else start + (end - start) * _progress(step, steps)


def cosine(start: float, end: float, steps: float) -> Schedule:
    """Along half a wave of the cosine, slow at both ends and fast in between; ``end`` from ``steps`` on.

    .. math:: f(t) = end + (start - end) (1 + \\cos(\\pi \\min(t / steps, 1))) / 2

    Raises:
        TypeError, ValueError: as :func:`linear`.
    """
    start, end, steps = _finite("start", start), _finite("end", end), _positive("steps", steps)
    return lambda step: end + (start - end) * (1 + math.cos(math.pi * _progress(step, steps))) / 2


def warm_up(schedule: Schedule, steps: float, start: float = 0.0) -> Schedule:
    """In a straight line from ``start`` to where ``schedule`` begins, in ``steps`` steps; then ``schedule``, from its step 0.

    A temperature needs a ``start`` above 0.

    Raises:
        TypeError, ValueError: where ``schedule`` is no function, ``start`` no finite number, or ``steps`` not greater than 0.
    """
    _callable("schedule", schedule)
    start, steps = _finite("start", start), _positive("steps", steps)

    def warmed(step: float) -> float:
        if step >= steps:
            return schedule(step - steps)
        return start + (schedule(0.0) - start) * _progress(step, steps)

    return warmed


class Schedules:
    """Several of them, each for the parameter of its name.

    Args:
        schedules: by the names of a loss's parameters: ``temperature`` of a single loss, ``soft_weight`` and
            ``soft_temperature`` of a term (``pykd.load(...).signature.parameters`` lists them).
    """

    def __init__(self, **schedules: Schedule) -> None:
        for name, schedule in schedules.items():
            _callable(f"the schedule of {name}", schedule)
        self.schedules = schedules

    def __call__(self, step: float) -> dict[str, float]:
        """The numbers at a step, by name, as a call takes them."""
        step = _finite("step", step)
        return {name: schedule(step) for name, schedule in self.schedules.items()}


def _progress(step: float, steps: float) -> float:
    """How much of ``steps`` is behind: from 0 to 1."""
    return min(max(step / steps, 0.0), 1.0)


def _callable(name: str, schedule: Any) -> None:
    if not callable(schedule):
        raise TypeError(f"expected {name} to be a function of the step, got {schedule!r}; pass constant({schedule!r})")


def _finite(name: str, value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError(f"expected {name} to be a number, got {value[:40]!r}; pass a number")
    if not math.isfinite(number := float(value)):
        raise ValueError(f"expected {name} to be a finite number, got {number:g}; pass another")
    return number


def _positive(name: str, value: Any) -> float:
    if (number := _finite(name, value)) <= 0:
        raise ValueError(f"expected {name} to be a number greater than 0, got {number:g}; pass another")
    return number
