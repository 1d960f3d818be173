"""Pair-wise distillation: which places of a feature map resemble each other."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register
from pykd.definition.reference import reduce_samples, unit


def _similarities(features: Tensor, weight: Tensor | None) -> Tensor:
    """Cosines of all pairs of places, ``(batch, places, places)``."""
    x = ops.normalize(ops.upcast(ops.without_left_out(features, weight)).flatten(2), dim=[1])
    return ops.matmul(x.transpose(1, 2), x)


def pair_wise(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Mean squared difference of the cosines of all pairs of places; see :class:`PairWise`."""
    weight = ops.optional_weight(sample_weight)
    difference = _similarities(student_features, weight) - _similarities(teacher_features.detach(), weight)
    return ops.reduce(torch.square(difference).flatten(1).mean(dim=1), weight, reduction)


@register(pair_wise)
class PairWise(Loss):
    r"""Mean squared difference between the student's and the teacher's cosines of all pairs of places of a feature map.

    .. math:: \ell_b = \frac{1}{(HW)^2} \sum_{i,j} \big(\cos(x_{bi}, x_{bj}) - \cos(y_{bi}, y_{bj})\big)^2

    where i and j go over the height · width places, each with its vector of channels. The paper pools the maps first, so that a
    place stands for a patch: pass pooled maps, such as
    ``F.max_pool2d(x, kernel, ceil_mode=True)`` with ``kernel = (height // 2, width // 2)`` in the authors' code, 2 × 2 in CIRKD's.

    Args:
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: ``(batch, channels, height, width)``, any floating type; receives the gradient.
        teacher_features: ``(batch, teacher_channels, height, width)``, same type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Between 0 and 4, no unit; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which are computed in
        float32. A place whose channels are all 0 has the cosine 0 with every other and with itself, and the gradient 0. NaN in
        an input gives NaN. Memory: two matrices of (height · width)² per sample.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Who differs: the authors' code takes the norms for constants, which gives another gradient for the same value, and
    adds 1e-8 to them; CIRKD's CriterionStructuralKD does neither.

    Example:
        Two places, alike to the student and at right angles to the teacher.

        >>> student, teacher = torch.ones(1, 1, 1, 2), torch.eye(2).reshape(1, 2, 1, 2)
        >>> PairWise()(student, teacher)
        tensor(0.5000)

    References:
        Liu et al.: Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019, arXiv:1903.04197.
    """

    inputs = {
        "student_features": Spec("batch channels height width", grad=True, like="teacher_features"),
        "teacher_features": Spec("batch teacher_channels height width"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (Case(), Case({"reduction": "sum"}, optional=("sample_weight",)))
    aliases = ("SKDS", "CriterionStructuralKD", "CriterionPairWiseforWholeFeatAfterPool")

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None):
        values = []
        for x, y in zip(student_features, teacher_features, strict=True):
            own, wanted = ([unit(place) for place in m.reshape(len(m), -1).T] for m in (x, y))
            places = range(len(own))
            values.append(np.mean([(own[i] @ own[j] - wanted[i] @ wanted[j]) ** 2 for i in places for j in places]))
        return reduce_samples(values, sample_weight, self.reduction)
