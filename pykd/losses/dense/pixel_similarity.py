"""Pixel-wise similarity: how attention moves from one layer to a later one."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register
from pykd.definition.reference import reduce_samples, unit


def _attention(features: Tensor, weight: Tensor | None) -> Tensor:
    """Normalised energy of every place, ``(batch, places)``."""
    # Normalised before they are squared, too: the squares of long features would not fit.
    x = ops.normalize(ops.upcast(ops.without_left_out(features, weight)), dim=[1, 2, 3])
    return ops.normalize(torch.square(x).sum(dim=1).flatten(1), dim=[1])


def _residual(features: Tensor, later_features: Tensor, weight: Tensor | None) -> Tensor:
    return ops.normalize(_attention(later_features, weight) - _attention(features, weight), dim=[1])


def pixel_similarity(
    student_features: Tensor,
    student_later_features: Tensor,
    teacher_features: Tensor,
    teacher_later_features: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Mean squared difference of residual attention maps; see :class:`PixelSimilarity`."""
    weight = ops.optional_weight(sample_weight)
    student = _residual(student_features, student_later_features, weight)
    teacher = _residual(teacher_features.detach(), teacher_later_features.detach(), weight)
    return ops.reduce(torch.square(student - teacher).mean(dim=1), weight, reduction)


@register(pixel_similarity)
class PixelSimilarity(Loss):
    r"""Mean squared difference between the student's and the teacher's residual attention: what changes between two layers.

    .. math:: \ell_b = \frac{1}{HW} \lVert r^s_b - r^t_b \rVert^2, \quad
              r = \frac{a(G) - a(F)}{\lVert a(G) - a(F) \rVert}, \quad
              a(F)_i = \frac{\sum_c F_{ci}^2}{\sqrt{\sum_j (\sum_c F_{cj}^2)^2}}

    with the features F of a layer and G of a later one, at height · width places i: the pixel-wise part of double similarity
    distillation, whose other is ``category_similarity``. Several pairs of layers are terms (or parts of one) of a
    composition, each with a share of the weight; the paper takes every pair.

    Args:
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: ``(batch, channels, height, width)``, any floating type; receives the gradient.
        student_later_features: ``(batch, later_channels, height, width)``, same type; receives the gradient. Resize one of
            the layers first where they differ in size.
        teacher_features: ``(batch, teacher_channels, height, width)``, same type; constant.
        teacher_later_features: ``(batch, teacher_later_channels, height, width)``, same type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Between 0 and 4 / (height · width), no unit; a scalar unless ``reduction="none"``. float32 for half-precision
        inputs, which are computed in float32. Features that are all 0 have no attention, two layers with the same attention
        no residual: 0, with the gradient 0. NaN in an input gives NaN.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Who differs: CIRKD's CriterionPSD takes lists of layers and the mean over their pairs.

    Example:
        The teacher's attention moves to the second place, the student's to the first.

        >>> left, right = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> PixelSimilarity()(right, left, left, right)
        tensor(2.0000)

    References:
        Feng et al.: Double Similarity Distillation for Semantic Image Segmentation, IEEE Transactions on Image Processing, 2021.
    """

    inputs = {
        "student_features": Spec("batch channels height width", grad=True, like="teacher_features"),
        "student_later_features": Spec("batch later_channels height width", grad=True, like="teacher_later_features"),
        "teacher_features": Spec("batch teacher_channels height width"),
        "teacher_later_features": Spec("batch teacher_later_channels height width"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (Case(), Case({"reduction": "sum"}, optional=("sample_weight",)))
    aliases = ("PSD", "CriterionPSD")

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)

    def reference(
        self,
        student_features,
        student_later_features,
        teacher_features,
        teacher_later_features,
        sample_weight=None,
    ):
        def residual(features, later):
            return unit(attention(later) - attention(features))

        def attention(features):
            relative = unit(features.ravel()).reshape(features.shape)  # squares of long features would not fit
            return unit((relative**2).sum(axis=0).ravel())

        students = zip(student_features, student_later_features, strict=True)
        teachers = zip(teacher_features, teacher_later_features, strict=True)
        values = [np.mean((residual(*s) - residual(*t)) ** 2) for s, t in zip(students, teachers, strict=True)]
        return reduce_samples(values, sample_weight, self.reduction)
