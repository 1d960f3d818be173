"""distribution_distillation on the device, against its formula in float64: both ways to take negatives, sizes around a tile and above,
batches without positives or negatives, samples that coincide, rows that are no unit vectors, weights of 0; each call twice on poisoned
outputs, with the same bits."""

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
from pykd.losses.relations.distribution_distillation import distribution_distillation_terms

KERNEL = "distribution_distillation"
SHAPES = (  # samples, channels, identities
    (1, 3, 1), (2, 1, 2), (2, 3, 1),
    (64, 64, 9), (65, 70, 1), (66, 20, 66), (129, 33, 20),
    (600, 300, 60), (1500, 96, 300),
)  # fmt: skip
KINDS = ("", "coincide", "NaN", "too long", "weights 0", "one weight")
SETTINGS = ((65, 0.1), (33, 0.01), (1000, 0.3))  # bins and width
WEIGHTS = ("positive_weight", "negative_weight", "order_weight")
TERMS = ("positive", "negative", "order")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call."""

    negatives: str
    shape: tuple[int, int, int]
    kind: str = ""
    bins: int = 65
    width: float = 0.1

    @property
    def attributes(self) -> dict[str, str | float]:
        return {"bins": self.bins, "width": self.width, "negatives": self.negatives}


def run(context: Context) -> None:
    device = device_of(context.device)
    for negatives, shape in itertools.product(("hardest", "all"), SHAPES):
        if shape[0] ** 2 > context.largest:
            continue
        cases = [Case(negatives, shape, kind) for kind in KINDS]
        cases += [Case(negatives, shape, "", bins, width) for bins, width in SETTINGS[1:] if shape[0] <= 600]
        for case in cases:
            context.attempt(lambda c=case: check(context, device, c), case=str(case))  # type: ignore[misc]
    for negatives in ("hardest", "all"):
        case = Case(negatives, (64, 64, 9))
        context.check(lambda c=case: not missed(device, c), control="what is wrong is seen", case=str(case))  # type: ignore[misc]


def draw(case: Case, device: str) -> dict[str, Tensor]:
    """Embeddings at most 1 long, multiples of 2⁻¹⁰: products are exact in float32, so samples that are equally similar are so there, too."""
    n, d, identities = case.shape
    generator = torch.Generator(device).manual_seed(sum(case.shape))
    labels = torch.arange(n, device=device) * 7 % identities * 10**12 - 3
    centres = torch.randn(n, d, device=device, generator=generator)[(labels + 3) // 10**12]

    def embeddings(noise: float) -> Tensor:
        rows = centres + noise * torch.randn(n, d, device=device, generator=generator)
        if case.kind == "coincide":
            rows = rows[:1].repeat(n, 1)
        return (0.995 * 2**10 * torch.nn.functional.normalize(rows, dim=1)).round() * 2.0**-10

    student, teacher = embeddings(1.0), embeddings(0.5)
    if case.kind in ("NaN", "too long"):
        (student if n % 2 else teacher)[-1, -1] = math.nan if case.kind == "NaN" else 1.01
    numbers = {"weights 0": (0.0, 0.0, 0.0), "one weight": (0.0, -1.5, 0.0)}.get(case.kind, (0.7, 0.3, -0.4))
    weights = {name: torch.tensor(x, device=device) for name, x in zip(WEIGHTS, numbers, strict=True)}
    return {"student": student, "teacher": teacher, "labels": labels, **weights}


def expected(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The definition in float64, and its derivative."""
    student = inputs["student"].double().requires_grad_()
    teacher, labels = inputs["teacher"].double(), inputs["labels"]
    terms = distribution_distillation_terms(student, teacher, labels, case.bins, case.width, case.negatives)
    weights = [inputs[name].double() for name in WEIGHTS]
    total = sum((w * term for w, term in zip(weights, terms, strict=True)), 0 * student.sum())
    (gradient,) = torch.autograd.grad(total, student)
    same = labels[:, None] == labels
    there = (bool(same.sum() > len(labels)), not bool(same.all()))  # positive pairs, negative ones
    there = (*there, any(there))  # type: ignore[assignment]
    values = {name: term.detach() for name, term in zip(TERMS, terms, strict=True)}
    if case.kind in ("NaN", "too long"):  # what distribution_distillation.h says
        values = {
            name: torch.full_like(values[name], math.nan if any_ else 0.0)
            for name, any_ in zip(TERMS, there, strict=True)
        }
        gradient = torch.full_like(gradient, math.nan if there[-1] else 0.0)
    return {**values, "grad_student": gradient}


def answer(case: Case, device: Device, inputs: dict[str, Tensor], poison: float) -> tuple[dict[str, Tensor], bool]:
    """The outputs of one call, and whether nothing was written beside the gradient."""
    shape = case.shape[:2]
    room = torch.full((math.prod(shape) + 2 * GUARD,), poison, device=device.name)
    outputs = {name: torch.full((), poison, device=device.name) for name in TERMS}
    outputs["grad_student"] = room[GUARD:-GUARD].view(shape)
    device.launch(lambda stream: kernels.run(KERNEL, inputs, case.attributes, outputs, cuda_stream=stream))
    device.synchronize()
    return outputs, bool((room[:GUARD] == poison).all() and (room[-GUARD:] == poison).all())


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest, as a multiple of what is allowed: of a value, or of a gradient's largest entry."""
    worst = 0.0
    for name, expected_values in want.items():
        largest = float(expected_values.abs().nan_to_num(0.0).max())
        bound = 5e-6 * largest + 1e-7 if name == "grad_student" else 2e-6 * (1.0 + largest)
        worst = max(worst, multiple(got[name], expected_values, bound))
    return worst


def check(context: Context, device: Device, case: Case) -> None:
    inputs = draw(case, device.name)
    (first, intact), (second, intact_again) = (answer(case, device, inputs, poison) for poison in POISONS)
    found = error(first, expected(case, inputs))
    repeated = same_bits(first, second)
    exact = case.kind != "weights 0" or not bool(first["grad_student"].any())
    context.report(
        found <= 1 and repeated and exact and intact and intact_again,
        case=str(case), error=found, repeated=repeated, exact=exact, intact=intact and intact_again,
    )  # fmt: skip


def missed(device: Device, case: Case) -> list[str]:
    """The wrong answers that pass for right; and "the right one", where that does not."""
    inputs = draw(case, device.name)
    got, _ = answer(case, device, inputs, POISONS[0])
    want = expected(case, inputs)
    other = dataclasses.replace(case, negatives="all" if case.negatives == "hardest" else "hardest")
    labels = inputs["labels"].clone()
    labels[0] = labels[1]
    wrong = {
        "the other negatives": expected(other, inputs),
        "another width": expected(dataclasses.replace(case, width=1.01 * case.width), inputs),
        "another label": expected(case, {**inputs, "labels": labels}),
        "one sample further": {**want, "grad_student": want["grad_student"].roll(1, 0)},
    }
    wrong |= {f"another {name}": expected(case, {**inputs, name: 1.1 * inputs[name]}) for name in WEIGHTS}
    wrong |= {f"another value, {name}": {**want, name: want[name] + 1e-5 * (1 + want[name].abs())} for name in TERMS}
    found = [what for what, instead in wrong.items() if error(got, instead) <= 1]
    return found if error(got, want) <= 1 else [*found, "the right one"]
