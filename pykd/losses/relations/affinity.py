"""Affinity distillation: which places of an image, or of a channel, respond alike."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, ops, register
from pykd.definition.reference import reduce_samples, unit
from pykd.fused.description import BlockPoint, Rows


def _root(squares: Tensor) -> Tensor:
    """Square roots; 0 with the gradient 0 where there is nothing to take one of."""
    nothing = squares <= 0
    return torch.where(nothing, 0.0, torch.sqrt(torch.where(nothing, 1.0, squares)))


def _whole_image(student: Tensor, teacher: Tensor) -> Tensor:
    """Of ``(batch, channels, positions)``: the norm of the difference of the cosines between positions."""
    x = ops.normalize(student, dim=[1])
    y = ops.normalize(teacher, dim=[1])
    difference = ops.matmul(x.transpose(1, 2), x) - ops.matmul(y.transpose(1, 2), y)
    return _root((difference * difference).sum(dim=[1, 2]))


def _per_channel(student: Tensor, teacher: Tensor) -> Tensor:
    """Of ``(batch, channels, positions)``: for every channel the norm of ``x xᵀ − y yᵀ``, summed."""
    x = ops.normalize(student, dim=[2])
    y = ops.normalize(teacher, dim=[2])
    # x xᵀ − y yᵀ is half of (x − y)(x + y)ᵀ and its transpose: its norm takes no matrix of positions.
    less, more = x - y, x + y
    across = (less * more).sum(dim=2)
    squares = ((less * less).sum(dim=2) * (more * more).sum(dim=2) + across * across) / 2
    return _root(squares).sum(dim=1)


def _positions(features: Tensor, weight: Tensor | None) -> Tensor:
    """``(batch, channels, positions)``."""
    return ops.upcast(ops.without_left_out(features, weight)).flatten(2)


def _values(student: Tensor, teacher: Tensor, per: str) -> Tensor:
    """One value per image."""
    values = _whole_image(student, teacher) if per == "image" else _per_channel(student, teacher)
    return values / student.size(2)


def affinity(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    per: str,
    reduction: str,
) -> Tensor:
    """Norm of the difference of affinities of positions; see :class:`Affinity`."""
    weight = ops.optional_weight(sample_weight)
    student, teacher = _positions(student_features, weight), _positions(teacher_features.detach(), weight)
    return ops.reduce(_values(student, teacher, per), weight, reduction)


@register(affinity)
class Affinity(Loss):
    r"""Distance between the student's and the teacher's affinities of the positions of each image (KTAAD).

    With the features :math:`x_{bp}` of position p, one number per channel, and HW positions:

    .. math:: \ell_b = \frac1{HW} \Big\lVert A(x_b) - A(y_b) \Big\rVert_F, \quad A_{pq}(x_b) = \cos(x_{bp}, x_{bq})

    torchdistill has the affinities of each channel by itself, and sums over channels: with the numbers
    :math:`x_{bc}` of channel c at all positions,

    .. math:: \ell_b = \frac1{HW} \sum_c \Big\lVert \hat x_{bc} \hat x_{bc}^\top - \hat y_{bc} \hat y_{bc}^\top \Big\rVert_F,
              \quad \hat x_{bc} = \frac{x_{bc}}{\lVert x_{bc}\rVert}

    Args:
        per: ``"image"``: cosines of positions over all channels, or ``"channel"``: torchdistill's.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: ``(batch, channels, height, width)``, any floating type; receives the gradient.
        teacher_features: ``(batch, channels, height, width)``, same type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Without unit, at least 0; 0 where the affinities agree, with the gradient 0; a scalar unless ``reduction="none"``. float32
        for half-precision inputs, which are computed in float32. A positive factor for all features of a sample changes
        nothing. A position (or channel) of zeros stays 0, with the gradient 0. NaN in an input gives NaN.

    Raises:
        ValueError: for another per, shapes that do not fit, an empty batch.

    Memory is O(batch · (height · width)²) beside the features with ``"image"``, and that of the features with ``"channel"``.

    Who differs: torchdistill's AffinityLoss is ``per="channel"``; it has no gradient where a channel is 0 or the affinities agree.

    Example:
        >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> teacher = torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]])
        >>> Affinity()(student, teacher)
        tensor(0.7071)

    References:
        He et al.: Knowledge Adaptation for Efficient Semantic Segmentation, CVPR 2019, arXiv:1903.04688.
    """

    inputs = {
        "student_features": Spec("batch channels height width", grad=True, like="teacher_features"),
        "teacher_features": Spec("batch channels height width"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case(),
        Case({"per": "channel", "reduction": "sum"}, optional=("sample_weight",)),
    )
    aliases = ("KTAAD", Alias("AffinityLoss", per="channel"))

    per: str = choice(("image", "channel"), default="image")

    def relation(self, tensors):
        samples, channels, height, width = tensors["student_features"].shape
        return samples, height * width * (height * width if self.per == "image" else channels)

    def in_blocks(self, blocks: BlockPoint, student_features, teacher_features, sample_weight):
        weight = ops.optional_weight(sample_weight)
        student, teacher = _positions(student_features, weight), _positions(teacher_features.detach(), weight)
        pieces = (Rows(student), Rows(teacher), self.per)
        return blocks.over_rows(_values, *pieces, weight=weight, reduction=self.reduction)

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None):
        """Image by image, from the definition."""

        def affinities(vectors):
            return np.array([[unit(u) @ unit(v) for v in vectors] for u in vectors])

        def outer(row):
            return np.outer(unit(row), unit(row))

        values = []
        for x, y in zip(student_features, teacher_features, strict=True):
            x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
            positions = x.shape[1]
            if self.per == "image":
                values.append(np.linalg.norm(affinities(x.T) - affinities(y.T)) / positions)
            else:
                norms = [np.linalg.norm(outer(a) - outer(b)) for a, b in zip(x, y, strict=True)]
                values.append(np.sum(norms) / positions)
        return reduce_samples(values, sample_weight, self.reduction)
