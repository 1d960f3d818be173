"""Universal logit distillation: sorted probabilities are compared, so that vocabularies may differ."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register, scalar
from pykd.definition.reference import log_softmax, reduce_samples, rows


def universal_logit(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    reduction: str,
) -> Tensor:
    """Sum of absolute differences of sorted probabilities; see :class:`UniversalLogit`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits.detach(), weight)
    q = torch.softmax(ops.soften(student, student_temperature), dim=-1)
    p = torch.softmax(ops.soften(teacher, teacher_temperature), dim=-1)
    sorted_q = torch.sort(q, dim=-1, descending=True)[0]
    sorted_p = torch.sort(p, dim=-1, descending=True)[0]
    # Each is followed by as many zeros as the other has classes: which of the two is longer need not be known.
    longer_q = torch.cat([sorted_q, torch.zeros_like(sorted_p)], dim=-1)
    longer_p = torch.cat([sorted_p, torch.zeros_like(sorted_q)], dim=-1)
    return ops.reduce((longer_q - longer_p).abs().sum(dim=-1), weight, reduction)


@register(universal_logit)
class UniversalLogit(Loss):
    r"""Distance between the student's and the teacher's probabilities in descending order, whatever classes they are of.

    .. math:: \ell_b = \sum_i |p_{b(i)} - q_{b(i)}|, \quad p = \mathrm{softmax}(t/T_t), \; q = \mathrm{softmax}(s/T_s)

    where (i) counts from the largest probability, and the smaller vocabulary is filled up with probabilities 0 (not with logits
    0, which would get a share). It is the Wasserstein distance of the paper, with a cost of 1 between any two tokens, so student and
    teacher may have tokenisers of their own.

    Args:
        student_temperature: T_s > 0, of the student.
        teacher_temperature: T_t > 0, of the teacher.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1, so the mean over kept tokens; ``"sum"``;
            ``"none"``: ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class.
        teacher_logits: ``(batch, teacher_classes)`` or ``(batch, tokens, teacher_classes)``, of another vocabulary; same
            type; constant. Which token of the teacher belongs to which of the student is settled before, as by cutting both
            answers to the shorter one.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Between 0 and 2, no unit; 0 when the sorted probabilities are equal; a scalar unless ``reduction="none"``.
        Where two of them are equal exactly the subgradient is 0. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: the authors' code averages over the tokens of each answer, then over answers (give tokens weights of
    1 / their number for that); DSKD sums over tokens and divides by a number of its own; TRL's GOLD trainer averages as the authors
    do, and compares tokens that both vocabularies have by another divergence.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0986, -30.0]])
        >>> UniversalLogit()(student, teacher)
        tensor(0.6000)

    References:
        Boizard et al.: Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs, 2024,
        arXiv:2402.12030.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch teacher_classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(layouts={"student_logits": "batch tokens classes"}),
        Case(
            {"student_temperature": 2.0, "teacher_temperature": 3.0, "reduction": "sum"},
            optional=("sample_weight",),
        ),
    )
    aliases = ("ULD", "ULDLoss", "UniversalLogitDistillation")
    no_kernel = "three quarters of its time in torch is the sorting of both vocabularies, which no kernel does"

    student_temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    teacher_temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)

    def properties(self) -> Properties:
        alike: bool | str = self.student_temperature == self.teacher_temperature or "the temperatures differ"
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=alike,
            symmetric=alike,
            distils=alike is True or "probabilities are compared in order, whatever classes they are of",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            q = sorted(np.exp(log_softmax(s / self.student_temperature)))[::-1]
            p = sorted(np.exp(log_softmax(t / self.teacher_temperature)))[::-1]
            total = 0.0
            for i in range(max(len(p), len(q))):
                total += abs((p[i] if i < len(p) else 0.0) - (q[i] if i < len(q) else 0.0))
            values.append(total)
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
