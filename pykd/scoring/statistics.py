"""The numbers of a report, from the file of scores alone.

They are computed in the order of the rows on one thread, whatever the number of threads that scored them: the same file and
seed give the same bits. What is held does not grow with the number of rows, but for files of up to two million rows, whose
columns are kept between the passes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pykd.scoring import quantiles
from pykd.scoring.intervals import (
    Batches,
    Interval,
    bootstrap_interval,
    bootstrap_weights,
    calibration_errors,
    calibration_interval,
    groups_of,
    mean_interval,
    quantile_places,
    share_interval,
)
from pykd.scoring.results import Scores
from pykd.scoring.row_scores import OK, STATUSES

SHARES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
AGREEMENT = (1, 5)  # the teacher's best class is among that many best of the student
CONFIDENCE_BINS = 10
CALIBRATION_BINS = 15
SEGMENTS = 48  # of the file, for its course
HISTOGRAM_BINS = 60
MOST_CLASSES = 100
_KEPT_ROWS = 1 << 21

Array = np.ndarray[Any, Any]


def quantile_name(share: float) -> str:
    """``p99.9`` of 0.999."""
    return f"p{100 * share:.10g}"


def score_names(scores: Scores) -> list[str]:
    """The columns that are scores: numbers with a mean."""
    others = ("row", "status", "teacher_class", "student_class", "teacher_class_rank", "label", "group")
    return [name for name in scores.names if name not in others]


def summary(scores: Scores, seed: int = 0, worst: int = 100) -> dict[str, Any]:
    """Everything that is said of a file of scores, as JSON would hold it.

    Args:
        scores: of :func:`pykd.scoring.stream.score_files`.
        seed: of the random numbers of the intervals.
        worst: how many of the rows with the largest first loss are listed.
    """
    return _Summary(scores, seed).report(worst)


class _Summary:
    def __init__(self, scores: Scores, seed: int) -> None:
        self.scores = scores
        self.seed = seed
        self.kept: dict[tuple[str, ...], list[dict[str, Array]]] = {}
        self.loss: str = scores.facts["losses"][0]
        self.statuses = np.zeros(len(STATUSES), np.int64)
        for block in scores.blocks(bad=True):
            self.statuses += np.bincount(block["status"], minlength=len(STATUSES))
        self.count = int(self.statuses[OK])
        self.grouped = scores.has_group
        self.batches = Batches(scores.rows, groups_of(scores) if self.grouped else None, seed)

    def blocks(self, *names: str) -> Iterator[dict[str, Array]]:
        """Columns of the rows that count, with ``"batch"``."""
        if names in self.kept:
            yield from self.kept[names]
            return
        self.kept = {}  # one set of columns at a time
        keep: list[dict[str, Array]] = []
        columns = [*names, "group"] if self.grouped else list(names)
        for block in self.scores.blocks(*columns):
            block["batch"] = self.batches.of(block["row"], block.get("group"))
            block.pop("group", None)
            if self.scores.rows <= _KEPT_ROWS:
                keep.append(block)
            yield block
        if self.scores.rows <= _KEPT_ROWS:
            self.kept = {names: keep}

    def sums(self, *values: Array, batch: Array) -> Array:
        """Sums per batch, ``(values, batches)``."""
        return np.stack([np.bincount(batch, value, self.batches.count) for value in values])

    def report(self, worst: int) -> dict[str, Any]:
        facts = self.scores.facts
        bad = {name: int(count) for name, count in zip(STATUSES, self.statuses, strict=True) if name != "ok"}
        report: dict[str, Any] = {
            "rows": self.scores.rows,
            "counted": self.count,
            "bad_rows": bad,
            "inputs": facts["inputs"],
            "losses": facts["losses"],
            "classes_compared": facts["classes"],
            "temperature": facts["temperature"],
            "left_out": facts.get("left_out", {}),
            "seed": self.seed,
            "independent": "groups" if self.grouped else "rows",
        }
        report["scores"] = {name: self._score(name) for name in score_names(self.scores)}
        if not self.count:
            return report
        report["agreement"] = self._agreement()
        labelled = "label" in self.scores.names
        if labelled:
            report |= self._with_labels()
        report["confidence_bins"] = self._confidence_bins()
        report["by_class"] = self._classes("label" if labelled else "teacher_class")
        report["course"] = self._course()
        report["histogram"] = self._histogram(report["scores"][self.loss])
        report["worst_rows"] = self._worst(worst)
        return report

    def _score(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"count": self.count}
        if not self.count:
            return entry | {"mean": None, "interval": None, "quantiles": {}, "quantile_intervals": {}}
        totals, counts = np.zeros(self.batches.count), np.zeros(self.batches.count)
        squares, least, largest = 0.0, math.inf, -math.inf
        for block in self.blocks(name):
            values = block[name].astype(np.float64)
            if not len(values):
                continue
            total, count = self.sums(values, np.ones(len(values)), batch=block["batch"])
            totals += total
            counts += count
            squares += float((values * values).sum())
            least, largest = min(least, float(values.min())), max(largest, float(values.max()))
        mean = float(totals.sum() / self.count)
        entry |= {"mean": mean, "interval": mean_interval(totals, counts)}
        entry |= {"root_mean_square": math.sqrt(squares / self.count), "minimum": least, "maximum": largest}

        def stream() -> Iterator[Array]:
            return (block[name] for block in self.blocks(name))

        values_at = quantiles.quantiles(stream, self.count, SHARES)
        entry["quantiles"] = dict(zip(map(quantile_name, SHARES), values_at, strict=True))
        entry["quantile_intervals"] = self._quantile_intervals(name, stream, values_at, counts)
        return entry

    def _quantile_intervals(
        self, name: str, stream: Callable[[], Iterator[Array]], values_at: list[float], counts: Array
    ) -> dict[str, Interval]:
        below = np.zeros((len(SHARES), self.batches.count))
        if self.grouped:
            for block in self.blocks(name):
                below += self.sums(*((block[name] <= value).astype(float) for value in values_at), batch=block["batch"])
        ends = [quantile_places(share, below[i], counts, self.grouped) for i, share in enumerate(SHARES)]
        places = sorted({place for end in ends for place in end if place is not None})
        value = dict(zip(places, map(float, quantiles.order_statistics(stream, places)), strict=True))
        return {
            quantile_name(share): None
            if end == (None, None)
            else [None if place is None else value[place] for place in end]
            for share, end in zip(SHARES, ends, strict=True)
        }

    def _share(self, hits: Array, counts: Array) -> dict[str, Any]:
        return {
            "value": float(hits.sum() / counts.sum()),
            "interval": share_interval(hits, counts, self.grouped),
            "count": int(counts.sum()),
        }

    def _agreement(self) -> dict[str, Any]:
        wanted = [k for k in AGREEMENT if k <= self.scores.facts["classes"]]
        total = np.zeros((len(wanted) + 1, self.batches.count))
        for block in self.blocks("teacher_class_rank"):
            rank = block["teacher_class_rank"]
            total += self.sums(*((rank <= k).astype(float) for k in wanted), np.ones(len(rank)), batch=block["batch"])
        return {f"top{k}": self._share(total[i], total[-1]) for i, k in enumerate(wanted)}

    def _with_labels(self) -> dict[str, Any]:
        both = "teacher_nll" in self.scores.names  # a top K of the teacher does not tell it
        columns = ("label", "teacher_class", "student_class", "student_nll", *(["teacher_nll"] if both else []))
        confidences = ("teacher_confidence", "student_confidence")
        right, nll = np.zeros((2, self.batches.count)), np.zeros((3, self.batches.count))
        counts = np.zeros(self.batches.count)
        gaps = np.zeros((2, CALIBRATION_BINS, self.batches.count))  # Σ confidence − right
        for block in self.blocks(*columns, *confidences):
            batch = block["batch"]
            counts += np.bincount(batch, minlength=self.batches.count)
            student = block["student_nll"].astype(float)
            teacher = block["teacher_nll"].astype(float) if both else np.zeros(len(student))
            nll += self.sums(teacher, student, student - teacher, batch=batch)
            for side, name in enumerate(("teacher", "student")):
                hit = (block[f"{name}_class"] == block["label"]).astype(float)
                right[side] += np.bincount(batch, hit, self.batches.count)
                confidence = block[f"{name}_confidence"].astype(float)
                place = _bin(confidence, CALIBRATION_BINS) * self.batches.count + batch
                gaps[side] += np.bincount(place, confidence - hit, gaps[side].size).reshape(gaps[side].shape)
        weights = bootstrap_weights(self.batches.count, self.seed)
        told = int((counts > 0).sum()) > 1
        calibration: dict[str, Any] = {}
        parts = []
        for side, name in enumerate(("teacher", "student")):
            parts.append(calibration_errors(gaps[side], counts, weights))
            ends = list(calibration_interval(*parts[side])) if told else None
            calibration[name] = {"value": parts[side][0], "interval": ends, "count": self.count}
        value = parts[1][0] - parts[0][0]
        ends = list(bootstrap_interval(value, parts[1][1] - parts[0][1])) if told else None
        calibration["student_minus_teacher"] = {"value": value, "interval": ends, "count": self.count}

        def perplexity(total: Array) -> dict[str, Any]:
            ends = mean_interval(total, counts)
            raised = None if ends is None else [_exp(e) for e in ends]
            return {"value": _exp(total.sum() / self.count), "interval": raised, "count": self.count}

        return {
            "accuracy": {name: self._share(right[i], counts) for i, name in enumerate(("teacher", "student"))},
            "perplexity": {
                name: perplexity(nll[i])
                for i, name in enumerate(("teacher", "student", "student_over_teacher"))
                if both or name == "student"
            },
            "calibration_error": calibration,
        }

    def _confidence_bins(self) -> list[dict[str, Any]]:
        shape = (3, CONFIDENCE_BINS, self.batches.count)
        total = np.zeros(shape)  # loss, agreement, rows
        for block in self.blocks(self.loss, "teacher_confidence", "teacher_class_rank"):
            place = _bin(block["teacher_confidence"], CONFIDENCE_BINS) * self.batches.count + block["batch"]
            parts = (block[self.loss].astype(float), block["teacher_class_rank"] == 1, np.ones(len(place)))
            total += np.stack([np.bincount(place, part, total[0].size) for part in parts]).reshape(shape)
        return [
            {
                "from": i / CONFIDENCE_BINS,
                "to": (i + 1) / CONFIDENCE_BINS,
                "share": float(total[2, i].sum() / self.count),
                **self._part(*total[:, i]),
            }
            for i in range(CONFIDENCE_BINS)
        ]

    def _part(self, loss: Array, agreement: Array, counts: Array) -> dict[str, Any]:
        """What is said of some of the rows."""
        count = int(counts.sum())
        if not count:
            return {"count": 0, "mean": None, "interval": None, "agreement": None, "agreement_interval": None}
        return {
            "count": count,
            "mean": float(loss.sum() / count),
            "interval": mean_interval(loss, counts),
            "agreement": float(agreement.sum() / count),
            "agreement_interval": share_interval(agreement, counts, self.grouped),
        }

    def _classes(self, by: str) -> dict[str, Any]:
        """By label, or by the teacher's best class: those that add most to the mean."""
        classes = self.scores.facts["classes"]
        sums, counts = np.zeros(classes), np.zeros(classes, np.int64)
        columns = (self.loss, "teacher_class_rank", by)
        for block in self.blocks(*columns):
            sums += np.bincount(block[by], block[self.loss], classes)
            counts += np.bincount(block[by], minlength=classes)
        there = np.flatnonzero(counts)
        listed = there[np.argsort(-sums[there], kind="stable")][:MOST_CLASSES]
        place_of = np.full(classes, -1)
        place_of[listed] = np.arange(len(listed))
        shape = (3, len(listed), self.batches.count)
        total = np.zeros(shape)
        for block in self.blocks(*columns):
            place = place_of[block[by]]
            inside = place >= 0
            place = place[inside] * self.batches.count + block["batch"][inside]
            parts = (
                block[self.loss][inside].astype(float),
                block["teacher_class_rank"][inside] == 1,
                np.ones(len(place)),
            )
            total += np.stack([np.bincount(place, part, total[0].size) for part in parts]).reshape(shape)
        return {
            "by": by,
            "present": len(there),
            "classes": [{"class": int(c), **self._part(*total[:, i])} for i, c in enumerate(listed)],
        }

    def _course(self) -> list[dict[str, Any]]:
        """The first loss along the file."""
        segments = min(SEGMENTS, self.scores.rows)
        course, waiting = [], [np.empty(0, np.float32)]
        at = 0

        def close() -> None:
            values = np.concatenate(waiting)
            ends = [at * self.scores.rows // segments, (at + 1) * self.scores.rows // segments]
            entry: dict[str, Any] = {"first_row": ends[0], "last_row": ends[1] - 1, "count": len(values)}
            entry["mean"] = float(values.mean(dtype=np.float64)) if len(values) else None
            middle = np.quantile(values.astype(np.float64), (0.5, 0.9, 0.99)).tolist() if len(values) else [None] * 3
            course.append(entry | dict(zip(("p50", "p90", "p99"), middle, strict=True)))

        starts = np.arange(1, segments + 1) * self.scores.rows // segments
        for block in self.blocks(self.loss):
            segment = np.searchsorted(starts, block["row"], side="right")
            while len(segment):
                if segment[0] > at:
                    close()
                    waiting, at = [np.empty(0, np.float32)], at + 1
                    continue
                upto = int(np.searchsorted(segment, at, side="right"))
                waiting.append(block[self.loss][:upto])
                block = {self.loss: block[self.loss][upto:]}
                segment = segment[upto:]
        while at < segments:
            close()
            waiting, at = [np.empty(0, np.float32)], at + 1
        return course

    def _histogram(self, score: dict[str, Any]) -> dict[str, Any]:
        """Of the first loss; on a logarithmic axis where it spans more than two decades."""
        low, high = score["quantiles"]["p0.1"], score["maximum"]
        logarithmic = bool(score["minimum"] >= 0 and high > 100 * max(low, 1e-12))
        if logarithmic:
            edges = np.geomspace(max(low, high * 1e-8), high, HISTOGRAM_BINS + 1)
        else:
            low = score["minimum"]
            edges = np.linspace(low, high if high > low else low + 1, HISTOGRAM_BINS + 1)
        edges = edges.astype(np.float64)
        counts = np.zeros(HISTOGRAM_BINS, np.int64)
        for block in self.blocks(self.loss):
            place = np.searchsorted(edges, block[self.loss].astype(np.float64), side="right") - 1
            counts += np.bincount(np.clip(place, 0, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)
        return {"score": self.loss, "logarithmic": logarithmic, "edges": edges.tolist(), "counts": counts.tolist()}

    def _worst(self, count: int) -> list[dict[str, Any]]:
        """The rows with the largest first loss; of equals the first in the file."""
        names = [n for n in self.scores.names if n not in ("row", "status", "group")]
        kept: list[tuple[float, int, dict[str, Any]]] = []
        for block in self.blocks(*names):
            values = block[self.loss]
            few = np.argsort(-values, kind="stable")[:count] if len(values) > count else np.arange(len(values))
            for i in few:
                entry = {name: block[name][i].item() for name in ("row", *names)}
                item = (float(values[i]), -int(block["row"][i]), entry)
                if len(kept) < count:
                    heapq.heappush(kept, item)
                elif count and item[:2] > kept[0][:2]:
                    heapq.heapreplace(kept, item)
        return [entry for _, _, entry in sorted(kept, key=lambda item: item[:2], reverse=True)]


def _bin(share: Array, bins: int) -> Array:
    """The bin, from 0, of shares from 0 to 1."""
    return np.clip((np.asarray(share, np.float64) * bins).astype(np.int64), 0, bins - 1)


def _exp(exponent: float | None) -> float | None:
    """None of None, and of what float64 cannot hold."""
    try:
        return None if exponent is None else math.exp(exponent)
    except OverflowError:
        return None
