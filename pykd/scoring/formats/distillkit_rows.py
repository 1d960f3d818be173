"""Rows of DistillKit: Parquet, one sequence per row of the file, of each token the teacher's top K, compressed or as they are.

Columns ``compressed_logprobs`` and ``bytepacked_indices`` hold lists of bytes, one per token; how they are to be read is not in the file.
A token's log-probabilities begin with the ``exact_k`` largest as they are; the rest is a sum of ``polynomial_terms`` of the place, whose coefficients
follow, and of residuals in bins: a scale, then a whole number of ``element_bits`` per value, most significant bit first, each bin filled up to
whole bytes. With ``delta_encoding`` all of these are differences from the value before. Indices are packed in the same way, ⌈log2 d⌉ bits each.
Columns ``top_values`` and ``token_ids`` hold the same without compression.

Rows of the legacy form have ``exact_values``, the largest in float16, ``coeffs`` of a polynomial for the others, and ``packed_indices``, as many
classes in a word of 64 bits as fit whole, the first in its lowest bits. It was written of log-probabilities, and, earlier, of logits less their mean, of which nobody can tell
how much probability they have: their exponentials sum to more than 1, and that is an error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pykd import files
from pykd.scoring.formats.columns import arrow_modules, opened_file
from pykd.scoring.formats.source import ROW_KINDS, Block, Source, TopK, exact, first_line, in_turn, require

COMPRESSED = ("compressed_logprobs", "bytepacked_indices")
RAW = ("top_values", "token_ids")
LEGACY = ("exact_values", "packed_indices", "coeffs")
_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes
_SPECIAL = {"sqrt": np.sqrt, "exp": np.exp}
_SEQUENCES = 4  # that are read at once
_TOKENS = 512  # that are decoded at once
_MOST = 1.1  # Σ of the probabilities of a token: what compression may add to 1, and wrong settings do not keep to
_LARGEST = 1 << 20  # bytes of settings

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Bin:
    """Consecutive residuals with one scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    def __post_init__(self) -> None:
        _dtype(self.scale_dtype, "scale_dtype")
        _whole(self.element_bits, 1, "element_bits")
        _whole(self.num_elements, 1, "num_elements")
        if self.element_bits > 63:
            raise ValueError(f"expected element_bits up to 63, got {self.element_bits}; correct the settings")

    @property
    def bytes(self) -> int:
        """Of a token."""
        return _WIDTHS[self.scale_dtype] + -(-self.element_bits * self.num_elements // 8)


@dataclass(frozen=True)
class Codec:
    """Settings of DistillKit's compression, by its names. ``error_diffusion`` is of the compression alone."""

    d: int
    k: int = 0
    exact_k: int = 0
    residual_bins: tuple[Bin, ...] = ()
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    def __post_init__(self) -> None:
        _whole(self.d, 2, "d")
        _whole(self.k, 0, "k")
        _whole(self.exact_k, 0, "exact_k")
        _dtype(self.exact_dtype, "exact_dtype")
        _dtype(self.term_dtype, "term_dtype")
        held = self.exact_k + sum(part.num_elements for part in self.residual_bins)
        if held > self.k or self.k > self.d:
            raise ValueError(
                f"expected exact_k and the bins' num_elements together up to k, and k up to d, got {held}, {self.k} and {self.d}; correct the settings"
            )
        for term in self.polynomial_terms:
            if term not in _SPECIAL and (isinstance(term, bool) or not isinstance(term, int)):
                raise ValueError(
                    f"expected whole numbers, {' or '.join(_SPECIAL)} in polynomial_terms, got {term!r}; correct the settings"
                )

    @property
    def index_bits(self) -> int:
        """Of a class."""
        return _bits(self.d)

    @property
    def bytes(self) -> tuple[int, int]:
        """Of a token: its log-probabilities, its classes."""
        fixed = self.exact_k * _WIDTHS[self.exact_dtype] + len(self.polynomial_terms) * _WIDTHS[self.term_dtype]
        return fixed + sum(part.bytes for part in self.residual_bins), -(-self.k * self.index_bits // 8)

    def indices(self, data: Array) -> Array:
        """(tokens, bytes) → (tokens, k)."""
        return _unpacked(data, self.index_bits, self.k)

    def log_probs(self, data: Array) -> Array:
        """(tokens, bytes) → (tokens, k), rounded where DistillKit rounds."""
        at = 0

        def take(dtype: str, count: int) -> Array:
            nonlocal at
            part = data[:, at : at + count * _WIDTHS[dtype]]
            at += part.shape[1]
            return _floats(part, dtype)

        values = take(self.exact_dtype, self.exact_k)
        coefficients = take(self.term_dtype, len(self.polynomial_terms))
        rest = np.zeros((len(data), self.k - self.exact_k))
        place = 0
        for part in self.residual_bins:
            scale = take(part.scale_dtype, 1)
            size = part.bytes - _WIDTHS[part.scale_dtype]
            codes = _unpacked(data[:, at : at + size], part.element_bits, part.num_elements)
            at += size
            centred = 2 * codes - 1 if part.element_bits == 1 else codes - (1 << part.element_bits - 1)
            width = np.float64 if part.scale_dtype == "float64" else np.float32
            rest[:, place : place + part.num_elements] = centred.astype(np.float32).astype(width) * scale.astype(width)
            place += part.num_elements
        rest = _rounded(rest, self.exact_dtype)
        if self.polynomial_terms:
            terms = _rounded(self._terms(rest.shape[1]), self.term_dtype)
            products = _rounded(terms[None] * coefficients[:, None, :], self.term_dtype)
            rest = _rounded(_rounded(products.sum(axis=2), self.term_dtype) + rest, self.exact_dtype)
        values = np.concatenate([values, rest], axis=1)
        if self.delta_encoding:
            values = _rounded(np.cumsum(values.astype(np.float32), axis=1, dtype=np.float32), self.exact_dtype)
        return values

    def _terms(self, count: int) -> Array:
        """(places, terms)."""
        points = np.linspace(0, 1, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        points = _rounded(points, self.term_dtype)
        columns = [_SPECIAL[t](points) if isinstance(t, str) else points ** float(t) for t in self.polynomial_terms]
        return np.stack(columns, axis=1)


@dataclass(frozen=True)
class LegacyCodec:
    """Settings of DistillKit's legacy compression, by its names."""

    vocab_size: int
    k: int
    exact_k: int
    polynomial_degree: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: str = "float32"

    def __post_init__(self) -> None:
        _whole(self.vocab_size, 2, "vocab_size")
        _whole(self.k, 1, "k")
        _whole(self.exact_k, 0, "exact_k")
        _whole(self.polynomial_degree, 0, "polynomial_degree")
        _dtype(self.term_dtype, "term_dtype")
        if self.exact_k > self.k or self.k > self.vocab_size:
            raise ValueError(
                f"expected exact_k up to k, and k up to vocab_size, got {self.exact_k}, {self.k} and {self.vocab_size}; correct the settings"
            )

    @property
    def d(self) -> int:
        return self.vocab_size

    @property
    def index_bits(self) -> int:
        """Of a class."""
        return _bits(self.vocab_size)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Of a token: exact values, words of classes, coefficients."""
        terms = self.polynomial_degree + 1 + self.with_sqrt_term
        return self.exact_k, -(-self.k // (64 // self.index_bits)), terms if self.exact_k < self.k else 0

    def indices(self, words: Array) -> Array:
        """(tokens, words) → (tokens, k)."""
        bits = self.index_bits
        shifts = np.arange(64 // bits, dtype=np.uint64) * np.uint64(bits)
        parts = (words.astype(np.int64).view(np.uint64)[:, :, None] >> shifts) & np.uint64((1 << bits) - 1)
        return np.asarray(parts.reshape(len(words), -1)[:, : self.k], np.int64)

    def log_probs(self, exact: Array, coefficients: Array) -> Array:
        """(tokens, exact_k) and (tokens, terms) → (tokens, k), rounded where DistillKit rounds."""
        wide = "float64" if self.term_dtype == "float64" else "float32"
        places = np.arange(1, self.k - self.exact_k + 1, dtype=np.float32)
        sign = -1 if self.invert_polynomial else 1
        columns = [places ** np.float32(sign * i) for i in range(self.polynomial_degree + 1)]
        columns += [np.sqrt(places)] * self.with_sqrt_term
        terms = _rounded(np.stack(columns, axis=1), self.term_dtype)[:, : coefficients.shape[1]]
        products = _rounded(terms[None] * _rounded(coefficients, "float32")[:, None, :], wide)
        return np.concatenate([exact.astype(np.float64), _rounded(products.sum(axis=2), wide)], axis=1)


def read_codec(path: str | os.PathLike[str]) -> Codec | LegacyCodec:
    """Settings out of JSON or YAML: those of the compression alone, or a configuration of DistillKit that holds them."""
    data = files.read(os.fspath(path), _LARGEST)
    if Path(path).suffix.lower() in (".yaml", ".yml"):
        try:
            import yaml  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise ImportError(
                f"expected the package PyYAML to read {path}, got none; pip install PyYAML, or write the settings as JSON"
            ) from error
        try:
            table = yaml.safe_load(data)
        except yaml.YAMLError as error:
            raise ValueError(f"expected {path} to be YAML, got {first_line(error)}; correct it") from error
    else:
        table = files.parse_json(data, path)
    for name in ("teacher", "logprob_compressor", "legacy_logit_compression"):
        if isinstance(table, dict) and isinstance(table.get(name), dict):
            table = table[name]
    if not isinstance(table, dict) or not {"d", "vocab_size"} & table.keys():
        raise ValueError(
            f"expected the settings of DistillKit's compression in {path} (d, k, exact_k, residual_bins, …; for rows without compression d alone; for those of the legacy form "
            f"vocab_size, k, exact_k, polynomial_degree, …), got "
            f"{json.dumps(table, default=str)[:100]}; write them as they were when the rows were made"
        )
    kind: type[Codec | LegacyCodec] = LegacyCodec if "vocab_size" in table else Codec
    known = {field.name for field in fields(kind)}
    if unknown := table.keys() - known:
        raise ValueError(
            f"expected {', '.join(sorted(known))} in {path}, got {', '.join(sorted(map(str, unknown)))}; correct it"
        )
    try:
        if kind is LegacyCodec:
            return LegacyCodec(**table)
        bins = tuple(Bin(**part) for part in table.get("residual_bins") or ())
        return Codec(**{**table, "residual_bins": bins, "polynomial_terms": tuple(table.get("polynomial_terms") or ())})
    except TypeError as error:
        raise ValueError(
            f"expected the settings of DistillKit's compression in {path}, got others ({error}); correct it"
        ) from error


def distillkit_rows(path: str, label: str, codec: Codec | LegacyCodec) -> Source:
    """A top K per token, of all sequences in turn; the mass of the other classes is what is left to 1."""
    require("pyarrow")
    pa, parquet = arrow_modules()
    import pyarrow.compute as compute

    try:
        with parquet.ParquetFile(opened_file(path)) as file:
            names = set(file.schema_arrow.names)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"expected {label} to be a whole Parquet file, got {first_line(error)}; write it again"
        ) from error
    columns: tuple[str, ...] | None = next((some for some in (COMPRESSED, RAW, LEGACY) if names.issuperset(some)), None)
    if columns is None:
        raise ValueError(
            f"expected the columns {', or '.join(' and '.join(some) for some in (COMPRESSED, RAW, LEGACY))}, in {label}, got "
            f"{', '.join(sorted(names)[:20])}; these are no rows of DistillKit"
        )
    if (columns == LEGACY) != isinstance(codec, LegacyCodec):
        wanted = "vocab_size, k, exact_k, polynomial_degree, …" if columns == LEGACY else "d, k, exact_k, …"
        raise ValueError(
            f"expected the settings of {'the legacy' if columns == LEGACY else 'no legacy'} compression ({wanted}) for {label}, which has {columns[0]}, got "
            "others; pass those that the rows were written with"
        )
    if columns == COMPRESSED and codec.k < 1:
        raise ValueError(f"expected k in the settings for the compressed rows of {label}, got none; add it")

    def sequences(*wanted: str) -> Iterator[Any]:
        with parquet.ParquetFile(opened_file(path), pre_buffer=False, buffer_size=1 << 20) as file:
            try:
                for batch in file.iter_batches(_SEQUENCES, columns=list(wanted), use_threads=False):
                    yield [batch.column(name) for name in wanted]
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"expected {label} to be whole, got {first_line(error)}; write it again") from error

    rows, kept = 0, codec.k
    for (column,) in sequences(columns[1]):
        tokens = column.flatten()
        rows += len(tokens)
        if columns == RAW and len(tokens):
            kept = max(kept, int(compute.max(compute.list_value_length(tokens)).as_py() or 0))
    if not rows:
        raise ValueError(f"expected at least one token in {label}, got none; pass another file")
    widths: tuple[int, ...] = (kept, kept)
    if isinstance(codec, LegacyCodec):
        widths = codec.lengths
    elif columns == COMPRESSED:
        widths = codec.bytes

    def decoded(values: Array, ids: Array, *coefficients: Array) -> tuple[Array, Array]:
        if isinstance(codec, LegacyCodec):
            return codec.log_probs(values, *coefficients), codec.indices(ids)
        if columns == COMPRESSED:
            return codec.log_probs(values), codec.indices(ids)
        return values.astype(np.float64), ids.astype(np.int64)

    def chunks(start: int) -> Iterator[Block]:
        first = 0
        for found in sequences(*columns):
            arrays = [
                _matrix(compute, column, width, label, first) for column, width in zip(found, widths, strict=True)
            ]
            counts = {len(array) for array in arrays}
            if len(counts) > 1:
                raise ValueError(
                    f"expected as many tokens in {' as in '.join(columns)} of {label}, got {' and '.join(str(len(a)) for a in arrays)}; write it again"
                )
            (count,) = counts
            for begin in range(max(0, start - first), count, _TOKENS):
                values, ids = decoded(*(array[begin : begin + _TOKENS] for array in arrays))
                yield _block(values, ids, codec.d, label, first + begin)
            first += count

    stored = f"top {kept:,} of {codec.d:,}, DistillKit's rows"
    facts = {"form": "DistillKit", "classes": codec.d, "kept": kept}
    blocks = in_turn(lambda start, count: exact(chunks(start), count))
    return Source(label, rows, codec.d, np.dtype(np.float32), stored, blocks, True, kept=kept, facts=facts)


def _matrix(compute: Any, column: Any, width: int, label: str, first: int) -> Array:
    """(tokens, width) of a column of lists of lists."""
    tokens = column.flatten()
    lengths = compute.list_value_length(tokens).fill_null(0).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(lengths != width)
    if column.null_count or len(wrong):
        place, got = (first + int(wrong[0]), int(lengths[wrong[0]])) if len(wrong) else (first, "null")
        raise ValueError(
            f"expected {width} entries for each token of {label}, got {got} for token {place}: the settings do not fit; correct them"
        )
    return np.asarray(tokens.flatten().to_numpy(zero_copy_only=False)).reshape(len(tokens), width)


def _block(log_probs: Array, ids: Array, classes: int, label: str, first: int) -> Block:
    there = log_probs > -np.inf  # slots that were never filled have −inf, and any class
    mass = np.exp(log_probs).sum(axis=1)
    kind = np.zeros(len(ids), np.uint8)
    kind[np.isnan(mass)] = ROW_KINDS.index("nan")
    outside = there & ((ids < 0) | (ids >= classes))
    ordered = np.sort(np.where(there, ids, -1 - np.arange(ids.shape[1])), axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    wrong = np.flatnonzero((mass > _MOST) | outside.any(axis=1) | twice)
    if len(wrong):
        raise ValueError(
            f"expected classes from 0 to {classes - 1}, each once, with probabilities up to 1 together in {label}, got others for token {first + int(wrong[0])}: "
            "the settings do not fit these rows, or they hold logits instead; correct them"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        log_tail = np.where(mass < 1, np.log1p(-mass), -np.inf)[:, None]
    top_k = TopK(np.where(there, ids, 0), log_tail, kind)
    return Block(log_probs.astype(np.float32), top_k=top_k)


def _bits(classes: int) -> int:
    """Of a class, as DistillKit counts them."""
    return math.ceil(float(np.log2(np.float32(classes))))


def _unpacked(data: Array, bits: int, count: int) -> Array:
    """Whole numbers of so many bits, most significant first."""
    digits = np.unpackbits(np.ascontiguousarray(data, np.uint8), axis=1)[:, : bits * count].reshape(
        len(data), count, bits
    )
    values = np.zeros((len(data), count), np.int64)
    for digit in range(bits):
        values <<= 1
        values |= digits[:, :, digit]
    return values


def _floats(data: Array, dtype: str) -> Array:
    """float64 of little-endian bytes."""
    data = np.ascontiguousarray(data, np.uint8)
    if dtype == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.asarray(data.view(np.dtype(dtype).newbyteorder("<")), np.float64)


def _rounded(values: Array, dtype: str) -> Array:
    """The float64 that a number is in another type."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        bits += 0x7FFF + (bits >> 16 & 1)  # to the nearest, of two the even one
        return (bits >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    return np.asarray(values.astype(dtype), np.float64)


def _dtype(name: Any, of: str) -> None:
    if name not in _WIDTHS:
        raise ValueError(f"expected {', '.join(_WIDTHS)} for {of}, got {name!r}; correct the settings")


def _whole(number: Any, least: int, of: str) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"expected a whole number from {least} for {of}, got {number!r}; correct the settings")
