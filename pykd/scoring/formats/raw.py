"""Arrays that lie in a file as they lie in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from pykd.scoring.formats.source import Block, Load, Memory, Source


def shape_of(shape: tuple[int, ...], label: str, matrix: bool) -> tuple[int, int | None]:
    """Rows, and entries of a row."""
    if len(shape) < (2 if matrix else 1):
        wanted = "(rows, classes)" if matrix else "(rows,)"
        raise ValueError(f"expected {label} to have the shape {wanted}, got {shape}; reshape it")
    if min(shape) < 0:
        raise ValueError(f"expected lengths from 0 in {label}, got {shape}; write it again")
    count = 1
    for length in shape[:-1] if matrix else shape:
        count *= length
    return count, shape[-1] if matrix else None


class _Descriptor:
    """An open file that is closed when the last block lets go of it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.number)


def raw(path: str, offset: int, shape: tuple[int, ...], stored: np.dtype[Any], label: str, matrix: bool) -> Source:
    """An array in row-major order that begins at a byte of a file."""
    rows, width = shape_of(shape, label, matrix)
    row_bytes = stored.itemsize * (1 if width is None else width)
    size = os.path.getsize(path)
    if offset + rows * row_bytes > size:
        raise ValueError(
            f"expected {offset + rows * row_bytes} bytes in {label}, got {size}: it is cut off; write it again"
        )
    native = stored.newbyteorder("=")

    def blocks(start: int, block_rows: int) -> Iterator[Load]:
        file = _Descriptor(path)
        memory = Memory()

        def read(first: int, last: int) -> Block:
            values = memory.empty((last - first,) if width is None else (last - first, width), stored)
            view = values.reshape(-1).view(np.uint8).data
            done = 0
            while done < len(view):
                got = os.preadv(file.number, [view[done:]], offset + first * row_bytes + done)
                if got == 0:
                    raise ValueError(
                        f"expected {label} to stay as long as it was, got its end at row {first + done // row_bytes}; "
                        "do not write to it while it is read"
                    )
                done += got
            return Block(values if native == stored else values.astype(native))

        for first in range(start, rows, block_rows):
            last = min(first + block_rows, rows)
            yield lambda first=first, last=last: read(first, last)  # type: ignore[misc]

    return Source(label, rows, width, native, stored.name, blocks, shape=shape)
