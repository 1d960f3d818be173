"""Hard targets: the cross-entropy of the student against the labels."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, number, ops, register, whole
from pykd.definition.reference import labelled, log_softmax, reduce_samples, rows
from pykd.fused.description import SOFT_TARGET, KernelPoint
from pykd.losses.logits._shared import at_label, kept_weight


def hard_target_rows(student: Tensor, labels: Tensor) -> Tensor:
    """One value per row for class indices, NaN where one is out of range; see :class:`HardTarget`."""
    log_q = torch.log_softmax(ops.upcast(student), dim=-1)
    return -at_label(log_q, labels)


def hard_target_rows_of_probabilities(student: Tensor, label_probs: Tensor) -> Tensor:
    """One value per row for class probabilities."""
    log_q = torch.log_softmax(ops.upcast(student), dim=-1)
    targets = ops.upcast(label_probs.detach())
    log_q = torch.where((targets == 0) & torch.isinf(log_q), 0.0, log_q)  # 0 · ∞ is 0, NaN stays
    return -(targets * log_q).sum(dim=-1)


def _weight_of_label(labels: Tensor, class_weight: Tensor, kept: Tensor) -> Tensor:
    """The weight of the class that each label names: NaN for a label out of range, 0 for a sample that is left out."""
    valid = (labels >= 0) & (labels < class_weight.size(0))
    weight = class_weight[torch.where(valid, labels, torch.zeros_like(labels))]
    return torch.where(valid, weight, float("nan")).masked_fill(kept == 0, 0.0)


def _smooth(values: Tensor, student: Tensor, class_weight: Tensor | None, label_smoothing: float) -> Tensor:
    """``values`` with the share ``label_smoothing`` of every target spread evenly over the classes."""
    log_q = torch.log_softmax(ops.upcast(student), dim=-1)
    if class_weight is not None:
        log_q = ops.product_or_zero(class_weight.to(log_q.dtype), log_q)
    return (1.0 - label_smoothing) * values - label_smoothing * log_q.mean(dim=-1)


def hard_target(
    student_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Cross-entropy against class indices or class probabilities; see :class:`HardTarget`."""
    classes = ops.optional_weight(class_weight)
    if labels.dim() == student_logits.dim():
        weight = ops.optional_weight(sample_weight)
        student = ops.without_left_out(student_logits, weight)
        targets = ops.upcast(ops.without_left_out(labels.detach(), weight))
        if classes is not None:
            targets = classes.to(targets.dtype) * targets
        values = hard_target_rows_of_probabilities(student, targets)
        if label_smoothing != 0.0:
            values = _smooth(values, student, classes, label_smoothing)
        return ops.reduce(values, weight, reduction)
    kept = kept_weight(labels, sample_weight, ignore_index)
    count = kept
    if classes is not None:
        dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        count = kept.to(dtype) * _weight_of_label(labels, classes, kept).to(dtype)
    if label_smoothing == 0.0:  # Σ w·v·ℓ / Σ w·v
        values = hard_target_rows(ops.without_left_out(student_logits, count), labels)
        return ops.reduce(values, count, reduction)
    student = ops.without_left_out(student_logits, kept)
    values = hard_target_rows(student, labels)
    if classes is not None:
        values = ops.product_or_zero(_weight_of_label(labels, classes, kept).to(values.dtype), values)
    return ops.reduce(_smooth(values, student, classes, label_smoothing), kept, reduction, count)


@register(hard_target)
class HardTarget(Loss):
    r"""Cross-entropy of the student's class probabilities against the labels.

    .. math:: \ell_b = -\sum_c y_{bc} \log \mathrm{softmax}(s_b)_c

    with class probabilities y, or the one-hot rows that class indices stand for. Temperature plays no
    part in it: this is the ordinary classification loss that distillation is mixed with. With class weights v and
    label smoothing ε among C classes

    .. math:: \ell_b = -\sum_c v_c \left((1 - \varepsilon)\, y_{bc} + \frac{\varepsilon}{C}\right)
              \log \mathrm{softmax}(s_b)_c

    Args:
        label_smoothing: ε, from 0 to 1.
        ignore_index: a class index that marks samples to leave out (indices only).
        reduction: ``"mean"``: Σ w·ℓ / Σ w, where w is 0 for ignored samples, ``sample_weight`` or 1
            elsewhere (so: the mean over the kept samples); with class indices and class weights Σ w·ℓ / Σ w·v, where v is
            the weight of the sample's class; 0 where nothing is kept. ``"sum"``: Σ w·ℓ. ``"none"``: w·ℓ, shape
            ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class.
        labels: class probabilities of the same shape and type, or class indices int64, ``(batch,)`` or
            ``(batch, tokens)``; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.
        class_weight: optional ``(classes,)``, v, at least 0, of any floating type; constant; 1 where it is left out.

    Returns:
        Nats, at least 0; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which
        are computed in float32. A label of probability 0 adds 0 even where the student's logit is −inf; with label
        smoothing no probability is 0, and such a class gives +inf, unless its weight is 0.

    Raises:
        ValueError: for shapes that do not fit, an empty batch, or an index out of range (on the CPU; on
            a GPU, which is not waited for, in compiled code and in exported files run elsewhere, the loss is NaN).

    Same as ``torch.nn.functional.cross_entropy`` with its ``weight``, ``label_smoothing`` and ``ignore_index``, divisors
    included, except that the classes are the last axis, and that a batch with every sample ignored gives 0, not NaN.
    The kernel computes class indices, with or without class weights, and plain class probabilities; anything else
    is computed by the formula.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> HardTarget()(logits, torch.tensor([0, -100]))
        tensor(0.1698)
        >>> HardTarget(reduction="none")(logits, torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]))
        tensor([1.1698, 0.5514])

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits"),
        "labels": (
            Spec("batch classes", draw="probabilities"),
            Spec("batch", dtype="int64", index_of="classes", draw="indices"),
        ),
        "sample_weight": SAMPLE_WEIGHT,
        "class_weight": Spec("classes", dtype="weight", optional=True, draw="weights"),
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(),
        Case(layouts={"labels": "batch"}),
        Case({"reduction": "sum", "ignore_index": 1}, layouts={"labels": "batch"}, optional=("sample_weight",)),
        Case({"label_smoothing": 0.1}, layouts={"labels": "batch"}, optional=("class_weight",)),
        Case(
            {"ignore_index": 1},
            layouts={"labels": "batch tokens"},
            optional=("sample_weight", "class_weight"),
        ),
    )
    aliases = ("CE", "CrossEntropyLoss")

    label_smoothing: float = number(default=0.0, minimum=0.0, maximum=1.0)
    ignore_index: int = whole(default=-100)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=self.label_smoothing == 0 or "with label smoothing no class has the probability 0",
        )

    def covered_by_kernel(self, given: Mapping[str, Spec]) -> bool:
        plain = "class_weight" not in given or given["labels"].dtype == "int64"
        return self.label_smoothing == 0 and plain

    def fused(self, kernel: KernelPoint, student_logits, labels, sample_weight, class_weight):
        if labels.dim() == student_logits.dim():
            tensors = {"student": student_logits, "label_probs": labels}
            values = kernel(SOFT_TARGET, "hard", hard_target_rows_of_probabilities, tensors, {}, weight="hard_weight")
            return ops.reduce(values, ops.optional_weight(sample_weight), self.reduction)
        tensors = {"student": student_logits, "labels": labels}
        values = kernel(SOFT_TARGET, "hard", hard_target_rows, tensors, {}, weight="hard_weight")
        if kernel.all_kept and class_weight is None:
            return ops.reduce(values, ops.optional_weight(sample_weight), self.reduction)
        weight = kept_weight(labels, sample_weight, self.ignore_index)
        if class_weight is not None:
            classes = ops.optional_weight(class_weight)
            assert classes is not None
            weight = weight * _weight_of_label(labels, classes, weight)
        return ops.reduce(values, weight, self.reduction)

    def reference(self, student_logits, labels, sample_weight=None, class_weight=None):
        """One sample at a time, from the definition."""
        classes = np.shape(student_logits)[-1]
        v = np.ones(classes) if class_weight is None else np.asarray(class_weight, np.float64)
        indices = np.ndim(labels) < np.ndim(student_logits)
        samples = np.shape(student_logits)[:-1]
        weights = np.ones(samples) if sample_weight is None else np.asarray(sample_weight, np.float64)
        if indices:
            labels, weights = labelled(labels, sample_weight, self.ignore_index)
        values, counts = [], []
        every = zip(rows(student_logits, 1), rows(labels, 0 if indices else 1), weights.ravel(), strict=True)
        for logits, label, weight in every:
            target = np.eye(classes)[label] if indices else label
            smoothed = v * ((1 - self.label_smoothing) * target + self.label_smoothing / classes)
            values.append(-sum(t * lq for t, lq in zip(smoothed, log_softmax(logits), strict=True) if t != 0))
            counts.append(weight * (v @ target) if indices else weight)
        return reduce_samples(values, weights, self.reduction, samples, counts)
