"""Correlation congruence: how samples correlate under a kernel."""

import math

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Alias, Case, Properties, choice, flag, number, ops, register, whole
from pykd.definition.reference import unit
from pykd.fused.description import BlockPoint, Products
from pykd.losses.relations._shared import (
    Relation,
    kept,
    normalized_rows,
    numpy_kept,
    numpy_over_pairs,
    over_pairs,
    squared_differences,
)


def _samples(embeddings: Tensor, weight: Tensor | None, normalized: bool) -> Tensor:
    x = ops.upcast(ops.without_left_out(embeddings, weight))
    return ops.normalize(x, dim=[-1]) if normalized else x


def _correlations(products: Tensor, kernel: str, gamma: float, order: int) -> Tensor:
    """The kernel of pairs of samples, of their products."""
    if kernel == "bilinear":
        return products
    # The factors of the powers of the product, from the last on: Σ_p c_p zᵖ = c_0 + z (c_1 + z (…)).
    factor = math.exp(-2.0 * gamma)
    factors = [factor]
    for p in range(1, order + 1):
        factor = factor * 2.0 * gamma / p
        factors.append(factor)
    total = products * factors[order] + factors[order - 1]
    for p in range(order - 2, -1, -1):
        total = total * products + factors[p]
    return total


def _values(student: Tensor, teacher: Tensor, kernel: str, gamma: float, order: int) -> Tensor:
    """The squared differences of pairs, of their products."""
    return squared_differences(
        _correlations(student, kernel, gamma, order), _correlations(teacher, kernel, gamma, order)
    )


def _norm(mean: Tensor, count: Tensor) -> Tensor:
    """The root of the mean over the number of samples, with the gradient 0 at 0."""
    zero = mean == 0
    root = torch.where(zero, torch.zeros_like(mean), torch.sqrt(torch.where(zero, torch.ones_like(mean), mean)))
    return root / count.clamp(min=1.0)


def correlation_congruence(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None,
    form: str,
    kernel: str,
    gamma: float,
    order: int,
    normalized: bool,
) -> Tensor:
    """Difference of correlations under a kernel; see :class:`CorrelationCongruence`."""
    weight = ops.optional_weight(sample_weight)
    x, y = _samples(student_embeddings, weight, normalized), _samples(teacher_embeddings.detach(), weight, normalized)
    student, teacher = ops.matmul(x, x.transpose(0, 1)), ops.matmul(y, y.transpose(0, 1))
    mean = over_pairs(_values(student, teacher, kernel, gamma, order), weight)
    return mean if form == "mean_square" else _norm(mean, kept(x, weight).sum())


@register(correlation_congruence)
class CorrelationCongruence(Relation):
    r"""Difference between the student's and the teacher's correlations of the samples in a batch under a kernel (CC).

    .. math:: \ell = \frac1{N^2} \sum_{ij} \big(k(x_i, x_j) - k(y_i, y_j)\big)^2, \quad
              k(u, v) = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} \Big(\frac{u}{\lVert u\rVert} \cdot
              \frac{v}{\lVert v\rVert}\Big)^p

    with the student's embeddings x and the teacher's y; k is the start of the Taylor series of the Gaussian
    :math:`\exp(-\gamma \lVert \hat u - \hat v\rVert^2)` of the embeddings over their lengths.

    Four formulas have this name in libraries:

    ============  ==================================================================================
    the paper     the defaults; the Zoo has them
    torchdistill  ``form="norm", normalized=False``: √(Σ_ij (…)²) / N², of embeddings as they are
    TFace         ``order=1`` for its P = 2: its sum ends at P − 1
    RepDistiller  :class:`pykd.NeighbourDifferences`, which has no correlation of samples at all
    ============  ==================================================================================

    Args:
        form: ``"mean_square"``, as above, or ``"norm"``: the root of the sum of squares, divided by N².
        kernel: ``"gaussian"``, as above, or ``"bilinear"``: the product u · v alone.
        gamma: γ > 0, of the Gaussian.
        order: P, from 1 to 10, of the Gaussian.
        normalized: whether embeddings are divided by their lengths first.
        reduction: ``"mean"`` alone; see ``form``.

    Inputs:
        student_embeddings: ``(batch, channels)``, any floating type; receives the gradient.
        teacher_embeddings: ``(batch, teacher_channels)``, same type; constant. Only correlations are compared, so the
            widths may differ; the paper embeds both in one width by layers of their own, before.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A pair
            weighs the product of its samples' weights: Σ w_i w_j v_ij / Σ w_i w_j. A sample of weight 0 has no part in
            value and gradient, whatever it holds; N of ``"norm"`` does not count it.

    Returns:
        A scalar without unit, at least 0; 0 where the correlations agree, and where no sample is kept. float32 for
        half-precision inputs, which are computed in float32. A normalised embedding of length 0 stays 0, with the gradient
        0. NaN in an input gives NaN.

    Raises:
        ValueError: for another form or kernel, a gamma that is not positive, another order, shapes that do not fit, an
            empty batch.

    There is no value per sample: every sample is compared with every other. The formula's memory is O(batch²) beside the
    embeddings; from 512 samples on ``kernels="auto"`` goes by blocks of rows, which is O(batch).

    Who differs: see the table. torchdistill's ``reduction`` other than ``"batchmean"`` leaves out the division by N².

    Example:
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
        >>> CorrelationCongruence()(student, teacher)
        tensor(0.1266)

    References:
        Peng et al.: Correlation Congruence for Knowledge Distillation, ICCV 2019, arXiv:1904.01802.
    """

    cases = (
        Case(),
        Case(
            {"form": "norm", "gamma": 0.1, "order": 1, "normalized": False},
            optional=("sample_weight",),
        ),
        Case({"kernel": "bilinear", "order": 3}),
        Case({"order": 4}),
    )
    aliases = ("CC", "CCKD", Alias("CCKDLoss", form="norm", normalized=False))

    form: str = choice(("mean_square", "norm"), default="mean_square")
    kernel: str = choice(("gaussian", "bilinear"), default="gaussian")
    gamma: float = number(default=0.4, above=0.0)
    order: int = whole(default=2, minimum=1, maximum=10)
    normalized: bool = flag(default=True)

    def in_blocks(self, blocks: BlockPoint, student_embeddings, teacher_embeddings, sample_weight):
        weight = ops.optional_weight(sample_weight)
        given = (student_embeddings, teacher_embeddings.detach())
        if self.normalized:
            x, y = (normalized_rows(embeddings, weight) for embeddings in given)
        else:
            x, y = (_samples(embeddings, weight, False) for embeddings in given)
        settings = (self.kernel, self.gamma, self.order)
        mean = blocks.over_pairs(_values, Products(x, x), Products(y, y), *settings, weight=weight, symmetric=True)
        return mean if self.form == "mean_square" else _norm(mean, kept(x, weight).sum())

    def properties(self) -> Properties:
        return Properties(
            feature_scale=self.normalized or "the kernel takes the embeddings as they are",
            zero_when_equal=True,
            symmetric=True,
        )

    def reference(self, student_embeddings, teacher_embeddings, sample_weight=None):
        """Pair by pair, from the definition."""
        weights, student, teacher = numpy_kept(sample_weight, student_embeddings, teacher_embeddings)

        def correlation(u, v):
            product = unit(u) @ unit(v) if self.normalized else u @ v
            if self.kernel == "bilinear":
                return product
            powers = [(2 * self.gamma) ** p / math.factorial(p) * product**p for p in range(self.order + 1)]
            return np.exp(-2 * self.gamma) * sum(powers)

        def square(i, j):
            return (correlation(student[i], student[j]) - correlation(teacher[i], teacher[j])) ** 2

        mean = numpy_over_pairs(square, weights)
        return mean if self.form == "mean_square" else np.sqrt(mean) / max(len(weights), 1)
