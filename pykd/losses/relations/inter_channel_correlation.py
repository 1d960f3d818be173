"""Inter-channel correlation: which channels of an image's features respond alike."""

import numpy as np
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register
from pykd.definition.reference import reduce_samples, unit
from pykd.fused.description import BlockPoint, Rows
from pykd.losses.relations._shared import squared_differences


def _channels(features: Tensor, weight: Tensor | None) -> Tensor:
    """``(batch, channels, positions)`` of maps or tokens."""
    x = ops.upcast(ops.without_left_out(features, weight))
    return x.flatten(2) if x.dim() == 4 else x.transpose(1, 2)


def _correlations(channels: Tensor) -> Tensor:
    x = ops.normalize(channels, dim=[1, 2])  # which changes no correlation; products of long ones would not fit
    return ops.normalize(ops.matmul(x, x.transpose(1, 2)), dim=[2])


def _values(student: Tensor, teacher: Tensor) -> Tensor:
    """One value per image, of its channels."""
    return squared_differences(_correlations(student), _correlations(teacher)).sum(dim=2).mean(dim=1)


def inter_channel_correlation(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Squared difference of correlations of channels; see :class:`InterChannelCorrelation`."""
    weight = ops.optional_weight(sample_weight)
    student, teacher = _channels(student_features, weight), _channels(teacher_features.detach(), weight)
    return ops.reduce(_values(student, teacher), weight, reduction)


@register(inter_channel_correlation)
class InterChannelCorrelation(Loss):
    r"""Squared difference between the student's and the teacher's correlations of the channels of each image (ICKD-C).

    With the rows :math:`f_c` of an image's features, one per channel over all positions:

    .. math:: \ell_b = \frac1C \sum_{cd} \big(\hat G_{cd}(x_b) - \hat G_{cd}(y_b)\big)^2, \quad
              \hat G_{cd}(f) = \frac{f_c \cdot f_d}{\sqrt{\sum_e (f_c \cdot f_e)^2}}

    with the student's features x and the teacher's y.

    Args:
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: ``(batch, channels, height, width)`` or ``(batch, tokens, channels)``, any floating type; receives the
            gradient. Where the teacher has other channels, a layer maps them to the teacher's before.
        teacher_features: ``(batch, channels, height, width)`` or ``(batch, tokens, channels)`` of as many channels, with positions
            of its own, same type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Without unit, from 0 to 4; 0 where the correlations agree; a scalar unless ``reduction="none"``. float32 for
        half-precision inputs, which are computed in float32. A positive factor for all features of a sample changes nothing. A
        channel of zeros stays 0, with the gradient 0. NaN in an input gives NaN.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Memory is O(batch · channels²) beside the features.

    Who differs: the authors' code agrees; torchdistill's ChSimLoss divides by the number of samples once more.

    Example:
        >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> teacher = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])
        >>> InterChannelCorrelation()(student, teacher)
        tensor(0.5858)

    References:
        Liu et al.: Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation, ICCV 2021,
        arXiv:2202.03680.
    """

    inputs = {
        "student_features": (
            Spec("batch channels height width", grad=True, like="teacher_features"),
            Spec("batch tokens channels", grad=True, like="teacher_features"),
        ),
        "teacher_features": (
            Spec("batch channels teacher_height teacher_width"),
            Spec("batch teacher_tokens channels"),
        ),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case(),
        Case(
            {"reduction": "sum"},
            layouts={
                "student_features": "batch tokens channels",
                "teacher_features": "batch teacher_tokens channels",
            },
            optional=("sample_weight",),
        ),
    )
    aliases = ("ICKD", "ICKD-C", "ICKDLoss", "ChSimLoss")

    def relation(self, tensors):
        shape = tensors["student_features"].shape
        return shape[0], (shape[1] if len(shape) == 4 else shape[2]) ** 2

    def in_blocks(self, blocks: BlockPoint, student_features, teacher_features, sample_weight):
        weight = ops.optional_weight(sample_weight)
        student, teacher = _channels(student_features, weight), _channels(teacher_features.detach(), weight)
        return blocks.over_rows(_values, Rows(student), Rows(teacher), weight=weight, reduction=self.reduction)

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None):
        """Image by image, from the definition."""

        def correlations(features):
            features = unit(features.ravel()).reshape(features.shape)  # products of long ones would not fit
            rows = features.reshape(len(features), -1) if features.ndim == 3 else features.T
            return np.array([unit([f @ other for other in rows]) for f in rows])

        values = [
            ((correlations(x) - correlations(y)) ** 2).sum(axis=1).mean()
            for x, y in zip(student_features, teacher_features, strict=True)
        ]
        return reduce_samples(values, sample_weight, self.reduction)
