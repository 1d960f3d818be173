"""What the generated tests of losses on logits cannot know: relations between losses, limits, and traps of numbers."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, softmax

import pykd
from pykd.definition import registry


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


@pytest.mark.parametrize("kernels", ["off", "on"])
def test_a_teacher_that_masks_all_classes_but_the_label_says_nothing_of_them(kernels):
    student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, -torch.inf, -torch.inf]])
    for temperature in (4.0, 10.0):
        loss = pykd.DecoupledKD(temperature, target_weight=0.0, kernels=kernels)
        assert loss.reference(student.numpy(), teacher.numpy(), [0]) == 0
        assert loss(student, teacher, torch.tensor([0])) == 0
        assert (gradient(loss, student, teacher, torch.tensor([0])) == 0).all()


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
    for loss in (pykd.LogitStandardization(), pykd.SphericalKD()):
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


# ---- Losses that are others under certain settings -----------------------------------------------


def kl(temperature=1.0, **settings):
    return pykd.SoftTarget(temperature, form="kl", **settings)


def test_the_divergence_of_hot_targets_is_a_squared_difference():
    """T² KL tends to half the mean square of logits whose mean is 0 (Hinton et al., section 2.1)."""
    student, teacher, _ = (x - x.double().mean(-1, keepdim=True) for x in drawn(6, 5))
    want = pykd.LogitMSE()(student, teacher) / 2
    torch.testing.assert_close(kl(1e4, tau_squared=True)(student, teacher), want, rtol=1e-3, atol=0)
    torch.testing.assert_close(pykd.LogitMSE(5.0, tau_squared=True)(student, teacher), 2 * want)


def test_a_transformed_teacher_is_a_softened_one():
    student, teacher, _ = drawn(6, 5)
    plain = pykd.TransformedTeacherMatching(0.25)(student, teacher)
    torch.testing.assert_close(plain, kl(4.0, soften_student=False)(student, teacher))
    weighted = pykd.TransformedTeacherMatching(1.0, weighted=True)(student, teacher)
    torch.testing.assert_close(weighted, kl()(student, teacher))


def test_a_student_as_good_as_the_teacher_counts_by_1_less_1_over_e():
    _, teacher, labels = drawn(6, 5)
    want = pykd.SoftTarget(2.0, tau_squared=True)(teacher, teacher) * (1 - torch.exp(torch.tensor(-1.0)))
    torch.testing.assert_close(pykd.WeightedSoftLabels()(teacher, teacher, labels), want, rtol=1e-5, atol=0)


def test_decisions_are_labels():
    student, teacher, _ = drawn(6, 5)
    want = pykd.HardTarget()(student, teacher.argmax(-1))
    torch.testing.assert_close(pykd.HardLabelDistillation()(student, teacher), want)


def test_on_the_sphere_lengths_do_not_matter():
    student, teacher, _ = drawn(6, 5)
    loss = pykd.SphericalKD(3.0)
    scaled = student / student.std(-1, keepdim=True) * teacher.std(-1, keepdim=True)
    torch.testing.assert_close(loss(student, teacher), kl(3.0, tau_squared=True)(scaled, teacher))
    torch.testing.assert_close(loss(1e-12 * student - 1, teacher), loss(student, teacher), rtol=1e-3, atol=0)


def test_a_virtual_teacher_is_a_teacher():
    student, _, labels = drawn(6, 5)
    virtual = torch.full((6, 5), 0.04, dtype=torch.float64).scatter(1, labels.unsqueeze(1), 0.84)
    got = pykd.VirtualTeacher(2.0, label_probability=0.84, soften_student=True)(student, labels)
    torch.testing.assert_close(got, kl(2.0)(student, virtual))


def test_a_teacher_that_is_right_is_not_adjusted():
    student, teacher, labels = drawn(6, 5)
    want = kl(4.0, tau_squared=True)(student, teacher)
    for adjustment in ("probability_shift", "label_smoothing"):
        loss = pykd.KnowledgeAdjustment(adjustment=adjustment)
        torch.testing.assert_close(loss(student, teacher, teacher.argmax(-1)), want)
        assert not torch.isclose(loss(student, teacher, labels), want)
    one, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]])  # of which two change places
    assert pykd.KnowledgeAdjustment()(other, one, torch.tensor([0])) == 0


@pytest.mark.parametrize("label", [0, 1])
def test_a_corrected_label_leads(label):
    """By the threshold where the teacher was wrong; by as much more as the threshold says where it was right."""
    p, threshold = torch.tensor([[0.2, 0.5, 0.3]]), 0.1
    share = (0.3 + threshold) / 1.3 if label == 0 else threshold / 0.5
    corrected = (1 - share) * p + share * torch.eye(3)[label]
    assert corrected[0, label] == pytest.approx(corrected[0, 1] + threshold if label == 0 else 0.6)
    loss = pykd.MiniFinetuning(threshold=threshold)
    assert loss(corrected.log(), p.log(), torch.tensor([label])) == pytest.approx(0, abs=1e-7)
    certain = pykd.MiniFinetuning(threshold=1.0)(p.log(), p.log(), torch.tensor([label]))
    torch.testing.assert_close(certain, -p[0, label].log())
    sure = torch.tensor([[0.0, 500.0, 0.0]])
    for unmoved in (0.0, 0.2):
        assert pykd.MiniFinetuning(threshold=unmoved)(sure, sure, torch.tensor([1])) == 0


def test_without_strength_every_sample_has_one_temperature():
    student, teacher, _ = drawn(6, 5)
    for weights in ("flsw", "cwsm"):
        still = pykd.DynamicTemperature(3.0, strength=0.0, weights=weights)
        torch.testing.assert_close(still(student, teacher), pykd.SoftTarget(3.0)(student, teacher))


def test_a_sigmoid_is_a_softmax_of_two():
    student, teacher, _ = drawn(6, 5)
    pairs = (torch.stack([x, torch.zeros_like(x)], -1).flatten(0, 1) for x in (student, teacher))
    got = pykd.SigmoidKD(3.0, over_classes="mean", tau_squared=True)(student, teacher)
    torch.testing.assert_close(got, kl(3.0, tau_squared=True)(*pairs))
    want = torch.nn.functional.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    torch.testing.assert_close(pykd.SigmoidKD(form="cross_entropy", over_classes="mean")(student, teacher), want)


def test_views_have_no_order():
    views = [drawn(6, 5, seed=seed)[0] for seed in range(3)]
    loss = pykd.AugMixJSD(reduction="none")
    mixture = sum(softmax(x, -1) for x in views) / 3
    want = sum(kl_div(mixture.log(), softmax(x, -1), reduction="none").sum(-1) for x in views) / 3
    for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
        torch.testing.assert_close(loss(*(views[i] for i in order)), want)
    assert (loss(views[0], views[0], views[0]) == 0).all()


# ---- Labels --------------------------------------------------------------------------------------


def labelled():
    registry.load_all()
    every = [cls for cls in registry.registered().values() if cls.family == "logits" and "labels" in cls.inputs]
    return [(cls, case) for cls in every for case in cls.cases if case.layouts.get("labels") != "batch tokens"]


@pytest.mark.parametrize(("cls", "case"), labelled(), ids=str)
def test_a_label_out_of_range_that_nobody_checks_is_nan(cls, case):
    """It must not pass for a class; one that is ignored is none."""
    loss = cls(**{**case.settings, "reduction": "none"})
    student, teacher, _ = drawn(4, 5)
    given = {"student_logits": student, "labels": torch.tensor([0, 7, -3, loss.ignore_index])}
    if "teacher_logits" in cls.inputs:
        given["teacher_logits"] = teacher
    values = getattr(pykd.functional, cls.name)(**given, **loss.settings())
    assert torch.isnan(values).tolist() == [False, True, True, False], values
    if loss.ignore_index < 0:
        assert values[3] == 0
