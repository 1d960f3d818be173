"""What a loss costs in a training loop in torch, as a multiple of the lines that it replaces.

Value + gradient by ``backward()``, nothing said about kernels. The hand-written lines are what everybody writes, run in the
same process, in turn with ours; the answer of each is compared with float64 first. Times are medians, ratios are those of the
medians. Rows "compiled" and "float64" are the formulas, for which there is no kernel.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pykd
from pykd import kernels
from pykd.export.verification import LIMITS, errors

Formula = Callable[[Mapping[str, Tensor]], Tensor]
SIZES = ((8, 10), (64, 100), (128, 1000), (256, 1000), (256, 32000))
T = 2.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: lines written by hand, and what pykd has for them.

    Attributes:
        title: how it is called.
        sizes: of the logits, as text.
        tensors: the inputs; those of the student get the gradient.
        hand: the lines.
        ours: pykd's.
        compiled: whether both go through ``torch.compile``.
    """

    title: str
    sizes: str
    tensors: Mapping[str, Tensor]
    hand: Formula
    ours: Formula
    compiled: bool = False


def _kl(t: Mapping[str, Tensor]) -> Tensor:
    student, teacher = t["student_logits"].float(), t["teacher_logits"].float()
    if t["student_logits"].dtype == torch.float64:
        student, teacher = t["student_logits"], t["teacher_logits"]
    return F.kl_div(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), reduction="batchmean") * T * T


def _hard_and_kl(t: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(t["student_logits"], t["labels"]) + _kl(t)


def _soft_entropy(t: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(t["student_logits"] / T, F.softmax(t["teacher_logits"] / T, -1))


def _l1(t: Mapping[str, Tensor]) -> Tensor:
    student, teacher = F.normalize(t["student_features"], dim=-1), F.normalize(t["teacher_features"], dim=-1)
    features = (student - teacher).abs().sum(-1).mean()
    return F.cross_entropy(t["student_logits"], t["labels"]) + _soft_entropy(t) + features


def _mk_mmd(t: Mapping[str, Tensor]) -> Tensor:
    """As it stands in the code of domain adaptation: the kernel matrix of both sets, then its four blocks."""
    vectors = [
        F.normalize(F.normalize(t[f"{side}_features"], dim=-1).flatten(1), dim=-1) for side in ("student", "teacher")
    ]
    n = len(vectors[0])
    total = torch.cat(vectors)
    distances = (total.unsqueeze(0) - total.unsqueeze(1)).square().sum(-1)
    bandwidth = distances.detach().sum() / (4 * n * n - 2 * n)
    similar = sum(torch.exp(-distances / (2 * bandwidth * factor)) for factor in (1, 2, 4, 8, 16))
    features = similar[:n, :n].mean() + similar[n:, n:].mean() - 2 * similar[:n, n:].mean()  # type: ignore[index]
    return F.cross_entropy(t["student_logits"], t["labels"]) + _soft_entropy(t) + features


def _logits(batch: int, classes: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + classes)
    student, teacher = (2 * torch.randn(2, batch, classes, generator=generator)).to(dtype)
    labels = torch.randint(classes, (batch,), generator=generator)
    return {"student_logits": student, "teacher_logits": teacher, "labels": labels}


def cases() -> list[Case]:
    """Every row."""
    soft = pykd.SoftTarget(T, form="kl", tau_squared=True)
    both = pykd.compose({"hard": pykd.HardTarget(), "soft": soft})

    def module(t: Mapping[str, Tensor]) -> Tensor:
        value: Tensor = soft(t["student_logits"], t["teacher_logits"])
        return value

    def function(t: Mapping[str, Tensor]) -> Tensor:
        return pykd.functional.soft_target(
            t["student_logits"], t["teacher_logits"], temperature=T, form="kl", tau_squared=True
        )

    def composition(t: Mapping[str, Tensor]) -> Tensor:
        value: Tensor = both(**t)["loss"]
        return value

    found = []
    for size in SIZES:
        text = f"{size[0]} × {size[1]:,}"
        tensors = _logits(*size)
        found += [
            Case("`SoftTarget`, KL", text, tensors, _kl, module),
            Case("`functional.soft_target`, KL", text, tensors, _kl, function),
            Case("`compose`, hard + KL", text, tensors, _hard_and_kl, composition),
        ]
    for aux, hand in (("l1", _l1), ("MK-MMD", _mk_mmd)):
        loss = pykd.DistillationLoss(
            logit_loss="soft_entropy", lambda2=0, tau=T, mode="student_softening", aux_loss=aux
        )
        for batch, classes, tokens, channels in ((2, 3, 1, 4), (64, 100, 49, 64)):
            generator = torch.Generator().manual_seed(batch)
            features = torch.randn(2, batch, tokens, channels, generator=generator)
            tensors = {
                **_logits(batch, classes),
                "student_features": features[0].clone(),
                "teacher_features": features[1].clone(),
            }
            text = f"{batch} × {classes}; {batch} × {tokens} × {channels}"
            found.append(Case(f"`DistillationLoss`, {aux}", text, tensors, hand, _distilled(loss)))
    large = _logits(256, 32000, torch.bfloat16)
    found.append(Case("`SoftTarget`, KL, bfloat16", "256 × 32,000", large, _kl, module))
    for size in ((64, 100), (256, 1000)):
        text = f"{size[0]} × {size[1]:,}"
        found.append(Case("`SoftTarget`, KL, float64", text, _logits(*size, torch.float64), _kl, module))
        found.append(Case("`SoftTarget`, KL, compiled", text, _logits(*size), _kl, module, compiled=True))
    return found


def _distilled(loss: Any) -> Formula:
    def call(t: Mapping[str, Tensor]) -> Tensor:
        value: Tensor = loss(
            student_logits=t["student_logits"],
            teacher_logits=t["teacher_logits"],
            labels=t["labels"],
            student_features=[t["student_features"]],
            teacher_features=[t["teacher_features"]],
        )
        return value

    return call


def _step(formula: Formula, tensors: Mapping[str, Tensor]) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    leaves = {name: t.clone().requires_grad_(name.startswith("student")) for name, t in tensors.items()}
    students = [t for t in leaves.values() if t.requires_grad]

    def call() -> Tensor:
        for student in students:
            student.grad = None
        value = formula(leaves)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    return call, leaves


def _wrong(case: Case, formula: Formula, want: Mapping[str, Any]) -> tuple[float, float] | None:
    call, leaves = _step(formula, case.tensors)
    got = {"loss": call(), **{f"grad_{name}": t.grad for name, t in leaves.items() if t.grad is not None}}
    found = errors(got, want)
    limits = LIMITS[str(case.tensors["student_logits"].dtype).removeprefix("torch.")]
    return found if any(error > limit for error, limit in zip(found, limits, strict=True)) else None


def in_turn(calls: Mapping[str, Callable[[], Any]], budget: float = 1.0, rounds: int = 15) -> dict[str, float]:
    """Median seconds of each call, taken in turn, so that what else the machine does meets all of them alike."""
    once = 0.0
    for call in calls.values():
        for _ in range(5):
            call()
        start = time.perf_counter()
        call()
        once += time.perf_counter() - start
    count = max(1, int(budget / rounds / once))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(count):
                call()
            taken[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(each) for name, each in taken.items()}


def run(bandwidth: float) -> list[dict[str, Any]]:
    """Measures, with the best instruction set of this machine and with AVX2; one row per case and route."""
    rows = []
    targets: list[str | None] = [None, *(["AVX2"] if "AVX2" in kernels.simd_targets()[1:] else [])]
    for case in cases():
        exact = {n: t.double() if t.is_floating_point() else t for n, t in case.tensors.items()}
        call, leaves = _step(case.hand, exact)
        want = {"loss": call(), **{f"grad_{name}": t.grad for name, t in leaves.items() if t.grad is not None}}
        formulas = {"by hand": case.hand, "pykd": case.ours}
        if case.compiled:
            torch._dynamo.reset()
            formulas = {
                name: torch.compile(formula, fullgraph=True, dynamic=False) for name, formula in formulas.items()
            }
        for target in targets:
            kernels.use_simd(target)
            try:
                wrong = {name: found for name, formula in formulas.items() if (found := _wrong(case, formula, want))}
                calls = {
                    name: _step(formula, case.tensors)[0] for name, formula in formulas.items() if name not in wrong
                }
                seconds = in_turn(calls)
            finally:
                kernels.use_simd(None)
            for name in formulas:
                row: dict[str, Any] = {"case": f"{case.title}, {case.sizes}", "title": case.title, "sizes": case.sizes}
                row |= {"route": name, "simd": target or kernels.simd_targets()[0]}
                row |= {"wrong": wrong[name]} if name in wrong else {"seconds": seconds[name]}
                rows.append(row)
            if {"pykd", "by hand"} <= seconds.keys():
                ratio = seconds["pykd"] / seconds["by hand"]
                print(
                    f"{case.title}, {case.sizes}, {target or kernels.simd_targets()[0]}: by hand {1e6 * seconds['by hand']:.1f} µs, "
                    f"pykd {1e6 * seconds['pykd']:.1f} µs, {ratio:.2f} ×",
                    flush=True,
                )
    return rows
