"""Knowledge adjustment: soft targets of a teacher that is put right where it is wrong about the label."""

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
    whole,
)
from pykd.definition.reference import divergence, labelled, log_softmax, reduce_samples, rows
from pykd.losses.logits._shared import at_label, is_label, kept_labels

ADJUSTMENTS = ("probability_shift", "label_smoothing")


def _shifted(teacher: Tensor, labels: Tensor) -> Tensor:
    """The teacher's logits, of which the largest and the label's have changed places."""
    largest = teacher.amax(dim=-1, keepdim=True)
    top = is_label(teacher, teacher.argmax(dim=-1))
    exchanged = torch.where(top, at_label(teacher, labels).unsqueeze(-1), teacher)
    return torch.where(is_label(teacher, labels), largest, exchanged)


def _smoothed(teacher: Tensor, log_p: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """``log_p``; the logarithm of the smoothed label where another class than the label has the largest logit."""
    label = is_label(teacher, labels).to(log_p.dtype)
    classes = torch.ones_like(label).sum(dim=-1, keepdim=True)
    smoothed = torch.log((1.0 - label_smoothing) * label + label_smoothing / classes)
    wrong = (at_label(teacher, labels) < teacher.amax(dim=-1)).unsqueeze(-1)
    return torch.where(wrong, smoothed, log_p) + at_label(torch.zeros_like(log_p), labels).unsqueeze(-1)


def knowledge_adjustment(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    adjustment: str,
    label_smoothing: float,
    tau_squared: bool,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """KL divergence from a teacher put right; see :class:`KnowledgeAdjustment`."""
    weight, labels = kept_labels(labels, sample_weight, ignore_index)
    teacher = ops.upcast(ops.without_left_out(teacher_logits.detach(), weight))
    if adjustment == "probability_shift":
        log_p = torch.log_softmax(ops.soften(_shifted(teacher, labels), temperature), dim=-1)
    else:
        log_p = torch.log_softmax(ops.soften(teacher, temperature), dim=-1)
        log_p = _smoothed(teacher, log_p, labels, label_smoothing)
    log_q = torch.log_softmax(ops.soften(ops.without_left_out(student_logits, weight), temperature), dim=-1)
    values = ops.forward_kl(log_p, log_q, temperature)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(knowledge_adjustment)
class KnowledgeAdjustment(Loss):
    r"""KL divergence of soft targets that are put right wherever the teacher's largest class is not the label.

    .. math:: \ell_b = T^2 \, \mathrm{KL}\big(A(p_b) \Vert q_b\big), \quad p = \mathrm{softmax}(t/T), \; q = \mathrm{softmax}(s/T)

    A(p) = p where the label y has the largest probability. Elsewhere

    - ``"probability_shift"`` (PS): the probabilities of the largest class and of y change places;
    - ``"label_smoothing"`` (LSR): :math:`A(p)_c = (1 - \varepsilon) [c = y] + \varepsilon / C` among C classes.

    Args:
        temperature: T > 0; larger is softer. The smoothed label has none.
        adjustment: ``"probability_shift"`` or ``"label_smoothing"``.
        label_smoothing: ε, from 0 to 1; nothing else looks at it.
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
        Nats (times T²), at least 0, and 0 where student and teacher agree and the teacher is right; a scalar unless
        ``reduction="none"``. float32 for half-precision inputs, which are computed in float32. The smoothed label gives every class
        a probability: one that the student rules out (−inf) gives +inf. The first of several largest classes counts.

    Raises:
        ValueError: for a temperature that is not positive, an ε outside of its range, shapes that do not fit, an empty batch, or a
            label out of range (on the CPU; elsewhere, in compiled code and in exported files run elsewhere, the loss is NaN).

    Who differs: TextBrewer shifts logits, which is the same, since all of them have one temperature. KD_Lib spreads ε over the
    other C − 1 classes, and hands PyTorch's KL divergence probabilities in the place of logarithms, and student and teacher in each
    other's place: what it computes is no divergence.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> KnowledgeAdjustment(temperature=1.0)(student, teacher, torch.tensor([0]))
        tensor(0.3278)
        >>> KnowledgeAdjustment(temperature=1.0, adjustment="label_smoothing")(student, teacher, torch.tensor([0]))
        tensor(0.4946)

    References:
        Wen, Lai, Qian: Preparing Lessons: Improve Knowledge Distillation with Better Supervision, 2019, arXiv:1911.07471.
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
            {"temperature": 1.5, "adjustment": "label_smoothing", "label_smoothing": 0.2, "reduction": "sum"},
            optional=("sample_weight",),
        ),
        Case({"tau_squared": False, "ignore_index": 1}, layouts={"labels": "batch tokens"}),
    )
    aliases = ("KA", "ProbShift", Alias("LabelSmoothReg", adjustment="label_smoothing"))

    temperature: float = scalar(default=4.0, minimum=0.0, exclusive=True)
    adjustment: str = choice(ADJUSTMENTS, default="probability_shift")
    label_smoothing: float = number(default=0.1, minimum=0.0, maximum=1.0)
    tau_squared: bool = flag(default=True)
    ignore_index: int = whole(default=-100)

    def properties(self) -> Properties:
        shift = self.adjustment == "probability_shift"
        return Properties(
            logit_shift=True,
            masked_classes=shift or "the smoothed label gives every class a probability",
            zero_when_equal="a teacher that is wrong is put right",
            symmetric="the teacher is put right, and weighs the logarithms",
        )

    def reference(self, student_logits, teacher_logits, labels, sample_weight=None):
        labels, weights = labelled(labels, sample_weight, self.ignore_index)
        values = []
        for s, t, y in zip(rows(student_logits, 1), rows(teacher_logits, 1), labels.ravel(), strict=True):
            log_p, top = log_softmax(t / self.temperature), int(np.argmax(t))
            if top != y and self.adjustment == "probability_shift":
                log_p[[top, y]] = log_p[[y, top]]
            elif t[y] < t[top]:
                log_p = np.log((1 - self.label_smoothing) * np.eye(len(t))[y] + self.label_smoothing / len(t))
            value = divergence(log_p, log_softmax(s / self.temperature))
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, weights, self.reduction, labels.shape)
