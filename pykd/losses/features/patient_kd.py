"""Patient knowledge distillation: match the normalised states of one token at several layers."""

from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, ops, register, whole
from pykd.definition.reference import reduce_samples, unit
from pykd.losses.features._shared import VECTORS, compared, kept_features


def patient_kd(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    sample_weight: Tensor | None,
    layers: int,
    reduction: str,
) -> Tensor:
    """Squared distance of normalised states, added up over layers; see :class:`PatientKD`."""
    weight = ops.optional_weight(sample_weight)
    distances: list[Tensor] = []
    for student, teacher in zip(student_features, teacher_features):  # noqa: B905  TorchScript knows no strict
        x = ops.normalize(kept_features(student, weight), dim=[-1])
        y = ops.normalize(kept_features(teacher.detach(), weight), dim=[-1])
        difference = x - y
        distances.append((difference * difference).sum(dim=-1))
    values = distances[0]
    for distance in distances[1:]:
        values = values + distance
    return ops.reduce(values, weight, reduction)


@register(patient_kd)
class PatientKD(Loss):
    r"""Squared distance between the student's and the teacher's normalised hidden states of one token, at several layers.

    .. math:: \ell_b = \sum_l \left\lVert \frac{x_{bl}}{\lVert x_{bl} \rVert_2} - \frac{y_{bl}}{\lVert y_{bl} \rVert_2}
              \right\rVert_2^2

    Which layer of the teacher goes with which of the student is for the caller to choose: every second one
    (PKD-skip), or the last ones (PKD-last).

    Args:
        layers: how many layers there are.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: a list of hidden states ``(batch, channels)``, one per layer, of the token that stands for the sequence
            (``x[:, 0]``, the [CLS] of BERT); any floating type; receives the gradient.
        teacher_features: a list of the same shapes and type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        From 0 to 4 per layer, no unit; 0 when all directions agree; a scalar unless ``reduction="none"``. float32 for
        half-precision inputs, which are computed in float32. A state that is 0 keeps the direction 0 and gets the gradient 0.

    Raises:
        ValueError: for shapes that do not fit (map the student's width to the teacher's first), an empty batch.

    Who differs: TextBrewer's ``pkd_loss`` is one layer of this. The authors' code takes the mean over layers and channels, too:
    it is this divided by both.

    Example:
        >>> student, teacher = [torch.tensor([[3.0, 4.0]])], [torch.tensor([[2.0, 0.0]])]
        >>> PatientKD()(student, teacher)  # (0.6 − 1)² + 0.8²
        tensor(0.8000)

    References:
        Sun et al.: Patient Knowledge Distillation for BERT Model Compression, EMNLP 2019, arXiv:1908.09355.
    """

    inputs = {**compared(VECTORS, layers="layers"), "sample_weight": SAMPLE_WEIGHT}
    cases = (
        Case(),
        Case(
            {"layers": 3, "reduction": "sum"},
            optional=("sample_weight",),
        ),
    )
    aliases = ("BERT-PKD", "PatientDistillation")

    layers: int = whole(default=1, minimum=1, maximum=100)

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_features, teacher_features, sample_weight=None):
        values = []
        for b in range(len(student_features[0])):
            value = 0.0
            for x, y in zip(student_features, teacher_features, strict=True):
                value += ((unit(x[b]) - unit(y[b])) ** 2).sum()
            values.append(value)
        return reduce_samples(values, sample_weight, self.reduction)
