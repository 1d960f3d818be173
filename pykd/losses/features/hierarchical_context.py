"""Hierarchical context loss: compare maps as they are and averaged over ever larger windows."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, ops, register
from pykd.definition.reference import reduce_samples
from pykd.losses.features._shared import MAPS, compared, kept_features


def _windows(count: int, like: Tensor, axis: int) -> Tensor:
    """``(length of the axis, count)``: what each entry counts in the mean of each window; windows start at ⌊i·length / count⌋
    and end before ⌈(i + 1)·length / count⌉."""
    length = like.size(axis)
    number = torch.arange(count, device=like.device)
    start = number * length // count
    end = ((number + 1) * length + (count - 1)) // count
    entry = torch.arange(length, device=like.device).unsqueeze(1)
    inside = ((entry >= start) & (entry < end)).to(like.dtype)
    return inside / (end - start).to(like.dtype)


def hierarchical_context(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Squared differences of maps and of their averages; see :class:`HierarchicalContext`."""
    weight = ops.optional_weight(sample_weight)
    # An average of differences is the difference of averages.
    difference = kept_features(student_features, weight) - kept_features(teacher_features.detach(), weight)
    values = (difference * difference).flatten(1).mean(dim=-1)
    last_row = torch.arange(difference.size(2), device=difference.device).amax(dim=0)
    share = torch.ones_like(last_row, dtype=difference.dtype)
    total = share
    for count in [4, 2, 1]:
        # Whether the map is higher than there are windows: as a tensor, since one file serves every size.
        larger = last_row >= count
        share = torch.where(larger, share / 2, share)
        part = torch.where(larger, share, 0.0)
        pooled = ops.matmul(difference, _windows(count, difference, 3)).transpose(2, 3)
        pooled = ops.matmul(pooled, _windows(count, difference, 2))
        values = values + part * (pooled * pooled).flatten(1).mean(dim=-1)
        total = total + part
    return ops.reduce(values / total, weight, reduction)


@register(hierarchical_context)
class HierarchicalContext(Loss):
    r"""Mean squared difference of feature maps at several scales: as they are, and averaged over 4×4, 2×2 and 1×1 windows.

    .. math:: \ell_b = \frac{\sum_{i=0}^{n} 2^{-i} \, \mathrm{mean} \left(P_{k_i}(x_b) - P_{k_i}(y_b)\right)^2}
              {\sum_{i=0}^{n} 2^{-i}}

    :math:`P_{k_0}` is the map itself; :math:`k_1, \dots, k_n` are those of 4, 2 and 1 that are smaller than the height, and
    :math:`P_k` averages over k × k windows: in a height of h, window i (from 0) has the rows from ⌊i·h / k⌋ to before
    ⌈(i + 1)·h / k⌉, and so for the width.

    Args:
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: ``(batch, channels, height, width)``, of any size, any floating type; receives the gradient. In
            knowledge review it is what the fusion of the student's stages gives.
        teacher_features: the same shape and type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        At least 0, in squared units of the features; 0 when they agree; a scalar unless ``reduction="none"``. float32 for
        half-precision inputs, which are computed in float32.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Who differs: the authors' code, mdistiller and torchdistill's ``HierarchicalContextLoss`` compute the same for one
    stage, and add the stages up.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, -1.0], [3.0, 1.0]]]]), torch.zeros(1, 1, 2, 2)
        >>> HierarchicalContext()(student, teacher)  # (3 + ½ · 1) / 1.5
        tensor(2.3333)

    References:
        Chen et al.: Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044.
    """

    inputs = {**compared(MAPS), "sample_weight": SAMPLE_WEIGHT}
    cases = (Case(), Case({"reduction": "sum"}, optional=("sample_weight",)))
    aliases = ("HCL", "ReviewKD", "HierarchicalContextLoss")

    def properties(self) -> Properties:
        return Properties(feature_scale="a difference grows with its terms", zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None):
        def pooled(maps, count):
            height, width = maps.shape[1:]
            rows, columns = (
                [slice(i * n // count, -(-(i + 1) * n // count)) for i in range(count)] for n in (height, width)
            )
            return np.array([[maps[:, r, c].mean(axis=(1, 2)) for c in columns] for r in rows])

        values = []
        for x, y in zip(student_features, teacher_features, strict=True):
            levels = [np.mean((x - y) ** 2)]
            levels += [np.mean((pooled(x, k) - pooled(y, k)) ** 2) for k in (4, 2, 1) if k < x.shape[1]]
            shares = [0.5**i for i in range(len(levels))]
            values.append(np.dot(shares, levels) / sum(shares))
        return reduce_samples(values, sample_weight, self.reduction)
