"""The GPU, and a stand-in for it on the CPU, behind one class: streams, capture, time, counted copies.

The stand-in lets the check be rehearsed, its positive controls included: a stream is a list of things to do, which are done
in order when someone waits for it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Work = Callable[[int | None], Any]  # queues work on the stream of that handle


class CudaDevice:
    """One NVIDIA GPU, through torch."""

    name = "cuda"
    copies = ("HtoD", "DtoH")

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def launch(self, work: Work, stream: Any = None) -> None:
        """Queues work on a stream; None: torch's current one."""
        with torch.cuda.stream(stream):
            work(torch.cuda.current_stream().cuda_stream)

    def stream(self) -> Any:
        return torch.cuda.Stream()

    def finish(self, stream: Any) -> None:
        """Waits for one stream."""
        stream.synchronize()

    def busy(self, stream: Any) -> None:
        """Keeps a stream busy for some 50 ms, so that what follows there is not done when it is looked at."""
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)

    def capture(self, work: Work, times: int = 1) -> Callable[[], None]:
        """Work as a CUDA graph, queued `times` times in a row; the result replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                work(torch.cuda.current_stream().cuda_stream)
        return graph.replay

    def seconds(self, calls: Sequence[Callable[[], Any]], budget: float) -> float:
        """Median time of one of these calls, made in turn: by CUDA events, warmed up."""
        for call in calls:
            call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def round_of() -> float:
            begin.record()
            for call in calls:
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        rounds = max(5, min(200, int(budget / max(round_of(), 1e-6))))
        return statistics.median(round_of() for _ in range(rounds)) / len(calls)


class Pending:
    """A stream of the stand-in."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], Any]] = []

    def finish(self) -> None:
        while self.queue:
            self.queue.pop(0)()


class CpuDevice:
    """The same on the CPU, for rehearsals: the CPU's kernels behind the same calls."""

    name = "cpu"
    copies = ("aten::copy_",)

    def __init__(self) -> None:
        self.streams: list[Pending] = []

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.finish()

    def launch(self, work: Work, stream: Pending | None = None) -> None:
        if stream is None:
            work(None)
        else:
            stream.queue.append(lambda: work(None))

    def stream(self) -> Pending:
        self.streams.append(Pending())
        return self.streams[-1]

    def finish(self, stream: Pending) -> None:
        stream.finish()

    def busy(self, stream: Pending) -> None:
        stream.queue.append(lambda: None)

    def capture(self, work: Work, times: int = 1) -> Callable[[], None]:
        def replay() -> None:
            for _ in range(times):
                work(None)

        return replay

    def seconds(self, calls: Sequence[Callable[[], Any]], budget: float) -> float:
        def round_of() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return time.perf_counter() - start

        round_of()
        rounds = max(3, min(20, int(budget / max(round_of(), 1e-6))))
        return statistics.median(round_of() for _ in range(rounds)) / len(calls)


Device = CudaDevice | CpuDevice


def device_of(name: str) -> Device:
    return CudaDevice() if name == "cuda" else CpuDevice()


def events(device: Device, call: Callable[[], Any]) -> list[str]:
    """What the device (in a rehearsal, torch on the CPU) does in one call, by name: kernels, copies."""
    activity = ProfilerActivity.CUDA if device.name == "cuda" else ProfilerActivity.CPU
    device.synchronize()
    with profile(activities=[activity]) as profiled:
        call()
        device.synchronize()
    found = [e for e in profiled.events() if device.name == "cpu" or e.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in found]


def count_copies(device: Device, call: Callable[[], Any]) -> int:
    """Copies between the device and the host in one call."""
    return sum(any(word in name for word in device.copies) for name in events(device, call))


def copies_are_counted(device: Device) -> bool:
    """The positive control of count_copies(): one copy each way, which it has to see."""
    on_host: Tensor = torch.ones(1 << 16)
    on_device = on_host.to(device.name, copy=True)
    there = count_copies(device, lambda: on_host.to(device.name, copy=True))
    back = count_copies(device, lambda: on_device.to("cpu", copy=True))
    nothing = count_copies(device, lambda: on_device.neg_())
    return there >= 1 and back >= 1 and nothing == 0
