"""What meets a gradient before it is rounded: the upstream gradient, by every route that has backward().

float16 gradients of a large batch underflow; the factor of a scaled loss (GradScaler) keeps them. The judge is the
formula's autograd, for every loss that has a kernel. C++ without Python is in ``cpp/tests/torch_hpp_test.cpp`` and
``cpp/tests/torch_ops_test.cpp``.
"""

import pytest
import torch
from torch import Tensor

import pykd
from pykd import torch_kernels
from tests.test_kernels import with_kernel

SCALE = 65536.0
NAMES = "student teacher temperature soft_weight"


FUSABLE = pytest.mark.parametrize("fusable", with_kernel(), ids=str)


def leaves(subject, tensors):
    specs = subject.graph().signature.inputs
    return {name: t.clone().requires_grad_(specs[name].grad) for name, t in tensors.items()}


def underflowing(subject, dtype=torch.float16):
    """Tensors, and a factor under which the unscaled gradient would be nothing but zeros."""
    tensors = subject.draw({"batch": 9, "classes": 17, "tokens": 3, "channels": 33}, seed=1, dtype=dtype)
    exact = leaves(subject, {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()})
    subject.graph()(**exact)["loss"].backward()
    largest = max(t.grad.abs().max().item() for t in exact.values() if t.requires_grad)
    factor = 2.0**-26 / largest  # half of the smallest float16
    return tensors, factor


def compare(got, want, dtype):
    """As close to the formula's own gradient as two roundings of the same number: of a subnormal one, in float16."""
    for name, leaf in want.items():
        if leaf.requires_grad:
            largest = leaf.grad.double().abs().max()
            assert largest > 0
            error = (got[name].grad.double() - leaf.grad.double()).abs().max()
            assert got[name].grad.dtype == leaf.dtype
            spacing = max(torch.finfo(dtype).eps * largest, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
            assert error <= 1.5 * spacing, f"{name}: {error} of {largest}"


@FUSABLE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_scaled_loss_has_the_formulas_gradient(fusable, dtype):
    subject = fusable
    tensors, factor = underflowing(subject, dtype)
    results = []
    for kernels in ("off", "on"):
        given = leaves(subject, tensors)
        run = (
            pykd.Composition.forward
            if isinstance(subject.composition, pykd.DistillationLoss)
            else type(subject.composition).__call__
        )
        loss = run(subject.composition, **given, kernels=kernels)["loss"]
        (loss * factor * SCALE).backward()
        results.append(given)
    compare(results[1], results[0], dtype)


def test_a_scaled_function_has_the_formulas_gradient(loss_subject):
    subject = loss_subject
    loss = subject.composition.named_terms[0].parts[0].loss
    if not loss.covered_by_kernel(subject.graph().signature.inputs):
        pytest.skip("no kernel computes it")
    function = getattr(pykd.functional, loss.name)
    tensors, factor = underflowing(subject)
    settings = {
        name: value for name, value in loss.settings().items() if not (loss.couples_batch and name == "reduction")
    }
    results = []
    for kernels in ("off", "on"):
        given = leaves(subject, tensors)
        (function(**given, **settings, kernels=kernels) * factor * SCALE).backward()
        results.append(given)
    compare(results[1], results[0], torch.float16)
    students = [name for name, t in given.items() if t.requires_grad]
    given = leaves(subject, tensors)
    many = torch.tensor([1.0, -2.0]) * factor * SCALE
    gradients = torch.autograd.grad(
        function(**given, **settings, kernels="on"), [given[name] for name in students], many, is_grads_batched=True
    )
    for name, (once, twice) in zip(students, gradients, strict=True):
        want = results[0][name].grad
        torch.testing.assert_close(once, want, rtol=2e-3, atol=1.5e-3 * want.abs().max().item())
        torch.testing.assert_close(twice, -2 * want, rtol=2e-3, atol=3e-3 * want.abs().max().item())


class Scripted(torch.nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.pykd.loss(
            "soft_target", [student, teacher, temperature, weight], "student teacher temperature soft_weight", "form=kl"
        )


def by_function(*tensors):
    return torch_kernels.fused_loss("soft_target", dict(zip(NAMES.split(), tensors, strict=True)), {"form": "kl"})


def compiled(loss):
    return torch.compile(loss, backend="aot_eager", fullgraph=True)


WAYS = {
    "operator": lambda: Scripted(),
    "scripted": lambda: torch.jit.script(Scripted()),
    "compiled operator": lambda: compiled(Scripted()),
    "function": lambda: by_function,
    "compiled function": lambda: compiled(by_function),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", [SCALE, -3.0 * SCALE, 2.0**-36])
def test_a_scaled_operator_has_the_formulas_gradient(way, factor):
    torch_kernels.load()
    torch._dynamo.reset()
    loss = WAYS[way]()
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 512, generator=generator).half()
    student = (teacher + 0.1 * torch.randn(64, 512, generator=generator)).half()
    weight = torch.full((64,), 2.0**-16 if abs(factor) > 1 else 2.0**40)  # the latter overflows, unscaled
    got, want = student.clone().requires_grad_(), student.clone().requires_grad_()
    (loss(got, teacher, torch.tensor(2.0), weight) * factor).backward()
    rows = pykd.functional.soft_target(want, teacher, temperature=2.0, form="kl", reduction="none")
    ((rows * weight).sum() * factor).backward()
    compare({"student": got}, {"student": want}, torch.float16)


def test_a_scaled_loss_at_the_reported_size():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(256, 8192, generator=generator).half()
    student = (teacher + 0.1 * torch.randn(256, 8192, generator=generator)).half()
    results = []
    for kernels in ("off", "on"):
        leaf = student.clone().requires_grad_()
        (pykd.functional.soft_target(leaf, teacher, form="kl", kernels=kernels) * SCALE).backward()
        results.append({"student": leaf})
    compare(results[1], results[0], torch.float16)


def test_a_change_in_place_before_backward_is_noticed():
    """The kernel reads its inputs again there."""
    for changed in (0, 1):
        tensors = [torch.randn(3, 4).half().requires_grad_(), torch.randn(3, 4).half()]
        value = pykd.functional.soft_target(*tensors, kernels="on")
        with torch.no_grad():
            tensors[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


def test_batches_of_upstream_gradients_per_sample():
    """They differentiate the formula behind the kernel."""
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    got, want = (
        torch.autograd.grad(
            pykd.functional.soft_target(student, teacher, reduction="none", kernels=mode),
            student,
            torch.eye(3),
            is_grads_batched=True,
        )[0]
        for mode in ("on", "off")
    )
    torch.testing.assert_close(got, want)
