"""What losses on features share: their layouts, features sample by sample, and the distances between normalised ones."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Layouts, Loss, Properties, Spec, choice, ops
from pykd.definition.reference import reduce_samples, rows, unit
from pykd.fused.description import Argument, Kernel, KernelPoint

VECTORS, TOKENS, MAPS = "batch channels", "batch tokens channels", "batch channels height width"


def compared(*layouts: str, layers: str | None = None) -> Mapping[str, Layouts]:
    """Features of student and teacher that are compared entry by entry, in these layouts."""
    return {
        "student_features": tuple(Spec(axes, grad=True, like="teacher_features", layers=layers) for axes in layouts),
        "teacher_features": tuple(Spec(axes, layers=layers) for axes in layouts),
    }


def kept_features(features: Tensor, weight: Tensor | None) -> Tensor:
    """Features in the compute type, with zeros for the samples whose weight is 0."""
    if weight is not None and weight.dim() == 3:  # every place of a map is a sample, and has its channels before it
        weight = weight.unsqueeze(1)
    return ops.without_left_out(ops.upcast(features), weight)


def axis_of_channels(features: Tensor) -> int:
    """The second of maps, else the last."""
    return 1 if features.dim() == 4 else -1


def products_of_channels(x: Tensor, y: Tensor) -> Tensor:
    """``(batch, channels of x, channels of y)``: sums over the places of flattened maps ``(batch, channels, places)``."""
    return ops.matmul(x, y.transpose(1, 2))


def products_of_tokens(x: Tensor, y: Tensor) -> Tensor:
    """The same of ``(batch, tokens, channels)``, over the tokens. No axis is moved before it has to be: ONNX Runtime would move
    it elsewhere in the value file than in the gradient file, and round otherwise."""
    return ops.matmul(x.transpose(1, 2), y)


def of_channels(values: Tensor, features: Tensor) -> Tensor:
    """A number per channel in the shape that goes with features, and in their type."""
    values = values.to(features.dtype)
    return values.unsqueeze(-1).unsqueeze(-1) if features.dim() == 4 else values


def per_sample(entries: Tensor, weight: Tensor | None, entry_reduction: str) -> Tensor:
    """The mean or the sum of what each sample has; the weight's axes count samples, or the batch where there is none."""
    if weight is not None and weight.dim() > 1:
        axis = axis_of_channels(entries)
    else:
        entries = entries.flatten(1)
        axis = -1
    return entries.mean(dim=axis) if entry_reduction == "mean" else entries.sum(dim=axis)


def length(x: Tensor, dim: list[int]) -> Tensor:
    """The Euclidean norm over these axes; where it is 0 its gradient is, too."""
    squared = (x * x).sum(dim=dim)
    zero = squared == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, squared)))


def one_by_one(features: Any, sample_weight: Any) -> np.ndarray:
    """For references: one array per sample."""
    axes = 1 if sample_weight is None else np.ndim(sample_weight)
    features = np.asarray(features, np.float64)
    if axes == 3:
        features = np.moveaxis(features, 1, -1)
    return rows(features, features.ndim - axes)


def reduce_one_by_one(values: Any, sample_weight: Any, reduction: str) -> Any:
    """The reduction of what a reference makes of :func:`one_by_one`."""
    return reduce_samples(values, sample_weight, reduction, None if sample_weight is None else np.shape(sample_weight))


ENTRY_DISTANCE = Kernel(
    "entry_distance",
    inputs={
        "student": Argument("batch entries"),
        "teacher": Argument("batch entries"),
        "weight": Argument("batch", "float32"),
    },
    outputs={"value": Argument("batch", "float32"), "grad_student": Argument("batch entries")},
    attributes={"form": "mse", "average": "mean", "beta": 1.0},
    cuda=False,
)
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


def cosine_distances(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """1 − x̂·ŷ of normalised features along an axis. What has no direction has the cosine 0 with everything."""
    # ½ |x̂ − ŷ|² keeps the digits that 1 − x̂·ŷ loses where they almost agree.
    difference = x - y
    without = (x.detach().abs().amax(dim=dim) == 0).to(x.dtype) + (y.abs().amax(dim=dim) == 0).to(x.dtype)
    return ((difference * difference).sum(dim=dim) + without) / 2


def feature_distance_rows(student: Tensor, teacher: Tensor, power: str) -> Tensor:
    """One value per sample: the sum over channels of |x̂ − ŷ| or (x̂ − ŷ)², or 1 − x̂·ŷ, averaged over tokens."""
    x = ops.normalize(ops.upcast(student), dim=[-1])
    y = ops.normalize(ops.upcast(teacher.detach()), dim=[-1])
    if power == "cosine":
        return cosine_distances(x, y, -1).mean(dim=-1)
    difference = x - y
    distances = ops.absolute(difference) if power == "l1" else difference * difference
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

    inputs = {**compared(TOKENS), "sample_weight": SAMPLE_WEIGHT}
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
        return reduce_one_by_one(values, sample_weight, self.reduction)

    def properties(self) -> Properties:
        return Properties(feature_scale=True, zero_when_equal=True, symmetric=True)
