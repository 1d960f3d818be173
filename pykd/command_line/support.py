"""Where each loss runs, in which types, and why not where it does not: ``pykd list --support``.

Eager mode and kernels are asked here and now, with every case that a loss declares. Files are written in all types for every
loss, or :func:`pykd.export` ends in an error, and tests run each of them on every engine.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pykd.composition import as_composition
from pykd.definition import Case, Loss
from pykd.export import DTYPES
from pykd.fused.eager import kernel_calls

FILES = ("TorchScript", "ONNX", "ONNX gradient", "C++")
ROUTES = ("eager", *FILES, "kernel, CPU", "kernel, CUDA")
_SHORT = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
NOT_RUN = "compiled, and not run on a GPU yet"

Support = Mapping[str, Mapping[str, str]]  # by route and type: why not; empty where it runs


def support(cls: type[Loss]) -> Support:
    """Where a loss runs: for every route and type, why it does not, or nothing."""
    found: dict[str, dict[str, str]] = {route: dict.fromkeys(DTYPES, "") for route in ROUTES}
    for dtype in DTYPES:
        refused = [_refusals(cls, case, dtype) for case in cls.cases]
        found["eager"][dtype] = next((eager for eager, *_ in refused if eager), "")
        for route, whys in zip(ROUTES[-2:], list(zip(*refused, strict=True))[1:], strict=True):
            found[route][dtype] = "" if not all(whys) else whys[0]
    return found


def _refusals(cls: type[Loss], case: Case, dtype: str) -> tuple[str, str, str]:
    """Why a case does not run in eager mode, by a kernel on the CPU, and by one on CUDA; empty where it does."""
    loss = cls(**case.settings)
    composition = as_composition(loss)
    specs = composition.choose(case.layouts, case.optional)
    tensors: dict[str, Any] = composition.draw(specs, dtype=getattr(torch, dtype))
    given = {name: tensor.requires_grad_(specs[name].grad) for name, tensor in tensors.items()}
    try:
        value = loss(**given, kernels="off")
        value.sum().backward()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error), str(error), str(error)
    finite = all(
        bool(torch.isfinite(t).all()) for t in (value, *(t.grad for t in given.values() if t.grad is not None))
    )
    call = loss.planned(tensors)
    assert call is not None  # these are ordinary tensors
    on_cpu = loss.why_formula(call, "auto")
    on_cuda = on_cpu or next(filter(None, (c.kernel.why_not_on_cuda for c in kernel_calls(loss, tensors))), "")
    return "" if finite else "what it gives is not finite", on_cpu, on_cuda


def lines(losses: Iterable[type[Loss]]) -> list[str]:
    """A table for the terminal, and below it the reasons, by number."""
    reasons: dict[str, int] = {}
    rows = [["", *ROUTES], *([cls.name, *_cells(support(cls), reasons)] for cls in losses)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*table, "", *(f"[{number}] {reason}" for reason, number in reasons.items())]


def _cells(found: Support, reasons: dict[str, int]) -> Iterable[str]:
    for route in ROUTES:
        types = [_SHORT[dtype] for dtype, why in found[route].items() if not why]
        why = [reason for reason in dict.fromkeys(found[route].values()) if reason]
        if types and route == "kernel, CUDA":
            why.append(NOT_RUN)
        marks = "".join(f" [{reasons.setdefault(reason, len(reasons) + 1)}]" for reason in why)
        yield ("all" if len(types) == len(DTYPES) else " ".join(types) or "–") + marks
