"""Two files of scores of the same rows: what changed from the first to the second, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import NormalDist
from typing import Any

import numpy as np

from pykd.scoring.intervals import (
    Batches,
    groups_of,
    mean_interval,
    quantile_difference_interval,
    quantile_places,
    student_t,
    t_within,
    variance,
)
from pykd.scoring.quantiles import Stream, order_statistics, quantiles
from pykd.scoring.results import Scores
from pykd.scoring.row_scores import OK
from pykd.scoring.statistics import SHARES, quantile_name, score_names

Array = np.ndarray[Any, Any]
_POWER = 0.8  # with which the smallest difference is seen
_MOST_EXACT = 100_000  # rows of which McNemar's test is summed up
_NEAR = 33  # places around a quantile that are looked at
_KEPT_ROWS = 1 << 21  # of files whose columns are kept between the passes
_Pair = tuple[dict[str, Array], dict[str, Array], Array]


def compare(first: Scores, second: Scores, seed: int = 0) -> dict[str, Any]:
    """Differences (second − first) of every score that both have, over the rows that count in both.

    Each has the difference of the means, its 95 % interval, the same in standard deviations of the rows' differences, the p-value of no difference,
    and the smallest difference that so many rows would show in four samples of five. Its quantiles have the difference (of the quantiles, not the
    quantile of the rows' differences) and an interval. Shares (agreement, accuracy) have how many rows changed each way, and
    where rows are independent the p-value is McNemar's exact one.
    """
    if first.rows != second.rows:
        raise ValueError(
            f"expected scores of the same rows, got {first.rows} in {first.path} and {second.rows} in {second.path}; score the "
            "same files of rows"
        )
    return _Comparison(first, second, seed).report()


class _Comparison:
    def __init__(self, first: Scores, second: Scores, seed: int) -> None:
        self.sides = first, second
        self.grouped = first.has_group
        self.batches = Batches(first.rows, groups_of(first) if self.grouped else None, seed)
        self.seed = seed
        self.kept: dict[tuple[str, ...], list[_Pair]] = {}

    def blocks(self, *names: str) -> Iterator[_Pair]:
        """Columns of both sides where both count, and the batches."""
        if self.sides[0].rows > _KEPT_ROWS:
            yield from self._read(*names)
            return
        if names not in self.kept:
            self.kept = {names: list(self._read(*names))}  # one set of columns at a time
        yield from self.kept[names]

    def _read(self, *names: str) -> Iterator[_Pair]:
        group = ["group"] if self.grouped else []
        for a, b in zip(
            self.sides[0].blocks(*names, *group, bad=True), self.sides[1].blocks(*names, bad=True), strict=True
        ):
            kept = (a["status"] == OK) & (b["status"] == OK)
            batch = self.batches.of(a["row"][kept], a["group"][kept] if group else None)
            yield {n: a[n][kept] for n in names}, {n: b[n][kept] for n in names}, batch

    def report(self) -> dict[str, Any]:
        first, second = self.sides
        both = np.zeros(2, np.int64)
        for a, b in zip(first.blocks(bad=True), second.blocks(bad=True), strict=True):
            both += int(((a["status"] == OK) & (b["status"] == OK)).sum()), len(a["status"])
        paired, rows = map(int, both)
        differing = _differing(first, second)
        report: dict[str, Any] = {
            "first": str(first.path),
            "second": str(second.path),
            "rows": rows,
            "paired": paired,
            "independent": "groups" if self.grouped else "rows",
            "same_teacher": "teacher" not in differing,
            "settings_that_differ": differing,
            "losses": [name for name in first.facts["losses"] if name in second.facts["losses"]],
            "seed": self.seed,
        }
        names = [name for name in score_names(first) if name in score_names(second)] if paired else []
        report["scores"] = {name: self._score(name) for name in names}
        report["shares"] = {}
        if paired:
            report["shares"]["agreement"] = self._share(
                "teacher_class_rank", lambda block: block["teacher_class_rank"] == 1
            )
            if "label" in first.names and "label" in second.names:
                accuracy = self._share("student_class", lambda b: b["student_class"] == b["label"], "label")
                report["shares"]["accuracy"] = accuracy
        return report

    def _sums(self, of: Any, *names: str) -> tuple[Array, Array, float, float]:
        """Σ difference and rows per batch, Σ difference², and Σ of the first side."""
        totals, counts = np.zeros(self.batches.count), np.zeros(self.batches.count)
        squares = before = 0.0
        for a, b, batch in self.blocks(*names):
            was = of(a).astype(np.float64)
            difference = of(b).astype(np.float64) - was
            totals += np.bincount(batch, difference, self.batches.count)
            counts += np.bincount(batch, minlength=self.batches.count)
            squares += float((difference * difference).sum())
            before += float(was.sum())
        return totals, counts, squares, before

    def _entry(self, totals: Array, counts: Array, squares: float, before: float) -> dict[str, Any]:
        count = int(counts.sum())
        batches = int((counts > 0).sum())
        difference = float(totals.sum()) / count
        spread = math.sqrt(max(squares / count - difference**2, 0) * count / (count - 1)) if count > 1 else 0.0
        entry: dict[str, Any] = {
            "first": before / count,
            "second": before / count + difference,
            "difference": difference,
            "interval": mean_interval(totals, counts),
            "standard_deviations": difference / spread if spread > 0 else None,
            "p_value": None,
            "smallest_seen": None,
            "count": count,
        }
        if batches > 1:
            error = math.sqrt(variance(totals, counts))
            entry["smallest_seen"] = (student_t(batches - 1) + NormalDist().inv_cdf(_POWER)) * error
            entry["p_value"] = (
                max(1 - t_within(abs(difference) / error, batches - 1), 0.0) if error > 0 else 1.0 - bool(difference)
            )
        return entry

    def _score(self, name: str) -> dict[str, Any]:
        totals, counts, *rest = self._sums(lambda block: block[name], name)
        return self._entry(totals, counts, *rest) | {"quantiles": self._quantiles(name, counts)}

    def _quantiles(self, name: str, counts: Array) -> dict[str, dict[str, Any]]:
        """The difference of each quantile, and its interval: none where an end of either side's own is left open."""
        rows, batches = int(counts.sum()), self.batches.count

        def side(number: int) -> Iterator[tuple[Array, Array]]:
            return ((pair[number][name].astype(np.float64), pair[2]) for pair in self.blocks(name))

        def stream(number: int) -> Stream:
            return lambda: (pair[number][name] for pair in self.blocks(name))

        at = np.array([quantiles(stream(number), rows, SHARES) for number in range(2)])
        upto_at = np.stack([_upto(side(number), at[number], batches) for number in range(2)])
        near = [self._near(share, upto_at[:, i], counts) for i, share in enumerate(SHARES)]
        places = np.concatenate(near)
        values = np.stack([order_statistics(stream(number), places.tolist()) for number in range(2)]).astype(np.float64)
        upto = np.stack([_upto(side(number), values[number], batches) for number in range(2)])
        ends = np.cumsum([0, *map(len, near)])
        entries = {}
        for i, share in enumerate(SHARES):
            part = slice(ends[i], ends[i + 1])
            entries[quantile_name(share)] = {
                "first": float(at[0, i]),
                "second": float(at[1, i]),
                "difference": float(at[1, i] - at[0, i]),
                "interval": quantile_difference_interval(
                    share * (rows - 1), near[i], at[:, i], values[:, part], upto_at[:, i], upto[:, part], counts
                )
                if len(near[i])
                else None,
            }
        return entries

    def _near(self, share: float, upto: Array, counts: Array) -> Array:
        """Places that enclose the quantile of both sides, and some between them; none where an end is open."""
        ends = [quantile_places(share, each, counts, self.grouped) for each in upto]
        firsts, lasts = zip(*ends, strict=True)
        if None in firsts or None in lasts:
            return np.empty(0, np.int64)
        return np.unique(np.linspace(min(firsts), max(lasts), _NEAR).round().astype(np.int64))

    def _share(self, name: str, holds: Any, *more: str) -> dict[str, Any]:
        totals, counts, squares, before = self._sums(holds, name, *more)
        entry = self._entry(totals, counts, squares, before)
        change = round(float(totals.sum()))
        gained = (round(squares) + change) // 2
        lost = round(squares) - gained
        entry |= {"gained": gained, "lost": lost}
        if not self.grouped:
            entry["p_value"] = mcnemar(gained, lost)
        return entry


def _upto(blocks: Iterable[tuple[Array, Array]], levels: Array, batches: int) -> Array:
    """How many rows of each batch are up to each level, ``(levels, batches)``."""
    ascending = np.unique(levels)
    found = np.zeros((len(ascending) + 1) * batches)
    for values, batch in blocks:
        found += np.bincount(np.searchsorted(ascending, values) * batches + batch, minlength=len(found))
    upto = np.cumsum(found.reshape(-1, batches)[:-1], axis=0)
    return np.asarray(upto[np.searchsorted(ascending, levels)])


def _differing(*sides: Scores) -> list[str]:
    """What else is not the same of two files of scores than the student."""
    said: list[dict[str, Any]] = []
    for scores in sides:
        settings = scores.facts["settings"]
        losses = dict(zip(scores.facts["losses"], settings.get("losses", ()), strict=False))
        exported = any(isinstance(loss, dict) for loss in losses.values())
        temperature = scores.facts["temperature"]
        said.append(
            {
                **{name: settings["files"][name] for name in ("teacher", "labels") if name in settings["files"]},
                "temperature": 1.0 if temperature is None and not exported else temperature,
                "classes": scores.facts["classes"],
                **{f"loss {name}": loss for name, loss in losses.items()},
            }
        )
    first, second = said
    return sorted(name for name in first.keys() & second.keys() if first[name] != second[name])


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p-value that rows change either way alike: exact, and beyond 100,000 changes the normal one."""
    count, few = gained + lost, min(gained, lost)
    if count == 0:
        return 1.0
    if count > _MOST_EXACT:
        return 2 * NormalDist().cdf((few + 0.5 - count / 2) / math.sqrt(count / 4)) if few * 2 < count else 1.0
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(few + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def numbers_of_comparison(report: dict[str, Any]) -> dict[str, float | None]:
    """What a condition can name: ``kl.difference``, ``kl.difference.low``, ``kl.p99.difference``, ``agreement.p_value``, …"""
    numbers: dict[str, float | None] = {"rows": report["rows"], "paired": report["paired"]}
    for name, entry in {**report["scores"], **report["shares"]}.items():
        low, high = entry["interval"] or (None, None)
        numbers |= {f"{name}.difference.low": low, f"{name}.difference.high": high}
        for fact in ("difference", "standard_deviations", "p_value", "smallest_seen", "gained", "lost"):
            if fact in entry:
                numbers[f"{name}.{fact}"] = entry[fact]
        for share, quantile in entry.get("quantiles", {}).items():
            low, high = quantile["interval"] or (None, None)
            title = f"{name}.{share}.difference"
            numbers |= {title: quantile["difference"], f"{title}.low": low, f"{title}.high": high}
    return numbers
