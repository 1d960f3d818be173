"""Instance relationship graph: the squared distances between samples, as the edges of a graph."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Properties, ops, register
from pykd.fused.description import BlockPoint, Columns, Piece, Rows
from pykd.losses.relations._shared import (
    FeatureRelation,
    alike,
    centred,
    centred_rows,
    kept_products,
    numpy_kept,
    numpy_over_pairs,
    over_pairs,
    squared_differences,
    squared_distances_of_block,
)


def _of_kept(squared: Tensor, row_kept: Tensor | None, column_kept: Tensor | None) -> Tensor:
    """Squared distances; 0 for pairs with a sample that is left out, which would be the distance from the centre."""
    if row_kept is not None and column_kept is not None:
        squared = squared * (column_kept.unsqueeze(0) * row_kept.unsqueeze(1))
    return squared


def _divisor(largest: Tensor) -> Tensor:
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def _edges(features: Tensor, weight: Tensor | None) -> Tensor:
    """Squared distances over the largest of them; 0 for pairs with a sample that is left out."""
    x = centred(ops.upcast(ops.without_left_out(features, weight)).flatten(1), weight)
    own, count = ops.squares(x), alike(x, weight)
    squared = ops.squared_distances_of(ops.matmul(x, x.transpose(0, 1)), own, own).masked_fill(ops.same_pairs(x), 0.0)
    squared = _of_kept(squared, count, count)
    return squared / _divisor(squared.amax(dim=[0, 1]))


def _squares(
    products: Tensor,
    rows: Tensor,
    columns: Tensor,
    same: Tensor,
    row_kept: Tensor | None,
    column_kept: Tensor | None,
) -> Tensor:
    """The squared distances of a block of rows from the columns."""
    return _of_kept(squared_distances_of_block(products, rows, columns, same), row_kept, column_kept)


def _values(
    products: Tensor,
    rows: Tensor,
    columns: Tensor,
    same: Tensor,
    row_kept: Tensor | None,
    column_kept: Tensor | None,
    factor: Tensor,
    teacher_products: Tensor,
    teacher_rows: Tensor,
    teacher_columns: Tensor,
    teacher_same: Tensor,
    teacher_row_kept: Tensor | None,
    teacher_column_kept: Tensor | None,
    teacher_factor: Tensor,
) -> Tensor:
    """The squared difference of every pair in a block of rows."""
    student = _squares(products, rows, columns, same, row_kept, column_kept) * factor
    teacher = _squares(
        teacher_products, teacher_rows, teacher_columns, teacher_same, teacher_row_kept, teacher_column_kept
    )
    return squared_differences(student, teacher * teacher_factor)


def instance_relationship_graph(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
) -> Tensor:
    """Squared difference of edges; see :class:`InstanceRelationshipGraph`."""
    weight = ops.optional_weight(sample_weight)
    edges = squared_differences(_edges(student_features, weight), _edges(teacher_features.detach(), weight))
    return over_pairs(edges, weight)


@register(instance_relationship_graph)
class InstanceRelationshipGraph(FeatureRelation):
    r"""Squared difference between the student's and the teacher's edges of the graph of samples, for one layer (IRG).

    Each sample's features are flattened to one vector: x of the student, y of the teacher.

    .. math:: \ell = \frac1{N^2} \sum_{ij} \big(A_{ij}(x) - A_{ij}(y)\big)^2, \quad
              A_{ij}(x) = \frac{\lVert x_i - x_j\rVert^2}{\max_{kl} \lVert x_k - x_l\rVert^2}

    The gradient goes through the student's maximum, too. This is the term of the edges; those of the vertices (the mean
    squared error of logits) and of the transformation between layers are losses of their own.

    Args:
        reduction: ``"mean"`` alone; the mean over pairs is part of the definition.

    Inputs:
        student_features: ``(batch, channels)``, ``(batch, tokens, channels)`` or ``(batch, channels, height, width)``, any
            floating type; receives the gradient.
        teacher_features: of any of these ranks, with widths of its own, same type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A pair
            weighs the product of its samples' weights: Σ w_i w_j v_ij / Σ w_i w_j. The largest distance is that of all samples
            whose weight is not 0; one of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        A scalar without unit, from 0 to 1; 0 where all relative distances agree, for a single sample, and where none is kept.
        float32 for half-precision inputs, which are computed in float32. A factor for all features of one side
        changes nothing. NaN in an input gives NaN.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    There is no value per sample: every sample is compared with every other. The formula's memory is O(batch²) beside the
    features; from 512 samples on ``kernels="auto"`` goes by blocks of rows, which is O(batch).

    Who differs: the Zoo takes this of three layers and divides the sum by 3; compose three terms of the weight 1/3.

    Example:
        >>> student = torch.tensor([[0.0], [1.0], [2.0]])
        >>> teacher = torch.tensor([[0.0], [1.0], [1.0]])
        >>> InstanceRelationshipGraph()(student, teacher)
        tensor(0.1389)

    References:
        Liu et al.: Knowledge Distillation via Instance Relationship Graph, CVPR 2019.
    """

    aliases = ("IRG",)

    def in_blocks(self, blocks: BlockPoint, student_features, teacher_features, sample_weight):
        weight = ops.optional_weight(sample_weight)
        pieces: list[Piece] = []
        for features in (teacher_features.detach(), student_features):
            flat = ops.upcast(ops.without_left_out(features, weight)).flatten(1)
            count = alike(flat, weight)
            own = [
                *kept_products(blocks.products(centred_rows(flat, weight))),
                *((None, None) if count is None else (Rows(count), Columns(count))),
            ]
            pieces = [*own, 1.0 / _divisor(blocks.largest(_squares, *own)), *pieces]
        return blocks.over_pairs(_values, *pieces, weight=weight, symmetric=True, last=True)

    def properties(self) -> Properties:
        return Properties(
            feature_scale="a factor for all samples drops out, one for each does not",
            zero_when_equal=True,
            symmetric=True,
        )

    def reference(self, student_features, teacher_features, sample_weight=None):
        """Pair by pair, from the definition."""
        weights, student, teacher = numpy_kept(sample_weight, student_features, teacher_features)

        def edges(samples):
            squared = np.array([[((a - b) ** 2).sum() for b in samples] for a in samples])
            return squared / squared.max() if squared.size > 0 and squared.max() > 0 else squared

        a, b = edges(student), edges(teacher)
        return numpy_over_pairs(lambda i, j: (a[i, j] - b[i, j]) ** 2, weights)
