"""Teacher outputs that ``pykd teacher`` wrote (:mod:`pykd.scoring.container`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from pykd.scoring.container import Reader
from pykd.scoring.formats.source import ROW_KINDS, Block, Load, Source, TopK


def teacher_file(path: str, label: str, name: str | None, matrix: bool) -> Source:
    """Log-probabilities of all classes or of the most probable ones; every block that is read is compared with its checksum."""
    if name is not None or not matrix:
        raise ValueError(
            f"expected no name and no column of {label}, which holds teacher outputs, got {name or 'a column'!r}; leave it out"
        )
    reader = Reader(path, label)
    facts = reader.facts
    if facts["form"] == "top-k":
        return _top_k(reader, label)
    raise ValueError(
        f"expected teacher outputs in full or top-k in {label}, got {facts['form']!r}; read them with a newer pykd"
    )


def _loads(rows: int, read: Callable[[int, int], Block]) -> Callable[[int, int], Iterator[Load]]:
    def blocks(start: int, count: int) -> Iterator[Load]:
        for first in range(start, rows, count):
            yield lambda first=first: read(first, min(first + count, rows))  # type: ignore[misc]

    return blocks


def _top_k(reader: Reader, label: str) -> Source:
    def read(first: int, last: int) -> Block:
        ids, log_tail, lse, kind = (reader.read(name, first, last) for name in ("ids", "log_tail", "lse", "kind"))
        log_probs = reader.read("logprobs", first, last).astype(np.float32)
        ragged, missing = (kind == ROW_KINDS.index(name) for name in ("ragged", "missing"))
        return Block(log_probs, ragged, missing, TopK(ids, log_tail, lse, kind))

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
