"""Virtual teacher: soft targets made of the label alone."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, flag, number, ops, register, scalar, whole
from pykd.definition.reference import divergence, labelled, log_softmax, reduce_samples, rows
from pykd.fused.description import LABEL_APART, KernelPoint
from pykd.losses.logits._shared import at_label, is_label, kept_labels, kept_labels_at


def _rows(
    student: Tensor,
    labels: Tensor,
    temperature: float,
    form: str,
    label_probability: float,
    soften_student: bool,
) -> Tensor:
    """One value per row; see :class:`VirtualTeacher`."""
    student = ops.upcast(student)
    log_q = torch.log_softmax(ops.soften(student, temperature) if soften_student else student, dim=-1)
    right = is_label(student, labels)
    others = (~right).to(log_q.dtype).sum(dim=-1, keepdim=True)
    virtual = torch.where(right, label_probability, (1.0 - label_probability) / others)
    log_p = torch.log_softmax(ops.soften(virtual, temperature), dim=-1)
    return ops.forward_kl(log_p, log_q, temperature) * at_label(torch.ones_like(log_p), labels)


def virtual_teacher(
    student_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    label_probability: float,
    soften_student: bool,
    tau_squared: bool,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """KL divergence from a teacher made of labels; see :class:`VirtualTeacher`."""
    weight, labels = kept_labels(labels, sample_weight, ignore_index)
    student = ops.without_left_out(student_logits, weight)
    values = _rows(student, labels, temperature, "uniform", label_probability, soften_student)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(virtual_teacher)
class VirtualTeacher(Loss):
    r"""KL divergence of the student from a softened teacher that is made of the label: distillation without a teacher.

    .. math:: \ell_b = \mathrm{KL}\big(\mathrm{softmax}(v/T) \Vert q\big), \quad
              v_c = \begin{cases} a & c = y \\ \frac{1 - a}{C - 1} & c \ne y \end{cases}, \quad
              q = \mathrm{softmax}(s) \text{ or } \mathrm{softmax}(s/T)

    v are probabilities already; the softmax of v/T is one with little between the label and the other classes, since no entry
    of v is above 1. The paper mixes it with the cross-entropy of the labels.

    Args:
        temperature: T > 0.
        label_probability: a, between 0 and 1 and neither.
        soften_student: whether the student's logits are divided by T too.
        tau_squared: whether to multiply by T².
        ignore_index: a label that marks samples to leave out.
        reduction: ``"mean"``: Σ w·ℓ / Σ w, where w is 0 for ignored samples, ``sample_weight`` or 1 elsewhere; 0 where nothing is
            kept. ``"sum"``: Σ w·ℓ. ``"none"``: w·ℓ, shape ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. A class of −inf gives +inf, for the teacher gives every class a probability.
        labels: class indices int64, ``(batch,)`` or ``(batch, tokens)``; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats, at least 0; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which are computed in float32.

    Raises:
        ValueError: for a temperature that is not positive, an a that is not between 0 and 1, shapes that do not fit, an empty
            batch, or a label out of range (on the CPU; elsewhere, in compiled code and in exported files run elsewhere, the loss
            is NaN).

    Who differs: the authors' code and KD_Lib soften the teacher alone, as is the default here, where the paper writes the student
    softened, too; they average over the classes as well (C times less), which the authors make good by a multiplier.

    Example:
        >>> VirtualTeacher(temperature=2.0)(torch.tensor([[0.0, 2.0]]), torch.tensor([0]))
        tensor(0.7031)

    References:
        Yuan, Tay, Li, Wang, Feng: Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020,
        arXiv:1909.11723.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits"),
        "labels": Spec("batch", dtype="int64", index_of="classes", draw="indices"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(),
        Case(
            {"temperature": 3.0, "label_probability": 0.9, "soften_student": True, "tau_squared": True},
            optional=("sample_weight",),
        ),
        Case({"temperature": 0.5, "ignore_index": 1, "reduction": "sum"}, layouts={"labels": "batch tokens"}),
    )
    aliases = ("TFKD", "TfKDreg", "teacher_free_kd")

    temperature: float = scalar(default=20.0, minimum=0.0, exclusive=True)
    label_probability: float = number(default=0.99, above=0.0, below=1.0)
    soften_student: bool = flag(default=False)
    tau_squared: bool = flag(default=False)
    ignore_index: int = whole(default=-100)

    def fused(self, kernel: KernelPoint, student_logits, labels, sample_weight, temperature):
        weight, labels = kept_labels_at(kernel, labels, sample_weight, self.ignore_index)
        tensors = {"student": student_logits, "labels": labels, "temperature": temperature}
        settings = {
            "form": "uniform",
            "label_probability": self.label_probability,
            "soften_student": self.soften_student,
        }
        values = kernel(LABEL_APART, "value", _rows, tensors, settings, weight="weight")
        return ops.reduce_softened(values, weight, temperature, self.tau_squared, self.reduction)

    def properties(self) -> Properties:
        hot = float(self.temperature) > 5 and not self.soften_student
        return Properties(
            logit_shift=True,
            masked_classes="the virtual teacher gives every class a probability",
            distils="a student that is not softened becomes almost uniform, as a hot teacher is" if hot else True,
        )

    def reference(self, student_logits, labels, sample_weight=None):
        labels, weights = labelled(labels, sample_weight, self.ignore_index)
        values = []
        for s, y in zip(rows(student_logits, 1), labels.ravel(), strict=True):
            virtual = np.full(len(s), (1 - self.label_probability) / max(len(s) - 1, 1))
            virtual[y] = self.label_probability
            log_q = log_softmax(s / self.temperature if self.soften_student else s)
            value = divergence(log_softmax(virtual / self.temperature), log_q)
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, weights, self.reduction, labels.shape)
