"""Pairwise hinge: of two tokens the student prefers the teacher's, by the teacher's margin."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, number, ops, register
from pykd.definition.reference import log_softmax, reduce_samples, rows
from pykd.losses.tokens._shared import reduce_pairs, sums_over_pairs, take


def _rows(student: Tensor, teacher: Tensor, ids: Tensor, margins: str, average: str, margin: float) -> Tensor:
    """One value per row; see :class:`PairwiseHinge`."""
    log_p = ops.upcast(teacher)
    q = take(torch.softmax(ops.upcast(student), dim=-1), ids)
    ahead = q.unsqueeze(-1) - q.unsqueeze(-2)
    p = torch.exp(log_p)
    least = p.unsqueeze(-1) - p.unsqueeze(-2)
    if margins == "constant":
        least = torch.zeros_like(least) + margin
    return sums_over_pairs(torch.relu(least - ahead), log_p, average)


def pairwise_hinge(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_ids: Tensor,
    sample_weight: Tensor | None,
    margins: str,
    margin: float,
    average: str,
    reduction: str,
) -> Tensor:
    """Hinge of differences of probabilities of pairs of classes; see :class:`PairwiseHinge`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    log_p = ops.without_left_out(teacher_log_probs.detach(), weight)
    values = _rows(student, log_p, teacher_ids, margins, average, margin)
    return reduce_pairs(values, log_p, weight, average, reduction)


@register(pairwise_hinge)
class PairwiseHinge(Loss):
    r"""How far the student falls short of the margins by which the teacher prefers one token to another.

    .. math:: \ell_b = \sum_{(i, j): p_{bi} > p_{bj}} \max(0, m_{bij} - (q_{bi} - q_{bj})), \quad m_{bij} = p_{bi} - p_{bj}

    over the pairs of the teacher's entries, with its probabilities p of them, and the student's q, of a softmax over the whole
    vocabulary.

    Args:
        margins: ``"teacher"``, or ``"constant"``: m is the same for all pairs.
        margin: m of ``"constant"``, at least 0; ``"teacher"`` does not look at it.
        average: ``"pairs"``: ℓ is the sum over a sample's pairs, and the mean divides by all pairs there are, so that a sample
            counts by their number; ``"samples"``: ℓ is the mean over a sample's pairs.
        reduction: ``"mean"``: Σ w·ℓ / Σ w·n with w = ``sample_weight`` or 1, and the number n of a sample's pairs, or 1 by
            ``"samples"``; ``"sum"``: Σ w·ℓ; ``"none"``: w·ℓ, ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class.
        teacher_log_probs: ``(batch, top_k)`` or ``(batch, tokens, top_k)``, same type; constant: log p of some classes, such as
            the teacher's k likeliest. −inf: an entry that is not there, whose id counts for nothing.
        teacher_ids: the same shape, int64: the classes of the entries, from 0 to classes − 1.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers), such as ``labels != -100``; constant. A sample of weight 0 has no part in value and gradient,
            whatever it holds.

    Returns:
        At least 0, no unit; 0 where the student keeps all margins, as with p = q, and where there is no pair; a scalar unless
        ``reduction="none"``. Entries to which the teacher gives one probability are no pair. NaN in an input gives NaN.

    Raises:
        ValueError: for a negative margin, shapes that do not fit, an empty batch, fewer than 2 classes, or an id out of range
            (on the CPU; on a GPU, which is not waited for, in compiled code and in exported files run elsewhere, the loss is
            NaN).

    Who differs: DistillKit's ``sparse_hinge_loss`` has a pair where the probabilities differ by more than 10⁻⁸ and both are above
    that, adds 10⁻⁸ to the number of pairs, and takes the teacher's margins where it is given none.

    Example:
        >>> student = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> log_probs, ids = torch.tensor([[0.5, 0.3, 0.1]]).log(), torch.tensor([[2, 0, 1]])
        >>> PairwiseHinge()(student, log_probs, ids)
        tensor(0.2667)
        >>> PairwiseHinge(margins="constant", average="samples")(student, log_probs, ids)
        tensor(0.1000)

    References:
        Goddard et al.: DistillKit, 2024 (github.com/arcee-ai/DistillKit); Weston, Watkins: Support Vector Machines for
        Multi-Class Pattern Recognition, ESANN, 1999 (margins of pairs).
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits"),
        "teacher_log_probs": Spec("batch top_k", draw="partial_log_probabilities"),
        "teacher_ids": Spec("batch top_k", dtype="int64", index_of="classes", draw="different_indices"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    least_lengths = {"classes": 2}
    cases = (
        Case(layouts={"student_logits": "batch tokens classes"}),
        Case(
            {"margins": "constant", "margin": 0.2, "average": "samples", "reduction": "sum"},
            optional=("sample_weight",),
        ),
    )
    aliases = (Alias("HingeLoss", margins="constant"), "sparse_hinge_loss")
    no_kernel = "the kernel top_k has a form for it, which is not used from Python yet"

    margins: str = choice(("teacher", "constant"), default="teacher")
    margin: float = number(default=0.1, minimum=0.0)
    average: str = choice(("pairs", "samples"), default="pairs")

    def properties(self) -> Properties:
        return Properties(logit_shift=True, masked_classes=True)

    def reference(self, student_logits, teacher_log_probs, teacher_ids, sample_weight=None):
        values, counts = [], []
        given = (rows(x, 1) for x in (student_logits, teacher_log_probs, teacher_ids))
        for s, log_p, ids in zip(*given, strict=True):
            p, q = np.exp(log_p), np.exp(log_softmax(s))[ids]
            pairs = [(i, j) for i in range(len(p)) for j in range(len(p)) if p[i] > p[j] > 0]
            total = 0.0
            for i, j in pairs:
                wanted = p[i] - p[j] if self.margins == "teacher" else self.margin
                total += max(0.0, wanted - (q[i] - q[j]))
            values.append(total if self.average == "pairs" else total / max(len(pairs), 1))
            counts.append(len(pairs) if self.average == "pairs" else 1)
        samples = np.shape(student_logits)[:-1]
        weights = np.ones(len(values)) if sample_weight is None else np.ravel(sample_weight)
        return reduce_samples(values, weights, self.reduction, samples, weights * counts)
