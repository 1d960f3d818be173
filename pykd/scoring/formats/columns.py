"""Columns of Arrow's types, whatever file they come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from pykd.scoring.formats.source import Block, Source, choose, exact, in_turn, require


def arrow_modules() -> tuple[Any, Any]:
    require("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as parquet

    return pa, parquet


def opened_file(path: str | os.PathLike[str]) -> Any:
    """A file for pyarrow, by a name of any bytes: as text it takes UTF-8 alone."""
    pa, _ = arrow_modules()
    return pa.OSFile(os.fsencode(path))


def _columns(schema: Any, name: str | None, label: str, matrix: bool) -> list[str]:
    """The column of lists, or the flat columns that make up a row."""
    pa, _ = arrow_modules()
    if matrix and name is None and "compressed_logprobs" in schema.names:
        raise ValueError(
            f"expected the settings of the compression for {label}, which has rows of DistillKit, got none; pass --distillkit with them"
        )
    fields = [f for f in schema if _list_kind(pa, _stored(f.type))]
    lists = [f.name for f in fields]
    if not matrix:
        return [choose([f.name for f in schema if f.name not in lists], name, label, "column")]
    # Images may lie beside the logits.
    listed = [f.name for f in fields if len(_axes(f.type)) == 1] or lists
    if name is not None and name in schema.names:
        return [name]
    if name is not None and any(sign in name for sign in "*?["):
        chosen = [f.name for f in schema if fnmatchcase(f.name, name)]
    elif name is None and not listed:
        chosen = [f.name for f in schema if pa.types.is_floating(f.type)]
    else:
        return [choose(listed, name, label, "column")]
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
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in kinds) or _is_view(pa, kind)


def storage_of(column: Any) -> Any:
    """What a column of tensors is made of; other columns are that themselves."""
    return getattr(column, "storage", column)


def _stored(kind: Any) -> Any:
    """The type of :func:`storage_of`."""
    return getattr(kind, "storage_type", kind)


def _axes(kind: Any) -> tuple[int, ...]:
    """Of each row of tensors; one of any length of other columns."""
    return tuple(getattr(kind, "shape", (0,)))


def _is_view(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _numpy_type(pa: Any, kind: Any, label: str) -> np.dtype[Any]:
    if (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_dictionary(kind)
        or pa.types.is_string_view(kind)
    ):
        return np.dtype(np.str_)
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        numpy_type: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
        return numpy_type
    raise ValueError(f"expected numbers in {label}, got {kind}; convert them")


def column_source(
    schema: Any,
    rows: int,
    name: str | None,
    label: str,
    matrix: bool,
    batches: Callable[[list[str], int, int], Iterator[tuple[Any, str]]],
) -> Source:
    """A source over batches of Arrow: ``batches(columns, first row, rows)`` gives them and where they lie."""
    pa, _ = arrow_modules()
    import pyarrow.compute as compute

    columns = _columns(schema, name, label, matrix)
    for column in columns:
        if schema.names.count(column) > 1:
            raise ValueError(f"expected one column {column!r} in {label}, got several of this name; rename them")
    first = _stored(schema.field(columns[0]).type)
    if len(axes := _axes(schema.field(columns[0]).type)) > 1:
        raise ValueError(
            f"expected lists, or tensors of one axis, in {label}, got tensors of the axes {axes}; write "
            "column.combine_chunks().to_numpy_ndarray() as .npy, whose axes before the last are rows"
        )
    in_lists = _list_kind(pa, first)
    if matrix and len(columns) == 1 and not in_lists and pa.types.is_floating(first) is False:
        raise ValueError(f"expected a column of lists of floats in {label}, got {first}; name another column")
    dtype = _numpy_type(pa, first.value_type if in_lists else first, label)
    width: int | None = None
    if in_lists:
        width = first.list_size if pa.types.is_fixed_size_list(first) else 0
        if not width and rows:
            batch, _ = next(batches(columns, 0, 1024))
            lengths = compute.list_value_length(storage_of(batch.column(0))).drop_null().to_numpy(zero_copy_only=False)
            width = int(np.bincount(lengths).argmax()) if len(lengths) else 0
    elif matrix:
        width = len(columns)

    def chunks(start: int, block_rows: int) -> Iterator[Block]:
        for batch, place in batches(columns, start, block_rows):
            try:
                if in_lists:
                    assert width is not None
                    yield _from_lists(pa, storage_of(batch.column(0)), width, dtype)
                elif matrix:
                    yield _from_flat(batch, dtype)
                else:
                    yield _from_column(batch.column(0), dtype)
            except pa.ArrowInvalid as error:
                raise ValueError(f"expected {label} to be whole, got {error} in {place}; write it again") from error

    return Source(
        label, rows, width, dtype, str(first), in_turn(lambda start, count: exact(chunks(start, count), count)), True
    )


def block_of_column(column: Any, width: int | None, label: str) -> Block:
    """An array of Arrow as rows: of lists of that length, or of single values where there is none.

    Args:
        column: the array.
        width: entries of a row; None: each row is one value.
        label: what it is, for messages.
    """
    pa, _ = arrow_modules()
    in_lists = _list_kind(pa, column.type)
    if in_lists != (width is not None):
        wanted = "a number in each row" if width is None else "lists"
        raise ValueError(f"expected {wanted} of {label}, got {column.type}; name another column")
    if width is None:
        return _from_column(column, _numpy_type(pa, column.type, label))
    return _from_lists(pa, column, width, _numpy_type(pa, column.type.value_type, label))


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
    in_order = not _is_view(pa, column.type)
    offsets = np.asarray(column.offsets)
    lengths = np.diff(offsets) if in_order else np.asarray(column.sizes)
    if in_order and missing is None and bool((lengths == width).all()):
        values = _plain(column.values.slice(int(offsets[0]), rows * width), dtype).reshape(rows, width)
        return Block(values)
    whole = lengths == width
    if missing is not None:
        whole &= ~missing
    values = np.full((rows, width), np.nan, dtype)
    flat = _plain(column.values, dtype)
    for row in np.flatnonzero(whole):
        values[row] = flat[offsets[row] : offsets[row] + width]
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
