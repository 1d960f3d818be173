"""Verification: run what was written, at several sizes, and compare with float64.

Values are judged by the NumPy references of the losses, gradients by autograd of the definition in float64.
"""

import dataclasses
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Values = Mapping[str, Tensor]
Run = Callable[[Values, Mapping[str, float]], dict[str, Tensor]]

# Largest accepted errors, (value, gradient), by the type of the inputs. Inputs are exact and halves are computed
# in float32, so only their gradient is rounded to the type: 2⁻¹¹ for float16, 2⁻⁸ for bfloat16.
# A divergence that is multiplied by T² has its rounding multiplied as well: 64 · 2e-7 at T = 8.
LIMITS = {
    "float64": (1e-10, 1e-9),
    "float32": (3e-5, 1e-4),
    "float16": (3e-5, 1e-3),
    "bfloat16": (3e-5, 8e-3),
}

# Lengths by axis name: the smallest, odd ones, and some that differ from every example. An axis without a
# name here takes the last entry.
_SIZES: tuple[Mapping[str, int], ...] = (
    {"batch": 1, "classes": 1, "tokens": 1, "channels": 1, "students": 1, "": 1},
    {"batch": 5, "classes": 13, "tokens": 3, "channels": 9, "students": 2, "": 4},
    {"batch": 1, "classes": 7, "tokens": 2, "channels": 5, "students": 3, "": 3},
    {"batch": 8, "classes": 1, "tokens": 1, "channels": 2, "students": 1, "": 2},
    {"batch": 33, "classes": 101, "tokens": 4, "channels": 17, "students": 2, "": 6},
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One engine at one size.

    Attributes:
        engine: what ran; ``(C++)`` marks pykd's own runtime.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the floating inputs.
        size: the axis lengths.
        value_error: largest |got − want| / max(1, |want|) over the values.
        gradient_error: largest |got − want| over max(largest |want|, 0.01) of each gradient.
        ok: whether both are within the limits of the dtype.
    """

    engine: str
    device: str
    dtype: str
    size: str
    value_error: float
    gradient_error: float

    @property
    def ok(self) -> bool:
        value, gradient = LIMITS[self.dtype]
        return self.value_error <= value and self.gradient_error <= gradient


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`verify` found; ``str()`` of it is a table.

    Attributes:
        rows: one per engine, device and size.
        missing: engines that are not on this machine, with the reason.
    """

    rows: tuple[Row, ...]
    missing: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether something ran and everything agreed."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def sizes(self) -> int:
        """How many sizes were tried."""
        return len({row.size for row in self.rows})

    def summary(self) -> str:
        """The largest errors in one line."""
        value = max(row.value_error for row in self.rows)
        gradient = max(row.gradient_error for row in self.rows)
        return f"largest value error {value:.1e}, largest gradient error {gradient:.1e}"

    def __str__(self) -> str:
        head = ("engine", "device", "dtype", "size", "value error", "gradient error", "")
        body = [
            (
                r.engine,
                r.device,
                r.dtype,
                r.size,
                f"{r.value_error:.1e}",
                f"{r.gradient_error:.1e}",
                "" if r.ok else "DISAGREES",
            )
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *body)
        ]
        return "\n".join([*lines, *(f"not run: {reason}" for reason in self.missing)])


def verify(
    directory: str | Path, *, engines: Sequence[str] = ("python", "runtime"), quick: bool = False, seed: int = 0
) -> Report:
    """Runs the files in ``directory`` on every engine of this machine and compares with float64.

    Args:
        directory: what :func:`pykd.export` wrote.
        engines: ``"python"``: ONNX Runtime's Python package (the reference evaluator of the onnx package where
            it is not installed) and torch.jit; ``"runtime"``: pykd's C++ runtime with both of its engines, on
            the CPU and on CUDA where torch sees a GPU.
        quick: the first three sizes instead of five.
        seed: for the random inputs.

    Returns:
        The errors; ``report.ok`` tells whether all are within :data:`LIMITS`.

    Raises:
        FileNotFoundError: where there is no such export.
        ValueError: where a file is damaged or not the one of the manifest.
    """
    from pykd.export import integrity

    directory = Path(directory)
    manifest = _manifest(directory)
    for name, described in manifest["files"].items():
        data = (directory / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != described["sha256"]:
            raise ValueError(f"expected {name} to be the file of the manifest, got other contents; export it again")
        integrity.check(data, name)
    composition, graph, dtype = definition(manifest)
    per_sample = "loss_per_sample" in graph.signature.outputs
    missing: list[str] = []
    runs = list(_runs(directory, engines, missing))
    rows = []
    for number, lengths in enumerate(_SIZES[:3] if quick else _SIZES):
        axes = dict.fromkeys(axis for spec in graph.signature.inputs.values() for axis in spec.names)
        sizes = {axis: lengths.get(axis, lengths.get(axis.rstrip("_0123456789"), lengths[""])) for axis in axes}
        inputs = composition.draw(graph.signature.inputs, sizes, seed + number, getattr(torch, dtype))
        # The first size keeps the defaults; the others move every parameter.
        numbers = {n: p.default * (1 + 0.25 * number) for n, p in graph.signature.parameters.items()}
        want = truth(composition, graph, inputs, numbers, per_sample)
        for engine, device, run in runs:
            moved = {name: tensor.to(device) for name, tensor in inputs.items()}
            got = {name: tensor.cpu() for name, tensor in run(moved, numbers if number else {}).items()}
            value_error, gradient_error = errors(got, want)
            size = " ".join(f"{axis} {length}" for axis, length in sizes.items())
            rows.append(Row(engine, device, dtype, size, value_error, gradient_error))
    return Report(tuple(sorted(rows, key=lambda row: (row.engine, row.device))), tuple(missing))


def definition(manifest: Mapping[str, Any]) -> tuple[Any, Any, str]:
    """What the files of a manifest were made of: the composition, its graph, and the floating type."""
    from pykd import recipe

    composition = recipe.build(manifest["recipe"])
    layouts = {entry["name"]: " ".join(entry["axes"]) for entry in manifest["inputs"]}
    optional = [name for name in composition.optional_inputs if name in layouts]
    per_sample = any(entry["name"] == "loss_per_sample" for entry in manifest["outputs"])
    graph = composition.graph(layouts, optional, per_sample, check=False)
    return composition, graph, next(entry["dtype"] for entry in manifest["inputs"] if entry["dtype"] != "int64")


def truth(
    composition: Any, graph: Any, inputs: Values, numbers: Mapping[str, float], per_sample: bool
) -> dict[str, Any]:
    """Every output in float64: values by NumPy, gradients by autograd of the definition."""
    double = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    values = composition.reference(
        parameters=numbers, per_sample=per_sample, **{n: t.numpy() for n, t in double.items()}
    )
    wanted = [name for name, spec in graph.signature.inputs.items() if spec.grad]
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in double.items()}
    loss = graph(**leaves, **numbers)["loss"]
    gradients = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    return {**values, **{f"grad_{name}": g.numpy() for name, g in zip(wanted, gradients, strict=True)}}


def errors(got: Mapping[str, Tensor], want: Mapping[str, Any]) -> tuple[float, float]:
    """(value error, gradient error), see :class:`Row`; infinite where an output is missing or not finite."""
    value = gradient = 0.0
    for name, expected in want.items():
        wanted = np.asarray(expected, dtype=np.float64)
        if name not in got or tuple(got[name].shape) != wanted.shape:
            return float("inf"), float("inf")
        difference = np.abs(got[name].detach().double().numpy() - wanted)
        if name.startswith("grad_"):
            error = float(difference.max() / max(np.abs(wanted).max(), 1e-2))
            gradient = max(gradient, error if np.isfinite(error) else float("inf"))
        else:
            error = float((difference / np.maximum(np.abs(wanted), 1.0)).max())
            value = max(value, error if np.isfinite(error) else float("inf"))
    return value, gradient


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}, got no such file; pass the folder that pykd.export wrote")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("format") != "pykd" or "files" not in manifest:
        raise ValueError(f"expected {path} to be a manifest of pykd, got something else; export again")
    return manifest


def _runs(directory: Path, engines: Sequence[str], missing: list[str]) -> Iterator[tuple[str, str, Run]]:
    unknown = [engine for engine in engines if engine not in ("python", "runtime")]
    if unknown:
        raise ValueError(f"expected engines out of 'python' and 'runtime', got {unknown}; pass one of these")
    if "python" in engines:
        yield "torch.jit", "cpu", _torch_jit(directory)
        if importlib.util.find_spec("onnxruntime") is not None:
            yield "onnxruntime", "cpu", _onnxruntime(directory)
        else:
            missing.append("onnxruntime is not installed; the onnx package's reference evaluator ran instead")
            yield "onnx reference", "cpu", _onnx_reference(directory)
    if "runtime" in engines:
        devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        if len(devices) == 1:
            missing.append("CUDA: torch sees no GPU")
        for device in devices:
            for engine in ("onnxruntime", "torchscript"):
                try:
                    yield f"{engine} (C++)", device, _runtime(directory, engine, device)
                except (RuntimeError, ImportError) as error:
                    missing.append(f"{engine} (C++) on {device}: {error}")


def _torch_jit(directory: Path) -> Run:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=r".*torch\.jit")
        module = torch.jit.load(str(directory / "loss.pt"))  # type: ignore[no-untyped-call]
    wanted = [entry["name"] for entry in _manifest(directory)["inputs"] if entry["gradient"]]

    def run(inputs: Values, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        leaves = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in inputs.items()}
        outputs: dict[str, Tensor] = module(**leaves, **numbers)
        gradients = torch.autograd.grad(outputs["loss"], [leaves[name] for name in wanted])
        return {**outputs, **{f"grad_{name}": g for name, g in zip(wanted, gradients, strict=True)}}

    return run


def _both_files(
    directory: Path, open_file: Callable[[Path], Callable[[Values, Mapping[str, float]], dict[str, Tensor]]]
) -> Run:
    value, gradient = (open_file(directory / name) for name in ("loss.onnx", "loss.grad.onnx"))

    def run(inputs: Values, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        outputs = gradient(inputs, numbers)
        for name, alone in value(inputs, numbers).items():
            if not torch.equal(alone, outputs[name]):
                return {}  # the two files disagree, which counts as an infinite error
        return outputs

    return run


def _onnxruntime(directory: Path) -> Run:
    import onnxruntime

    def open_file(path: Path) -> Run:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that parameters can be overridden, which is what they are for
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        compute = {item.name: item.type for item in session.get_overridable_initializers()}

        def run(inputs: Values, numbers: Mapping[str, float]) -> dict[str, Tensor]:
            feeds = {n: onnxruntime.OrtValue.from_dlpack(t.contiguous().__dlpack__()) for n, t in inputs.items()}
            for name, value in numbers.items():
                array = np.array(value, dtype=np.float64 if "double" in compute[name] else np.float32)
                feeds[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            results = session.run_with_ort_values(names, feeds)
            return {n: torch.utils.dlpack.from_dlpack(v).clone() for n, v in zip(names, results, strict=True)}

        return run

    return _both_files(directory, open_file)


def _onnx_reference(directory: Path) -> Run:
    import onnx
    from onnx.reference import ReferenceEvaluator

    def open_file(path: Path) -> Run:
        model = onnx.load(path)
        evaluator = ReferenceEvaluator(model)
        defaults = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}

        def run(inputs: Values, numbers: Mapping[str, float]) -> dict[str, Tensor]:
            feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
            for item in model.graph.input:
                if item.name in defaults:
                    default = defaults[item.name]
                    feeds[item.name] = np.array(numbers.get(item.name, default), dtype=default.dtype)
            results = evaluator.run(None, feeds)
            return {n: torch.from_numpy(np.array(v)) for n, v in zip(evaluator.output_names, results, strict=True)}

        return run

    return _both_files(directory, open_file)


def _runtime(directory: Path, engine: str, device: str) -> Run:
    from pykd.runtime import load

    loss = load(str(directory), engine=engine, device=device)

    def run(inputs: Values, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        return dict(loss.value_and_gradient(**inputs, **numbers))

    return run
