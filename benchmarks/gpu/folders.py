"""The exported folders that travel in the pack, with the calls and the answers in float64 that tests/make_vectors.py wrote."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.compare import multiple
from benchmarks.gpu.stage import NotRun


def folders(pack: Path) -> list[Path]:
    found = sorted(path.parent for path in (pack / "folders").glob("*/vectors.json"))
    if not found:
        raise NotRun(f"no exported folders in {pack / 'folders'}; pack them")
    return found


Allowed = dict[str, float]  # of an error, for "value" and "gradient"


def calls(folder: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor], Allowed]]:
    """(inputs, parameters, what float64 says of every output, what an error may be) of each call."""
    for call in json.loads((folder / "vectors.json").read_text(encoding="utf-8"))["calls"]:
        inputs = {name: _tensor(value, value["dtype"]) for name, value in call["inputs"].items()}
        want = {name: _tensor(value, "float64") for name, value in call["outputs"].items()}
        yield inputs, call["parameters"], want, call["tolerance"]


def error(got: dict[str, Tensor], want: dict[str, Tensor], allowed: Allowed) -> float:
    """The largest error of a call, as a multiple of what the folder's tests in C++ allow (vectors_test.cpp says of what)."""
    worst = 0.0
    for name, expected in want.items():
        values = got[name].detach().cpu()
        if values.shape != expected.shape:
            return math.inf
        if name.startswith("grad_"):
            largest = float(expected.abs().max())
            bound = allowed["gradient"] * torch.tensor(0.1 if largest < 1e-9 else max(largest, 0.01))
        else:
            bound = allowed["value"] * (1 + expected.abs())
        worst = max(worst, multiple(values, expected, bound))
    return worst


def _tensor(value: dict[str, Any], dtype: str) -> Tensor:
    numbers = torch.tensor([float(x) for x in value["data"]], dtype=torch.float64)
    return numbers.to(getattr(torch, dtype)).view(value["shape"])
