"""From two files of logits to the file of scores, in blocks of bounded memory, on several threads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pykd._version import __version__
from pykd.scoring import sources
from pykd.scoring.formats.source import block_rows, worked
from pykd.scoring.results import GROUP_ROWS, Journal, Scores, group_names, write_parquet
from pykd.scoring.row_scores import LOSSES, STATUSES, RowScores, check_temperature
from pykd.scoring.sources import Load, Source
from pykd.scoring.top_k_scores import TopKScores

Where = str | os.PathLike[str]


def score_files(
    teacher: Where,
    student: Where,
    out: Where,
    losses: tuple[str, ...] = ("kl",),
    labels: Where | None = None,
    group: Where | None = None,
    temperature: float | None = None,
    classes: int | None = None,
    distillkit: Where | None = None,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> Scores:
    """Scores every row of a student against its teacher, and writes the file of scores.

    Args:
        teacher: logits (or log-probabilities): a path, or path#name. See :mod:`pykd.scoring.sources`.
        student: the same for the student.
        out: the Parquet file to write. Where the same work was begun before, it is taken up; where it was finished, nothing is
            done again.
        losses: names of :data:`pykd.scoring.row_scores.LOSSES`, or paths of exported losses with values per sample.
        labels: whole numbers, one per row; −100 leaves a row out. None: those of a base file of llama.cpp, or none.
        group: what belongs together (a document, a user), one whole number or text per row: rows of one group are not
            independent, and the intervals allow for that. None: the chunks of a base file of llama.cpp, or each row by itself.
        temperature: of the losses; None: 1, or the default of an exported loss.
        classes: compares that many classes, the first ones; the probability of the others is reported.
        distillkit: the settings of the compression, where the teacher's file has rows of DistillKit.
        threads: that work at once; 0: one per core. The scores do not depend on it.
        progress: called with the rows done, and all rows.
        say: called with what a person should know.

    Raises:
        ValueError: a file, a shape or a setting is wrong.
        OSError: the file of scores cannot be written; what was written is kept.
    """
    sources.require("pyarrow")
    work = _Work(teacher, student, losses, labels, group, temperature, classes, distillkit)
    path = Path(out)
    settings = {
        "pykd": __version__,
        "files": {name: sources.fingerprint(where) for name, where in work.places.items()},
        "losses": [loss if loss not in work.exported else sources.fingerprint(loss) for loss in losses],
        "temperature": temperature,
        "classes": classes,
        "columns": work.scores.dtype.descr,
    }
    if (finished := _finished(path, settings)) is not None:
        say(f"{path} holds the scores of these files already")
        return finished
    work.check_groups()
    with Journal(path, settings, work.scores.dtype) as journal:
        if journal.forgot:
            say(f"{journal.path} was of other files or settings: begun anew")
        elif journal.rows:
            say(f"{journal.path} has {journal.rows:,} rows of {work.rows:,}: going on from there")
        for records in work.run(journal.rows, threads or cores()):
            journal.append(records)
            if progress is not None:
                progress(journal.rows, work.rows)
        if journal.rows != work.rows:
            raise RuntimeError(f"expected scores of {work.rows} rows, got {journal.rows}; remove {journal.path}")
        write_parquet(journal, path, {"settings": settings, **work.facts()}, work.group)
        journal.remove()
    return Scores(path)


def cores() -> int:
    """How many threads work at once where nothing else is said."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finished(path: Path, settings: dict[str, Any]) -> Scores | None:
    """The scores where this work has been done."""
    if not path.exists():
        return None
    try:
        scores = Scores(path)
    except ValueError as error:
        raise ValueError(
            f"expected no file at {path}, or scores to write over, got another file; remove it, or take another --out"
        ) from error
    same = scores.facts["settings"] == json.loads(json.dumps(settings))
    return scores if same else None


def labels_of(teacher: Where, student: Where, labels: Where | None) -> Where | None:
    """Those that were named, or those of a base file of llama.cpp."""
    heads = [sources.base_file(where) for where in (teacher, student)]
    if heads[0] is not None and heads[1] is not None and not np.array_equal(heads[0].tokens, heads[1].tokens):
        raise ValueError(
            f"expected two base files of the same text and context, got {teacher} and {student} of different tokens; write both from "
            "one text"
        )
    if labels is not None:
        return labels
    return next((where for where, head in zip((teacher, student), heads, strict=True) if head is not None), None)


def compared(widths: tuple[int, int], classes: int | None) -> int:
    """How many classes are compared of a teacher and a student that have that many."""
    if classes is None and widths[0] != widths[1]:
        raise ValueError(
            f"expected as many classes of the student as of the teacher, {widths[0]}, got {widths[1]}; pass --classes "
            f"{min(widths)} to compare the first {min(widths)} (where the rest is padding): the probability of what is "
            "cut off is reported"
        )
    chosen = min(widths) if classes is None else classes
    if not 1 <= chosen <= min(widths):
        raise ValueError(f"expected from 1 to {min(widths)} classes, got {classes}; correct --classes")
    return chosen


class _Work:
    """The files of a run, which go together."""

    def __init__(
        self,
        teacher: Where,
        student: Where,
        losses: tuple[str, ...],
        labels: Where | None,
        group: Where | None,
        temperature: float | None,
        classes: int | None,
        distillkit: Where | None,
    ) -> None:
        if temperature is not None:
            check_temperature(temperature, "--temperature")
        if not losses or len(set(losses)) < len(losses):
            raise ValueError(f"expected losses that differ, got {', '.join(losses) or 'none'}; name each once")
        self.teacher = sources.open_matrix(teacher, "teacher", distillkit)
        self.student = sources.open_matrix(student, "student")
        own = labels_of(teacher, student, None)
        labels = own if labels is None else labels
        if group is None and own is not None:
            group = f"{os.fspath(own)}#chunk"
        self.label = None if labels is None else sources.open_column(labels, "labels")
        self.group = None if group is None else sources.open_column(group, "group", "iuU")
        self.places = {
            name: where
            for name, where in (
                ("teacher", teacher),
                ("student", student),
                ("labels", labels),
                ("group", group),
                ("distillkit", distillkit),
            )
            if where is not None
        }
        self.rows = self.teacher.rows
        for other in (self.student, self.label, self.group):
            if other is not None and other.rows != self.rows:
                raise ValueError(
                    f"expected as many rows in {other.name} as the teacher has, {self.rows}, got {other.rows}; "
                    "pass files of the same rows in the same order"
                )
        widths = self.teacher.width or 0, self.student.width or 0
        self.classes = compared(widths, classes)
        cut = widths[0] > self.classes, widths[1] > self.classes
        self.scores = self._scores(losses, temperature, cut)
        self.exported = [loss for loss in losses if os.path.exists(loss) and loss not in LOSSES]
        self.temperature = temperature

    def _scores(
        self, losses: tuple[str, ...], temperature: float | None, cut: tuple[bool, bool]
    ) -> RowScores | TopKScores:
        """What is computed of a block."""
        if self.student.kept is not None:
            raise ValueError(
                f"expected logits of all classes of the student, got {self.student.stored} in {self.student.name}; only the teacher may be a top K"
            )
        labelled = self.label is not None
        if self.teacher.kept is None:
            return RowScores(losses, temperature, self.classes, labelled, cut)
        if cut[0]:
            raise ValueError(
                f"expected all {self.teacher.width} classes of {self.teacher.name} to be compared, got {self.classes}: of a top K none can be cut off; "
                f"write it again with `pykd teacher --classes {self.classes}`"
            )
        return TopKScores(losses, temperature, self.teacher, labelled, cut[1])

    def check_groups(self) -> None:
        """A row without a group is said before the work, not when its rows are written."""
        first = 0
        for load in () if self.group is None else self.group.blocks(0, GROUP_ROWS):
            first += len(group_names(load(), first))

    def facts(self) -> dict[str, Any]:
        """What the report says of the input."""
        return {
            "losses": list(self.scores.losses),
            "classes": self.classes,
            "temperature": self.temperature,
            "left_out": self.scores.left_out() if isinstance(self.scores, TopKScores) else {},
            "inputs": {
                source_name: {
                    "path": os.fspath(self.places[source_name]),
                    "rows": source.rows,
                    "classes": source.width,
                    "dtype": source.stored,
                    **({"written": dict(source.facts)} if source.facts else {}),
                }
                for source_name, source in self._named()
            },
        }

    def _named(self) -> Iterator[tuple[str, Source]]:
        for name, source in (
            ("teacher", self.teacher),
            ("student", self.student),
            ("labels", self.label),
            ("group", self.group),
        ):
            if source is not None:
                yield name, source

    def run(self, start: int, threads: int) -> Iterator[np.ndarray[Any, Any]]:
        """Records of the rows from ``start`` on, in order."""
        teacher, student = self.teacher, self.student
        if teacher.coded and student.coded and isinstance(self.scores, RowScores) and self.scores.takes_codes:
            teacher, student = teacher.coded, student.coded
        rows = block_rows(teacher, student)
        pairs = zip(
            teacher.blocks(start, rows),
            student.blocks(start, rows),
            _nothing() if self.label is None else self.label.blocks(start, rows),
            strict=self.label is not None,
        )
        return worked(pairs, self._block, threads)

    def _block(self, loads: tuple[Load, Load, Load | None]) -> np.ndarray[Any, Any]:
        teacher, student, label = loads
        return self.scores(teacher(), student(), None if label is None else label())


def _nothing() -> Iterator[None]:
    while True:
        yield None


def counts_of(scores: Scores) -> dict[str, int]:
    """How many rows there are of each status."""
    counts = np.zeros(len(STATUSES), np.int64)
    for block in scores.blocks(bad=True):
        counts += np.bincount(block["status"], minlength=len(STATUSES))
    return dict(zip(STATUSES, counts.tolist(), strict=True))
