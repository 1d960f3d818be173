"""Logistic ranking: the student orders tokens as the teacher does."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, choice, ops, register
from pykd.definition.reference import reduce_samples, rows
from pykd.losses.tokens._shared import reduce_pairs, sums_over_pairs, take


def _rows(student: Tensor, teacher: Tensor, ids: Tensor, average: str) -> Tensor:
    """One value per row; see :class:`LogisticRanking`."""
    logits = take(ops.upcast(student), ids)
    worse, better = logits.unsqueeze(-2), logits.unsqueeze(-1)
    ruled_out = (worse == float("-inf")) & (better == float("-inf"))  # both: no difference, instead of −inf + inf
    difference = worse.masked_fill(ruled_out, 0.0) - better.masked_fill(ruled_out, 0.0)
    return sums_over_pairs(torch.nn.functional.softplus(difference), ops.upcast(teacher), average)


def logistic_ranking(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_ids: Tensor,
    sample_weight: Tensor | None,
    average: str,
    reduction: str,
) -> Tensor:
    """log(1 + exp of the difference of logits) of pairs of classes; see :class:`LogisticRanking`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    log_p = ops.without_left_out(teacher_log_probs.detach(), weight)
    values = _rows(student, log_p, teacher_ids, average)
    return reduce_pairs(values, log_p, weight, average, reduction)


@register(logistic_ranking)
class LogisticRanking(Loss):
    r"""Logistic loss of the pairs of tokens of which the teacher prefers one: how surely the student prefers it, too.

    .. math:: \ell_b = \sum_{(i, j): p_{bi} > p_{bj}} \log(1 + \exp(s_{bj} - s_{bi}))

    over the pairs of the teacher's entries, with its probabilities p of them, and the student's logits s. By how much the teacher
    prefers one does not count.

    Args:
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
        Nats, at least 0; 0 where there is no pair; a scalar unless ``reduction="none"``. log 2 for every pair of equal
        logits. Entries to which the teacher gives one probability are no pair. +inf where the student rules out (−inf) the one that
        the teacher prefers, and not the other. NaN in an input gives NaN.

    Raises:
        ValueError: for shapes that do not fit, an empty batch, fewer than 2 classes, or an id out of range (on the CPU; on a GPU,
            which is not waited for, in compiled code and in exported files run elsewhere, the loss is NaN).

    Who differs: DistillKit's ``sparse_logistic_ranking_loss`` has a pair where the probabilities differ by more than 10⁻⁹ and
    both are above that, and adds 10⁻⁹ to the number of pairs.

    Example:
        >>> student = torch.tensor([[0.0, 0.0, 1.0986, 0.0]])
        >>> log_probs, ids = torch.tensor([[0.5, 0.3, 0.1]]).log(), torch.tensor([[2, 0, 1]])
        >>> LogisticRanking()(student, log_probs, ids)
        tensor(0.4228)

    References:
        Burges et al.: Learning to Rank using Gradient Descent, ICML 2005 (the loss of a pair); Goddard et al.: DistillKit, 2024
        (github.com/arcee-ai/DistillKit).
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
            {"average": "samples", "reduction": "sum"},
            optional=("sample_weight",),
        ),
    )
    aliases = ("LogisticRankingLoss", "sparse_logistic_ranking_loss", "RankNet")
    no_kernel = "the kernel top_k has a form for it, which is not used from Python yet"

    average: str = choice(("pairs", "samples"), default="pairs")

    def properties(self) -> Properties:
        return Properties(logit_shift=True, masked_classes=True)

    def reference(self, student_logits, teacher_log_probs, teacher_ids, sample_weight=None):
        values, counts = [], []
        given = (rows(x, 1) for x in (student_logits, teacher_log_probs, teacher_ids))
        for s, log_p, ids in zip(*given, strict=True):
            p, scores = np.exp(log_p), s[ids]
            pairs = [(i, j) for i in range(len(p)) for j in range(len(p)) if p[i] > p[j] > 0]
            total = sum(np.logaddexp(0.0, scores[j] - scores[i]) for i, j in pairs)
            values.append(total if self.average == "pairs" else total / max(len(pairs), 1))
            counts.append(len(pairs) if self.average == "pairs" else 1)
        samples = np.shape(student_logits)[:-1]
        weights = np.ones(len(values)) if sample_weight is None else np.ravel(sample_weight)
        return reduce_samples(values, weights, self.reduction, samples, weights * counts)
