"""Hard targets: the cross-entropy of the student against the labels."""

import numpy as np
import torch
from torch import Tensor

from pykd import ops
from pykd.kernel_point import KernelPoint
from pykd.losses.soft_target import KERNEL
from pykd.reference import log_softmax, reduce_samples
from pykd.registry import Case, Loss, Spec, register


def hard_target_rows(student: Tensor, labels: Tensor) -> Tensor:
    """One value per row for class indices, NaN where one is out of range; see :class:`HardTarget`."""
    log_q = torch.log_softmax(ops.upcast(student), dim=-1)
    valid = (labels >= 0) & (labels < log_q.size(-1))
    index = torch.where(valid, labels, torch.zeros_like(labels))
    # The axis counted from the front: the onnx package's reference evaluator does not gather along -1.
    picked = -torch.gather(log_q, log_q.dim() - 1, index.unsqueeze(-1)).squeeze(-1)
    # A label out of range must not pass for class 0: the loss becomes NaN.
    return torch.where(valid, picked, torch.full_like(picked, float("nan")))


def hard_target_rows_of_probabilities(student: Tensor, label_probs: Tensor) -> Tensor:
    """One value per row for class probabilities."""
    log_q = torch.log_softmax(ops.upcast(student), dim=-1)
    return -ops.product_or_zero(ops.upcast(label_probs.detach()), log_q).sum(dim=-1)


def _kept_weight(labels: Tensor, sample_weight: Tensor | None, ignore_index: int) -> Tensor:
    """1 or the sample's weight; 0 where the label is ``ignore_index``."""
    return ops.weigh(labels != ignore_index, sample_weight)


def hard_target(
    student_logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy against class indices or class probabilities; see :class:`HardTarget`."""
    if labels.dim() == student_logits.dim():
        weight = ops.optional_weight(sample_weight)
        student = ops.without_left_out(student_logits, weight)
        values = hard_target_rows_of_probabilities(student, ops.without_left_out(labels, weight))
        return ops.reduce(values, weight, reduction)
    kept = _kept_weight(labels, sample_weight, ignore_index)
    values = hard_target_rows(ops.without_left_out(student_logits, kept), labels)
    return ops.reduce(values, kept, reduction)


@register("hard_target")
class HardTarget(Loss):
    r"""Cross-entropy of the student's class probabilities against the labels.

    .. math:: \ell_b = -\sum_c y_{bc} \log \mathrm{softmax}(s_b)_c

    with class probabilities y, or the one-hot rows that class indices stand for. Temperature plays no
    part in it: this is the ordinary classification loss that distillation is mixed with.

    Args:
        ignore_index: a class index that marks samples to leave out (indices only).
        reduction: ``"mean"``: Σ w·ℓ / Σ w, where w is 0 for ignored samples, ``sample_weight`` or 1
            elsewhere (so: the mean over the kept samples); 0 where nothing is kept. ``"sum"``: Σ w·ℓ.
            ``"none"``: w·ℓ, shape ``(batch,)``.

    Inputs:
        student_logits: ``(batch, classes)``, any floating type; receives the gradient. −inf masks a class.
        labels: class probabilities ``(batch, classes)`` of the same type, or class indices ``(batch,)``
            int64; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask of True and False; constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats, at least 0; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which
        are computed in float32. A label of probability 0 adds 0 even where the student's logit is −inf.

    Raises:
        ValueError: for shapes that do not fit, an empty batch, or an index out of range (on the CPU; on
            a GPU, which is not waited for, in compiled code and in exported files run elsewhere, the loss is NaN).

    Same as ``torch.nn.functional.cross_entropy`` (``ignore_index`` included), except that a batch with
    every sample ignored gives 0, not NaN.

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
        "student_logits": Spec("batch classes", grad=True),
        "labels": (
            Spec("batch classes", draw="probabilities"),
            Spec("batch", dtype="int64", index_of="classes", draw="indices"),
        ),
        "sample_weight": Spec("batch", dtype="weight", optional=True, draw="weights"),
    }
    cases = (
        Case(),
        Case(layouts={"labels": "batch"}),
        Case({"reduction": "sum", "ignore_index": 1}, layouts={"labels": "batch"}, optional=("sample_weight",)),
    )
    paper = "Hinton, Vinyals, Dean 2015, arXiv:1503.02531"

    def __init__(self, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(reduction)
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return hard_target(student_logits, labels, sample_weight, self.ignore_index, self.reduction)

    def fused(
        self, kernel: KernelPoint, student_logits: Tensor, labels: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        if labels.dim() == student_logits.dim():
            tensors = {"student": student_logits, "label_probs": labels}
            values = kernel(KERNEL, "hard", hard_target_rows_of_probabilities, tensors, {}, weight="hard_weight")
            return ops.reduce(values, ops.optional_weight(sample_weight), self.reduction)
        tensors = {"student": student_logits, "labels": labels}
        values = kernel(KERNEL, "hard", hard_target_rows, tensors, {}, weight="hard_weight")
        return ops.reduce(values, _kept_weight(labels, sample_weight, self.ignore_index), self.reduction)

    @staticmethod
    def reference(student_logits, labels, sample_weight=None, ignore_index=-100, reduction="mean"):
        """One sample at a time, from the definition."""
        values, weights = [], []
        for b, logits in enumerate(student_logits):
            log_q = log_softmax(logits)
            weight = 1.0 if sample_weight is None else float(sample_weight[b])
            if np.ndim(labels[b]) == 0:
                if labels[b] == ignore_index:
                    values.append(0.0)
                    weights.append(0.0)
                    continue
                values.append(-log_q[labels[b]])
            else:
                values.append(-sum(y * lq for y, lq in zip(labels[b], log_q, strict=True) if y != 0))
            weights.append(weight)
        return reduce_samples(values, weights, reduction)
