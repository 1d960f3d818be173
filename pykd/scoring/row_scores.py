"""What is said of each row: the losses, who agrees with whom, and what the label's probability is.

The kernels of libpykd compute the losses; no torch, no ONNX Runtime. An exported loss with values per sample runs through
:func:`pykd.load`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pykd import kernels
from pykd.runtime import LoadedLoss, load
from pykd.scoring import llama
from pykd.scoring.sources import Block

# What a row can be. All but the first are kept out of the statistics, and counted.
STATUSES = (
    "ok",
    "nan",  # a logit is NaN
    "infinite",  # a logit is +inf, or all of them are −inf
    "infinite_score",  # a score is: the student, say, rules out a class to which the teacher gives some probability
    "label_out_of_range",
    "ignored",  # the label is −100, which says so
    "ragged",  # the row is longer or shorter than the others
    "missing",  # the row, or its label, is null
)
OK, NAN, INFINITE, INFINITE_SCORE, LABEL_OUT_OF_RANGE, IGNORED, RAGGED, MISSING = range(len(STATUSES))
IGNORED_LABEL = -100

LOSSES = ("kl", "reverse_kl", "symmetric_kl", "jsd", "cross_entropy")

Array = np.ndarray[Any, Any]


def check_temperature(temperature: float, argument: str) -> None:
    """Refuses a temperature that float32 has not, or not in full precision: the losses divide by it there."""
    held = np.finfo(np.float32)
    if not held.tiny <= temperature <= held.max:
        raise ValueError(
            f"expected a temperature above 0 that float32 holds in full precision ({held.tiny:.2g} to {held.max:.2g}), got {temperature:g}; "
            f"correct {argument}"
        )


def number_of(described: Mapping[str, Any], name: str, value: float, dtype: np.dtype[Any], argument: str) -> Array:
    """A number of an exported loss as its file holds it; refuses what the type has not, and what is out of its range.

    Args:
        described: what the file of the loss says of itself.
        name: of the parameter.
        value: the number.
        dtype: of the parameter in the file.
        argument: where it was said, for messages.
    """
    with np.errstate(over="ignore"):
        held = np.asarray(value, dtype)
    if not math.isfinite(float(held)):
        raise ValueError(
            f"expected a finite number for {name}, got {value:g} ({held.dtype}: {float(held):g}); correct {argument}"
        )
    entry: Mapping[str, Any] = next((e for e in described.get("parameters", ()) if e["name"] == name), {})
    least, most = entry.get("minimum", -math.inf), entry.get("maximum", math.inf)
    exclusive = bool(entry.get("minimum_exclusive", False))
    if float(held) < least or (exclusive and float(held) == least) or float(held) > most:
        wanted = ("above" if exclusive else "from") + f" {least:g}" + ("" if most == math.inf else f" to {most:g}")
        got = f"{value:g}" if float(held) == value else f"{value:g}, which is {float(held):g} in {held.dtype}"
        raise ValueError(f"expected {name} {wanted}, got {got}; correct {argument}")
    return held


class RowScores:
    """Computes the scores of blocks of rows; any number of threads may call it at once.

    Args:
        losses: names of :data:`LOSSES`, or paths of exported losses with values per sample.
        temperature: divides the logits of both sides in the losses alone; None: 1, or the default of an exported loss.
        classes: how many are compared, the first ones.
        labels: whether there are any.
        cut: whether a side has more classes than are compared.
    """

    def __init__(
        self, losses: tuple[str, ...], temperature: float | None, classes: int, labels: bool, cut: tuple[bool, bool]
    ) -> None:
        self.classes = classes
        self.losses: dict[str, str | LoadedLoss] = {}
        for loss in losses:
            if loss in LOSSES:
                self.losses[loss] = loss
            else:
                name, loaded = _exported(loss, labels)
                if name in self.losses or name in LOSSES:
                    raise ValueError(
                        f"expected losses of different names, got {name} again ({loss}); export it under another name"
                    )
                self.losses[name] = loaded
        self.temperature = temperature
        self.labels = labels
        self.cut = {"teacher": cut[0], "student": cut[1]}
        # Whether blocks may be rows of base files of llama.cpp as they are, 16-bit words.
        self.takes_codes = not any(cut) and not any(isinstance(loss, LoadedLoss) for loss in self.losses.values())
        fields: list[tuple[str, str]] = [("status", "u1"), *((name, "<f4") for name in self.losses)]
        fields += [("teacher_class", "<i4"), ("student_class", "<i4"), ("teacher_class_rank", "<i4")]
        fields += [("teacher_confidence", "<f4"), ("student_confidence", "<f4")]
        if labels:
            fields += [("label", "<i8"), ("teacher_nll", "<f4"), ("student_nll", "<f4")]
            fields += [("label_probability_change", "<f4")]
        fields += [(f"{side}_mass_cut", "<f4") for side, is_cut in self.cut.items() if is_cut]
        if len({"row", "group", *(name for name, _ in fields)}) < len(fields) + 2:
            raise ValueError(
                f"expected losses whose names differ from each other and from the other columns, got "
                f"{', '.join(self.losses)}; export them under other names"
            )
        self.dtype = np.dtype(fields)

    def __call__(self, teacher: Block, student: Block, label: Block | None) -> Array:
        """One record of :attr:`dtype` per row."""
        rows = len(teacher.values)
        result = np.zeros(rows, self.dtype)
        if not rows:  # of a table; the kernels take no empty batch
            return result
        status = np.zeros(rows, np.uint8)
        with np.errstate(all="ignore"):  # bad rows are found by what comes out
            self._compare(teacher.values, student.values, label, result, status)
        for block in (teacher, student):
            if block.ragged is not None:
                status[block.ragged] = RAGGED
            if block.missing is not None:
                status[block.missing] = MISSING
        result["status"] = status
        bad = status != OK
        if bad.any():
            for name in self.dtype.names or ():
                if name not in ("status", "label"):
                    result[name][bad] = np.nan if self.dtype[name].kind == "f" else -1
        return result

    def _compare(self, teacher: Array, student: Array, label: Block | None, result: Array, status: Array) -> None:
        whole = {"teacher": teacher, "student": student}
        coded = teacher.dtype == np.uint16
        if not coded:
            teacher, student = _alike(teacher[:, : self.classes], student[:, : self.classes])
        rows = len(teacher)
        inputs: dict[str, Any] = {"teacher": teacher, "student": student}
        attributes: dict[str, str | float] = {}
        if coded:
            inputs = {side: (words,) for side, words in inputs.items()}  # the mark of 16-bit words
            attributes = {"codes": 1, "classes": self.classes}
        classes = {name: np.empty(rows, np.int64) for name in ("teacher_class", "student_class", "teacher_class_rank")}
        nll = {f"{side}_class_nll": np.empty(rows, np.float32) for side in whole}
        known = np.zeros(rows, np.int64)
        if label is not None:
            inside = (label.values >= 0) & (label.values < self.classes)
            np.copyto(known, label.values, where=inside)
            inputs["labels"] = known
            nll |= {f"{side}_nll": np.empty(rows, np.float32) for side in whole}
        wanted: dict[str, Array] = {**classes, **nll}
        temperature = 1.0 if self.temperature is None else self.temperature
        for name, loss in self.losses.items():
            if isinstance(loss, str):
                value = np.empty(rows, np.float32)
                asked = {"soft": value, **wanted}
                kernels.run(
                    "row_scores",
                    inputs | {"temperature": temperature},
                    attributes | {"form": loss},
                    asked,
                    threads=1,
                )
                wanted = {}
                result[name] = np.maximum(value, 0)  # of which rounding may leave a little less; NaN stays
        if wanted:
            kernels.run("row_scores", inputs, attributes, wanted, threads=1)
        for name, places in classes.items():
            result[name] = places
        for side, logits in whole.items():
            result[f"{side}_confidence"] = np.exp(-nll[f"{side}_class_nll"])
            if self.cut[side]:
                largest = logits[np.arange(rows), classes[f"{side}_class"]].astype(np.float64)
                tail = logits[:, self.classes :].astype(np.float64)
                result[f"{side}_mass_cut"] = _share_of(tail, largest + nll[f"{side}_class_nll"])
        if label is not None:
            result["label"] = label.values
            for side in whole:
                result[f"{side}_nll"] = nll[f"{side}_nll"]
            result["label_probability_change"] = np.exp(-nll["student_nll"]) - np.exp(-nll["teacher_nll"])
        for name, loss in self.losses.items():
            if not isinstance(loss, str):
                result[name] = self._run(loss, teacher, student, known)
        finite = np.ones(rows, bool)
        for name in self.dtype.names or ():
            if self.dtype[name].kind == "f":
                finite &= np.isfinite(result[name])
        for row in np.flatnonzero(~finite):
            sides = (side[row : row + 1] for side in whole.values())
            both = (llama.decoded(side, self.classes) if coded else side for side in sides)
            status[row] = why(self.classes, *both)
        if label is not None:
            status[~inside] = LABEL_OUT_OF_RANGE
            status[label.values == IGNORED_LABEL] = IGNORED
            if label.missing is not None:
                status[label.missing] = MISSING

    def _run(self, loss: LoadedLoss, teacher: Array, student: Array, labels: Array) -> Array:
        arguments: dict[str, Any] = {"student_logits": student, "teacher_logits": teacher, "labels": labels}
        taken = {info.name for info in loss.signature.inputs}
        arguments = {name: np.ascontiguousarray(array) for name, array in arguments.items() if name in taken}
        if self.temperature is not None:
            arguments |= {
                info.name: self.temperature
                for info in loss.signature.parameters
                if info.name.rpartition("_")[2] == "temperature"
            }
        return np.asarray(loss.value(**arguments)["loss_per_sample"])


def _exported(path: str, labels: bool) -> tuple[str, LoadedLoss]:
    """An exported loss, and its name."""
    if not os.path.exists(path):
        raise ValueError(
            f"expected a loss of {', '.join(LOSSES)}, or the path of an exported one, got {path!r}; correct --loss"
        )
    loss = load(path, "onnxruntime", threads=1)
    if "loss_per_sample" not in {info.name for info in loss.signature.outputs}:
        raise ValueError(
            f"expected an exported loss with values per sample, got {path} without; export it with kind='score' "
            "(`pykd export --kind score`)"
        )
    offered = {"student_logits", "teacher_logits", *(["labels"] if labels else [])}
    for info in loss.signature.inputs:
        if info.name not in offered:
            remedy = "pass --labels" if info.name == "labels" else "export a loss that needs no more than these"
            raise ValueError(
                f"expected a loss of {', '.join(sorted(offered))}, got one that also takes {info.name} ({path}); {remedy}"
            )
    return str(loss.metadata.get("name", "loss")), loss


def _alike(teacher: Array, student: Array) -> tuple[Array, Array]:
    """Both contiguous and of one type that the kernels have. float64 is first taken relative to each row's largest."""
    if teacher.dtype == student.dtype and teacher.dtype != np.float64:
        return np.ascontiguousarray(teacher), np.ascontiguousarray(student)

    def narrow(logits: Array) -> Array:
        if logits.dtype == np.float64:
            logits = logits - logits.max(axis=1, keepdims=True)
        return np.ascontiguousarray(logits, np.float32)

    return narrow(teacher), narrow(student)


def _share_of(tail: Array, log_sum: Array) -> Array:
    """The probability of classes that are cut off, from their logits and log Σ exp of the others."""
    largest = tail.max(axis=1)
    log_tail = np.where(largest == -np.inf, -np.inf, largest + np.log(np.exp(tail - largest[:, None]).sum(axis=1)))
    return np.asarray(1 / (1 + np.exp(log_sum - log_tail)))


def why(classes: int, *sides: Array) -> int:
    """What is wrong with a row that has a score which is not finite; classes that are cut off count where they are +∞ or NaN."""
    for logits in sides:
        if np.isnan(logits).any():
            return NAN
    for logits in sides:
        if logits.max() == np.inf or logits[:, :classes].max() == -np.inf:
            return INFINITE
    return INFINITE_SCORE
