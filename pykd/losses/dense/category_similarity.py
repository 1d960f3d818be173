"""Category-wise similarity: which classes are predicted in the same places."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register, scalar
from pykd.definition.reference import log_softmax, reduce_samples


def _correlations(logits: Tensor, weight: Tensor | None, temperature: float) -> Tensor:
    """Products of the spatial distributions of all pairs of classes, ``(batch, classes, classes)``."""
    maps = ops.without_left_out(logits, weight).flatten(2)
    places = torch.softmax(ops.soften(maps, temperature), dim=-1)
    return ops.matmul(places, places.transpose(1, 2))


def category_similarity(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    reduction: str,
) -> Tensor:
    """Mean squared difference of the products of spatial distributions; see :class:`CategorySimilarity`."""
    weight = ops.optional_weight(sample_weight)
    student = _correlations(student_logits, weight, temperature)
    teacher = _correlations(teacher_logits.detach(), weight, temperature)
    return ops.reduce(torch.square(student - teacher).flatten(1).mean(dim=1), weight, reduction)


@register(category_similarity)
class CategorySimilarity(Loss):
    r"""Mean squared difference between the student's and the teacher's correlations of classes over the places of an image.

    .. math:: \ell_b = \frac{1}{C^2} \sum_{c, c'} (G^s_{bcc'} - G^t_{bcc'})^2, \quad
              G_{bcc'} = \sum_i p_{bci} \, p_{bc'i}, \quad p_{bc} = \mathrm{softmax}_i(z_{bc} / T)

    for the C classes and the height · width places i: the category-wise part of double similarity distillation, whose other is
    ``pixel_similarity``.

    Args:
        temperature: T > 0; larger spreads every class over more of the image.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_logits: ``(batch, classes, height, width)``, any floating type; receives the gradient.
        teacher_logits: the same shape and type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Between 0 and 1, no unit; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which are computed in
        float32. On large maps the products, and with them the loss, are small: an even distribution over n places
        has the product 1/n with itself. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: CIRKD's CriterionCSD averages the logits in windows of 2 × 2 first: pass
    ``F.avg_pool2d(logits, 2, ceil_mode=True)``.

    Example:
        One class, in one of two places to the teacher, in both to the student: (1/2 − 1)².

        >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, 400.0]]]])
        >>> CategorySimilarity(temperature=2.0)(student, teacher)
        tensor(0.2500)

    References:
        Feng et al.: Double Similarity Distillation for Semantic Image Segmentation, IEEE Transactions on Image Processing, 2021.
    """

    inputs = {
        "student_logits": Spec("batch classes height width", grad=True, like="teacher_logits"),
        "teacher_logits": Spec("batch classes height width"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (Case(), Case({"temperature": 0.75, "reduction": "sum"}, optional=("sample_weight",)))
    aliases = ("CSD", "CriterionCSD")

    temperature: float = scalar(default=4.0, minimum=0.0, exclusive=True)

    def properties(self) -> Properties:
        return Properties(feature_scale="larger logits make a sharper softmax", zero_when_equal=True, symmetric=True)

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        values = []
        for s, t in zip(student_logits, teacher_logits, strict=True):
            own, wanted = ([np.exp(log_softmax(c.ravel() / self.temperature)) for c in z] for z in (s, t))
            classes = range(len(own))
            values.append(np.mean([(own[c] @ own[d] - wanted[c] @ wanted[d]) ** 2 for c in classes for d in classes]))
        return reduce_samples(values, sample_weight, self.reduction)
