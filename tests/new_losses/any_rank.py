"""Squared difference of vectors, tokens or maps, each compared with its like: see tests/test_new_loss.py."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, ops, register
from pykd.definition.reference import reduce_samples


def any_rank(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    seen: Tensor | None,
    reduction: str,
) -> Tensor:
    """Mean squared difference of features; see :class:`AnyRank`."""
    weight = ops.optional_weight(sample_weight)
    x = ops.upcast(ops.without_left_out(student_features, weight))
    y = ops.upcast(ops.without_left_out(teacher_features.detach(), weight))
    squares = torch.square(x - y)
    places = ops.optional_weight(seen)
    if places is not None:
        if squares.dim() > places.dim() and squares.dim() == 4:
            places = places.unsqueeze(1)
        elif squares.dim() > places.dim():
            places = places.unsqueeze(-1)
        squares = squares * places.to(squares.dtype)
    if weight is not None and weight.dim() == 2:
        return ops.reduce(squares.mean(dim=-1), weight, reduction)
    return ops.reduce(squares.flatten(1).mean(dim=1), weight, reduction)


@register(any_rank)
class AnyRank(Loss):
    r"""Mean squared difference between the student's and the teacher's features of any rank.

    .. math:: \ell_b = \mathrm{mean} \, m_b (x_b - y_b)^2

    Args:
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Inputs:
        student_features: ``(batch, channels)``, ``(batch, tokens, channels)`` or ``(batch, channels, height, width)``.
        teacher_features: the same shape; constant.
        sample_weight: optional ``(batch,)``, or ``(batch, tokens)`` where tokens are samples.
        seen: optional, a mask: ``(batch, tokens)`` or ``(batch, height, width)``.

    Returns:
        At least 0.

    Raises:
        ValueError: for shapes that do not fit, or that do not go together.

    Example:
        >>> AnyRank()(torch.ones(1, 2, 1, 2), torch.zeros(1, 2, 1, 2))
        tensor(1.)

    References:
        Romero et al.: FitNets, 2015, arXiv:1412.6550.
    """

    inputs = {
        "student_features": tuple(
            Spec(axes, grad=True, like="teacher_features")
            for axes in ("batch channels", "batch tokens channels", "batch channels height width")
        ),
        "teacher_features": tuple(
            map(Spec, ("batch channels", "batch tokens channels", "batch channels height width"))
        ),
        "sample_weight": Spec("batch", dtype="weight", optional=True, draw="weights"),
        "seen": tuple(
            Spec(axes, dtype="weight", optional=True, draw="mask") for axes in ("batch height width", "batch tokens")
        ),
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(),
        Case({"reduction": "sum"}, layouts={"student_features": "batch tokens channels"}, optional=("seen",)),
        Case(layouts={"teacher_features": "batch channels height width"}, optional=("sample_weight", "seen")),
        Case(layouts={"sample_weight": "batch tokens"}, optional=("sample_weight", "seen")),
    )
    aliases = ("of-any-rank",)

    def properties(self) -> Properties:
        return Properties(feature_scale="lengths count", zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None, seen=None):
        squares = (np.asarray(student_features) - teacher_features) ** 2
        if seen is not None:
            squares = squares * (seen[:, None] if squares.ndim == 4 else seen[..., None])
        if np.ndim(sample_weight) == 2:
            values = [one.mean() for row in squares for one in row]
            return reduce_samples(values, sample_weight, self.reduction, np.shape(sample_weight))
        return reduce_samples([one.mean() for one in squares], sample_weight, self.reduction)
