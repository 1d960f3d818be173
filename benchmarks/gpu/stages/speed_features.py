"""Value + gradient of the losses of features and embeddings in torch: by their kernels, by the formula eagerly, and by ``torch.compile``.

The gradient of each is compared with that of the formula in float64 before it is timed. ``torch.compile`` comes last: it takes its time.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.stage import Context
from pykd import functional

BUDGET = 0.3
ALLOWED = 1e-4  # of a gradient's largest entry: float32, and not yet TF32


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss: of student and teacher of one shape; with as many identities, if it takes labels."""

    loss: str
    shape: tuple[int, ...]
    identities: int = 0

    def __str__(self) -> str:
        return f"{self.loss} {'x'.join(map(str, self.shape))}"


CASES = (
    Case("feature_l2", (256, 196, 768)), Case("mk_mmd", (256, 49, 512)), Case("mk_mmd", (4096, 1, 512)),
    Case("distribution_distillation", (256, 512), 64), Case("distribution_distillation", (1024, 512), 256),
    Case("feature_l2", (4, 7, 64)), Case("mk_mmd", (16, 3, 64)), Case("distribution_distillation", (16, 32), 8),
)  # fmt: skip


def run(context: Context) -> None:
    device = device_of(context.device)
    for route in ("kernel", "eager", "torch.compile"):
        for case in (c for c in CASES if math.prod(c.shape) <= context.largest):
            compare(context, device, case, route)


def draw(case: Case, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(len(case.shape))
    student, teacher = (torch.randn(*case.shape, device=device, generator=generator) for _ in range(2))
    if case.identities == 0:
        return student, teacher
    return student, teacher, torch.arange(case.shape[0], device=device) % case.identities


def call_of(case: Case, route: str, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """A step: the loss and its gradient, which is returned."""
    loss = getattr(functional, case.loss)

    def formula(*tensors: Tensor) -> Tensor:
        result: Tensor = loss(*tensors, kernels="off")
        return result

    def fused(*tensors: Tensor) -> Tensor:
        result: Tensor = loss(*tensors, kernels="on")
        return result

    if route == "torch.compile":
        torch._dynamo.reset()
    function = {"kernel": lambda: fused, "eager": lambda: formula, "torch.compile": lambda: compiled(formula)}[route]()
    student, *others = inputs
    student = student.detach().clone().requires_grad_()

    def call() -> Tensor:
        student.grad = None
        function(student, *others).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        return student.grad

    return call


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


def compare(context: Context, device: Device, case: Case, route: str) -> None:
    """One route on one case."""
    ours = route == "kernel"
    row = {"case": str(case), "route": route}
    try:
        inputs = draw(case, device.name)
        doubles = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        want = call_of(case, "eager", doubles)()
        call = call_of(case, route, inputs)
        found = float((call().double() - want).abs().max() / want.abs().max())
        right = found <= ALLOWED
        seconds = device.seconds([call], BUDGET) if right else None
    except Exception as error:
        context.report(False if ours else None, **row, error=f"{type(error).__name__}: {error}"[:500])
        return
    # A competitor that is wrong is no fault of ours: it has no time.
    context.report(right if ours else None, **row, gradient_error=found, right=right, seconds=seconds)
