"""Columns of Arrow IPC files (the file format, also called Feather 2)."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

from pykd.scoring.formats.columns import arrow_modules, column_source
from pykd.scoring.formats.source import Source, first_line


def arrow(path: str, label: str, name: str | None, matrix: bool) -> Source:
    pa, _ = arrow_modules()
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
            f"expected {label} to be a whole Arrow file, got {first_line(error)}; write it again"
        ) from error

    def batches(columns: list[str], start: int, rows: int) -> Iterator[tuple[Any, str]]:
        reader, mapped = opened()
        before = 0
        for number, count in enumerate(counts):
            before += count
            if before <= start:
                continue
            try:
                batch = reader.get_batch(number).select(columns)
                batch.validate(full=True)  # offsets of a damaged file lead anywhere
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(
                    f"expected {label} to be whole, got {first_line(error)} in record batch {number}; write it again"
                ) from error
            for first in range(max(0, count - (before - start)), count, rows):
                yield batch.slice(first, rows), f"record batch {number}"
                mapped.madvise(mmap.MADV_DONTNEED)  # pages that were read would count to this process's memory

    return column_source(reader.schema, sum(counts), name, label, matrix, batches)
