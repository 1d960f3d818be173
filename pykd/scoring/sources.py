"""Rows that lie in files, read in blocks of bounded memory: ``.npy``, ``.npz``, safetensors, Parquet, Arrow IPC.

``logits.npy`` is a file with one array; ``outputs.npz#teacher`` names an array, tensor or column of a file with several.
Arrays that lie in a file as they are in memory are read by position, never mapped: a mapped file counts to the memory of
the process, and one that is cut off while it is read ends the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pykd.scoring import llama
from pykd.scoring.container import is_container
from pykd.scoring.formats.arrow_files import arrow
from pykd.scoring.formats.base_files import base_file as _base_file
from pykd.scoring.formats.distillkit_rows import distillkit_rows, read_codec
from pykd.scoring.formats.numpy_files import npy, npz
from pykd.scoring.formats.parquet_files import parquet
from pykd.scoring.formats.safetensors_files import safetensors
from pykd.scoring.formats.source import Block, Load, Source, require
from pykd.scoring.formats.teacher_files import teacher_file

__all__ = [
    "Block",
    "Load",
    "Source",
    "base_file",
    "fingerprint",
    "open_array",
    "open_column",
    "open_matrix",
    "path_of",
    "require",
]

# Kinds of files by the bytes that they begin with.
_BEGINNINGS = {
    b"\x93NUMPY": npy,
    b"PK": npz,
    b"PAR1": parquet,
    b"ARROW1": arrow,
    llama.MAGIC: _base_file,
}


def open_matrix(where: str | os.PathLike[str], role: str, distillkit: str | os.PathLike[str] | None = None) -> Source:
    """Logits: rows of equally many floating-point numbers. Axes before the last are rows.

    Args:
        where: a path, or path#name.
        role: ``"teacher"`` or ``"student"``, for messages.
        distillkit: the settings of the compression, where the file has rows of DistillKit
            (:mod:`pykd.scoring.formats.distillkit_rows`).
    """
    if distillkit is not None:
        _regular(os.fspath(where), role)
        return distillkit_rows(os.fspath(where), f"the {role} {where}", read_codec(distillkit))
    source = _open(where, role, matrix=True)
    if source.dtype.kind != "f":
        raise ValueError(
            f"expected floating-point logits in {source.name}, got {source.stored}; name the array or column of logits "
            "after the path, as in file.npz#logits, or convert them"
        )
    if source.rows == 0 or source.width == 0:
        raise ValueError(
            f"expected at least one row and one class in {source.name}, got {source.rows} rows of {source.width}; "
            "pass another file"
        )
    return source


def open_column(where: str | os.PathLike[str], role: str, kinds: str = "iu") -> Source:
    """One value per row: labels (whole numbers), the names of groups (``kinds="iuU"``), a bias (``"f"``)."""
    source = _open(where, role, matrix=False)
    if source.dtype.kind not in kinds:
        wanted = {"iu": "whole numbers", "f": "floating-point numbers"}.get(kinds, "whole numbers or text")
        raise ValueError(
            f"expected {wanted} in {source.name}, got {source.stored}; name the right array or column after the path, as in "
            "file.parquet#label, or convert it"
        )
    return source


def open_array(where: str | os.PathLike[str], role: str, axes: int) -> Source:
    """What a model takes: rows are the first axis, ``shape`` has all of them; ``axes`` is how many there are."""
    source = _open(where, role, matrix=axes > 1)
    shape = source.shape or ((source.rows,) if source.width is None else (source.rows, source.width))
    if len(shape) != axes or 0 in shape:
        raise ValueError(
            f"expected {axes} axes without a length of 0 in {source.name}, got the shape {shape}; reshape it"
        )
    inner = source.rows // shape[0]  # rows of the source per row of the first axis

    def blocks(start: int, rows: int) -> Iterator[Load]:
        return source.load(start * inner, rows * inner)

    return replace(source, rows=shape[0], shape=shape, load=blocks)


def _open(where: str | os.PathLike[str], role: str, matrix: bool) -> Source:
    path, name = _split(os.fspath(where))
    _regular(path, role)
    with open(path, "rb") as file:
        start = file.read(8)
    label = f"the {role} {where}"
    for beginning, opened in _BEGINNINGS.items():
        if start.startswith(beginning):
            return opened(path, label, name, matrix)
    if path.endswith(".safetensors"):
        if is_container(path):
            return teacher_file(path, label, name, matrix)
        return safetensors(path, label, name, matrix)
    raise ValueError(
        f"expected {label} to be .npy, .npz, .safetensors, Parquet, Arrow IPC (file format) or a base "
        f"file of llama.cpp, got a file that begins with "
        f"{start!r}; convert it"
    )


def _regular(path: str, role: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"expected the {role} at {path}, got no file there; check the path")
    if not os.path.isfile(path):
        raise ValueError(f"expected the {role} in a regular file, got {path}; name one file")


def _split(where: str) -> tuple[str, str | None]:
    """Path and name; a file whose own name has the sign is taken as it is."""
    path, sign, name = where.rpartition("#")
    return (path, name) if sign and not os.path.exists(where) else (where, None)


def base_file(where: str | os.PathLike[str]) -> llama.BaseFile | None:
    """The head of a base file of llama.cpp; None of any other file."""
    path, _ = _split(os.fspath(where))
    with open(path, "rb") as file:
        if file.read(len(llama.MAGIC)) != llama.MAGIC:
            return None
    return llama.read_head(path, path)


def path_of(where: str | os.PathLike[str]) -> str:
    """The path without the name of an array or column."""
    return _split(os.fspath(where))[0]


def fingerprint(where: str | os.PathLike[str]) -> dict[str, Any]:
    """What tells one file from another without reading it: for runs that are taken up again."""
    path, name = _split(os.fspath(where))
    if os.path.isdir(path):  # of an exported loss: the file that is run
        scores = os.path.join(path, "score.onnx")
        path = scores if os.path.exists(scores) else os.path.join(path, "loss.onnx")
    status = os.stat(path)
    return {"path": str(Path(path).resolve()), "name": name, "bytes": status.st_size, "changed": status.st_mtime_ns}
