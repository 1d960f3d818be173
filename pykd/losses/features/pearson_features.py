"""Pearson correlation of features: match how a channel varies, whatever its mean and its scale."""

import numpy as np
from torch import Tensor

from pykd.definition import Case, Loss, Properties, ops, register
from pykd.losses.features._shared import MAPS, TOKENS, VECTORS, axis_of_channels, compared


def _standardised(features: Tensor) -> Tensor:
    """Each channel less its mean, over the norm of what is left."""
    x = ops.upcast(features)
    others = [0, 2, 3] if x.dim() == 4 else [0, 1] if x.dim() == 3 else [0]
    # From one of its entries first, which changes nothing: then a constant channel is exactly 0, not what rounding left of it.
    first = x.detach()
    for axis in others:
        first = first.narrow(axis, 0, 1)
    x = x - first
    return ops.normalize(x - x.mean(dim=others, keepdim=True), dim=others)


def pearson_features(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """One less the correlation of each channel, mean over channels; see :class:`PearsonFeatures`."""
    difference = _standardised(student_features) - _standardised(teacher_features.detach())
    return (difference * difference).sum() / (2 * difference.size(axis_of_channels(difference)))


@register(pearson_features)
class PearsonFeatures(Loss):
    r"""Half the mean squared difference of features, each of whose channels is standardised over the batch and all places.

    .. math:: \frac1{2 C M} \sum_{c,m} (z_{cm} - z'_{cm})^2 = \frac1C \sum_c (1 - \rho_c), \quad
              z_{cm} = \frac{x_{cm} - \mathrm{mean}_m \, x_{cm}}{\mathrm{std}_m \, x_{cm}}

    over C channels and M entries of each (batch times height times width, or tokens), and so for the teacher's z′; ρ is
    Pearson's correlation of a channel with the teacher's. The standard deviation is that of the population (divided by M).

    Args:
        reduction: ``"mean"`` alone; the mean is part of the definition.

    Inputs:
        student_features: ``(batch, channels, height, width)``, ``(batch, tokens, channels)`` or ``(batch, channels)``, any
            floating type; receives the gradient.
        teacher_features: the same shape and type; constant.

    Returns:
        A scalar from 0 to 2, no unit; 0 when every channel goes with the teacher's. float32 for half-precision inputs, which
        are computed in float32. A channel that does not vary is standardised to 0 and gets the gradient 0; it adds ½ / C
        where the teacher's does, and 0 where that does not vary either.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    There is no value per sample: every sample is standardised with the others.

    Who differs: MMRazor's ``PKDLoss`` divides by the standard deviation of a sample of M entries (by M − 1) plus 1e-6: M − 1
    over M of this; it resizes maps where they differ, and adds up several.

    Example:
        >>> student, teacher = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[30.0], [10.0], [20.0]])
        >>> PearsonFeatures()(student, teacher)  # 1 + ½
        tensor(1.5000)

    References:
        Cao et al.: PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient, NeurIPS 2022,
        arXiv:2207.02039.
    """

    inputs = compared(MAPS, TOKENS, VECTORS)
    cases = (Case(), Case(layouts={"student_features": TOKENS}), Case(layouts={"student_features": VECTORS}))
    couples_batch = "standardises every channel over the whole batch"
    aliases = ("PKD", "PKDLoss")

    def properties(self) -> Properties:
        return Properties(
            feature_scale="a channel has one scale in the whole batch", zero_when_equal=True, symmetric=True
        )

    def reference(self, student_features, teacher_features):
        def standardised(channel):
            if channel.min() == channel.max():  # whose mean may be rounded
                return np.zeros_like(channel)
            return (channel - channel.mean()) / np.sqrt(np.mean((channel - channel.mean()) ** 2))

        channels = 1 if np.ndim(student_features) == 4 else -1
        student, teacher = (np.moveaxis(x, channels, 0) for x in (student_features, teacher_features))
        return np.mean(
            [np.mean((standardised(x) - standardised(y)) ** 2) / 2 for x, y in zip(student, teacher, strict=True)]
        )
