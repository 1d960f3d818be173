"""What the generated tests cannot know of losses on relations between samples."""

import numpy as np
import pytest
import torch

import pykd
from pykd.definition import ops
from pykd.losses.relations import _shared

F = pykd.functional


def embeddings(seed, samples=7, channels=5, dtype=torch.float64):
    return torch.randn(samples, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)


WITH_DISTANCES = [F.relational_distance, F.relational_angle, F.hard_dark_rank, F.instance_relationship_graph]


@pytest.mark.parametrize("loss", WITH_DISTANCES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_that_coincide_have_a_finite_gradient(loss, dtype):
    """In the width of a network, where the expansion of their distance leaves rounding in the place of 0."""
    for scale in (1e-3, 1.0, 1e3):
        student = (embeddings(0, 8, 512, dtype) + 3.0) * scale
        student[1] = student[0]
        teacher = embeddings(1, 8, 64, dtype)
        teacher[2] = teacher[3]
        student.requires_grad_()
        value = loss(student, teacher)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(student.grad).all()
        assert student.grad.abs().max() * scale < 10
        exact = student.detach().double().requires_grad_()
        loss(exact, teacher.double()).backward()
        torch.testing.assert_close(student.grad.double(), exact.grad, rtol=0, atol=2e-4 * exact.grad.abs().max().item())


@pytest.mark.parametrize("loss", WITH_DISTANCES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(("dtype", "kernels"), [(torch.float64, "off"), (torch.float32, "off"), (torch.float32, "on")])
@pytest.mark.parametrize("samples", [3, 6, 8, 11])
def test_a_batch_that_coincides_has_no_gradient(loss, dtype, kernels, samples):
    """Whose mean is not to the last digit what all of them are."""
    for scale in (1e-3, 1.0, 1e3):
        student = (embeddings(0, 1, 13, dtype) * scale).repeat(samples, 1).requires_grad_()
        value = loss(student, embeddings(1, samples, 5, dtype), kernels=kernels)
        value.backward()
        assert torch.isfinite(value) and not student.grad.any()


@pytest.mark.parametrize("loss", WITH_DISTANCES[:2], ids=lambda loss: loss.__name__)
def test_a_rotation_a_shift_and_a_factor_change_no_shape(loss):
    student = embeddings(0)
    turn, _ = torch.linalg.qr(embeddings(1, 5, 5))
    assert loss(student, 3.0 * student @ turn + embeddings(2, 1)).item() == pytest.approx(0.0, abs=1e-24)
    assert loss(student, embeddings(3)) > 1e-3


def test_similarity_preserving_has_the_norm_of_torchdistill():
    student, teacher = embeddings(0), embeddings(1, channels=9)
    rows = [torch.nn.functional.normalize(x @ x.T, dim=1) for x in (student, teacher)]
    want = torch.linalg.norm(rows[0] - rows[1]) ** 2 / 49
    torch.testing.assert_close(F.similarity_preserving(student, teacher), want)


def test_the_code_of_probabilistic_transfer_is_a_setting():
    """It keeps the pair of a sample with itself, and takes the mean over all pairs."""
    student, teacher = embeddings(0), embeddings(1)
    rows = []
    for x in (student, teacher):
        x = x / x.norm(dim=1, keepdim=True)
        similarity = (x @ x.T + 1) / 2
        rows.append(similarity / similarity.sum(dim=1, keepdim=True))
    want = (rows[1] * torch.log((rows[1] + 1e-7) / (rows[0] + 1e-7))).mean()
    torch.testing.assert_close(F.probabilistic_transfer(student, teacher, own=True, average="pairs"), want)


def test_correlation_congruence_is_the_gaussian_in_the_limit():
    student, teacher = embeddings(0), embeddings(1)
    kernels = [torch.exp(-0.4 * torch.cdist(x / x.norm(dim=1, keepdim=True), x / x.norm(dim=1, keepdim=True)) ** 2) for x in (student, teacher)]  # fmt: skip
    want = ((kernels[0] - kernels[1]) ** 2).mean()
    torch.testing.assert_close(F.correlation_congruence(student, teacher, order=10), want, rtol=1e-6, atol=1e-9)
    assert abs(F.correlation_congruence(student, teacher, order=1) - want) > 1e-5


def test_in_batch_contrastive_is_a_cross_entropy():
    student, teacher = (x / x.norm(dim=1, keepdim=True) for x in (embeddings(0), embeddings(1)))
    scores, own = student @ teacher.T / 0.1, torch.arange(7)
    there, back = (torch.nn.functional.cross_entropy(s, own) for s in (scores, scores.T))
    for direction, want in {"student": there, "teacher": back, "both": (there + back) / 2}.items():
        torch.testing.assert_close(F.in_batch_contrastive(student, teacher, temperature=0.1, direction=direction), want)


def test_a_bank_of_the_others_is_contrast_in_the_batch():
    student, teacher = (x / x.norm(dim=1, keepdim=True) for x in (embeddings(0), embeddings(1)))
    others = torch.stack([teacher[[j for j in range(7) if j != i]] for i in range(7)])
    torch.testing.assert_close(
        F.contrastive_representation(student, teacher, others, form="info_nce"),
        F.in_batch_contrastive(student, teacher),
    )


def test_the_normalizer_of_contrastive_representation_is_that_of_its_authors():
    """P / (P + M / n) with P = exp(x·y / T) / Z: Z over n is the normalizer here."""
    student, teacher = (x / x.norm(dim=1, keepdim=True) for x in (embeddings(0), embeddings(1)))
    bank = embeddings(2, 11) / embeddings(2, 11).norm(dim=1, keepdim=True)
    n, z = 1000, 4321.0
    noise = 11 / n
    positive = torch.exp((student * teacher).sum(dim=1) / 0.07) / z
    negative = torch.exp(student @ bank.T / 0.07) / z
    want = -(torch.log(positive / (positive + noise)) + torch.log(noise / (negative + noise)).sum(dim=1)).mean()
    got = F.contrastive_representation(student, teacher, bank, log_normalizer=float(np.log(z / n)))
    torch.testing.assert_close(got, want)


def test_the_nearest_neighbours_are_in_the_order_of_a_sort():
    """More places than others leave the surplus out."""
    student, teacher = embeddings(0, 4), embeddings(1, 4)
    torch.testing.assert_close(
        F.hard_dark_rank(student, teacher, length=3), F.hard_dark_rank(student, teacher, length=9)
    )


def test_affinities_of_channels_need_no_matrix_of_positions():
    student, teacher = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    x, y = (t.flatten(2) / t.flatten(2).norm(dim=2, keepdim=True) for t in (student, teacher))
    matrices = x.unsqueeze(3) * x.unsqueeze(2) - y.unsqueeze(3) * y.unsqueeze(2)
    want = (matrices / 20).flatten(2).norm(dim=2).sum(dim=1).mean()
    torch.testing.assert_close(F.affinity(student, teacher, per="channel"), want)


def test_tface_takes_negatives_that_come_later():
    """Three identities: the first finds the third, the second finds it as well, the third none, which counts as 0."""
    labels, teacher = torch.tensor([0, 1, 2]), torch.eye(3, dtype=torch.float64)
    student = torch.tensor([[1.0, 0.0, 0.0], [-0.8, 0.6, 0.0], [0.6, 0.8, 0.0]], dtype=torch.float64)
    settings = {"positive_weight": 0.0, "negative_weight": 0.0, "order_weight": 1.0}
    papers, codes = (
        F.distribution_distillation(student, teacher, labels, **settings, convention=convention)
        for convention in ("paper", "tface")
    )
    assert papers.item() == pytest.approx(2 * (0.6 + 0.0 + 0.6) / 3)
    assert codes.item() == pytest.approx(2 * (0.6 + 0.0 + 0.0) / 3)


# ---- With memory for what they make alone -------------------------------------------------------

ROWS = torch.tensor([[3.0, -4, 1], [0, 0, 0], [1e20, 2e20, -5e19], [4e-25, -3e-25, 1e-25], [1e-45, 0, 0], [-2, 2, 0.5]])


def with_gradient(function, x, weight):
    leaf = x.clone().requires_grad_()
    made = function(leaf, weight)
    (gradient,) = torch.autograd.grad(made, leaf, torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x))
    return made.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2, 0.5, 3, 1, 0])], ids=["all", "left out"])
def test_normalized_rows_are_those_of_normalize(dtype, weight):
    x = ROWS.to(dtype, copy=True)
    want = with_gradient(lambda x, w: ops.normalize(ops.without_left_out(x, w), dim=[-1]), x, weight)
    if weight is not None:
        x[5] = torch.nan
    for got, expected in zip(with_gradient(_shared.normalized_rows, x, weight), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-30, 1e30])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2, 0.5, 3, 1, 0])], ids=["all", "left out"])
def test_centred_rows_are_those_of_centred(scale, weight):
    x = ops.without_left_out(ROWS.clamp(-5, 5) * scale, weight)
    want = with_gradient(_shared.centred, x, weight)
    for got, expected in zip(with_gradient(_shared.centred_rows, x, weight), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_what_is_nan_stays_so():
    x = ROWS.clone()
    x[0, 1], x[5, 0] = torch.nan, torch.inf
    for function in (_shared.normalized_rows, lambda x, w: ops.normalize(x, dim=[-1])):
        made, gradient = with_gradient(function, x, None)
        for rows in (made, gradient):
            assert rows.isnan().any(dim=1).tolist() == [True, False, False, False, False, True]
    assert _shared.centred_rows(x, None).isnan().all()
