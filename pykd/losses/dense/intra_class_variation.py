"""Intra-class feature variation: how far every pixel is from the mean of its class."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, ops, register, whole
from pykd.definition.reference import reduce_samples, unit


def _variation(features: Tensor, left_out: Tensor, members: Tensor) -> Tensor:
    """Cosine of every pixel with the mean of its class, ``(batch, places)``.

    Args:
        features: ``(batch, channels, height, width)``.
        left_out: ``(batch, height, width)``, the pixels that have no part in anything.
        members: ``(batch, places, classes)``, 1 for the class of a pixel.
    """
    # Relative to the whole image: sums of long features would not fit.
    x = ops.normalize(ops.upcast(features).masked_fill(left_out.unsqueeze(1), 0.0), dim=[1, 2, 3]).flatten(2)
    members = members.to(x.dtype)
    means = ops.matmul(x, members) / members.sum(dim=1, keepdim=True).clamp(min=1.0)
    own_mean = ops.matmul(means, members.transpose(1, 2))
    return (ops.normalize(x, dim=[1]) * ops.normalize(own_mean, dim=[1])).sum(dim=1)


def intra_class_variation(
    student_features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    classes: int,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Squared difference of every pixel's cosine with the mean of its class; see :class:`IntraClassVariation`."""
    weight = ops.weigh(labels != ignore_index, sample_weight)
    left_out = weight == 0
    numbers = torch.arange(classes, device=labels.device)
    members = (labels.unsqueeze(-1) == numbers) & ~left_out.unsqueeze(-1)
    members = members.flatten(1, 2)
    student = _variation(student_features, left_out, members)
    teacher = _variation(teacher_features.detach(), left_out, members)
    values = torch.square(student - teacher).reshape(labels.shape)
    # A label out of range must not pass for a class without a mean.
    valid = (labels >= 0) & (labels < classes)
    return ops.reduce(torch.where(valid, values, float("nan")), weight, reduction)


@register(intra_class_variation)
class IntraClassVariation(Loss):
    r"""Squared difference between the student's and the teacher's cosines of every pixel with the mean of its class.

    .. math:: \ell_{bi} = \big(\cos(x_{bi}, \bar x_{b, k(bi)}) - \cos(y_{bi}, \bar y_{b, k(bi)})\big)^2, \quad
              \bar x_{bk} = \mathrm{mean} \, \{x_{bj} : k(bj) = k\}

    for the pixels i of an image, of the classes k(bi), with means over the kept pixels of that image. Every pixel is a sample.

    Args:
        classes: how many there are, at least 1; 19 in Cityscapes.
        ignore_index: a label that marks pixels to leave out, of the means as well.
        reduction: ``"mean"``: Σ w·ℓ / Σ w over the kept pixels of the batch, with w = ``sample_weight`` or 1; 0 where
            nothing is kept; ``"sum"``; ``"none"``: ``(batch, height, width)``.

    Inputs:
        student_features: ``(batch, channels, height, width)``, any floating type; receives the gradient.
        teacher_features: ``(batch, teacher_channels, height, width)``, same type; constant.
        labels: ``(batch, height, width)`` int64, classes from 0 to ``classes`` − 1 or ``ignore_index``, of the size of the maps
            (resize a larger label map by its nearest pixels); constant.
        sample_weight: optional ``(batch, height, width)``, at least 0, of any floating type, or a mask (bool or integers);
            constant. A pixel of weight 0 has no part in value and gradient, nor in the mean of its class, whatever it
            holds; other weights do not move the means.

    Returns:
        Between 0 and 4, no unit; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which are computed in
        float32. A class with a single pixel in an image adds 0. A pixel (or a mean) whose channels are all 0 has the cosine 0
        and the gradient 0. NaN in an input, and a label out of range, give NaN.

    Raises:
        ValueError: for fewer than 1 class, shapes that do not fit, an empty batch.

    Who differs: in CIRKD's and TorchDistiller's (the authors') CriterionIFV an ignored pixel adds 0 and counts in the mean, and
    means are divided by the number of pixels plus 1e-6.

    Example:
        Two pixels of one class, at right angles to the student and alike to the teacher, whose cosines with their mean are
        1/√2 and 1.

        >>> student, teacher = torch.eye(2).reshape(1, 2, 1, 2), torch.ones(1, 1, 1, 2)
        >>> IntraClassVariation(classes=2)(student, teacher, torch.tensor([[[1, 1]]]))
        tensor(0.0858)

    References:
        Wang et al.: Intra-class Feature Variation Distillation for Semantic Segmentation, ECCV 2020.
    """

    inputs = {
        "student_features": Spec("batch channels height width", grad=True, like="teacher_features"),
        "teacher_features": Spec("batch teacher_channels height width"),
        "labels": Spec("batch height width", dtype="int64", draw="indices"),
        "sample_weight": Spec("batch height width", dtype="weight", optional=True, draw="weights"),
    }
    sample_axes = ("batch height width",)
    cases = (
        Case({"classes": 2}),
        Case({"ignore_index": 1, "reduction": "sum"}),
        Case({"classes": 3}, optional=("sample_weight",)),
    )
    aliases = ("IFVD", "IFV", "CriterionIFV")

    classes: int = whole(default=19, minimum=1, maximum=10_000)
    ignore_index: int = whole(default=255)

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, labels, sample_weight=None):
        weights = np.ones(np.shape(labels)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        weights = np.where(np.asarray(labels) == self.ignore_index, 0.0, weights)
        values = []
        for x, y, own_labels, counts in zip(student_features, teacher_features, labels, weights, strict=True):
            cosines = [_cosines(features, own_labels.ravel(), counts.ravel()) for features in (x, y)]
            values += [(s - t) ** 2 for s, t in zip(*cosines, strict=True)]
        return reduce_samples(values, weights, self.reduction, np.shape(labels))


def _cosines(features, labels, counts):
    """Of every kept pixel of one image with the mean of its class; 0 for the others."""
    kept = np.flatnonzero(counts)
    pixels = unit(np.where(counts != 0, features.reshape(len(features), -1), 0.0).ravel()).reshape(len(features), -1).T
    means = {label: np.mean([pixels[i] for i in kept if labels[i] == label], axis=0) for label in labels[kept]}
    return [unit(pixel) @ unit(means[labels[i]]) if i in kept else 0.0 for i, pixel in enumerate(pixels)]
