"""Channel-wise distillation: where in the image each channel is active, matched as a distribution."""

import numpy as np
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, flag, ops, register, scalar
from pykd.definition.reference import divergence, log_softmax, reduce_samples


def channel_wise(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """Divergence between softmaxes over the places of each channel; see :class:`ChannelWise`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_features, weight).flatten(2)
    teacher = ops.without_left_out(teacher_features, weight).flatten(2)
    values = ops.softened_divergence(student, teacher, temperature).mean(dim=1)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(channel_wise)
class ChannelWise(Loss):
    r"""KL divergence between the teacher's and the student's softmax over the places of each channel, mean over the channels.

    .. math:: \ell_b = \frac{T^2}{C} \sum_c \sum_i p_{bci} (\log p_{bci} - \log q_{bci}), \quad
              p_{bc} = \mathrm{softmax}(y_{bc} / T), \; q_{bc} = \mathrm{softmax}(x_{bc} / T)

    where i goes over the height · width places of a channel c. The maps may be features or the logits of the classes.

    Args:
        temperature: T > 0; larger takes more of the map into account.
        tau_squared: whether to multiply by T², as the paper does.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: ``(batch, channels, height, width)``, any floating type; receives the gradient. −inf takes a place out.
        teacher_features: the same shape and type; constant. A student with other channels is projected to the
            teacher's first (a 1×1 convolution).
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats (times T² with ``tau_squared``), at least 0, and 0 where the maps of every channel differ by a constant; a scalar
        unless ``reduction="none"``. float32 for half-precision inputs, which are computed in float32. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: MMRazor's ChannelWiseDivergence has T = 1 by default. CriterionCWD of CIRKD and TorchDistiller (the
    authors' code) take the logarithm of the softmax, which is −inf where it underflows, and offer other normalisations.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, 2.0]]]])
        >>> ChannelWise(temperature=2.0)(student, teacher)
        tensor(0.4438)

    References:
        Shu et al.: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, arXiv:2011.13256.
    """

    inputs = {
        "student_features": Spec("batch channels height width", grad=True, like="teacher_features"),
        "teacher_features": Spec("batch channels height width"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case({"temperature": 2.0}),
        Case({"temperature": 0.5, "tau_squared": False, "reduction": "sum"}, optional=("sample_weight",)),
    )
    aliases = ("CWD", Alias("ChannelWiseDivergence", temperature=1.0))

    temperature: float = scalar(default=4.0, minimum=0.0, exclusive=True)
    tau_squared: bool = flag(default=True)

    def properties(self) -> Properties:
        return Properties(
            feature_scale="larger features make a sharper softmax",
            zero_when_equal=True,
            symmetric="the teacher weighs the logarithms",
        )

    def reference(self, student_features, teacher_features, sample_weight=None):
        values = []
        for x, y in zip(student_features, teacher_features, strict=True):
            channels = []
            for own, wanted in zip(x, y, strict=True):
                log_q = log_softmax(own.ravel() / self.temperature)
                log_p = log_softmax(wanted.ravel() / self.temperature)
                channels.append(divergence(log_p, log_q))
            values.append(np.mean(channels) * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction)
