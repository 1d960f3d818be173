"""Rows that lie in files, read in blocks of bounded memory: ``.npy``, ``.npz``, safetensors, Parquet, Arrow IPC.

``logits.npy`` is a file with one array; ``outputs.npz#teacher`` names an array, tensor or column of a file with several.
Arrays that lie in a file as they are in memory are read by position, never mapped: a mapped file counts to the memory of
the process, and one that is cut off while it is read ends the process.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from pykd import files
from pykd.scoring import llama

_FLOATS = {"f2", "f4", "f8"}
_LARGEST_HEADER = 100 << 20  # bytes of a safetensors header, as its authors have it
_BUFFER = 1 << 20  # bytes that pyarrow reads ahead of a column


class Block(NamedTuple):
    """Consecutive rows of a source."""

    values: np.ndarray[Any, Any]  # (rows, classes), or (rows,)
    ragged: np.ndarray[Any, np.dtype[np.bool_]] | None = None  # rows of another length than the rest; None: no row
    missing: np.ndarray[Any, np.dtype[np.bool_]] | None = None  # rows that are null; None: no row


Load = Callable[[], Block]  # may be called on any thread, once


@dataclass
class Source:
    """Rows of one array or column."""

    name: str  # for messages: what it is, and where
    rows: int
    width: int | None  # entries of a row; None: each row is one value
    dtype: np.dtype[Any]  # of the blocks
    stored: str  # the type in the file
    # (first row, rows in a block) -> the blocks from there
    load: Callable[[int, int], Iterator[Load]] = field(repr=False)
    in_turn: bool = False  # whether a block is read while it is waited for, not when it is loaded

    def blocks(self, start: int, rows: int) -> Iterator[Load]:
        """Blocks of exactly that many rows, the last one excepted, from row ``start`` on."""
        return _ahead(self.load(start, rows)) if self.in_turn else self.load(start, rows)


def open_matrix(where: str | os.PathLike[str], role: str) -> Source:
    """Logits: rows of equally many floating-point numbers. Axes before the last are rows.

    Args:
        where: a path, or path#name.
        role: ``"teacher"`` or ``"student"``, for messages.
    """
    source = _open(where, role, matrix=True)
    if source.dtype.kind != "f":
        raise ValueError(
            f"expected floating-point logits in {source.name}, got {source.stored}; name the array or column of logits "
            "after the path, as in file.npz#logits, or convert them"
        )
    if source.rows == 0 or source.width == 0:
        raise ValueError(
            f"expected at least one row and one class in {source.name}, got {source.rows} rows of {source.width}"
        )
    return source


def open_column(where: str | os.PathLike[str], role: str, kinds: str = "iu") -> Source:
    """One value per row: labels (whole numbers), or the names of groups (``kinds="iuU"``)."""
    source = _open(where, role, matrix=False)
    if source.dtype.kind not in kinds:
        wanted = "whole numbers" if kinds == "iu" else "whole numbers or text"
        raise ValueError(
            f"expected {wanted} in {source.name}, got {source.stored}; name the right array or column after the path, as in "
            "file.parquet#label, or convert it"
        )
    return source


def _open(where: str | os.PathLike[str], role: str, matrix: bool) -> Source:
    path, name = _split(os.fspath(where))
    if not os.path.exists(path):
        raise FileNotFoundError(f"expected the {role} at {path}, got no file there; check the path")
    if not os.path.isfile(path):
        raise ValueError(f"expected the {role} in a regular file, got {path}; name one file")
    with open(path, "rb") as file:
        start = file.read(8)
    label = f"the {role} {where}"
    if start.startswith(b"\x93NUMPY"):
        return _npy(path, label, name, matrix)
    if start.startswith(b"PK"):
        return _npz(path, label, name, matrix)
    if start.startswith(b"PAR1"):
        return _parquet(path, label, name, matrix)
    if start.startswith(b"ARROW1"):
        return _arrow(path, label, name, matrix)
    if start == llama.MAGIC:
        return _base_file(path, label, name, matrix)
    if path.endswith(".safetensors"):
        return _safetensors(path, label, name, matrix)
    raise ValueError(
        f"expected {label} to be .npy, .npz, .safetensors, Parquet, Arrow IPC (file format) or a base "
        f"file of llama.cpp, got a file that begins with "
        f"{start!r}; convert it"
    )


def _split(where: str) -> tuple[str, str | None]:
    """Path and name; a file whose own name has the sign is taken as it is."""
    path, sign, name = where.rpartition("#")
    return (path, name) if sign and not os.path.exists(where) else (where, None)


def _choose(names: list[str], wanted: str | None, label: str, what: str) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        assert wanted is not None
        return wanted
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    got = f"no {what} {wanted!r}" if wanted is not None else f"{len(names)}"
    example = names[0] if names else "name"
    raise ValueError(
        f"expected one {what} of {label}, got {got} (there: {shown or 'none'}); write it after the path, as in "
        f"{label.split(' ', 2)[2].partition('#')[0]}#{example}"
    )


# ---- Arrays that lie in the file as they lie in memory -----------------------------------------------------------


def _shape(shape: tuple[int, ...], label: str, matrix: bool) -> tuple[int, int | None]:
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


def _raw(path: str, offset: int, shape: tuple[int, ...], stored: np.dtype[Any], label: str, matrix: bool) -> Source:
    """An array in row-major order that begins at a byte of a file."""
    rows, width = _shape(shape, label, matrix)
    row_bytes = stored.itemsize * (1 if width is None else width)
    size = os.path.getsize(path)
    if offset + rows * row_bytes > size:
        raise ValueError(
            f"expected {offset + rows * row_bytes} bytes in {label}, got {size}: it is cut off; write it again"
        )
    native = stored.newbyteorder("=")

    def blocks(start: int, block_rows: int) -> Iterator[Load]:
        file = _Descriptor(path)

        def read(first: int, last: int) -> Block:
            values = np.empty((last - first) if width is None else (last - first, width), stored)
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

    return Source(label, rows, width, native, stored.name, blocks)


def _npy_header(file: IO[bytes], label: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
    except ValueError as error:
        raise ValueError(f"expected {label} to be an array of NumPy, got {error}; write it again") from error
    if dtype.hasobject or dtype.kind not in "fiuU":
        raise ValueError(
            f"expected numbers in {label}, got {dtype}; convert them (bfloat16 has no type in NumPy's files: write "
            "safetensors)"
        )
    if fortran and len(shape) > 1:
        raise ValueError(
            f"expected {label} in row-major order, got column-major; save np.ascontiguousarray(array) instead"
        )
    return shape, dtype


def _npy(path: str, label: str, name: str | None, matrix: bool) -> Source:
    if name is not None:
        raise ValueError(f"expected no name for {label}, a file with one array, got {name!r}; leave it out")
    with open(path, "rb") as file:
        shape, dtype = _npy_header(file, label)
        return _raw(path, file.tell(), shape, dtype, label, matrix)


def _npz(path: str, label: str, name: str | None, matrix: bool) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")]
            chosen = _choose(names, name, label, "array") + ".npy"
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
        return _raw(path, info.header_offset + 30 + name_length + extra_length + header, shape, dtype, label, matrix)
    rows, width = _shape(shape, label, matrix)
    row_bytes = dtype.itemsize * (1 if width is None else width)
    if info.file_size != header + rows * row_bytes:
        raise ValueError(f"expected {header + rows * row_bytes} bytes in {label}, got {info.file_size}; write it again")
    native = dtype.newbyteorder("=")

    def chunks(start: int, block_rows: int) -> Iterator[Block]:
        with zipfile.ZipFile(path) as archive, archive.open(chosen) as member:
            left = header + start * row_bytes
            while left:
                left -= len(_exactly(member, min(left, _BUFFER), label))
            for first in range(start, rows, block_rows):
                count = min(block_rows, rows - first)
                values = np.frombuffer(_exactly(member, count * row_bytes, label), dtype)
                yield Block(values.reshape(count if width is None else (count, width)).astype(native, copy=False))

    return Source(label, rows, width, native, dtype.name, _in_turn(chunks), True)


def _exactly(file: IO[bytes], count: int, label: str) -> bytes:
    try:
        data = file.read(count)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"expected {label} to be whole, got {error}; write it again") from error
    if len(data) != count:
        raise ValueError(f"expected {count} more bytes in {label}, got {len(data)}; write it again")
    return data


def _ahead(loads: Iterator[Load]) -> Iterator[Load]:
    """The same blocks, each read on a thread of its own while the one before is worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, loads, None)
        while (load := coming.result()) is not None:
            coming = pool.submit(next, loads, None)
            yield load


def _in_turn(chunks: Callable[[int, int], Iterator[Block]]) -> Callable[[int, int], Iterator[Load]]:
    """Blocks of a file that is read from its front to its end, on the thread that asks for them."""

    def blocks(start: int, rows: int) -> Iterator[Load]:
        for block in chunks(start, rows):
            yield lambda block=block: block  # type: ignore[misc]

    return blocks


def _base_file(path: str, label: str, name: str | None, matrix: bool) -> Source:
    """The log-probabilities of a base file of llama.cpp; as a column, the labels in it, or by the name ``chunk`` the chunks."""
    if name is not None and (matrix or name != "chunk"):
        allowed = "no name" if matrix else "no name, or chunk,"
        raise ValueError(f"expected {allowed} for {label}, a base file of llama.cpp, got {name!r}; leave it out")
    head = llama.read_head(path, label)
    if not matrix:
        labels = head.chunk_of_rows if name == "chunk" else head.labels
        numbers = _in_turn(lambda start, rows: (Block(labels[i : i + rows]) for i in range(start, len(labels), rows)))
        return Source(label, head.rows, None, labels.dtype, labels.dtype.name, numbers)
    words = _raw(path, head.offset, (head.rows, head.codes), np.dtype("<u2"), label, matrix)

    def blocks(start: int, rows: int) -> Iterator[Load]:
        for load in words.load(start, rows):
            yield lambda load=load: Block(llama.decoded(load().values, head.classes))  # type: ignore[misc]

    return Source(label, head.rows, head.classes, np.dtype(np.float32), "16-bit codes", blocks)


def base_file(where: str | os.PathLike[str]) -> llama.BaseFile | None:
    """The head of a base file of llama.cpp; None of any other file."""
    path, _ = _split(os.fspath(where))
    with open(path, "rb") as file:
        if file.read(len(llama.MAGIC)) != llama.MAGIC:
            return None
    return llama.read_head(path, path)


_SAFETENSORS = {
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2",
    "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
}  # fmt: skip


def _safetensors(path: str, label: str, name: str | None, matrix: bool) -> Source:
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
    entry = table[_choose(list(table), name, label, "tensor")]
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
        count = int(np.prod(shape, dtype=object))
        dtype = np.dtype(_SAFETENSORS[kind])
        fits = 0 <= first <= last and last - first == count * dtype.itemsize and min(shape, default=0) >= 0
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"expected a tensor of {', '.join(_SAFETENSORS)} in {label}, got {entry!r:.200}; convert it"
        ) from error
    if not fits:
        raise ValueError(
            f"expected shape and place of {label} to agree, got {shape} in {last - first} bytes; write it again"
        )
    source = _raw(path, 8 + length + first, shape, dtype, label, matrix)
    if kind == "BF16":
        return _widened(source)
    return source


def _widened(source: Source) -> Source:
    """bfloat16, for which NumPy has no type, as the float32 with the same values."""

    def blocks(start: int, rows: int) -> Iterator[Load]:
        for load in source.load(start, rows):
            yield lambda load=load: Block(from_bfloat16(load().values))  # type: ignore[misc]

    return Source(source.name, source.rows, source.width, np.dtype(np.float32), "bfloat16", blocks)


def from_bfloat16(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 of bfloat16, given as its bits."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


# ---- Columns -----------------------------------------------------------------------------------------------------


def require(*packages: str) -> None:
    """An ImportError that says what to install where one is missing; before any work is done."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"expected the package {package} for scoring, got none; pip install 'pykd[score]'")


def _arrow_modules() -> tuple[Any, Any]:
    require("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as parquet

    return pa, parquet


def _columns(schema: Any, name: str | None, label: str, matrix: bool) -> list[str]:
    """The column of lists, or the flat columns that make up a row."""
    pa, _ = _arrow_modules()
    listed = [f.name for f in schema if _list_kind(pa, f.type)]
    if not matrix:
        return [_choose([f.name for f in schema if f.name not in listed], name, label, "column")]
    if name is not None and name in schema.names:
        return [name]
    if name is not None and any(sign in name for sign in "*?["):
        chosen = [f.name for f in schema if fnmatchcase(f.name, name)]
    elif name is None and not listed:
        chosen = [f.name for f in schema if pa.types.is_floating(f.type)]
    else:
        return [_choose(listed, name, label, "column")]
    if not chosen:
        raise ValueError(
            f"expected columns of {label}, got none that fit (there: {', '.join(schema.names[:20])}); write a column of "
            "lists, or a pattern such as logit_*, after the path and a #"
        )
    kinds = {str(schema.field(column).type): column for column in reversed(chosen)}
    if len(kinds) > 1:
        got = ", ".join(f"{kind} ({column})" for kind, column in sorted(kinds.items()))
        raise ValueError(f"expected one type for all columns of {label}, got {got}; convert them to one")
    return chosen


def _list_kind(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _numpy_type(pa: Any, kind: Any, label: str) -> np.dtype[Any]:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return np.dtype(np.str_)
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        numpy_type: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
        return numpy_type
    raise ValueError(f"expected numbers in {label}, got {kind}; convert them")


def _column_source(
    schema: Any,
    rows: int,
    name: str | None,
    label: str,
    matrix: bool,
    batches: Callable[[list[str], int, int], Iterator[tuple[Any, str]]],
) -> Source:
    """A source over batches of Arrow: ``batches(columns, first row, rows)`` gives them and where they lie."""
    pa, _ = _arrow_modules()
    import pyarrow.compute as compute

    columns = _columns(schema, name, label, matrix)
    first = schema.field(columns[0]).type
    in_lists = _list_kind(pa, first)
    if matrix and len(columns) == 1 and not in_lists and pa.types.is_floating(first) is False:
        raise ValueError(f"expected a column of lists of floats in {label}, got {first}; name another column")
    dtype = _numpy_type(pa, first.value_type if in_lists else first, label)
    width: int | None = None
    if in_lists:
        width = first.list_size if pa.types.is_fixed_size_list(first) else 0
        if not width and rows:
            batch, _ = next(batches(columns, 0, 1024))
            lengths = compute.list_value_length(batch.column(0)).drop_null().to_numpy(zero_copy_only=False)
            width = int(np.bincount(lengths).argmax()) if len(lengths) else 0
    elif matrix:
        width = len(columns)

    def chunks(start: int, block_rows: int) -> Iterator[Block]:
        for batch, place in batches(columns, start, block_rows):
            try:
                if in_lists:
                    assert width is not None
                    yield _from_lists(pa, batch.column(0), width, dtype)
                elif matrix:
                    yield _from_flat(batch, dtype)
                else:
                    yield _from_column(batch.column(0), dtype)
            except pa.ArrowInvalid as error:
                raise ValueError(f"expected {label} to be whole, got {error} in {place}; write it again") from error

    return Source(
        label, rows, width, dtype, str(first), _in_turn(lambda start, count: _exact(chunks(start, count), count)), True
    )


def _exact(chunks: Iterator[Block], rows: int) -> Iterator[Block]:
    """The same rows in blocks of exactly that many, the last one excepted."""
    kept: list[Block] = []
    held = 0
    for chunk in chunks:
        while len(chunk.values):
            part = _part(chunk, 0, rows - held)
            chunk = _part(chunk, rows - held, len(chunk.values))
            kept.append(part)
            held += len(part.values)
            if held == rows:
                yield _joined(kept)
                kept, held = [], 0
    if kept:
        yield _joined(kept)


def _part(block: Block, first: int, last: int) -> Block:
    return Block(*(None if part is None else part[first:last] for part in block))  # type: ignore[arg-type]


def _joined(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]

    def flags(name: str) -> Any:
        if all(getattr(block, name) is None for block in blocks):
            return None
        return np.concatenate(
            [
                np.zeros(len(block.values), bool) if getattr(block, name) is None else getattr(block, name)
                for block in blocks
            ]
        )

    return Block(np.concatenate([block.values for block in blocks]), flags("ragged"), flags("missing"))


def _plain(array: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Values without lists; what is null becomes NaN."""
    if array.null_count:
        values = array.to_numpy(zero_copy_only=False)  # a float type keeps its own, with NaN
        return np.asarray(values, dtype)
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype)


def _from_lists(pa: Any, column: Any, width: int, dtype: np.dtype[Any]) -> Block:
    rows = len(column)
    missing = np.asarray(column.is_null().to_numpy(zero_copy_only=False)) if column.null_count else None
    if pa.types.is_fixed_size_list(column.type):
        values = _plain(column.values.slice(column.offset * width, rows * width), dtype).reshape(rows, width)
        return Block(values, None, missing)
    offsets = np.asarray(column.offsets)
    lengths = np.diff(offsets)
    if missing is None and bool((lengths == width).all()):
        values = _plain(column.values.slice(int(offsets[0]), rows * width), dtype).reshape(rows, width)
        return Block(values)
    whole = lengths == width
    if missing is not None:
        whole &= ~missing
    values = np.full((rows, width), np.nan, dtype)
    flat = _plain(column.values, dtype)
    for row in np.flatnonzero(whole):
        values[row] = flat[offsets[row] : offsets[row + 1]]
    ragged = ~whole if missing is None else ~whole & ~missing
    return Block(values, ragged, missing)


def _from_flat(batch: Any, dtype: np.dtype[Any]) -> Block:
    values = np.empty((batch.num_rows, batch.num_columns), dtype)
    for place in range(batch.num_columns):
        values[:, place] = _plain(batch.column(place), dtype)
    return Block(values)


def _from_column(column: Any, dtype: np.dtype[Any]) -> Block:
    missing = np.asarray(column.is_null().to_numpy(zero_copy_only=False)) if column.null_count else None
    if dtype.kind == "U":
        values = np.asarray(["" if value is None else str(value) for value in column.to_pylist()], np.str_)
    elif missing is not None:
        values = np.asarray(column.fill_null(0).to_numpy(zero_copy_only=False), dtype)
    else:
        values = np.asarray(column.to_numpy(zero_copy_only=False), dtype)
    return Block(values, None, missing)


def _parquet(path: str, label: str, name: str | None, matrix: bool) -> Source:
    pa, parquet = _arrow_modules()

    def opened() -> Any:
        # Without a buffer pyarrow holds a whole column of a row group.
        return parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)

    try:
        with opened() as file:
            groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            schema = file.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"expected {label} to be a whole Parquet file, got {_first_line(error)}; write it again"
        ) from error

    def batches(columns: list[str], start: int, rows: int) -> Iterator[tuple[Any, str]]:
        before = 0
        with opened() as file:
            for group, count in enumerate(groups):
                before += count
                skip = max(0, count - (before - start))
                if before <= start:
                    continue
                try:
                    for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                        if skip >= batch.num_rows:
                            skip -= batch.num_rows
                            continue
                        yield batch.select(columns).slice(skip), f"row group {group}"
                        skip = 0
                except (pa.ArrowInvalid, OSError) as error:
                    raise ValueError(
                        f"expected {label} to be whole, got {_first_line(error)} in row group {group}; write it again"
                    ) from error

    return _column_source(schema, sum(groups), name, label, matrix, batches)


def _arrow(path: str, label: str, name: str | None, matrix: bool) -> Source:
    pa, _ = _arrow_modules()
    import pyarrow.ipc as ipc

    def opened() -> tuple[Any, mmap.mmap]:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return ipc.open_file(pa.py_buffer(mapped)), mapped

    try:
        reader, _ = opened()
        counts = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"expected {label} to be a whole Arrow file, got {_first_line(error)}; write it again"
        ) from error

    def batches(columns: list[str], start: int, rows: int) -> Iterator[tuple[Any, str]]:
        reader, mapped = opened()
        before = 0
        for number, count in enumerate(counts):
            before += count
            if before <= start:
                continue
            batch = reader.get_batch(number).select(columns)
            for first in range(max(0, count - (before - start)), count, rows):
                yield batch.slice(first, rows), f"record batch {number}"
                mapped.madvise(mmap.MADV_DONTNEED)  # pages that were read would count to this process's memory

    return _column_source(reader.schema, sum(counts), name, label, matrix, batches)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def path_of(where: str | os.PathLike[str]) -> str:
    """The path without the name of an array or column."""
    return _split(os.fspath(where))[0]


def fingerprint(where: str | os.PathLike[str]) -> dict[str, Any]:
    """What tells one file from another without reading it: for runs that are taken up again."""
    path, name = _split(os.fspath(where))
    if os.path.isdir(path):  # of an exported loss: the file that is run
        path = os.path.join(path, "loss.onnx")
    status = os.stat(path)
    return {"path": str(Path(path).resolve()), "name": name, "bytes": status.st_size, "changed": status.st_mtime_ns}
