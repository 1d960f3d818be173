"""What the distances between normalised features share; each is a loss in a file of its own."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, choice, ops
from pykd.definition.reference import reduce_samples, rows, unit
from pykd.fused.description import Argument, Kernel, KernelPoint

KERNEL = Kernel(
    "feature_distance",
    inputs={
        "student": Argument("batch tokens channels"),
        "teacher": Argument("batch tokens channels"),
        "weight": Argument("batch", "float32"),
    },
    outputs={"value": Argument("batch", "float32"), "grad_student": Argument("batch tokens channels")},
    attributes={"power": "l1"},
)


def feature_distance_rows(student: Tensor, teacher: Tensor, power: str) -> Tensor:
    """One value per sample: the sum over channels of |x̂ − ŷ| or (x̂ − ŷ)², averaged over tokens."""
    x = ops.normalize(ops.upcast(student), dim=[-1])
    y = ops.normalize(ops.upcast(teacher.detach()), dim=[-1])
    difference = x - y
    distances = difference.abs() if power == "l1" else difference * difference
    return distances.sum(dim=-1).mean(dim=-1)


def _samples(features: Tensor, weight: Tensor | None, spatial_avg: str | None) -> Tensor:
    """``(batch, tokens, channels)`` as ``(…, tokens, channels)`` with what counts samples in front: the tokens, if they have weights."""
    if weight is not None and weight.dim() > 1:
        if spatial_avg is not None:
            raise ValueError(
                "expected spatial_avg to be None where every token has a weight or may be ignored, got 'mean'; "
                "average the tokens before, or weigh whole samples (share_ignored=False in a composition)"
            )
        return ops.upcast(features).unsqueeze(-2)
    return ops.pool_tokens(features, spatial_avg)


def feature_distance(
    student_features: Tensor,
    teacher_features: Tensor,
    sample_weight: Tensor | None,
    spatial_avg: str | None,
    power: str,
    reduction: str,
) -> Tensor:
    """The whole loss, from the inputs of :class:`FeatureDistance`."""
    weight = ops.optional_weight(sample_weight)
    student = _samples(ops.without_left_out(student_features, weight), weight, spatial_avg)
    teacher = _samples(ops.without_left_out(teacher_features, weight), weight, spatial_avg)
    values = feature_distance_rows(student, teacher, power)
    return ops.reduce(values, weight, reduction)


class FeatureDistance(Loss):
    """Inputs, settings and kernel of the distances; a subclass says which power, and is the specification."""

    inputs = {
        "student_features": Spec("batch tokens channels", grad=True, like="teacher_features"),
        "teacher_features": Spec("batch tokens channels"),
        "sample_weight": Spec("batch", dtype="weight", optional=True, draw="weights"),
    }
    cases = (
        Case(),
        Case({"spatial_avg": "mean"}),
        Case({"reduction": "sum"}, optional=("sample_weight",)),
        Case(layouts={"sample_weight": "batch tokens"}, optional=("sample_weight",)),
    )
    sample_axes = ("batch", "batch tokens")
    paper = "Wang et al. ICCVW 2019"

    spatial_avg: str | None = choice(ops.SPATIAL_AVERAGES, default=None)
    kernel_power: ClassVar[str]

    def fused(self, kernel: KernelPoint, student_features, teacher_features, sample_weight):
        weight = ops.optional_weight(sample_weight)
        tensors = {"student": student_features, "teacher": teacher_features}
        if self.spatial_avg is not None or (weight is not None and weight.dim() > 1):
            tensors = {name: _samples(tensor, weight, self.spatial_avg) for name, tensor in tensors.items()}
        values = kernel(KERNEL, "value", feature_distance_rows, tensors, {"power": self.kernel_power}, weight="weight")
        return ops.reduce(values, weight, self.reduction)

    def token_by_token(self, distance: Callable[..., Any], student_features, teacher_features, sample_weight):
        """The reference, from the definition; ``distance`` of two unit vectors is what makes the loss."""
        if np.ndim(sample_weight) == 2:  # every token is a sample
            student_features, teacher_features = (rows(x, 1)[:, None] for x in (student_features, teacher_features))
        values = []
        for x, y in zip(student_features, teacher_features, strict=True):
            if self.spatial_avg == "mean":
                x, y = x.mean(axis=0, keepdims=True), y.mean(axis=0, keepdims=True)
            values.append(np.mean([distance(unit(a), unit(b)) for a, b in zip(x, y, strict=True)]))
        return reduce_samples(
            values, sample_weight, self.reduction, None if sample_weight is None else np.shape(sample_weight)
        )

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)
