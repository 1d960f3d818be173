"""Relational knowledge distillation of angles: the angles of the triangles that samples make."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Properties, ops, register
from pykd.fused.description import BlockPoint, Piece, Rows
from pykd.losses.relations._shared import Relation, centred, numpy_kept, numpy_smooth_l1, smooth_l1


def _pairs(embeddings: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What angles are made of: products ``[i, k]``; of j and i half of ‖x_j‖² less x_i·x_j, and the inverse distance (or 0)."""
    x = centred(ops.upcast(ops.without_left_out(embeddings, weight)), weight)
    distances = ops.distances(x)
    apart = distances.detach() != 0
    inverse = torch.where(apart, 1.0 / torch.where(apart, distances, 1.0), 0.0)
    products = ops.matmul(x, x.transpose(0, 1))
    return products, (x * x).sum(dim=-1, keepdim=True) / 2 - products, inverse


def _cosines(products: Tensor, own: Tensor, inverse: Tensor) -> Tensor:
    """``[j, i, k]``: the cosine of the angle at sample j between samples i and k; 0 where one of them coincides with j."""
    # (x_i − x_j)·(x_k − x_j) of the products of all pairs: no tensor of pairs times channels.
    spans = products.unsqueeze(0) + (own.unsqueeze(2) + own.unsqueeze(1))
    return spans * (inverse.unsqueeze(2) * inverse.unsqueeze(1))


def _values(
    products: Tensor,
    own: Tensor,
    inverse: Tensor,
    teacher_products: Tensor,
    teacher_own: Tensor,
    teacher_inverse: Tensor,
    shares: Tensor | None,
) -> Tensor:
    """Of every sample j in a block of rows, the mean over the pairs of others."""
    teacher = _cosines(teacher_products, teacher_own, teacher_inverse)
    values = smooth_l1(_cosines(products, own, inverse), teacher)
    if shares is None:
        return values.mean(dim=[1, 2])
    column = shares.unsqueeze(1)
    return ops.matmul(ops.matmul(values, column).squeeze(2), column).squeeze(1)


def _shares(weight: Tensor | None, like: Tensor) -> Tensor | None:
    return None if weight is None else ops.shares(weight.to(like.dtype), "mean")


def relational_angle(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None,
) -> Tensor:
    """Smooth L1 between cosines of angles; see :class:`RelationalAngle`."""
    weight = ops.optional_weight(sample_weight)
    products, own, inverse = _pairs(student_embeddings, weight)
    teacher_products, teacher_own, teacher_inverse = _pairs(teacher_embeddings.detach(), weight)
    values = _values(products, own, inverse, teacher_products, teacher_own, teacher_inverse, _shares(weight, products))
    return ops.reduce(values, weight, "mean")


@register(relational_angle)
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
    From 64 samples on ``kernels="auto"`` goes sample by sample, which is O(batch²).

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

    def relation(self, tensors):
        samples = len(tensors["student_embeddings"])
        return samples, samples * samples

    def in_blocks(self, blocks: BlockPoint, student_embeddings, teacher_embeddings, sample_weight):
        weight = ops.optional_weight(sample_weight)
        pieces: list[Piece] = []
        for embeddings in (student_embeddings, teacher_embeddings.detach()):
            products, own, inverse = _pairs(embeddings, weight)
            pieces += [products, Rows(own), Rows(inverse)]
        return blocks.over_rows(_values, *pieces, _shares(weight, products), weight=weight)

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
