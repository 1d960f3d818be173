"""Writes teacher outputs once, for any number of students: ``pykd teacher``."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pykd.scoring.container import Writer
from pykd.scoring.formats.source import ROW_KINDS, Block, Load, Source
from pykd.scoring.top_k import keep

_BLOCK_BYTES = 2 << 20  # of logits: what stays in the caches while it is worked on
_LEAST_ROWS, _MOST_ROWS = 8, 1 << 16  # of a block
_OK, _NAN, _INFINITE, _RAGGED, _MISSING = range(len(ROW_KINDS))

Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]


def write_top_k(
    source: Source,
    out: str | os.PathLike[str],
    kept: int,
    temperatures: Sequence[float] = (),
    classes: int | None = None,
    dtype: str = "float16",
    tokenizer: str | os.PathLike[str] | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> None:
    """Writes the K most probable classes of each row, and the mass of all others.

    Args:
        source: logits or log-probabilities (:func:`pykd.scoring.sources.open_matrix`).
        out: the file, of :mod:`pykd.scoring.container`: ``ids`` int32 (rows, K), ``logprobs`` (rows, K) at temperature 1, and per temperature
            ``log_tail`` float32 and ``lse`` float32 (rows, temperatures); ``kind`` says which rows were bad.
        kept: K.
        temperatures: at which students are to be scored, besides 1: the mass of the others is known at those alone.
        classes: the first that count, where the others are padding; None: all.
        dtype: of ``logprobs``, ``"float16"`` or ``"float32"``.
        tokenizer: a file whose SHA-256 is noted.
        threads: that work at once.
        progress: called with the rows done, and all rows.
    """
    width = _classes(source, classes)
    if not 1 <= kept <= width:
        raise ValueError(f"expected from 1 to {width} classes to keep, got {kept}; correct --keep")
    for temperature in temperatures:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"expected a temperature above 0, got {temperature:g}; correct --temperature")
    known = tuple(dict.fromkeys((1.0, *map(float, temperatures))))
    facts = {
        "form": "top-k",
        **_facts(source, width, tokenizer),
        "temperatures": known,
        "row_kinds": ROW_KINDS,
    }
    rows = source.rows
    tensors = {
        "lse": (np.dtype("<f4"), (rows, len(known))),
        "log_tail": (np.dtype("<f4"), (rows, len(known))),
        "ids": (np.dtype("<i4"), (rows, kept)),
        "logprobs": (np.dtype(dtype), (rows, kept)),
        "kind": (np.dtype("u1"), (rows,)),
    }

    def reduced(load: Load) -> dict[str, Array]:
        block = load()
        logits = block.values[:, :width]
        kind = kinds(block, logits)
        with np.errstate(all="ignore"):  # of bad rows
            top = keep(logits, kept, known)
            parts = {"ids": top.ids, "logprobs": _stored(top.log_probs, dtype)}
            parts |= {"lse": top.lse.astype("<f4"), "log_tail": top.log_tail.astype("<f4")}
        bad = kind != _OK
        for name, array in parts.items():
            array[bad] = 0 if name == "ids" else np.nan
        return {**parts, "kind": kind}

    with Writer(Path(out), facts, tensors) as writer:
        done = 0
        for parts in _worked(source, reduced, threads):
            writer.append(**parts)
            done += len(parts["kind"])
            if progress is not None:
                progress(done, rows)


def kinds(block: Block, logits: Array) -> Array:
    """What each row is: its place in ROW_KINDS."""
    largest = logits.max(axis=1)  # NaN where there is one
    kind = np.full(len(logits), _OK, np.uint8)
    kind[np.isinf(largest)] = _INFINITE
    kind[np.isnan(largest)] = _NAN
    for flags, place in ((block.ragged, _RAGGED), (block.missing, _MISSING)):
        if flags is not None:
            kind[flags] = place
    return kind


def _stored(log_probs: Array, dtype: str) -> Array:
    """In the type of the file, whose range no finite number leaves."""
    finite = log_probs > -np.inf
    return np.where(finite, np.maximum(log_probs, float(np.finfo(dtype).min)), log_probs).astype(dtype)


def _classes(source: Source, classes: int | None) -> int:
    width = source.width or 0
    if source.kept is not None:
        raise ValueError(
            f"expected logits of all classes in {source.name}, got {source.stored}; name the file that it was made of"
        )
    if classes is not None and not 1 <= classes <= width:
        raise ValueError(f"expected from 1 to {width} classes, got {classes}; correct --classes")
    return width if classes is None else classes


def _facts(source: Source, classes: int, tokenizer: str | os.PathLike[str] | None) -> dict[str, Any]:
    return {
        "rows": source.rows,
        "vocabulary": source.width,
        "classes": classes,
        "source": source.name,
        "stored": source.stored,
        "tokenizer_sha256": None if tokenizer is None else _digest(tokenizer),
    }


def _digest(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def _worked(source: Source, work: Callable[[Load], dict[str, Array]], threads: int) -> Iterator[dict[str, Array]]:
    """What becomes of each block, in order; ``threads`` blocks are worked on at once."""
    row_bytes = source.dtype.itemsize * (source.width or 1)
    rows = min(max(_BLOCK_BYTES // row_bytes, _LEAST_ROWS), _MOST_ROWS)
    waiting: deque[Future[dict[str, Array]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for load in source.blocks(0, rows):
                waiting.append(pool.submit(work, load))
                if len(waiting) > threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
