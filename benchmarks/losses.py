"""Value and gradient of every registered loss on every route, at sizes from tiny to large.

The answer is checked against float64 first; a route that is wrong has no time. Times are medians; the column
``× limit`` is the time over that of moving each input and each gradient once at the machine's copy bandwidth.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pykd
from benchmarks.measure import median_seconds
from pykd.composition import as_composition
from pykd.definition import registry
from pykd.export.verification import LIMITS, errors

SIZES = {
    "tiny": {"batch": 8, "classes": 10, "tokens": 1, "channels": 64},
    "medium": {"batch": 256, "classes": 1000, "tokens": 49, "channels": 256},
    "large": {"batch": 256, "classes": 32000, "tokens": 196, "channels": 512},
}

Call = Callable[[], dict[str, Tensor]]


def routes(graph: Any, folder: Path, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Call]]:
    """Every way from these tensors to value and gradient."""
    wanted = [name for name, spec in graph.signature.inputs.items() if spec.grad]

    def by_autograd(module: Callable[..., Any]) -> Call:
        leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in tensors.items()}

        def call() -> dict[str, Tensor]:
            loss = module(**leaves)["loss"]
            gradients = torch.autograd.grad(loss, [leaves[name] for name in wanted])
            return {"loss": loss, **{f"grad_{name}": g for name, g in zip(wanted, gradients, strict=True)}}

        return call

    yield "eager", by_autograd(graph)
    yield "torch.compile", by_autograd(torch.compile(graph, dynamic=False))
    for engine in ("torchscript", "onnxruntime"):
        loss = pykd.load(str(folder), engine=engine)
        yield f"pykd.load, {engine}", lambda loss=loss: loss.value_and_gradient(**tensors)  # type: ignore[misc]


def run(bandwidth: float, sizes: Sequence[str] = ("tiny", "medium")) -> list[dict[str, Any]]:
    """Measures; one row per loss, size and route."""
    registry.load_all()
    rows = []
    for name, cls in registry.registered().items():
        composition = as_composition(cls())
        with tempfile.TemporaryDirectory() as made:
            folder = pykd.export(composition, made, progress=lambda line: None)
            graph = composition.graph(check=False)
            for size in sizes:
                lengths = {
                    axis: n
                    for axis, n in SIZES[size].items()
                    if any(axis in s.names for s in graph.signature.inputs.values())
                }
                tensors = composition.draw(graph.signature.inputs, lengths)
                moved = sum(t.nbytes * (2 if graph.signature.inputs[n].grad else 1) for n, t in tensors.items())
                want = truth(graph, tensors)
                for route, call in routes(graph, folder, tensors):
                    value_error, gradient_error = errors(call(), want)
                    value_limit, gradient_limit = LIMITS["float32"]
                    if value_error > value_limit or gradient_error > gradient_limit:
                        rows.append(
                            {"loss": name, "size": size, "route": route, "wrong": [value_error, gradient_error]}
                        )
                        continue
                    seconds = median_seconds(call)
                    rows.append(
                        {
                            "loss": name, "size": size, "lengths": lengths, "route": route, "seconds": seconds,
                            "times_limit": seconds * bandwidth / moved,
                        }
                    )  # fmt: skip
                    print(
                        f"{name:14} {size:7} {route:24} {seconds * 1e6:12.1f} µs  {seconds * bandwidth / moved:8.1f} × limit",
                        flush=True,
                    )
    return rows


def truth(graph: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Loss and gradients in float64 by the definition, which the tests compare with NumPy."""
    wanted = [name for name, spec in graph.signature.inputs.items() if spec.grad]
    leaves = {
        n: (t.double() if t.is_floating_point() else t).clone().requires_grad_(n in wanted) for n, t in tensors.items()
    }
    loss = graph(**leaves)["loss"]
    gradients = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    return {"loss": loss.detach().numpy(), **{f"grad_{n}": g.numpy() for n, g in zip(wanted, gradients, strict=True)}}


warnings.filterwarnings("ignore", category=DeprecationWarning)
