"""The file of scores: written exactly once, whatever happens on the way.

While rows are scored they go to a journal beside the file, ``scores.parquet.partial``: a header with everything that the
scores depend on, then records with a checksum each. A run that finds the journal of the same work keeps its whole records,
cuts off what comes after them, and goes on with the next row. At the end the journal becomes the Parquet file under another
name, which is forced to the disk and takes its place in one step.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pykd import files
from pykd._version import __version__
from pykd.scoring.formats.columns import opened_file
from pykd.scoring.row_scores import OK, STATUSES
from pykd.scoring.sources import Block, Source, require

_MAGIC = b"pykd scores 1\n"
_LENGTHS = struct.Struct("<II")  # of the header: bytes and CRC-32. Of a record: rows and CRC-32
_WRITE_AT = 256 << 10  # bytes of records that are gathered before they are written
GROUP_ROWS = 1 << 17  # rows of a row group in the Parquet file
METADATA = b"pykd.scores"
_FACTS = {"settings", "losses", "classes", "temperature", "inputs"}

Array = np.ndarray[Any, Any]


def journal_of(path: Path) -> Path:
    """Where rows lie until all of them are scored."""
    return path.with_name(path.name + ".partial")


class Journal:
    """Records of rows in order, of which a run that was ended at any byte loses none that had been written.

    Args:
        path: of the Parquet file that it will become.
        settings: all that the scores depend on; JSON.
        dtype: of a record.
    """

    def __init__(self, path: Path, settings: dict[str, Any], dtype: np.dtype[Any]) -> None:
        self.path = journal_of(path)
        self.dtype = dtype
        self.rows = 0
        self.forgot = False  # whether there was the journal of other work
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(
                f"expected to write {self.path}, got {error.strerror!r}; check the folder of --out"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise RuntimeError(
                f"expected to be alone with {self.path}, got another run that writes it; wait for it, or take another --out"
            ) from error
        text = json.dumps(settings, sort_keys=True).encode()
        self._header = _MAGIC + _LENGTHS.pack(len(text), zlib.crc32(text)) + text
        if _read(self._file, 0, len(self._header)) == self._header:
            end = len(self._header)
            for rows, _, after in self._records():
                self.rows += rows
                end = after
            os.ftruncate(self._file, end)
        else:
            start = _read(self._file, 0, len(_MAGIC))
            if not _MAGIC.startswith(start):  # a run may have ended in the middle of it
                os.close(self._file)
                raise ValueError(
                    f"expected no file at {self.path}, or rows of an earlier run, got another file; remove it, or take another --out"
                )
            self.forgot = start == _MAGIC
            os.ftruncate(self._file, 0)
            self._write(self._header)
        os.lseek(self._file, 0, os.SEEK_END)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if not isinstance(error, OSError):
                self.flush()
        finally:
            os.close(self._file)

    def append(self, records: Array) -> None:
        """Adds the next rows."""
        payload = records.tobytes()
        self._waiting += [_LENGTHS.pack(len(records), zlib.crc32(payload)), payload]
        self._waiting_bytes += len(payload)
        self.rows += len(records)
        if self._waiting_bytes >= _WRITE_AT:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting."""
        data, self._waiting, self._waiting_bytes = b"".join(self._waiting), [], 0
        if data:
            self._write(data)

    def records(self) -> Iterator[Array]:
        """All rows, as they were appended."""
        self.flush()
        for _, payload, _ in self._records():
            yield np.frombuffer(payload, self.dtype)

    def remove(self) -> None:
        self.path.unlink()

    def _records(self) -> Iterator[tuple[int, bytes, int]]:
        """Rows, contents and end of each whole record."""
        place = len(self._header)
        while True:
            head = _read(self._file, place, _LENGTHS.size)
            if len(head) < _LENGTHS.size:
                return
            rows, checksum = _LENGTHS.unpack(head)
            place += len(head)
            size = rows * self.dtype.itemsize
            if rows == 0 or place + size > os.fstat(self._file).st_size:
                return
            payload = _read(self._file, place, size)
            if len(payload) < size or zlib.crc32(payload) != checksum:
                return
            place += size
            yield rows, payload, place

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as error:
            raise full(self.path, error) from error


def full(path: Path, error: OSError) -> OSError:
    """The message for what could not be written."""
    got = "a full disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else repr(error.strerror or str(error))
    return OSError(
        f"expected to write {path}, got {got}; make room, and run the same command again: the rows that were written are kept"
    )


def _read(file: int, place: int, size: int) -> bytes:
    parts = []
    while size and (part := os.pread(file, size, place)):
        parts.append(part)
        place += len(part)
        size -= len(part)
    return b"".join(parts)


def write_parquet(journal: Journal, path: Path, facts: dict[str, Any], groups: Source | None) -> None:
    """Turns a journal into the file of scores, in one step."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    fields = [("row", pa.int64()), *((name, column.type) for name, column in columns_of(np.zeros(0, journal.dtype)))]
    if groups is not None:
        fields.append(("group", pa.string() if groups.dtype.kind == "U" else pa.from_numpy_dtype(groups.dtype)))
    schema = pa.schema(fields, {METADATA: json.dumps({"pykd": __version__, **facts})})
    group_blocks = iter(()) if groups is None else groups.blocks(0, GROUP_ROWS)
    try:
        with (
            files.replacing(path) as file,
            parquet.ParquetWriter(file, schema, compression="zstd", use_dictionary=["status"]) as writer,
        ):
            first = 0
            for records in _gathered(journal.records(), GROUP_ROWS):
                columns = [pa.array(np.arange(first, first + len(records)))]
                columns += [column for _, column in columns_of(records)]
                if groups is not None:
                    columns.append(pa.array(group_names(next(group_blocks)(), first), schema.field("group").type))
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                first += len(records)
    except OSError as error:
        raise full(path, error) from error


def columns_of(records: Array) -> list[tuple[str, Any]]:
    """Records as columns of Arrow: ``status``, then the others by their names, null where the row does not count."""
    import pyarrow as pa

    bad = records["status"] != OK
    status = pa.DictionaryArray.from_arrays(pa.array(records["status"].astype(np.int8)), pa.array(STATUSES))
    found = [("status", status)]
    for name in records.dtype.names or ():
        if name != "status":
            mask = None if name == "label" else bad
            found.append((name, pa.array(np.ascontiguousarray(records[name]), mask=mask)))
    return found


def group_names(block: Block, first: int) -> Array:
    """The groups of rows from ``first`` on; each has one."""
    if block.missing is not None and block.missing.any():
        raise ValueError(
            f"expected a group for every row, got null in row {first + int(block.missing.argmax())}; give each row one"
        )
    return block.values


def _gathered(parts: Iterator[Array], rows: int) -> Iterator[Array]:
    """The same records, that many at a time."""
    waiting: list[Array] = []
    held = 0
    for part in parts:
        while len(part):
            waiting.append(part[: rows - held])
            held += len(waiting[-1])
            part = part[len(waiting[-1]) :]
            if held == rows:
                yield np.concatenate(waiting)
                waiting, held = [], 0
    if waiting:
        yield np.concatenate(waiting)


class Scores:
    """A finished file of scores, read column by column."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        require("pyarrow")
        import pyarrow as pa
        import pyarrow.parquet as parquet

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"expected scores at {path}, got no file there; `pykd score --out` writes them")
        try:
            self._file = parquet.ParquetFile(opened_file(self.path), pre_buffer=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"expected scores at {path}, got {error}; score again") from error
        text = (self._file.schema_arrow.metadata or {}).get(METADATA)
        if text is None:
            raise ValueError(
                f"expected scores that `pykd score` wrote at {path}, got another Parquet file; name the file of --out"
            )
        self.facts: dict[str, Any] = files.parse_json(text, f"what {path} says of itself")
        if not isinstance(self.facts, dict) or _FACTS - self.facts.keys():
            raise ValueError(
                f"expected {', '.join(sorted(_FACTS))} in what {path} says of itself, got others; score again"
            )
        self.rows: int = self._file.metadata.num_rows
        schema = self._file.schema_arrow
        self.names: list[str] = list(schema.names)
        kinds = {"settings": dict, "classes": int, "inputs": dict, "left_out": dict}
        odd = [name for name, kind in kinds.items() if not isinstance(self.facts.get(name, {}), kind)]
        if odd or "teacher" not in self.facts["settings"].get("files", {}):
            raise ValueError(
                f"expected what `pykd score` says of itself in {path}, got others ({', '.join(odd) or 'settings'}); score again"
            )
        losses = self.facts["losses"]
        if not isinstance(losses, list) or not losses or not all(isinstance(name, str) for name in losses):
            raise ValueError(
                f"expected names of losses in what {path} says of itself, got {losses!r:.100}; score again"
            )
        needed = {"row", "status", "teacher_class", "student_class", "teacher_class_rank", *losses}
        wrong = [name for name in needed if self.names.count(name) != 1]
        for field in schema:
            fits = pa.types.is_integer(field.type) or field.type == pa.float32() or field.name == "group"
            if not (pa.types.is_dictionary(field.type) if field.name == "status" else fits):
                wrong.append(field.name)
        if wrong:
            raise ValueError(
                f"expected the columns that `pykd score` writes in {path}, got others ({', '.join(sorted(set(wrong)))}); score again"
            )
        self.has_group = "group" in self.names

    def blocks(self, *names: str, bad: bool = False) -> Iterator[dict[str, Array]]:
        """Those columns, of the rows that count, or with ``bad`` of all; ``"row"`` and ``"status"`` (its
        place in :data:`STATUSES`) are always there."""
        wanted = list({"row", "status", *names})
        first = 0
        for batch in self._file.iter_batches(GROUP_ROWS, columns=wanted, use_threads=False):
            column = batch.column("status")
            kinds = column.dictionary.to_pylist()
            if column.null_count or not set(kinds) <= set(STATUSES):
                raise self._changed("status", f"one of {', '.join(STATUSES)}", first, len(column))
            codes = np.array([STATUSES.index(name) for name in kinds], np.uint8)
            status = codes[column.indices.to_numpy()]
            fine = status == OK
            kept = np.ones(len(status), bool) if bad else fine
            block: dict[str, Array] = {"status": status[kept]}
            for name in {"row", *names} - {"status"}:
                column = batch.column(name)
                self._check(name, column, fine, first)
                if name == "group":
                    values = column.to_numpy(zero_copy_only=False)
                else:
                    values = column.fill_null(0).to_numpy(zero_copy_only=False)
                block[name] = values[kept]
            first += len(status)
            yield block

    def _check(self, name: str, column: Any, fine: Array, first: int) -> None:
        """Refuses what was changed: everything that is computed takes rows that count at their word."""
        there = np.ones(len(fine), bool)
        if column.null_count:
            there = column.is_valid().to_numpy(zero_copy_only=False)
        if name in ("row", "group"):
            fine = np.ones(len(fine), bool)
        if name == "group":
            good, expected = there, "a group in every row"
        else:
            values = column.fill_null(0).to_numpy(zero_copy_only=False)
            classes = self.facts["classes"]
            if name == "row":
                good, expected = there & (values == first + np.arange(len(values))), "the rows from 0 on"
            elif name == "teacher_class_rank":
                good, expected = there & (values >= 1) & (values <= classes), f"a place from 1 to {classes}"
            elif values.dtype.kind in "iu":
                good, expected = there & (values >= 0) & (values < classes), f"a class from 0 to {classes - 1}"
            else:
                good, expected = there & np.isfinite(values), "a finite number"
        if not good[fine].all():
            raise self._changed(name, expected, first, len(fine))

    def _changed(self, name: str, expected: str, first: int, rows: int) -> ValueError:
        return ValueError(
            f"expected {expected} as {name} in {self.path}, as `pykd score` writes for rows that count, got others between rows {first} and "
            f"{first + rows - 1}; score again"
        )
