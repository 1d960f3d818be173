"""What this machine has: the next plan is made from it."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys

from benchmarks.gpu.stage import Context

PACKAGES = (
    "torch", "triton", "numpy", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "transformers", "pybind11",
    "scikit-build-core", "tomli-w", "liger-kernel",
)  # fmt: skip
TOOLS = ("nvidia-smi", "nvcc", "ncu", "compute-sanitizer", "cmake", "ninja", "c++")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def run(context: Context) -> None:
    context.report(
        None, python=sys.version.split()[0], executable=sys.executable, system=platform.platform(), cores=os.cpu_count()
    )
    packed = context.pack / "pack.json"
    context.report(None, pack=json.loads(packed.read_text()) if packed.is_file() else None)
    context.report(None, packages={name: version for name in PACKAGES if (version := _version(name))})
    context.report(None, tools={name: shutil.which(name) for name in TOOLS})
    if context.device == "cuda":
        query = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        context.report(None, card=_said_by("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"))
    import torch

    available = context.device == "cpu" or torch.cuda.is_available()
    facts: dict[str, object] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if context.device == "cuda" and available:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
        }
    context.report(available, check="torch sees the device", **facts)
