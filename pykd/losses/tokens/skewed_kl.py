"""Skewed KL divergence: one of the two distributions is mixed with a share of the other before they are compared."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import (
    SAMPLE_WEIGHT,
    Alias,
    Case,
    Loss,
    Properties,
    Spec,
    choice,
    flag,
    number,
    ops,
    register,
    scalar,
)
from pykd.definition.reference import log_softmax, reduce_samples, rows
from pykd.fused.description import DIVERGENCE, KernelPoint

DIRECTIONS = ("forward", "reverse")


def _form(direction: str) -> str:
    """What the kernel calls it."""
    return "skewed_kl" if direction == "forward" else "skewed_reverse_kl"


def _rows(student: Tensor, teacher: Tensor, temperature: float, form: str, alpha: float) -> Tensor:
    """One value per row; see :class:`SkewedKL`."""
    log_q = torch.log_softmax(ops.soften(student, temperature), dim=-1)
    log_p = torch.log_softmax(ops.soften(teacher.detach(), temperature), dim=-1)
    log_ratio = ops.log_ratio(log_p, log_q)
    if form == "skewed_kl":  # log(m / p), of which little is left where p and q are almost equal
        log_of_mixture = torch.log1p((1 - alpha) * torch.expm1(log_ratio))
        return ops.negative_of((torch.exp(log_p) * log_of_mixture).sum(dim=-1))
    log_of_mixture = torch.log1p((1 - alpha) * torch.expm1(-log_ratio))
    return ops.negative_of((torch.exp(log_q) * log_of_mixture).sum(dim=-1))


def skewed_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    alpha: float,
    direction: str,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """KL divergence from a distribution to its mixture with the other; see :class:`SkewedKL`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits, weight)
    values = _rows(student, teacher, temperature, _form(direction), alpha)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(skewed_kl)
class SkewedKL(Loss):
    r"""KL divergence from the teacher (or the student) to a mixture of both, which keeps it finite.

    .. math:: \ell_b = \mathrm{KL}(p_b \Vert \alpha p_b + (1 - \alpha) q_b), \quad p = \mathrm{softmax}(t/T), \;
              q = \mathrm{softmax}(s/T)

    That is ``direction="forward"``. With ``"reverse"``
    :math:`\ell_b = \mathrm{KL}(q_b \Vert \alpha q_b + (1 - \alpha) p_b)`.

    Args:
        temperature: T > 0; larger is softer. The paper has 1.
        alpha: α, above 0 and below 1: the share of the distribution itself in the mixture. Near 0 the divergence tends to
            the forward (or reverse) KL divergence.
        direction: ``"forward"`` or ``"reverse"``.
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
        Nats, from 0 to −log α; 0 where q = p; a scalar unless ``reduction="none"``. Always finite, and so is
        its gradient. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, an α that is not between 0 and 1, shapes that do not fit, an empty
            batch.

    Who differs: DistiLLM's own code (``skewed_forward_kl``) leaves the entropy of the teacher out: more by
    :math:`-\sum_c p_c \log p_c`, with the same gradient; its ``skewed_reverse_kl``, DSKD and DistiLLM-2 have the divergence.
    All of them divide by the number of kept tokens, have no T², and call α ``lam``.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> SkewedKL(alpha=0.2)(student, teacher)
        tensor(0.2226)
        >>> SkewedKL(alpha=0.2, direction="reverse")(student, teacher)
        tensor(0.2320)

    References:
        Ko et al.: DistiLLM: Towards Streamlined Distillation for Large Language Models, 2024, arXiv:2402.03898.
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
            {"temperature": 2.0, "alpha": 0.3, "direction": "reverse", "tau_squared": True, "reduction": "sum"},
            optional=("sample_weight",),
        ),
    )
    aliases = (
        "SKL",
        "SFKL",
        "skewed_forward_kl",
        Alias("SRKL", direction="reverse"),
        Alias("skewed_reverse_kl", direction="reverse"),
    )

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    alpha: float = number(default=0.1, above=0.0, below=1.0)
    direction: str = choice(DIRECTIONS, default="forward")
    tau_squared: bool = flag(default=False)

    def fused(self, kernel: KernelPoint, student_logits, teacher_logits, sample_weight, temperature):
        tensors = {"student": student_logits, "teacher": teacher_logits, "temperature": temperature}
        settings = {"form": _form(self.direction), "alpha": self.alpha}
        values = kernel(DIVERGENCE, "value", _rows, tensors, settings, weight="weight")
        return ops.reduce_softened(
            values, ops.optional_weight(sample_weight), temperature, self.tau_squared, self.reduction
        )

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=True,
            symmetric="one of the two is mixed with the other",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            p, q = np.exp(log_softmax(t / self.temperature)), np.exp(log_softmax(s / self.temperature))
            first, second = (p, q) if self.direction == "forward" else (q, p)
            mixture = self.alpha * first + (1 - self.alpha) * second
            value = sum(a * np.log(a / m) for a, m in zip(first, mixture, strict=True) if a != 0)
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
