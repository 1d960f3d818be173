"""Decoupled knowledge distillation: the label against the rest, and the rest among themselves, weighed apart."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, flag, ops, register, scalar, whole
from pykd.definition.reference import divergence, labelled, log_softmax, part, reduce_samples, rows
from pykd.fused.description import LABEL_APART, KernelPoint
from pykd.losses.logits._shared import at_label, kept_labels, kept_labels_at, without_label


def _rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    target_weight: float,
    other_weight: float,
    form: str,
) -> Tensor:
    """One value per row; see :class:`DecoupledKD`."""
    log_p = torch.log_softmax(ops.soften(teacher.detach(), temperature), dim=-1)
    log_q = torch.log_softmax(ops.soften(student, temperature), dim=-1)
    log_p_rest, log_p_others = without_label(log_p, labels)
    log_q_rest, log_q_others = without_label(log_q, labels)
    log_p_binary = torch.stack([at_label(log_p, labels), log_p_rest], dim=-1)
    log_q_binary = torch.stack([at_label(log_q, labels), log_q_rest], dim=-1)
    target = ops.forward_kl(log_p_binary, log_q_binary, temperature)
    others = ops.forward_kl(log_p_others, log_q_others, temperature)
    others = others.masked_fill(log_p_rest == float("-inf"), 0.0)  # a teacher that masks them says nothing of them
    return ops.part(target_weight, target) + ops.part(other_weight, others)


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    target_weight: float,
    non_target_weight: float,
    tau_squared: bool,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Divergences of label against rest and among the rest; see :class:`DecoupledKD`."""
    weight, labels = kept_labels(labels, sample_weight, ignore_index)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits, weight)
    values = _rows(student, teacher, labels, temperature, target_weight, non_target_weight, "decoupled")
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(decoupled_kd)
class DecoupledKD(Loss):
    r"""The KL divergence of soft targets in two parts with weights of their own: label against rest, and among the rest.

    .. math:: \ell_b = T^2 \big( \alpha \, \mathrm{KL}(b^p \Vert b^q) + \beta \, \mathrm{KL}(\hat p \Vert \hat q) \big),
              \quad b^p = (p_y, 1 - p_y), \quad \hat p_c = \frac{p_c}{1 - p_y} \; (c \ne y), \quad
              p = \mathrm{softmax}(t/T)

    and the same of the student's q = softmax(s/T). With α = 1 and :math:`\beta = 1 - p_y` the sum would be
    :math:`T^2 \mathrm{KL}(p \Vert q)`: where the teacher is sure of the label, that leaves little of the second part.

    Args:
        temperature: T > 0; larger is softer.
        target_weight: α, at least 0: of the label against the rest (TCKD).
        non_target_weight: β, at least 0: of the rest among themselves (NCKD).
        tau_squared: whether to multiply by T².
        ignore_index: a label that marks samples to leave out.
        reduction: ``"mean"``: Σ w·ℓ / Σ w, where w is 0 for ignored samples, ``sample_weight`` or 1 elsewhere; 0 where nothing is
            kept. ``"sum"``: Σ w·ℓ. ``"none"``: w·ℓ, shape ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class.
        teacher_logits: the same shape and type; constant.
        labels: class indices int64, ``(batch,)`` or ``(batch, tokens)``; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats (times T²), at least 0, and 0 where student and teacher agree; a scalar unless ``reduction="none"``. float32 for
        half-precision inputs, which are computed in float32. Finite however sure student and teacher are, for everything is
        computed from logarithms. With two classes the second part is 0; with one, both. A class that the student alone rules
        out (−inf) gives +inf, but in a part whose weight is 0. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, negative weights, shapes that do not fit, an empty batch, or a label
            out of range (on the CPU; elsewhere, in compiled code and in exported files run elsewhere, the loss is NaN).

    Who differs: mdistiller (the authors' code) leaves the label out by −1000 on its logit after the division by T, which is the same
    number as long as logits differ by less than some hundreds, but takes the logarithm of probabilities, which makes the
    loss infinite and the gradient NaN where one rounds to 0. Its defaults are those here; it also multiplies by a warm-up that grows
    over the first epochs: ``loss(…, target_weight=…)`` in each call does that. mmrazor sums over the batch whatever the reduction, but for ``"batchmean"``.
    PaddleSlim takes the teacher's largest class for the label, and probabilities for their logarithms.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
        >>> DecoupledKD(temperature=2.0)(student, teacher, torch.tensor([0]))
        tensor(3.6936)
        >>> DecoupledKD(temperature=2.0, non_target_weight=0.0)(student, teacher, torch.tensor([0]))
        tensor(0.1434)

    References:
        Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679.
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
        Case(
            {
                "temperature": 1.5,
                "target_weight": 2.0,
                "non_target_weight": 0.5,
                "tau_squared": False,
                "ignore_index": 1,
            },
            optional=("sample_weight",),
        ),
        Case({"reduction": "sum"}, layouts={"labels": "batch tokens"}, optional=("sample_weight",)),
    )
    aliases = ("DKD", "DKDLoss")

    temperature: float = scalar(default=4.0, minimum=0.0, exclusive=True)
    target_weight: float = scalar(default=1.0, minimum=0.0)
    non_target_weight: float = scalar(default=8.0, minimum=0.0)
    tau_squared: bool = flag(default=True)
    ignore_index: int = whole(default=-100)

    def fused(
        self,
        kernel: KernelPoint,
        student_logits,
        teacher_logits,
        labels,
        sample_weight,
        temperature,
        target_weight,
        non_target_weight,
    ):
        weight, labels = kept_labels_at(kernel, labels, sample_weight, self.ignore_index)
        tensors = {
            "student": student_logits,
            "teacher": teacher_logits,
            "labels": labels,
            "temperature": temperature,
            "target_weight": target_weight,
            "other_weight": non_target_weight,
        }
        values = kernel(LABEL_APART, "value", _rows, tensors, {"form": "decoupled"}, weight="weight")
        return ops.reduce_softened(values, weight, temperature, self.tau_squared, self.reduction)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=True,
            symmetric="the teacher weighs the logarithms",
        )

    def reference(self, student_logits, teacher_logits, labels, sample_weight=None):
        labels, weights = labelled(labels, sample_weight, self.ignore_index)
        values = []
        for s, t, y in zip(rows(student_logits, 1), rows(teacher_logits, 1), labels.ravel(), strict=True):
            log_p, log_q = log_softmax(t / self.temperature), log_softmax(s / self.temperature)
            target = divergence(_label_and_rest(log_p, y), _label_and_rest(log_q, y))
            others = np.delete(log_p, y), np.delete(log_q, y)
            possible = len(others[0]) > 0 and others[0].max() > -np.inf
            non_target = divergence(log_softmax(others[0]), log_softmax(others[1])) if possible else 0.0
            value = part(self.target_weight, target) + part(self.non_target_weight, non_target)
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, weights, self.reduction, labels.shape)


def _label_and_rest(log_probabilities, label):
    """log p_y and log(1 − p_y)."""
    return log_probabilities[label], np.logaddexp.reduce(np.delete(log_probabilities, label))
