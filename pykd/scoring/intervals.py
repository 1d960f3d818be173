"""95 % intervals from sums over batches of rows.

Rows of one group (a document, a user) resemble each other, so the variance is taken between groups. Each group is one batch,
or, where there are more than 1,024, falls into one of 1,024 batches by its hash: batches are as independent as groups, and
what is held in memory does not grow with their number. Rows without a group are groups of their own.

Means are ratios of two sums, whose variance is linearised, with Student's t on the batches; shares take Wilson's interval at
the number of independent rows that would have the same variance, with Student's t on as many batches as tell that variance; a quantile takes the order statistics at the ends of the
interval of its share (Woodruff 1952), with the skewness of the binomial distribution (Cornish and Fisher). Of the difference of two quantiles of the same rows
:func:`quantile_difference_interval` says how.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import Any

import numpy as np

BATCHES = 1024
LEVEL = 0.95
_TIMES = 4  # the noise of a turn of the course: smaller ones are none
_LEAST_BEND = 0.3  # of the reach: nearer, a slope to either side is noise
_FEWEST = 3  # independent rows beyond a quantile, on average, of which fewer than one sample in forty has none
Array = np.ndarray[Any, Any]
Interval = list[float | None] | None  # None: cannot be told; an end that is None: no row lies beyond it


def mean_interval(totals: Array, counts: Array) -> Interval:
    """Of Σ totals / Σ counts, given both per batch."""
    batches = int((counts > 0).sum())
    if batches < 2:
        return None
    mean = float(totals.sum() / counts.sum())
    half = student_t(batches - 1) * math.sqrt(variance(totals, counts))
    return [mean - half, mean + half]


def variance(totals: Array, counts: Array) -> float:
    """Of Σ totals / Σ counts, between batches."""
    batches = int((counts > 0).sum())
    rest = totals - totals.sum() / counts.sum() * counts
    return float((rest * rest).sum()) * batches / (batches - 1) / float(counts.sum()) ** 2


def share_interval(hits: Array, counts: Array, grouped: bool) -> Interval:
    """Of a share Σ hits / Σ counts: Wilson's."""
    batches = int((counts > 0).sum())
    if batches < 2:
        return None
    share, rows = float(hits.sum() / counts.sum()), float(counts.sum())
    return list(_wilson(share, *_worth(share, rows, hits, counts, grouped)))


def quantile_places(share: float, below: Array, counts: Array, grouped: bool) -> tuple[int | None, int | None]:
    """Places, from 0, of the order statistics that enclose the quantile; ``below``: rows of each batch up to it."""
    batches, rows = int((counts > 0).sum()), int(counts.sum())
    if batches < 2:
        return None, None
    worth, errors = _worth(share, float(rows), below, counts, grouped)
    # The share itself is known, unlike that of an agreement: how many rows fall below it is binomial, and skewed in the tails.
    half = errors * math.sqrt(share * (1 - share) / worth)
    skew = (errors * errors - 1) * (1 - 2 * share) / (6 * worth)
    first = math.floor(min(share - half + skew, share) * rows) - 1
    last = math.ceil(max(share + half + skew, share) * rows)
    return (
        None if first < 0 or worth * share < _FEWEST else first,
        None if last >= rows or worth * (1 - share) < _FEWEST else last,
    )


def quantile_difference_interval(
    place: float, places: Array, at: Array, values: Array, upto_at: Array, upto: Array, counts: Array
) -> Interval:
    """Of the quantile of a second score minus that of a first one, of the same rows.

    A quantile moves by its slope times what the share of rows below it moves by. Two shares of the same rows move together,
    and the difference goes along its own course from place to place; and they move apart, by the rows that are below
    one quantile and not below the other, and the difference goes by the slopes of both. Moves of either kind hardly tell anything of
    the other, so that their lengths add up by their squares.

    How far the shares move apart is taken at all of the places, not at the quantile alone: scores that are nearly the
    same change order too seldom to tell it at one. Where they do not even change order from one row to the next, what is
    left is how the difference varies from place to place. Of its course, what moves apart make of it is taken off: it would count twice.

    Scores of which many are equal have quantiles that stay or jump: of those, all differences are taken that both kinds of moves reach.

    Args:
        place: of the quantile among the sorted rows, from 0; not whole as a rule.
        places: ``(n,)`` whole ones around it, ascending, from one end of the interval of its share to the other.
        at: both quantiles.
        values: ``(2, n)`` both scores at those places.
        upto_at: ``(2, batches)`` rows up to the quantile.
        upto: ``(2, n, batches)`` rows up to those values.
        counts: rows per batch.
    """
    batches, rows = int((counts > 0).sum()), float(counts.sum())
    if batches < 2:
        return None
    errors = student_t(batches - 1)
    reach = (places[-1] - places[0]) / 2 / rows  # of the share, to either side
    x = (places - place) / rows / reach
    level, rise = _fit(x, 1)
    parabola = _fit(x, 2)
    bend = parabola[2]

    apart = upto[1] - upto[0]
    difference = float(at[1] - at[0])
    step = errors * math.sqrt(max(float(level @ [variance(each, counts) for each in apart]), 0)) / reach / 2
    if 2 * min(len(np.unique(side)) for side in values) <= len(places):  # steps: of these no slope tells the next
        reached = np.abs(x - x[:, None]) <= 2 * step + x[1] - x[0]
        pairs = (values[1] - values[0][:, None])[reached]
        return [min(difference, float(pairs.min())), max(difference, float(pairs.max()))]
    # Slopes at the quantile, per reach; of steps that go as far as the places do, from end to end.
    far = min(step, 1)
    slopes = (1 - far) * (values @ rise) + far * (values[:, -1] - values[:, 0]) / 2
    bent = max(far, _LEAST_BEND) * (values @ bend)
    falling, rising = np.maximum(slopes - bent, 0), np.maximum(slopes + bent, 0)
    swaps = step * np.array([falling[1] + rising[0], rising[1] + falling[0]])  # down, up

    whole = float(np.mean([variance(each, counts) for each in upto_at]))
    joint = math.sqrt(min(variance(upto_at.mean(axis=0), counts) / whole, 1)) if whole > 0 else 1.0
    gaps = values[1] - values[0]
    noise = float(slopes.mean() / reach) ** 2

    def square(weights: Array, times: int = 1) -> float:  # of a part of the course, without noise; below 0 by chance
        return float(weights @ gaps) ** 2 - times * noise * variance(weights @ apart, counts)

    tilt, curve = joint * rise, joint**2 * bend
    spare = square(tilt)
    along = math.copysign(math.sqrt(max(spare, 0)), tilt @ gaps)
    turn = math.copysign(math.sqrt(max(square(curve, _TIMES), 0)), curve @ gaps)
    course = np.array([max(0.0, along - turn, -along - turn), max(0.0, along + turn, turn - along)])

    scatter = errors**2 * _scatter(parabola, x, gaps)
    down, up = np.sqrt(np.maximum(course**2 + swaps**2 + min(spare, 0), scatter))
    return [difference - float(down), difference + float(up)]


def _fit(x: Array, degree: int) -> Array:
    """What the coefficients of the polynomial of least squares, from the lowest on, are of the values at x."""
    return np.asarray(np.linalg.pinv(np.vander(x, degree + 1, increasing=True)))


def _scatter(fit: Array, x: Array, values: Array) -> float:
    """Variance of values about the polynomial through them."""
    rest = values - np.vander(x, len(fit), increasing=True) @ (fit @ values)
    return float(rest @ rest) / max(len(x) - len(fit), 1)


def _worth(share: float, rows: float, hits: Array, counts: Array, grouped: bool) -> tuple[float, float]:
    """How many independent rows tell as much of a share, and how many standard errors reach to the ends."""
    if not grouped:
        return rows, student_t(math.inf)
    batches = int((counts > 0).sum())
    spread = variance(hits, counts)
    worth = share * (1 - share) / spread if spread > 0 else float(batches)
    return min(worth, rows), student_t(_freedom(hits, counts, batches))


def _freedom(hits: Array, counts: Array, batches: int) -> int:
    """Degrees of freedom of a share's variance, by the fourth moment (Satterthwaite): few, where few batches have what is rare."""
    rest = hits - hits.sum() / counts.sum() * counts
    squares, fourth = float((rest**2).sum()), float((rest**4).sum())
    spread = fourth - squares**2 / batches
    freedom = 2 * squares**2 / spread if spread > 0 else math.inf
    return max(1, int(min(freedom, batches - 1)))


def _wilson(share: float, rows: float, errors: float) -> tuple[float, float]:
    squared = errors * errors
    middle = (share + squared / (2 * rows)) / (1 + squared / rows)
    half = errors / (1 + squared / rows) * math.sqrt(share * (1 - share) / rows + squared / (4 * rows * rows))
    # Of 0 and 1 the share is an end, which rounding must not move.
    return max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)


@functools.cache
def student_t(freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    if freedom > 10_000:
        return NormalDist().inv_cdf((1 + LEVEL) / 2)
    low, high = 1.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, int(freedom)) < LEVEL else (low, middle)
    return (low + high) / 2


def t_within(t: float, freedom: int) -> float:
    """P(|T| < t) for a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    squared = math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(freedom // 2):
        total += term
        term *= squared * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)


def bootstrap_weights(batches: int, seed: int, repeats: int = 1000) -> Array:
    """How often each batch is drawn, ``(repeats, batches)``."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.multinomial(batches, np.full(batches, 1 / batches), size=repeats).astype(np.float64)


def calibration_errors(gaps: Array, counts: Array, weights: Array) -> tuple[float, Array, Array]:
    """Σ |Σ (confidence − right)| / rows over bins: the value, that of each bootstrap repeat, and what the repeats would give if the truth were 0.

    Args:
        gaps: Σ (confidence − right), ``(bins, batches)``.
        counts: rows per batch.
        weights: of :func:`bootstrap_weights`.
    """
    rows = (weights * counts).sum(axis=1)
    repeats, without = np.zeros(len(weights)), np.zeros(len(weights))
    for gap in gaps:
        drawn = (weights * gap).sum(axis=1)
        repeats += np.abs(drawn)
        without += np.abs(drawn - gap.sum())
    return float(np.abs(gaps.sum(axis=1)).sum() / counts.sum()), repeats / rows, without / rows


def bootstrap_interval(value: float, repeats: Array) -> tuple[float, float]:
    """Covers the percentile interval and the basic one.

    Sums of absolute values are too large by noise, and those of the repeats twice. Either interval alone misses the truth, on
    opposite sides, where noise and truth are of one size.
    """
    low, high = (float(end) for end in np.quantile(repeats, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return min(low, 2 * value - high), max(high, 2 * value - low)


def calibration_interval(value: float, repeats: Array, without: Array) -> tuple[float, float]:
    """Of a calibration error: from 0 on where noise alone would give as much."""
    low, high = bootstrap_interval(value, repeats)
    return (0.0 if value <= np.quantile(without, LEVEL) else max(low, 0.0)), high


class Batches:
    """The batch of each row."""

    def __init__(self, rows: int, groups: Array | None, seed: int) -> None:
        """``groups``: their names where there are at most :data:`BATCHES`; None: rows or groups fall by hash."""
        self.rows = rows
        self.groups = groups
        self.count = len(groups) if groups is not None else min(BATCHES, max(rows, 1))
        self._seed = np.uint64(seed)

    def of(self, row: Array, group: Array | None) -> Array:
        """The batch of rows, given their numbers and groups."""
        if group is not None and self.groups is not None:
            return np.searchsorted(self.groups, group)
        if group is None:
            if self.rows <= BATCHES:
                return np.asarray(row, np.int64)
            return self._hashed(row.astype(np.uint64))
        if group.dtype.kind in "iu":
            return self._hashed(group.astype(np.uint64))
        names, which = np.unique(group.astype(np.str_), return_inverse=True)
        return self._hashed(np.array([_of_text(name) for name in names.tolist()], np.uint64))[which]

    def _hashed(self, number: Array) -> Array:
        """splitmix64."""
        with np.errstate(over="ignore"):
            mixed = number + np.uint64(0x9E3779B97F4A7C15) * (self._seed + np.uint64(1))
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
        return np.asarray(mixed % np.uint64(self.count), np.int64)


def groups_of(scores: Any) -> Array | None:
    """The names of the groups in a file of scores, sorted, where they are few enough to be a batch each."""
    names: set[Any] = set()
    for block in scores.blocks("group"):
        names.update(np.unique(block["group"]).tolist())
        if len(names) > BATCHES:
            return None
    return np.array(sorted(names))


def _of_text(text: str) -> int:
    """FNV-1a, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in text.encode("utf-8", "surrogatepass"):
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value
