"""Similarity-preserving distillation: which samples activate alike."""

import numpy as np
from torch import Tensor

from pykd.definition import Properties, ops, register
from pykd.definition.reference import unit
from pykd.fused.description import BlockPoint, Columns, Piece, Rows
from pykd.losses.relations._shared import FeatureRelation, numpy_kept, numpy_over_pairs, over_pairs, squared_differences


def _samples(features: Tensor, weight: Tensor | None) -> Tensor:
    return ops.upcast(ops.without_left_out(features, weight)).flatten(1)


def _values(student: Tensor, teacher: Tensor) -> Tensor:
    """Of products of rows of samples with all samples: squared differences, every row divided by its length before."""
    return squared_differences(ops.normalize(student, dim=[1]), ops.normalize(teacher, dim=[1]))


def _squares(products: Tensor) -> Tensor:
    return products * products


def _differences(
    student: Tensor, rows: Tensor, columns: Tensor, teacher: Tensor, teacher_rows: Tensor, teacher_columns: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`_values` of a block of the rows, and of its mirror image, with one over the length of each."""
    return (
        squared_differences(student * rows.unsqueeze(1), teacher * teacher_rows.unsqueeze(1)),
        squared_differences(student * columns, teacher * teacher_columns),
    )


def _factor(x: Tensor) -> float:
    """Of products whose squares are to fit; rows that are divided by their lengths do not mind it."""
    largest = ops.squares(x.detach()).amax().item()
    return 1.0 / largest if 1e-37 < largest < 1e37 else 1.0


def similarity_preserving(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
) -> Tensor:
    """Squared difference of similarities; see :class:`SimilarityPreserving`."""
    weight = ops.optional_weight(sample_weight)
    x, y = _samples(student_features, weight), _samples(teacher_features.detach(), weight)
    return over_pairs(_values(ops.matmul(x, x.transpose(0, 1)), ops.matmul(y, y.transpose(0, 1))), weight)


@register(similarity_preserving)
class SimilarityPreserving(FeatureRelation):
    r"""Squared difference between the student's and the teacher's similarities of the samples in a batch (SP).

    Each sample's features are flattened to one vector: x of the student, y of the teacher.

    .. math:: \ell = \frac1{N^2} \sum_{ij} \big(\hat G_{ij}(x) - \hat G_{ij}(y)\big)^2, \quad
              \hat G_{ij}(x) = \frac{x_i \cdot x_j}{\sqrt{\sum_k (x_i \cdot x_k)^2}}

    Args:
        reduction: ``"mean"`` alone; the mean over pairs is part of the definition.

    Inputs:
        student_features: ``(batch, channels)``, ``(batch, tokens, channels)`` or ``(batch, channels, height, width)``, any
            floating type; receives the gradient.
        teacher_features: of any of these shapes, with widths of its own, same type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A pair
            weighs the product of its samples' weights: Σ w_i w_j v_ij / Σ w_i w_j. The length of a row is that over all samples
            whose weight is not 0; one of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        A scalar without unit, from 0 to 4 / N (rows have length 1); 0 where the similarities agree, and where no sample is
        kept. float32 for half-precision inputs, which are computed in float32. A factor for all features of one side changes
        nothing. A row of zeros stays 0, with the gradient 0. NaN in an input gives NaN.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    There is no value per sample: every sample is compared with every other. The formula's memory is O(batch²) beside the
    features; from 512 samples on ``kernels="auto"`` goes by blocks of rows, which is O(batch).

    Who differs: RepDistiller, MDistiller and the Zoo agree. torchdistill's ``SPKDLoss`` divides a row by the sum of its absolute
    entries, not by its length. TFace takes cosines of the features and does not divide the rows at all.

    Example:
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> SimilarityPreserving()(student, teacher)
        tensor(0.2929)

    References:
        Tung and Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv:1907.09682.
    """

    aliases = ("SP", "SPKD", "SPKDLoss", "Similarity")

    def in_blocks(self, blocks: BlockPoint, student_features, teacher_features, sample_weight):
        weight = ops.optional_weight(sample_weight)
        pieces: list[Piece] = []
        for features in (teacher_features.detach(), student_features):
            x = _samples(features, weight)
            products = blocks.products(x, _factor(x))
            inverse = ops.inverse_root(blocks.row_sums(_squares, products))
            pieces = [products, Rows(inverse), Columns(inverse), *pieces]
        return blocks.over_pairs(_differences, *pieces, weight=weight, last=True)

    def properties(self) -> Properties:
        return Properties(
            feature_scale="a factor for all samples drops out, one for each does not",
            zero_when_equal=True,
            symmetric=True,
        )

    def reference(self, student_features, teacher_features, sample_weight=None):
        """Pair by pair, from the definition."""
        weights, student, teacher = numpy_kept(sample_weight, student_features, teacher_features)

        def rows(samples):
            return [unit([float(np.vdot(a, b)) for b in samples]) for a in samples]

        g, h = rows(student), rows(teacher)
        return numpy_over_pairs(lambda i, j: (g[i][j] - h[i][j]) ** 2, weights)
