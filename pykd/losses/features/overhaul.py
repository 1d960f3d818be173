"""Overhaul of feature distillation: match what the teacher's activations pass on, by a partial squared distance."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, choice, ops, register
from pykd.definition.reference import reduce_samples
from pykd.losses.features._shared import MAPS, VECTORS, compared, kept_features, of_channels, per_sample


def overhaul(
    student_features: Tensor,
    teacher_features: Tensor,
    margin: Tensor,
    sample_weight: Tensor | None,
    entry_reduction: str,
    reduction: str,
) -> Tensor:
    """Partial squared distance to the teacher's features above a margin; see :class:`Overhaul`."""
    weight = ops.optional_weight(sample_weight)
    x = kept_features(student_features, weight)
    teacher = kept_features(teacher_features.detach(), weight)
    y = torch.maximum(teacher, of_channels(margin.detach(), teacher))
    excess = x - y
    costs = excess * torch.where(y > 0, excess, excess.clamp(min=0.0))
    return ops.reduce(per_sample(costs, weight, entry_reduction), weight, reduction)


@register(overhaul)
class Overhaul(Loss):
    r"""Squared distance of features before the ReLU, left out where student and teacher would both pass nothing on.

    .. math:: \ell_b = \sum_{c,n} \begin{cases} 0 & x_{bcn} \le y_{bcn} \le 0 \\ (x_{bcn} - y_{bcn})^2 & \text{else}
              \end{cases}, \quad y_{bcn} = \max(t_{bcn}, m_c)

    t are the teacher's features, of which a margin m below 0 takes the place where they are lower still.

    Args:
        entry_reduction: ``"sum"``: over the entries of a sample, as above; ``"mean"``: divided by their number.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: x, mapped to the teacher's channels (a 1×1 convolution with batch normalisation in the paper), before
            the ReLU: ``(batch, channels, height, width)`` or ``(batch, channels)``, any floating type; receives the gradient.
        teacher_features: t, the same shape and type, before the ReLU; constant.
        margin: m, ``(channels,)``, at most 0, same type; constant. The paper's is the mean of a channel's negative features, from the
            running mean and variance of the batch normalisation before it.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        At least 0, in squared units of the features; a scalar unless ``reduction="none"``. float32 for half-precision inputs,
        which are computed in float32.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Who differs: the authors' code and mdistiller take the sum over a sample and weigh a layer by 2^(i − n), and the whole by
    1/1000; MMRazor's ``OFDLoss`` divides the sum by batch and 1000; KD Zoo's is the mean (``entry_reduction="mean"``).

    Example:
        >>> student, teacher = torch.tensor([[1.0, -3.0, 0.0]]), torch.tensor([[2.0, -0.5, -4.0]])
        >>> Overhaul()(student, teacher, torch.tensor([-1.0, -1.0, -1.0]))  # 1 + nothing + 1
        tensor(2.)

    References:
        Heo et al.: A Comprehensive Overhaul of Feature Distillation, ICCV 2019, arXiv:1904.01866.
    """

    inputs = {
        **compared(MAPS, VECTORS),
        "margin": Spec("channels", draw="positive", scale=-1.0),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case({"reduction": "sum"}, optional=("sample_weight",)),
        Case({"entry_reduction": "mean"}, layouts={"student_features": VECTORS}),
    )
    aliases = ("OFD", "OFDLoss")

    entry_reduction: str = choice(("sum", "mean"), default="sum")

    def properties(self) -> Properties:
        return Properties(
            feature_scale="the margin has a scale",
            zero_when_equal=True,
            symmetric="the student may be lower than a teacher that passes nothing on",
        )

    def reference(self, student_features, teacher_features, margin, sample_weight=None):
        values = []
        for x, y in zip(student_features, teacher_features, strict=True):
            costs = []
            for m, student, teacher in zip(margin, x, y, strict=True):
                for s, t in zip(np.ravel(student), np.maximum(np.ravel(teacher), m), strict=True):
                    costs.append(0.0 if s <= t <= 0 else (s - t) ** 2)
            values.append(np.sum(costs) if self.entry_reduction == "sum" else np.mean(costs))
        return reduce_samples(values, sample_weight, self.reduction)
