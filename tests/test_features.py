"""What the generated tests cannot know of the losses on features: numbers of the papers, relations between losses, traps."""

import pytest
import torch
import torch.nn.functional as F

import pykd


def maps(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = maps(3, 4, 5, 6), maps(3, 4, 5, 6, seed=1)


def gradient(loss, student, *others):
    leaf = student.clone().requires_grad_()
    loss(leaf, *others).backward()
    return leaf.grad


# ---- What other libraries compute --------------------------------------------------------------


def unit_attention(x):
    return F.normalize(x.pow(2).mean(1).flatten(1))


def pooled(x, y, count):
    return F.mse_loss(F.adaptive_avg_pool2d(x, count), F.adaptive_avg_pool2d(y, count))


def broadcast_selectivity(x, y):
    """Every channel with every channel, by broadcasting."""
    x, y = F.normalize(x.flatten(2), dim=2), F.normalize(y.flatten(2), dim=2)

    def kernel(a, b):
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def standardised(x):
    x = x.transpose(0, 1).flatten(1)
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


ONES = torch.ones(4, dtype=torch.float64)

SAME = {
    "mse": (pykd.Hint(), F.mse_loss),
    "l1": (pykd.Hint(distance="l1"), F.l1_loss),
    "smooth_l1": (pykd.Hint(distance="smooth_l1", beta=0.7), lambda x, y: F.smooth_l1_loss(x, y, beta=0.7)),
    "fitnets": (pykd.Hint(entry_reduction="sum"), lambda x, y: (x - y).pow(2).sum() / 3),
    "attention, code": (
        pykd.get("ATLoss")(),
        lambda x, y: (unit_attention(x) - unit_attention(y)).pow(2).mean(),
    ),
    "attention, paper": (
        pykd.AttentionTransfer(),
        lambda x, y: (unit_attention(x) - unit_attention(y)).norm(dim=1).mean(),
    ),
    "cosine": (pykd.CosineFeatures(), lambda x, y: (1 - F.cosine_similarity(x, y, dim=1)).mean()),
    "review, height 5": (
        pykd.HierarchicalContext(),
        lambda x, y: (F.mse_loss(x, y) + pooled(x, y, 4) / 2 + pooled(x, y, 2) / 4 + pooled(x, y, 1) / 8) / 1.875,
    ),
    "selectivity": (pykd.NeuronSelectivity(), broadcast_selectivity),
    "variance of 1, mean over entries": (
        lambda x, y: pykd.get("VIDLoss")()(x, y, 0 * ONES),
        lambda x, y: F.mse_loss(x, y) / 2,
    ),
    "variance of 1 is half the squares": (
        lambda x, y: pykd.VariationalInformation()(x, y, 0 * ONES),
        lambda x, y: (x - y).pow(2).sum() / 6,
    ),
    "no margin is a ReLU": (
        lambda x, y: pykd.Overhaul(entry_reduction="mean")(x.relu(), y, 0 * ONES),
        lambda x, y: F.mse_loss(x.relu(), y.relu()),
    ),
    "gram": (
        pykd.FlowOfSolution(entry_reduction="mean"),
        lambda x, y: F.mse_loss(*(z.flatten(2) @ z.flatten(2).mT / 30 for z in (x, y))),
    ),
    "pearson": (
        pykd.PearsonFeatures(),
        lambda x, y: F.mse_loss(standardised(x), standardised(y)) / 2 * 90 / 89,
    ),
    "boundaries": (
        pykd.ActivationBoundaries(),
        lambda x, y: ((x + 1) ** 2 * ((x > -1) & (y <= 0)) + (x - 1) ** 2 * ((x <= 1) & (y > 0))).sum() / 3,
    ),
    "factors": (
        pykd.get("FTLoss")(),
        lambda x, y: F.l1_loss(F.normalize(x.flatten(1)), F.normalize(y.flatten(1))),
    ),
    "adaptation": (
        pykd.FactorTransfer(norm="l1"),
        lambda x, y: (F.normalize(x.flatten(1), p=1) - F.normalize(y.flatten(1), p=1)).abs().sum() / 3,
    ),
    "recipe": (pykd.SimpleRecipe(), lambda x, y: (x - y).abs().pow(4).sum().log()),
    "variance of 1, mean": (
        lambda x, y: pykd.PrimeAware(epsilon=1e-9)(x.flatten(1), y.flatten(1), torch.zeros(3, 120).double()),
        F.mse_loss,
    ),
    "patient": (
        lambda x, y: pykd.PatientKD(layers=2)([x[:, 0, 0], x[:, 1, 0]], [y[:, 0, 0], y[:, 1, 0]]),
        lambda x, y: (F.normalize(x[:, :2, 0], dim=2) - F.normalize(y[:, :2, 0], dim=2)).pow(2).sum() / 3,
    ),
    "channels": (
        lambda x, y: pykd.ChannelDistillation()([x], [y]),
        lambda x, y: (x.mean((2, 3)) - y.mean((2, 3))).pow(2).mean(),
    ),
    "even attention": (
        lambda x, y: pykd.AttentiveFeatures()(x, y, torch.ones(3, 4).double()),
        lambda x, y: F.mse_loss(F.normalize(x.flatten(2), dim=2), F.normalize(y.flatten(2), dim=2)),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_number_as_elsewhere(name):
    loss, other = SAME[name]
    torch.testing.assert_close(loss(STUDENT, TEACHER), other(STUDENT, TEACHER), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient(loss, STUDENT, TEACHER), gradient(other, STUDENT, TEACHER), rtol=1e-5, atol=1e-9
    )


# ---- Relations ---------------------------------------------------------------------------------


def test_weights_of_tokens_are_a_mean_over_the_tokens_of_a_mask():
    student, teacher = maps(2, 5, 3), maps(2, 5, 3, seed=1)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    for loss, kept in (
        (pykd.Hint(), F.mse_loss(student[mask], teacher[mask])),
        (pykd.CosineFeatures(), (1 - F.cosine_similarity(student[mask], teacher[mask])).mean()),
    ):
        torch.testing.assert_close(loss(student, teacher, mask), kept)


def test_cosine_is_half_the_squared_distance_of_directions():
    student, teacher = maps(2, 5, 3), maps(2, 5, 3, seed=1)
    torch.testing.assert_close(pykd.CosineFeatures()(student, teacher), pykd.FeatureL2()(student, teacher) / 2)
    for kernels in ("off", "on"):  # as F.cosine_similarity has it
        assert pykd.CosineFeatures()(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), kernels=kernels) == 1


@pytest.mark.parametrize(
    "loss", [pykd.AttentionTransfer(), *map(pykd.NeuronSelectivity, ("polynomial", "linear", "gaussian"))]
)
def test_maps_of_other_channels_that_say_the_same(loss):
    """Losses whose student and teacher have channels of their own: 0 and without a gradient where they agree, and even."""
    assert loss(STUDENT, STUDENT) == pytest.approx(0, abs=1e-14)
    assert gradient(loss, STUDENT, STUDENT).abs().max() < 1e-14
    twice = torch.cat([TEACHER, TEACHER.flip(1)], dim=1)
    assert loss(twice, TEACHER) == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(loss(STUDENT, twice), loss(twice, STUDENT))


def test_flows_of_other_sizes_that_say_the_same():
    loss, doubled = pykd.FlowOfSolution(), STUDENT.repeat(1, 1, 2, 1)
    assert loss(doubled, STUDENT) == pytest.approx(0, abs=1e-20)
    assert loss(doubled, STUDENT, doubled[:, :2], STUDENT[:, :2]) == pytest.approx(0, abs=1e-20)
    for given in ({"student_later_features": STUDENT}, {"teacher_later_features": TEACHER}):
        with pytest.raises(ValueError, match="or neither, got one of them; pass the other one, too"):
            loss(STUDENT, TEACHER, **given)


# ---- Traps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (3, 8), (4, 4), (5, 1), (7, 7), (14, 13)])
def test_windows_of_every_size(size):
    student, teacher = maps(2, 3, *size), maps(2, 3, *size, seed=1)
    want, total, share = F.mse_loss(student, teacher), 1.0, 1.0
    for count in (4, 2, 1):
        if count < size[0]:
            share /= 2
            want, total = want + share * pooled(student, teacher, count), total + share
    torch.testing.assert_close(pykd.HierarchicalContext()(student, teacher), want / total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_channel_that_does_not_vary_has_no_correlation(dtype):
    """Whatever its mean: rounding is no variation."""
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    student[:, 0], teacher[:, 1] = 3.3, 1e4 / 3
    both = student.clone()
    both[:, 1] = 0.1
    correlation = pykd.PearsonFeatures()
    rest = correlation(student[:, 2:], teacher[:, 2:]) / 2
    torch.testing.assert_close(correlation(student, teacher), rest + 0.25)
    torch.testing.assert_close(correlation(both, teacher), rest + 0.125)
    assert (gradient(correlation, student, teacher)[:, 0] == 0).all()


def test_extreme_numbers_stay_finite():
    small = torch.tensor([[1e-3, 2e-3]])
    large = torch.tensor([[3e30, -1e20]])
    for loss, wanted in (
        (pykd.SimpleRecipe(), 4 * torch.tensor(3e30).log()),
        (pykd.Hint(distance="smooth_l1"), 1.5e30),
    ):
        torch.testing.assert_close(loss(large, small), torch.as_tensor(wanted))
        assert gradient(loss, large, small).isfinite().all()
    equal = pykd.SimpleRecipe()(small, small)
    torch.testing.assert_close(equal, torch.tensor(1e-12).log())
    sure = torch.full((1, 2), -1e4).requires_grad_()
    unsure = torch.full((1, 2), 1e4).requires_grad_()
    for log_variance in (sure, unsure):
        value = pykd.PrimeAware()(small, 2 * small, log_variance)
        assert value.isfinite() and value.backward() is None and log_variance.grad.isfinite().all()


@pytest.mark.parametrize("power", [1.0, 2.0, 20.0])
def test_attention_keeps_small_powers(power):
    """Many places with one strength: their powers are small, their attention is not."""
    student = torch.full((1, 1, 300, 300), 1e-3)
    teacher = student.clone()
    teacher[..., 150:] = 0
    value = pykd.AttentionTransfer(power=power)(student, teacher)
    torch.testing.assert_close(value, torch.tensor((2 - 2**0.5) ** 0.5))
