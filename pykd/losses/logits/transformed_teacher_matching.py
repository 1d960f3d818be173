"""Transformed teacher matching: the teacher's probabilities raised to a power, the student's as they are."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, flag, ops, register, scalar
from pykd.definition.reference import divergence, log_softmax, reduce_samples, rows
from pykd.fused.description import SOFT_TARGET, KernelPoint


def _rows(student: Tensor, teacher: Tensor, temperature: float, form: str, soften_student: bool) -> Tensor:
    """What :func:`transformed_teacher_matching` is without weights, one value per row, as soft targets at the temperature 1/γ."""
    log_p = torch.log_softmax(ops.soften(teacher.detach(), temperature), dim=-1)
    return ops.forward_kl(log_p, torch.log_softmax(ops.upcast(student), dim=-1))


def transformed_teacher_matching(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    exponent: float,
    weighted: bool,
    reduction: str,
) -> Tensor:
    """KL divergence from a power of the teacher's probabilities; see :class:`TransformedTeacherMatching`."""
    weight = ops.optional_weight(sample_weight)
    teacher = ops.without_left_out(teacher_logits.detach(), weight)
    powers = torch.log_softmax(ops.upcast(teacher), dim=-1) * exponent
    log_p = torch.log_softmax(powers, dim=-1)
    log_q = torch.log_softmax(ops.upcast(ops.without_left_out(student_logits, weight)), dim=-1)
    values = ops.forward_kl(log_p, log_q)
    if weighted:
        values = values * torch.exp(powers).sum(dim=-1)
    return ops.reduce(values, weight, reduction)


@register(transformed_teacher_matching)
class TransformedTeacherMatching(Loss):
    r"""KL divergence of the student, without any temperature, from the teacher's probabilities raised to a power.

    .. math:: \ell_b = U_b \, \mathrm{KL}(\tilde p_b \Vert q_b), \quad
              \tilde p_{bc} = \frac{p_{bc}^\gamma}{\sum_k p_{bk}^\gamma}, \quad p = \mathrm{softmax}(t), \; q = \mathrm{softmax}(s), \quad
              U_b = 1 \text{ or } \sum_k p_{bk}^\gamma

    Since :math:`\tilde p = \mathrm{softmax}(\gamma t)`, it is ``soft_target`` with the temperature 1/γ for the teacher alone
    (``form="kl", soften_student=False``). The weight U (WTTM) is what is new: for γ < 1 it is from 1 to C^(1−γ), and the larger, the
    less sure the teacher is.

    Args:
        exponent: γ > 0; less than 1 is softer.
        weighted: whether each sample is multiplied by U.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``:
            ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class.
        teacher_logits: the same shape and type; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats (times U), at least 0; a scalar unless ``reduction="none"``. 0 where the student's probabilities are the transformed
        ones. float32 for half-precision inputs, which are computed in float32. A class that the teacher rules out (−inf) adds 0
        whatever the student says; one that only the student rules out gives +inf.

    Raises:
        ValueError: for an exponent that is not positive, shapes that do not fit, an empty batch.

    Same as ``TTM`` and ``WTTM`` of the authors' code, which have no T² either, since the student has no temperature. U does
    not come into the divisor of the mean. The kernel computes it without weights U.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 4.0]])
        >>> TransformedTeacherMatching(exponent=0.5)(student, teacher)
        tensor(0.3278)
        >>> TransformedTeacherMatching(exponent=0.5, weighted=True)(student, teacher)
        tensor(0.3688)

    References:
        Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024, arXiv:2402.11148.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(),
        Case({"exponent": 0.3, "weighted": True, "reduction": "sum"}, optional=("sample_weight",)),
        Case({"exponent": 1.5, "weighted": True}, layouts={"student_logits": "batch tokens classes"}),
    )
    aliases = ("TTM", Alias("WTTM", weighted=True))

    exponent: float = scalar(default=0.5, minimum=0.0, exclusive=True)
    weighted: bool = flag(default=False)

    def covered_by_kernel(self, given: Mapping[str, Spec]) -> bool:
        return not self.weighted

    def fused(self, kernel: KernelPoint, student_logits, teacher_logits, sample_weight, exponent):
        values = kernel(
            SOFT_TARGET,
            "soft",
            _rows,
            {"student": student_logits, "teacher": teacher_logits, "temperature": 1.0 / exponent},
            {"form": "kl", "soften_student": False},
            weight="soft_weight",
        )
        return ops.reduce(ops.at_least_0(values), ops.optional_weight(sample_weight), self.reduction)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=float(self.exponent) == 1 or "the teacher alone is transformed",
            symmetric="the teacher alone is transformed, and weighs the logarithms",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            powers = np.exp(log_softmax(t)) ** self.exponent
            with np.errstate(divide="ignore"):  # the logarithm of 0
                log_p = np.log(powers / powers.sum())
            value = divergence(log_p, log_softmax(s))
            values.append(value * powers.sum() if self.weighted else value)
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
