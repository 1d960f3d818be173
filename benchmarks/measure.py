"""Timing and conditions, shared by every benchmark."""

import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from pykd import kernels


def median_seconds(call: Callable[[], Any], budget: float = 0.5, rounds: int = 9, synchronize: bool = False) -> float:
    """Median time of one call: warmed up, in rounds long enough for the clock.

    Args:
        call: what is timed.
        budget: seconds to spend in all, about.
        rounds: how many times are taken; their median counts. Three for calls of more than a second.
        synchronize: wait for the GPU at both ends of a round.
    """

    def round_of(count: int) -> float:
        if synchronize:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        if synchronize:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    round_of(1)
    once = round_of(1)
    if once > 1.0:  # what takes seconds varies little, and nine of them take minutes
        rounds = 3
    count = max(1, int(budget / rounds / max(once, 1e-7)))
    return statistics.median(round_of(count) for _ in range(rounds))


def copy_bandwidth(device: str = "cpu", bytes_: int = 1 << 28) -> float:
    """Bytes read plus bytes written per second by a copy of a large tensor: the machine's memory speed."""
    source = torch.empty(bytes_, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * bytes_ / median_seconds(lambda: target.copy_(source), synchronize=device != "cpu")


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Machine and versions, to be stored with every result."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        found["cpu"] = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    found["simd"] = kernels.simd_targets()[0]
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
    for name in ("pykd", "torch", "onnxruntime", "onnxruntime-gpu", "numpy"):
        if importlib.util.find_spec(name.replace("-gpu", "")):
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
    return found
