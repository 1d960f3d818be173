"""Cosine distance of features: match their directions."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register
from pykd.definition.reference import rows, unit
from pykd.fused.description import KernelPoint
from pykd.losses.features._shared import (
    KERNEL,
    MAPS,
    TOKENS,
    VECTORS,
    axis_of_channels,
    compared,
    cosine_distances,
    feature_distance_rows,
    kept_features,
    one_by_one,
    reduce_one_by_one,
)


def cosine_features(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """One less the cosine of two directions, mean over tokens or places; see :class:`CosineFeatures`."""
    weight = ops.optional_weight(sample_weight)
    channels = axis_of_channels(student_features)
    x = ops.normalize(kept_features(student_features, weight), dim=[channels])
    y = ops.normalize(kept_features(teacher_features.detach(), weight), dim=[channels])
    values = cosine_distances(x, y, channels)
    if values.dim() > (1 if weight is None else weight.dim()):
        values = values.flatten(1).mean(dim=-1)
    return ops.reduce(values, weight, reduction)


@register(cosine_features)
class CosineFeatures(Loss):
    r"""Cosine distance between the student's and the teacher's features: one less the cosine of the angle between them.

    .. math:: \ell_b = \frac1N \sum_n \left(1 - \frac{x_{bn} \cdot y_{bn}}{\lVert x_{bn} \rVert_2 \lVert y_{bn} \rVert_2}
              \right)

    over the N tokens of a sequence or places of a map (N = 1 for vectors); the products are over channels.

    Args:
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``, or the shape
            of ``sample_weight``.

    Inputs:
        student_features: ``(batch, tokens, channels)``, ``(batch, channels)`` or ``(batch, channels, height, width)``, any
            floating type; receives the gradient.
        teacher_features: the same shape and type; constant.
        sample_weight: optional, at least 0, of any floating type, or a mask (bool or integers); constant. ``(batch,)``; or
            ``(batch, tokens)`` or ``(batch, height, width)``, where every token or place of a map is a sample (of a sequence
            with padding, say). A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        From 0 (same directions) to 2 (opposite ones), no unit; a scalar unless ``reduction="none"``. float32 for
        half-precision inputs, which are computed in float32. A vector that is 0 (or whose norm is below any normal number,
        1.2e-38 in float32) has the cosine 0 with every other, so the distance 1, and gets the gradient 0.

    Raises:
        ValueError: for shapes that do not fit (map the student's channels to the teacher's first), an empty batch.

    Who differs: DistilBERT, TextBrewer's ``cos_loss``, Megatron's and DistillKit's hidden-state losses are the mean over
    the tokens of a mask, as here with weights per token. Half the squared distance of normalised features
    (:class:`FeatureL2`) is the same number. Liger's cosine loss compares logits.

    Example:
        >>> student, teacher = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])
        >>> CosineFeatures()(student, teacher)
        tensor(0.2000)

    References:
        Sanh et al.: DistilBERT, 2019, arXiv:1910.01108.
    """

    inputs = {**compared(TOKENS, VECTORS, MAPS), "sample_weight": SAMPLE_WEIGHT}
    sample_axes = ("batch", "batch tokens", "batch height width")
    cases = (
        Case({"reduction": "sum"}, layouts={"sample_weight": "batch tokens"}, optional=("sample_weight",)),
        Case(layouts={"student_features": VECTORS}),
        Case(layouts={"student_features": MAPS, "sample_weight": "batch"}, optional=("sample_weight",)),
    )
    aliases = ("cosine_distance", "cos_loss", "hs_cosine", "HiddenStateCosineLoss")

    def covered_by_kernel(self, given: Mapping[str, Spec]) -> bool:
        return given["student_features"].names[-1] == "channels"  # whose channels lie side by side

    def fused(self, kernel: KernelPoint, student_features, teacher_features, sample_weight):
        weight = ops.optional_weight(sample_weight)
        tensors = {"student": student_features, "teacher": teacher_features}
        if student_features.dim() == 2 or (weight is not None and weight.dim() > 1):
            tensors = {name: tensor.unsqueeze(-2) for name, tensor in tensors.items()}  # one token in a sample
        values = kernel(KERNEL, "value", feature_distance_rows, tensors, {"power": "cosine"}, weight="weight")
        return ops.reduce(values, weight, self.reduction)

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None):
        values = []
        student, teacher = (one_by_one(features, sample_weight) for features in (student_features, teacher_features))
        for x, y in zip(student, teacher, strict=True):
            if x.ndim == 3:  # a map as a row per place
                x, y = np.moveaxis(x, 0, -1), np.moveaxis(y, 0, -1)
            values.append(np.mean([1 - unit(a) @ unit(b) for a, b in zip(rows(x, 1), rows(y, 1), strict=True)]))
        return reduce_one_by_one(values, sample_weight, self.reduction)
