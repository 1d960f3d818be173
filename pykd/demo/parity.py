"""The same loss on every route, on real outputs, against float64.

The judge of the value is the NumPy reference of the losses, that of the gradient autograd of the definition,
both in float64. Agreement between the routes alone would prove nothing about the formula.
"""

import dataclasses
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pykd.composition import Composition, LossGraph
from pykd.demo import programs, tensor_file
from pykd.export.verification import LIMITS, truth

BATCHES = (1, 7, 64, 898)  # how many of the images go into one call
VALUE_LIMIT, GRADIENT_LIMIT = LIMITS["float32"]

JUDGE = "NumPy, float64"

Tensors = Mapping[str, Tensor]
Route = Callable[[Tensors], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One route at one batch size.

    Attributes:
        route: who computed.
        batch: number of samples.
        value: the loss.
        value_error: largest |got − want| over the loss and its terms; relative where |want| is more than 1.
            (Below it is the absolute error that counts: −log p of a confident student is 1e-4, made of
            numbers near 1, and no float32 computation has it to more than 1e-7.)
        gradient_error: largest |got − want| of a gradient over the largest |want| of that gradient.
    """

    route: str
    batch: int
    value: float
    value_error: float
    gradient_error: float

    @property
    def ok(self) -> bool:
        """Whether both errors are small enough; NaN is not."""
        return bool(self.value_error <= VALUE_LIMIT and self.gradient_error <= GRADIENT_LIMIT)


def measure(
    loss: Composition, layouts: Mapping[str, str], recipe: Path, tensors: Tensors, evaluate: Path, work: Path
) -> list[Row]:
    """Every route at every batch size.

    Args:
        loss: the definition.
        layouts: as they were exported.
        recipe: the folder that ``pykd.export`` wrote.
        tensors: inputs of the loss by name, float32; the first so many rows make a batch.
        evaluate: the C++ example program of that name.
        work: a folder for what goes to the program and comes back.
    """
    graph = loss.graph(layouts)
    routes: dict[str, Route] = {
        "eager PyTorch": _torch_route(graph, graph),
        "TorchScript, Python": _torchscript(graph, recipe / "loss.pt"),
        "TorchScript, C++": _program(evaluate, recipe, "torchscript", work),
        "ONNX Runtime, Python": _onnxruntime(recipe),
        "ONNX Runtime, C++": _program(evaluate, recipe, "onnxruntime", work),
    }
    numbers = {name: parameter.default for name, parameter in graph.signature.parameters.items()}
    rows = []
    for batch in BATCHES:
        inputs = {name: tensor[:batch].contiguous() for name, tensor in tensors.items()}
        want = truth(loss, graph, inputs, numbers, per_sample=False)
        rows.append(Row(JUDGE, batch, float(want["loss"]), 0.0, 0.0))
        for name, route in routes.items():
            rows.append(_compare(name, batch, route(inputs), want))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as text: the largest batch in full, and the largest error at any batch size."""
    batches = sorted({row.batch for row in rows})
    head = ("route", f"loss, {batches[-1]} samples", "value error", "gradient error", "worst of all sizes", "")
    lines = [head]
    for row in rows:
        if row.batch != batches[-1]:
            continue
        if row.route == JUDGE:
            lines.append((row.route, f"{row.value:.8f}", "the judge", "", "", ""))
            continue
        same = [other for other in rows if other.route == row.route]
        worst = f"{max(r.value_error for r in same):.1e}, {max(r.gradient_error for r in same):.1e}"
        verdict = "agrees" if all(r.ok for r in same) else "DISAGREES"
        lines.append(
            (row.route, f"{row.value:.8f}", f"{row.value_error:.1e}", f"{row.gradient_error:.1e}", worst, verdict)
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    sizes = ", ".join(map(str, batches))
    limits = f"value error up to {VALUE_LIMIT:.0e}, gradient error up to {GRADIENT_LIMIT:.0e}"
    return "\n".join([*text, f"sizes: {sizes} samples; accepted in float32: {limits}"])


def _compare(route: str, batch: int, got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> Row:
    value_error = gradient_error = 0.0
    for name, expected in want.items():
        wanted = np.asarray(expected, dtype=np.float64)
        if name not in got or got[name].shape != wanted.shape:
            raise RuntimeError(f"expected {route} to return {name} with shape {wanted.shape}, got {sorted(got)}")
        difference = np.abs(np.asarray(got[name], dtype=np.float64) - wanted).max()
        largest = np.abs(wanted).max()
        if name.startswith("grad_"):
            gradient_error = max(gradient_error, _finite(difference / max(largest, np.finfo(np.float32).tiny)))
        else:
            value_error = max(value_error, _finite(difference / max(largest, 1.0)))
    return Row(route, batch, float(got["loss"]), value_error, gradient_error)


def _finite(error: float) -> float:
    """``error``, where NaN counts as infinite."""
    return float(error) if np.isfinite(error) else float("inf")


def _torch_route(graph: LossGraph, module: Callable[..., dict[str, Tensor]]) -> Route:
    wanted = [name for name, spec in graph.signature.inputs.items() if spec.grad]

    def run(inputs: Tensors) -> dict[str, np.ndarray]:
        leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in inputs.items()}
        values = module(**leaves)
        gradients = torch.autograd.grad(values["loss"], [leaves[name] for name in wanted])
        results = {name: value.detach().numpy() for name, value in values.items()}
        return results | {f"grad_{name}": g.numpy() for name, g in zip(wanted, gradients, strict=True)}

    return run


def _torchscript(graph: LossGraph, path: Path) -> Route:
    with warnings.catch_warnings():  # torch announces that torch.export will replace TorchScript
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=r".*torch\.jit")
        module = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return _torch_route(graph, module)


def _onnxruntime(recipe: Path) -> Route:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that parameters can be overridden, which is what they are for
    sessions = [
        onnxruntime.InferenceSession(recipe / name, options, providers=["CPUExecutionProvider"])
        for name in ("loss.grad.onnx", "loss.onnx")  # the values of the second file are the ones compared
    ]

    def run(inputs: Tensors) -> dict[str, np.ndarray]:
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        results: dict[str, np.ndarray] = {}
        for session in sessions:
            names = [output.name for output in session.get_outputs()]
            results |= dict(zip(names, session.run(names, feeds), strict=True))
        return results

    return run


def _program(evaluate: Path, recipe: Path, engine: str, work: Path) -> Route:
    """The C++ program ``evaluate``: its own process, without Python in it."""
    given, returned = work / "evaluate.in.bin", work / "evaluate.out.bin"

    def run(inputs: Tensors) -> dict[str, np.ndarray]:
        tensor_file.write(given, {name: tensor.numpy() for name, tensor in inputs.items()})
        returned.unlink(missing_ok=True)
        command: list[str | Path] = [evaluate, "--loss", recipe, "--engine", engine, "--data", given, "--out", returned]
        done = subprocess.run(command, env=programs.environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{evaluate.name} with engine {engine} failed:\n{done.stderr.strip() or done.stdout}")
        return tensor_file.read(returned)

    return run
