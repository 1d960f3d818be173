"""Writes test vectors for the C++ tests: ``python -m tests.make_vectors build/vectors``.

One folder per loss, case and dtype, with the exported files and ``vectors.json``: calls with changing shapes, and
what float64 says they return. The C++ tests load them without a Python in the process. Folders that are
up to date (same settings, same sources, same versions) are left alone.
"""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import pykd
from pykd.export import metadata, tracing
from pykd.export.verification import LIMITS, rooms_of, truth
from tests.conftest import Subject, subjects
from tests.sources import used_by

DTYPES = ("float32", "float64", "float16", "bfloat16")


def call(subject: Subject, number: int, sizes: dict[str, int], dtype: str, per_sample: bool) -> dict[str, Any]:
    """Inputs, parameters and expected outputs of one call."""
    graph = subject.graph(per_sample)
    tensors = subject.composition.draw(graph.signature.inputs, sizes, seed=100 + number, dtype=getattr(torch, dtype))
    moved = {name: p.scalar.moved(p.default, number) for name, p in graph.signature.parameters.items()}
    want = truth(subject.composition, graph, tensors, moved, per_sample)
    rooms = rooms_of(subject.composition, graph, tensors, moved, want, dtype)
    return {
        "tolerance": dict(zip(("value", "gradient"), map(sum, zip(LIMITS[dtype], rooms, strict=True)), strict=True)),
        "inputs": {name: array(tensor, str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()},
        "parameters": moved if number else {},
        "outputs": {
            name: array(
                torch.as_tensor(np.asarray(value)),
                dtype if name.startswith("grad_") or dtype == "float64" else "float32",
            )
            for name, value in want.items()
        },
    }


def array(tensor: torch.Tensor, dtype: str) -> dict[str, Any]:
    """A tensor as JSON: numbers in float64, infinities and NaN as words."""
    numbers = tensor.flatten().tolist() if not tensor.is_floating_point() else tensor.double().flatten().tolist()
    words = [n if math.isfinite(n) else {math.inf: "inf", -math.inf: "-inf"}.get(n, "nan") for n in numbers]
    return {"dtype": dtype, "shape": list(tensor.shape), "data": words}


def stamp(subject: Subject, read: Callable[[Path], bytes] = Path.read_bytes) -> str:
    """Changes with the sources that make a subject's files, with its settings, and with the versions of what is used.

    Of the losses those count that the subject has, with what they import; so a comment in one makes its own files new.
    """
    losses = {type(part.loss).__module__ for term in subject.composition.named_terms for part in term.parts}
    makers = (__name__ if __name__ != "__main__" else "tests.make_vectors", "pykd.export", "pykd.composition")
    used = used_by(makers, not_through="pykd.losses") | used_by(losses)
    settings = [subject.composition.recipe(), subject.layouts, subject.optional, metadata.versions()]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name in sorted(used):
        digest.update(f"{name} {len(data := read(used[name]))} ".encode() + data)
    return digest.hexdigest()


def prepare(subject: Subject, dtype: str, root: Path) -> Path:
    """The folder of a subject in a dtype, made where it is not up to date."""
    folder = root / f"{subject.name}-{dtype}".replace(" ", "")
    mark = folder / "stamp"
    current = stamp(subject)
    if mark.is_file() and mark.read_text() == current:
        return folder
    per_sample = any(not term.couples_batch for term in subject.composition.named_terms)
    with mock.patch.object(tracing, "retraced", wraps=tracing.retraced) as retraced:
        pykd.export(
            subject.composition,
            folder,
            layouts=subject.layouts,
            optional_inputs=subject.optional,
            per_sample=per_sample,
            dtype=dtype,
            progress=lambda line: None,
        )
    # Without the large one: the files are text. An ordinary call first, which keeps the defaults.
    trials = [{}, *(s for name, s in subject.trial_sizes().items() if name != "large")]
    vectors = {
        "name": folder.name,
        "traced again": retraced.called,
        "calls": [call(subject, i, sizes, dtype, per_sample) for i, sizes in enumerate(trials)],
    }
    (folder / "vectors.json").write_text(json.dumps(vectors))
    mark.write_text(current)
    return folder


def prepare_all_dtypes(number: int, root: Path) -> list[str]:
    """Every dtype of one subject, in one process, since they share traces."""
    subject = subjects()[number]
    return [prepare(subject, dtype, root).name for dtype in DTYPES]


def main(root: Path) -> None:
    """Makes what is not up to date, and removes the folders that no subject has any more."""
    root.mkdir(parents=True, exist_ok=True)
    wanted: set[str] = set()
    count = len(subjects())
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for names in pool.map(prepare_all_dtypes, range(count), [root] * count):
            wanted.update(names)
            print(f"make_vectors: {', '.join(names)}", flush=True)
    for left in root.iterdir():
        if left.is_dir() and left.name not in wanted:
            shutil.rmtree(left)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/vectors"))
