"""A loss on feature maps, with a mask of places: see tests/test_new_loss.py."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, ops, register
from pykd.definition.reference import reduce_samples, unit


def _attention(maps: Tensor, weight: Tensor | None, seen: Tensor | None) -> Tensor:
    # Normalised before they are squared, too: the squares of long maps would not fit.
    energy = torch.square(ops.normalize(ops.upcast(ops.without_left_out(maps, weight)), dim=[1, 2, 3])).sum(dim=1)
    if seen is not None:
        energy = energy * ops.upcast(seen).to(energy.dtype)
    return ops.normalize(energy.flatten(1), dim=[-1])


def attention_maps(
    student_maps: Tensor,
    teacher_maps: Tensor,
    sample_weight: Tensor | None,
    seen: Tensor | None,
    reduction: str,
) -> Tensor:
    """Squared distance of normalised attention; see :class:`AttentionMaps`."""
    weight = ops.optional_weight(sample_weight)
    places = ops.optional_weight(seen)
    x = _attention(student_maps, weight, places)
    y = _attention(teacher_maps.detach(), weight, places)
    return ops.reduce(torch.square(x - y).sum(dim=-1), weight, reduction)


@register(attention_maps)
class AttentionMaps(Loss):
    r"""Squared distance between where the student's and the teacher's activations are.

    .. math:: \ell_b = \lVert \hat a(s_b) - \hat a(t_b) \rVert^2, \quad a(x)_{hw} = m_{hw} \sum_c x_{chw}^2

    Args:
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Inputs:
        student_maps: ``(batch, depth, height, width)``; receives the gradient.
        teacher_maps: ``(batch, teacher_depth, height, width)``; constant.
        sample_weight: optional ``(batch,)``.
        seen: optional ``(batch, height, width)``, a mask of places.

    Returns:
        From 0 to 2.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> AttentionMaps()(torch.ones(1, 2, 1, 2), torch.ones(1, 3, 1, 2))
        tensor(0.)

    References:
        Zagoruyko, Komodakis: Paying More Attention to Attention, 2017, arXiv:1612.03928.
    """

    inputs = {
        "student_maps": Spec("batch depth height width", grad=True),
        "teacher_maps": Spec("batch teacher_depth height width"),
        "sample_weight": Spec("batch", dtype="weight", optional=True, draw="weights"),
        "seen": Spec("batch height width", dtype="weight", optional=True, draw="mask"),
    }
    cases = (Case(), Case({"reduction": "sum"}, optional=("sample_weight", "seen")))

    def properties(self) -> Properties:
        return Properties(feature_scale=True)

    def reference(self, student_maps, teacher_maps, sample_weight=None, seen=None):
        values = []
        for b, (s, t) in enumerate(zip(student_maps, teacher_maps, strict=True)):
            mask = 1.0 if seen is None else np.asarray(seen[b], np.float64)
            s, t = (unit(maps.ravel()).reshape(maps.shape) for maps in (s, t))  # squares of long ones would not fit
            x, y = (unit((mask * (maps**2).sum(axis=0)).ravel()) for maps in (s, t))
            values.append(((x - y) ** 2).sum())
        return reduce_samples(values, sample_weight, self.reduction)
