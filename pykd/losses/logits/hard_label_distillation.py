"""Hard-label distillation: the cross-entropy of the student against the class that the teacher decides for."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register
from pykd.definition.reference import log_softmax, reduce_samples, rows
from pykd.fused.description import LABEL_APART, KernelPoint
from pykd.losses.logits._shared import at_label


def _decisions(teacher: Tensor) -> Tensor:
    """The first largest class of each row, and -1, which is no class, where the row has a NaN."""
    return teacher.argmax(dim=-1).masked_fill(torch.isnan(teacher.amax(dim=-1)), -1)


def _rows(student: Tensor, teacher: Tensor, form: str) -> Tensor:
    """One value per row, NaN where there is no decision; see :class:`HardLabelDistillation`."""
    decisions = _decisions(ops.upcast(teacher.detach()))
    return -at_label(torch.log_softmax(ops.upcast(student), dim=-1), decisions)


def hard_label_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Cross-entropy against the teacher's decisions; see :class:`HardLabelDistillation`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits, weight)
    return ops.reduce(_rows(student, teacher, "decision"), weight, reduction)


@register(hard_label_distillation)
class HardLabelDistillation(Loss):
    r"""Cross-entropy of the student's class probabilities against the one class that the teacher decides for.

    .. math:: \ell_b = -\log \mathrm{softmax}(s_b)_{y_b}, \quad y_b = \mathrm{argmax}_c \, t_{bc}

    The first of several largest classes counts. DeiT takes the half of this and of the cross-entropy with the labels, the
    latter of another head of the student.

    Args:
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``:
            ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class.
        teacher_logits: the same shape and type; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats, at least 0, and not 0 where student and teacher agree; a scalar unless ``reduction="none"``. float32 for half-precision
        inputs, which are computed in float32. A class that the student alone rules out gives +inf. NaN in an input gives NaN.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Same as ``hard_target`` with the teacher's decisions for labels; as the hard distillation of DeiT and timm, and mmrazor's
    ``CrossEntropyLoss``. DeiT's soft distillation is ``soft_target`` with ``form="kl", tau_squared=True``, divided by the number
    of classes.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 9.0, 1.0]])
        >>> HardLabelDistillation()(student, teacher)
        tensor(2.1698)

    References:
        Touvron, Cord, Douze, Massa, Sablayrolles, Jégou: Training data-efficient image transformers & distillation through
        attention, ICML 2021, arXiv:2012.12877.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case({"reduction": "sum"}, optional=("sample_weight",)),
        Case(layouts={"student_logits": "batch tokens classes"}),
    )
    aliases = ("hard_distillation", "hard_label")

    def fused(self, kernel: KernelPoint, student_logits, teacher_logits, sample_weight):
        tensors = {"student": student_logits, "teacher": teacher_logits}
        values = kernel(LABEL_APART, "value", _rows, tensors, {"form": "decision"}, weight="weight")
        return ops.reduce(values, ops.optional_weight(sample_weight), self.reduction)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal="the student is never as sure as a decision",
            symmetric="the teacher decides",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        samples = zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True)
        values = [-log_softmax(s)[t.argmax()] + (np.nan if np.isnan(t).any() else 0) for s, t in samples]
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
