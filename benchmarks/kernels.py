"""The fused kernels against PyTorch, ``torch.compile``, ONNX Runtime on the portable formula, and the memory limit.

Value + gradient, each case on every route, in one process. The answer is checked against float64 first; a route that
is wrong has no time. The memory limit is the time of moving each input and each gradient once at the machine's copy
bandwidth. Peak memory is what a call adds to the process beyond its inputs and outputs' owners.
"""

import ctypes
import dataclasses
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pykd
from benchmarks import c_interface
from benchmarks.losses import truth
from benchmarks.measure import median_seconds
from pykd import config
from pykd import kernels as library
from pykd.composition import Composition, as_composition
from pykd.export.verification import LIMITS, errors
from pykd.fused import point as kernel_point

Call = Callable[[], dict[str, Tensor]]
Formula = Callable[[Mapping[str, Tensor]], Tensor]
PROGRAMS = Path(__file__).parents[1] / "build" / "python" / "cpp" / "bench"  # `make bench` builds them


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row of the table.

    Attributes:
        title: how it is called.
        loss: a loss or a composition.
        sizes: axis lengths.
        dtype: of the floating inputs.
        layouts: as in the export.
        idiom: what a PyTorch user writes for it, from the tensors by name; None: the definition itself is it.
        labels: for labels that are identities: how many samples each has.
        memory: whether to measure peak memory.
        calls: whether this is about the overhead of a call: then bytes play no part.
    """

    title: str
    loss: Any
    sizes: Mapping[str, int]
    dtype: str = "float32"
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    idiom: Formula | None = None
    labels: int = 0
    memory: bool = False
    calls: bool = False

    @property
    def composition(self) -> Composition:
        return as_composition(self.loss)


def soft(t: Mapping[str, Tensor]) -> Tensor:
    """The soft-target cross-entropy at temperature 2, as a PyTorch user writes it."""
    return F.cross_entropy(t["student_logits"].float() / 2, (t["teacher_logits"].float() / 2).softmax(-1))


def _hard_and_soft(t: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(t["student_logits"], t["labels"]) + 0.5 * soft(t)


def comparisons() -> list[Comparison]:
    """The cases, made when they are needed: the losses register on import of pykd."""
    loss = pykd.SoftTarget(temperature=2.0)
    both = pykd.compose({"hard": (pykd.HardTarget(), 1.0), "soft": (loss, 0.5)})
    logits = [(256, 1000), (256, 32000), (64, 128000)]
    small = {"batch": 8, "classes": 10}
    cases = [
        Comparison("soft target, 8 × 10", loss, small, idiom=soft, calls=True),
        Comparison("hard + soft, 8 × 10", both, small, layouts={"labels": "batch"}, idiom=_hard_and_soft, calls=True),
    ]
    cases += [Comparison(f"soft target, {b} × {c:,}", loss, {"batch": b, "classes": c}, idiom=soft) for b, c in logits]
    large = {"batch": 256, "classes": 32000}
    cases += [
        Comparison("hard + soft, 256 × 32,000", both, large, layouts={"labels": "batch"}, idiom=_hard_and_soft),
        Comparison("soft target, bfloat16, 256 × 32,000", loss, large, dtype="bfloat16", idiom=soft),
        Comparison("MK-MMD, 4,096 × 512", pykd.MKMMD(), {"batch": 4096, "tokens": 1, "channels": 512}, memory=True),
        Comparison("DDL, 512 × 512, hardest negatives", pykd.DistributionDistillation(), {"batch": 512, "channels": 512}, labels=4, memory=True),
        Comparison("feature L2, 64 × 196 × 512", pykd.FeatureL2(), {"batch": 64, "tokens": 196, "channels": 512}),
    ]  # fmt: skip
    return cases


def routes(case: Comparison, folder: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Call]]:
    """Every way from these tensors to value and gradient; our own first."""
    composition = case.composition
    graph = composition.graph(case.layouts, check=False)
    wanted = [name for name, spec in graph.signature.inputs.items() if spec.grad]

    yield "kernel alone", bare(case, tensors)
    if "AVX2" in library.simd_targets()[1:]:  # what machines without AVX-512 would do
        library.use_simd("AVX2")
        try:
            yield "kernel alone, AVX2", bare(case, tensors)
        finally:
            library.use_simd(None)
    loss = pykd.load(folder, engine="onnxruntime", kernels="on")
    yield "pykd.load", lambda: loss.value_and_gradient(**tensors)
    yield "torch, backward()", by_autograd(fused(case), tensors, wanted)
    portable = pykd.load(folder, engine="onnxruntime", kernels="off")
    yield "ONNX Runtime, portable", lambda: portable.value_and_gradient(**tensors)
    yield "eager definition", by_autograd(lambda t: graph(**t)["loss"], tensors, wanted)
    if case.idiom is None:
        yield "torch.compile, definition", by_autograd(compiled(lambda t: graph(**t)["loss"]), tensors, wanted)
    else:
        yield "eager", by_autograd(case.idiom, tensors, wanted)
        yield "torch.compile", by_autograd(compiled(case.idiom), tensors, wanted)


def by_autograd(function: Formula, tensors: Mapping[str, Tensor], wanted: Sequence[str]) -> Call:
    """Value and gradients of a formula with ``backward()``."""
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in tensors.items()}

    def call() -> dict[str, Tensor]:
        for name in wanted:
            leaves[name].grad = None
        loss = function(leaves)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss, **{f"grad_{name}": leaves[name].grad for name in wanted}}  # type: ignore[dict-item]

    return call


def compiled(function: Formula) -> Formula:
    """The formula through ``torch.compile``, for these sizes alone."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def settings_of(loss: pykd.Loss) -> dict[str, Any]:
    """A loss's settings as arguments of its function."""
    return {name: value for name, value in loss.settings().items() if not (loss.couples_batch and name == "reduction")}


def fused(case: Comparison) -> Formula:
    """The loss in Python with ``kernels="on"``."""
    if isinstance(case.loss, Composition):
        return lambda t: case.loss(**t, kernels="on")["loss"]
    formula = getattr(pykd.functional, case.loss.name)
    return lambda t: formula(**t, **settings_of(case.loss), kernels="on")


def bare(case: Comparison, tensors: Mapping[str, Tensor]) -> Call:
    """The kernel calls behind the loss by themselves, through pykd_kernel_run(), into memory that is there.

    What lies around them, in the loss and in Python, is done before.
    """
    graph = case.composition.graph(case.layouts, check=False, fused=True)
    assert graph.kernel_point is not None
    students = [name for name, spec in graph.signature.inputs.items() if spec.grad]
    leaves = {name: t.detach().clone().requires_grad_(name in students) for name, t in tensors.items()}
    if len(case.composition.named_terms) == 1:  # a graph widens halves; the loss itself does not
        point = kernel_point.Point()
        loss = case.composition.named_terms[0].parts[0].loss
        function: Callable[[], dict[str, Tensor]] = lambda: {"loss": loss.by_kernel(point, leaves)}  # noqa: E731
    else:
        point, function = graph.kernel_point, lambda: graph(**leaves)
    prepared: list[tuple[str, dict[str, Tensor], dict[str, Any], dict[str, Tensor]]] = []

    def note(call: kernel_point.Call, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs, names = call.inputs(weights), call.outputs(weights)
        student = call.tensors[call.kernel.differentiable[0]]
        outputs = {
            n: torch.empty(call.kernel.shape(n, call.tensors), dtype=student.dtype if n.startswith("grad_") else torch.float32)
            for n in names
        }  # fmt: skip
        prepared.append((call.kernel.name, inputs, dict(call.attributes), outputs))
        library.run(*prepared[-1])
        return outputs

    values, gradients = kernel_point.value_and_gradient(function, point, [leaves[n] for n in students], 1.0, note)
    answer = {"loss": values["loss"], **{f"grad_{n}": g for n, g in zip(students, gradients, strict=True)}}

    calls = [c_interface.KernelCall(*kernel) for kernel in prepared]

    def call() -> dict[str, Tensor]:
        for kernel in calls:
            kernel.run()
        return answer

    return call


def peak_memory(call: Call) -> int:
    """Bytes that a call adds to the process at its highest point."""
    call()
    c_interface.library().pykd_trim_memory()  # else the call would find the memory of the last one
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # forgets the highest point
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def run(bandwidth: float) -> list[dict[str, Any]]:
    """Measures; one row per case and route."""
    rows = []
    for case in comparisons():
        composition = case.composition
        graph = composition.graph(case.layouts, check=False)
        tensors = composition.draw(graph.signature.inputs, case.sizes, dtype=getattr(torch, case.dtype))
        if case.labels:
            tensors["labels"] = torch.arange(case.sizes["batch"]) // case.labels
        moved = sum(t.nbytes * (2 if graph.signature.inputs[n].grad else 1) for n, t in tensors.items())
        want = truth(graph, tensors)
        with tempfile.TemporaryDirectory() as folder:
            pykd.export(composition, folder, layouts=case.layouts, dtype=case.dtype, progress=lambda line: None)
            for route, call in routes(case, folder, tensors):
                row: dict[str, Any] = {"case": case.title, "route": route}
                found = errors({name: value.detach() for name, value in call().items() if name in want}, want)
                if any(error > limit for error, limit in zip(found, LIMITS[case.dtype], strict=True)):
                    row["wrong"] = found
                else:
                    row["seconds"] = median_seconds(call, budget=2.0)
                    row["times_limit"] = row["seconds"] * bandwidth / moved
                    if case.memory:
                        row["peak_bytes"] = peak_memory(call)
                rows.append(row)
                print(_line(row), flush=True)
            for route, seconds in programs(case, Path(folder)):
                rows.append(
                    {"case": case.title, "route": route, "seconds": seconds, "times_limit": seconds * bandwidth / moved}
                )
                print(_line(rows[-1]), flush=True)
    for row in rows:
        case = next(case for case in comparisons() if case.title == row["case"])
        row["bound_by_memory"] = not case.memory and not case.calls
    return rows


def programs(case: Comparison, folder: Path) -> Iterator[tuple[str, float]]:
    """What the C++ programs measure: the same files, whose answers the tests compare with float64 in C++."""
    lengths = [f"{axis}={length}" for axis, length in case.sizes.items()]
    if case.labels:
        lengths.append(f"labels={case.labels}")
    environment = {**os.environ, "PYKD_ONNXRUNTIME_LIBRARY": str(config.onnxruntime_library())}

    def seconds(*arguments: str) -> float:
        def once() -> float:
            return float(subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True).stdout)

        return statistics.median(once() for _ in range(3))  # a second each: the machine may be busy in one of them

    yield "pykd_run (C)", seconds(str(PROGRAMS / "run_bench"), str(folder), "on", case.dtype, *lengths)
    if (PROGRAMS / "libtorch_bench").exists():
        program = str(PROGRAMS / "libtorch_bench")
        yield "LibTorch, backward() (C++)", seconds(program, str(folder), case.dtype, *lengths)


def _line(row: Mapping[str, Any]) -> str:
    if "wrong" in row:
        return f"{row['case']:38} {row['route']:26} WRONG {row['wrong']}"
    peak = f"  {row['peak_bytes'] / 2**20:9.1f} MiB" if "peak_bytes" in row else ""
    return f"{row['case']:38} {row['route']:26} {row['seconds'] * 1e3:10.3f} ms {row['times_limit']:8.2f} × limit{peak}"
