"""What is kept of a teacher's distribution: its K most probable classes, and the mass of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pykd import kernels

Array = np.ndarray[Any, Any]


class Kept(NamedTuple):
    """The top K of rows of logits, exact but for float32 arithmetic."""

    ids: Array  # (rows, K) int32: the classes, the most probable first; of equals the lowest first
    log_probs: Array  # (rows, K) float64, at temperature 1
    log_tail: Array  # (rows, temperatures) float64: log of the mass of all others; −inf where there is none
    lse: Array  # (rows, temperatures) float64: log Σ exp(logits / T)


def keep(logits: Array, kept: int, temperatures: Sequence[float] = (1.0,)) -> Kept:
    """Keeps the largest of finite rows (single −∞ aside); what it makes of others is not to be used.

    Args:
        logits: (rows, classes).
        kept: K, at most the number of classes.
        temperatures: of ``log_tail`` and ``lse``; the first is 1.
    """
    assert temperatures[0] == 1
    values, offset = narrow(logits)
    ids = _largest(values, kept)
    log_tail, lse = np.empty((2, len(values), len(temperatures)))
    for place, temperature in enumerate(temperatures):
        whole, tail = log_masses(values, ids, temperature)
        log_tail[:, place] = tail - whole
        lse[:, place] = whole + offset / temperature
    top = np.take_along_axis(values, ids, axis=1) - (lse[:, :1] - offset[:, None])
    return Kept(ids.astype(np.int32), top, log_tail, lse)


def log_masses(values: Array, ids: Array, temperature: float) -> tuple[Array, Array]:
    """log Σ exp(values / T) over all classes, and over those that ``ids`` does not name; not by a difference, which cancels."""
    scaled, offset = values, np.zeros(len(values))
    if temperature != 1:  # of large values a division in float32 takes the differences away
        largest = values.max(axis=1, keepdims=True)
        scaled = (values - largest) / np.float32(temperature)
        offset = largest[:, 0].astype(np.float64) / temperature
    rest = scaled if temperature != 1 else scaled.copy()
    whole = log_sum(scaled) + offset
    np.put_along_axis(rest, ids, np.float32(-np.inf), axis=1)
    return whole, log_sum(rest) + offset


def log_sum(values: Array) -> Array:
    """log Σ exp of rows of float32; −inf of rows without a finite class."""
    largest, rest = log_parts(values)
    return np.where(largest == -np.inf, -np.inf, largest.astype(np.float64) + rest)


def log_parts(values: Array) -> tuple[Array, Array]:
    """The largest of each row of float32, and what log Σ exp is above it, by the kernel; both float32."""
    best = values.argmax(axis=1)
    share = np.empty(len(values), np.float32)
    kernels.run("soft_target", {"student": values, "labels": best}, {}, {"hard": share}, threads=1)
    return values[np.arange(len(values)), best], share


def narrow(logits: Array) -> tuple[Array, Array]:
    """float32, and what was taken off each row for it: of float64 the largest, so that differences keep their digits."""
    offset = np.zeros(len(logits))
    if logits.dtype == np.float64:
        offset = logits.max(axis=1)
        offset[~np.isfinite(offset)] = 0
        with np.errstate(over="ignore"):  # so far below the largest, a class has no probability
            logits = logits - offset[:, None]
            return np.ascontiguousarray(logits, np.float32), offset
    return np.ascontiguousarray(logits, np.float32), offset


def _largest(values: Array, kept: int) -> Array:
    """The classes of the largest, in their order."""
    rows, classes = values.shape
    least = np.partition(values, classes - kept, axis=1)[:, classes - kept]
    at_least = values >= least[:, None]
    counts = at_least.sum(axis=1)
    ids = np.zeros((rows, kept), np.int64)
    plain = counts == kept
    ids[plain] = np.flatnonzero(at_least[plain]).reshape(-1, kept) % classes
    for row in np.flatnonzero(~plain):  # several classes are as large as the least that is kept
        candidates = np.flatnonzero(at_least[row])
        best = candidates[np.argsort(-values[row, candidates], kind="stable")[:kept]]
        ids[row, : len(best)] = np.sort(best)
    order = np.argsort(-np.take_along_axis(values, ids, axis=1), axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1)
