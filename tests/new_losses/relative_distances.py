"""A loss on relations, with embeddings of unequal depth: see tests/test_new_loss.py."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Loss, Properties, Spec, ops, register


def _relative(embeddings: Tensor) -> Tensor:
    x = ops.upcast(embeddings)
    x = x - x.detach().mean(dim=0, keepdim=True)  # distances stay, and keep their digits
    pairs = ops.distinct_pairs(x)
    distances = ops.squared_distances(x, x) * pairs
    mean = distances.sum() / pairs.sum().clamp(min=1.0)
    return distances / torch.where(mean == 0, torch.ones_like(mean), mean)


def relative_distances(student_points: Tensor, teacher_points: Tensor) -> Tensor:
    """Mean squared difference of relative squared distances; see :class:`RelativeDistances`."""
    return torch.square(_relative(student_points) - _relative(teacher_points.detach())).mean()


@register(relative_distances)
class RelativeDistances(Loss):
    r"""How differently student and teacher see which samples are far from each other.

    .. math:: \frac1{N^2} \sum_{ij} \left(\frac{d_{ij}}{\bar d} - \frac{e_{ij}}{\bar e}\right)^2

    with the squared distances d and e of student and teacher, each over its mean.

    Args:
        reduction: ``"mean"`` alone.

    Inputs:
        student_points: ``(batch, depth)``; receives the gradient.
        teacher_points: ``(batch, depth)``; constant.

    Returns:
        At least 0.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> RelativeDistances()(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]]))
        tensor(0.)

    References:
        Park et al.: Relational Knowledge Distillation, 2019, arXiv:1904.05068.
    """

    inputs = {
        "student_points": Spec("batch depth", grad=True, like="teacher_points"),
        "teacher_points": Spec("batch depth"),
    }
    couples_batch = "compares every sample of the batch with every other"

    def properties(self) -> Properties:
        return Properties(
            feature_scale="a factor for all samples drops out, one for each does not",
            zero_when_equal=True,
            symmetric=True,
        )

    def reference(self, student_points, teacher_points):
        def relative(points):
            d = np.array([[((a - b) ** 2).sum() for b in points] for a in points])
            mean = d.sum() / max(len(d) * (len(d) - 1), 1)
            return d / mean if mean != 0 else d

        return ((relative(student_points) - relative(teacher_points)) ** 2).mean()
