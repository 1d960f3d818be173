"""Channel distillation: match how strong every channel is on the whole."""

import numpy as np
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, ops, register, whole
from pykd.definition.reference import reduce_samples
from pykd.losses.features._shared import MAPS, compared, kept_features


def channel_distillation(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    sample_weight: Tensor | None,
    layers: int,
    reduction: str,
) -> Tensor:
    """Mean squared difference of the means of channels, added up over layers; see :class:`ChannelDistillation`."""
    weight = ops.optional_weight(sample_weight)
    distances: list[Tensor] = []
    for student, teacher in zip(student_features, teacher_features):  # noqa: B905  TorchScript knows no strict
        difference = kept_features(student, weight) - kept_features(teacher.detach(), weight)
        difference = difference.flatten(2).mean(dim=-1)
        distances.append((difference * difference).mean(dim=-1))
    values = distances[0]
    for distance in distances[1:]:
        values = values + distance
    return ops.reduce(values, weight, reduction)


@register(channel_distillation)
class ChannelDistillation(Loss):
    r"""Mean squared difference between the student's and the teacher's channel attention: the mean of each channel's map.

    .. math:: \ell_b = \sum_l \frac1{C_l} \sum_c \left( \frac1{N_l} \sum_n x_{blcn} - \frac1{N_l} \sum_n y_{blcn} \right)^2

    Args:
        layers: how many layers there are.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: a list of maps ``(batch, channels, height, width)``, one per layer, any floating type; receives the
            gradient.
        teacher_features: a list of the same shapes and type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        At least 0, in squared units of the features; 0 when the means agree; a scalar unless ``reduction="none"``. float32 for
        half-precision inputs, which are computed in float32.

    Raises:
        ValueError: for shapes that do not fit (map the student's channels to the teacher's first), an empty batch.

    Who differs: the authors' ``CDLoss`` is this. It is no relative of channel-wise distillation (CWD), which compares
    distributions over the places of a channel.

    Example:
        >>> student, teacher = [torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])], [torch.zeros(1, 2, 1, 2)]
        >>> ChannelDistillation()(student, teacher)  # (2² + 0²) / 2
        tensor(2.)

    References:
        Zhou et al.: Channel Distillation: Channel-Wise Attention for Knowledge Distillation, 2020, arXiv:2006.01683.
    """

    inputs = {**compared(MAPS, layers="layers"), "sample_weight": SAMPLE_WEIGHT}
    cases = (Case(), Case({"layers": 2, "reduction": "sum"}, optional=("sample_weight",)))
    aliases = ("CDLoss",)

    layers: int = whole(default=1, minimum=1, maximum=100)

    def properties(self) -> Properties:
        return Properties(feature_scale="a difference grows with its terms", zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None):
        values = []
        for b in range(len(student_features[0])):
            value = 0.0
            for x, y in zip(student_features, teacher_features, strict=True):
                pairs = zip(x[b], y[b], strict=True)
                value += np.mean([(np.mean(student) - np.mean(teacher)) ** 2 for student, teacher in pairs])
            values.append(value)
        return reduce_samples(values, sample_weight, self.reduction)
