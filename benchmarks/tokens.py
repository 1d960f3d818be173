"""What a loss of language models costs on whole vocabularies: its kernel, its formula, and the line written by hand.

Value + gradient in float32 by ``backward()``, the whole way from the call of the loss to the student's ``.grad``, in one process,
in turn. The answer of each is compared with float64 first, on some of the rows. ``PYKD_TOKENS_ROWS`` says how many rows there
are (4,096 by default, which takes some GB of memory).
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pykd
from pykd.export.verification import LIMITS, errors

CLASSES = 32000
ROWS = int(os.environ.get("PYKD_TOKENS_ROWS", "4096"))
CHECKED = 16  # rows that are compared with float64
ROUNDS = 3
TOP_K = 64  # entries of the teacher

Formula = Callable[..., Tensor]  # of the student's logits and what the teacher gives


def _logs(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return F.log_softmax(teacher, -1), F.log_softmax(student, -1)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean")


def _reverse(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = _logs(student, teacher)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def _jsd(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = F.softmax(teacher, -1), F.softmax(student, -1)
    m = (p + q) / 2
    return 0.5 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean()


def _skewed(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = F.softmax(teacher, -1), F.softmax(student, -1)
    return (p * (p / (0.1 * p + 0.9 * q)).log()).sum(-1).mean()


def _skewed_reverse(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = F.softmax(teacher, -1), F.softmax(student, -1)
    return (q * (q / (0.1 * q + 0.9 * p)).log()).sum(-1).mean()


def _total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (F.softmax(student, -1) - F.softmax(teacher, -1)).abs().sum(-1).mean()


def _alpha_beta(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = F.softmax(teacher, -1), F.softmax(student, -1)
    return -((p**0.2 * q**0.7 - 0.2 / 0.9 * p**0.9 - 0.7 / 0.9 * q**0.9) / 0.14).sum(-1).mean()


def _balanced(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = _logs(student, teacher)
    p, q = log_p.exp(), log_q.exp()
    apart = (p * log_p).sum(-1) - (q * log_q).sum(-1).detach()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    return (torch.where(apart < 0, 3.0, 1.0) * forward + torch.where(apart > 0, 3.0, 1.0) * reverse).mean()


def _adaptive(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = _logs(student, teacher)
    p, q = log_p.exp(), log_q.exp()
    with torch.no_grad():
        ordered, order = p.sort(-1, descending=True)
        apart = (ordered - q.gather(-1, order)).abs()
        in_head = ordered.cumsum(-1) - ordered < 0.5
        head, tail = (apart * in_head).sum(-1), (apart * ~in_head).sum(-1)
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    return ((head * forward + tail * reverse) / (head + tail)).mean()


def _top_k(student: Tensor, log_p: Tensor, ids: Tensor) -> Tensor:
    log_q = F.log_softmax(student, -1).gather(-1, ids)
    p = log_p.exp()
    rest_p, rest_q = 1 - p.sum(-1), 1 - log_q.exp().sum(-1)
    return ((p * (log_p - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()).mean()


def _top_k_zero(student: Tensor, log_p: Tensor, ids: Tensor) -> Tensor:
    log_p = F.log_softmax(log_p, -1)
    return (log_p.exp() * (log_p - F.log_softmax(student, -1).gather(-1, ids))).sum(-1).mean()


def _top_k_renormalized(student: Tensor, log_p: Tensor, ids: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student.gather(-1, ids), -1), F.softmax(log_p, -1), reduction="batchmean")


def _sampled(student: Tensor, log_p: Tensor, ids: Tensor) -> Tensor:
    log_q = F.log_softmax(student, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return ((log_q.detach() - log_p) * log_q).mean()


def _decoupled(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """As mdistiller does it."""
    label = F.one_hot(labels, CLASSES).bool()
    p, q = F.softmax(teacher / 4, 1), F.softmax(student / 4, 1)
    p, q = (torch.stack([x[label], (x * ~label).sum(1)], 1) for x in (p, q))
    target = F.kl_div(torch.log(q), p, reduction="batchmean")
    others = F.softmax(teacher / 4 - 1000.0 * label, 1)
    non_target = F.kl_div(F.log_softmax(student / 4 - 1000.0 * label, 1), others, reduction="batchmean")
    return 16 * (target + 8 * non_target)


def _normalized(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """As the authors do it."""
    label = F.one_hot(labels, CLASSES).bool()
    target = -(F.softmax(teacher, 1)[label] * F.log_softmax(student, 1)[label]).mean()
    student, teacher = (x[~label].reshape(len(x), -1) for x in (student, teacher))
    return target - 1.5 * (F.softmax(teacher, 1) * F.log_softmax(student, 1)).sum(1).mean()


def _corrected(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    p, label = F.softmax(teacher, 1), F.one_hot(labels, CLASSES)
    largest, place = p.max(1, keepdim=True)
    own = p.gather(1, labels[:, None])
    share = torch.where(
        place == labels[:, None], (0.2 / (1 - own)).clamp(max=1), (largest - own + 0.2) / (1 + largest - own)
    )
    return F.kl_div(F.log_softmax(student, 1), p + share * (label - p), reduction="batchmean")


def _virtual(student: Tensor, labels: Tensor) -> Tensor:
    virtual = torch.full_like(student.detach(), 0.01 / (CLASSES - 1)).scatter_(1, labels[:, None], 0.99)
    return F.kl_div(F.log_softmax(student, 1), F.softmax(virtual / 20, 1), reduction="batchmean")


def _decision(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(student, teacher.argmax(1))


OF_LOGITS: Mapping[str, tuple[pykd.Loss, Formula]] = {
    "`SoftTarget`, KL": (pykd.SoftTarget(1.0, form="kl"), _kl),
    "`SoftTarget`, reverse KL": (pykd.SoftTarget(1.0, form="reverse_kl"), _reverse),
    "`SoftTarget`, JSD": (pykd.SoftTarget(1.0, form="jsd"), _jsd),
    "`SkewedKL`": (pykd.SkewedKL(), _skewed),
    "`SkewedKL`, reverse": (pykd.SkewedKL(direction="reverse"), _skewed_reverse),
    "`TotalVariation`": (pykd.TotalVariation(), _total_variation),
    "`AlphaBetaDivergence`": (pykd.AlphaBetaDivergence(), _alpha_beta),
    "`BalancedKL`": (pykd.BalancedKL(), _balanced),
    "`AdaptiveKL`": (pykd.AdaptiveKL(), _adaptive),
    "`HardLabelDistillation`": (pykd.HardLabelDistillation(), _decision),
}
OF_LOGITS_AND_LABELS: Mapping[str, tuple[pykd.Loss, Formula]] = {
    "`DecoupledKD`": (pykd.DecoupledKD(), _decoupled),
    "`NormalizedKD`": (pykd.NormalizedKD(), _normalized),
    "`MiniFinetuning`": (pykd.MiniFinetuning(), _corrected),
}
OF_LABELS: Mapping[str, tuple[pykd.Loss, Formula]] = {"`VirtualTeacher`": (pykd.VirtualTeacher(), _virtual)}
OF_TOP_K: Mapping[str, tuple[pykd.Loss, Formula]] = {
    "`TopKKL`": (pykd.TopKKL(), _top_k),
    "`TopKKL`, zero": (pykd.TopKKL(convention="zero"), _top_k_zero),
    "`TopKKL`, renormalized": (pykd.TopKKL(convention="renormalized"), _top_k_renormalized),
}
OF_SAMPLES: Mapping[str, tuple[pykd.Loss, Formula]] = {"`SampledReverseKL`": (pykd.SampledReverseKL(), _sampled)}

Inputs = tuple[Tensor, ...]


def _logits(rows: int) -> Inputs:
    generator = torch.Generator().manual_seed(rows)
    student, teacher = (torch.randn(rows, CLASSES, generator=generator).mul_(2) for _ in range(2))
    return student.requires_grad_(), teacher


def _labels_of(inputs: Inputs) -> Inputs:
    """Labels alone, drawn evenly."""
    generator = torch.Generator().manual_seed(2)
    return inputs[0], torch.randint(CLASSES, (len(inputs[0]),), generator=generator)


def _top_k_of(inputs: Inputs) -> Inputs:
    """What a teacher that keeps its likeliest entries gives of its logits."""
    log_p, ids = F.log_softmax(inputs[1], -1).topk(TOP_K)
    return inputs[0], log_p, ids


def _sample_of(inputs: Inputs) -> Inputs:
    """A class for each row, drawn from the student, and the teacher's log-probability of it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.multinomial(F.softmax(inputs[0].detach(), -1), 1, generator=generator)
    return inputs[0], F.log_softmax(inputs[1], -1).gather(-1, ids).squeeze(-1), ids.squeeze(-1)


def _answer(formula: Formula, student: Tensor, *teacher: Tensor) -> dict[str, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = formula(leaf, *teacher)
    value.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return {"loss": value.detach(), "grad_student_logits": leaf.grad}


def _seconds(formula: Formula, student: Tensor, *teacher: Tensor) -> float:
    student.grad = None
    start = time.perf_counter()
    formula(student, *teacher).backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start


def run(bandwidth: float) -> list[dict[str, Any]]:
    """Measures; one row per loss and route. ``PYKD_TOKENS_ONLY`` names the losses by a part of their titles."""
    rows = []
    only = os.environ.get("PYKD_TOKENS_ONLY", "")
    few, large = _logits(CHECKED), _logits(ROWS)
    drawn: tuple[tuple[Mapping[str, tuple[pykd.Loss, Formula]], Callable[[Inputs], Inputs]], ...] = (
        (OF_LOGITS, tuple),
        (OF_LOGITS_AND_LABELS, lambda inputs: (*inputs, _labels_of(inputs)[1])),
        (OF_LABELS, _labels_of),
        (OF_TOP_K, _top_k_of),
        (OF_SAMPLES, _sample_of),
    )
    for cases, given in drawn:
        chosen = {title: case for title, case in cases.items() if only in title}
        if chosen:
            rows += _measured(chosen, given(few), given(large))
    return rows


def _measured(cases: Mapping[str, tuple[pykd.Loss, Formula]], few: Inputs, large: Inputs) -> list[dict[str, Any]]:
    rows = []
    for title, (loss, hand) in cases.items():
        routes: dict[str, Formula] = {
            "pykd": lambda *given, loss=loss: loss(*given, kernels="on"),
            "formula": lambda *given, loss=loss: loss(*given, kernels="off"),
            "by hand": hand,
        }
        exact = _answer(routes["formula"], *(t.double() if t.is_floating_point() else t for t in few))
        want = {name: t.numpy() for name, t in exact.items()}
        found = {name: errors(_answer(formula, *few), want) for name, formula in routes.items()}
        wrong = {name: e for name, e in found.items() if any(x > y for x, y in zip(e, LIMITS["float32"], strict=True))}
        taken: dict[str, list[float]] = {name: [] for name in routes if name not in wrong}
        for round_ in range(ROUNDS + 1):
            for name, times in taken.items():
                seconds = _seconds(routes[name], *large)
                if round_:  # the first finds the memory
                    times.append(seconds)
        medians = {name: statistics.median(times) for name, times in taken.items()}
        for name in routes:
            row: dict[str, Any] = {"case": f"{title}, {ROWS:,} × {CLASSES:,}", "title": title, "route": name}
            rows.append(row | ({"wrong": wrong[name]} if name in wrong else {"seconds": medians[name]}))
        texts = [f"{name} {medians[name]:.3f} s" if name in medians else f"{name} wrong" for name in routes]
        ours = medians.get("pykd", float("nan"))
        ratios = [f"{seconds / ours:.1f} × as long {name}" for name, seconds in medians.items() if name != "pykd"]
        print(f"{title}, {ROWS:,} × {CLASSES:,}: {', '.join(texts)}; {', '.join(ratios)}", flush=True)
    return rows
