"""feature_distance on the device, against the definition in float64: both powers, every dtype, shapes for each layout, alignments, tokens
with NaN, without a direction, of large and small norms, weights of 0; each call twice on poisoned outputs, with the same bits."""

import dataclasses
import itertools
import math

import torch
from torch import Tensor

from benchmarks.gpu.compare import multiple
from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.soft_target import DTYPES, GUARD, POISONS, ROUNDING, placed, same_bits
from benchmarks.gpu.stage import Context
from pykd import functional, kernels

KERNEL = "feature_distance"
SHAPES = (
    (1, 1, 2), (3, 7, 70), (64, 196, 512),  # a cluster of 8
    (1000, 5, 33), (500, 1, 768),  # a warp has all of a row
    (2, 3, 70001),  # a block has a token
    (1, 4000, 64),  # a cluster of 16
)  # fmt: skip
LEADS = ((0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 0, 3))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; ``leads`` of student, teacher and gradient, as in :class:`benchmarks.gpu.soft_target.Case`."""

    power: str
    dtype: str
    shape: tuple[int, int, int]
    leads: tuple[int, int, int] = (0, 0, 0)
    odd: bool = False


def run(context: Context) -> None:
    device = device_of(context.device)
    for shape in (s for s in SHAPES if math.prod(s) <= context.largest):
        for power, dtype in itertools.product(("l1", "l2"), DTYPES):
            for leads in LEADS:
                case = Case(power, dtype, shape, leads)
                context.attempt(lambda c=case: check(context, device, c), case=str(case))  # type: ignore[misc]
            case = Case(power, dtype, shape, odd=True)
            context.attempt(lambda c=case: check(context, device, c), case=str(case))  # type: ignore[misc]
    for power, dtype in itertools.product(("l1", "l2"), DTYPES):
        case = Case(power, dtype, (3, 7, 70))
        context.check(lambda c=case: not missed(device, c), control="what is wrong is seen", case=str(case))  # type: ignore[misc]


def draw(case: Case, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(math.prod(case.shape))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    dtype = getattr(torch, case.dtype)
    student, teacher, weight = normal(*case.shape).to(dtype), normal(*case.shape).to(dtype), normal(case.shape[0])
    if case.odd:
        for number, token in enumerate(student.view(-1, case.shape[2])[:600]):
            match number % 7:
                case 1:
                    token[-1] = math.nan
                case 2:
                    token.zero_()
                case 3:
                    token *= 2.0**12 if case.dtype == "float16" else 1e30
                case 4:
                    teacher.view_as(student).view(-1, case.shape[2])[number].zero_()
                case 5:
                    weight[number // case.shape[1]] = 0.0
                case 6:
                    token[0] = math.inf
    return {
        "student": placed(student, case.leads[0]),
        "teacher": placed(teacher, case.leads[1]),
        "weight": weight,
    }


def expected(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The definition's values in float64, and their derivatives; also how large the terms of these are."""
    student = inputs["student"].double().requires_grad_()
    loss = functional.feature_l1 if case.power == "l1" else functional.feature_l2
    value = loss(student, inputs["teacher"].double(), reduction="none")
    weight = inputs["weight"].double()
    (gradient,) = torch.autograd.grad(value, student, weight)
    none = (weight == 0)[:, None, None] | (student.detach().norm(dim=-1, keepdim=True) < 2.0**-126)
    return {"value": value.detach(), "grad_student": torch.where(none, 0.0, gradient)}


def answer(case: Case, device: Device, inputs: dict[str, Tensor], poison: float) -> tuple[dict[str, Tensor], bool]:
    """The outputs of one call, and whether nothing was written beside the gradient."""
    count = math.prod(case.shape)
    room = placed(
        torch.full((count + 2 * GUARD,), poison, dtype=getattr(torch, case.dtype), device=device.name), case.leads[2]
    )
    outputs = {
        "value": torch.full((case.shape[0],), poison, device=device.name),
        "grad_student": room[GUARD : GUARD + count].view(case.shape),
    }
    device.launch(lambda stream: kernels.run(KERNEL, inputs, {"power": case.power}, outputs, cuda_stream=stream))
    device.synchronize()
    return outputs, bool((room[:GUARD] == poison).all() and (room[-GUARD:] == poison).all())


def error(case: Case, inputs: dict[str, Tensor], got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest, as a multiple of what is allowed."""
    norm = inputs["student"].double().norm(dim=-1, keepdim=True)
    size = inputs["weight"].double().abs()[:, None, None] / case.shape[1] / norm
    size = torch.where(size.isfinite(), size, 0.0)  # of the terms whose difference a gradient is
    least = 2.0**-24 if case.dtype == "float16" else 2.0**-126
    allowed = {
        "value": 2e-6 * want["value"].abs() + 1e-6,
        "grad_student": (ROUNDING[case.dtype] + 1e-6) * want["grad_student"].abs() + 8e-6 * size + least,
    }
    return max(multiple(got[name], want[name], bound) for name, bound in allowed.items())


def check(context: Context, device: Device, case: Case) -> None:
    inputs = draw(case, device.name)
    (first, intact), (second, intact_again) = (answer(case, device, inputs, poison) for poison in POISONS)
    found = error(case, inputs, first, expected(case, inputs))
    repeated = same_bits(first, second)
    context.report(
        found <= 1 and repeated and intact and intact_again,
        case=str(case), error=found, repeated=repeated, intact=intact and intact_again,
    )  # fmt: skip


def missed(device: Device, case: Case) -> list[str]:
    """The wrong answers that pass for right; and "the right one", where that does not."""
    inputs = draw(case, device.name)
    got, _ = answer(case, device, inputs, POISONS[0])
    want = expected(case, inputs)
    other = Case("l2" if case.power == "l1" else "l1", case.dtype, case.shape)
    wrong = {
        "the other power": expected(other, inputs),
        "one channel further": {**want, "grad_student": want["grad_student"].roll(1, -1)},
        "another row's weight": expected(case, {**inputs, "weight": inputs["weight"].roll(1)}),
        "another row's value": {**want, "value": want["value"].roll(1)},
    }
    found = [what for what, instead in wrong.items() if error(case, inputs, got, instead) <= 1]
    return found if error(case, inputs, got, want) <= 1 else [*found, "the right one"]
