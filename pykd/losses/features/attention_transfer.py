"""Attention transfer: match where the activations of a layer are, whatever they are."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, number, ops, register
from pykd.definition.reference import reduce_samples, unit
from pykd.losses.features._shared import axis_of_channels, kept_features, length


def _attention(features: Tensor, weight: Tensor | None, power: float) -> Tensor:
    """``(batch, places)``: normalised Σ |x|^p over the channels."""
    inner = [1, 2, 3] if features.dim() == 4 else [1, 2]
    x = ops.normalize(kept_features(features, weight), dim=inner)
    if power == 2:
        energy = x * x
    else:
        largest = x.detach().abs().amax(dim=inner, keepdim=True)  # relative to it no power is too small for its type
        energy = (x.abs() / torch.where(largest > 0, largest, 1.0)).pow(power)
    return ops.normalize(energy.sum(dim=axis_of_channels(features)).flatten(1), dim=[-1])


def attention_transfer(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    form: str,
    power: float,
    reduction: str,
) -> Tensor:
    """Distance between normalised attention maps; see :class:`AttentionTransfer`."""
    weight = ops.optional_weight(sample_weight)
    difference = _attention(student_features, weight, power) - _attention(teacher_features.detach(), weight, power)
    if form == "paper":
        return ops.reduce(length(difference, dim=[-1]), weight, reduction)
    return ops.reduce((difference * difference).mean(dim=-1), weight, reduction)


@register(attention_transfer)
class AttentionTransfer(Loss):
    r"""Distance between the student's and the teacher's attention: where in a map the activations are strong.

    .. math:: \ell_b = \left\lVert \frac{a(x_b)}{\lVert a(x_b) \rVert_2} - \frac{a(y_b)}{\lVert a(y_b) \rVert_2}
              \right\rVert_2, \quad a(x)_n = \sum_c |x_{cn}|^p

    over the places n (pixels or tokens) of a map. A mean over the channels instead of the sum changes nothing, since a is
    normalised: so the two networks may have different numbers of channels.

    Args:
        form: ``"paper"``: the norm above. ``"code"``: the mean over the N places of the squared difference, which is
            the square of that norm divided by N, as the authors' code has it.
        power: p, at least 1; the larger, the more the strongest activations count.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: ``(batch, channels, height, width)`` or ``(batch, tokens, channels)``, any floating type; receives the
            gradient.
        teacher_features: of the same height and width, or as many tokens, with channels of its own; same type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        No unit; from 0 to √2 (``"paper"``), or to 2 / N (``"code"``); 0 where attention agrees; a scalar unless
        ``reduction="none"``. float32 for half-precision inputs, which are computed in float32. A map that is 0 everywhere has
        attention 0 and gets the gradient 0. So does one whose attention agrees exactly.

    Raises:
        ValueError: for a power below 1, maps of different size (pool the larger one first), an empty batch.

    Who differs: the authors' code, RepDistiller, mdistiller, MMRazor and torchdistill's ``mode="code"`` compute
    ``form="code"``; torchdistill's ``mode="paper"`` is ``form="paper"``. The paper weighs it by β / 2, with β = 1000.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]])
        >>> AttentionTransfer()(student, teacher)
        tensor(0.7654)
        >>> AttentionTransfer(form="code")(student, teacher)
        tensor(0.2929)

    References:
        Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928.
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
        Case(
            {"form": "code", "power": 3.0, "reduction": "sum"},
            layouts={"student_features": "batch tokens channels"},
            optional=("sample_weight",),
        ),
    )
    aliases = ("AT", Alias("ATLoss", form="code"))

    form: str = choice(("paper", "code"), default="paper")
    power: float = number(default=2.0, minimum=1.0)

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None):
        def attention(features):
            features = unit(features.ravel()).reshape(features.shape)  # of which every power fits
            channels = 0 if features.ndim == 3 else -1
            return unit((np.abs(features) ** self.power).sum(axis=channels).ravel())

        values = []
        for x, y in zip(student_features, teacher_features, strict=True):
            difference = attention(x) - attention(y)
            distance = np.sqrt((difference**2).sum())
            values.append(distance if self.form == "paper" else distance**2 / len(difference))
        return reduce_samples(values, sample_weight, self.reduction)
