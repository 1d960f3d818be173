"""What losses on some of the vocabulary's tokens share."""

import torch
from torch import Tensor

from pykd.definition import ops


def within(ids: Tensor, classes: int) -> Tensor:
    """Ids of the vocabulary, and 0 in the place of any other (which a GPU, since it is not waited for, may meet)."""
    return torch.where((ids >= 0) & (ids < classes), ids, torch.zeros_like(ids))


def take(x: Tensor, ids: Tensor) -> Tensor:
    """The entries of ``x`` at ``ids`` along the last axis, and NaN where an id is outside the vocabulary."""
    axis = x.dim() - 1  # counted from the front: the onnx package's reference evaluator does not gather along -1
    index = within(ids, x.size(axis))
    known = torch.where(index == ids, 1.0, float("nan")).to(x.dtype)
    return torch.gather(x, axis, index) * known  # a product: the gradient is NaN, too


def preferred_pairs(log_p: Tensor) -> Tensor:
    """Whether the teacher prefers entry i to entry j, ``[…, i, j]``; of those that are there, and are not equally likely to it."""
    return (log_p.unsqueeze(-1) > log_p.unsqueeze(-2)) & (log_p.unsqueeze(-2) != float("-inf"))


def sums_over_pairs(terms: Tensor, log_p: Tensor, average: str) -> Tensor:
    """The terms of the pairs of each row, ``[…, i, j]``, summed up, or their mean where ``average`` is ``"samples"``; NaN where
    the teacher is."""
    pairs = preferred_pairs(log_p)
    values = torch.where(pairs, terms, 0.0).sum(dim=(-2, -1))
    if average == "samples":
        values = values / pairs.to(terms.dtype).sum(dim=(-2, -1)).clamp(min=1.0)
    return torch.where(torch.isnan(log_p).any(dim=-1), float("nan"), values)


def reduce_pairs(values: Tensor, log_p: Tensor, weight: Tensor | None, average: str, reduction: str) -> Tensor:
    """Reduces what :func:`sums_over_pairs` gives, averaged over samples, or over all pairs of all samples.

    Args:
        values: of the rows.
        log_p: of the teacher's entries.
        weight: of the samples.
        average: ``"pairs"`` or ``"samples"``.
        reduction: that of the loss.
    """
    if average == "samples":
        return ops.reduce(values, weight, reduction)
    log_p = ops.upcast(log_p)
    count = preferred_pairs(log_p).to(log_p.dtype).sum(dim=(-2, -1))
    count = torch.where(torch.isnan(log_p).any(dim=-1), 1.0, count)
    weight = torch.ones_like(count) if weight is None else weight.to(count.dtype)
    return ops.reduce(values, weight, reduction, weight * count)
