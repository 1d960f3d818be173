"""What losses on the relations between the samples of a batch share; each is a loss in a file of its own.

A sample of weight 0 leaves every relation. The weights of the others count in the averages over pairs alone: a mean distance or
the norm of a row takes every sample that is kept alike.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Spec, ops
from pykd.fused.description import BlockPoint, Columns, KeptProducts, Piece, Products, Rows, Same, Squares

COUPLES = "compares every sample of the batch with every other"


def kept(x: Tensor, weight: Tensor | None) -> Tensor:
    """1 for every row of ``x`` that counts, 0 for those whose weight is 0; in the type of ``x``."""
    if weight is None:
        return torch.ones_like(x[:, 0])
    return (weight != 0).to(x.dtype)


def centred(x: Tensor, weight: Tensor | None) -> Tensor:
    """Rows whose distances have the ratios of those of ``x``: less their mean, over the largest entry that is left.

    Near the centre the expansion of a distance keeps its digits; at this scale no square overflows or vanishes.
    The result is constant in the factor, so only ratios of distances have the gradient of ``x``.
    """
    count = kept(x, weight)
    moved = (x - _middle(x.detach(), count)) * count.unsqueeze(1)
    largest = moved.detach().abs().amax(dim=[0, 1])
    return moved / torch.where(largest == 0, torch.ones_like(largest), largest)


def _middle(x: Tensor, count: Tensor) -> Tensor:
    """The mean of the rows that are kept, to the last digit: samples that coincide are not apart from it by its rounding."""
    total = count.sum().clamp(min=1.0)
    middle = x.sum(dim=0) / total  # what is left out is 0
    return middle + ((x - middle) * count.unsqueeze(1)).sum(dim=0) / total


def over_pairs(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of ``[n, n]`` values, one per ordered pair, which weighs the product of its samples' weights; 0 where none is kept."""
    if weight is None:
        return values.mean()
    shares = ops.shares(weight.to(values.dtype), "mean")
    return (shares * ops.matmul(values, shares.unsqueeze(1)).squeeze(1)).sum()


def alike(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """:func:`kept` where there are weights: what an average takes in which all samples that are kept count the same."""
    return None if weight is None else kept(x, weight)


def own_products(blocks: BlockPoint, x: Tensor) -> list[Piece]:
    """The products of all pairs of samples, and of each with itself: what distances are made of."""
    squares = blocks.each(ops.squares, Rows(x))
    return [Products(x, x), Rows(squares), Columns(squares), Same(x)]


def kept_products(products: KeptProducts) -> list[Piece]:
    """:func:`own_products` of which several sums are taken."""
    return [products, Squares(products, rows=True), Squares(products, rows=False), Same(products.node)]


class _Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        count = kept(x, weight)
        made = x - _middle(x, count)
        if weight is not None:
            made.mul_(count.unsqueeze(1))
        largest = torch.maximum(made.amax(), -made.amin())
        ctx.count = count
        ctx.scale = torch.where(largest == 0, torch.ones_like(largest), largest)
        return made.div_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return torch.div(upstream[0], ctx.scale).mul_(ctx.count.unsqueeze(1)), None


def centred_rows(x: Tensor, weight: Tensor | None) -> Tensor:
    """:func:`centred`, with memory for what it makes alone; first derivatives alone."""
    made: Tensor = _Centred.apply(x, weight)
    return made


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        x = ops.without_left_out(x, weight)
        largest = torch.maximum(x.amax(dim=1, keepdim=True), -x.amin(dim=1, keepdim=True))
        ordinary = ((largest >= 1e-9) & (largest <= 1e9)) | (largest == 0)
        scale = torch.where(ordinary, torch.ones_like(largest), largest)
        made = torch.div(x, scale)
        squares = made.square_().sum(dim=1, keepdim=True)
        zero = scale * squares.sqrt() < torch.finfo(x.dtype).tiny  # false for NaN
        inverse = torch.where(zero, 0.0, torch.where(zero, 1.0, squares).rsqrt())
        torch.div(x, scale, out=made).mul_(inverse)
        ctx.save_for_backward(made, inverse / scale)
        return made

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        made, inverse = ctx.saved_tensors
        gradient = upstream[0] * made
        along = gradient.sum(dim=1, keepdim=True)
        torch.addcmul(upstream[0], made, along, value=-1, out=gradient)
        return gradient.mul_(inverse), None


def normalized_rows(embeddings: Tensor, weight: Tensor | None) -> Tensor:
    """:func:`ops.normalize` of those that are kept, with memory for what it makes alone; first derivatives alone."""
    made: Tensor = _Normalized.apply(ops.upcast(embeddings), weight)
    return made


class _SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, products: Tensor, rows: Tensor, columns: Tensor, same: Tensor) -> Tensor:
        made = rows.unsqueeze(1) + columns.unsqueeze(0)
        made.sub_(products, alpha=2).clamp_(min=0.0).masked_fill_(same, 0.0)
        ctx.save_for_backward(made)
        return made

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (made,) = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(upstream[0], made, 0.0)
        rows, columns = gradient.sum(dim=1), gradient.sum(dim=0)
        return gradient.mul_(-2.0), rows, columns, None


def squared_distances_of_block(products: Tensor, rows: Tensor, columns: Tensor, same: Tensor) -> Tensor:
    """:func:`ops.squared_distances_of`, 0 on the diagonal, with memory for what it makes alone; first derivatives alone."""
    made: Tensor = _SquaredDistances.apply(products, rows, columns, same)
    return made


def weights_of_rows(weight: Tensor | None) -> Rows | None:
    return None if weight is None else Rows(weight)


def smooth_l1(x: Tensor, y: Tensor) -> Tensor:
    """d²/2 where |d| < 1, |d| − 1/2 elsewhere, of the difference d = x − y."""
    return torch.nn.functional.smooth_l1_loss(x, y, reduction="none")


def squared_differences(x: Tensor, y: Tensor) -> Tensor:
    """(x − y)²."""
    return torch.nn.functional.mse_loss(x, y, reduction="none")


class Relation(Loss):
    """Inputs of the losses that compare a batch of embeddings with itself; a subclass is the specification."""

    inputs = {
        "student_embeddings": Spec("batch channels", grad=True, like="teacher_embeddings"),
        "teacher_embeddings": Spec("batch teacher_channels"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (Case(), Case(optional=("sample_weight",)))
    couples_batch = COUPLES


class FeatureRelation(Loss):
    """The same of features of any rank, which are flattened to one vector per sample."""

    inputs = {
        "student_features": (
            Spec("batch channels", grad=True, like="teacher_features"),
            Spec("batch tokens channels", grad=True, like="teacher_features"),
            Spec("batch channels height width", grad=True, like="teacher_features"),
        ),
        "teacher_features": (
            Spec("batch teacher_channels"),
            Spec("batch teacher_tokens teacher_channels"),
            Spec("batch teacher_channels teacher_height teacher_width"),
        ),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case(),
        Case(
            layouts={
                "student_features": "batch tokens channels",
                "teacher_features": "batch teacher_tokens teacher_channels",
            }
        ),
        Case(
            layouts={
                "student_features": "batch channels height width",
                "teacher_features": "batch teacher_channels teacher_height teacher_width",
            },
            optional=("sample_weight",),
        ),
    )
    couples_batch = COUPLES


# ---- References ---------------------------------------------------------------------------------


def numpy_kept(sample_weight, *batches):
    """The weights of the samples that are kept, 1 each where there are none, and these samples of every batch."""
    weights = np.ones(len(batches[0])) if sample_weight is None else np.asarray(sample_weight, np.float64)
    rows = [i for i in range(len(weights)) if weights[i] != 0]
    return weights[rows], *([batch[i] for i in rows] for batch in batches)


def numpy_over_pairs(value, weights):
    """Σ w_i w_j · value(i, j) / Σ w_i w_j over all ordered pairs; 0 where there are none."""
    n = len(weights)
    pairs = [(i, j, weights[i] * weights[j]) for i in range(n) for j in range(n)]
    return sum(w * value(i, j) for i, j, w in pairs) / sum(w for *_, w in pairs) if pairs else 0.0


def numpy_smooth_l1(difference):
    """x²/2 where |x| < 1, |x| − 1/2 elsewhere."""
    x = abs(difference)
    return x * x / 2 if x < 1 else x - 0.5
