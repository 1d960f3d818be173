"""Prime-aware adaptive distillation: squared distance of embeddings, each weighed by how sure the student is."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, choice, number, ops, register
from pykd.definition.reference import reduce_samples
from pykd.losses.features._shared import VECTORS, compared, kept_features, per_sample


def prime_aware(
    student_features: Tensor,
    teacher_features: Tensor,
    student_log_variance: Tensor,
    sample_weight: Tensor | None,
    epsilon: float,
    entry_reduction: str,
    reduction: str,
) -> Tensor:
    """Squared distance over the predicted variance, and its logarithm; see :class:`PrimeAware`."""
    weight = ops.optional_weight(sample_weight)
    difference = kept_features(student_features, weight) - kept_features(teacher_features.detach(), weight)
    log_variance = kept_features(student_log_variance, weight)
    variance = torch.exp(log_variance.clamp(max=80.0))  # beyond which nothing is left of what it divides
    costs = difference * difference / (variance + epsilon) + log_variance
    return ops.reduce(per_sample(costs, None, entry_reduction), weight, reduction)


@register(prime_aware)
class PrimeAware(Loss):
    r"""Squared distance of embeddings over a variance that the student predicts for each sample, and the variance's logarithm.

    .. math:: \ell_b = \frac1D \sum_d \left( \frac{(x_{bd} - y_{bd})^2}{\varepsilon + e^{v_{bd}}} + v_{bd} \right)

    Samples (and dimensions) that the student declares uncertain count less, at a price.

    Args:
        epsilon: ε > 0, added to the variance.
        entry_reduction: ``"mean"``: over the D entries of a sample, as above; ``"sum"``: their sum.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: x, ``(batch, channels)``, any floating type; receives the gradient.
        teacher_features: y, the same shape and type; constant.
        student_log_variance: v, from a branch of the student, the same shape and type; receives the gradient. One number per
            sample is ``v.expand_as(x)`` of a ``(batch, 1)``.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Any number; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which are computed in float32.
        Logarithms above 80 count as 80 in the variance, and as they are beside it.

    Raises:
        ValueError: for an ε that is not positive, shapes that do not fit, an empty batch.

    Who differs: torchdistill's ``PADL2Loss`` is this.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> PrimeAware()(student, teacher, torch.tensor([[0.6931, 0.0]]))  # ½ · (½ + log 2)
        tensor(0.5966)

    References:
        Zhang et al.: Prime-Aware Adaptive Distillation, ECCV 2020, arXiv:2008.01458.
    """

    inputs = {
        **compared(VECTORS),
        "student_log_variance": Spec(VECTORS, grad=True),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case(),
        Case({"epsilon": 0.5, "entry_reduction": "sum", "reduction": "sum"}, optional=("sample_weight",)),
    )
    aliases = ("PAD", "PAD-L2", "PADL2Loss")

    epsilon: float = number(default=1e-6, above=0.0)
    entry_reduction: str = choice(("mean", "sum"), default="mean")

    def properties(self) -> Properties:
        return Properties(
            feature_scale="the variance has a scale",
            zero_when_equal="the logarithm of the variance is left",
            symmetric=True,
        )

    def reference(self, student_features, teacher_features, student_log_variance, sample_weight=None):
        values = []
        for x, y, v in zip(student_features, teacher_features, student_log_variance, strict=True):
            costs = [(a - b) ** 2 / (self.epsilon + np.exp(c)) + c for a, b, c in zip(x, y, v, strict=True)]
            values.append(np.sum(costs) if self.entry_reduction == "sum" else np.mean(costs))
        return reduce_samples(values, sample_weight, self.reduction)
