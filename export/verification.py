"""Verification: run what was written, at several sizes, and compare with float64.

Values are judged by the NumPy references of the losses, gradients by autograd of the definition in float64.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pykd import _core, files, integrity
from pykd.export import metadata

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

# What a folder may hold, and how many bytes of it. Names that stand in a manifest are no paths.
SIZES = {"loss.pt": 64 << 20, "loss.onnx": 16 << 20, "loss.grad.onnx": 16 << 20, "score.onnx": 16 << 20}
_MANIFEST_SIZE = 1 << 20

# What a file may be off beyond LIMITS where the numbers themselves are ill-conditioned (a temperature of 0.01, a
# divergence times T² = 10⁴): so many times what rounding does to the definition, and no more than this.
_ROOM_FACTOR = 4.0
_MOST_ROOM = (1e-3, 2e-2)

# What gradients are multiplied by in calls that move the parameters: a power of 2, which adds no rounding of its own.
_GRAD_SCALE = 2.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One engine at one size.

    Attributes:
        engine: what ran; ``(C++)`` marks pykd's own runtime.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the floating inputs.
        size: the axis lengths.
        value_error: largest |got − want| / max(1, |want|) over the values.
        gradient_error: largest |got − want| over max(largest |want|, 0.01) of each gradient; None where the files give none.
        value_room: what is added to the limit of the value at these inputs, see :func:`rooms_of`.
        gradient_room: the same of the gradient.
        ok: whether both errors are within the limits of the dtype and their room.
    """

    engine: str
    device: str
    dtype: str
    size: str
    value_error: float
    gradient_error: float | None
    value_room: float = 0.0
    gradient_room: float = 0.0

    @property
    def ok(self) -> bool:
        value, gradient = LIMITS[self.dtype]
        right = self.value_error <= value + self.value_room
        return right and (self.gradient_error is None or self.gradient_error <= gradient + self.gradient_room)


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
        gradients = [row.gradient_error for row in self.rows if row.gradient_error is not None]
        found = f", largest gradient error {max(gradients):.1e}" if gradients else ""
        return f"largest value error {value:.1e}{found}"

    def __str__(self) -> str:
        head = ("engine", "device", "dtype", "size", "value error", "gradient error", "")
        body = [
            (
                r.engine,
                r.device,
                r.dtype,
                r.size,
                f"{r.value_error:.1e}",
                "–" if r.gradient_error is None else f"{r.gradient_error:.1e}",
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
    directory: str | Path,
    *,
    engines: Sequence[str] = ("python", "runtime"),
    quick: bool = False,
    seed: int = 0,
    trust: bool = False,
) -> Report:
    """Runs the files in ``directory`` on every engine of this machine and compares with float64.

    The folder is data, whoever wrote it: its recipe is built and its ONNX files are run, which runs no code of theirs.
    ``loss.pt`` is a program, and is run only for those who trust its author. Of ``score.onnx`` the samples of one size are
    scored one by one as well, since their scores are to depend on nothing else.

    Args:
        directory: what :func:`pykd.export` wrote.
        engines: ``"python"``: ONNX Runtime's Python package (the reference evaluator of the onnx package where
            it is not installed) and torch.jit; ``"runtime"``: pykd's C++ runtime with both of its engines, on
            the CPU and on CUDA where torch sees a GPU.
        quick: the first three sizes instead of six.
        seed: for the random inputs.
        trust: whether to run ``loss.pt``, too. Say so for what you exported yourself. Otherwise its checksums are
            compared, and the report says that it was not run.

    Returns:
        The errors; ``report.ok`` tells whether all are within :data:`LIMITS`.

    Raises:
        FileNotFoundError: where there is no such export.
        ValueError: where a file is damaged or not the one of the manifest.
    """
    if not isinstance(trust, bool):  # "no" would count as True
        raise TypeError(f"expected trust to be True or False, got {trust!r}; pass one of these")
    directory = Path(directory)
    manifest = _manifest(directory)
    contents = _contents(directory, manifest)
    composition, graph, dtype = definition(manifest)
    per_sample = "loss_per_sample" in graph.signature.outputs
    form = manifest.get("parameters_as", "overridable")
    scores = "score.onnx" in manifest["files"]
    if scores and len(manifest["files"]) > 1:
        raise _mismatch("score.onnx alone, or files of a loss", ", ".join(sorted(manifest["files"])))
    missing = [f"{name} is not in the folder" for name in manifest["files"] if name not in contents]
    if "loss.pt" in contents and not trust:
        del contents["loss.pt"]
        missing.append("loss.pt is a program: pass --trust, or trust=True, if you trust its author")
    runs = list(_runs(directory, contents, [n for n, s in graph.signature.inputs.items() if s.grad], engines, missing))
    rows = []
    # Defaults at the first two sizes, since at the first most values are 0 whatever they are; at all others, and at the
    # second again, other numbers for every parameter that a call can set.
    trials = list(composition.trial_sizes(graph.signature.inputs).values())[: 3 if quick else None]
    moves = [(0, 0), (1, 0), *((number, number) for number in range(1, len(trials)))]
    for number, move in moves if form != "fixed" else [(number, 0) for number in range(len(trials))]:
        sizes = trials[number]
        inputs = composition.draw(graph.signature.inputs, sizes, seed + number, getattr(torch, dtype))
        numbers = {n: p.scalar.moved(p.default, move) for n, p in graph.signature.parameters.items()}
        given = numbers if move or form == "inputs" else {}
        if move and form != "fixed" and not scores:
            given = {**given, metadata.GRAD_SCALE: _GRAD_SCALE}
        want = truth(composition, graph, inputs, numbers, per_sample)
        if scores:
            want = {name: value for name, value in want.items() if name.endswith("per_sample")}
        rooms = rooms_of(composition, graph, inputs, numbers, want, dtype)
        for engine, device, run in runs:
            moved = {name: tensor.to(device) for name, tensor in inputs.items()}
            size = " ".join(f"{axis} {length}" for axis, length in sizes.items())
            ways = {size: run, f"{size}, one by one": _one_by_one(run)} if scores and number == 1 else {size: run}
            for said, way in ways.items():
                with _running(engine):
                    got = {name: tensor.cpu() for name, tensor in way(moved, given).items()}
                scale = given.get(metadata.GRAD_SCALE, 1.0)
                got = {name: tensor / scale if name.startswith("grad_") else tensor for name, tensor in got.items()}
                value_error, gradient_error = errors(got, want)
                found = None if scores else gradient_error
                rows.append(Row(engine, device, dtype, said, value_error, found, *rooms))
    return Report(tuple(sorted(rows, key=lambda row: (row.engine, row.device))), tuple(missing))


def definition(manifest: Mapping[str, Any]) -> tuple[Any, Any, str]:
    """What the files of a manifest were made of: the composition, its graph, and the floating type."""
    from pykd.composition import recipe

    composition = recipe.build(manifest.get("recipe", {}))
    layouts, given = {}, {}
    for entry in _entries(manifest, "inputs"):
        axes = entry.get("axes")
        if not isinstance(axes, list) or not all(isinstance(axis, str) for axis in axes):
            raise _mismatch("the names of its axes", entry["name"])
        layouts[entry["name"]] = " ".join(axes)
        given[entry["name"]] = str(entry.get("dtype"))
    optional = [name for name in composition.optional_inputs if name in layouts]
    per_sample = any(entry["name"] == "loss_per_sample" for entry in _entries(manifest, "outputs"))
    graph = composition.graph(layouts, optional, per_sample, check=False)
    dtypes = {given.get(name, "") for name, spec in graph.signature.inputs.items() if spec.dtype == "float"}
    if len(dtypes) != 1 or not dtypes <= LIMITS.keys():
        raise _mismatch(f"one floating dtype ({', '.join(LIMITS)})", sorted(dtypes))
    return composition, graph, dtypes.pop()


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


def rooms_of(
    composition: Any, graph: Any, inputs: Values, numbers: Mapping[str, float], want: Mapping[str, Any], dtype: str
) -> tuple[float, float]:
    """How much farther than LIMITS a right file may be from ``want``, as (value, gradient).

    By :func:`room`, and by the tolerance that a loss declares for the case (:class:`pykd.Case`).
    """
    factor = composition.tolerance(dtype) - 1
    value, gradient = room(graph, inputs, numbers, want, dtype)
    return value + factor * LIMITS[dtype][0], gradient + factor * LIMITS[dtype][1]


def room(
    graph: Any, inputs: Values, numbers: Mapping[str, float], want: Mapping[str, Any], dtype: str
) -> tuple[float, float]:
    """The part of :func:`rooms_of` that rounding has.

    The condition of the numbers, found by trying: how far the definition itself is off in the type of the inputs, and
    how far its exact numbers move when every input moves by a rounding. A wrong file owes its error to neither.
    """
    compute = torch.float64 if dtype == "float64" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        factor = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return tensor.double() * (1 + factor * torch.finfo(compute).eps / 2)

    def tried(tensors: Values) -> tuple[float, float]:
        wanted = [name for name, spec in graph.signature.inputs.items() if spec.grad]
        leaves = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in tensors.items()}
        values = graph(**leaves, **numbers)
        gradients = torch.autograd.grad(values["loss"], [leaves[name] for name in wanted])
        return errors(values | {f"grad_{n}": g for n, g in zip(wanted, gradients, strict=True)}, want)

    floating = {name for name, t in inputs.items() if t.is_floating_point()}
    found = [tried({n: t.to(compute) if n in floating else t for n, t in inputs.items()})]
    found += [tried({n: moved(t) if n in floating else t for n, t in inputs.items()}) for _ in range(2)]
    rooms = [_ROOM_FACTOR * max(each) for each in zip(*found, strict=True)]
    value, gradient = (
        min(each, most) if np.isfinite(each) else 0.0 for each, most in zip(rooms, _MOST_ROOM, strict=True)
    )
    return value, gradient


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
    if not path.exists():
        raise FileNotFoundError(f"expected {path}, got no such file; pass the folder that pykd.export wrote")
    manifest = files.parse_json(files.read(path, _MANIFEST_SIZE), path)
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != "pykd"
        or not isinstance(manifest.get("files"), dict)
    ):
        raise ValueError(f"expected {path} to be a manifest of pykd, got something else; export again")
    return manifest


def _contents(directory: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that are there, by name, compared with the hashes of the manifest and their own checksums."""
    contents = {}
    for name, described in manifest["files"].items():
        if name not in SIZES:
            raise ValueError(
                f"expected the manifest to list files out of {', '.join(SIZES)}, got {name!r}; export it again"
            )
        if not (directory / name).exists():
            continue
        data = files.read(directory / name, SIZES[name])
        hash_of = described.get("sha256") if isinstance(described, dict) else None
        if hashlib.sha256(data).hexdigest() != hash_of:
            raise ValueError(f"expected {name} to be the file of the manifest, got other contents; export it again")
        integrity.check(data, name)
        if name.endswith(".onnx"):
            _core.check_onnx(data)  # before any engine sees it, those of others included
        contents[name] = data
    return contents


def _entries(manifest: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = manifest.get(key)
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("name"), str) for e in entries
    ):
        raise _mismatch(f"a list of named {key}", "something else")
    return entries


def _mismatch(expected: str, got: object) -> ValueError:
    return ValueError(f"expected the manifest to hold {expected}, got {got}; export it again")


def _runs(
    directory: Path, contents: Mapping[str, bytes], wanted: Sequence[str], engines: Sequence[str], missing: list[str]
) -> Iterator[tuple[str, str, Run]]:
    unknown = [engine for engine in engines if engine not in ("python", "runtime")]
    if unknown:
        raise ValueError(f"expected engines out of 'python' and 'runtime', got {unknown}; pass one of these")
    scores = "score.onnx" in contents
    onnx, torchscript = scores or "loss.grad.onnx" in contents, "loss.pt" in contents
    if "python" in engines and torchscript:
        with _running("torch.jit"):
            opened = _torch_jit(contents["loss.pt"], wanted)
        yield "torch.jit", "cpu", opened
    if "python" in engines and onnx:
        name, open_file = "onnxruntime", _onnxruntime
        if importlib.util.find_spec("onnxruntime") is None:
            missing.append("onnxruntime is not installed; the onnx package's reference evaluator ran instead")
            name, open_file = "onnx reference", _onnx_reference
        with _running(name):
            opened = open_file(contents["score.onnx"]) if scores else _both_files(contents, open_file)
        yield name, "cpu", opened
    if "runtime" in engines:
        devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        if len(devices) == 1:
            missing.append("CUDA: torch sees no GPU")
        for device in devices:
            for engine in ["onnxruntime"] * onnx + ["torchscript"] * torchscript:
                try:
                    yield f"{engine} (C++)", device, _runtime(directory, engine, device, scores)
                except (RuntimeError, ImportError) as error:
                    missing.append(f"{engine} (C++) on {device}: {error}")


@contextlib.contextmanager
def _running(engine: str) -> Iterator[None]:
    """What an engine says about a file that it cannot open or run, as our error."""
    try:
        yield
    except Exception as error:  # whatever an engine raises: none of them says what
        raise ValueError(f"expected files that {engine} runs, got its error: {error}; export the loss again") from error


def _torch_jit(data: bytes, wanted: Sequence[str]) -> Run:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=r".*torch\.jit")
        module = torch.jit.load(io.BytesIO(data))  # type: ignore[no-untyped-call]

    def run(inputs: Values, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        leaves = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in inputs.items()}
        settings = dict(numbers)
        scale = settings.pop(metadata.GRAD_SCALE, 1.0)
        outputs: dict[str, Tensor] = module(**leaves, **settings)
        gradients = torch.autograd.grad(outputs["loss"] * scale, [leaves[name] for name in wanted])
        return {**outputs, **{f"grad_{name}": g for name, g in zip(wanted, gradients, strict=True)}}

    return run


def _both_files(contents: Mapping[str, bytes], open_file: Callable[[bytes], Run]) -> Run:
    gradient = open_file(contents["loss.grad.onnx"])
    if "loss.onnx" not in contents:
        return gradient
    value = open_file(contents["loss.onnx"])

    def run(inputs: Values, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        outputs = gradient(inputs, numbers)
        without_gradient = {name: number for name, number in numbers.items() if name != metadata.GRAD_SCALE}
        for name, alone in value(inputs, without_gradient).items():
            if name not in outputs or not torch.equal(alone, outputs[name]):
                return {}  # the two files disagree, which counts as an infinite error
        return outputs

    return run


def _onnxruntime(data: bytes) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that parameters can be overridden, which is what they are for
    options.intra_op_num_threads = 1  # others would spin after each of these small calls
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    required = {item.name: item.type for item in session.get_inputs()}
    compute = required | {item.name: item.type for item in session.get_overridable_initializers()}
    scale = {metadata.GRAD_SCALE: 1.0} if metadata.GRAD_SCALE in required else {}

    def run(inputs: Values, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        feeds = {n: onnxruntime.OrtValue.from_dlpack(t.contiguous().__dlpack__()) for n, t in inputs.items()}
        for name, value in {**scale, **numbers}.items():
            array = np.array(value, dtype=np.float64 if "double" in compute[name] else np.float32)
            feeds[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        results = session.run_with_ort_values(names, feeds)
        return {n: torch.utils.dlpack.from_dlpack(v).clone() for n, v in zip(names, results, strict=True)}

    return run


def _onnx_reference(data: bytes) -> Run:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_from_string(data)
    evaluator = ReferenceEvaluator(model)
    defaults = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}

    def run(inputs: Values, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        for item in model.graph.input:
            if item.name not in feeds:
                value = numbers.get(item.name, defaults.get(item.name, 1.0))  # without a default: grad_scale
                feeds[item.name] = np.array(
                    value, onnx.helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type)
                )
        results = evaluator.run(None, feeds)
        return {n: torch.from_numpy(np.array(v)) for n, v in zip(evaluator.output_names, results, strict=True)}

    return run


def _one_by_one(run: Run) -> Run:
    """The same, a call for each sample."""

    def run_each(inputs: Values, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        samples = min(len(tensor) for tensor in inputs.values())
        every = [run({n: t[i : i + 1].contiguous() for n, t in inputs.items()}, numbers) for i in range(samples)]
        return {name: torch.cat([found[name] for found in every]) for name in every[0]}

    return run_each


def _runtime(directory: Path, engine: str, device: str, scores: bool) -> Run:
    from pykd.runtime import load

    loss = load(str(directory), engine=engine, device=device)

    def run(inputs: Values, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        return dict((loss.value if scores else loss.value_and_gradient)(**inputs, **numbers))

    return run
