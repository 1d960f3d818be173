"""Losses of dense prediction: what they are on the pixels one by one, and where papers and code divide otherwise."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import pykd

NAN, INFINITE = float("nan"), float("inf")


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("form", ["kl", "cross_entropy"])
def test_pixel_wise_is_soft_target_of_the_pixels(form):
    maps = draw(3, 5, 4, 2)
    pixels = [x.permute(0, 2, 3, 1).flatten(0, 2) for x in maps]
    settings = {"temperature": 3.0, "form": form, "tau_squared": True}
    torch.testing.assert_close(pykd.PixelWise(**settings)(*maps), pykd.SoftTarget(**settings)(*pixels))
    mask = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0)) > 0.5
    got = pykd.PixelWise(**settings)(*maps, sample_weight=mask)
    torch.testing.assert_close(got, pykd.SoftTarget(**settings)(*(x[mask.flatten()] for x in pixels)))


def test_the_authors_pixel_wise_does_not_divide_by_the_batch():
    student, teacher = draw(3, 5, 4, 2)
    want = -(teacher.softmax(1) * student.log_softmax(1)).sum() / (4 * 2)
    got = pykd.PixelWise(form="cross_entropy", reduction="sum")(student, teacher)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_channel_wise_is_soft_target_of_the_channels(temperature):
    maps = draw(3, 5, 4, 2)
    rows = [x.flatten(2).flatten(0, 1) for x in maps]
    want = pykd.SoftTarget(temperature=temperature, form="kl", tau_squared=True)(*rows)
    torch.testing.assert_close(pykd.ChannelWise(temperature=temperature)(*maps), want)


def test_a_place_that_is_masked_in_both_is_as_good_as_absent():
    maps = draw(2, 3, 1, 4)
    more = [torch.cat([x, torch.full((2, 3, 1, 1), -INFINITE, dtype=x.dtype)], dim=3) for x in maps]
    torch.testing.assert_close(pykd.ChannelWise()(*more), pykd.ChannelWise()(*maps))


def variation(*tensors, labels, **settings):
    return pykd.IntraClassVariation(classes=3, **settings)(*tensors, labels)


def test_ignored_pixels_have_no_part_in_the_means():
    student, teacher = draw(2, 3, 1, 6)
    labels = torch.tensor([[[0, 1, 0, 1, 255, 255]], [[2, 2, 2, 0, 0, 255]]])
    values = variation(student, teacher, labels=labels, reduction="none")
    assert (values[labels == 255] == 0).all()
    first = variation(student[:1, :, :, :4], teacher[:1, :, :, :4], labels=labels[:1, :, :4], reduction="none")
    torch.testing.assert_close(values[:1, :, :4], first)
    torch.testing.assert_close(variation(student, teacher, labels=labels), values.sum() / (labels != 255).sum())
    for poison in (NAN, INFINITE):
        spoilt = student.masked_fill((labels == 255).unsqueeze(1), poison).requires_grad_()
        value = variation(spoilt, teacher, labels=labels, reduction="sum")
        value.backward()
        torch.testing.assert_close(value, values.sum())
        assert torch.isfinite(spoilt.grad).all()


def test_a_label_out_of_range_is_nan():
    maps = draw(1, 3, 1, 2)
    for label in (3, -1):
        assert torch.isnan(variation(*maps, labels=torch.tensor([[[0, label]]])))


def test_a_class_of_one_pixel_does_not_vary():
    maps = draw(1, 3, 1, 3)
    values = variation(*maps, labels=torch.tensor([[[0, 1, 2]]]), reduction="none")
    torch.testing.assert_close(values, torch.zeros_like(values))


def test_cross_image_relations_are_the_mean_over_pairs_of_images():
    student, teacher = (F.normalize(x.flatten(2), dim=1) for x in (draw(3, 5, 2, 2)[0], draw(3, 4, 2, 2)[1]))
    want = 0.0
    for i, j in itertools.product(range(3), repeat=2):
        log_q = F.log_softmax(student[i].T @ student[j] / 0.1, dim=1)
        p = F.softmax(teacher[i].T @ teacher[j] / 0.1, dim=1)
        want += F.kl_div(log_q, p, reduction="batchmean") / 9
    got = pykd.CrossImageRelations()(student.unflatten(2, (2, 2)), teacher.unflatten(2, (2, 2)))
    torch.testing.assert_close(got, want)


def test_the_authors_localization_distillation_divides_by_the_bins():
    student, teacher = draw(6, 4, 17)
    summed = pykd.LocalizationDistillation(reduction="none")(student, teacher)
    mean = pykd.LocalizationDistillation(over_bins="mean", reduction="none")(student[:, 0], teacher[:, 0])
    torch.testing.assert_close(17 * mean, summed[:, 0])


def test_an_image_that_is_all_foreground_has_no_background():
    maps = draw(1, 3, 2, 2)
    loss = pykd.FocalDistillation(foreground_weight=0.0, attention_weight=0.0, background_weight=1.0)
    assert loss(*maps, torch.ones(1, 2, 2)) == 0
    assert loss(*maps, torch.zeros(1, 2, 2)) > 0
