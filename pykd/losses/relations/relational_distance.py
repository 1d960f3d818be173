"""Relational knowledge distillation of distances: how far samples are from each other."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Properties, ops, register
from pykd.fused.description import BlockPoint, Piece
from pykd.losses.relations._shared import (
    Relation,
    alike,
    centred,
    centred_rows,
    kept,
    kept_products,
    numpy_kept,
    numpy_over_pairs,
    numpy_smooth_l1,
    over_pairs,
    smooth_l1,
)


def _divisor(mean: Tensor, count: Tensor) -> Tensor:
    """The mean over pairs of distinct samples, from that over all pairs, of which ``count`` are 0; 1 where it is 0."""
    mean = mean * count / (count - 1.0).clamp(min=1.0)
    return torch.where(mean == 0, torch.ones_like(mean), mean)


def _relative_distances(embeddings: Tensor, weight: Tensor | None) -> Tensor:
    """Distances over the mean of those of two distinct samples that are kept."""
    x = centred(ops.upcast(ops.without_left_out(embeddings, weight)), weight)
    distances = ops.distances(x)
    return distances / _divisor(over_pairs(distances, alike(x, weight)), kept(x, weight).sum())


def _values(
    products: Tensor,
    rows: Tensor,
    columns: Tensor,
    same: Tensor,
    divisor: Tensor,
    teacher_products: Tensor,
    teacher_rows: Tensor,
    teacher_columns: Tensor,
    teacher_same: Tensor,
    teacher_divisor: Tensor,
) -> Tensor:
    """The loss of every pair in a block of rows."""
    student = ops.distances_of(products, rows, columns, same) / divisor
    teacher = ops.distances_of(teacher_products, teacher_rows, teacher_columns, teacher_same) / teacher_divisor
    return smooth_l1(student, teacher)


def relational_distance(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None,
) -> Tensor:
    """Smooth L1 between relative distances; see :class:`RelationalDistance`."""
    weight = ops.optional_weight(sample_weight)
    student = _relative_distances(student_embeddings, weight)
    teacher = _relative_distances(teacher_embeddings.detach(), weight)
    return over_pairs(smooth_l1(student, teacher), weight)


@register(relational_distance)
class RelationalDistance(Relation):
    r"""Smooth L1 distance between the student's and the teacher's relative distances of samples from each other (RKD-D).

    With the Euclidean distances :math:`d_{ij}` of the student's embeddings, :math:`e_{ij}` of the teacher's, and their means
    :math:`\mu` over the ordered pairs of two distinct samples:

    .. math:: \ell = \frac1{N^2} \sum_{ij} h\left(\frac{d_{ij}}{\mu_d} - \frac{e_{ij}}{\mu_e}\right), \quad
              h(x) = \begin{cases} x^2/2 & |x| < 1 \\ |x| - 1/2 & \text{else} \end{cases}

    The gradient goes through the student's mean, too.

    Args:
        reduction: ``"mean"`` alone; the mean over pairs is part of the definition.

    Inputs:
        student_embeddings: ``(batch, channels)``, any floating type; receives the gradient.
        teacher_embeddings: ``(batch, teacher_channels)``, same type; constant. Only their distances are compared, so the
            widths may differ.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A pair
            weighs the product of its samples' weights: Σ w_i w_j h_ij / Σ w_i w_j. The means μ are those of all samples
            whose weight is not 0; one of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        A scalar without unit, at least 0; 0 where all relative distances agree, for a single sample, and where none is
        kept. float32 for half-precision inputs, which are computed in float32. A factor for all embeddings of one
        side changes nothing. Samples whose distance is lost in the rounding of their lengths coincide: distance and gradient
        0. NaN in an input gives NaN.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    There is no value per sample: every sample is compared with every other. The formula's memory is O(batch²) beside the
    embeddings; from 512 samples on ``kernels="auto"`` goes by blocks of rows, which is O(batch).

    Who differs: the paper sums over pairs where its authors' code, RepDistiller, MDistiller and torchdistill take the mean over
    all N² as here (their weight of 25 is for that mean); they take 1e-6 for the distance of samples that coincide.
    MMRazor divides every embedding by its length first, and lets the teacher have a gradient; PaddleSlim's μ is the mean over
    all N² pairs, which is (N − 1)/N of this one.

    Example:
        The student sees the third sample twice as far from the first as the second, the teacher three times as far.

        >>> student = torch.tensor([[0.0], [1.0], [2.0]])
        >>> teacher = torch.tensor([[0.0], [1.0], [3.0]])
        >>> RelationalDistance()(student, teacher)
        tensor(0.0139)

    References:
        Park et al.: Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
    """

    aliases = ("RKD-D", "DistanceWiseRKD")

    def in_blocks(self, blocks: BlockPoint, student_embeddings, teacher_embeddings, sample_weight):
        weight = ops.optional_weight(sample_weight)
        pieces: list[Piece] = []
        for embeddings in (teacher_embeddings.detach(), student_embeddings):
            x = ops.upcast(ops.without_left_out(embeddings, weight))
            own = kept_products(blocks.products(centred_rows(x, weight)))
            mean = blocks.over_pairs(ops.distances_of, *own, weight=alike(x, weight), symmetric=True)
            pieces = [*own, _divisor(mean, kept(x, weight).sum()), *pieces]
        return blocks.over_pairs(_values, *pieces, weight=weight, symmetric=True, last=True)

    def properties(self) -> Properties:
        return Properties(
            feature_scale="a factor for all samples drops out, one for each does not",
            zero_when_equal=True,
            symmetric=True,
        )

    def reference(self, student_embeddings, teacher_embeddings, sample_weight=None):
        """Pair by pair, from the definition."""
        weights, student, teacher = numpy_kept(sample_weight, student_embeddings, teacher_embeddings)

        def relative(points):
            distances = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in points] for a in points])
            others = [distances[i, j] for i in range(len(points)) for j in range(len(points)) if i != j]
            mean = np.mean(others) if others else 0.0
            return distances / mean if mean > 0 else distances

        d, e = relative(student), relative(teacher)
        return numpy_over_pairs(lambda i, j: numpy_smooth_l1(d[i, j] - e[i, j]), weights)
