"""Activation boundaries: match which of the teacher's neurons are active, not by how much."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, choice, ops, register, scalar
from pykd.definition.reference import reduce_samples
from pykd.losses.features._shared import MAPS, VECTORS, compared, kept_features, per_sample


def activation_boundaries(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    margin: float,
    entry_reduction: str,
    reduction: str,
) -> Tensor:
    """Squared hinge on the side of the teacher's activation; see :class:`ActivationBoundaries`."""
    weight = ops.optional_weight(sample_weight)
    x = kept_features(student_features, weight)
    y = kept_features(teacher_features.detach(), weight)
    side = torch.where(y > 0, x, torch.where(y <= 0, -x, y))  # NaN of the teacher stays NaN
    short = (margin - side).clamp(min=0.0)
    return ops.reduce(per_sample(short * short, weight, entry_reduction), weight, reduction)


@register(activation_boundaries)
class ActivationBoundaries(Loss):
    r"""Squared hinge loss that puts every neuron of the student on the side of 0 that the teacher's is on, by a margin.

    .. math:: \ell_b = \sum_d \begin{cases} \max(0, m - x_{bd})^2 & y_{bd} > 0 \\ \max(0, m + x_{bd})^2 & y_{bd} \le 0
              \end{cases}

    Args:
        margin: m, at least 0, which the student keeps from the boundary.
        entry_reduction: ``"sum"``: over the entries of a sample, as above; ``"mean"``: divided by their number.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: x, before the activation function, mapped to the teacher's width: ``(batch, channels, height, width)``
            or ``(batch, channels)``, any floating type; receives the gradient.
        teacher_features: y, the same shape and type, before the activation function; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        At least 0, in squared units of the features; 0 where every neuron is on the teacher's side by the margin; a scalar
        unless ``reduction="none"``. float32 for half-precision inputs, which are computed in float32.

    Raises:
        ValueError: for a negative margin, shapes that do not fit, an empty batch.

    Who differs: torchdistill's ``AltActTransferLoss`` is this; RepDistiller and MMRazor multiply it by 3/1000, and
    RepDistiller weighs layer i of n by 2^(i − n + 1).

    Example:
        >>> student, teacher = torch.tensor([[0.5, -3.0, 2.0]]), torch.tensor([[4.0, -0.1, -0.1]])
        >>> ActivationBoundaries()(student, teacher)  # ½² + nothing + 3²
        tensor(9.2500)

    References:
        Heo et al.: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons, AAAI 2019,
        arXiv:1811.03233.
    """

    inputs = {**compared(MAPS, VECTORS), "sample_weight": SAMPLE_WEIGHT}
    cases = (
        Case({"reduction": "sum"}, optional=("sample_weight",)),
        Case({"margin": 0.5, "entry_reduction": "mean"}, layouts={"student_features": VECTORS}),
    )
    aliases = ("AB", "DAB", "ABLoss", "AltActTransferLoss")

    margin: float = scalar(default=1.0, minimum=0.0)
    entry_reduction: str = choice(("sum", "mean"), default="sum")

    def properties(self) -> Properties:
        return Properties(
            feature_scale="the margin has a scale",
            zero_when_equal="a margin is kept, however near the boundary the teacher is",
            symmetric="of the teacher the signs count alone",
        )

    def reference(self, student_features, teacher_features, sample_weight=None):
        values = []
        for x, y in zip(student_features, teacher_features, strict=True):
            costs = [
                max(0.0, self.margin - s) ** 2 if t > 0 else max(0.0, self.margin + s) ** 2
                for s, t in zip(np.ravel(x), np.ravel(y), strict=True)
            ]
            values.append(np.sum(costs) if self.entry_reduction == "sum" else np.mean(costs))
        return reduce_samples(values, sample_weight, self.reduction)
