"""Losses by blocks of rows: the formula's numbers, whatever the size of a block."""

import pytest
import torch

import pykd
from pykd.export.verification import errors
from pykd.fused import blocks
from tests import tolerances
from tests.conftest import loss_subjects

SUBJECTS = [subject for subject in loss_subjects() if subject.loss.has_blocks()]
BLOCKED = pytest.mark.parametrize("blocked", SUBJECTS, ids=str)
SIZES = {"batch": 11, "channels": 4, "teacher_channels": 5, "tokens": 3, "height": 2, "width": 3}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, params=[(1, 50), (100, 1000)], ids=["one row", "all kept"])
def few_entries(request, monkeypatch):
    """Blocks of one row, with room for some of the products, and of rows that do not divide the batch, with room for all."""
    entries, kept = request.param
    monkeypatch.setattr(blocks, "_ENTRIES", entries)
    monkeypatch.setattr(blocks, "_KEPT", kept)


def drawn(subject, dtype=torch.float32, **sizes):
    own = {axis: n for axis, n in (SIZES | sizes).items() if any(axis in spec.names for spec in subject.specs.values())}
    return subject.draw(own, seed=3, dtype=dtype)


def leaves(subject, tensors, dtype=None):
    return {
        name: (t.to(dtype) if dtype and t.is_floating_point() else t.clone()).requires_grad_(subject.specs[name].grad)
        for name, t in tensors.items()
    }


def results(subject, given, compute):
    value = compute(given)
    value.backward()
    return {"loss": value.detach()} | {f"grad_{n}": t.grad for n, t in given.items() if t.requires_grad}


def exactly(subject, tensors):
    given = leaves(subject, tensors, torch.float64)
    found = results(subject, given, lambda t: subject.loss(**t))
    return {name: value.numpy() for name, value in found.items()}


def close(got, want, rtol=1e-10):
    for name, value in want.items():
        torch.testing.assert_close(got[name], torch.as_tensor(value), rtol=rtol, atol=rtol)


def test_there_are_some():
    assert {"similarity_preserving", "relational_angle", "affinity"} <= {subject.loss.name for subject in SUBJECTS}


@BLOCKED
@pytest.mark.parametrize("batch", [1, 2, 11])
def test_float64_is_that_of_the_formula(blocked, batch):
    tensors = drawn(blocked, torch.float64, batch=batch)
    if blocked.loss.why_whole(tensors, "on"):
        pytest.skip("no blocks for these settings")
    got = results(blocked, leaves(blocked, tensors), lambda t: blocks.evaluate(blocked.loss, t))
    close(got, exactly(blocked, tensors))


@BLOCKED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_is_as_exact_as_the_formula(blocked, dtype):
    tensors = drawn(blocked, dtype)
    if refused(blocked.loss, tensors):
        return
    want = exactly(blocked, tensors)
    with pykd.using_kernels("off"):
        plain = errors(results(blocked, leaves(blocked, tensors), lambda t: blocked.loss(**t)), want)
    with pykd.using_kernels("on") as ran:
        found = results(blocked, leaves(blocked, tensors), lambda t: blocked.loss(**t))
    assert ran.kernels == ["blocks"] and not ran.formulas
    assert all(found[f"grad_{name}"].dtype == dtype for name in tensors if blocked.specs[name].grad)
    margins = tolerances.KERNEL[str(dtype).removeprefix("torch.")]
    for error, limit, margin in zip(errors(found, want), plain, margins, strict=True):
        assert error <= limit + margin


def refused(loss, tensors):
    """Whether no blocks compute it, which is an error then."""
    why = loss.why_whole(tensors, "on")
    if why:
        with pytest.raises(RuntimeError, match="it has no kernel, and "):
            loss(**tensors, kernels="on")
    return bool(why)


@BLOCKED
def test_second_derivatives_are_the_formulas(blocked):
    tensors = drawn(blocked)
    if blocked.loss.why_whole(tensors, "on"):
        pytest.skip("no blocks for these settings")
    found = []
    for kernels in ("on", "off"):
        given = leaves(blocked, tensors)
        student = next(t for t in given.values() if t.requires_grad)
        (gradient,) = torch.autograd.grad(blocked.loss(**given, kernels=kernels), student, create_graph=True)
        found.append(
            torch.autograd.grad((gradient * torch.linspace(-1, 1, gradient.numel()).view_as(gradient)).sum(), student)[
                0
            ]
        )
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 * found[1].abs().max().item())


@BLOCKED
def test_what_is_left_out_has_no_part(blocked):
    if "sample_weight" not in blocked.specs:
        pytest.skip("no weights in this case")
    tensors = drawn(blocked)
    if blocked.loss.why_whole(tensors, "on"):
        pytest.skip("no blocks for these settings")
    tensors["sample_weight"] = torch.tensor([0.0, 1, 2, 1, 0, 3, 1, 1, 1, 1, 0.5])
    want = exactly(blocked, tensors)
    for name in blocked.specs:
        if name != "sample_weight":
            tensors[name][0] = torch.nan
            tensors[name][4] = torch.inf
    got = results(blocked, leaves(blocked, tensors), lambda t: blocked.loss(**t, kernels="on"))
    assert max(errors(got, want)) < 2e-5
    none = leaves(blocked, tensors | {"sample_weight": torch.zeros(11)})
    got = results(blocked, none, lambda t: blocked.loss(**t, kernels="on"))
    assert all(torch.equal(value, torch.zeros_like(value)) for value in got.values())


@BLOCKED
@pytest.mark.parametrize("factor", [1e-15, 1e15])
def test_features_far_from_1_give_what_the_formula_gives(blocked, factor):
    tensors = {
        name: tensor * factor if name in blocked.inputs_of("features", "unit") else tensor
        for name, tensor in drawn(blocked).items()
    }
    want = blocked.loss(**tensors, kernels="off")
    torch.testing.assert_close(blocked.loss(**tensors, kernels="on"), want, rtol=1e-4, atol=1e-5)


@BLOCKED
def test_nan_gives_nan(blocked):
    tensors = drawn(blocked)
    if blocked.loss.why_whole(tensors, "on"):
        pytest.skip("no blocks for these settings")
    if "sample_weight" in tensors:
        tensors["sample_weight"] = torch.ones(11)
    for name in blocked.specs:
        if name != "sample_weight":
            spoilt = tensors | {name: tensors[name].clone()}
            spoilt[name][7] = torch.nan
            assert blocked.loss(**spoilt, kernels="on").isnan(), name


# ---- Any one of them ----------------------------------------------------------------------------


def embeddings(seed, samples=11, channels=4, dtype=torch.float32):
    return torch.randn(samples, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_a_factor_meets_the_gradient_of_halves_before_it_is_rounded():
    teacher, factor = embeddings(1).half(), 2.0**-22
    found = []
    for kernels in ("on", "off"):
        student = embeddings(0).half().requires_grad_()
        (pykd.RelationalDistance()(student, teacher, kernels=kernels) * factor * 2.0**20).backward()
        found.append(student.grad)
    assert found[0].dtype == torch.float16 and found[0].abs().max() > 0
    torch.testing.assert_close(*found, rtol=2e-3, atol=1e-7)


def test_the_largest_distance_shares_its_gradient_among_all_that_reach_it():
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    loss, teacher = pykd.InstanceRelationshipGraph(), embeddings(1, 5, 3, torch.float64)
    found = []
    for compute in (loss, lambda s, t: blocks.evaluate(loss, {"student_features": s, "teacher_features": t})):
        student = square.clone().requires_grad_()
        compute(student, teacher).backward()
        found.append(student.grad)
    torch.testing.assert_close(*found)


def test_backward_twice_needs_the_graph():
    student, teacher = embeddings(0).requires_grad_(), embeddings(1)
    value = pykd.ProbabilisticTransfer()(student, teacher, kernels="on")
    value.backward(retain_graph=True)
    once = student.grad.clone()
    value.backward()
    torch.testing.assert_close(student.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_several_upstream_gradients_at_once():
    upstream = torch.tensor([1.0, -2.0, 0.5])
    for loss in (pykd.SimilarityPreserving(), pykd.ProbabilisticTransfer()):
        student = embeddings(0).requires_grad_()
        value = loss(student, embeddings(1), kernels="on")
        (found,) = torch.autograd.grad(value, student, upstream, is_grads_batched=True, retain_graph=True)
        (one,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(found, upstream[:, None, None] * one)


def test_inputs_that_change_before_they_are_read_again_are_an_error():
    student, teacher = embeddings(0).requires_grad_(), embeddings(1)
    value = pykd.HardDarkRank()(student, teacher, kernels="on")
    with torch.no_grad():
        student += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, student, create_graph=True, retain_graph=True)
    value.backward()  # which does not read them


def test_strides_and_inference_mode():
    student, teacher = embeddings(0, 22, 8), embeddings(1, 22, 8)
    with torch.inference_mode():
        frozen = teacher[::2, ::2].clone()
        value = pykd.RelationalDistance()(student[::2, ::2], frozen, kernels="on")
    leaf = student[::2, ::2].t().contiguous().t().requires_grad_()
    again = pykd.RelationalDistance()(leaf, frozen, kernels="on")
    again.backward()
    torch.testing.assert_close(again.detach(), value.clone())
    assert leaf.grad.shape == leaf.shape


def test_large_batches_go_by_blocks_and_small_ones_do_not(monkeypatch):
    loss, student, teacher = pykd.SimilarityPreserving(), embeddings(0), embeddings(1)
    with pykd.using_kernels() as ran:
        loss(student, teacher)
    assert (ran.kernels, len(ran.formulas)) == ([], 1)
    assert "too small for blocks" in ran.formulas[0]
    monkeypatch.setattr("pykd.definition.routing.least_entries", 121)
    with pykd.using_kernels() as ran:
        loss(student, teacher)
        pykd.functional.similarity_preserving(student, teacher)
        loss(student, teacher, kernels="off")
        torch.func.grad(loss)(student, teacher)
    assert ran.kernels == ["blocks", "blocks"] and len(ran.formulas) == 2


def test_float64_and_learned_numbers_take_the_formula():
    with pytest.raises(RuntimeError, match="no blocks of rows for float64"):
        pykd.SimilarityPreserving()(embeddings(0).double(), embeddings(1).double(), kernels="on")
    alpha = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(RuntimeError, match="alpha requires a gradient"):
        pykd.HardDarkRank()(embeddings(0), embeddings(1), alpha=alpha, kernels="on")


def test_a_composition_has_blocks_beside_kernels(monkeypatch):
    loss = pykd.compose({"soft": pykd.SoftTarget(), "relation": (pykd.RelationalDistance(), 2.0)})
    alone = pykd.compose({"a": pykd.RelationalDistance(), "b": pykd.SimilarityPreserving()})
    tensors = {"student_embeddings": embeddings(0), "teacher_embeddings": embeddings(1)}
    cases = [
        (loss, tensors | {"student_logits": embeddings(2), "teacher_logits": embeddings(3)}, ["blocks", "soft_target"]),
        (alone, tensors | {"student_features": embeddings(2), "teacher_features": embeddings(3)}, ["blocks", "blocks"]),
    ]
    for composition, given, expected in cases:
        found = []
        for kernels in ("on", "off"):
            own = {name: t.clone().requires_grad_(name.startswith("student")) for name, t in given.items()}
            composition(**own, kernels=kernels)  # the first call finds out what computes it
            with pykd.using_kernels(kernels) as ran:
                values = composition(**own)
            assert sorted(ran.kernels) == (expected if kernels == "on" else [])
            values["loss"].backward()
            found.append(
                {n: v.detach() for n, v in values.items()} | {n: t.grad for n, t in own.items() if t.requires_grad}
            )
        for name, value in found[0].items():
            torch.testing.assert_close(value, found[1][name])
    small = {name: t.requires_grad_(name.startswith("student")) for name, t in cases[1][1].items()}
    with pykd.using_kernels() as ran:
        alone(**small)
    assert not ran.kernels
