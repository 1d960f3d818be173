"""Every formula's first and second derivative against differences, in float64. Generated from the registry: nothing here names a loss.

Along directions of the student's tensors, all of their entries at once (``fast_mode``): tests/test_every_loss.py goes entry by entry.
"""

import numpy as np
import pytest
import torch

from tests.conftest import forms_of_inputs

LIMITS = {"atol": 1e-9, "rtol": 1e-5}  # what one entry is off shows in a direction of hundreds


def students_of(subject):
    return [name for name, spec in subject.specs.items() if spec.grad]


def formula_of(subject, tensors):
    """The loss of the student's tensors alone, by its formula."""
    loss, students = subject.loss, students_of(subject)

    def formula(*moved):
        return loss(**{**tensors, **dict(zip(students, moved, strict=True))}, kernels="off")

    return formula, tuple(tensors[name].clone().requires_grad_() for name in students)


def small(subject, seed):
    """At few numbers, none of which is where a derivative jumps: that happens with probability 0."""
    return subject.draw({"batch": 3}, seed)


def held(subject, tensors):
    """What the gradient treats as constant, though it is computed from the inputs."""
    loss = subject.loss
    return loss.constants(**loss.grouped({name: tensor.numpy() for name, tensor in tensors.items()}))


def reference_of(subject, tensors):
    """The reference as a function of the student's tensors, with everything held that the gradient takes for constant."""
    fixed = {name: tensor.numpy() for name, tensor in tensors.items()}

    def reference(*moved):
        arrays = fixed | {name: x.detach().numpy() for name, x in zip(students_of(subject), moved, strict=True)}
        return torch.as_tensor(subject.composition.reference(constants_at=fixed, **arrays)["loss"])

    return reference


def test_gradcheck(loss_subject):
    tensors = small(loss_subject, seed=1)
    formula, students = formula_of(loss_subject, tensors)
    checked = formula
    if held(loss_subject, tensors):  # differences of the formula would move what its gradient does not
        reference = reference_of(loss_subject, tensors)

        class Held(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *moved):
                ctx.save_for_backward(*moved)
                return reference(*moved)

            @staticmethod
            def backward(ctx, upstream):
                moved = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                with torch.enable_grad():
                    return torch.autograd.grad(formula(*moved), moved, upstream)

        checked = Held.apply
    assert torch.autograd.gradcheck(checked, students, fast_mode=True, **LIMITS)


@pytest.mark.slow
@pytest.mark.parametrize("form", [f for f in forms_of_inputs() if f.composition.single], ids=str)
def test_gradgradcheck(form):
    loss_subject = form
    tensors = small(loss_subject, seed=2)
    formula, students = formula_of(loss_subject, tensors)
    if not held(loss_subject, tensors):
        assert torch.autograd.gradgradcheck(formula, students, fast_mode=True, **LIMITS)
        return
    # Differences of the gradient would move what it holds; second differences of the reference do not.
    reference = reference_of(loss_subject, tensors)
    first = torch.autograd.grad(formula(*students), students, create_graph=True)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in students]
        slope = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        second = torch.autograd.grad(slope, students, retain_graph=True)
        got = sum((s * d).sum() for s, d in zip(second, directions, strict=True))
        step = 1e-4
        ends = [
            reference(*(x + sign * step * d for x, d in zip(students, directions, strict=True))) for sign in (1, 0, -1)
        ]
        np.testing.assert_allclose(got.item(), (ends[0] - 2 * ends[1] + ends[2]).item() / step**2, rtol=1e-4, atol=1e-6)
