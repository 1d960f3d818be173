"""Margin MSE: by how much a query's positive passage scores above each negative one."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register
from pykd.definition.reference import reduce_samples


def margin_mse(
    student_scores: Tensor,
    teacher_scores: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Mean squared difference of margins; see :class:`MarginMSE`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.upcast(ops.without_left_out(student_scores, weight))
    teacher = ops.upcast(ops.without_left_out(teacher_scores.detach(), weight))
    # Of each candidate first: scores of student and teacher are closer to each other than to other scores.
    difference = student - teacher
    absent = (student == float("-inf")) & (teacher == float("-inf"))
    difference = difference.masked_fill(absent, 0.0)
    margins = difference[:, :1] - difference[:, 1:]
    present = (~absent[:, 1:]).to(margins.dtype)
    squares = torch.square(margins).masked_fill(absent[:, 1:], 0.0)
    values = squares.sum(dim=1) / present.sum(dim=1).clamp(min=1.0)
    return ops.reduce(values, weight, reduction)


@register(margin_mse)
class MarginMSE(Loss):
    r"""Mean squared difference between the student's and the teacher's margins of a positive candidate over the negative ones.

    .. math:: \ell_b = \frac{1}{n - 1} \sum_{j=1}^{n-1} \left( (s_{b0} - s_{bj}) - (t_{b0} - t_{bj}) \right)^2

    of n candidates of which the first is the positive one: (positive, negative), or a list with more negatives. The scale
    and the offset of the scores do not have to agree, their differences do.

    Args:
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_scores: ``(batch, candidates)``, at least 2 of them, the positive one first; any floating type; receives the
            gradient.
        teacher_scores: the same shape and type; constant. −inf in both: a negative that is not there, as in lists of different
            lengths; it is not counted.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        At least 0, the square of the scores' unit; 0 where all margins agree; a scalar unless ``reduction="none"``. NaN in an
        input gives NaN.

    Raises:
        ValueError: for shapes that do not fit, an empty batch, fewer than 2 candidates.

    Who differs: sentence-transformers' ``MarginMSELoss`` is the same where all lists have one length, from embeddings, and
    from margins or scores of the teacher; Hofstätter's own code has pairs alone.

    Example:
        >>> student, teacher = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[8.0, 4.0, 7.0]])
        >>> MarginMSE()(student, teacher)
        tensor(2.)
        >>> MarginMSE()(student[:, :2], teacher[:, :2])
        tensor(4.)

    References:
        Hofstätter et al.: Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation, 2020,
        arXiv:2010.02666.
    """

    inputs = {
        "student_scores": Spec("batch candidates", grad=True, draw="logits", like="teacher_scores"),
        "teacher_scores": Spec("batch candidates", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    least_lengths = {"candidates": 2}
    cases = (Case(), Case({"reduction": "sum"}, optional=("sample_weight",)))
    aliases = ("MarginMSELoss",)

    def properties(self) -> Properties:
        return Properties(logit_shift=True, masked_classes=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_scores, teacher_scores, sample_weight=None):
        values = []
        for s, t in zip(student_scores, teacher_scores, strict=True):
            there = [j for j in range(1, len(s)) if not (np.isneginf(s[j]) and np.isneginf(t[j]))]
            squares = [((s[0] - s[j]) - (t[0] - t[j])) ** 2 for j in there]
            values.append(sum(squares) / max(len(there), 1))
        return reduce_samples(values, sample_weight, self.reduction)
