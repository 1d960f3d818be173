"""What losses on some of the vocabulary's tokens share."""

import torch
from torch import Tensor


def within(ids: Tensor, classes: int) -> Tensor:
    """Ids of the vocabulary, and 0 in the place of any other (which a GPU, since it is not waited for, may meet)."""
    return torch.where((ids >= 0) & (ids < classes), ids, torch.zeros_like(ids))


def take(x: Tensor, ids: Tensor) -> Tensor:
    """The entries of ``x`` at ``ids`` along the last axis, and NaN where an id is outside the vocabulary."""
    axis = x.dim() - 1  # counted from the front: the onnx package's reference evaluator does not gather along -1
    index = within(ids, x.size(axis))
    return torch.where(index == ids, torch.gather(x, axis, index), float("nan"))
