"""What losses on logits share: labels, and the classes beside the label."""

import torch
from torch import Tensor

from pykd.definition import ops
from pykd.fused.description import KernelPoint


def kept_weight(labels: Tensor, sample_weight: Tensor | None, ignore_index: int) -> Tensor:
    """1 or the sample's weight; 0 where the label is ``ignore_index``."""
    return ops.weigh(labels != ignore_index, sample_weight)


def kept_labels(labels: Tensor, sample_weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The weight of each sample, and the labels, with a class in the place of those left out."""
    weight = kept_weight(labels, sample_weight, ignore_index)
    return weight, ops.without_left_out(labels, weight)


def kept_labels_at(
    kernel: KernelPoint, labels: Tensor, sample_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor | None, Tensor]:
    """:func:`kept_labels`, for a loss at its kernel point."""
    if kernel.all_kept:
        return ops.optional_weight(sample_weight), labels
    return kept_labels(labels, sample_weight, ignore_index)


def at_label(x: Tensor, labels: Tensor) -> Tensor:
    """The entry of each row of ``x`` that its label names; NaN for a label out of range, which must not pass for class 0."""
    valid = (labels >= 0) & (labels < x.size(-1))
    index = torch.where(valid, labels, torch.zeros_like(labels))
    # The axis counted from the front: the onnx package's reference evaluator does not gather along -1.
    picked = torch.gather(x, x.dim() - 1, index.unsqueeze(-1)).squeeze(-1)
    return picked * torch.where(valid, 1.0, float("nan")).to(x.dtype)  # a product: the gradient is NaN, too


def is_label(x: Tensor, labels: Tensor) -> Tensor:
    """True at the entry of each row of ``x`` that its label names."""
    return torch.arange(x.size(-1), device=x.device) == labels.unsqueeze(-1)


def without_label(log_q: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 − q_y), and the logarithms of the other classes' shares in it, q_c / (1 − q_y), with −inf at the label.

    Where no other class has a probability all of these are −inf, without a gradient.
    """
    others = log_q.masked_fill(is_label(log_q, labels), float("-inf"))
    largest = others.detach().amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    sums = torch.exp(others - largest).sum(dim=-1, keepdim=True)
    none = sums == 0
    logs = torch.log(sums.masked_fill(none, 1.0)) + largest
    return logs.masked_fill(none, float("-inf")).squeeze(-1), others - logs


def deviations(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row less its mean, in the compute type; and which classes are −inf: they are 0 there, and have no part in the mean."""
    logits = ops.upcast(logits)
    masked = logits == float("-inf")
    masked = masked & ~masked.all(dim=-1, keepdim=True)  # a row without a class becomes NaN, and its gradient with it
    # Relative to the largest, so that nothing is left of a constant row, not even rounding, which has a direction like any other.
    kept = (logits - logits.detach().amax(dim=-1, keepdim=True)).masked_fill(masked, 0.0)
    count = (~masked).to(logits.dtype).sum(dim=-1, keepdim=True)
    return (kept - kept.sum(dim=-1, keepdim=True) / count).masked_fill(masked, 0.0), masked
