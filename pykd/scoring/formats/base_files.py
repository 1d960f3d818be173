"""Base files of llama.cpp, whose format :mod:`pykd.scoring.llama` knows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pykd.scoring import llama
from pykd.scoring.formats.raw import raw
from pykd.scoring.formats.source import Block, Load, Memory, Source, in_turn


def base_file(path: str, label: str, name: str | None, matrix: bool) -> Source:
    """The log-probabilities of a base file of llama.cpp; as a column, the labels in it, or by the name ``chunk`` the chunks."""
    if name is not None and (matrix or name != "chunk"):
        allowed = "no name" if matrix else "no name, or chunk,"
        raise ValueError(f"expected {allowed} for {label}, a base file of llama.cpp, got {name!r}; leave it out")
    head = llama.read_head(path, label)
    if not matrix:
        labels = head.chunk_of_rows if name == "chunk" else head.labels
        numbers = in_turn(lambda start, rows: (Block(labels[i : i + rows]) for i in range(start, len(labels), rows)))
        return Source(label, head.rows, None, labels.dtype, labels.dtype.name, numbers)
    words = raw(path, head.offset, (head.rows, head.codes), np.dtype("<u2"), label, matrix)

    def blocks(start: int, rows: int) -> Iterator[Load]:
        memory = Memory()
        for load in words.load(start, rows):
            yield lambda load=load: Block(llama.decoded(load().values, head.classes, memory.empty))  # type: ignore[misc]

    return Source(label, head.rows, head.classes, np.dtype(np.float32), "16-bit codes", blocks, coded=words)
