"""Autocast changes no loss, and no divergence is negative. Generated from the registry: nothing here names a loss."""

import io

import pytest
import torch

from pykd.definition import ops
from tests.conftest import one_per_loss


def leaves(subject, tensors):
    specs = subject.graph().signature.inputs
    return {name: t.clone().requires_grad_(specs[name].grad) for name, t in tensors.items()}


# ---- Autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("route", ["eager", "fused"])
def test_autocast_changes_nothing(loss_subject, half, route):
    autocast_changes_nothing(loss_subject, half, route)


@pytest.mark.slow
@pytest.mark.parametrize("route", ["scripted", "saved", "compiled"])
@pytest.mark.parametrize("form", one_per_loss(), ids=str)
def test_autocast_changes_nothing_on_other_routes(form, route):
    autocast_changes_nothing(form, torch.bfloat16, route)


def autocast_changes_nothing(subject, half, route):
    if (
        route == "fused"
        and subject.composition.graph(subject.layouts, subject.optional, fused=True).kernel_point is None
    ):
        pytest.skip("no kernel")
    tensors = subject.draw(seed=3, dtype=torch.float32)
    graph = subject.graph()
    if route == "fused":
        run = lambda **given: subject.composition(**given, kernels="on")  # noqa: E731
    elif route == "compiled":
        torch._dynamo.reset()
        run = torch.compile(graph, backend="aot_eager", fullgraph=True)
    elif route == "eager":
        run = graph
    else:
        run = torch.jit.script(graph)
        if route == "saved":
            file = io.BytesIO()
            torch.jit.save(run, file)
            file.seek(0)
            run = torch.jit.load(file)
    want = leaves(subject, tensors)
    plain = (run if route == "fused" else graph)(**want)["loss"]
    plain.backward()
    for _ in range(3):  # a script is optimised in its second call
        given = leaves(subject, tensors)
        with torch.autocast("cpu", half):
            value = run(**given)["loss"]
        assert value.dtype == torch.float32
        value.backward()
        torch.testing.assert_close(value, plain, rtol=1e-6, atol=2e-7)
        for name, tensor in want.items():
            if tensor.requires_grad:
                largest = tensor.grad.abs().max().item()
                torch.testing.assert_close(given[name].grad, tensor.grad, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_equal_under_autocast_is_zero(loss_subject, half):
    if loss_subject.loss.properties().zero_when_equal is not True:
        pytest.skip("no divergence")
    tensors = loss_subject.draw(seed=4, dtype=torch.float32)
    for name, spec in loss_subject.specs.items():
        if spec.like is not None:
            tensors[name] = tensors[spec.like].clone()
    with torch.autocast("cpu", half):
        value = loss_subject.graph()(**tensors)["loss"]
    assert 0 <= value.item() <= 1e-6


# ---- Values that cannot be negative -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_divergence_is_never_negative_and_keeps_its_gradient(loss_subject, dtype):
    subject = loss_subject
    loss = subject.composition.named_terms[0].parts[0].loss
    if loss.properties().zero_when_equal is not True:
        pytest.skip("no divergence")
    smallest = 0.0
    for seed in range(20):
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in subject.draw(seed=seed).items()}
        for name, spec in subject.specs.items():
            if spec.like is not None:
                teacher = tensors[spec.like]
                order = (
                    torch.randperm(len(teacher))
                    if loss.couples_batch and "labels" not in tensors
                    else torch.arange(len(teacher))
                )
                tensors[name] = teacher[order] * (1 + 3e-8 * seed)
        given = leaves(subject, tensors)
        value = subject.graph()(**given)["loss"]
        smallest = min(smallest, value.item())
        value.backward()
        for tensor in given.values():
            if tensor.requires_grad:
                assert torch.isfinite(tensor.grad).all()
        if dtype == torch.float32 and subject.has_kernel:
            smallest = min(smallest, subject.composition(**tensors, kernels="on")["loss"].item())
    assert smallest >= 0.0


def test_the_lower_bound_does_not_touch_the_gradient():
    x = torch.tensor([-1e-9, 0.0, 2.0, torch.inf, torch.nan], requires_grad=True)
    value = ops.at_least_0(x)
    torch.testing.assert_close(
        value, torch.tensor([0.0, 0.0, 2.0, torch.inf, torch.nan]), equal_nan=True, rtol=0, atol=0
    )
    value.sum().backward()
    assert (x.grad == 1).all()


def test_the_negative_of_what_cannot_be_positive_keeps_its_gradient():
    x = torch.tensor([1e-9, 0.0, -2.0, -torch.inf, torch.nan], requires_grad=True)
    correction = torch.tensor([0.0, 1e-9, 0.5, 0.0, 0.0])
    for least, want in (
        (None, [0.0, 0.0, 2.0, torch.inf, torch.nan]),
        (correction, [0.0, 1e-9, 2.5, torch.inf, torch.nan]),
        (-correction, [0.0, 0.0, 1.5, torch.inf, torch.nan]),
    ):
        value = ops.negative_of(x, least)
        torch.testing.assert_close(value, torch.tensor(want), equal_nan=True, rtol=0, atol=0)
        assert (torch.autograd.grad(value.sum(), x)[0] == -1).all()


def test_an_expectation_is_the_sum_of_products_or_zero():
    """Value, gradients and their gradients; NaN of a class that counts, or of a probability, is not lost."""
    p = torch.tensor([[0.0, 0.0, 0.0, 0.25, 0.75], [0.0, 0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[-torch.inf, torch.inf, torch.nan, 1.0, -2.0], [1.0, -torch.inf, 3.0, 4.0, 5.0]]).double()
    found = []
    for function in (ops.expectation, lambda p, x: ops.product_or_zero(p, x).sum(dim=-1)):
        leaves = p.clone().requires_grad_(), x.clone().requires_grad_()
        value = function(*leaves)
        first = torch.autograd.grad(value[0].square() + value[1], leaves, create_graph=True)
        second = torch.autograd.grad(first[0][0, 3] + first[1][0, 4], leaves)
        found.append((value, *first, *second))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert found[0][0].tolist() == [-1.25, -torch.inf]
    for at in ((p, 3), (x, 3), (p, 0)):
        broken = [t.clone() for t in (p, x)]
        broken[0 if at[0] is p else 1][0, at[1]] = torch.nan
        assert torch.isnan(ops.expectation(*broken)[0])
