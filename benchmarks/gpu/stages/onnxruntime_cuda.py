"""The exported folders through ONNX Runtime's CUDA provider: numbers, streams, kernels, copies. In a rehearsal, on the CPU."""

from pathlib import Path
from typing import Any

import torch

import pykd
from benchmarks.gpu import folders
from benchmarks.gpu.device import Device, copies_are_counted, count_copies, device_of
from benchmarks.gpu.stage import Context


def run(context: Context) -> None:
    device = device_of(context.device)
    counted = copies_are_counted(device)
    context.report(counted, control="copies to and from the host are counted")
    for folder in folders.folders(context.pack):
        for kernels in ("auto", "off"):
            for stream in ("own", "default", "another"):
                row = {"folder": folder.name, "kernels": kernels, "stream": stream}
                context.attempt(
                    lambda r=row, f=folder: check(context, device, f, counted, r), check="onnxruntime", **row
                )  # type: ignore[misc]


def check(context: Context, device: Device, folder: Path, counted: bool, row: dict[str, str]) -> None:
    """One folder on one stream: every call of its vectors, on inputs that come late."""
    there_is_a_gpu = device.name == "cuda"
    side = device.stream() if row["stream"] == "another" else None
    handle = None
    if there_is_a_gpu and row["stream"] != "own":
        handle = side.cuda_stream if side is not None else torch.cuda.current_stream().cuda_stream
    loss = pykd.load(folder, engine="onnxruntime", device=device.name, cuda_stream=handle, kernels=row["kernels"])
    worst, placed = 0.0, True
    there: dict[str, Any] = {}
    for inputs, parameters, want, allowed in folders.calls(folder):
        late = {name: tensor.to(device.name) for name, tensor in inputs.items()}
        there = {name: torch.zeros_like(tensor) for name, tensor in late.items()}
        device.synchronize()
        if there_is_a_gpu:  # on torch's current stream, with which pykd has to put the engine's in order
            torch.cuda._sleep(2_000_000)
        for name, tensor in late.items():
            there[name].copy_(tensor)
        got = loss.value_and_gradient(**there, **parameters)
        worst = max(worst, folders.error(got, want, allowed))
        placed &= all(tensor.device.type == device.name for tensor in got.values())
    copies = count_copies(device, lambda: loss.value_and_gradient(**there)) if there_is_a_gpu else 0
    context.report(
        worst <= 1 and placed and counted and copies == 0, check="onnxruntime", error=worst, copies=copies,
        kernels_in_use=loss.kernels_in_use, **row,
    )  # fmt: skip
