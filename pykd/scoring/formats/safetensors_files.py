"""Tensors of safetensors, bfloat16 included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from pykd import files
from pykd.scoring.formats.raw import raw
from pykd.scoring.formats.source import Block, Load, Source, choose

_LARGEST_HEADER = 100 << 20  # bytes of a safetensors header, as its authors have it


_SAFETENSORS = {
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2",
    "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
}  # fmt: skip


def safetensors(path: str, label: str, name: str | None, matrix: bool) -> Source:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_LARGEST_HEADER, size - 8):
            raise ValueError(
                f"expected {label} to be a whole safetensors file, got one whose header does not fit; write it again"
            )
        table = files.parse_json(file.read(length), f"the header of {label}")
    if not isinstance(table, dict):
        raise ValueError(f"expected the header of {label} to be a table, got {type(table).__name__}; write it again")
    table.pop("__metadata__", None)
    entry = table[choose(list(table), name, label, "tensor")]
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
        count = int(np.prod(shape, dtype=object))
        dtype = np.dtype(_SAFETENSORS[kind])
        if not all(isinstance(number, int) for number in (first, last)):
            raise TypeError("places that are no whole numbers")
        fits = 0 <= first <= last and last - first == count * dtype.itemsize and min(shape, default=0) >= 0
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"expected a tensor of {', '.join(_SAFETENSORS)} in {label}, got {entry!r:.200}; convert it"
        ) from error
    if not fits:
        raise ValueError(
            f"expected shape and place of {label} to agree, got {shape} in {last - first} bytes; write it again"
        )
    source = raw(path, 8 + length + first, shape, dtype, label, matrix)
    if kind == "BF16":
        return _widened(source)
    return source


def _widened(source: Source) -> Source:
    """bfloat16, for which NumPy has no type, as the float32 with the same values."""

    def blocks(start: int, rows: int) -> Iterator[Load]:
        for load in source.load(start, rows):
            yield lambda load=load: Block(from_bfloat16(load().values))  # type: ignore[misc]

    return Source(source.name, source.rows, source.width, np.dtype(np.float32), "bfloat16", blocks, shape=source.shape)


def from_bfloat16(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 of bfloat16, given as its bits."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)
