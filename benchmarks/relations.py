"""Losses on relations at large batches, beside the formulas that other libraries have for them: time, and memory at the peak.

Value + gradient by ``backward()``, nothing said about kernels. The answers of both are compared with float64 first, and
the two are timed in turn, so that a busy machine meets both. The memory is what tensors take at the highest point of a call, the
gradient among them, which is the same in every call; what a process holds then is about twice that, by the holes that malloc
leaves, and another number each time. torchdistill is what ``scripts/python-environment`` installs; formulas of
RepDistiller and of others that are in no package are written here as their code goes.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import pykd
from benchmarks.kernels import peak_memory as resident_memory
from pykd.export.verification import LIMITS, errors
from tests import oracles

Formula = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        library: whose formula the other one is.
        theirs: it.
        loss: ours.
        factor: what theirs is of ours.
        shape: of both sides.
    """

    library: str
    theirs: Formula
    loss: Any
    shape: tuple[int, ...] = (1024, 512)
    factor: float = 1.0


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    student, teacher = F.normalize(x @ x.t()), F.normalize(y @ y.t())
    difference = teacher - student
    return (difference * difference).view(-1, 1).sum(0).squeeze() / len(x) ** 2


def _squared(x: Tensor) -> Tensor:
    squares = x.pow(2).sum(dim=1)
    return (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * x @ x.t()).clamp(min=1e-12)


def _without_diagonal(x: Tensor) -> Tensor:
    x = x.clone()
    x[range(len(x)), range(len(x))] = 0
    return x


def _graph(x: Tensor, y: Tensor) -> Tensor:
    student, teacher = _without_diagonal(_squared(x)), _without_diagonal(_squared(y))
    return F.mse_loss(student / student.max(), teacher / teacher.max())


def _dark_rank(x: Tensor, y: Tensor) -> Tensor:
    student, teacher = (-3 * _without_diagonal(_squared(F.normalize(z)).sqrt()).pow(3) for z in (x, y))
    order = teacher.sort(dim=1, descending=True)[1][:, 1:4]
    scores = torch.gather(student, 1, order)
    sums = torch.stack([torch.logsumexp(scores[:, place:], dim=1) for place in range(3)], dim=1)
    return (sums - scores).sum(dim=1).mean()


def _information(x: Tensor, y: Tensor) -> Tensor:
    x, y = F.normalize(x), F.normalize(y)
    student = x @ x.t()
    joint = student * (y @ y.t())
    return (student / student.trace()).pow(2).sum() - (joint / joint.trace()).pow(2).sum()


def _neighbours(x: Tensor, y: Tensor) -> Tensor:
    difference = (x - y).abs()
    return (difference[:-1] * difference[1:]).sum(1).mean()


def cases() -> list[Case]:
    """The rows; torchdistill's losses are read when they are wanted."""
    with oracles.importable("torchdistill"):
        from torchdistill.losses import mid_level as there  # type: ignore[import-not-found]

    def of(loss: Any) -> Formula:
        return lambda x, y: loss({"p": {"output": x}}, {"p": {"output": y}})

    images = (64, 512, 7, 7)
    gaussian = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
    angle = there.RKDLoss("p", "p", 0, 1.0, "mean")
    return [
        Case("RepDistiller, Similarity", _similarity, pykd.SimilarityPreserving()),
        Case("torchdistill, RKDLoss", of(there.RKDLoss("p", "p", 1.0, 0, "mean")), pykd.RelationalDistance()),
        Case("torchdistill, RKDLoss", of(angle), pykd.RelationalAngle(), (128, 512)),
        Case("torchdistill, RKDLoss", of(angle), pykd.RelationalAngle(), (256, 512)),
        Case("torchdistill, PKTLoss", of(there.PKTLoss("p", "output", "p", "output")), pykd.ProbabilisticTransfer(own=True, average="pairs")),
        Case("torchdistill, CCKDLoss", of(there.CCKDLoss("p", "p", gaussian, "batchmean")), pykd.CorrelationCongruence(form="norm", normalized=False)),
        Case("torchdistill, ChSimLoss", there.ChSimLoss.batch_loss, pykd.InterChannelCorrelation(), images, 1 / images[0]),
        Case("torchdistill, AffinityLoss", of(there.AffinityLoss("p", "p")), pykd.Affinity(per="channel"), images),
        Case("Knowledge-Distillation-Zoo, IRG", _graph, pykd.InstanceRelationshipGraph()),
        Case("RKD, HardDarkRank", _dark_rank, pykd.HardDarkRank()),
        Case("TTM, ITLoss", _information, pykd.MutualInformation()),
        Case("RepDistiller, Correlation", _neighbours, pykd.NeighbourDifferences()),
    ]  # fmt: skip


def _call(formula: Formula, x: Tensor, y: Tensor) -> Callable[[], dict[str, Tensor]]:
    leaf = x.clone().requires_grad_()

    def call() -> dict[str, Tensor]:
        loss = formula(leaf, y)
        loss.backward()  # type: ignore[no-untyped-call]
        gradient, leaf.grad = leaf.grad, None  # else it would be there before the next call
        assert gradient is not None
        return {"loss": loss.detach(), "grad_x": gradient}

    return call


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes of tensors at the highest point of a call, beyond those that are there before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


def drawn(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A student and a teacher that have something in common."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(shape, generator=generator)
    return teacher + 0.5 * torch.randn(shape, generator=generator), teacher


def run(bandwidth: float) -> list[dict[str, Any]]:
    """Measures; one row per case and route."""
    rows = []
    for case in cases():
        x, y = drawn(case.shape)
        want = {name: t.numpy() for name, t in _call(case.loss, x.double(), y.double())().items()}
        routes = {case.library: _call(case.theirs, x, y), "pykd": _call(case.loss, x, y)}
        if case.loss.has_blocks():
            routes["pykd, formula"] = _call(lambda x, y, loss=case.loss: loss(x, y, kernels="off"), x, y)  # type: ignore[misc]
        found: dict[str, dict[str, Any]] = {}
        for route, call in routes.items():
            row = found[route] = {"loss": case.loss.name, "shape": list(case.shape), "route": route}
            factor = case.factor if route == case.library else 1.0
            error = errors({name: value / factor for name, value in call().items()}, want)
            row["errors"] = error
            if route != case.library and any(e > limit for e, limit in zip(error, LIMITS["float32"], strict=True)):
                row["wrong"] = error
        for route, seconds in in_turn(routes).items():
            found[route] |= {
                "seconds": seconds,
                "peak_bytes": peak_memory(routes[route]),
                "resident_bytes": statistics.median(resident_memory(routes[route]) for _ in range(5)),
            }
        rows += found.values()
        print(_line(case, found), flush=True)
    return rows


def in_turn(routes: Mapping[str, Callable[[], Any]], budget: float = 1.0, least: int = 5) -> dict[str, float]:
    """Median seconds of each, taken in turn until the budget is spent."""
    taken: dict[str, list[float]] = {route: [] for route in routes}
    for call in routes.values():
        call()
    until = time.perf_counter() + budget
    while time.perf_counter() < until or len(next(iter(taken.values()))) < least:
        for route, call in routes.items():
            start = time.perf_counter()
            call()
            taken[route].append(time.perf_counter() - start)
    return {route: statistics.median(seconds) for route, seconds in taken.items()}


def _line(case: Case, found: Mapping[str, Mapping[str, Any]]) -> str:
    theirs, ours = found[case.library], found["pykd"]
    size = " × ".join(f"{n:,}" for n in case.shape)
    if "wrong" in ours:
        return f"{case.loss.name:28} {size:20} WRONG {ours['wrong']}"
    time_ratio, memory_ratio = (ours[key] / theirs[key] for key in ("seconds", "peak_bytes"))
    return (
        f"{case.loss.name:28} {size:20} {case.library:36} {theirs['seconds'] * 1e3:7.1f} ms {theirs['peak_bytes'] / 2**20:7.1f} MiB   "
        f"pykd {ours['seconds'] * 1e3:7.1f} ms {ours['peak_bytes'] / 2**20:7.1f} MiB   × {time_ratio:.2f}, × {memory_ratio:.2f}"
    )
