"""Teacher outputs that ``pykd teacher`` wrote (:mod:`pykd.scoring.container`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pykd.scoring.container import Reader
from pykd.scoring.formats.source import ROW_KINDS, Block, Load, Source, TopK, exact, in_turn

_LOGITS_BYTES = 64 << 20  # of logits that are made of hidden states at once
_HEAD_ROWS = 8192  # of the head that are widened at once

Array = np.ndarray[Any, Any]


def teacher_file(path: str, label: str, name: str | None, matrix: bool) -> Source:
    """Log-probabilities of all classes or of the most probable ones; every block that is read is compared with its checksum."""
    if name is not None or not matrix:
        raise ValueError(
            f"expected no name and no column of {label}, which holds teacher outputs, got {name or 'a column'!r}; leave it out"
        )
    reader = Reader(path, label)
    facts = reader.facts
    for form, opened in (("top-k", _top_k), ("full", _full), ("hidden", _hidden)):
        if facts["form"] == form:
            return opened(reader, label)
    raise ValueError(
        f"expected teacher outputs of the forms top-k, full and hidden in {label}, got {facts['form']!r}; read them with a newer pykd"
    )


def _loads(rows: int, read: Callable[[int, int], Block]) -> Callable[[int, int], Iterator[Load]]:
    def blocks(start: int, count: int) -> Iterator[Load]:
        for first in range(start, rows, count):
            yield lambda first=first: read(first, min(first + count, rows))  # type: ignore[misc]

    return blocks


def _top_k(reader: Reader, label: str) -> Source:
    def read(first: int, last: int) -> Block:
        ids, log_tail, kind = (reader.read(name, first, last) for name in ("ids", "log_tail", "kind"))
        log_probs = reader.read("logprobs", first, last).astype(np.float32)
        return Block(log_probs, *_flags(kind), TopK(ids, log_tail, kind))

    facts = reader.facts
    stored, (rows, kept) = reader.tensor("logprobs")
    return Source(
        label,
        rows,
        facts["classes"],
        np.dtype(np.float32),
        f"top {kept:,} of {facts['classes']:,}, {stored.name}",
        _loads(rows, read),
        kept=kept,
        temperatures=tuple(facts["temperatures"]),
        facts=facts,
    )


def _full(reader: Reader, label: str) -> Source:
    stored, (rows, classes) = reader.tensor("logprobs")

    def read(first: int, last: int) -> Block:
        return Block(reader.read("logprobs", first, last), *_flags(reader.read("kind", first, last)))

    return Source(label, rows, classes, stored, stored.name, _loads(rows, read), facts=reader.facts)


def _flags(kind: Array) -> tuple[Array, Array]:
    return kind == ROW_KINDS.index("ragged"), kind == ROW_KINDS.index("missing")


def _hidden(reader: Reader, label: str) -> Source:
    """Logits of the states, some rows at a time: those of all rows never are anywhere."""
    stored, (rows, length) = reader.tensor("hidden")
    classes = reader.tensor("head")[1][0]
    step = min(max(_LOGITS_BYTES // (4 * classes), 1), rows)
    slices = [(first, min(first + _HEAD_ROWS, classes)) for first in range(0, classes, _HEAD_ROWS)]

    def chunks(start: int) -> Iterator[Block]:
        head = [reader.read("head", first, last) for first, last in slices]
        bias = reader.read("bias", 0, classes).astype(np.float32) if "bias" in reader else None
        for begin in range(start, rows, step):
            end = min(begin + step, rows)
            states = reader.read("hidden", begin, end).astype(np.float32)
            logits = np.empty((end - begin, classes), np.float32)
            with np.errstate(all="ignore"):  # of bad rows
                for (first, last), weights in zip(slices, head, strict=True):
                    np.matmul(states, weights.astype(np.float32, copy=False).T, out=logits[:, first:last])
                if bias is not None:
                    logits += bias
            yield Block(logits, *_flags(reader.read("kind", begin, end)))

    kind = f"hidden states of {length:,}, {stored.name}"
    blocks = in_turn(lambda start, count: exact(chunks(start), count))
    return Source(label, rows, classes, np.dtype(np.float32), kind, blocks, True, facts=reader.facts)
