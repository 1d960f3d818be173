"""What the generated tests of losses on logits cannot know: relations between losses, limits, and traps of numbers."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, softmax

import pykd


def drawn(*shape, seed=0, dtype=torch.float64):
    """Logits of a student and a teacher, and labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(shape[-1], shape[:-1], generator=generator)


def gradient(loss, student, *others):
    leaf = student.clone().requires_grad_()
    loss(leaf, *others).backward()
    return leaf.grad


# ---- decoupled_kd --------------------------------------------------------------------------------


def test_the_decoupled_parts_are_the_divergence():
    """KL(p‖q) = TCKD + (1 − p_y) · NCKD, equation 7 of the paper."""
    student, teacher, labels = drawn(6, 5)
    target, others = (
        pykd.DecoupledKD(3.0, *weights, tau_squared=False, reduction="none")(student, teacher, labels)
        for weights in ((1.0, 0.0), (0.0, 1.0))
    )
    rest = 1 - softmax(teacher / 3.0, dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    whole = pykd.SoftTarget(3.0, form="kl", reduction="none")(student, teacher)
    torch.testing.assert_close(target + rest * others, whole)


def test_minus_a_thousand_on_the_label_leaves_it_out():
    """As mdistiller does it."""
    student, teacher, labels = drawn(6, 5)
    mask = 1000 * torch.nn.functional.one_hot(labels, 5)
    log_q, p = log_softmax(student / 4 - mask, dim=-1), softmax(teacher / 4 - mask, dim=-1)
    got = pykd.DecoupledKD(target_weight=0.0, non_target_weight=1.0)(student, teacher, labels)
    torch.testing.assert_close(got, 16 * kl_div(log_q, p, reduction="batchmean"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["decoupled_kd", "normalized_kd"])
def test_a_label_that_takes_all_is_finite(name, dtype):
    """Where 1 − p_y rounds to 0; two classes, whose others are one; and others that are all masked, for some samples."""
    loss = pykd.get(name)()
    labels = torch.tensor([0, 0])
    for student, teacher in (
        ([[9e4, 0.0, 1.0], [0.0, 1.0, 2.0]], [[8e4, 1.0, 0.0], [-3e4, 0.0, 1.0]]),
        ([[3.0, 1.0], [0.0, 2.0]], [[1.0, 2.0], [500.0, -500.0]]),
        ([[1.0, -torch.inf, -torch.inf], [1.0, 2.0, 3.0]], [[0.0, -torch.inf, -torch.inf], [3.0, 2.0, 0.0]]),
    ):
        s, t = torch.tensor(student, dtype=dtype), torch.tensor(teacher, dtype=dtype)
        assert torch.isfinite(loss(s, t, labels))
        assert torch.isfinite(gradient(loss, s, t, labels)).all()


# ---- logit_standardization -----------------------------------------------------------------------


def test_standardised_logits_know_no_range():
    student, teacher, _ = drawn(6, 5)
    for loss in (pykd.LogitStandardization(), pykd.LogitStandardization(unbiased=True)):
        torch.testing.assert_close(loss(1e-12 * student - 1, 1e9 * teacher), loss(student, teacher), rtol=1e-3, atol=0)
        assert loss(teacher * 3 + 1, teacher) < 1e-12


def test_standardised_logits_are_those_of_the_authors():
    student, teacher, _ = drawn(6, 5)
    s, t = ((x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7) / 2 for x in (student, teacher))
    want = 4 * kl_div(log_softmax(s, -1), softmax(t, -1), reduction="batchmean")
    torch.testing.assert_close(pykd.LogitStandardization(unbiased=True)(student, teacher), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("constant", [0.1, 1.7, 1e4 / 3])
def test_equal_logits_have_no_direction(dtype, constant):
    """Their mean is not quite themselves, and what is left would be a row like any other."""
    _, teacher, _ = drawn(3, 7, dtype=dtype)
    student = torch.full((3, 7), constant, dtype=dtype)
    for loss in (pykd.LogitStandardization(),):
        torch.testing.assert_close(loss(student, teacher), loss(torch.zeros_like(student), teacher), rtol=0, atol=0)
        assert (gradient(loss, student, teacher) == 0).all()


# ---- stronger_teacher ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_predictions_that_differ_by_rounding_alone_have_no_direction(dtype):
    """A student that says the same of every sample: rounding divided by its length would be a gradient without bounds."""
    _, teacher, _ = drawn(64, 10, dtype=dtype)
    student = drawn(1, 10, dtype=dtype)[0].expand(64, 10) + torch.linspace(-5, 5, 64, dtype=dtype).unsqueeze(1)
    loss = pykd.StrongerTeacher(inter_class_weight=0.0)
    assert loss(student, teacher) == 1
    assert (gradient(loss, student, teacher) == 0).all()
