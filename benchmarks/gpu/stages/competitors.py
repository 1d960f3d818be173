"""Value + gradient of a KL and a JSD by the kernel, PyTorch eager, Liger-Kernel and ``torch.compile``, on the same tensors.

The gradient of each is compared with float64 before it is timed. ``torch.compile`` comes last: it takes its time to compile.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import soft_target
from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.soft_target import Case, Outputs
from benchmarks.gpu.stage import Context

SHAPES = ((4096, 32000), (4096, 128256), (64, 100))
BUDGET = 0.5
Call = Callable[[], Tensor]  # returns the gradient


def run(context: Context) -> None:
    device = device_of(context.device)
    for fast in (True, False):
        for shape in (s for s in SHAPES if s[0] * s[1] <= context.largest):
            for form in ("kl", "jsd"):
                case = Case(form, "", "bfloat16", *shape, temperature=1.0, beta=0.5)
                for name, call in routes(context, device, case, fast):
                    compare(context, device, case, name, call)


def routes(context: Context, device: Device, case: Case, fast: bool) -> Iterator[tuple[str, Call]]:
    inputs = soft_target.draw(case, device.name)
    inputs["soft_weight"].fill_(1 / case.batch)
    formula = kl if case.form == "kl" else jsd

    def by_autograd(function: Callable[[Tensor, Tensor], Tensor]) -> Call:
        student = inputs["student"].detach().clone().requires_grad_()

        def call() -> Tensor:
            student.grad = None
            function(student, inputs["teacher"]).backward()  # type: ignore[no-untyped-call]
            assert student.grad is not None
            return student.grad

        return call

    if not fast:
        torch._dynamo.reset()
        yield "torch.compile", by_autograd(torch.compile(formula, dynamic=False))
        return
    outputs = Outputs(case, device.name, 0.0)

    def kernel() -> Tensor:
        device.launch(lambda stream: soft_target.launch(case, inputs, outputs.tensors, stream))
        return outputs.tensors["grad_student"]

    yield "kernel", kernel

    def fused(student: Tensor, teacher: Tensor) -> Tensor:
        import pykd

        loss: Tensor = pykd.functional.soft_target(
            student, teacher, temperature=1.0, form=case.form, beta=case.beta, kernels="on"
        )
        return loss

    yield "torch, backward()", by_autograd(fused)
    yield "eager", by_autograd(formula)
    try:
        liger = liger_loss(case)
    except ImportError as error:
        context.report(None, case=str(case), route="Liger-Kernel", not_run=str(error))
        return
    if device.name == "cuda":  # its kernels are Triton's
        yield "Liger-Kernel", by_autograd(liger)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """As a user of PyTorch writes it, computed in float32."""
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    to_m = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    return (to_m + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)) / 2


def liger_loss(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's kernels take log-probabilities: torch computes them, as its users do."""
    from liger_kernel.ops.jsd import LigerJSDFunction
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
        if case.form == "kl":
            return LigerKLDivLossFunction.apply(log_q, log_p, "batchmean", True)  # type: ignore[no-any-return]
        return LigerJSDFunction.apply(log_q, log_p, None, 0.5)  # type: ignore[no-any-return]

    return loss


def compare(context: Context, device: Device, case: Case, name: str, call: Call) -> None:
    """One route on one case."""
    inputs = soft_target.draw(case, device.name)
    inputs["soft_weight"].fill_(1 / case.batch)
    ours = name in ("kernel", "torch, backward()")
    row = {"case": str(case), "route": name}
    try:
        gradient = call()
        device.synchronize()
        off, largest = 0.0, 0.0
        for rows, some in soft_target.by_rows(inputs):
            want = soft_target.expected(case, some)["grad_student"]
            off = max(off, float((gradient[rows].double() - want).abs().max()))
            largest = max(largest, float(want.abs().max()))
        found = off / largest
        right = found <= 2**-7  # a rounding to bfloat16, on either side
        seconds = device.seconds([call], BUDGET) if right else None
    except Exception as error:
        context.report(False if ours else None, **row, error=f"{type(error).__name__}: {error}"[:500])
        return
    # A competitor that is wrong is no fault of ours: it has no time.
    context.report(right if ours else None, **row, gradient_error=found, right=right, seconds=seconds)
