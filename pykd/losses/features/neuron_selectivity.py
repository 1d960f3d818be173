"""Neuron selectivity transfer: match the distribution of the patterns that the channels of a layer respond to."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, choice, ops, register
from pykd.definition.reference import reduce_samples, unit
from pykd.losses.features._shared import kept_features, products_of_channels, products_of_tokens

KERNELS = ("polynomial", "linear", "gaussian")


def _products(x: Tensor, y: Tensor, places: int) -> Tensor:
    """``(batch, channels of x, channels of y)``: the inner products of channel maps; ``places`` is the axis of their places."""
    return products_of_tokens(x, y) if places == 1 else products_of_channels(x, y)


def _distances(x: Tensor, y: Tensor, places: int) -> Tensor:
    """The squared distances of channel maps."""
    xx = (x * x).sum(dim=places).unsqueeze(2)
    yy = (y * y).sum(dim=places).unsqueeze(1)
    return (xx + yy - 2 * _products(x, y, places)).clamp(min=0.0)


def _sums(entries: Tensor) -> Tensor:
    return entries.flatten(1).sum(dim=-1)


def _means(entries: Tensor) -> Tensor:
    return entries.flatten(1).mean(dim=-1)


def _gaussian(x: Tensor, y: Tensor, places: int) -> Tensor:
    """MMD² with Gaussian kernels, per sample."""
    channels = 3 - places
    one = x.detach().narrow(
        channels, 0, 1
    )  # Distances are the same seen from one of the maps, and 0 where all are this one.
    x, y = x - one, y - one
    xx, yy, xy = _distances(x, x, places), _distances(y, y, places), _distances(x, y, places)
    maps = x.size(channels) + y.size(channels)
    width = (_sums(xx) + _sums(yy) + 2 * _sums(xy)).detach() / (maps * (maps - 1))
    # Maps that differ by rounding alone are one: a width made of it would blow it up.
    apart = width > (1e-20 if width.dtype == torch.float64 else 1e-12)
    factor = torch.where(apart, -0.5 / torch.where(apart, width, 1.0), 0.0).unsqueeze(-1).unsqueeze(-1)
    return _means(torch.exp(xx * factor)) + _means(torch.exp(yy * factor)) - 2 * _means(torch.exp(xy * factor))


def _polynomial(x: Tensor, y: Tensor, places: int) -> Tensor:
    """MMD² with squared products, per sample."""
    xx, yy, xy = _products(x, x, places), _products(y, y, places), _products(x, y, places)
    return _means(xx * xx) + _means(yy * yy) - 2 * _means(xy * xy)


def neuron_selectivity(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    kernel: str,
    reduction: str,
) -> Tensor:
    """Squared maximum mean discrepancy of channel maps; see :class:`NeuronSelectivity`."""
    weight = ops.optional_weight(sample_weight)
    x = kept_features(student_features, weight)
    y = kept_features(teacher_features.detach(), weight)
    places = 1
    if x.dim() == 4:
        x, y, places = x.flatten(2), y.flatten(2), 2
    x, y = ops.normalize(x, dim=[places]), ops.normalize(y, dim=[places])
    if kernel == "linear":  # the squared distance of the means
        difference = x.mean(dim=3 - places) - y.mean(dim=3 - places)
        return ops.reduce((difference * difference).sum(dim=-1), weight, reduction)
    values = _gaussian(x, y, places) if kernel == "gaussian" else _polynomial(x, y, places)
    return ops.reduce(ops.at_least_0(values), weight, reduction)


@register(neuron_selectivity)
class NeuronSelectivity(Loss):
    r"""Squared maximum mean discrepancy (MMD²) between the channel maps of student and teacher, sample by sample.

    Each channel's map is flattened and normalised, and is one of C (student) or D (teacher) points in as many dimensions as
    there are places:

    .. math:: \ell_b = \frac1{C^2} \sum_{ij} k(x_i, x_j) + \frac1{D^2} \sum_{ij} k(y_i, y_j)
              - \frac2{C D} \sum_{ij} k(x_i, y_j)

    with :math:`k(u, v) = (u \cdot v)^2` (``"polynomial"``), :math:`u \cdot v` (``"linear"``), or
    :math:`\exp(-\lVert u - v \rVert^2 / 2 \sigma^2)` (``"gaussian"``), where :math:`\sigma^2` is the mean squared distance of
    the (C + D)(C + D − 1) ordered pairs of different maps of a sample, and a constant for the gradient.

    Args:
        kernel: ``"polynomial"``, of degree 2 without a constant, as the paper's experiments and all implementations have it;
            ``"linear"``, which compares the mean maps; or ``"gaussian"``.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: ``(batch, channels, height, width)`` or ``(batch, tokens, channels)``, any floating type; receives the
            gradient.
        teacher_features: of the same height and width, or as many tokens, with channels of its own; same type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        From 0 to 2 (``"linear"``: 4), no unit; 0 when the maps agree, in whatever order; a scalar unless ``reduction="none"``.
        float32 for half-precision inputs, which are computed in float32. A map that is 0 everywhere is the point 0 and gets
        the gradient 0.

    Raises:
        ValueError: for maps of different size (pool the larger one first), an empty batch.

    Memory is O(batch · (C + D)²) beside the features.

    Who differs: RepDistiller and mdistiller compute ``"polynomial"`` as it is here, in memory O(batch · C · D · places).
    The paper weighs it by λ / 2. TextBrewer's ``mmd_loss`` compares Gram matrices of tokens, which is another loss.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[1.0, 1.0]], [[0.0, 3.0]]]])
        >>> NeuronSelectivity()(student, teacher)
        tensor(1.2500)

    References:
        Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017, arXiv:1707.01219.
    """

    inputs = {
        "student_features": (
            Spec("batch channels height width", grad=True, like="teacher_features"),
            Spec("batch tokens channels", grad=True, like="teacher_features"),
        ),
        "teacher_features": (Spec("batch teacher_channels height width"), Spec("batch tokens teacher_channels")),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case(),
        Case({"kernel": "linear"}, layouts={"student_features": "batch tokens channels"}),
        Case({"kernel": "gaussian", "reduction": "sum"}, optional=("sample_weight",)),
    )
    aliases = ("NST", "NSTLoss")

    kernel: str = choice(KERNELS, default="polynomial")

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None, widths=None):
        """Pair by pair, from the definition; ``widths`` fixes σ² of every sample."""
        if widths is None:
            widths = _widths(student_features, teacher_features)
        kernels = {
            "polynomial": lambda u, v, width: (u @ v) ** 2,
            "linear": lambda u, v, width: u @ v,
            "gaussian": lambda u, v, width: np.exp(-((u - v) ** 2).sum() / (2 * width)) if width > 1e-20 else 1.0,
        }

        def mean(us, vs, width):
            return np.mean([kernels[self.kernel](u, v, width) for u in us for v in vs])

        values = []
        for x, y, width in zip(student_features, teacher_features, widths, strict=True):
            x, y = _points(x), _points(y)
            values.append(mean(x, x, width) + mean(y, y, width) - 2 * mean(x, y, width))
        return reduce_samples(values, sample_weight, self.reduction)

    def constants(self, student_features, teacher_features, sample_weight=None):
        """σ², through which no gradient flows."""
        return {"widths": _widths(student_features, teacher_features)} if self.kernel == "gaussian" else {}


def _points(features):
    """One unit vector per channel."""
    return [unit(one.ravel()) for one in (features if features.ndim == 3 else features.T)]


def _widths(student_features, teacher_features):
    widths = []
    for x, y in zip(student_features, teacher_features, strict=True):
        points = _points(x) + _points(y)
        distances = [((u - v) ** 2).sum() for i, u in enumerate(points) for j, v in enumerate(points) if i != j]
        widths.append(np.mean(distances))
    return widths
