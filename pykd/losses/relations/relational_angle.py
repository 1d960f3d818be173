"""Relational knowledge distillation of angles: the angles of the triangles that samples make."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Properties, ops, register
from pykd.losses.relations._shared import Relation, centred, numpy_kept, numpy_smooth_l1, smooth_l1


def _cosines(embeddings: Tensor, weight: Tensor | None) -> Tensor:
    """``[j, i, k]``: the cosine of the angle at sample j between samples i and k; 0 where one of them coincides with j."""
    x = centred(ops.upcast(ops.without_left_out(embeddings, weight)), weight)
    distances = ops.distances(x)
    apart = distances.detach() != 0
    inverse = torch.where(apart, 1.0 / torch.where(apart, distances, 1.0), 0.0)
    # (x_i − x_j)·(x_k − x_j) of the products of all pairs: no tensor of pairs times channels.
    products = ops.matmul(x, x.transpose(0, 1))
    own = (x * x).sum(dim=-1, keepdim=True) / 2 - products  # [j, i]: half of ‖x_j‖², less x_i·x_j
    spans = products.unsqueeze(0) + (own.unsqueeze(2) + own.unsqueeze(1))
    return spans * (inverse.unsqueeze(2) * inverse.unsqueeze(1))


def relational_angle(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Smooth L1 between cosines of angles; see :class:`RelationalAngle`."""
    weight = ops.optional_weight(sample_weight)
    teacher = _cosines(teacher_embeddings.detach(), weight)
    values = smooth_l1(_cosines(student_embeddings, weight) - teacher)
    if weight is None:
        return values.mean()
    shares = ops.shares(weight.to(values.dtype), "mean").unsqueeze(1)
    pairs = ops.matmul(values, shares).squeeze(2)
    return ops.matmul(shares.transpose(0, 1), ops.matmul(pairs, shares)).sum()


@register("relational_angle")
class RelationalAngle(Relation):
    r"""Smooth L1 distance between the student's and the teacher's cosines of the angles that three samples make (RKD-A).

    .. math:: \ell = \frac1{N^3} \sum_{ijk} h\big(\psi_{ijk}(x) - \psi_{ijk}(y)\big), \quad
              \psi_{ijk}(x) = \frac{x_i - x_j}{\lVert x_i - x_j\rVert} \cdot \frac{x_k - x_j}{\lVert x_k - x_j\rVert}, \quad
              h(u) = \begin{cases} u^2/2 & |u| < 1 \\ |u| - 1/2 & \text{else} \end{cases}

    with the student's embeddings x and the teacher's y; ψ is 0 where i or k is j, or lies in its place.

    Args:
        reduction: ``"mean"`` alone; the mean over triples is part of the definition.

    Inputs:
        student_embeddings: ``(batch, channels)``, any floating type; receives the gradient.
        teacher_embeddings: ``(batch, teacher_channels)``, same type; constant. Only their angles are compared, so the
            widths may differ.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A triple
            weighs the product of its samples' weights, and the sum is divided by that of all N³ products. A sample of
            weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        A scalar without unit, from 0 to 1.5; 0 where all angles agree, for up to two samples, and where none is kept.
        float32 for half-precision inputs, which are computed in float32. A factor for all embeddings of one side, and a shift of
        them, changes nothing. Samples whose distance is lost in the rounding of their lengths coincide: cosine and
        gradient 0. NaN in an input gives NaN.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    There is no value per sample: every sample is compared with every other. Time and memory are O(batch³), without the
    channels: angles come of the products of pairs. 256 samples take 64 MiB for one tensor of triples in float32.

    Who differs: the paper sums over triples where its authors' code, RepDistiller, MDistiller and torchdistill take the mean
    over all N³ as here (their weight of 50 is for that mean). They hold all N² differences of embeddings, which is O(batch² ·
    channels) more. MMRazor lets the teacher have a gradient.

    Example:
        A right angle at the second sample to the student, a straight one to the teacher.

        >>> student = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
        >>> RelationalAngle()(student, teacher)
        tensor(0.0434)

    References:
        Park et al.: Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
    """

    aliases = ("RKD-A", "AngleWiseRKD")
    paper = "Park et al. 2019, arXiv:1904.05068"

    def properties(self) -> Properties:
        return Properties(
            feature_scale="a factor for all samples drops out, one for each does not",
            zero_when_equal=True,
            symmetric=True,
        )

    def reference(self, student_embeddings, teacher_embeddings, sample_weight=None):
        """Triple by triple, from the definition."""
        weights, student, teacher = numpy_kept(sample_weight, student_embeddings, teacher_embeddings)
        n = range(len(weights))

        def directions(points):
            return [[_direction(a - b) for a in points] for b in points]  # [j][i]: from j to i

        e, f = directions(student), directions(teacher)
        total = 0.0
        for i, j, k in ((i, j, k) for i in n for j in n for k in n):
            total += weights[i] * weights[j] * weights[k] * numpy_smooth_l1(e[j][i] @ e[j][k] - f[j][i] @ f[j][k])
        return total / weights.sum() ** 3 if len(weights) > 0 else 0.0


def _direction(difference):
    length = np.sqrt((difference**2).sum())
    return difference / length if length > 0 else difference
