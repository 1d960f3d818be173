"""Base files of ``llama-perplexity --kl-divergence-base``, and the print-out of ``--kl-divergence`` from them.

A base file holds the log-probabilities of a teacher as 16-bit codes between the largest and 16 nats below (24 in
ik_llama.cpp, which only changes the numbers a row begins with), for the second half of each chunk of a text, and the tokens
of the text, which are the labels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pykd.scoring.formats.source import worked
from pykd.scoring.top_k import narrow
from pykd.scoring.whole_file import WholeFile

MAGIC = b"_logits_"
_HEADER = 20  # bytes before the tokens
_LEFT_OUT = np.float32(-16)  # log-probabilities from here down have no part in the divergence that is printed
_BLOCK_BYTES = 512 << 10  # of one side: what stays in the caches
_NATS = 16  # below the largest, that codes reach down
_CODES = 65535
_TOKENS = 1 << 20  # that are read at once
_FEWEST = 100  # rows that statistics are printed of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BaseFile:
    """What the head of a base file says."""

    context: int
    classes: int
    chunks: int
    tokens: Array  # (chunks, context)

    @property
    def rows_of_a_chunk(self) -> int:
        return self.context - 1 - self.context // 2

    @property
    def rows(self) -> int:
        return self.chunks * self.rows_of_a_chunk

    @property
    def codes(self) -> int:
        """16-bit words of a row: four that hold scale and least log-probability, the codes, padding."""
        return 2 * ((self.classes + 1) // 2) + 4

    @property
    def offset(self) -> int:
        """Where the rows begin."""
        return _HEADER + 4 * self.tokens.size

    @property
    def labels(self) -> Array:
        """The token that follows each row."""
        first = self.context // 2 + 1
        return self.tokens[:, first : first + self.rows_of_a_chunk].reshape(-1).astype(np.int64)

    @property
    def chunk_of_rows(self) -> Array:
        """The chunk of each row, from 0: a stretch of one text, whose rows are not independent."""
        return np.repeat(np.arange(self.chunks), self.rows_of_a_chunk)


def read_head(path: str, label: str) -> BaseFile:
    """Reads what lies before the rows, and compares the size of the file with what it says."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(len(MAGIC))
        data = file.read(12)
        numbers = np.frombuffer(data.ljust(12, b"\0"), "<i4")
        if min(numbers) < 1 or numbers[0] < 3:
            raise ValueError(
                f"expected context, classes and chunks in the head of {label}, got {numbers.tolist()}; write it again"
            )
        context, classes, chunks = (int(n) for n in numbers)
        wanted = _HEADER + 4 * context * chunks
        if size >= wanted:
            tokens = np.frombuffer(file.read(4 * context * chunks), "<i4").reshape(chunks, context)
            head = BaseFile(context, classes, chunks, tokens)
            wanted += 2 * head.rows * head.codes
    if size != wanted:
        raise ValueError(
            f"expected {wanted:,} bytes in {label} ({chunks} chunks of {context} tokens, {classes} classes), got {size:,}: it is "
            "cut off, or the disk was full when it was written; write it again"
        )
    return head


def decoded(words: Array, classes: int, empty: Callable[..., Array] = np.empty) -> Array:
    """Log-probabilities of rows of a base file, in memory that ``empty`` gives."""
    head = np.ascontiguousarray(words[:, :4]).view("<f4")
    values = empty((len(words), classes), np.dtype(np.float32))
    values[:] = words[:, 4 : 4 + classes]
    values *= head[:, :1]
    values += head[:, 1:]
    return values


def encoded(logits: Array) -> Array:
    """Rows of a base file of finite logits, with the arithmetic of the tool: float32 terms, their sum in double."""
    rows, classes = logits.shape
    logits = logits.astype(np.float32, copy=False)
    largest = logits.max(axis=1, keepdims=True)
    least = np.maximum(logits.min(axis=1, keepdims=True), largest - np.float32(_NATS))
    log_sum = np.log(np.exp(logits - largest).sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)
    scale = (largest - least) / np.float32(_CODES)
    words = np.zeros((rows, BaseFile(0, classes, 0, np.empty(0)).codes), np.dtype("<u2"))
    words[:, :4] = np.concatenate([scale, least - largest - log_sum], axis=1).astype("<f4").view("<u2")
    with np.errstate(divide="ignore", invalid="ignore"):  # all logits the same: codes 0
        codes = np.rint((logits - least) * (np.float32(1) / scale))
    words[:, 4 : 4 + classes] = np.where((logits > least) & (scale > 0), codes, 0)
    return words


def write_base(source: Any, tokens: Any, context: int, out: Path, threads: int, progress: Any = None) -> None:
    """Writes a base file that ``llama-perplexity --kl-divergence`` reads.

    Args:
        source: logits (:func:`pykd.scoring.sources.open_matrix`), of every token of every chunk, or of those alone that are scored: the
            second half of each chunk without its last token.
        tokens: the text (:func:`pykd.scoring.sources.open_column`): whole chunks.
        context: tokens of a chunk.
        out: the file.
        threads: that work at once.
        progress: called with the rows done, and all rows.
    """
    if source.kept is not None:
        raise ValueError(
            f"expected logits of all classes in {source.name}, got {source.stored}; name the file that it was made of"
        )
    if context < 3 or not tokens.rows or tokens.rows % context:
        raise ValueError(
            f"expected whole chunks of at least 3 tokens in {tokens.name}, got {tokens.rows} tokens in chunks of {context}; correct --context"
        )
    text = np.concatenate([load().whole(tokens.name).values for load in tokens.blocks(0, _TOKENS)]).astype(np.int64)
    if text.min() < 0 or text.max() >= source.width:
        raise ValueError(
            f"expected tokens from 0 to {source.width - 1} in {tokens.name}, got {text.min()} to {text.max()}; pass those of the model's own vocabulary"
        )
    chunks = len(text) // context
    head = BaseFile(context, source.width, chunks, text.reshape(chunks, context))
    if source.rows not in (head.rows, len(text)):
        raise ValueError(
            f"expected logits of {len(text)} tokens, or of the {head.rows} that are scored, in {source.name}, got {source.rows} rows; pass those of the same text"
        )
    place = np.arange(context)
    scored = (place >= context // 2) & (place < context - 1) if source.rows == len(text) else np.ones(1, bool)
    rows = max(1, _BLOCK_BYTES // (4 * source.width))

    def part(item: tuple[int, Any]) -> Array:
        first, block = item[0] * rows, item[1]()
        kept = scored[(first + np.arange(len(block.values))) % len(scored)]
        logits = block.values[kept]
        if not np.isfinite(logits).all():
            bad = first + int(np.flatnonzero(kept)[~np.isfinite(logits).all(axis=1)][0])
            raise ValueError(
                f"expected finite logits in {source.name}, got others in row {bad}; a base file has no place for them"
            )
        return encoded(narrow(logits)[0])

    start = MAGIC + np.array([context, head.classes, chunks], "<i4").tobytes() + text.astype("<i4").tobytes()
    with WholeFile(out, len(start) + 2 * head.rows * head.codes) as file:
        file.write(0, start)
        at = len(start)
        done = 0
        for words in worked(enumerate(source.blocks(0, rows)), part, threads):
            file.write(at, words.tobytes())
            at += words.nbytes
            done += len(words)
            if progress is not None:
                progress(done, head.rows)


class PrintOut:
    """Gathers what ``llama-perplexity`` prints at its end, with its arithmetic: float32 terms, sums in double."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.divergence, self.change = np.empty(rows, np.float32), np.empty(rows, np.float32)
        self.student_nll, self.teacher_nll = np.empty(rows, np.float32), np.empty(rows, np.float32)
        self.sums = np.empty(rows, np.float64)
        self.same = np.empty(rows, np.bool_)

    def put(self, first: int, teacher: Array, student: Array, labels: Array) -> None:
        """The rows from ``first`` on: log-probabilities of a base file, logits. Other threads may put other rows."""
        rows = np.arange(len(teacher))
        place = slice(first, first + len(teacher))
        largest = student.max(axis=1)
        shifted = student - largest[:, None]
        log_sum = np.log(np.exp(shifted, out=shifted).sum(axis=1, dtype=np.float64)).astype(np.float32)
        normaliser = largest + log_sum
        self.student_nll[place] = normaliser - student[rows, labels]
        self.teacher_nll[place] = -teacher[rows, labels]
        self.change[place] = np.exp(-self.student_nll[place]) - np.exp(-self.teacher_nll[place])
        self.same[place] = teacher.argmax(axis=1) == student.argmax(axis=1)
        terms = np.subtract(teacher, student, out=shifted)
        terms += normaliser[:, None]
        left_out = teacher <= _LEFT_OUT
        terms *= np.exp(teacher, out=teacher)
        np.copyto(terms, 0, where=left_out)  # whatever the student says there
        self.sums[place] = terms.sum(axis=1, dtype=np.float64)
        self.divergence[place] = self.sums[place]

    def text(self) -> str:
        """The blocks, line by line."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        count = self.rows
        student, teacher = (nll.astype(np.float64) for nll in (self.student_nll, self.teacher_nll))
        log_q, log_q_error = _mean(student.sum(), _squares(self.student_nll), count)
        log_p, log_p_error = _mean(teacher.sum(), _squares(self.teacher_nll), count)
        product = float((self.student_nll * self.teacher_nll).astype(np.float64).sum())
        covariance = (product / count - log_q * log_p) / (count - 1)
        ppl_q, ppl_p = np.exp(log_q), np.exp(log_p)
        ratio = log_q - log_p
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio_error = np.sqrt(log_q_error**2 + log_p_error**2 - 2 * covariance)
            correlation = np.float64(covariance) / (log_q_error * log_p_error)
            error_q, error_p = ppl_q * log_q_error, ppl_p * log_p_error
            difference_error = np.sqrt(error_q**2 + error_p**2 - 2 * ppl_q * ppl_p * covariance)

        def line(title: str, value: float, error: float) -> str:
            return f"{title:<30}: {value:10.6f} ± {error:10.6f}"

        yield "====== Perplexity statistics ======"
        yield line("Mean PPL(Q)", ppl_q, error_q)
        yield line("Mean PPL(base)", ppl_p, error_p)
        yield f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * correlation:6.2f}%"
        yield line("Mean ln(PPL(Q)/PPL(base))", ratio, ratio_error)
        yield line("Mean PPL(Q)/PPL(base)", np.exp(ratio), np.exp(ratio) * ratio_error)
        yield line("Mean PPL(Q)-PPL(base)", ppl_q - ppl_p, difference_error)
        yield ""
        yield "====== KL divergence statistics ======"
        mean, error = _mean(self.sums.sum(), float((self.sums * self.sums).sum()), count)
        yield f"Mean    KLD: {mean:10.6f} ± {error:10.6f}"
        values = np.sort(self.divergence)
        yield f"Maximum KLD: {values[-1]:10.6f}"
        for share in (0.999, 0.99, 0.95, 0.9):
            yield f"{100 * share:4.1f}%   KLD: {_percentile(values, share):10.6f}"
        yield f"Median  KLD: {_median(values):10.6f}"
        for share in (0.1, 0.05, 0.01, 0.001):
            yield f"{100 * share:4.1f}%   KLD: {_percentile(values, share):10.6f}"
        yield f"Minimum KLD: {values[0]:10.6f}"
        yield ""
        yield "====== Token probability statistics ======"
        squares = (self.change * self.change).astype(np.float64)
        mean, error = _mean(self.change.astype(np.float64).sum(), squares.sum(), count)
        yield f"Mean    Δp: {100 * mean:6.3f} ± {100 * error:5.3f} %"
        values = np.sort(self.change)
        yield f"Maximum Δp: {100 * float(values[-1]):6.3f}%"
        for share in (0.999, 0.99, 0.95, 0.9, 0.75):
            yield f"{100 * share:4.1f}%   Δp: {100 * _percentile(values, share):6.3f}%"
        yield f"Median  Δp: {100 * _median(values):6.3f}%"
        for share in (0.25, 0.1, 0.05, 0.01, 0.001):
            yield f"{100 * share:4.1f}%   Δp: {100 * _percentile(values, share):6.3f}%"
        yield f"Minimum Δp: {100 * float(values[0]):6.3f}%"
        mean, error = _mean(squares.sum(), float((squares * squares).sum()), count)
        root = np.sqrt(mean)
        with np.errstate(invalid="ignore", divide="ignore"):
            root_error = np.float64(0.5) / root * error
        yield f"RMS Δp    : {100 * root:6.3f} ± {100 * root_error:5.3f} %"
        same = int(self.same.sum()) / count
        yield f"Same top p: {100 * same:6.3f} ± {100 * np.sqrt(same * (1 - same) / (count - 1)):5.3f} %"


def _squares(values: Array) -> float:
    return float((values * values).astype(np.float64).sum())


def _mean(total: float, squares: float, count: int) -> tuple[float, float]:
    """Mean and standard error."""
    mean = float(total) / count
    spread = float(squares) / count - mean * mean
    return mean, (float(np.sqrt(spread / (count - 1))) if spread > 0 and count > 10 else 0.0)


def _median(values: Array) -> float:
    middle = len(values) // 2
    if len(values) % 2:
        return float(values[middle])
    return float(np.float32(0.5) * (values[middle] + values[middle - 1]))


def _percentile(values: Array, share: float) -> float:
    """Linear between order statistics, in float32."""
    place = np.float32(share) * np.float32(len(values) - 1)
    below = int(place)
    part = np.float32(place - np.float32(below))
    after = values[min(below + 1, len(values) - 1)]
    return float((np.float32(1) - part) * values[below] + part * after)


def print_out(teacher: Any, student: Any, labels: Any, threads: int) -> str:
    """The final blocks for two sources of rows and the labels (:mod:`pykd.scoring.sources`)."""
    if teacher.rows < _FEWEST:
        raise ValueError(
            f"expected at least {_FEWEST} rows for --format llama, as llama-perplexity does, got {teacher.rows}; leave it out"
        )
    out = PrintOut(teacher.rows)
    rows = max(1, _BLOCK_BYTES // (4 * teacher.width))

    def put(first: int, *loads: Any) -> None:
        p, q, label = (load().values for load in loads)
        if label.min() < 0 or label.max() >= teacher.width:
            raise ValueError(
                f"expected labels from 0 to {teacher.width - 1} in {labels.name}, got {label.min()} to {label.max()}; leave out "
                "--format llama, which knows no bad rows"
            )
        own = p.dtype == np.float32 and p.flags.writeable  # decoded: written over
        out.put(first, p if own else p.astype(np.float32), q.astype(np.float32, copy=False), label.astype(np.int64))

    blocks = zip(*(source.blocks(0, rows) for source in (teacher, student, labels)), strict=True)
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number, loads in enumerate(blocks):
            waiting.append(pool.submit(put, number * rows, *loads))
            if len(waiting) > threads + 1:
                waiting.popleft().result()
        for future in waiting:
            future.result()
    return out.text()
