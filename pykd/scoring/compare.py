"""Two files of scores of the same rows: what changed from the first to the second, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

import numpy as np

from pykd.scoring.intervals import Batches, groups_of, mean_interval, student_t, t_within, variance
from pykd.scoring.results import Scores
from pykd.scoring.row_scores import OK
from pykd.scoring.statistics import score_names

Array = np.ndarray[Any, Any]
_POWER = 0.8  # with which the smallest difference is seen
_MOST_EXACT = 100_000  # rows of which McNemar's test is summed up


def compare(first: Scores, second: Scores, seed: int = 0) -> dict[str, Any]:
    """Differences (second − first) of every score that both have, over the rows that count in both.

    Each has the difference of the means, its 95 % interval, the same in standard deviations of the rows' differences, the p-value of no difference,
    and the smallest difference that so many rows would show in four samples of five. Shares (agreement, accuracy) have how many rows changed each way, and
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

    def blocks(self, *names: str) -> Iterator[tuple[dict[str, Array], dict[str, Array], Array]]:
        """Columns of both sides where both count, and the batches."""
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
        report: dict[str, Any] = {
            "first": str(first.path),
            "second": str(second.path),
            "rows": rows,
            "paired": paired,
            "independent": "groups" if self.grouped else "rows",
            "same_teacher": _teacher(first) == _teacher(second),
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
        return self._entry(*self._sums(lambda block: block[name], name))

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


def _teacher(scores: Scores) -> Any:
    return scores.facts["settings"]["files"]["teacher"]


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
    """What a condition can name: ``kl.difference``, ``kl.difference.low``, ``agreement.p_value``, …"""
    numbers: dict[str, float | None] = {"rows": report["rows"], "paired": report["paired"]}
    for name, entry in {**report["scores"], **report["shares"]}.items():
        low, high = entry["interval"] or (None, None)
        numbers |= {f"{name}.difference.low": low, f"{name}.difference.high": high}
        for fact in ("difference", "standard_deviations", "p_value", "smallest_seen", "gained", "lost"):
            if fact in entry:
                numbers[f"{name}.{fact}"] = entry[fact]
    return numbers
