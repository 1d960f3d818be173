"""Writes teacher outputs once, for any number of students: ``pykd teacher``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pykd.scoring.container import Shapes, Writer
from pykd.scoring.formats.source import ROW_KINDS, Block, Load, Source, block_rows, worked
from pykd.scoring.plain_files import WRITERS
from pykd.scoring.row_scores import check_temperature
from pykd.scoring.top_k import keep, log_parts, narrow

_OK, _NAN, _INFINITE, _RAGGED, _MISSING = range(len(ROW_KINDS))

Array = np.ndarray[Any, Any]
Where = str | os.PathLike[str]
Progress = Callable[[int, int], None]


def write_top_k(
    source: Source,
    out: Where,
    kept: int,
    temperatures: Sequence[float] = (),
    classes: int | None = None,
    dtype: str = "float16",
    tokenizer: Where | None = None,
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
        check_temperature(temperature, "--temperature")
    known = tuple(dict.fromkeys((1.0, *map(float, temperatures))))
    facts = {
        "form": "top-k",
        **_facts(source, width, tokenizer),
        "temperatures": known,
    }
    shapes = {
        "lse": (np.dtype("<f4"), (len(known),)),
        "log_tail": (np.dtype("<f4"), (len(known),)),
        "ids": (np.dtype("<i4"), (kept,)),
        "logprobs": (np.dtype(dtype), (kept,)),
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

    _write(source, out, facts, shapes, reduced, threads, progress)


def write_full(
    source: Source,
    out: Where,
    classes: int | None = None,
    dtype: str = "float16",
    tokenizer: Where | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> None:
    """Writes the log-probabilities of all classes: ``logprobs`` (rows, classes), ``lse`` float32 (rows, 1), ``kind``.

    Args:
        source: as for :func:`write_top_k`, as are ``classes``, ``dtype``, ``tokenizer``, ``threads`` and ``progress``.
        out: the file, by its ending: ``.safetensors``, as there; ``.arrow``, columns of these names; ``.npy``, ``logprobs`` alone.
    """
    if Path(out).suffix == ".npy" and tokenizer is not None:
        raise ValueError(
            f"expected no tokenizer for {out}, which has no place to note it, got {tokenizer}; leave it out"
        )
    width = _classes(source, classes)
    shapes = {"lse": (np.dtype("<f4"), (1,)), "logprobs": (np.dtype(dtype), (width,))}

    def reduced(load: Load) -> dict[str, Array]:
        block = load()
        logits = block.values[:, :width]
        kind = kinds(block, logits)
        with np.errstate(all="ignore"):  # of bad rows
            values, offset = narrow(logits)
            largest, rest = (part[:, None] for part in log_parts(values))
            log_probs = values - largest  # first: large logits keep their differences
            log_probs -= rest
            log_probs = _stored(log_probs, dtype)
            lse = (largest.astype(np.float64) + rest + offset[:, None]).astype("<f4")
        log_probs[kind != _OK] = np.nan
        log_probs[kind == _INFINITE] = np.inf
        return {"lse": lse, "logprobs": log_probs, "kind": kind}

    _write(source, out, {"form": "full", **_facts(source, width, tokenizer)}, shapes, reduced, threads, progress)


def write_hidden(
    source: Source,
    head: Source,
    out: Where,
    bias: Source | None = None,
    classes: int | None = None,
    dtype: str | None = None,
    tokenizer: Where | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> None:
    """Writes hidden states and the matrix that makes logits of them: ``hidden`` (rows, d), ``head`` (classes, d), ``bias`` (classes,), ``kind``.

    Args:
        source: the states (:func:`pykd.scoring.sources.open_matrix`).
        head: the matrix, one row per class, as the weight of the last linear layer.
        out: the file, as for :func:`write_top_k`, as are ``classes``, ``tokenizer``, ``threads`` and ``progress``.
        bias: one number per class (:func:`pykd.scoring.sources.open_column`, ``kinds="f"``), or none.
        dtype: of states, matrix and bias; None: float16 where the states are, float32 elsewhere.
    """
    for given in (source, head):
        if given.kept is not None:
            raise ValueError(
                f"expected all columns of {given.name}, got {given.stored}; name the file that it was made of"
            )
    if head.width != source.width:
        raise ValueError(
            f"expected as many columns in {head.name} as the states have, {source.width}, got {head.width}; write one row per class"
        )
    if bias is not None and bias.rows != head.rows:
        raise ValueError(
            f"expected as many numbers in {bias.name} as there are classes, {head.rows}, got {bias.rows}; pass those of the same layer"
        )
    if classes is not None and not 1 <= classes <= head.rows:
        raise ValueError(f"expected from 1 to {head.rows} classes, got {classes}; correct --classes")
    width = classes or head.rows
    stored = np.dtype(dtype or ("float16" if source.dtype == np.float16 else "float32"))
    assert source.width is not None
    facts = {"form": "hidden", **_facts(source, width, tokenizer), "vocabulary": head.rows, "head": head.name}
    whole: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {"head": (stored, (width, source.width))}
    if bias is not None:
        whole["bias"] = (stored, (width,))

    def reduced(load: Load) -> dict[str, Array]:
        block = load()
        with np.errstate(invalid="ignore"):
            size = np.abs(block.values)  # no class is masked here: −∞ is as bad as ∞
        return {"hidden": _fitting(block.values, stored, source), "kind": kinds(block, size)}

    def parts() -> Iterator[dict[str, Array]]:
        for name, part in (("head", head), ("bias", bias)):
            if part is not None:
                rows = block_rows(part)
                for first, load in zip(range(0, width, rows), part.blocks(0, rows), strict=False):
                    values = load().whole(part.name).values[: width - first]
                    # A bias of −∞ masks a class; all else would make every row NaN or infinite.
                    if not (np.isfinite(values) | ((values == -np.inf) & (part is bias))).all():
                        raise ValueError(f"expected finite numbers in {part.name}, got others; write it again")
                    yield {name: _fitting(values, stored, part)}

    _write(source, out, facts, {"hidden": (stored, (source.width,))}, reduced, threads, progress, whole, parts())


def writer_of(form: str, out: Where) -> Any:
    """The class that writes a file of that ending."""
    writers = {ending: made for ending, made in WRITERS.items() if made is Writer or form == "full"}
    if (ending := Path(out).suffix) not in writers:
        raise ValueError(f"expected --out to end in {' or '.join(writers)} with --form {form}, got {out}; name it so")
    return writers[ending]


def _write(
    source: Source,
    out: Where,
    facts: dict[str, Any],
    shapes: Shapes,
    work: Callable[[Load], dict[str, Array]],
    threads: int,
    progress: Progress | None,
    whole: Shapes | None = None,
    parts: Iterable[dict[str, Array]] = (),
) -> None:
    """Tensors of a row per row, with ``kind``, and before them ``whole`` ones, in ``parts``."""
    shapes = {**shapes, "kind": (np.dtype("u1"), ())}
    rows = source.rows
    tensors = {name: (dtype, (rows, *shape)) for name, (dtype, shape) in shapes.items()}
    facts = {**facts, "row_kinds": ROW_KINDS}
    with writer_of(facts["form"], out)(Path(out), facts, {**tensors, **(whole or {})}) as writer:
        for part in parts:
            writer.append(**part)
        done = 0
        for written in worked(source.blocks(0, block_rows(source)), work, threads):
            writer.append(**written)
            done += len(written["kind"])
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
    least = log_probs.dtype.type(np.finfo(dtype).min)
    stored: Array = np.maximum(log_probs, least).astype(dtype)
    stored[log_probs == -np.inf] = -np.inf
    return stored


def _fitting(values: Array, dtype: np.dtype[Any], source: Source) -> Array:
    """In a type whose range they do not leave."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype, copy=False)
    if (np.isinf(stored) & np.isfinite(values)).any():
        raise ValueError(
            f"expected numbers up to {np.finfo(dtype).max:g} in {source.name} for {dtype}, got larger ones; pass --dtype float32"
        )
    return stored


def _classes(source: Source, classes: int | None) -> int:
    width = source.width or 0
    if source.kept is not None:
        raise ValueError(
            f"expected logits of all classes in {source.name}, got {source.stored}; name the file that it was made of"
        )
    if classes is not None and not 1 <= classes <= width:
        raise ValueError(f"expected from 1 to {width} classes, got {classes}; correct --classes")
    return width if classes is None else classes


def _facts(source: Source, classes: int, tokenizer: Where | None) -> dict[str, Any]:
    return {
        "rows": source.rows,
        "vocabulary": source.width,
        "classes": classes,
        "source": source.name,
        "stored": source.stored,
        "tokenizer_sha256": None if tokenizer is None else _digest(tokenizer),
    }


def _digest(path: Where) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
