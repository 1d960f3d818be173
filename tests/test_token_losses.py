"""What the losses on vocabularies are to each other, and numbers that are known of them."""

import math

import numpy as np
import pytest
import torch

import pykd
from pykd.definition import ops


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(loss, student, *others, **given):
    student = student.clone().requires_grad_()
    value = loss(student, *others, **given)
    value.backward()
    return value.detach(), student.grad


def top(teacher, k, temperature=1.0):
    """The log-probabilities and ids of the k likeliest classes."""
    return torch.log_softmax(teacher / temperature, dim=-1).topk(k, dim=-1)


# ---- Top k --------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["tail", "ghost", "renormalized", "zero", "unnormalized"])
def test_the_top_of_all_is_all(convention):
    student, teacher = logits(7, 11), logits(7, 11, seed=1)
    got = gradient(pykd.TopKKL(convention=convention), student, *top(teacher, 11))
    want = gradient(pykd.SoftTarget(1.0, form="kl"), student, teacher)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_the_tail_makes_a_divergence():
    student, teacher = logits(5, 40), logits(5, 40, seed=1)
    full = pykd.SoftTarget(1.0, form="kl")(student, teacher)
    values = [pykd.TopKKL()(student, *top(teacher, k)) for k in (1, 3, 10, 30)]
    assert all(a < b for a, b in zip(values, [*values[1:], full], strict=True))
    for temperature in (1.0, 3.0):
        entries = top(teacher, 4, temperature)
        value, slope = gradient(pykd.TopKKL(temperature=temperature), teacher, *entries)
        assert value.abs() < 1e-14 and slope.abs().max() < 1e-14
        assert pykd.TopKKL(temperature=temperature, convention="zero")(teacher, *entries) > 0.1


def test_a_small_tail_keeps_its_digits():
    """1 − Σ q would have few digits of it, or none."""
    student = torch.tensor([[30.0, 29.0, 0.0, 1.0, 12.0]])
    entries = torch.tensor([[0.6, 0.3]]).log(), torch.tensor([[0, 1]])
    wide = gradient(pykd.TopKKL(), student.double(), entries[0].double(), entries[1])
    narrow = gradient(pykd.TopKKL(), student, *entries)
    torch.testing.assert_close(narrow[0].double(), wide[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(narrow[1].double(), wide[1], rtol=1e-4, atol=1e-7)


def test_logits_are_no_log_probabilities():
    student, teacher = logits(3, 9), logits(3, 9, seed=1)
    raw, ids = teacher.topk(4, dim=-1)
    for convention in ("tail", "ghost", "unnormalized"):
        assert pykd.TopKKL(convention=convention)(student, raw + 3, ids).isnan()
    for convention in ("renormalized", "zero"):
        loss = pykd.TopKKL(convention=convention, temperature=2.0)
        torch.testing.assert_close(loss(student, raw, ids), loss(student, *top(teacher, 4)))


@pytest.mark.parametrize("convention", ["tail", "ghost"])
@pytest.mark.parametrize("temperature", [1.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masses_of_a_little_more_than_1_are_taken_as_they_are(convention, temperature, dtype):
    """As rounding to a half type leaves them: the value is the definition's in every dtype, by kernel and formula."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 6, generator=generator)
    log_probs = torch.log_softmax(torch.randn(3, 4, generator=generator), dim=-1) + math.log(1.04)
    ids = torch.tensor([[0, 3, 5, 1]] * 3)
    loss = pykd.TopKKL(temperature, convention=convention)
    want = loss.reference(student.double().numpy(), log_probs.double().numpy(), ids.numpy())
    for mode in ("off", "on") if dtype == torch.float32 else ("off",):
        value = loss(student.to(dtype), log_probs.to(dtype), ids, kernels=mode)
        assert value.item() == pytest.approx(want, rel=1e-5), mode


@pytest.mark.parametrize("convention", ["tail", "ghost", "renormalized", "zero", "unnormalized"])
def test_an_entry_that_is_not_there_counts_for_nothing(convention):
    student, (values, ids) = logits(3, 9), top(logits(3, 9, seed=1), 4)
    nothing = torch.full_like(values[:, :1], -math.inf)
    loss = pykd.TopKKL(convention=convention)
    for other in (0, 8):
        filled = torch.cat([values, nothing], dim=-1), torch.cat([ids, torch.full_like(ids[:, :1], other)], dim=-1)
        for got, want in zip(gradient(loss, student, *filled), gradient(loss, student, values, ids), strict=True):
            torch.testing.assert_close(got, want)


def test_a_tail_that_the_student_rules_out():
    student = torch.tensor([[1.0, 0.0, -math.inf]])
    entries = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0, 1]])
    assert pykd.TopKKL()(student, *entries) == math.inf
    value, slope = gradient(pykd.TopKKL(convention="ghost"), student, *entries)
    assert value.isfinite() and slope.isfinite().all()
    full = top(student[:, :2], 2)[0], entries[1]
    assert pykd.TopKKL()(student, *full) < 1e-6  # what rounding leaves of 1 is no tail


# ---- Whole vocabularies -------------------------------------------------------------------------


def test_the_skewed_divergence_is_between_nothing_and_the_whole():
    student, teacher = logits(5, 8), logits(5, 8, seed=1)
    for direction, form in (("forward", "kl"), ("reverse", "reverse_kl")):
        near = pykd.SkewedKL(alpha=1e-9, direction=direction)(student, teacher)
        torch.testing.assert_close(near, pykd.SoftTarget(1.0, form=form)(student, teacher), rtol=1e-6, atol=0)
        saturated = pykd.SkewedKL(alpha=0.25, direction=direction)(1e4 * student, -1e4 * student)
        torch.testing.assert_close(saturated, torch.tensor(math.log(4.0), dtype=torch.float64))


def test_half_each_is_half_of_the_jensen_shannon_divergence():
    student, teacher = logits(5, 8), logits(5, 8, seed=1)
    both = sum(pykd.SkewedKL(alpha=0.5, direction=direction)(student, teacher) for direction in ("forward", "reverse"))
    torch.testing.assert_close(both / 2, pykd.SoftTarget(1.0, form="jsd")(student, teacher))


def test_the_subgradient_of_equal_probabilities_is_0():
    teacher = logits(4, 6)
    value, slope = gradient(pykd.TotalVariation(), teacher, teacher)
    assert value == 0 and (slope == 0).all()


def test_corners_of_the_alpha_beta_divergence():
    student, teacher = logits(5, 8), logits(5, 8, seed=1)
    q, p = student.softmax(-1), teacher.softmax(-1)
    known = {
        (1.0, 0.0): pykd.SoftTarget(1.0, form="kl")(student, teacher),
        (0.0, 1.0): pykd.SoftTarget(1.0, form="reverse_kl")(student, teacher),
        (0.5, 0.5): 2 * (p.sqrt() - q.sqrt()).square().sum(dim=-1).mean(),  # 4 H²
        (1.0, 1.0): (p - q).square().sum(dim=-1).mean() / 2,
    }
    for (alpha, beta), want in known.items():
        torch.testing.assert_close(pykd.AlphaBetaDivergence(alpha=alpha, beta=beta)(student, teacher), want)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.0, 0.5), (0.5, -0.5), (-0.3, 0.3), (0.0, 0.0), (-0.2, 0.0)])
def test_limits_are_limits(alpha, beta):
    """The code of the paper's authors has α or β times as much: no limit of the formula."""
    student, teacher = logits(5, 8), logits(5, 8, seed=1)
    exact = pykd.AlphaBetaDivergence(alpha=alpha, beta=beta)(student, teacher)
    near = pykd.AlphaBetaDivergence(alpha=alpha + 1e-5, beta=beta + 2e-5)(student, teacher)
    torch.testing.assert_close(exact, near, rtol=1e-3, atol=1e-5)
    theirs = pykd.AlphaBetaDivergence(alpha=alpha, beta=beta, limits="authors")(student, teacher)
    torch.testing.assert_close(theirs, exact * (alpha or beta or 1.0))


def test_vocabularies_may_be_shuffled_and_differ_in_size():
    student, teacher = logits(5, 8), logits(5, 12, seed=1)
    value, slope = gradient(pykd.UniversalLogit(), student, teacher)
    shuffled, moved = gradient(pykd.UniversalLogit(), student.flip(-1), teacher[:, torch.randperm(12)])
    torch.testing.assert_close(shuffled, value)
    torch.testing.assert_close(moved.flip(-1), slope)
    for one, other in ((student, teacher), (teacher, student)):
        padded = torch.cat([one, torch.full((5, 4), -math.inf, dtype=one.dtype)], dim=-1)
        torch.testing.assert_close(pykd.UniversalLogit()(padded, other), pykd.UniversalLogit()(one, other))
        assert pykd.UniversalLogit()(padded, one) == 0
    assert pykd.UniversalLogit()(1e4 * student[:, :1], teacher) < pykd.UniversalLogit()(
        torch.zeros(5, 999).double(), 1e4 * teacher
    )


def test_adaptive_weights_by_hand():
    """p = (0.6, 0.3, 0.1), q = (0.3, 0.3, 0.4): the head has 0.3 of the differences, 0.6 in all; with the second class, too."""
    student, teacher = torch.tensor([[0.3, 0.3, 0.4]]).double().log(), torch.tensor([[0.6, 0.3, 0.1]]).double().log()
    forward, reverse = (pykd.SoftTarget(1.0, form=form)(student, teacher) for form in ("kl", "reverse_kl"))
    for settings in (
        {},
        {"head_mass": 0.7},
        {"head_mass": 0.7, "boundary": "tail"},
        {"head_mass": 0.2, "boundary": "tail"},
    ):
        torch.testing.assert_close(pykd.AdaptiveKL(**settings)(student, teacher), (forward + reverse) / 2)
    student = torch.tensor([[0.3, 0.5, 0.2]]).double().log()  # differences 0.3, 0.2, 0.1
    forward, reverse = (pykd.SoftTarget(1.0, form=form)(student, teacher) for form in ("kl", "reverse_kl"))
    for boundary, share in (("head", 5 / 6), ("tail", 1 / 2)):
        value = pykd.AdaptiveKL(head_mass=0.7, boundary=boundary)(student, teacher)
        torch.testing.assert_close(value, share * forward + (1 - share) * reverse)


@pytest.mark.parametrize("kernels", ["off", "on"])
@pytest.mark.parametrize("boundary", ["head", "tail"])
def test_equal_probabilities_are_of_the_head_in_the_order_of_their_classes(boundary, kernels):
    """More of them than a sort that is not stable leaves in their order."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 40, generator=generator)
    teacher = torch.randint(3, (3, 40), generator=generator).float()
    loss = pykd.AdaptiveKL(boundary=boundary, reduction="none", kernels=kernels)
    want = loss.reference(student.double().numpy(), teacher.double().numpy())
    np.testing.assert_allclose(loss(student, teacher).numpy(), want, rtol=2e-6)


def test_without_emphasis_both_divergences_count_alike():
    student, teacher = logits(5, 8), logits(5, 8, seed=1)
    symmetric = pykd.SoftTarget(1.0, form="symmetric_kl")(student, teacher)
    torch.testing.assert_close(pykd.BalancedKL(emphasis=1.0)(student, teacher), 2 * symmetric)
    certain = 3 * teacher  # less entropy than the teacher: the forward divergence counts
    forward, reverse = (pykd.SoftTarget(1.0, form=form)(certain, teacher) for form in ("kl", "reverse_kl"))
    torch.testing.assert_close(pykd.BalancedKL(emphasis=5.0)(certain, teacher), 5 * forward + reverse)


@pytest.mark.parametrize("kernels", ["off", "on"])
def test_of_two_that_are_certain_the_one_is_emphasised_that_is_less_so(kernels):
    """Where float32 has no entropy of either."""
    student, teacher = (300 * logits(64, 8, seed=seed).float() for seed in (0, 1))
    loss = pykd.BalancedKL(reduction="none", kernels=kernels)
    want = loss.reference(student.double().numpy(), teacher.double().numpy())
    np.testing.assert_allclose(loss(student, teacher).numpy(), want, rtol=1e-5, atol=1e-6)


# ---- Sampled tokens, and pairs of them ----------------------------------------------------------


def test_the_mean_over_sampled_tokens_has_the_gradient_of_the_reverse_divergence():
    student, teacher = logits(1, 8), logits(1, 8, seed=1)
    given = {
        "teacher_log_probs": teacher.log_softmax(-1)[0],
        "sampled_ids": torch.arange(8),
        "sample_weight": student.softmax(-1)[0],  # every class as often as it is drawn
    }
    every = student.expand(8, 8).clone().requires_grad_()
    pykd.SampledReverseKL(reduction="sum")(every, **given).backward()
    _, want = gradient(pykd.SoftTarget(1.0, form="reverse_kl"), student, teacher)
    torch.testing.assert_close(every.grad.sum(dim=0, keepdim=True), want)


def test_pairs_count_alike_or_samples_do():
    student, (values, ids) = logits(3, 9), top(logits(3, 9, seed=1), 4)
    values[0, 2:] = -math.inf  # one pair in the first sample, six in the others
    for cls in (pykd.PairwiseHinge, pykd.LogisticRanking):
        sums = cls(reduction="none")(student, values, ids)
        counts = torch.tensor([1.0, 6.0, 6.0]).double()
        torch.testing.assert_close(cls()(student, values, ids), sums.sum() / 13)
        torch.testing.assert_close(cls(average="samples")(student, values, ids), (sums / counts).mean())
        weight = torch.tensor([2.0, 0.0, 1.0])
        weighed = cls()(student, values, ids, weight)
        torch.testing.assert_close(weighed, (2 * sums[0] + sums[2]) / 8)
        nothing = torch.full_like(values, -math.inf)
        value, slope = gradient(cls(), student, nothing, ids)
        assert value == 0 and (slope == 0).all()


def test_a_student_that_is_the_teacher_keeps_its_margins():
    teacher = logits(4, 9)
    assert pykd.PairwiseHinge()(teacher, *top(teacher, 4)) < 1e-15
    assert pykd.PairwiseHinge(margins="constant", margin=1.0)(teacher, *top(teacher, 4)) > 0


def test_two_tokens_that_the_student_rules_out_are_equal_to_it():
    student = torch.tensor([[-math.inf, -math.inf, 0.0]])
    value, slope = gradient(pykd.LogisticRanking(), student, torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0, 1]]))
    torch.testing.assert_close(value, torch.tensor(math.log(2.0)))
    assert (slope == 0).all()


def test_the_shared_divergences_are_those_of_the_definition():
    p, q = logits(5, 8).log_softmax(-1), logits(5, 8, seed=1).log_softmax(-1)
    np.testing.assert_allclose(ops.forward_kl(p, q), (p.exp() * (p - q)).sum(dim=-1), rtol=1e-12)
    np.testing.assert_allclose(ops.reverse_kl(p, q), (q.exp() * (q - p)).sum(dim=-1), rtol=1e-12)
