"""Mutual information of the student's and the teacher's similarities, by matrix-based entropies."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Properties, choice, ops, register
from pykd.definition.reference import unit
from pykd.fused.description import BlockPoint, Products, Rows
from pykd.losses.relations._shared import Relation, normalized_rows, numpy_kept


def _samples(embeddings: Tensor, weight: Tensor | None) -> Tensor:
    return ops.normalize(ops.upcast(ops.without_left_out(embeddings, weight)), dim=[-1])


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """Samples whose products have the factor √(w_i w_j)."""
    return x if weight is None else x * torch.sqrt(weight.to(x.dtype)).unsqueeze(1)


def _squares(gram: Tensor, trace: Tensor) -> Tensor:
    """The squares of a matrix over its trace; 0 where that is 0."""
    over = gram / torch.where(trace == 0, torch.ones_like(trace), trace)
    return over * over


def _joint_squares(gram: Tensor, teacher: Tensor, trace: Tensor) -> Tensor:
    return _squares(gram * teacher, trace)


def _differences(gram: Tensor, teacher: Tensor, trace: Tensor, joint_trace: Tensor) -> Tensor:
    return _squares(gram, trace) - _joint_squares(gram, teacher, joint_trace)


def _compared(student: Tensor, joint: Tensor, form: str) -> Tensor:
    """The loss, of the sums of the two kinds of squares."""
    if form == "difference":
        return student - joint
    nothing = joint == 0
    ratio = torch.where(nothing, torch.ones_like(student), student) / torch.where(
        nothing, torch.ones_like(joint), joint
    )
    return torch.log(ratio) * 1.4426950408889634  # bits


def mutual_information(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None,
    form: str,
) -> Tensor:
    """Entropy of similarities that the teacher does not share; see :class:`MutualInformation`."""
    weight = ops.optional_weight(sample_weight)
    x, y = _weighted(_samples(student_embeddings, weight), weight), _samples(teacher_embeddings.detach(), weight)
    gram, own = ops.matmul(x, x.transpose(0, 1)), ops.squares(x)
    student = _squares(gram, own.sum()).sum()
    joint = _joint_squares(gram, ops.matmul(y, y.transpose(0, 1)), (own * ops.squares(y)).sum()).sum()
    return _compared(student, joint, form)


@register(mutual_information)
class MutualInformation(Relation):
    r"""What the student's similarities of the samples have that the teacher's have not, by entropies of order 2 (ITRD).

    .. math:: \ell = \lVert A \rVert_F^2 - \lVert B \rVert_F^2, \quad A = \frac{G(x)}{\mathrm{tr}\, G(x)}, \quad
              B = \frac{G(x) \odot G(y)}{\mathrm{tr}(G(x) \odot G(y))}, \quad G_{ij}(u) = \cos(u_i, u_j)

    with the student's embeddings x and the teacher's y. :math:`-\log_2 \lVert A \rVert_F^2` is Rényi's entropy of order 2 of the
    student's similarities and that of B their joint entropy with the teacher's: but for the teacher's own entropy, which is
    constant, their difference is the mutual information, which is to be large.

    Args:
        form: ``"difference"``, as above and in the authors' code, or ``"log_ratio"``:
            :math:`\log_2 \lVert A \rVert_F^2 - \log_2 \lVert B \rVert_F^2`, the entropies themselves, in bits.
        reduction: ``"mean"`` alone; the traces are part of the definition.

    Inputs:
        student_embeddings: ``(batch, channels)``, any floating type; receives the gradient.
        teacher_embeddings: ``(batch, teacher_channels)``, same type; constant. Only their cosines are compared, so the
            widths may differ; the authors map the student's to the teacher's width before.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant.
            :math:`G_{ij}(x)` has the factor :math:`\sqrt{w_i w_j}`. A sample of weight 0 has no part in value and gradient,
            whatever it holds.

    Returns:
        A scalar: without unit and less than 1, or bits. At least 0 unless an embedding of the teacher's is 0; 0 where the
        student has no similarity that the teacher has not to the full, for a single sample, and where none is kept. float32 for
        half-precision inputs, which are computed in float32. An embedding of length 0 stays 0, with the gradient 0.
        NaN in an input gives NaN.

    Raises:
        ValueError: for another form, shapes that do not fit, an empty batch.

    There is no value per sample: every sample is compared with every other. The formula's memory is O(batch²) beside the
    embeddings; from 512 samples on ``kernels="auto"`` goes by blocks of rows, which is O(batch).

    It does not lead to the teacher by itself: a student whose samples are all orthogonal has the least value, 0.

    Who differs: the authors add the term of correlations of channels to this one, with weights of their own.

    Example:
        Two samples of the cosine 0.6 to the student, of 0 to the teacher: 2 · 0.6² / 2².

        >>> student = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> MutualInformation()(student, teacher)
        tensor(0.1800)

    References:
        Miles et al.: Information Theoretic Representation Distillation, BMVC 2022, arXiv:2112.00459.
    """

    cases = (Case(), Case({"form": "log_ratio"}, optional=("sample_weight",)))
    aliases = ("ITRD-mutual",)

    form: str = choice(("difference", "log_ratio"), default="difference")

    def in_blocks(self, blocks: BlockPoint, student_embeddings, teacher_embeddings, sample_weight):
        weight = ops.optional_weight(sample_weight)
        x = _weighted(normalized_rows(student_embeddings, weight), weight)
        y = normalized_rows(teacher_embeddings.detach(), weight)
        # The lengths are 1 or 0, which has no gradient.
        own = blocks.each(ops.squares, Rows(x.detach()))
        trace, joint_trace = own.sum(), (own * blocks.each(ops.squares, Rows(y))).sum()
        pairs = len(x) ** 2
        if self.form == "difference":
            pieces = (Products(x, x), Products(y, y), trace, joint_trace)
            return blocks.over_pairs(_differences, *pieces, weight=None, symmetric=True) * pairs
        student = blocks.over_pairs(_squares, Products(x, x), trace, weight=None, symmetric=True)
        joint = blocks.over_pairs(
            _joint_squares, Products(x, x), Products(y, y), joint_trace, weight=None, symmetric=True
        )
        return _compared(student * pairs, joint * pairs, self.form)

    def properties(self) -> Properties:
        return Properties(
            feature_scale=True,
            zero_when_equal="similarities that are not 1 lose by being shared",
            symmetric="it is the student's similarities that are to be shared",
        )

    def reference(self, student_embeddings, teacher_embeddings, sample_weight=None):
        """Pair by pair, from the definition."""
        weights, student, teacher = numpy_kept(sample_weight, student_embeddings, teacher_embeddings)
        n = range(len(weights))
        x, y = [unit(u) for u in student], [unit(u) for u in teacher]
        own = np.array([[np.sqrt(weights[i] * weights[j]) * (x[i] @ x[j]) for j in n] for i in n])
        joint = np.array([[own[i, j] * (y[i] @ y[j]) for j in n] for i in n])
        squares = []
        for gram in (own, joint):
            trace = sum(gram[i, i] for i in n)
            squares.append(sum((gram[i, j] / trace) ** 2 for i in n for j in n) if trace > 0 else 0.0)
        if self.form == "difference":
            return squares[0] - squares[1]
        return np.log2(squares[0] / squares[1]) if squares[1] > 0 else 0.0
