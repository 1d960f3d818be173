"""The kernel inside torch: autograd, a CUDA graph of a training step, another stream, what a call costs the device; and the
TorchScript folders."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pykd
from benchmarks.gpu import folders, soft_target
from benchmarks.gpu.device import Device, copies_are_counted, count_copies, device_of, events
from benchmarks.gpu.soft_target import Case
from benchmarks.gpu.stage import Context, NotRun

SHAPE = (8, 1001)


def run(context: Context) -> None:
    device = device_of(context.device)
    counted = copies_are_counted(device)
    context.report(counted, control="copies to and from the host are counted")
    for form in soft_target.FORMS:
        for dtype in soft_target.DTYPES:
            case = Case(form, "", dtype, *SHAPE)
            context.check(lambda c=case: autograd(device, c), check="torch, backward()", case=str(case))
    case = Case("kl", "", "bfloat16", *SHAPE)
    context.attempt(lambda: costs(context, device, case, counted), check="a step copies nothing to the host")
    context.check(lambda: on_another_stream(device, case), check="torch on another stream", case=str(case))
    if device.name == "cuda":
        context.check(lambda: in_a_graph(case), check="torch in a CUDA graph", case=str(case))
    try:
        torchscript(context, device, counted)
    except NotRun as reason:
        context.report(False, check="TorchScript folders", error=str(reason))


def step_of(case: Case, device: Device) -> tuple[Callable[[], Tensor], Tensor, dict[str, Tensor]]:
    """(a training step, the student's logits, the inputs): the loss with backward(), a mean over the rows."""
    inputs = soft_target.draw(case, device.name)
    inputs["soft_weight"] = torch.full_like(inputs["soft_weight"], 1 / case.batch)
    student = inputs["student"].detach().requires_grad_()

    def step() -> Tensor:
        student.grad = None
        loss: Tensor = pykd.functional.soft_target(
            student, inputs["teacher"], temperature=case.temperature, form=case.form, beta=case.beta, kernels="on"
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return step, student, inputs


def is_right(case: Case, loss: Tensor, gradient: Tensor, inputs: dict[str, Tensor]) -> bool:
    want = soft_target.expected(case, inputs)
    close = abs(float(loss) - float(want["soft"].mean())) <= 1e-5 * max(1.0, abs(float(want["soft"].mean())))
    return close and soft_target.right(case, {"grad_student": gradient}, {"grad_student": want["grad_student"]})


def autograd(device: Device, case: Case) -> bool:
    step, student, inputs = step_of(case, device)
    loss = step()
    assert student.grad is not None
    return is_right(case, loss.detach(), student.grad, inputs)


def costs(context: Context, device: Device, case: Case, counted: bool) -> None:
    """Kernels, copies and allocations of one step, after a warm-up."""
    step, _, _ = step_of(case, device)
    for _ in range(3):
        step()
    done = events(device, step)
    found: dict[str, object] = {
        "copies": count_copies(device, step),
        "launches": len(done),
        "names": sorted(set(done))[:20],
    }
    if device.name == "cuda":
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        step()
        found["allocations"] = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    on_device = device.name == "cuda"
    context.report(
        counted and (found["copies"] == 0 or not on_device), check="a step copies nothing to the host", **found
    )


def on_another_stream(device: Device, case: Case) -> bool:
    """The student comes late on a stream; a step there waits for it, and for nothing else."""
    step, student, inputs = step_of(case, device)
    late = inputs["student"].detach().clone()
    with torch.no_grad():
        student.zero_()
    device.synchronize()
    stream = device.stream()
    losses: list[Tensor] = []

    def arrive(_: int | None) -> None:
        with torch.no_grad():
            student.copy_(late)

    device.busy(stream)
    device.launch(arrive, stream)
    device.launch(lambda _: losses.append(step().detach()), stream)
    device.synchronize()
    assert student.grad is not None
    return is_right(case, losses[0], student.grad, {**inputs, "student": late})


def in_a_graph(case: Case) -> bool:
    """A step as a CUDA graph, replayed on another student."""
    device = device_of("cuda")
    step, student, inputs = step_of(case, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    student.grad = None
    with torch.cuda.graph(graph):
        loss = step()
    for seed in (1, 2):
        with torch.no_grad():
            student.copy_(inputs["student"].roll(seed, 0))
        graph.replay()
        torch.cuda.synchronize()
        assert student.grad is not None
        if not is_right(case, loss.detach(), student.grad, {**inputs, "student": student.detach()}):
            return False
    return True


def torchscript(context: Context, device: Device, counted: bool) -> None:
    """Every folder: the numbers of each call, all of it on the device; and no copy in a call with tensors that lie there."""
    for folder in folders.folders(context.pack):
        context.attempt(
            lambda f=folder: run_folder(context, device, f, counted), check="torchscript", folder=folder.name
        )  # type: ignore[misc]


def run_folder(context: Context, device: Device, folder: Path, counted: bool) -> None:
    loss = pykd.load(folder, engine="torchscript", device=device.name)
    worst, copies, placed = 0.0, 0, True
    there: dict[str, Tensor] = {}
    for inputs, parameters, want, allowed in folders.calls(folder):
        there = {name: tensor.to(device.name) for name, tensor in inputs.items()}
        got = loss.value_and_gradient(**there, **parameters)
        worst = max(worst, folders.error(got, want, allowed))
        placed &= all(tensor.device.type == device.name for tensor in got.values())
    if device.name == "cuda":
        copies = count_copies(device, lambda: loss.value_and_gradient(**there))
    context.report(
        worst <= 1 and placed and counted and copies == 0,
        check="torchscript",
        folder=folder.name,
        error=worst,
        copies=copies,
    )
