"""L1 distance between normalised features."""

import numpy as np
from torch import Tensor

from pykd.definition import register
from pykd.losses.features._shared import FeatureDistance, feature_distance


def feature_l1(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    spatial_avg: str | None,
    reduction: str,
) -> Tensor:
    """Sum over channels of |x̂ − ŷ|, mean over tokens; see :class:`FeatureL1`."""
    return feature_distance(student_features, teacher_features, sample_weight, spatial_avg, "l1", reduction)


@register(feature_l1)
class FeatureL1(FeatureDistance):
    r"""L1 distance between the student's and the teacher's features, each normalised along its channels.

    .. math:: \ell_b = \frac1N \sum_n \sum_c \left| \frac{x_{bnc}}{\lVert x_{bn}\rVert_2}
              - \frac{y_{bnc}}{\lVert y_{bn}\rVert_2} \right|

    Args:
        spatial_avg: ``"mean"``: average each feature map over its tokens before it is normalised and
            compared; ``None``: compare token by token.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``,
            or the shape of ``sample_weight``.

    Inputs:
        student_features: ``(batch, tokens, channels)``, any floating type; receives the gradient. A
            convolutional map ``(batch, channels, height, width)`` is ``x.flatten(2).transpose(1, 2)``.
        teacher_features: ``(batch, tokens, channels)``, same type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds. With ``(batch, tokens)`` every token is a
            sample (of a sequence with padding, say); not together with ``spatial_avg``.

    Returns:
        Between 0 and 2·√channels, no unit; a scalar unless ``reduction="none"``; 0 when the directions
        agree. A token whose features are all 0 (or whose norm is below any normal number, 1.2e-38 in float32) keeps
        the direction 0 and gets the gradient 0. Where a component of student and teacher agrees exactly its
        subgradient is 0.

    Raises:
        ValueError: for shapes that do not fit (map the student's channels to the teacher's first), an empty batch.

    Who differs: ``F.l1_loss`` also divides by the number of channels and does not normalise.

    Example:
        >>> student, teacher = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])
        >>> FeatureL1()(student, teacher)
        tensor(0.6000)

    References:
        Wang et al.: Improved Knowledge Distillation for Training Fast Low Resolution Face Recognition
        Model, ICCVW 2019; Romero et al.: FitNets, 2015, arXiv:1412.6550 (comparing features as such).
    """

    aliases = ("L1", "L1Loss")
    kernel_power = "l1"

    def reference(self, student_features, teacher_features, sample_weight=None):
        def distance(x, y):
            return np.abs(x - y).sum()

        return self.token_by_token(distance, student_features, teacher_features, sample_weight)
