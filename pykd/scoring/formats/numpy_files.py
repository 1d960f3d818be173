"""NumPy's files: ``.npy`` and ``.npz``."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from pykd.scoring.formats.raw import raw, shape_of
from pykd.scoring.formats.source import BUFFER, Block, Source, choose, in_turn


def _npy_header(file: IO[bytes], label: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
    except ValueError as error:
        raise ValueError(f"expected {label} to be an array of NumPy, got {error}; write it again") from error
    if dtype.hasobject or dtype.kind not in "fiuU" or (dtype.kind == "f" and dtype.itemsize > 8):
        raise ValueError(
            f"expected numbers in {label}, got {dtype}; convert them to float16, float32, float64 or whole numbers (bfloat16 has no "
            "type in NumPy's files: write safetensors)"
        )
    if fortran and len(shape) > 1:
        raise ValueError(
            f"expected {label} in row-major order, got column-major; save np.ascontiguousarray(array) instead"
        )
    return shape, dtype


def npy(path: str, label: str, name: str | None, matrix: bool) -> Source:
    if name is not None:
        raise ValueError(f"expected no name for {label}, a file with one array, got {name!r}; leave it out")
    with open(path, "rb") as file:
        shape, dtype = _npy_header(file, label)
        return raw(path, file.tell(), shape, dtype, label, matrix)


def npz(path: str, label: str, name: str | None, matrix: bool) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")]
            chosen = choose(names, name, label, "array") + ".npy"
            info = archive.getinfo(chosen)
            with archive.open(chosen) as member:
                shape, dtype = _npy_header(member, label)
                header = member.tell()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"expected {label} to be a whole .npz file, got {error}: it is cut off; write it again"
        ) from error
    if info.compress_type == zipfile.ZIP_STORED:
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
        return raw(path, info.header_offset + 30 + name_length + extra_length + header, shape, dtype, label, matrix)
    rows, width = shape_of(shape, label, matrix)
    row_bytes = dtype.itemsize * (1 if width is None else width)
    if info.file_size != header + rows * row_bytes:
        raise ValueError(f"expected {header + rows * row_bytes} bytes in {label}, got {info.file_size}; write it again")
    native = dtype.newbyteorder("=")

    def chunks(start: int, block_rows: int) -> Iterator[Block]:
        with zipfile.ZipFile(path) as archive, archive.open(chosen) as member:
            left = header + start * row_bytes
            while left:
                left -= len(_exactly(member, min(left, BUFFER), label))
            for first in range(start, rows, block_rows):
                count = min(block_rows, rows - first)
                values = np.frombuffer(_exactly(member, count * row_bytes, label), dtype)
                yield Block(values.reshape(count if width is None else (count, width)).astype(native, copy=False))

    return Source(label, rows, width, native, dtype.name, in_turn(chunks), True, shape=shape)


def _exactly(file: IO[bytes], count: int, label: str) -> bytes:
    try:
        data = file.read(count)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"expected {label} to be whole, got {error}; write it again") from error
    if len(data) != count:
        raise ValueError(f"expected {count} more bytes in {label}, got {len(data)}; write it again")
    return data
