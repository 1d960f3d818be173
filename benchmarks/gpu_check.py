"""The GPU part of ``make gpu-check``: parity on CUDA through both engines, and a count of host copies.

For every exported folder: device tensors in, device tensors out, on the caller's stream; the errors are against float64 on
the CPU. torch's profiler counts the copies between device and host during warmed-up calls: there must be none
(ONNX Runtime's parameters are overridden by none of these calls). The result goes to benchmarks/results/.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import pykd
from benchmarks.measure import conditions
from pykd.export.verification import LIMITS, definition, errors, truth


def host_copies(call: Any) -> int:
    """Copies between device and host during three calls, after a warm-up."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    return sum("HtoD" in event.name or "DtoH" in event.name for event in profiled.events())


def check(folder: Path, engine: str, stream: torch.cuda.Stream) -> dict[str, Any]:
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


def main(arguments: Sequence[str]) -> int:
    """Checks every folder of PYKD_TEST_VECTORS with both engines; 0 where all is well.

    Args:
        arguments: the folder for the result; benchmarks/results where none is named.
    """
    if not torch.cuda.is_available():
        print("gpu_check: expected a GPU, got none that torch sees; run this where there is one", file=sys.stderr)
        return 2
    vectors = Path(os.environ["PYKD_TEST_VECTORS"])
    stream = torch.cuda.Stream()
    rows: list[dict[str, Any]] = []
    skipped = []
    for engine in ("onnxruntime", "torchscript"):
        for folder in sorted(path.parent for path in vectors.glob("*/manifest.json")):
            try:
                rows.append(check(folder, engine, stream))
            except RuntimeError as error:
                skipped.append(f"{engine}: {error}")
                break
            print(rows[-1], flush=True)
    result = {"conditions": conditions("cuda"), "rows": rows, "not_run": skipped}
    where = Path(arguments[0]) if arguments else Path(__file__).parent / "results"
    where.mkdir(parents=True, exist_ok=True)
    (where / "gpu-check.json").write_text(json.dumps(result, indent=1) + "\n")
    for line in skipped:
        print(f"not run: {line}")
    bad = [row for row in rows if not row["ok"]]
    print(f"{len(rows)} checks, {len(bad)} failed; stored in {where / 'gpu-check.json'}")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
