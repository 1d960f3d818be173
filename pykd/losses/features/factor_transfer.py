"""Factor transfer: match normalised factors that small networks make of the features of student and teacher."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, choice, ops, register
from pykd.definition.reference import reduce_samples, unit
from pykd.losses.features._shared import MAPS, VECTORS, compared, kept_features, length, per_sample


def _normalised(factors: Tensor, norm: str) -> Tensor:
    """``(batch, entries)``, each sample divided by its norm; one that is 0, or below any normal number, becomes 0."""
    x = factors.flatten(1)
    if norm == "l2":
        return ops.normalize(x, dim=[-1])
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    tiny = 2.2250738585072014e-308 if x.dtype == torch.float64 else 1.1754943508222875e-38
    zero = largest < tiny
    x = x / torch.where(zero, 1.0, largest)
    total = x.abs().sum(dim=-1, keepdim=True)
    return x * torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, total))


def factor_transfer(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    distance: str,
    norm: str,
    entry_reduction: str,
    reduction: str,
) -> Tensor:
    """Distance of normalised factors; see :class:`FactorTransfer`."""
    weight = ops.optional_weight(sample_weight)
    x = _normalised(kept_features(student_features, weight), norm)
    y = _normalised(kept_features(teacher_features.detach(), weight), norm)
    difference = x - y
    if distance == "l1":
        return ops.reduce(per_sample(difference.abs(), None, entry_reduction), weight, reduction)
    values = length(difference, dim=[-1])
    return ops.reduce(values / x.size(1) if entry_reduction == "mean" else values, weight, reduction)


@register(factor_transfer)
class FactorTransfer(Loss):
    r"""Distance between the student's and the teacher's factors, each normalised as a whole.

    .. math:: \ell_b = \left\lVert \frac{x_b}{\lVert x_b \rVert_q} - \frac{y_b}{\lVert y_b \rVert_q} \right\rVert_p

    over all D entries of a sample.

    Args:
        distance: ``"l1"`` or ``"l2"``: the p of the distance, which is not squared.
        norm: ``"l2"`` or ``"l1"``: the q of the norms that factors are divided by.
        entry_reduction: ``"sum"``: as above; ``"mean"``: divided by D.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: x, what the translator makes of the student's features: ``(batch, channels, height, width)`` or
            ``(batch, channels)``, any floating type; receives the gradient.
        teacher_features: y, what the paraphraser makes of the teacher's: the same shape and type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        At least 0, no unit; at most 2 where p and q are equal, 2·√D for the ℓ1 distance of ℓ2 norms; 0 when factors agree but
        for a positive factor; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which are computed in
        float32. Factors that are 0 stay 0 and get the gradient 0. Where two entries agree exactly the subgradient is 0.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Who differs: MMRazor's, torchdistill's ``FTLoss`` and its ``KTALoss`` (knowledge translation and adaptation, with the
    q of ``norm``) take the mean of the ℓ1 distance (``entry_reduction="mean"``); RepDistiller squares and averages the
    channels first, as attention transfer does, and so has another loss.

    Example:
        >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0]])
        >>> FactorTransfer()(student, teacher)
        tensor(1.2000)

    References:
        Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018, arXiv:1802.04977;
        He et al.: Knowledge Adaptation for Efficient Semantic Segmentation, CVPR 2019, arXiv:1903.04688.
    """

    inputs = {**compared(MAPS, VECTORS), "sample_weight": SAMPLE_WEIGHT}
    cases = (
        Case({"reduction": "sum"}, optional=("sample_weight",)),
        Case(
            {"distance": "l2", "norm": "l1", "entry_reduction": "mean"},
            layouts={"student_features": VECTORS},
        ),
    )
    aliases = ("FT", "KTA", Alias("FTLoss", entry_reduction="mean"), Alias("KTALoss", entry_reduction="mean"))

    distance: str = choice(("l1", "l2"), default="l1")
    norm: str = choice(("l2", "l1"), default="l2")
    entry_reduction: str = choice(("sum", "mean"), default="sum")

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None):
        def normalised(factors):
            flat = unit(factors.ravel())
            total = np.abs(flat).sum()
            return flat if self.norm == "l2" or total == 0 else flat / total

        values = []
        for x, y in zip(student_features, teacher_features, strict=True):
            difference = normalised(x) - normalised(y)
            value = np.abs(difference).sum() if self.distance == "l1" else np.sqrt((difference**2).sum())
            values.append(value / len(difference) if self.entry_reduction == "mean" else value)
        return reduce_samples(values, sample_weight, self.reduction)
