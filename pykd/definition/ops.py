"""Scriptable pieces that several losses share.

Everything here works in TorchScript, in eager mode and under the symbolic tracing of the ONNX export:
no data-dependent shapes, no boolean indexing, no ``float(x.shape[0])`` (it would freeze the batch size).
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

_by_its_type: Any = handle_torch_function  # TorchScript reads every type comment as its own, mypy's too


def upcast(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; wider types stay. Autograd rounds the gradient back."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return x.float()
    return x


def given_or(number: float | None, default: float) -> float:
    """The number, or the default where none is given."""
    if number is None:
        return default
    return number


def normalize(x: Tensor, dim: list[int]) -> Tensor:
    """``x`` divided by its Euclidean norm over the axes ``dim``.

    A vector whose norm is below the smallest normal number of its type (1.2e-38 in float32, 2.2e-308 in float64) counts
    as the zero vector: it becomes zero, with a zero gradient. One with NaN or an infinity becomes NaN.
    """
    largest = x.detach().abs().amax(dim=dim, keepdim=True)
    # Beyond these the squares, and the cube of 1 / norm in the gradient, might not fit; the direction minds no factor.
    ordinary = ((largest >= 1e-9) & (largest <= 1e9)) | (largest == 0)
    scale = torch.where(ordinary, torch.ones_like(largest), largest)
    scaled = x / scale
    squared = (scaled * scaled).sum(dim=dim, keepdim=True)
    tiny = 2.2250738585072014e-308 if x.dtype == torch.float64 else 1.1754943508222875e-38
    zero = scale * torch.sqrt(squared.detach()) < tiny  # false for NaN, which must not pass for zero
    safe = torch.where(zero, torch.ones_like(squared), squared)
    return scaled * torch.where(zero, torch.zeros_like(squared), torch.rsqrt(safe))  # choices on the small tensors


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` in the type of ``x``, under autocast, too, which would round both to a half type first."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _matmul_despite_autocast(x, y)
    # what follows is no TorchScript, and must not be compiled
    if not torch.is_autocast_enabled(x.device.type):
        return torch.matmul(x, y)
    if torch.compiler.is_compiling():
        return _matmul_despite_autocast(x, y)
    with torch.autocast(x.device.type, enabled=False):
        return torch.matmul(x, y)


def _matmul_despite_autocast(x: Tensor, y: Tensor) -> Tensor:
    """Where autocast cannot be turned off: in a script, and for the gradient of compiled code. It leaves float64 alone."""
    product = torch.matmul(x, y)
    if product.dtype != x.dtype:
        product = torch.matmul(x.double(), y.double()).to(x.dtype)
    return product


def at_least_0(x: Tensor) -> Tensor:
    """``x``, and 0 where it is negative by its rounding; for numbers that cannot be. The gradient is that of ``x``."""
    if has_torch_function_unary(x):  # a value that a kernel is still to compute
        by_its_type: Tensor = _by_its_type(at_least_0, (x,), x)
        return by_its_type
    return x - x.detach().clamp(max=0.0)


def negative_of(x: Tensor, least: Tensor | None = None) -> Tensor:
    """``-x + least``, and 0 where that is negative by its rounding; for numbers that cannot be. The gradient is that of ``-x``.

    Args:
        x: what cannot be above 0.
        least: a constant to be added, such as a correction of rounding; None: nothing.
    """
    if least is None:
        return x.detach().clamp(min=0.0) - x
    return torch.maximum(least, x.detach()) - x


def absolute(x: Tensor) -> Tensor:
    """|x|, whose gradient is the sign, 0 where x is 0, and NaN where it is NaN (that of ``abs`` would be 0 there)."""
    constant = x.detach()
    return x * torch.where(torch.isnan(constant), constant, torch.sign(constant))


def part(weight: float, x: Tensor) -> Tensor:
    """``weight * x`` of a part of a loss: with the weight 0 it counts for nothing, even where it is infinite. NaN stays."""
    product = weight * x
    return product.masked_fill(torch.isnan(product) & ~torch.isnan(x), 0.0)


def product_or_zero(weight: Tensor, x: Tensor) -> Tensor:
    """``weight * x``, and 0 where the weight is 0 even if ``x`` is infinite or NaN (0 · log 0 = 0).

    The gradient with respect to ``x`` is ``weight``, everywhere; with respect to ``weight`` it is ``x``, and 0 where
    the weight is 0.
    """
    return weight * torch.where(weight == 0, 0.0, x)


def expectation(probabilities: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """Σ p·x over the axis ``dim``, to which a class of probability 0 adds 0 even if ``x`` is infinite or NaN (0 · log 0 = 0).

    Gradients are those of :func:`product_or_zero`.
    """
    # One operator for "x, and 0 where p is at most 0", with one for its derivative; a comparison and a choice are twice that.
    kept: Tensor = torch.ops.aten.threshold_backward(x, probabilities, 0.0)
    return (probabilities * kept).sum(dim=dim)


def soften(logits: Tensor, temperature: float, dim: int = -1) -> Tensor:
    """logits / temperature in the compute type, of which a softmax over the axis ``dim`` is to be taken.

    Below T = 1 the quotient grows, and its rounding with it: there the logits are relative to the largest before. From 1 on
    it rounds no more than the logits themselves were. In a file the temperature is an input and may be any.
    """
    logits = upcast(logits)
    if not (isinstance(temperature, float) and temperature >= 1.0):
        logits = logits - logits.detach().amax(dim=dim, keepdim=True)
    return logits / temperature


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(q / p), finite: a class with less than e⁻⁸⁰ counts for nothing beside the others."""
    return log_q.clamp(min=-80.0) - log_p.clamp(min=-80.0)


def mean_of_logs(q: Tensor, logs: Tensor) -> Tensor:
    """Σ q · logs of probabilities q that have a gradient, too.

    That gradient is a difference of the logarithms from their mean. Moved by their mean beforehand, which changes no
    value and no gradient (Σ q = 1), they keep the digits that large logarithms would lose.
    """
    mean = expectation(q.detach(), logs.detach()).unsqueeze(-1)
    shift = torch.where(mean.abs() < 1e30, mean, torch.zeros_like(mean))
    return expectation(q, logs - shift) + shift.squeeze(-1)


def softened_divergence(
    student: Tensor, teacher: Tensor, temperature: float, form: str = "kl", dim: int = -1
) -> Tensor:
    """KL(p‖q), or with ``form="cross_entropy"`` −Σ p log q, of p = softmax(teacher/T) and q = softmax(student/T) over ``dim``."""
    target = soften(teacher.detach(), temperature, dim)
    log_q = torch.log_softmax(soften(student, temperature, dim), dim=dim)
    if form == "cross_entropy":
        return negative_of(expectation(torch.softmax(target, dim=dim), log_q, dim))
    return forward_kl(torch.log_softmax(target, dim=dim), log_q, temperature, dim)


def forward_kl(
    log_p: Tensor, log_q: Tensor, temperature: float = 1.0, dim: int = -1, excess: Tensor | None = None
) -> Tensor:
    """KL(p‖q) over the axis ``dim``, at least 0, of a constant p.

    Args:
        log_p: the teacher's log-probabilities; constant.
        log_q: the student's.
        temperature: that both were softened by, on which it depends how exactly they differ.
        dim: the axis of the classes.
        excess: how much more than 1 the p of each row add up to, where that is more than rounding; None: nowhere.
    """
    p = torch.exp(log_p)
    rounding = _rounding(p, log_p, log_q, temperature, dim)
    if rounding is not None and excess is not None:
        rounding = rounding + excess
    return negative_of(expectation(p, log_q - log_p, dim), rounding)


def reverse_kl(log_p: Tensor, log_q: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q‖p) over the last axis, at least 0, of a constant p; the arguments are those of :func:`forward_kl`."""
    value = mean_of_logs(torch.exp(log_q), log_q - log_p)
    rounding = _rounding(torch.exp(log_p), log_p, log_q, temperature)
    return at_least_0(value if rounding is None else value - rounding)


def _rounding(p: Tensor, log_p: Tensor, log_q: Tensor, temperature: float, dim: int = -1) -> Tensor | None:
    """Σ (q − p): 0, but for the rounding of the two normalisers, which it takes out of Σ p (log p − log q).

    At a high temperature p and q are almost equal, and each one's own rounding is more than T² before the divergence
    allows: there the difference comes from the logarithms, too. In a file the temperature is an input and may be any.
    Below that float64 has digits to spare, and there is nothing to correct: None.
    """
    if isinstance(temperature, float) and temperature <= 8.0:
        if p.dtype == torch.float64:
            return None
        return (torch.exp(log_q.detach()) - p).sum(dim=dim)
    q = torch.exp(log_q.detach())
    return ((p + q) * torch.tanh(log_ratio(log_p, log_q.detach()) / 2)).sum(dim=dim)


def reduce(values: Tensor, weight: Tensor | None, reduction: str, count: Tensor | None = None) -> Tensor:
    """Reduces one value per sample, in the last line of a loss.

    Args:
        values: ``[batch]``, or whatever axes count the samples.
        weight: the same axes, of any type; 0 leaves a sample out; ``None`` weighs every sample 1. Whatever a sample that
            is left out holds has no part in the value; :func:`without_left_out` keeps it out of the gradient.
        reduction: ``"none"``: ``weight · values``. ``"sum"``: their sum. ``"mean"``: that sum divided by
            the sum of the weights (by the number of samples where there are none); 0 where nothing is kept.
        count: what a sample counts in that divisor, where it is not its weight.
    """
    if has_torch_function_unary(values):  # that a kernel is still to compute
        by_its_type: Tensor = _by_its_type(reduce, (values,), values, weight, reduction, count)
        return by_its_type
    if weight is None:
        if reduction == "mean":
            return values.mean()
        if reduction == "sum":
            return values.sum()
        return values
    weighted = product_or_zero(shares(weight.to(values.dtype), reduction, count), values)
    return weighted if reduction == "none" else weighted.sum()


def reduce_softened(
    values: Tensor, weight: Tensor | None, temperature: float, tau_squared: bool, reduction: str
) -> Tensor:
    """:func:`reduce` of what softened logits gave: times T² where wanted."""
    if tau_squared:
        values = values * (temperature * temperature)
    return reduce(values, weight, reduction)


def shares(weight: Tensor, reduction: str, count: Tensor | None = None) -> Tensor:
    """What each sample's value is multiplied by before :func:`reduce` adds them up; its arguments."""
    if reduction != "mean":
        return weight
    total = (weight if count is None else count.to(weight.dtype)).sum()
    nothing = total == 0
    if count is not None:
        weight = torch.where(nothing, 0.0, weight)
    return weight / torch.where(nothing, 1.0, total)  # where nothing is kept all of them are 0


def without_left_out(x: Tensor, weight: Tensor | None) -> Tensor:
    """``x`` with zeros for the samples whose weight is 0, so that nothing comes of what they hold.

    The first step of every loss that takes weights: an infinite or NaN logit in a sample that is left out would reach
    the gradient otherwise, as 0 · NaN.

    Args:
        x: ``[batch, …]``.
        weight: ``[batch]``, or with as many leading axes of ``x`` as count samples; ``None``: ``x`` as it is.
    """
    if weight is None:
        return x
    left_out = weight == 0
    for _ in range(x.dim() - weight.dim()):
        left_out = left_out.unsqueeze(-1)
    return x.masked_fill(left_out, 0.0)


def weigh(kept: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Per-sample weight from a mask of kept samples and the user's weights; float32 at least."""
    weight = optional_weight(sample_weight)
    if weight is None:
        return kept.float()
    # One of the two may be per token, the other per entry of the batch.
    while weight.dim() < kept.dim():
        weight = weight.unsqueeze(-1)
    while kept.dim() < weight.dim():
        kept = kept.unsqueeze(-1)
    return torch.where(kept, weight, torch.zeros_like(weight))


def optional_weight(sample_weight: Tensor | None) -> Tensor | None:
    """The user's weights (any floating type, integers, or a mask of True and False) as constants of float32 at least, or None."""
    if sample_weight is None:
        return None
    if not sample_weight.is_floating_point():
        return sample_weight.float()
    return upcast(sample_weight.detach())


SPATIAL_AVERAGES = (None, "mean")  # what pool_tokens knows


def pool_tokens(features: Tensor, spatial_avg: str | None) -> Tensor:
    """Features in the compute type, ``(batch, tokens, channels)``, averaged to one token where asked."""
    features = upcast(features)
    if spatial_avg is not None:  # "mean" is the only choice
        return features.mean(dim=1, keepdim=True)
    return features


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``‖x_i − y_j‖²`` of the rows of two matrices, by the Gram matrix: no tensor of pairs times features."""
    return squared_distances_of(matmul(x, y.transpose(0, 1)), squares(x), squares(y))


def squared_distances_of(products: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The same of the products of the rows with each other, and of each one's with itself."""
    return torch.sub(rows.unsqueeze(1) + columns.unsqueeze(0), products, alpha=2).clamp(min=0.0)


def squares(x: Tensor) -> Tensor:
    """The product of every row with itself."""
    return (x * x).sum(dim=-1)


def inverse_root(squares: Tensor) -> Tensor:
    """One over the root of what is at least 0; 0 with the gradient 0 where that is 0."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.rsqrt(torch.where(zero, 1.0, squares)))


def distances(x: Tensor) -> Tensor:
    """Euclidean distances ``[n, n]`` of the rows of a matrix from each other, by the Gram matrix.

    Rows whose distance is lost in the rounding of their lengths coincide: their distance is 0, and so is its gradient.
    Rows near 0 keep the most digits: take their mean off first.
    """
    own = squares(x)
    return distances_of(matmul(x, x.transpose(0, 1)), own, own, same_pairs(x))


def distances_of(products: Tensor, rows: Tensor, columns: Tensor, same: Tensor) -> Tensor:
    """:func:`distances` of the products of rows with each other, of each one's with itself, and where both are one row."""
    return distances_between(products, rows.unsqueeze(1), columns.unsqueeze(0), same)


def distances_between(products: Tensor, squares: Tensor, other_squares: Tensor, same: Tensor) -> Tensor:
    """:func:`distances_of`, whose products of each with itself have the shape of what is looked at, or one for all."""
    sums = squares + other_squares
    squared = torch.sub(sums, products, alpha=2)
    rounding = 1e-14 if products.dtype == torch.float64 else 4e-6
    coincide = (squared.detach() <= sums.detach() * rounding) | same  # false for NaN off the diagonal
    return torch.sqrt(squared.masked_fill(coincide, 1.0)).masked_fill(coincide, 0.0)


def distinct_pairs(x: Tensor) -> Tensor:
    """``[n, n]`` with 0 on the diagonal and 1 elsewhere, for the n rows of ``x``."""
    return (~same_pairs(x)).to(x.dtype)


def same_pairs(x: Tensor) -> Tensor:
    """``[n, n]``, true on the diagonal, for the n rows of ``x``."""
    rows = torch.arange(x.size(0), device=x.device)
    return rows.unsqueeze(0) == rows.unsqueeze(1)
