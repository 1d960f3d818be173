"""What is said of each row where of the teacher only the most probable classes are known, and the mass of all others.

The classes outside the top K are joined to one, for the teacher and for the student alike. Joining classes never makes a
divergence larger (the data processing inequality; for the cross entropy because each q is at most the student's mass of all of them), so
every loss is a lower bound of that of all classes, and is named so.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pykd.scoring.formats.source import ROW_KINDS, Block, Source
from pykd.scoring.row_scores import (
    IGNORED,
    IGNORED_LABEL,
    LABEL_OUT_OF_RANGE,
    LOSSES,
    MISSING,
    OK,
    RAGGED,
    STATUSES,
    why,
)
from pykd.scoring.top_k import log_masses, log_sum, narrow

Array = np.ndarray[Any, Any]
BOUND = "_lower_bound"


class TopKScores:
    """As :class:`pykd.scoring.row_scores.RowScores`, for a teacher of which the top K is known.

    Args:
        losses: names of :data:`pykd.scoring.row_scores.LOSSES`; as scores they have ``_lower_bound`` behind them.
        temperature: of the losses; one at which the mass of the other classes is in the file.
        teacher: the source.
        labels: whether there are any.
        cut: whether the student has more classes than the teacher; its others are cut off.
    """

    def __init__(
        self, losses: tuple[str, ...], temperature: float | None, teacher: Source, labels: bool, cut: bool
    ) -> None:
        for loss in losses:
            if loss not in LOSSES:
                raise ValueError(
                    f"expected losses of {', '.join(LOSSES)} with a teacher of which the top K is known, got {loss}; leave it out"
                )
        self.temperature = 1.0 if temperature is None else temperature
        if self.temperature not in teacher.temperatures:
            raise ValueError(
                f"expected a temperature at which {teacher.name} has the mass of the other classes, "
                f"{', '.join(f'{t:g}' for t in teacher.temperatures)}, got {self.temperature:g}; write it again with `pykd teacher --temperature "
                f"{self.temperature:g}`"
            )
        self.place = teacher.temperatures.index(self.temperature)
        self.classes = teacher.width or 0
        self.losses = {loss + BOUND: loss for loss in losses}
        self.labels = labels
        self.cut = cut
        fields: list[tuple[str, str]] = [("status", "u1"), *((name, "<f4") for name in self.losses)]
        fields += [("teacher_class", "<i4"), ("student_class", "<i4"), ("teacher_class_rank", "<i4")]
        fields += [("teacher_confidence", "<f4"), ("student_confidence", "<f4")]
        if labels:
            fields += [("label", "<i8"), ("student_nll", "<f4")]
        if cut:
            fields.append(("student_mass_cut", "<f4"))
        self.dtype = np.dtype(fields)

    def left_out(self) -> dict[str, str]:
        """The scores that there would be with all of the teacher's classes, and why not."""
        bounds = {
            loss: f"the teacher's file has its top K alone; {name} is not above it"
            for name, loss in self.losses.items()
        }
        label = "the teacher's file has its top K alone, where the label need not be"
        named = ("teacher_nll", "label_probability_change", "perplexity.teacher", "perplexity.student_over_teacher")
        return bounds | (dict.fromkeys(named, label) if self.labels else {})

    def __call__(self, teacher: Block, student: Block, label: Block | None) -> Array:
        """One record of :attr:`dtype` per row."""
        result = np.zeros(len(teacher.values), self.dtype)
        with np.errstate(all="ignore"):  # bad rows are found by what comes out
            self._compare(teacher, student.values, label, result)
        status = result["status"]
        for block in (teacher, student):
            for flags, code in ((block.ragged, RAGGED), (block.missing, MISSING)):
                if flags is not None:
                    status[flags] = code
        bad = status != OK
        for name in self.dtype.names or ():
            if name not in ("status", "label"):
                result[name][bad] = np.nan if self.dtype[name].kind == "f" else -1
        return result

    def _compare(self, teacher: Block, student: Array, label: Block | None, result: Array) -> None:
        top_k = teacher.top_k
        assert top_k is not None
        rows = np.arange(len(student))
        every, _ = narrow(student)
        logits = np.ascontiguousarray(every[:, : self.classes])
        ids, empty = top_k.ids.astype(np.int64), teacher.values == -np.inf
        if empty.any():  # of such classes the others know enough: they count with them
            first = np.take_along_axis(ids, teacher.values.argmax(axis=1)[:, None], axis=1)
            ids = np.where(empty, first, ids)
        log_p = self._teacher(teacher, self.place)
        whole, tail = log_masses(logits, ids, self.temperature)
        at_one = whole if self.temperature == 1 else log_sum(logits)
        inside = np.take_along_axis(logits, ids, axis=1).astype(np.float64) / self.temperature
        inside[empty] = -np.inf
        log_q = _normalised(np.concatenate([inside, tail[:, None]], axis=1))
        for name, loss in self.losses.items():
            result[name] = np.maximum(
                _loss(loss, log_p, log_q), 0
            )  # of which rounding may leave a little less; NaN stays
        best_of_teacher = ids[rows, teacher.values.argmax(axis=1)]
        best = logits.argmax(axis=1)
        result["teacher_class"], result["student_class"] = best_of_teacher, best
        result["teacher_class_rank"] = _rank(logits, best_of_teacher, best)
        result["teacher_confidence"] = np.exp(self._teacher(teacher, 0)[:, :-1].max(axis=1))
        result["student_confidence"] = np.exp(logits[rows, best] - at_one)
        if self.cut:
            rest = log_sum(np.ascontiguousarray(every[:, self.classes :]))
            result["student_mass_cut"] = 1 / (1 + np.exp(at_one - rest))
        if label is not None:
            there = (label.values >= 0) & (label.values < self.classes)
            result["label"] = label.values
            result["student_nll"] = at_one - logits[rows, np.where(there, label.values, 0)]
        self._judge(top_k.kind, every, label, result)

    def _teacher(self, teacher: Block, place: int) -> Array:
        """Log-probabilities of the top K and of all others together, in float64; rounded when they were stored, they are normalised again."""
        assert teacher.top_k is not None
        top = teacher.values.astype(np.float64)
        tail = np.minimum(
            teacher.top_k.log_tail[:, place, None].astype(np.float64), 0
        )  # of which rounding may leave more
        if place:  # the top has what the others leave; its own offset does not count, which lse would bring in with its rounding
            top = _normalised(top / self.temperature) + np.log(-np.expm1(tail))
        return _normalised(np.concatenate([top, tail], axis=1))

    def _judge(self, kind: Array, logits: Array, label: Block | None, result: Array) -> None:
        status = result["status"]
        finite = np.ones(len(status), bool)
        for name in self.dtype.names or ():
            if self.dtype[name].kind == "f":
                finite &= np.isfinite(result[name])
        for row in np.flatnonzero(~finite):
            status[row] = why(self.classes, logits[row : row + 1])
        for name in ("infinite", "nan"):
            status[kind == ROW_KINDS.index(name)] = STATUSES.index(name)
        if label is not None:
            status[(label.values < 0) | (label.values >= self.classes)] = LABEL_OUT_OF_RANGE
            status[label.values == IGNORED_LABEL] = IGNORED
            if label.missing is not None:
                status[label.missing] = MISSING


def _rank(student: Array, teacher_class: Array, student_class: Array) -> Array:
    """The place of the teacher's best class in the student's order, from 1; of equals the first comes first."""
    rank = np.ones(len(student), np.int32)
    differ = np.flatnonzero(teacher_class != student_class)
    if len(differ):
        logits = student[differ]
        own = logits[np.arange(len(differ)), teacher_class[differ]][:, None]
        rank[differ] += (logits > own).sum(axis=1, dtype=np.int32)
        equal = logits == own
        for row in np.flatnonzero(equal.sum(axis=1, dtype=np.int32) > 1):
            rank[differ[row]] += equal[row, : teacher_class[differ[row]]].sum()
    return rank


def _normalised(logs: Array) -> Array:
    """Log-probabilities whose probabilities sum to 1."""
    largest = logs.max(axis=1, keepdims=True)
    return np.asarray(logs - (largest + np.log(np.exp(logs - largest).sum(axis=1, keepdims=True))))


def _loss(name: str, log_p: Array, log_q: Array) -> Array:
    if name == "kl":
        return _divergence(log_p, log_q)
    if name == "reverse_kl":
        return _divergence(log_q, log_p)
    if name == "symmetric_kl":
        return (_divergence(log_p, log_q) + _divergence(log_q, log_p)) / 2
    if name == "jsd":
        middle = np.logaddexp(log_p, log_q) - np.log(2)
        return (_divergence(log_p, middle) + _divergence(log_q, middle)) / 2
    p = np.exp(log_p)
    return np.asarray(-np.where(p > 0, p * log_q, 0).sum(axis=1))


def _divergence(log_a: Array, log_b: Array) -> Array:
    a = np.exp(log_a)
    return np.asarray(np.where(a > 0, a * (log_a - log_b), 0).sum(axis=1))
