"""mk_mmd on the device, against its formula in float64: both bandwidths, sizes around a tile and above, samples far from the origin,
samples that coincide, NaN, weights of 0; each call twice on poisoned outputs, with the same bits."""

import dataclasses
import itertools
import math

import torch
from torch import Tensor

from benchmarks.gpu.compare import multiple
from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.soft_target import GUARD, POISONS, same_bits
from benchmarks.gpu.stage import Context
from pykd import kernels

KERNEL = "mk_mmd"
SHAPES = ((1, 1), (2, 3), (64, 64), (65, 70), (129, 33), (600, 700), (2500, 96))
KINDS = ("", "far from the origin", "students coincide", "all coincide", "NaN", "weight 0")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call."""

    bandwidth: str
    shape: tuple[int, int]
    kind: str = ""


def run(context: Context) -> None:
    device = device_of(context.device)
    for bandwidth, shape in itertools.product(("joint", "per_block"), SHAPES):
        for kind in KINDS if shape[0] * shape[0] <= context.largest else ():
            case = Case(bandwidth, shape, kind)
            context.attempt(lambda c=case: check(context, device, c), case=str(case))  # type: ignore[misc]
    for bandwidth in ("joint", "per_block"):
        case = Case(bandwidth, (65, 70))
        context.check(lambda c=case: not missed(device, c), control="what is wrong is seen", case=str(case))  # type: ignore[misc]


def draw(case: Case, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(sum(case.shape))
    student, teacher = (torch.randn(*case.shape, device=device, generator=generator) for _ in range(2))
    teacher += 0.3
    if case.kind == "far from the origin":
        student, teacher = 1e-3 * student + 1000, 1e-3 * teacher + 1000
    if case.kind in ("students coincide", "all coincide"):
        student = student[:1].repeat(case.shape[0], 1)
    if case.kind == "all coincide":
        teacher = student.clone()
    if case.kind == "NaN":
        student[-1, -1] = math.nan
    weight = torch.tensor(0.0 if case.kind == "weight 0" else -1.5, device=device)
    return {"student": student, "teacher": teacher, "weight": weight}


def expected(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What mk_mmd.h says, in float64."""
    x, y = inputs["student"].double().requires_grad_(), inputs["teacher"].double()
    n = case.shape[0]

    def squares(u: Tensor, v: Tensor) -> Tensor:
        # Not by products: they lose the digits of samples far from the origin.
        return torch.cat([(rows[:, None] - v[None]).square().sum(-1) for rows in u.split(max(1, 2**24 // v.numel()))])

    xx, yy, xy = squares(x, x), squares(y, y), squares(x, y)
    sums = [block.detach().sum() for block in (xx, yy, xy)]
    pairs = max(n * n - n, 1)
    widths = [sums[0] / pairs, sums[1] / pairs, sums[2] / n**2]
    if case.bandwidth == "joint":
        widths = [(sums[0] + sums[1] + 2 * sums[2]) / (2 * n * (2 * n - 1))] * 3

    def mean(block: Tensor, width: Tensor) -> Tensor:
        if width <= 1e-20:
            return 5 + 0 * block.sum()
        return torch.stack([(-block / (2 * f * width)).exp().mean() for f in (1, 2, 4, 8, 16)]).sum()

    value = mean(xx, widths[0]) + mean(yy, widths[1]) - 2 * mean(xy, widths[2])
    (gradient,) = torch.autograd.grad(value, x)
    weight = inputs["weight"].double()
    return {"value": value.detach(), "grad_student": torch.where(weight == 0, 0.0, weight * gradient)}


def answer(case: Case, device: Device, inputs: dict[str, Tensor], poison: float) -> tuple[dict[str, Tensor], bool]:
    """The outputs of one call, and whether nothing was written beside the gradient."""
    room = torch.full((math.prod(case.shape) + 2 * GUARD,), poison, device=device.name)
    outputs = {
        "value": torch.full((), poison, device=device.name),
        "grad_student": room[GUARD:-GUARD].view(case.shape),
    }
    device.launch(
        lambda stream: kernels.run(KERNEL, inputs, {"bandwidth": case.bandwidth}, outputs, cuda_stream=stream)
    )
    device.synchronize()
    return outputs, bool((room[:GUARD] == poison).all() and (room[-GUARD:] == poison).all())


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest, as a multiple of what is allowed: of a gradient's largest entry."""
    worst = 0.0
    for name, expected_values in want.items():
        largest = float(expected_values.abs().nan_to_num(0.0).max())
        bound = 4e-6 * (max(1.0, largest) if name == "value" else largest) + 2.0**-126
        worst = max(worst, multiple(got[name], expected_values, bound))
    return worst


def check(context: Context, device: Device, case: Case) -> None:
    inputs = draw(case, device.name)
    (first, intact), (second, intact_again) = (answer(case, device, inputs, poison) for poison in POISONS)
    found = error(first, expected(case, inputs))
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
    other = Case("joint" if case.bandwidth == "per_block" else "per_block", case.shape)
    wrong = {
        "the other bandwidth": expected(other, inputs),
        "one sample further": {**want, "grad_student": want["grad_student"].roll(1, 0)},
        "another weight": expected(case, {**inputs, "weight": 1.0001 * inputs["weight"]}),
        "another value": {**want, "value": want["value"] + 1e-5},
    }
    found = [what for what, instead in wrong.items() if error(got, instead) <= 1]
    return found if error(got, want) <= 1 else [*found, "the right one"]
