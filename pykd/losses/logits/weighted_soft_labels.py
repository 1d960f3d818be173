"""Weighted soft labels: soft targets that count the less, the better the student does beside the teacher."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, flag, ops, register, scalar, whole
from pykd.definition.reference import expectation, labelled, log_softmax, reduce_samples, rows
from pykd.losses.logits._shared import at_label, kept_labels


def weighted_soft_labels(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    tau_squared: bool,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Cross-entropies to soft targets by how the student compares with the teacher; see :class:`WeightedSoftLabels`."""
    weight, labels = kept_labels(labels, sample_weight, ignore_index)
    student = ops.upcast(ops.without_left_out(student_logits, weight))
    teacher = ops.upcast(ops.without_left_out(teacher_logits.detach(), weight))
    student_error = -at_label(torch.log_softmax(student.detach(), dim=-1), labels)
    teacher_error = -at_label(torch.log_softmax(teacher, dim=-1), labels)
    focus = -torch.expm1(-student_error / (teacher_error + 1e-7))
    p = torch.softmax(ops.soften(teacher, temperature), dim=-1)
    log_q = torch.log_softmax(ops.soften(student, temperature), dim=-1)
    values = focus * ops.negative_of(ops.expectation(p, log_q))
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(weighted_soft_labels)
class WeightedSoftLabels(Loss):
    r"""Cross-entropy against soft targets, weighed per sample: the less, the smaller the student's own error is beside the teacher's.

    .. math:: \ell_b = T^2 \left(1 - e^{-r_b}\right) \Big(-\sum_c p_{bc} \log q_{bc}\Big), \quad
              r_b = \frac{\log \mathrm{softmax}(s_b)_y}{\log \mathrm{softmax}(t_b)_y - 10^{-7}}, \quad
              p = \mathrm{softmax}(t/T), \; q = \mathrm{softmax}(s/T)

    r is the quotient of the two cross-entropies with the label; the weight that comes of it, between 0 and 1, is a constant as far as the
    gradient goes.

    Args:
        temperature: T > 0 of the soft targets; the weight has none.
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
        Nats (times T²), at least 0; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which are computed in
        float32. Where the teacher gives the label the probability 0, the weight is 0; where both do, it is NaN.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch, or a label out of range (on
            the CPU; elsewhere, in compiled code and in exported files run elsewhere, the loss is NaN).

    Same as the soft part of the authors' code and of mmrazor's ``WSLD``, including the 1e-7, for teachers whose error rounds to 0.
    Both add the cross-entropy with the labels, and weigh this part by 2.5.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> WeightedSoftLabels()(student, teacher, torch.tensor([0]))
        tensor(2.7608)
        >>> WeightedSoftLabels()(student, teacher, torch.tensor([1]))
        tensor(0.7711)

    References:
        Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang: Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
        Tradeoff Perspective, ICLR 2021, arXiv:2102.00650.
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
        Case({"temperature": 3.0, "tau_squared": False, "reduction": "sum"}, optional=("sample_weight",)),
        Case({"ignore_index": 1}, layouts={"labels": "batch tokens"}),
    )
    aliases = ("WSLD", "WSL")

    temperature: float = scalar(default=2.0, minimum=0.0, exclusive=True)
    tau_squared: bool = flag(default=True)
    ignore_index: int = whole(default=-100)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal="the entropy of the teacher is left",
            symmetric="the teacher weighs the logarithms",
        )

    def constants(self, student_logits, teacher_logits, labels, sample_weight=None):
        labels, _ = labelled(labels, sample_weight, self.ignore_index)
        samples = zip(rows(student_logits, 1), rows(teacher_logits, 1), labels.ravel(), strict=True)
        errors = [(-log_softmax(s)[y], -log_softmax(t)[y]) for s, t, y in samples]
        return {"focus": [1 - np.exp(-student / (teacher + 1e-7)) for student, teacher in errors]}

    def reference(self, student_logits, teacher_logits, labels, sample_weight=None, focus=None):
        if focus is None:
            focus = self.constants(student_logits, teacher_logits, labels, sample_weight)["focus"]
        labels, weights = labelled(labels, sample_weight, self.ignore_index)
        values = []
        for s, t, w in zip(rows(student_logits, 1), rows(teacher_logits, 1), focus, strict=True):
            value = -w * expectation(log_softmax(t / self.temperature), log_softmax(s / self.temperature))
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, weights, self.reduction, labels.shape)
