"""Teacher outputs on disk: a safetensors file whose tensors have one row per row, with a checksum per block of rows.

Any reader of safetensors opens it, and may map it. Beside each tensor ``name`` lies ``name.crc32``, the CRC-32 of each of its blocks of
``block_rows`` rows; what the numbers mean is JSON in the header, ``pykd.teacher``, with a CRC-32 of its own, as has the table of tensors.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pykd import files
from pykd._version import __version__
from pykd.scoring.whole_file import WholeFile

FORMAT = 1
METADATA = "pykd.teacher"
TENSORS = "pykd.tensors"
CHECKSUM = ".crc32"
_BLOCK_BYTES = 1 << 20  # of the tensors of a block, about
_MOST_BLOCK_ROWS = 1 << 16
_LARGEST_HEADER = 1 << 20
_TYPES = {"U8": "<u1", "U32": "<u4", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}
_NAMES = {np.dtype(stored): name for name, stored in _TYPES.items()}

Array = np.ndarray[Any, Any]
Shapes = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


class Writer(WholeFile):
    """Writes such a file from its first row to its last.

    Args:
        path: of the file.
        facts: what the metadata say; JSON.
        tensors: type and shape of each, the rows first.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], tensors: Shapes) -> None:
        row_bytes = sum(_row_bytes(*tensor) for tensor in tensors.values())
        self.block_rows = min(1 << max(_BLOCK_BYTES // row_bytes, 1).bit_length() - 1, _MOST_BLOCK_ROWS)
        sums = {
            name + CHECKSUM: (np.dtype("<u4"), (-(-shape[0] // self.block_rows),))
            for name, (_, shape) in tensors.items()
        }
        self._tensors = {
            **sums,
            **dict(sorted(tensors.items(), key=lambda item: -item[1][0].itemsize)),
        }  # so all lie aligned
        text = json.dumps({"format": FORMAT, "pykd": __version__, "block_rows": self.block_rows, **facts})
        table: dict[str, Any] = {}
        place = 0
        for name, (dtype, shape) in self._tensors.items():
            size = shape[0] * _row_bytes(dtype, shape)
            table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
            place += size
        sums_of = {METADATA + CHECKSUM: _checksum(text), TENSORS + CHECKSUM: _checksum(json.dumps(table))}
        encoded = json.dumps({"__metadata__": {METADATA: text, **sums_of}, **table}).encode()
        encoded += b" " * (-len(encoded) % 8)
        head = len(encoded).to_bytes(8, "little") + encoded
        self._place = {name: len(head) + table[name]["data_offsets"][0] for name in self._tensors}
        self._done = dict.fromkeys(tensors, 0)
        self._sums: dict[str, list[int]] = {name: [] for name in tensors}
        super().__init__(path, len(head) + place)
        self._head = head

    def __enter__(self) -> Writer:
        super().__enter__()
        try:
            self.write(0, self._head)
        except OSError as error:
            super().__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as failure:
                super().__exit__(type(failure), failure, None)
                raise
        super().__exit__(kind, error, at)

    def append(self, **rows: Array) -> None:
        """The next rows of some tensors."""
        for name, array in rows.items():
            dtype, shape = self._tensors[name]
            done = self._done[name]
            assert array.shape[1:] == shape[1:] and done + len(array) <= shape[0], name
            data = np.ascontiguousarray(array, dtype)
            self.write(self._place[name] + done * _row_bytes(dtype, shape), data.reshape(-1).view(np.uint8).data)
            while len(data):
                left = self.block_rows - done % self.block_rows
                sums = self._sums[name]
                before = sums.pop() if left < self.block_rows else 0
                sums.append(zlib.crc32(data[:left].reshape(-1).view(np.uint8).data, before))
                done += len(data[:left])
                data = data[left:]
            self._done[name] = done

    def _finish(self) -> None:
        for name, sums in self._sums.items():
            rows = self._tensors[name][1][0]
            if self._done[name] != rows:
                raise RuntimeError(
                    f"expected {rows} rows of {name} for {self.path}, got {self._done[name]}; report this"
                )
            self.write(self._place[name + CHECKSUM], np.array(sums, "<u4").tobytes())


class Reader:
    """Reads rows of such a file, and compares every block that it touches with its checksum. Threads may read at once."""

    def __init__(self, path: str, label: str) -> None:
        self.label = label
        self._file = os.open(path, os.O_RDONLY)
        length = int.from_bytes(self._pread(0, 8), "little")
        header = files.parse_json(self._pread(8, length), f"the header of {label}")
        try:
            self._read_header(header, 8 + length)
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"expected the header of teacher outputs in {label}, got another ({error}); write it again"
            ) from error

    def _read_header(self, header: dict[str, Any], start: int) -> None:
        label = self.label
        text = header["__metadata__"][METADATA]
        if header["__metadata__"].get(METADATA + CHECKSUM) != _checksum(text):
            raise self._damaged("the metadata")
        table = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if header["__metadata__"].get(TENSORS + CHECKSUM) != _checksum(json.dumps(table)):
            raise self._damaged("the table of tensors")
        self.facts: dict[str, Any] = files.parse_json(text, f"the metadata of {label}")
        if self.facts.get("format") != FORMAT:
            raise ValueError(
                f"expected teacher outputs of format {FORMAT} in {label}, got {self.facts.get('format')!r}; read them with the pykd that "
                f"wrote them ({self.facts.get('pykd')})"
            )
        self.block_rows = int(self.facts["block_rows"])
        self._tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._place: dict[str, int] = {}
        end = start
        for name, entry in table.items():
            self._tensors[name] = (np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"]))
            first, last = entry["data_offsets"]
            dtype, shape = self._tensors[name]
            if last - first != shape[0] * _row_bytes(dtype, shape):
                raise self._damaged(f"the place of {name}")
            self._place[name] = start + first
            end = max(end, start + last)
        size = os.fstat(self._file).st_size
        if size != end:
            raise ValueError(f"expected {end:,} bytes in {label}, got {size:,}: it is cut off; write it again")
        self._sums = {
            name.removesuffix(CHECKSUM): np.frombuffer(self._pread(self._place[name], 4 * shape[0]), "<u4")
            for name, (_, shape) in self._tensors.items()
            if name.endswith(CHECKSUM)
        }

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def tensor(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape of a tensor."""
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def read(self, name: str, first: int, last: int) -> Array:
        """The rows from ``first`` up to ``last`` of a tensor."""
        dtype, shape = self._tensors[name]
        row_bytes = _row_bytes(dtype, shape)
        begin = first // self.block_rows
        end = -(-last // self.block_rows)
        start = begin * self.block_rows
        stop = min(end * self.block_rows, shape[0])
        data = self._pread(self._place[name] + start * row_bytes, (stop - start) * row_bytes)
        view = memoryview(data)
        for block in range(begin, end):
            low = (block * self.block_rows - start) * row_bytes
            if zlib.crc32(view[low : low + self.block_rows * row_bytes]) != self._sums[name][block]:
                rows = f"rows {block * self.block_rows} to {min((block + 1) * self.block_rows, shape[0]) - 1}"
                raise self._damaged(f"block {block} of {name} ({rows})")
        array = np.frombuffer(data, dtype).reshape(-1, *shape[1:])
        return array[first - start : last - start]

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"expected {what} in {self.label} to have its checksum, got other bytes: the file is damaged; copy it or write it again"
        )

    def _pread(self, place: int, size: int) -> bytes:
        parts = []
        left = size
        while left:
            part = os.pread(self._file, left, place)
            if not part:
                raise ValueError(
                    f"expected {size:,} bytes at {place:,} of {self.label}, got its end: it is cut off; write it again"
                )
            parts.append(part)
            place += len(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def is_container(path: str) -> bool:
    """Whether a safetensors file holds teacher outputs that pykd wrote."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return length <= _LARGEST_HEADER and f'"{METADATA}"'.encode() in file.read(length)


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _row_bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    size = dtype.itemsize
    for length in shape[1:]:
        size *= length
    return size
