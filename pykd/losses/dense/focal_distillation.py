"""Focal distillation: features of foreground and background apart, weighed by the teacher's attention."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register, scalar
from pykd.definition.reference import log_softmax, reduce_samples


def _attention(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Attention to places, ``(batch, places)``, and to channels, ``(batch, channels)``, each with the mean 1."""
    energy = features.abs()  # (batch, channels, places)
    places = torch.softmax(ops.soften(energy.mean(dim=1), temperature), dim=-1) * energy.size(2)
    channels = torch.softmax(ops.soften(energy.mean(dim=2), temperature), dim=-1) * energy.size(1)
    return places, channels


def focal_distillation(
    student_features: Tensor,
    teacher_features: Tensor,
    foreground: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    foreground_weight: float,
    background_weight: float,
    attention_weight: float,
    reduction: str,
) -> Tensor:
    """Squared differences of features under masks and attention, and differences of attention; see :class:`FocalDistillation`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.upcast(ops.without_left_out(student_features, weight)).flatten(2)
    teacher = ops.upcast(ops.without_left_out(teacher_features.detach(), weight)).flatten(2)
    inside = ops.without_left_out(ops.upcast(foreground.detach()), weight).to(student.dtype).flatten(1)
    outside = (inside == 0).to(student.dtype)
    outside = outside / outside.sum(dim=1, keepdim=True).clamp(min=1.0)
    places, channels = _attention(student, temperature)
    teacher_places, teacher_channels = _attention(teacher, temperature)
    focus = teacher_places * (torch.square(student - teacher) * teacher_channels.unsqueeze(2)).sum(dim=1)
    values = foreground_weight * (inside * focus).sum(dim=1) + background_weight * (outside * focus).sum(dim=1)
    apart = (places - teacher_places).abs().sum(dim=1) + (channels - teacher_channels).abs().sum(dim=1)
    return ops.reduce(values + attention_weight * apart, weight, reduction)


@register(focal_distillation)
class FocalDistillation(Loss):
    r"""Squared difference of features, of foreground and background apart and weighed by the teacher's attention, for detectors.

    .. math:: \ell_b = \sum_i (\alpha f_{bi} + \beta g_{bi})\, A^t_{bi} \sum_c C^t_{bc} (x_{bci} - y_{bci})^2
              + \gamma \Big(\sum_i |A^s_{bi} - A^t_{bi}| + \sum_c |C^s_{bc} - C^t_{bc}|\Big)

    over the height · width places i, with the mask f of the foreground, the background
    :math:`g_{bi} = [f_{bi} = 0] / \#\{j: f_{bj} = 0\}`, and the attention of student and teacher to places and channels

    .. math:: A_{bi} = HW \, \mathrm{softmax}_i\Big(\frac{1}{CT} \sum_c |x_{bci}|\Big), \quad
              C_{bc} = C \, \mathrm{softmax}_c\Big(\frac{1}{HWT} \sum_i |x_{bci}|\Big)

    It is the focal part of focal and global distillation (FGD). The global part compares features after a trained block of
    context: the sum of squared differences of what comes out of it.

    Args:
        temperature: T > 0 of the attention.
        foreground_weight: α, at least 0.
        background_weight: β, at least 0.
        attention_weight: γ, at least 0.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: ``(batch, channels, height, width)``, any floating type; receives the gradient.
        teacher_features: the same shape and type; constant. A student with other channels is projected to the
            teacher's first (a 1×1 convolution).
        foreground: ``(batch, height, width)``, at least 0, of any floating type, or a mask (bool or integers): what a place in
            an object counts, 0 in the background; constant. The paper has 1 / (area of the box), of the smallest where boxes
            overlap, so that large objects do not outweigh small ones.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        At least 0, in the square of the unit of the features; 0 where they are equal; a scalar unless ``reduction="none"``.
        float32 for half-precision inputs, which are computed in float32. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, a negative weight, shapes that do not fit, an empty batch.

    Who differs: the authors' FeatureLoss makes the mask of the boxes, and adds the global part with the weight 5e-6. Its defaults
    are those here, for detectors of one stage with anchors; without anchors it has 0.0016, 0.0008 and 0.0008 (at T = 0.8), for two
    stages 5e-5, 2.5e-5 and 5e-5.

    Example:
        Two places, one of them in an object, whose attention is even: 0.001 · (2 − 1)² + 0.0005 · (−2 + 1)².

        >>> student = torch.tensor([[[[2.0, -2.0]]]])
        >>> teacher = torch.tensor([[[[1.0, -1.0]]]])
        >>> round(FocalDistillation()(student, teacher, torch.tensor([[[True, False]]])).item(), 6)
        0.0015

    References:
        Yang et al.: Focal and Global Knowledge Distillation for Detectors, CVPR 2022, arXiv:2111.11837.
    """

    inputs = {
        "student_features": Spec("batch channels height width", grad=True, like="teacher_features"),
        "teacher_features": Spec("batch channels height width"),
        "foreground": Spec("batch height width", dtype="weight", draw="weights"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case(),
        Case(
            {
                "temperature": 2.0,
                "foreground_weight": 0.5,
                "background_weight": 0.25,
                "attention_weight": 2.0,
                "reduction": "sum",
            },
            optional=("sample_weight",),
        ),
    )
    aliases = ("FGD",)

    temperature: float = scalar(default=0.5, minimum=0.0, exclusive=True)
    foreground_weight: float = scalar(default=0.001, minimum=0.0)
    background_weight: float = scalar(default=0.0005, minimum=0.0)
    attention_weight: float = scalar(default=0.001, minimum=0.0)

    def properties(self) -> Properties:
        return Properties(
            feature_scale="differences have the scale of what they are taken of",
            zero_when_equal=True,
            symmetric="the teacher's attention weighs the places",
        )

    def reference(self, student_features, teacher_features, foreground, sample_weight=None):
        values = []
        for x, y, inside in zip(student_features, teacher_features, foreground, strict=True):
            x, y = (features.reshape(len(features), -1) for features in (x, y))
            inside = np.asarray(inside, np.float64).ravel()
            background = np.flatnonzero(inside == 0)
            (places, channels), (teacher_places, teacher_channels) = (self._attention(f) for f in (x, y))
            value = 0.0
            for i in range(len(inside)):
                squares = sum(c * (a - b) ** 2 for c, a, b in zip(teacher_channels, x[:, i], y[:, i], strict=True))
                counts = self.foreground_weight * inside[i]
                if inside[i] == 0:
                    counts += self.background_weight / len(background)
                value += counts * teacher_places[i] * squares
            apart = np.abs(places - teacher_places).sum() + np.abs(channels - teacher_channels).sum()
            values.append(value + self.attention_weight * apart)
        return reduce_samples(values, sample_weight, self.reduction)

    def _attention(self, features):
        """Of one image, to places and to channels."""
        energy = np.abs(features)
        places, channels = energy.mean(axis=0), energy.mean(axis=1)
        return tuple(len(mean) * np.exp(log_softmax(mean / self.temperature)) for mean in (places, channels))
