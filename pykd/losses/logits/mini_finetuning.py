"""Minifinetuning: soft targets of the model before it is tuned, corrected until the label leads."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, flag, number, ops, register, scalar, whole
from pykd.definition.reference import divergence, labelled, log_softmax, reduce_samples, rows
from pykd.fused.description import LABEL_APART, KernelPoint
from pykd.losses.logits._shared import at_label, is_label, kept_labels, kept_labels_at, without_label


def _corrected(log_p: Tensor, labels: Tensor, right: Tensor, threshold: float, raise_right: bool) -> Tensor:
    """The logarithm of (1 − α) p + α · label, where the label is the teacher's class (``right``) or not; see :class:`MiniFinetuning`."""
    log_rest, _ = without_label(log_p, labels)
    p_label, rest = torch.exp(at_label(log_p, labels)), torch.exp(log_rest)
    lead = torch.exp(log_p.amax(dim=-1)) - p_label
    kept = (1.0 - threshold) / (1.0 + lead)  # 1 − α
    raised = ((1.0 - threshold) * p_label + lead + threshold) / (1.0 + lead)
    if raise_right:
        kept = torch.where(right, ((rest - threshold) / rest.masked_fill(rest == 0, 1.0)).clamp(min=0.0), kept)
        raised = torch.where(right, (p_label + threshold).clamp(max=1.0), raised)
    else:
        kept = kept.masked_fill(right, 1.0)
        raised = torch.where(right, p_label, raised)
    return torch.where(is_label(log_p, labels), torch.log(raised).unsqueeze(-1), log_p + torch.log(kept).unsqueeze(-1))


def _rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    form: str,
    threshold: float,
    raise_right: bool,
) -> Tensor:
    """One value per row; see :class:`MiniFinetuning`."""
    log_p = torch.log_softmax(ops.soften(teacher.detach(), temperature), dim=-1)
    log_q = torch.log_softmax(ops.soften(student, temperature), dim=-1)
    # Of the logits: probabilities that are almost equal round to the same.
    right = ops.upcast(teacher.detach()).argmax(dim=-1) == labels
    return ops.forward_kl(_corrected(log_p, labels, right, threshold, raise_right), log_q, temperature)


def mini_finetuning(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    threshold: float,
    raise_right: bool,
    tau_squared: bool,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """KL divergence from a corrected teacher; see :class:`MiniFinetuning`."""
    weight, labels = kept_labels(labels, sample_weight, ignore_index)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits, weight)
    values = _rows(student, teacher, labels, temperature, "corrected", threshold, raise_right)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(mini_finetuning)
class MiniFinetuning(Loss):
    r"""KL divergence from a teacher, the model before it is tuned, whose probabilities are mixed with the label until that leads.

    .. math:: \ell_b = T^2 \, \mathrm{KL}\big((1 - \alpha)\, p + \alpha\, e_y \,\Vert\, q\big), \quad
              p = \mathrm{softmax}(t/T), \; q = \mathrm{softmax}(s/T)

    with the label's one-hot row :math:`e_y` and, by the teacher's largest class m and the threshold τ,

    .. math:: \alpha = \frac{p_m - p_y + \tau}{1 + p_m - p_y} \; (m \ne y), \qquad
              \alpha = \min\Big(\frac{\tau}{1 - p_y}, 1\Big) \; (m = y)

    Where the teacher is wrong, the label comes to lead m by τ; where it is right, the label's probability grows by τ, up to 1.

    Args:
        temperature: T > 0; larger is softer.
        threshold: τ, from 0 to 1.
        raise_right: whether a teacher that is right is corrected, too; if not, α = 0 there.
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
        Nats (times T²), at least 0; a scalar unless ``reduction="none"``. 0 where the student's probabilities are the corrected ones.
        float32 for half-precision inputs, which are computed in float32. The first of several largest classes counts.

    Raises:
        ValueError: for a temperature that is not positive, a threshold outside of its range, shapes that do not fit, an empty
            batch, or a label out of range (on the CPU; elsewhere, in compiled code and in exported files run elsewhere, the loss
            is NaN).

    Same as ``MFTLoss`` of NVIDIA's Model-Optimizer with ``reduction="batchmean"``, its default; it adds 1e-7 to the denominators.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> MiniFinetuning()(student, teacher, torch.tensor([0]))
        tensor(0.0201)
        >>> MiniFinetuning(raise_right=False)(student, teacher, torch.tensor([1]))
        tensor(0.3278)

    References:
        Belcak, Greco, Dong, Muralidharan, Molchanov: Minifinetuning: Low-Data Generation Domain Adaptation through Corrective
        Self-Distillation, 2025, arXiv:2506.15702.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "labels": Spec("batch", dtype="int64", index_of="classes", draw="indices"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case({"threshold": 0.05}),
        Case(
            {"temperature": 3.0, "raise_right": False, "tau_squared": False, "reduction": "sum"},
            optional=("sample_weight",),
        ),
        Case({"ignore_index": 1}, layouts={"labels": "batch tokens"}),
    )
    aliases = ("MFT", "MFTLoss")

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    threshold: float = number(default=0.2, minimum=0.0, maximum=1.0)
    raise_right: bool = flag(default=True)
    tau_squared: bool = flag(default=True)
    ignore_index: int = whole(default=-100)

    def fused(self, kernel: KernelPoint, student_logits, teacher_logits, labels, sample_weight, temperature):
        weight, labels = kept_labels_at(kernel, labels, sample_weight, self.ignore_index)
        tensors = {
            "student": student_logits,
            "teacher": teacher_logits,
            "labels": labels,
            "temperature": temperature,
        }
        settings = {"form": "corrected", "threshold": self.threshold, "raise_right": self.raise_right}
        values = kernel(LABEL_APART, "value", _rows, tensors, settings, weight="weight")
        return ops.reduce_softened(values, weight, temperature, self.tau_squared, self.reduction)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal="the teacher is corrected",
            symmetric="the teacher is corrected, and weighs the logarithms",
        )

    def reference(self, student_logits, teacher_logits, labels, sample_weight=None):
        labels, weights = labelled(labels, sample_weight, self.ignore_index)
        values = []
        for s, t, y in zip(rows(student_logits, 1), rows(teacher_logits, 1), labels.ravel(), strict=True):
            p = np.exp(log_softmax(t / self.temperature))
            corrected = p + self._share(p, y, t.argmax()) * (np.eye(len(p))[y] - p)
            with np.errstate(divide="ignore"):  # the logarithm of 0
                value = divergence(np.log(corrected), log_softmax(s / self.temperature))
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, weights, self.reduction, labels.shape)

    def _share(self, p, label, largest):
        """α."""
        if largest != label:
            lead = p[largest] - p[label]
            return (lead + self.threshold) / (1 + lead)
        if not self.raise_right or p[label] == 1:
            return 0.0
        return min(self.threshold / (1 - p[label]), 1.0)
