"""Columns of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pykd.scoring.formats.columns import arrow_modules, column_source, opened_file
from pykd.scoring.formats.source import BUFFER, Source, first_line


def parquet(path: str, label: str, name: str | None, matrix: bool) -> Source:
    pa, pq = arrow_modules()

    def opened() -> Any:
        # Without a buffer pyarrow holds a whole column of a row group.
        return pq.ParquetFile(opened_file(path), pre_buffer=False, buffer_size=BUFFER)

    try:
        with opened() as file:
            groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            schema = file.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"expected {label} to be a whole Parquet file, got {first_line(error)}; write it again"
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
                        f"expected {label} to be whole, got {first_line(error)} in row group {group}; write it again"
                    ) from error

    source = column_source(schema, sum(groups), name, label, matrix, batches)
    return replace(source, group_rows=groups[0] if len({*groups[:-1]}) == 1 else None)
