"""Variational information distillation: the teacher's features as drawn from a Gaussian that the student predicts."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, ops, register
from pykd.losses.features._shared import (
    MAPS,
    TOKENS,
    VECTORS,
    compared,
    kept_features,
    of_channels,
    one_by_one,
    per_sample,
    reduce_one_by_one,
)


def variational_information(
    student_features: Tensor,
    teacher_features: Tensor,
    student_log_variance: Tensor,
    sample_weight: Tensor | None,
    entry_reduction: str,
    reduction: str,
) -> Tensor:
    """Negative log-likelihood of the teacher's features; see :class:`VariationalInformation`."""
    weight = ops.optional_weight(sample_weight)
    difference = kept_features(student_features, weight) - kept_features(teacher_features.detach(), weight)
    log_variance = of_channels(student_log_variance, difference)
    costs = 0.5 * (difference * difference * torch.exp(-log_variance) + log_variance)
    return ops.reduce(per_sample(costs, weight, entry_reduction), weight, reduction)


@register(variational_information)
class VariationalInformation(Loss):
    r"""Negative logarithm of the likelihood of the teacher's features under a Gaussian that the student predicts.

    .. math:: \ell_b = \sum_{c,n} \frac{(y_{bcn} - \mu_{bcn})^2}{2 \sigma_c^2} + \frac12 \log \sigma_c^2, \quad
              \sigma_c^2 = e^{v_c}

    over channels c and places n, without the constant :math:`\frac12 \log 2\pi` of each. The fewer bits of the teacher the
    student leaves unexplained, the smaller; it bounds the mutual information of the two from below.

    Args:
        entry_reduction: ``"sum"``: over the entries of a sample, as above; ``"mean"``: divided by their number.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``, or the shape
            of ``sample_weight``.

    Inputs:
        student_features: μ, what a small network makes of the student's features: ``(batch, channels, height, width)``,
            ``(batch, tokens, channels)`` or ``(batch, channels)``, any floating type; receives the gradient.
        teacher_features: the same shape and type; constant.
        student_log_variance: v, ``(channels,)``, same type; receives the gradient. The logarithm of the variance, since any number
            is one; of the paper's variance it is ``(torch.nn.functional.softplus(alpha) + 1e-5).log()`` of a trained α.
        sample_weight: optional, at least 0, of any floating type, or a mask (bool or integers); constant. ``(batch,)``; or
            ``(batch, tokens)`` or ``(batch, height, width)``, where every token or place of a map is a sample. A sample of
            weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats; below 0 where variances below 1 are right; a scalar unless ``reduction="none"``. float32 for half-precision
        inputs, which are computed in float32.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Who differs: RepDistiller, mdistiller and torchdistill take the mean over all entries (``entry_reduction="mean"``).

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
        >>> VariationalInformation()(student, teacher, torch.tensor([0.5, 1.0]).log())  # 1 + ½ log ½
        tensor(0.6534)

    References:
        Ahn et al.: Variational Information Distillation for Knowledge Transfer, CVPR 2019, arXiv:1904.05835.
    """

    inputs = {
        **compared(MAPS, TOKENS, VECTORS),
        "student_log_variance": Spec("channels", grad=True, draw="log_probabilities", scale=0.2),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens", "batch height width")
    cases = (
        Case(layouts={"sample_weight": "batch"}, optional=("sample_weight",)),
        Case(
            {"entry_reduction": "mean", "reduction": "sum"},
            layouts={"sample_weight": "batch tokens"},
            optional=("sample_weight",),
        ),
        Case(layouts={"student_features": VECTORS}),
    )
    aliases = ("VID", Alias("VIDLoss", entry_reduction="mean"))

    entry_reduction: str = choice(("sum", "mean"), default="sum")

    def properties(self) -> Properties:
        return Properties(
            feature_scale="the variance has a scale",
            zero_when_equal="the logarithm of the variance is left",
            symmetric=True,
        )

    def reference(self, student_features, teacher_features, student_log_variance, sample_weight=None):
        values, variances = [], np.exp(student_log_variance)
        student, teacher = (one_by_one(features, sample_weight) for features in (student_features, teacher_features))
        for x, y in zip(student, teacher, strict=True):
            channels = 0 if x.ndim == 3 else -1
            costs = [
                (b - a) ** 2 / (2 * variance) + np.log(variance) / 2
                for mu, t, variance in zip(
                    np.moveaxis(x, channels, 0), np.moveaxis(y, channels, 0), variances, strict=True
                )
                for a, b in zip(np.ravel(mu), np.ravel(t), strict=True)
            ]
            values.append(np.sum(costs) if self.entry_reduction == "sum" else np.mean(costs))
        return reduce_one_by_one(values, sample_weight, self.reduction)
