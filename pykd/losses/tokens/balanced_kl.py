"""Balanced divergence: of forward and reverse KL divergence the one counts more whose side is less certain."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, flag, ops, register, scalar
from pykd.definition.reference import divergence, expectation, log_softmax, part, reduce_samples, rows
from pykd.fused.description import DIVERGENCE, KernelPoint


def _uncertainties(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of which that is larger whose row has more entropy: the entropies, or of rows in which one class has all the logarithm
    of what the next one has."""
    of_teacher, of_student = -ops.expectation(torch.exp(log_p), log_p), -ops.expectation(torch.exp(log_q), log_q)
    one_has_all = (of_teacher == 0) & (of_student == 0)
    return torch.where(one_has_all, _next(log_p), of_teacher), torch.where(one_has_all, _next(log_q), of_student)


def _next(logs: Tensor) -> Tensor:
    others = logs.masked_fill(logs == logs.amax(dim=-1, keepdim=True), float("-inf"))
    return others.amax(dim=-1).clamp(min=-744.44)  # beyond which a float64 is 0


def _rows(student: Tensor, teacher: Tensor, temperature: float, emphasis: float, form: str) -> Tensor:
    """One value per row; see :class:`BalancedKL`."""
    log_q = torch.log_softmax(ops.soften(student, temperature), dim=-1)
    log_p = torch.log_softmax(ops.soften(teacher.detach(), temperature), dim=-1)
    of_teacher, of_student = _uncertainties(log_p, log_q.detach())
    forward = ops.forward_kl(log_p, log_q, temperature)
    # Without a weight the reverse divergence has no infinite logarithm either, of which the gradient would be NaN.
    unweighted = (of_student > of_teacher) & (torch.zeros_like(of_student) + emphasis == 0)
    log_p_reverse = torch.where(unweighted.unsqueeze(-1), log_q.detach(), log_p)
    reverse = ops.reverse_kl(log_p_reverse, log_q, temperature)
    values = torch.where(of_teacher > of_student, ops.part(emphasis, forward), forward)
    return values + torch.where(of_student > of_teacher, ops.part(emphasis, reverse), reverse)


def balanced_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    emphasis: float,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """Forward and reverse KL divergence, one of them emphasised in each sample; see :class:`BalancedKL`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits, weight)
    values = _rows(student, teacher, temperature, emphasis, "balanced_kl")
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(balanced_kl)
class BalancedKL(Loss):
    r"""Sum of forward and reverse KL divergence, of which in every sample the one is emphasised whose side has more entropy.

    .. math:: \ell_b = w_t \mathrm{KL}(p_b \Vert q_b) + w_s \mathrm{KL}(q_b \Vert p_b), \quad
              w_t = \begin{cases} \nu & H(p_b) > H(q_b) \\ 1 & \text{else} \end{cases}, \;
              w_s = \begin{cases} \nu & H(q_b) > H(p_b) \\ 1 & \text{else} \end{cases}

    with p = softmax(t / T), q = softmax(s / T) and the entropy H. The weights are constants: they jump, and no gradient flows
    through them.

    Args:
        temperature: T > 0; larger is softer.
        emphasis: ν, at least 0.
        tau_squared: whether to multiply by T². Off by default.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1, so the mean over kept tokens; ``"sum"``;
            ``"none"``: ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class.
        teacher_logits: the same shape and type; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers), such as ``labels != -100``; constant. A sample of weight 0 has no part in value and gradient,
            whatever it holds.

    Returns:
        Nats, at least 0; 0 when q = p; a scalar unless ``reduction="none"``. +inf where one of the two rules out (−inf) a
        class that the other does not, but in a divergence whose weight is 0. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, a negative emphasis, shapes that do not fit, an empty batch.

    Who differs: ABKD's ``bdkd``, of which the default ν is, has the cross-entropy in the place of the forward divergence: more by
    :math:`w_t H(p)`, with the same gradient; it leaves out classes with infinite logits, and has T = 1. The paper
    trains the teacher, too, by a loss of its own.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> BalancedKL()(student, teacher)
        tensor(1.6292)
        >>> BalancedKL(emphasis=1.0)(student, teacher)
        tensor(0.7616)

    References:
        Amara et al.: BD-KD: Balancing the Divergences for Online Knowledge Distillation, 2022, arXiv:2212.12965.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(layouts={"student_logits": "batch tokens classes"}),
        Case(
            {"temperature": 2.0, "emphasis": 2.0, "tau_squared": True, "reduction": "sum"},
            optional=("sample_weight",),
        ),
    )
    aliases = ("BDKD", "BD-KD")

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    emphasis: float = scalar(default=3.0, minimum=0.0)
    tau_squared: bool = flag(default=False)

    def fused(self, kernel: KernelPoint, student_logits, teacher_logits, sample_weight, temperature, emphasis):
        tensors = {
            "student": student_logits,
            "teacher": teacher_logits,
            "temperature": temperature,
            "emphasis": emphasis,
        }
        values = kernel(DIVERGENCE, "value", _rows, tensors, {"form": "balanced_kl"}, weight="weight")
        return ops.reduce_softened(
            values, ops.optional_weight(sample_weight), temperature, self.tau_squared, self.reduction
        )

    def properties(self) -> Properties:
        return Properties(logit_shift=True, masked_classes=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            log_q, log_p = log_softmax(s / self.temperature), log_softmax(t / self.temperature)
            teacher_entropy, student_entropy = -expectation(log_p, log_p), -expectation(log_q, log_q)
            forward, reverse = divergence(log_p, log_q), divergence(log_q, log_p)
            forward = part(self.emphasis if teacher_entropy > student_entropy else 1.0, forward)
            reverse = part(self.emphasis if student_entropy > teacher_entropy else 1.0, reverse)
            values.append((forward + reverse) * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
