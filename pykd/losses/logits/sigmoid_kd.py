"""Sigmoid distillation: every class a question of its own, for several labels per sample."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, choice, flag, ops, register, scalar
from pykd.definition.reference import divergence, expectation, log_softmax, reduce_samples, rows

FORMS = ("kl", "cross_entropy")
OVER_CLASSES = ("sum", "mean")


def _binary_log_probs(logits: Tensor, temperature: float) -> Tensor:
    """log σ(x/T) and log(1 − σ(x/T)) along a new last axis: the softmax of x and 0."""
    return torch.log_softmax(ops.soften(torch.stack([logits, torch.zeros_like(logits)], dim=-1), temperature), dim=-1)


def sigmoid_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    form: str,
    over_classes: str,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """Divergence, or cross-entropy, of each class's probability by itself; see :class:`SigmoidKD`."""
    weight = ops.optional_weight(sample_weight)
    log_p = _binary_log_probs(ops.without_left_out(teacher_logits.detach(), weight), temperature)
    log_q = _binary_log_probs(ops.without_left_out(student_logits, weight), temperature)
    if form == "kl":
        classes = ops.forward_kl(log_p, log_q, temperature)
    else:
        classes = ops.negative_of(ops.expectation(torch.exp(log_p), log_q))
    values = classes.sum(dim=-1) if over_classes == "sum" else classes.mean(dim=-1)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(sigmoid_kd)
class SigmoidKD(Loss):
    r"""Binary KL divergence (or cross-entropy) of every class by itself, for tasks where a sample may have several labels.

    .. math:: \ell_b = \sum_c \Big( p_{bc} \log \frac{p_{bc}}{q_{bc}} + (1 - p_{bc}) \log \frac{1 - p_{bc}}{1 - q_{bc}} \Big), \quad
              p = \sigma(t/T), \; q = \sigma(s/T), \quad \sigma(x) = \frac{1}{1 + e^{-x}}

    ``form="cross_entropy"`` leaves out the teacher's logarithms, which changes no gradient.

    Args:
        temperature: T > 0; larger is softer.
        form: ``"kl"`` or ``"cross_entropy"``.
        over_classes: ``"sum"``, as written, or ``"mean"``, C times less among C classes.
        tau_squared: whether to multiply by T².
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``:
            ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf is the probability 0.
        teacher_logits: the same shape and type; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats (times T²), at least 0; the divergence is 0 where student and teacher agree; a scalar unless
        ``reduction="none"``. float32 for half-precision inputs, which are computed in float32. A class that the student alone rules out
        gives +inf.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: PyTorch's ``binary_cross_entropy_with_logits(s, σ(t))`` is ``form="cross_entropy", over_classes="mean"`` at T = 1.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 2.0]])
        >>> SigmoidKD()(student, teacher)
        tensor(0.3278)

    References:
        Yang, Xie, Zong, Feng, Niu, Huang: Multi-Label Knowledge Distillation, ICCV 2023, arXiv:2308.06453.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(),
        Case(
            {"temperature": 3.0, "form": "cross_entropy", "over_classes": "mean", "tau_squared": True},
            optional=("sample_weight",),
        ),
        Case({"reduction": "sum"}, layouts={"student_logits": "batch tokens classes"}),
    )
    aliases = ("MultiLabelKD", "binary_kd")

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    form: str = choice(FORMS, default="kl")
    over_classes: str = choice(OVER_CLASSES, default="sum")
    tau_squared: bool = flag(default=False)

    def properties(self) -> Properties:
        return Properties(
            logit_shift="every class is compared with 0",
            masked_classes=self.over_classes == "sum" or "a class more makes the mean smaller",
            zero_when_equal=self.form == "kl" or "the entropy of the teacher is left",
            symmetric="the teacher weighs the logarithms",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            classes = []
            for x, y in zip(s / self.temperature, t / self.temperature, strict=True):
                log_q, log_p = log_softmax([x, 0.0]), log_softmax([y, 0.0])
                classes.append(divergence(log_p, log_q) if self.form == "kl" else -expectation(log_p, log_q))
            value = np.sum(classes) if self.over_classes == "sum" else np.mean(classes)
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
