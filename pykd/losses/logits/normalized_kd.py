"""Normalised knowledge distillation: the label's soft target, and those of the other classes made a distribution of their own."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, flag, ops, register, scalar, whole
from pykd.definition.reference import expectation, labelled, log_softmax, part, reduce_samples, rows
from pykd.fused.description import LABEL_APART, KernelPoint
from pykd.losses.logits._shared import at_label, kept_labels, kept_labels_at, without_label


def _rows(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, other_weight: float, form: str
) -> Tensor:
    """One value per row; see :class:`NormalizedKD`."""
    student, teacher = ops.upcast(student), ops.upcast(teacher.detach())
    p_label = torch.exp(at_label(torch.log_softmax(teacher, dim=-1), labels))
    target = ops.product_or_zero(p_label, at_label(torch.log_softmax(student, dim=-1), labels))
    _, log_p = without_label(torch.log_softmax(ops.soften(teacher, temperature), dim=-1), labels)
    _, log_q = without_label(torch.log_softmax(ops.soften(student, temperature), dim=-1), labels)
    return ops.negative_of(target + ops.part(other_weight, ops.expectation(torch.exp(log_p), log_q)))


def _other_weight(non_target_weight: float, temperature: float, tau_squared: bool) -> float:
    """What the part of the other classes counts beside that of the label, which has no temperature."""
    return non_target_weight * (temperature * temperature) if tau_squared else non_target_weight


def normalized_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    non_target_weight: float,
    tau_squared: bool,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Cross-entropies of the label's class and of all others, normalised; see :class:`NormalizedKD`."""
    weight, labels = kept_labels(labels, sample_weight, ignore_index)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits, weight)
    other_weight = _other_weight(non_target_weight, temperature, tau_squared)
    return ops.reduce(_rows(student, teacher, labels, temperature, other_weight, "normalized"), weight, reduction)


@register(normalized_kd)
class NormalizedKD(Loss):
    r"""Cross-entropy of the label's class by the teacher's trust in it, and of the other classes made a distribution of their own.

    .. math:: \ell_b = -p_y \log q_y - \gamma T^2 \sum_{c \ne y} \hat p_c \log \hat q_c, \quad
              p = \mathrm{softmax}(t), \; q = \mathrm{softmax}(s), \quad
              \hat p_c = \frac{e^{t_c/T}}{\sum_{k \ne y} e^{t_k/T}}

    and :math:`\hat q` of the student likewise. Only the second part has a temperature. As the first part the paper sees the
    ordinary cross-entropy with the label, −log q_y, which is not part of this loss: add ``hard_target``.

    Args:
        temperature: T > 0 of the other classes.
        non_target_weight: γ, at least 0, of the other classes.
        tau_squared: whether to multiply the part of the other classes by T².
        ignore_index: a label that marks samples to leave out.
        reduction: ``"mean"``: Σ w·ℓ / Σ w, where w is 0 for ignored samples, ``sample_weight`` or 1 elsewhere; 0 where nothing is
            kept. ``"sum"``: Σ w·ℓ. ``"none"``: w·ℓ, shape ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class.
        teacher_logits: the same shape and type; constant.
        labels: class indices int64, ``(batch,)`` or ``(batch, tokens)``; constant. Of soft labels, take the largest.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats, at least 0; a cross-entropy, which does not become 0 where student and teacher agree; a scalar unless
        ``reduction="none"``. float32 for half-precision inputs, which are computed in float32. With two classes the second part is 0.

    Raises:
        ValueError: for a temperature that is not positive, a negative weight, shapes that do not fit, an empty batch, or a label
            out of range (on the CPU; elsewhere, in compiled code and in exported files run elsewhere, the loss is NaN).

    Same as ``NKDLoss`` of the authors' code (cls_KD), defaults included, which adds the cross-entropy outside, too.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> NormalizedKD(temperature=2.0)(student, teacher, torch.tensor([0]))
        tensor(4.8897)

    References:
        Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
        Normalized Loss and Customized Soft Labels, ICCV 2023, arXiv:2303.13005.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "labels": Spec("batch", dtype="int64", index_of="classes", draw="indices"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(),
        Case({"temperature": 3.0, "non_target_weight": 0.5, "reduction": "sum"}, optional=("sample_weight",)),
        Case({"temperature": 0.5, "tau_squared": False, "ignore_index": 1}, layouts={"labels": "batch tokens"}),
    )
    aliases = ("NKD", "NKDLoss")

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    non_target_weight: float = scalar(default=1.5, minimum=0.0)
    tau_squared: bool = flag(default=True)
    ignore_index: int = whole(default=-100)

    def fused(
        self, kernel: KernelPoint, student_logits, teacher_logits, labels, sample_weight, temperature, non_target_weight
    ):
        weight, labels = kept_labels_at(kernel, labels, sample_weight, self.ignore_index)
        tensors = {
            "student": student_logits,
            "teacher": teacher_logits,
            "labels": labels,
            "temperature": temperature,
            "other_weight": _other_weight(non_target_weight, temperature, self.tau_squared),
        }
        values = kernel(LABEL_APART, "value", _rows, tensors, {"form": "normalized"}, weight="weight")
        return ops.reduce(values, weight, self.reduction)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal="the entropy of the teacher is left",
            symmetric="the teacher weighs the logarithms",
        )

    def reference(self, student_logits, teacher_logits, labels, sample_weight=None):
        labels, weights = labelled(labels, sample_weight, self.ignore_index)
        values = []
        for s, t, y in zip(rows(student_logits, 1), rows(teacher_logits, 1), labels.ravel(), strict=True):
            value = -np.exp(log_softmax(t)[y]) * log_softmax(s)[y]
            if len(s) > 1:
                log_p, log_q = (log_softmax(np.delete(x, y) / self.temperature) for x in (t, s))
                factor = self.temperature**2 if self.tau_squared else 1.0
                value -= part(self.non_target_weight * factor, expectation(log_p, log_q))
            values.append(value)
        return reduce_samples(values, weights, self.reduction, labels.shape)
