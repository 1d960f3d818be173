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

Formula = Callable[[Tensor, Tensor], Tensor]


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


CASES: Mapping[str, tuple[pykd.Loss, Formula]] = {
    "`SoftTarget`, KL": (pykd.SoftTarget(1.0, form="kl"), _kl),
    "`SoftTarget`, reverse KL": (pykd.SoftTarget(1.0, form="reverse_kl"), _reverse),
    "`SoftTarget`, JSD": (pykd.SoftTarget(1.0, form="jsd"), _jsd),
    "`SkewedKL`": (pykd.SkewedKL(), _skewed),
    "`SkewedKL`, reverse": (pykd.SkewedKL(direction="reverse"), _skewed_reverse),
    "`TotalVariation`": (pykd.TotalVariation(), _total_variation),
    "`AlphaBetaDivergence`": (pykd.AlphaBetaDivergence(), _alpha_beta),
    "`BalancedKL`": (pykd.BalancedKL(), _balanced),
}


def _logits(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    student, teacher = (torch.randn(rows, CLASSES, generator=generator).mul_(2) for _ in range(2))
    return student.requires_grad_(), teacher


def _answer(formula: Formula, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = formula(leaf, teacher)
    value.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return {"loss": value.detach(), "grad_student_logits": leaf.grad}


def _seconds(formula: Formula, student: Tensor, teacher: Tensor) -> float:
    student.grad = None
    start = time.perf_counter()
    formula(student, teacher).backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start


def run(bandwidth: float) -> list[dict[str, Any]]:
    """Measures; one row per loss and route."""
    rows = []
    few, large = _logits(CHECKED), _logits(ROWS)
    for title, (loss, hand) in CASES.items():
        routes: dict[str, Formula] = {
            "pykd": lambda s, t, loss=loss: loss(s, t, kernels="on"),  # type: ignore[misc]
            "formula": lambda s, t, loss=loss: loss(s, t, kernels="off"),  # type: ignore[misc]
            "by hand": hand,
        }
        exact = _answer(routes["formula"], *(t.double() for t in few))
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
