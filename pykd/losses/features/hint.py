"""Hints: the student's features match the teacher's as they are."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, number, ops, register
from pykd.fused.description import KernelPoint
from pykd.losses.features._shared import (
    ENTRY_DISTANCE,
    MAPS,
    TOKENS,
    VECTORS,
    compared,
    kept_features,
    one_by_one,
    per_sample,
    reduce_one_by_one,
)

DISTANCES = ("mse", "l1", "smooth_l1")


def _costs(difference: Tensor, distance: str, beta: float) -> Tensor:
    if distance == "mse":
        return difference * difference
    costs = ops.absolute(difference)
    if distance == "smooth_l1":
        near = costs.clamp(max=beta)  # d² / 2β up to β, then d − β / 2, without a square of the long ones
        costs = near * (costs - 0.5 * near) / beta
    return costs


def _rows(student: Tensor, teacher: Tensor, form: str, average: str, beta: float) -> Tensor:
    """One value per row; see :class:`Hint`."""
    costs = _costs(ops.upcast(student) - ops.upcast(teacher.detach()), form, beta)
    return costs.mean(dim=-1) if average == "mean" else costs.sum(dim=-1)


def hint(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    distance: str,
    beta: float,
    entry_reduction: str,
    reduction: str,
) -> Tensor:
    """Squared, absolute or smooth absolute difference of features; see :class:`Hint`."""
    weight = ops.optional_weight(sample_weight)
    difference = kept_features(student_features, weight) - kept_features(teacher_features.detach(), weight)
    costs = _costs(difference, distance, beta)
    return ops.reduce(per_sample(costs, weight, entry_reduction), weight, reduction)


@register(hint)
class Hint(Loss):
    r"""Difference between the student's and the teacher's features, which are compared entry by entry, not normalised.

    .. math:: \ell_b = \frac1D \sum_d h(x_{bd} - y_{bd})

    with D entries in a sample, and h by ``distance``: :math:`r^2` (``"mse"``), :math:`|r|` (``"l1"``), or
    (``"smooth_l1"``) :math:`r^2 / 2\beta` where :math:`|r| < \beta` and :math:`|r| - \beta / 2` elsewhere.

    Args:
        distance: ``"mse"``, ``"l1"`` or ``"smooth_l1"``.
        beta: β > 0, where ``"smooth_l1"`` turns from a square to a line; no other distance looks at it.
        entry_reduction: ``"mean"``: divided by D, as above; ``"sum"``: not. FitNets' own loss is half the sum of squares:
            ``"mse"`` with ``"sum"`` and a weight of ½.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``, or the shape
            of ``sample_weight``.

    Inputs:
        student_features: ``(batch, channels)``, ``(batch, tokens, channels)`` or ``(batch, channels, height, width)``, any
            floating type; receives the gradient. A layer that maps the student's width to the teacher's comes before.
        teacher_features: the same shape and type; constant.
        sample_weight: optional, at least 0, of any floating type, or a mask (bool or integers); constant. ``(batch,)``; or
            ``(batch, tokens)`` or ``(batch, height, width)``, where every token or place of a map is a sample (of a sequence
            with padding, say). A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        At least 0, in squared units of the features (``"mse"``; ``"smooth_l1"`` below β), or in their units; 0 when they
        agree; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which are computed in float32. Where
        two entries agree exactly the subgradient of ``"l1"`` is 0.

    Raises:
        ValueError: for a β that is not positive, shapes that do not fit, an empty batch.

    Who differs: RepDistiller, mdistiller, DistillKit, and TextBrewer's ``hid_mse_loss`` with a mask of tokens take ``"mse"``
    as it is here. Romero et al. have half the sum over all entries, D / 2 times as much. MMRazor's ``L2Loss`` normalises a
    sample first, as :class:`FeatureL2` does a token. ``F.smooth_l1_loss`` is ``"smooth_l1"``; ``F.huber_loss`` is β times that.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 4.0]]), torch.tensor([[0.5, 2.0]])
        >>> Hint()(student, teacher)
        tensor(2.1250)
        >>> Hint(distance="smooth_l1")(student, teacher)
        tensor(0.8125)

    References:
        Romero et al.: FitNets: Hints for Thin Deep Nets, 2015, arXiv:1412.6550; Girshick: Fast R-CNN, 2015,
        arXiv:1504.08083 (smooth L1).
    """

    inputs = {**compared(VECTORS, TOKENS, MAPS), "sample_weight": SAMPLE_WEIGHT}
    sample_axes = ("batch", "batch tokens", "batch height width")
    cases = (
        Case(),
        Case(
            {"distance": "l1", "entry_reduction": "sum"},
            layouts={"student_features": TOKENS, "sample_weight": "batch tokens"},
            optional=("sample_weight",),
        ),
        Case(
            {"distance": "smooth_l1", "beta": 2.0, "reduction": "sum"},
            layouts={"student_features": MAPS, "sample_weight": "batch"},
            optional=("sample_weight",),
        ),
        Case(layouts={"sample_weight": "batch height width"}, optional=("sample_weight",)),
    )
    aliases = ("FitNet", "HintLoss", "hid_mse", "hid_mse_loss", Alias("SmoothL1", distance="smooth_l1"))

    distance: str = choice(DISTANCES, default="mse")
    beta: float = number(default=1.0, above=0.0)
    entry_reduction: str = choice(("mean", "sum"), default="mean")

    def covered_by_kernel(self, given: Mapping[str, Spec]) -> bool:
        # What a sample has lies side by side, but for places of maps.
        return "sample_weight" not in given or "height" not in given["sample_weight"].names

    def fused(self, kernel: KernelPoint, student_features, teacher_features, sample_weight):
        weight = ops.optional_weight(sample_weight)
        tensors = {"student": student_features, "teacher": teacher_features}
        if weight is None or weight.dim() == 1:
            tensors = {name: tensor.flatten(1) for name, tensor in tensors.items()}
        settings = {"form": self.distance, "average": self.entry_reduction, "beta": self.beta}
        values = kernel(ENTRY_DISTANCE, "value", _rows, tensors, settings, weight="weight")
        return ops.reduce(values, weight, self.reduction)

    def properties(self) -> Properties:
        return Properties(feature_scale="a difference grows with its terms", zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None):
        def cost(r):
            if self.distance == "mse":
                return r**2
            if self.distance == "l1":
                return abs(r)
            return r**2 / (2 * self.beta) if abs(r) < self.beta else abs(r) - self.beta / 2

        values = []
        student, teacher = (one_by_one(features, sample_weight) for features in (student_features, teacher_features))
        for x, y in zip(student, teacher, strict=True):
            costs = [cost(r) for r in (x - y).ravel()]
            values.append(np.sum(costs) if self.entry_reduction == "sum" else np.mean(costs))
        return reduce_one_by_one(values, sample_weight, self.reduction)
