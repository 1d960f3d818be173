"""The controls of the parity check: what is wrong on purpose has to be seen as wrong, and float64 is what the losses say it is."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.gpu import soft_target
from benchmarks.gpu.device import Device
from benchmarks.gpu.soft_target import Case, Outputs


@dataclasses.dataclass
class Answer:
    """What two calls of one case left, the outputs poisoned differently."""

    case: Case
    first: Outputs
    second: Outputs

    def judge(self, want: dict[str, Tensor]) -> dict[str, Any]:
        """``right``: close to float64, the same bits both times, everything written and nothing beside it."""
        error = max(soft_target.worst(self.case, self.first.tensors, want).values())
        repeated = soft_target.same_bits(self.first.tensors, self.second.tensors)
        intact = self.first.intact() and self.second.intact()
        return {"right": error <= 1 and repeated and intact, "error": error, "repeated": repeated, "intact": intact}


def answer(device: Device, case: Case, inputs: dict[str, Tensor]) -> Answer:
    """Calls the kernel twice."""
    both = [Outputs(case, device.name, poison) for poison in soft_target.POISONS]
    for outputs in both:
        device.launch(lambda stream, tensors=outputs.tensors: soft_target.launch(case, inputs, tensors, stream))  # type: ignore[misc]
    device.synchronize()
    return Answer(case, *both)


# ---- Answers that are wrong ---------------------------------------------------------------------


def leave_an_element(spoiled: Answer) -> None:
    for outputs in (spoiled.first, spoiled.second):
        outputs.tensors["grad_student"][-1, -1] = outputs.poison


def write_beside(spoiled: Answer) -> None:
    spoiled.first.room["grad_student"][-soft_target.GUARD] = 1.0


def change_the_second_time(spoiled: Answer) -> None:
    spoiled.second.tensors["grad_student"][0, 0] += 1.0


def put_nan(spoiled: Answer) -> None:
    for outputs in (spoiled.first, spoiled.second):
        outputs.tensors["grad_student"][3, 7] = float("nan")


def mistakes(case: Case, inputs: dict[str, Tensor], want: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What other answers would have been expected, had one thing been different: a name for each, and the answer."""
    if case.form:
        another_form = "kl" if case.form == "reverse_kl" else "reverse_kl"
        for what, changed in (("temperature", 1.01 * case.temperature), ("form", another_form)):
            yield what, soft_target.expected(dataclasses.replace(case, **{what: changed}), inputs)
    if case.form == "jsd":
        yield "beta", soft_target.expected(dataclasses.replace(case, beta=case.beta + 0.05), inputs)
    yield "gradient one class further", {**want, "grad_student": want["grad_student"].roll(1, 1)}
    for weight in {"soft_weight", "hard_weight"} & inputs.keys():
        yield f"another row's {weight}", soft_target.expected(case, {**inputs, weight: inputs[weight].roll(1)})
    for value in {"soft", "hard"} & want.keys():
        yield f"another row's {value}", {**want, value: want[value].roll(1)}
    # The least that the bound has to see: one element, two bounds away.
    gradient = want["grad_student"].clone()
    largest = int(gradient.abs().argmax())
    relative = soft_target.RELATIVE + soft_target.ROUNDING[case.dtype]
    gradient.view(-1)[largest] += 2.1 * (soft_target.ABSOLUTE + relative * float(gradient.view(-1)[largest].abs()))
    yield "one element, twice what is allowed", {**want, "grad_student": gradient}


def missed(device: Device, case: Case) -> list[str]:
    """The wrong answers that pass for right; and ``"the right one"``, where that does not."""
    inputs = soft_target.draw(case, device.name)
    want = soft_target.expected(case, inputs)
    unseen = []
    good = answer(device, case, inputs)
    if not good.judge(want)["right"]:
        unseen.append("the right one")
    for what, other in mistakes(case, inputs, want):
        if good.judge(other)["right"]:
            unseen.append(what)
    for spoil in (leave_an_element, write_beside, change_the_second_time, put_nan):
        spoiled = answer(device, case, inputs)
        spoil(spoiled)
        if spoiled.judge(want)["right"]:
            unseen.append(spoil.__name__)
    return unseen


# ---- The reference of the references ------------------------------------------------------------


def agrees_with_numpy(case: Case) -> bool:
    """Whether float64 on the device's side is what the losses' references in NumPy say, and their differences its gradient."""
    from pykd import HardTarget, SoftTarget

    inputs = soft_target.draw(case, "cpu")
    arrays = {name: (t.double() if t.is_floating_point() else t).numpy() for name, t in inputs.items()}

    def values(student: Any) -> dict[str, Any]:
        found = {}
        if case.form:
            found["soft"] = SoftTarget(
                temperature=case.temperature, soften_student=case.soften_student, form=case.form, beta=case.beta,
                reduction="none",
            ).reference(student, arrays["teacher"])  # fmt: skip
        if case.hard:
            found["hard"] = HardTarget(reduction="none").reference(student, arrays[case.hard])
        return found

    want = {name: tensor.numpy() for name, tensor in soft_target.expected(case, inputs).items()}
    gradient, step = np.zeros(arrays["student"].shape), 1e-5
    for column in range(case.classes):
        above, below = arrays["student"].copy(), arrays["student"].copy()
        above[:, column] += step
        below[:, column] -= step
        up, down = values(above), values(below)
        for name in up:
            gradient[:, column] += (
                arrays[f"{name}_weight"] * (np.asarray(up[name]) - np.asarray(down[name])) / (2 * step)
            )
    close = all(
        np.allclose(want[name], value, rtol=1e-9, atol=1e-9) for name, value in values(arrays["student"]).items()
    )
    return bool(close and np.allclose(want["grad_student"], gradient, rtol=1e-5, atol=1e-7))


def seen_apart(device: Device) -> bool:
    """Whether work on one stream is told from work on another: what a kernel on the wrong one reads is not there yet."""
    case = Case("kl", "", "float32", 8, 1000)
    inputs = soft_target.draw(case, device.name)
    late = inputs["student"].clone()
    inputs["student"].fill_(0.0)
    outputs = Outputs(case, device.name, 0.0)
    device.synchronize()
    right, wrong = device.stream(), device.stream()
    device.busy(right)
    device.launch(lambda _: inputs["student"].copy_(late), right)
    device.launch(lambda stream: soft_target.launch(case, inputs, outputs.tensors, stream), wrong)
    device.finish(wrong)
    early = {name: tensor.clone() for name, tensor in outputs.tensors.items()}
    device.synchronize()
    return not soft_target.right(case, early, soft_target.expected(case, inputs))
