"""Rows in blocks, and what every kind of file that holds them has in common."""

from __future__ import annotations

import importlib.util
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

BUFFER = 1 << 20  # bytes that pyarrow reads ahead of a column
_AHEAD = 3  # blocks that are read before they are asked for
_BLOCK_BYTES = 2 << 20  # of one source: what stays in the caches while it is worked on
_LEAST_ROWS, _MOST_ROWS = 8, 1 << 16  # of a block


class Memory:
    """Arrays in memory that is written again once nobody holds an array of it: to get new pages for each block costs more
    than to decode it.

    Any number of threads may ask at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[np.ndarray[Any, np.dtype[np.uint8]]] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """As ``np.empty``."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            for kept in self._kept:
                # The list, the loop and the call: every array of it, and every view of one, counts once more.
                if len(kept) >= size and sys.getrefcount(kept) == 3:
                    break
            else:
                kept = np.empty(size, np.uint8)
                self._kept.append(kept)
            return kept[:size].view(dtype).reshape(shape)


class TopK(NamedTuple):
    """What else is known of rows of which a source has the K most probable classes alone."""

    ids: np.ndarray[Any, Any]  # (rows, K): the classes of the values, which are log-probabilities at temperature 1
    log_tail: np.ndarray[Any, Any]  # (rows, temperatures): log of the mass of all other classes
    kind: np.ndarray[Any, Any]  # (rows,): place in ROW_KINDS


ROW_KINDS = ("ok", "nan", "infinite", "ragged", "missing")  # what a row was when it was stored


class Block(NamedTuple):
    """Consecutive rows of a source."""

    values: np.ndarray[Any, Any]  # (rows, classes), or (rows,)
    ragged: np.ndarray[Any, np.dtype[np.bool_]] | None = None  # rows of another length than the rest; None: no row
    missing: np.ndarray[Any, np.dtype[np.bool_]] | None = None  # rows that are null; None: no row
    top_k: TopK | None = None  # None: the values are those of all classes

    def whole(self, name: str) -> Block:
        """The block itself, where every row has a value; for columns and matrices that cannot do without one."""
        for flags, what in ((self.missing, "null"), (self.ragged, "a list of another length")):
            if flags is not None and flags.any():
                raise ValueError(f"expected a value in every row of {name}, got {what}; write the whole of it")
        return self


Item = TypeVar("Item")
Result = TypeVar("Result")
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
    kept: int | None = None  # K, where blocks have the K most probable classes alone
    temperatures: tuple[float, ...] = (1.0,)  # where the mass of the others is known
    shape: tuple[int, ...] | None = None  # of the whole array, where the file has one
    group_rows: int | None = None  # that the file holds together, where that is one number
    facts: Mapping[str, Any] = field(default_factory=dict)  # what the file says of itself
    coded: Source | None = None  # the same rows as a base file of llama.cpp has them: 16-bit words

    def blocks(self, start: int, rows: int) -> Iterator[Load]:
        """Blocks of exactly that many rows, the last one excepted, from row ``start`` on."""
        return ahead(self.load(start, rows)) if self.in_turn else self.load(start, rows)


def block_rows(*sources: Source) -> int:
    """How many rows of these sources are worked on at once."""
    row_bytes = max(source.dtype.itemsize * (source.width or 1) for source in sources)
    rows = min(max(_BLOCK_BYTES // row_bytes, _LEAST_ROWS), _MOST_ROWS)
    groups = math.gcd(*(source.group_rows or 0 for source in sources))
    # Whole blocks of a group need not be put together of two of them.
    return next((fewer for fewer in range(rows, rows // 2, -1) if groups and groups % fewer == 0), rows)


def ahead(loads: Iterator[Load]) -> Iterator[Load]:
    """The same blocks, read on a thread of its own while those before are worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, loads, None) for _ in range(_AHEAD))
        while (load := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, loads, None))
            yield load


def worked(items: Iterable[Item], work: Callable[[Item], Result], threads: int) -> Iterator[Result]:
    """What becomes of each item, in order; ``threads`` are worked on at once, and few more are held."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads + 4:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def in_turn(chunks: Callable[[int, int], Iterator[Block]]) -> Callable[[int, int], Iterator[Load]]:
    """Blocks of a file that is read from its front to its end, on the thread that asks for them."""

    def blocks(start: int, rows: int) -> Iterator[Load]:
        for block in chunks(start, rows):
            yield lambda block=block: block  # type: ignore[misc]

    return blocks


def exact(chunks: Iterator[Block], rows: int) -> Iterator[Block]:
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
    values, *flags, top_k = block
    part = slice(first, last)
    ragged, missing = (None if flag is None else flag[part] for flag in flags)
    return Block(values[part], ragged, missing, None if top_k is None else TopK(*(array[part] for array in top_k)))


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

    top_k = None
    if blocks[0].top_k is not None:
        top_k = TopK(
            *map(np.concatenate, zip(*(block.top_k for block in blocks if block.top_k is not None), strict=True))
        )
    return Block(np.concatenate([block.values for block in blocks]), flags("ragged"), flags("missing"), top_k)


def choose(names: list[str], wanted: str | None, label: str, what: str) -> str:
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


def require(*packages: str) -> None:
    """An ImportError that says what to install where one is missing; before any work is done."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"expected the package {package} for scoring, got none; pip install 'pykd[score]'")


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
