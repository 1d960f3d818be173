"""Attentive feature distillation: match the normalised maps of the channels, each as far as attention says."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register
from pykd.definition.reference import log_softmax, reduce_samples, unit
from pykd.losses.features._shared import MAPS, compared, kept_features


def attentive_features(
    student_features: Tensor,
    teacher_features: Tensor,
    channel_scores: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Mean squared difference of normalised channel maps, weighed per channel; see :class:`AttentiveFeatures`."""
    weight = ops.optional_weight(sample_weight)
    x = ops.normalize(kept_features(student_features, weight).flatten(2), dim=[-1])
    y = ops.normalize(kept_features(teacher_features.detach(), weight).flatten(2), dim=[-1])
    difference = x - y
    distances = (difference * difference).mean(dim=-1)
    attention = torch.softmax(kept_features(channel_scores, weight), dim=-1)
    return ops.reduce((attention * distances).sum(dim=-1), weight, reduction)


@register(attentive_features)
class AttentiveFeatures(Loss):
    r"""Mean squared difference of the student's and the teacher's normalised channel maps, of which attention weighs each.

    .. math:: \ell_b = \sum_c \frac{\rho_{bc}}{N} \sum_n \left( \frac{x_{bcn}}{\lVert x_{bc} \rVert_2}
              - \frac{y_{bcn}}{\lVert y_{bc} \rVert_2} \right)^2, \quad \rho_b = \mathrm{softmax}(r_b)

    over channels c and the N places n of a map.

    Args:
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: x, ``(batch, channels, height, width)``, any floating type; receives the gradient.
        teacher_features: y, the same shape and type; constant.
        channel_scores: r, ``(batch, channels)``, same type; receives the gradient. A small network makes them of the means of
            the teacher's channels, and is trained with the student. For an attention ρ that sums to 1 they are log ρ.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        From 0 to 4 / N, no unit; 0 when every channel's maps agree but for a positive factor; a scalar unless
        ``reduction="none"``. float32 for half-precision inputs, which are computed in float32. A map that is 0 everywhere
        stays 0 and gets the gradient 0.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Who differs: KD Zoo's ``AFD`` is this, with 1e-6 added to the norms and the network of ρ inside.

    Example:
        >>> student, teacher = torch.tensor([[[[3.0, 4.0]], [[1.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> AttentiveFeatures()(student, teacher, torch.tensor([[0.75, 0.25]]).log())  # ¾ · 0.4 + ¼ · 1
        tensor(0.5500)

    References:
        Wang et al.: Pay Attention to Features, Transfer Learn Faster CNNs, ICLR 2020.
    """

    inputs = {
        **compared(MAPS),
        "channel_scores": Spec("batch channels", grad=True),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (Case(), Case({"reduction": "sum"}, optional=("sample_weight",)))
    aliases = ("AFD", "AFDS")

    def properties(self) -> Properties:
        return Properties(feature_scale="the scores have a scale", zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, channel_scores, sample_weight=None):
        values = []
        for x, y, scores in zip(student_features, teacher_features, channel_scores, strict=True):
            distances = [((unit(a.ravel()) - unit(b.ravel())) ** 2).mean() for a, b in zip(x, y, strict=True)]
            values.append(np.dot(np.exp(log_softmax(scores)), distances))
        return reduce_samples(values, sample_weight, self.reduction)
