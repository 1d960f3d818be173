"""The GPU part of ``make gpu-check``: parity on CUDA, host copies, and the kernel at its sizes.

- Files: every exported folder with both engines, device tensors in, device tensors out, on the caller's stream. torch's
  profiler counts the copies between device and host during warmed-up calls: there must be none (ONNX Runtime's parameters
  are overridden by none of these calls).
- Kernels: ``soft_target`` by itself at sizes that take each of its paths, against float64; then, at the large ones, its time beside
  that of a copy of the same bytes, eager PyTorch, ``torch.compile`` and Liger-Kernel where it is installed. Every answer is checked
  before it is timed.

The result goes to benchmarks/results/. ``--device cpu --part kernels`` runs the second part on the CPU: the same code,
for a machine without a GPU.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import pykd
from benchmarks.kernels import Call, Comparison, Formula, by_autograd, compiled, fused, soft
from benchmarks.measure import conditions, copy_bandwidth, median_seconds
from pykd import kernels
from pykd.export.verification import LIMITS, definition, errors, truth

# Batch, classes, dtype: small; odd lengths, where no access is aligned; many classes; a vocabulary; rows for several blocks each; one row.
SIZES = (
    (256, 10, "float32"),
    (64, 1001, "float32"),
    (64, 1001, "float16"),
    (64, 32000, "float32"),
    (1, 262144, "float32"),
    (4096, 32000, "bfloat16"),
    (4096, 128256, "bfloat16"),
)
TEMPERATURE = 2.0  # that of `soft`
# Relative to max(1, |value|), and to the largest entry of the gradient.
ALLOWED = {"float32": (2e-6, 4e-6), "float16": (2e-6, 2**-10), "bfloat16": (2e-6, 2**-7)}
TIMED_FROM = 1 << 20  # elements


# ---- Files --------------------------------------------------------------------------------------


def host_copies(call: Callable[[], Any]) -> int:
    """Copies between device and host during three calls, after a warm-up."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    return sum("HtoD" in event.name or "DtoH" in event.name for event in profiled.events())


def check_file(folder: Path, engine: str, stream: torch.cuda.Stream) -> dict[str, Any]:
    """Parity and copies of one folder with one engine."""
    manifest = json.loads((folder / "manifest.json").read_text())
    composition, graph, dtype = definition(manifest)
    per_sample = "loss_per_sample" in graph.signature.outputs
    loss = pykd.load(str(folder), engine=engine, device="cuda", cuda_stream=stream.cuda_stream)
    worst = [0.0, 0.0]
    copies = 0
    with torch.cuda.stream(stream):
        for number, batch in enumerate((1, 6, 33, 6)):
            tensors = composition.draw(graph.signature.inputs, {"batch": batch}, number, getattr(torch, dtype))
            want = truth(composition, graph, tensors, {}, per_sample)
            on_gpu = {name: tensor.cuda() for name, tensor in tensors.items()}
            got = loss.value_and_gradient(**on_gpu)
            if not all(tensor.is_cuda for tensor in got.values()):
                raise RuntimeError(f"expected device tensors from {folder.name}, got some on the host; report this")
            found = errors({name: tensor.cpu() for name, tensor in got.items()}, want)
            worst = [max(a, b) for a, b in zip(worst, found, strict=True)]
        copies = host_copies(lambda: loss.value_and_gradient(**on_gpu))
    limits = LIMITS[dtype]
    ok = worst[0] <= limits[0] and worst[1] <= limits[1] and copies == 0
    return {"case": folder.name, "engine": engine, "errors": worst, "host_copies": copies, "ok": ok}


def check_files() -> tuple[list[dict[str, Any]], list[str]]:
    """Every folder of PYKD_TEST_VECTORS with both engines; what could not be run, with the reason."""
    vectors = Path(os.environ["PYKD_TEST_VECTORS"])
    stream = torch.cuda.Stream()
    rows, skipped = [], []
    for engine in ("onnxruntime", "torchscript"):
        for folder in sorted(path.parent for path in vectors.glob("*/manifest.json")):
            try:
                rows.append(check_file(folder, engine, stream))
            except RuntimeError as error:
                skipped.append(f"{engine}: {error}")
                break
            print(rows[-1], flush=True)
    return rows, skipped


# ---- Kernels ------------------------------------------------------------------------------------


def exact(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row and its weighted gradient, in float64, some rows at a time."""
    values, gradients = [], []
    for s, t, w in zip(student.split(64), teacher.split(64), weight.split(64), strict=True):
        log_q = F.log_softmax(s.double() / TEMPERATURE, -1)
        p = F.softmax(t.double() / TEMPERATURE, -1)
        values.append(-(p * log_q).sum(-1))
        gradients.append((w.double()[:, None] * (log_q.exp() - p) / TEMPERATURE).float())
    return torch.cat(values), torch.cat(gradients)


def distance(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """(value error, gradient error), relative as ALLOWED says."""
    value = ((got[0].double() - want[0]).abs() / want[0].abs().clamp(min=1)).max()
    worst = max(
        float((g.double() - w.double()).abs().max()) for g, w in zip(got[1].split(64), want[1].split(64), strict=True)
    )
    return float(value), worst / float(want[1].abs().max())


def kernel_routes(student: Tensor, teacher: Tensor, weight: Tensor) -> Iterator[tuple[str, Call]]:
    """Ours first. Each returns the values of the rows, or their mean alone, as ``loss``, and the gradient."""
    values, gradient = torch.empty_like(weight), torch.empty_like(student)
    stream = torch.cuda.current_stream().cuda_stream if student.is_cuda else None
    inputs = {"student": student, "teacher": teacher, "temperature": TEMPERATURE, "soft_weight": weight}

    def ours() -> dict[str, Tensor]:
        outputs = {"soft": values, "grad_student": gradient}
        kernels.run("soft_target", inputs, {"form": "cross_entropy"}, outputs, cuda_stream=stream)
        return {"loss": values, "grad_student_logits": gradient}

    yield "kernel", ours
    if student.numel() < TIMED_FROM:
        return
    tensors = {"student_logits": student, "teacher_logits": teacher}

    def route(function: Formula) -> Call:
        return by_autograd(function, tensors, ["student_logits"])

    yield "fused=True, backward()", route(fused(Comparison("", pykd.SoftTarget(temperature=TEMPERATURE), {})))
    yield "eager", route(soft)
    yield "torch.compile", route(compiled(soft))
    if importlib.util.find_spec("liger_kernel") and student.is_cuda:
        from liger_kernel.transformers import LigerKLDIVLoss

        divergence = LigerKLDIVLoss(reduction="batchmean")

        def liger(t: Mapping[str, Tensor]) -> Tensor:  # KL: another value than the cross-entropy, the same gradient
            log_q = F.log_softmax(t["student_logits"].float() / TEMPERATURE, -1)
            return divergence(log_q, F.softmax(t["teacher_logits"].float() / TEMPERATURE, -1))  # type: ignore[no-any-return]

        yield "Liger-Kernel KL", route(liger)


def check_kernels(device: str, largest: int) -> list[dict[str, Any]]:
    """Every size on every route: errors, and times of the large ones."""
    bandwidth = copy_bandwidth(device, 1 << 30 if device != "cpu" else 1 << 28)
    rows = []
    for batch, classes, dtype in SIZES:
        if batch * classes > largest:
            continue
        generator = torch.Generator(device).manual_seed(batch)
        student, teacher = (
            (3 * torch.randn(batch, classes, device=device, generator=generator)).to(getattr(torch, dtype))
            for _ in range(2)
        )
        weight = torch.full((batch,), 1 / batch, device=device)
        want = exact(student, teacher, weight)
        for route, call in kernel_routes(student, teacher, weight):
            answer = call()
            got = answer["loss"].detach(), answer["grad_student_logits"]
            mean = got[0].dim() == 0
            found = distance(got, (want[0].mean(), want[1]) if mean else want)
            allowed = ALLOWED[dtype]
            # The divergence leaves out the teacher's entropy: its gradient is what is compared.
            right = found[1] <= allowed[1] and (found[0] <= allowed[0] or route.endswith("KL"))
            row = {"case": f"{batch}x{classes} {dtype}", "route": route, "errors": found, "right": right}
            if right and student.numel() >= TIMED_FROM:
                row["seconds"] = median_seconds(call, budget=1.0, synchronize=device != "cpu")
                row["of_copy_bandwidth"] = 3 * student.nbytes / row["seconds"] / bandwidth
            row["ok"] = right or route not in ("kernel", "fused=True, backward()")
            rows.append(row)
            print(row, flush=True)
    return [{"copy_bandwidth": bandwidth}, *rows]


# ---- All of it ----------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Runs the parts; 0 where all is well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--part", choices=("files", "kernels"), action="append", help="default: both")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of the kernels")
    parser.add_argument("--largest", type=int, default=1 << 30, help="leave out kernel cases of more elements")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the result")
    options = parser.parse_args(arguments)
    parts = options.part or ["files", "kernels"]
    if not torch.cuda.is_available() and (options.device == "cuda" or "files" in parts):
        print("gpu_check: expected a GPU, got none that torch sees; run this where there is one", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"conditions": conditions(options.device), "rows": [], "not_run": []}
    if "files" in parts:
        result["rows"], result["not_run"] = check_files()
    if "kernels" in parts:
        measured, *rows = check_kernels(options.device, options.largest)
        result |= measured
        result["rows"] += rows
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / ("gpu-check.json" if options.device == "cuda" else "gpu-check-cpu.json")
    target.write_text(json.dumps(result, indent=1) + "\n")
    for line in result["not_run"]:
        print(f"not run: {line}")
    bad = [row for row in result["rows"] if not row["ok"]]
    print(f"{len(result['rows'])} checks, {len(bad)} failed; stored in {target}")
    return 1 if bad or not result["rows"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
