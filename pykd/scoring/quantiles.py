"""Exact order statistics of any number of float32 values in a few hundred kilobytes, by counting.

Floats are mapped to whole numbers of the same order. A first pass counts their upper 16 bits; the counts say in which of
the 65,536 buckets each wanted value lies. Two more passes count 8 bits each within those buckets alone, which leaves the
value itself. Nothing is sampled, sketched or rounded, and the order of the values does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Stream = Callable[[], Iterable[Array]]  # the same blocks of float32 at each call


def order_statistics(stream: Stream, ranks: Sequence[int]) -> Array:
    """The values at those places, from 0, of the sorted values."""
    places = np.asarray(ranks, np.int64)
    if not len(places):
        return np.empty(0, np.float32)
    counts = np.zeros(1 << 16, np.int64)
    for block in stream():
        counts += np.bincount(_keys(block) >> np.uint32(16), minlength=1 << 16)
    if places.min() < 0 or places.max() >= counts.sum():
        raise ValueError(f"expected places from 0 to {counts.sum() - 1}, got {places.min()} to {places.max()}")
    known, places = _descend(counts[None], np.zeros(len(places), np.int64), places)
    for shift in (8, 0):
        prefixes, slot_of = np.unique(known, return_inverse=True)  # the buckets that are looked into
        counts = np.zeros((len(prefixes), 256), np.int64)
        for block in stream():
            keys = _keys(block)
            upper = (keys >> np.uint32(shift + 8)).astype(np.int64)
            slots = np.minimum(np.searchsorted(prefixes, upper), len(prefixes) - 1)
            inside = prefixes[slots] == upper
            digits = (keys[inside] >> np.uint32(shift)) & np.uint32(255)
            counts += np.bincount(slots[inside] * 256 + digits, minlength=counts.size).reshape(counts.shape)
        digit, places = _descend(counts, slot_of, places)
        known = known * 256 + digit
    return _values(known.astype(np.uint32))


def quantiles(stream: Stream, count: int, shares: Sequence[float]) -> list[float]:
    """NumPy's default quantiles (linear between order statistics) of ``count`` values."""
    exact = [share * (count - 1) for share in shares]
    ends = sorted({place for e in exact for place in (math.floor(e), math.ceil(e))})
    value = dict(zip(ends, map(float, order_statistics(stream, ends)), strict=True))
    return [value[math.floor(e)] + (value[math.ceil(e)] - value[math.floor(e)]) * (e - math.floor(e)) for e in exact]


def _descend(counts: Array, slots: Array, places: Array) -> tuple[Array, Array]:
    """For each place among the values of its slot: the bucket it lies in, and its place there."""
    before = np.zeros((counts.shape[0], counts.shape[1] + 1), np.int64)
    np.cumsum(counts, axis=1, out=before[:, 1:])
    buckets = np.array(
        [np.searchsorted(before[slot, 1:], place, side="right") for slot, place in zip(slots, places, strict=True)],
        np.int64,
    )
    return buckets, places - before[slots, buckets]


def _keys(values: Array) -> Array:
    """Whole numbers from 0 in the order of the values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    negative = bits >> np.uint32(31) != 0
    return np.where(negative, ~bits, bits | np.uint32(1 << 31))


def _values(keys: Array) -> Array:
    positive = keys >> np.uint32(31) != 0
    return np.where(positive, keys & np.uint32((1 << 31) - 1), ~keys).astype(np.uint32).view(np.float32)
