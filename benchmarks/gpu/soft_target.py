"""Calls of the kernel ``soft_target`` as the tests of the emulated GPU make them (cpp/tests/kernels_soft_target_cuda_math_test.cpp):
every form, kind of label, dtype, shape and alignment, with the answer in float64.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.compare import multiple
from pykd import kernels

FORMS = ("cross_entropy", "kl", "reverse_kl", "symmetric_kl", "jsd")
HARD = ("", "labels", "label_probs")
KERNEL = "soft_target"
DTYPES = ("float32", "float16", "bfloat16")
GUARD = 16  # elements on either side of an output, which stay as they are
POISONS = (77.0, -5.0)
# |got - want| <= absolute + relative |want|: arithmetic in float32 with the hardware's exp2 and log2, on sums of up to a million
# classes; and a gradient is rounded once, to its dtype.
ABSOLUTE, RELATIVE = 4e-6, 4e-6
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        form: of the soft part; "" without a teacher.
        hard: "", ``"labels"`` or ``"label_probs"``.
        leads: of student, teacher, label_probs and gradient: elements between a 16-byte boundary and the first.
        odd_rows: whether rows hold NaN, infinities, masked classes, weights of 0 and labels that are none.
    """

    form: str
    hard: str
    dtype: str
    batch: int
    classes: int
    leads: tuple[int, int, int, int] = (0, 0, 0, 0)
    odd_rows: bool = False
    temperature: float = 2.0
    soften_student: bool = True
    beta: float = 0.3
    seed: int = 0

    def __str__(self) -> str:
        parts = [self.form or "no teacher", self.hard or "no labels", self.dtype, f"{self.batch}x{self.classes}"]
        if any(self.leads):
            parts.append("leads " + ",".join(map(str, self.leads)))
        if self.odd_rows:
            parts.append("odd rows")
        if not self.soften_student:
            parts.append("student not softened")
        return " ".join(parts)


def kinds() -> Iterator[tuple[str, str]]:
    """Every form with every kind of label, and the labels alone."""
    for form in ("", *FORMS):
        for hard in HARD:
            if form or hard:
                yield form, hard


# ---- Drawing ------------------------------------------------------------------------------------


def placed(values: Tensor, lead: int) -> Tensor:
    """The same values in memory that begins `lead` elements after a 16-byte boundary."""
    room = torch.empty(values.numel() + 32, dtype=values.dtype, device=values.device)
    first = (-room.data_ptr() % 16) // values.element_size() + lead
    place = room[first : first + values.numel()].view(values.shape)
    place.copy_(values)
    return place


def draw(case: Case, device: str, generator_device: str | None = None) -> dict[str, Tensor]:
    """The inputs. ``generator_device="cpu"`` draws on the host, without a kernel of torch's on the device."""
    source = generator_device or device
    generator = torch.Generator(source).manual_seed(1000 * case.seed + case.batch + case.classes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=source, generator=generator)

    def there(values: Tensor, lead: int = 0) -> Tensor:
        return placed(values, lead) if source == device else placed(values, lead).to(device)

    dtype = getattr(torch, case.dtype)
    shape = (case.batch, case.classes)
    student, teacher = (3 * normal(*shape)).to(dtype), (3 * normal(*shape)).to(dtype)
    soft_weight, hard_weight = normal(case.batch), normal(case.batch)
    labels = torch.randint(case.classes, (case.batch,), device=source, generator=generator)
    if case.odd_rows:
        make_odd(student, teacher, soft_weight, hard_weight, labels, case.classes)
    inputs = {"student": there(student, case.leads[0])}
    if case.form:
        inputs |= {"teacher": there(teacher, case.leads[1]), "soft_weight": there(soft_weight)}
        inputs["temperature"] = torch.tensor(case.temperature)
    if case.hard:
        inputs["hard_weight"] = there(hard_weight)
    if case.hard == "labels":
        inputs["labels"] = there(labels)
    if case.hard == "label_probs":
        inputs["label_probs"] = there((normal(*shape).abs() * (normal(*shape) > 0)).to(dtype), case.leads[2])
    return inputs


def make_odd(
    student: Tensor, teacher: Tensor, soft_weight: Tensor, hard_weight: Tensor, labels: Tensor, classes: int
) -> None:
    """Rows that a kernel may stumble over, ten kinds of them in turn."""
    last, inf = classes - 1, math.inf
    for row in range(student.shape[0]):
        match row % 10:
            case 1:
                student[row, last // 2] = math.nan
            case 2:
                teacher[row, last] = math.nan
            case 3:
                student[row, 0] = inf
            case 4:  # masked out in both, but not all of it
                student[row, : classes // 2] = teacher[row, : classes // 2] = -inf
                labels[row] = last
            case 5:
                teacher[row, 0] = -inf
            case 6:
                student[row, last] = -inf
            case 7:  # no distribution
                student[row] = -inf
            case 8:  # nothing counts, whatever it is
                student[row, last // 3] = math.nan
                soft_weight[row] = hard_weight[row] = 0
                labels[row] = -100
            case 9:
                labels[row] = classes
                soft_weight[row] = 0


# ---- Running ------------------------------------------------------------------------------------


class Outputs:
    """Memory for the outputs, poisoned, with guards around it."""

    def __init__(self, case: Case, device: str, poison: float) -> None:
        self.room: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.poison = poison
        if case.form:
            self._make("soft", (case.batch,), torch.float32, device, 0)
        if case.hard:
            self._make("hard", (case.batch,), torch.float32, device, 0)
        self._make("grad_student", (case.batch, case.classes), getattr(torch, case.dtype), device, case.leads[3])

    def _make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, lead: int) -> None:
        count = math.prod(shape)
        whole = placed(torch.full((count + 2 * GUARD,), self.poison, dtype=dtype, device=device), lead)
        self.room[name] = whole
        # GUARD elements are whole 16-byte words, so that the lead stays what it is.
        self.tensors[name] = whole[GUARD : GUARD + count].view(shape)

    def intact(self) -> bool:
        """Nothing was written beside them."""
        return all(
            bool((whole[:GUARD] == self.poison).all() and (whole[-GUARD:] == self.poison).all())
            for whole in self.room.values()
        )


def attributes(case: Case) -> dict[str, Any]:
    if not case.form:
        return {}
    return {"form": case.form, "soften_student": float(case.soften_student), "beta": case.beta}


def launch(case: Case, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], stream: int | None) -> None:
    """The call itself."""
    kernels.run(KERNEL, dict(inputs), attributes(case), dict(outputs), cuda_stream=stream)


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of outputs are equal bit by bit."""
    bits = {4: torch.int32, 2: torch.int16}
    return all(
        torch.equal(x.contiguous().view(bits[x.element_size()]), b[name].contiguous().view(bits[x.element_size()]))
        for name, x in a.items()
    )


# ---- The answer in float64 ----------------------------------------------------------------------


def times(weight: Tensor, x: Tensor) -> Tensor:
    """weight · x, and 0 where the weight is 0, whatever x is."""
    return torch.where(weight == 0, torch.zeros_like(x), weight * x)


def expected(case: Case, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What soft_target.h says, in float64."""
    student = inputs["student"].double()
    gradient = torch.zeros_like(student)
    found: dict[str, Tensor] = {}
    if case.form:
        slope = 1 / case.temperature if case.soften_student else 1.0
        log_q = (student * slope).log_softmax(-1)
        log_p = (inputs["teacher"].double() / case.temperature).log_softmax(-1)
        value, step = _soft(case, log_p, log_q)
        found["soft"] = value
        gradient = gradient + times(inputs["soft_weight"].double()[:, None].expand_as(step), slope * step)
    if case.hard:
        log_q = student.log_softmax(-1)
        if case.hard == "labels":
            labels = inputs["labels"]
            known = (labels >= 0) & (labels < case.classes)
            target = torch.zeros_like(student).scatter_(1, labels.clamp(0, case.classes - 1)[:, None], 1.0)
            target = torch.where(known[:, None], target, math.nan)
        else:
            target = inputs["label_probs"].double()
        found["hard"] = -times(target, log_q).sum(-1)
        step = log_q.exp() * target.sum(-1, keepdim=True) - target
        gradient = gradient + times(inputs["hard_weight"].double()[:, None].expand_as(step), step)
    found["grad_student"] = gradient
    return found


def _soft(case: Case, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The value of every row, and its derivative with respect to the scaled student's logits."""
    p, q = log_p.exp(), log_q.exp()
    if case.form == "cross_entropy":
        return -times(p, log_q).sum(-1), q - p
    forward = times(p, log_p - log_q).sum(-1)
    if case.form == "kl":
        return forward, q - p
    backward = times(q, log_q - log_p).sum(-1)
    reverse = times(q, log_q - log_p - backward[:, None])
    if case.form == "reverse_kl":
        return backward, reverse
    if case.form == "symmetric_kl":
        return (forward + backward) / 2, (q - p + reverse) / 2
    share = 1 - case.beta
    log_m = (case.beta * p + share * q).log()
    from_m = times(q, log_q - log_m).sum(-1)
    value = case.beta * times(p, log_p - log_m).sum(-1) + share * from_m
    return value, share * times(q, log_q - log_m - from_m[:, None])


# ---- Comparing ----------------------------------------------------------------------------------


def worst(case: Case, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """By output: the largest error as a multiple of what is allowed; infinite where a NaN or an infinity is missing or new."""
    found = {}
    for name, expected_values in want.items():
        relative = RELATIVE + (ROUNDING[case.dtype] if name.startswith("grad_") else 0.0)
        found[name] = multiple(got[name], expected_values, ABSOLUTE + relative * expected_values.abs())
    return found


def by_rows(inputs: Mapping[str, Tensor], elements: int = 1 << 24) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The inputs, some rows at a time: float64 of all of them may not fit in memory."""
    batch, classes = inputs["student"].shape
    rows = max(1, elements // classes)
    for first in range(0, batch, rows):
        some = slice(first, min(first + rows, batch))
        yield some, {name: t if t.dim() == 0 else t[some] for name, t in inputs.items()}


def errors(case: Case, inputs: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> dict[str, float]:
    """worst() against expected()."""
    found: dict[str, float] = {}
    for rows, some in by_rows(inputs):
        for name, error in worst(case, {name: t[rows] for name, t in got.items()}, expected(case, some)).items():
            found[name] = max(error, found.get(name, 0.0))
    return found


def right(case: Case, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> bool:
    return all(error <= 1.0 for error in worst(case, got, want).values())
