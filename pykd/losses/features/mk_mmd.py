"""Multi-kernel maximum mean discrepancy between the teacher's and the student's features."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, choice, ops, register
from pykd.definition.reference import unit
from pykd.fused.description import Argument, Kernel, KernelPoint

KERNEL = Kernel(
    "mk_mmd",
    inputs={
        "student": Argument("batch features"),
        "teacher": Argument("batch features"),
        "weight": Argument("", "float32"),
    },
    outputs={"value": Argument("", "float32"), "grad_student": Argument("batch features")},
    attributes={"bandwidth": "joint"},
)


def _kernel(squared_distances: Tensor, bandwidth: Tensor, tiny: float = 1e-20) -> Tensor:
    """Sum of five Gaussians whose squared bandwidths are 1, 2, 4, 8 and 16 times ``bandwidth``.

    At a bandwidth of at most ``tiny`` all samples coincide: the distances are 0 and every kernel is 1.
    """
    scaled = squared_distances / bandwidth.clamp(min=tiny)
    total = torch.exp(-0.5 * scaled)
    for factor in [2.0, 4.0, 8.0, 16.0]:
        total = total + torch.exp(scaled * (-0.5 / factor))
    return total


def _own_distances(samples: Tensor) -> Tensor:
    """Squared distances between the samples of one side, near a centre of their own: where they coincide nothing is left."""
    near = samples - samples.detach().mean(dim=0, keepdim=True)
    return ops.squared_distances(near, near)


def mk_mmd_of_samples(student: Tensor, teacher: Tensor, bandwidth: str) -> Tensor:
    """MMD² of two matrices whose rows are the samples."""
    n = student.size(0)
    # Distances do not change when everything is moved; near the centre their expansion loses fewer digits.
    center = (student.detach() + teacher.detach()).mean(dim=0, keepdim=True) / 2
    x = student - center
    y = teacher.detach() - center
    apart = ops.distinct_pairs(x)
    xx = _own_distances(x) * apart
    yy = _own_distances(y) * apart
    xy = ops.squared_distances(x, y)
    if bandwidth == "per_block":
        pairs = apart.sum().clamp(min=1.0)  # a single sample has no pair, and its distances sum to 0
        width_xx = xx.detach().sum() / pairs
        width_yy = yy.detach().sum() / pairs
        width_xy = xy.detach().mean()
    else:
        joint = (xx.detach().sum() + yy.detach().sum() + 2 * xy.detach().sum()) / (2 * n * (2 * n - 1))
        width_xx = joint
        width_yy = joint
        width_xy = joint
    return _kernel(xx, width_xx).mean() + _kernel(yy, width_yy).mean() - 2 * _kernel(xy, width_xy).mean()


def _samples(features: Tensor, spatial_avg: str | None) -> Tensor:
    """One unit vector per batch row: normalised tokens, flattened, normalised again."""
    tokens = ops.normalize(ops.pool_tokens(features, spatial_avg), dim=[-1])
    return ops.normalize(tokens, dim=[1, 2]).flatten(1)


def mk_mmd(
    student_features: Tensor,
    teacher_features: Tensor,
    spatial_avg: str | None,
    bandwidth: str,
) -> Tensor:
    """Squared discrepancy with five Gaussian kernels; see :class:`MKMMD`."""
    student = _samples(student_features, spatial_avg)
    value = mk_mmd_of_samples(student, _samples(teacher_features.detach(), spatial_avg), bandwidth)
    return _finish(value, bandwidth)


def _finish(value: Tensor, bandwidth: str) -> Tensor:
    return ops.at_least_0(value) if bandwidth == "joint" else value


@register(mk_mmd)
class MKMMD(Loss):
    r"""Squared maximum mean discrepancy (MMD²) with five Gaussian kernels between two sets of features.

    One sample per batch row: the tokens are normalised along their channels, flattened to one vector, and
    that vector is normalised again. With student samples x, teacher samples y, N of each:

    .. math:: \frac1{N^2} \sum_{ij} k(y_i, y_j) + \frac1{N^2} \sum_{ij} k(x_i, x_j)
              - \frac2{N^2} \sum_{ij} k(y_i, x_j), \quad
              k(u, v) = \sum_{f \in \{1,2,4,8,16\}} \exp\left(-\frac{\lVert u - v\rVert^2}{2 f \sigma^2}\right)

    It compares distributions: the order of the samples within the student's batch plays no part.

    Args:
        spatial_avg: ``"mean"``: average each feature map over its tokens first; ``None``: keep the tokens.
        bandwidth: ``"joint"``: one σ² for the three sums, the mean squared distance over the 2N (2N − 1)
            ordered pairs of distinct rows of the joint sample. ``"per_block"``: each sum has its own σ², the mean over
            its own pairs (distinct ones within a set, all N² across): common in code, but no longer
            an MMD: it can be negative, and is not 0 for equal samples.
        reduction: ``"mean"`` alone; the means are part of the definition.

    Inputs:
        student_features: ``(batch, tokens, channels)``, any floating type; receives the gradient.
        teacher_features: ``(batch, tokens, channels)``, same type; constant.

    Returns:
        A scalar without unit, from 0 to 10 (``"joint"``); 0 when the samples agree. float32 for
        half-precision inputs, which are computed in float32. σ² is a constant for the gradient, in both modes. Where all samples
        coincide the value and the gradient are 0.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    There is no value per sample: every sample is compared with every other. Memory is O(batch²) beside
    the features.

    Who differs: Long et al. learn the weights of the kernels and use pairs of samples (linear time); code that
    descends from it mostly takes powers of two around the mean distance, as here, and often keeps
    σ² inside the graph or one σ² per sum.

    Example:
        >>> student = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> teacher = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]])
        >>> MKMMD()(student, teacher)
        tensor(0.3608)

    References:
        Long et al.: Learning Transferable Features with Deep Adaptation Networks, 2015, arXiv:1502.02791; Gretton et al.: A
        Kernel Two-Sample Test, JMLR 2012; Wang et al. ICCVW 2019 (as a distillation loss).
    """

    inputs = {
        "student_features": Spec("batch tokens channels", grad=True, like="teacher_features"),
        "teacher_features": Spec("batch tokens channels"),
    }
    cases = (
        Case(),
        Case({"bandwidth": "per_block"}),
        Case({"spatial_avg": "mean"}),
    )
    couples_batch = "compares every sample of the batch with every other"
    aliases = ("MK-MMD",)

    spatial_avg: str | None = choice(ops.SPATIAL_AVERAGES, default=None)
    bandwidth: str = choice(("joint", "per_block"), default="joint")

    def fused(self, kernel: KernelPoint, student_features, teacher_features):
        tensors = {
            "student": _samples(student_features, self.spatial_avg),
            "teacher": _samples(teacher_features.detach(), self.spatial_avg),
        }
        value = kernel(KERNEL, "value", mk_mmd_of_samples, tensors, {"bandwidth": self.bandwidth}, weight="weight")
        return _finish(value, self.bandwidth)

    def properties(self) -> Properties:
        return Properties(
            feature_scale=True,
            zero_when_equal=self.bandwidth == "joint" or "the three sums have bandwidths of their own",
            symmetric=True,
        )

    def reference(self, student_features, teacher_features, widths=None):
        """Pair by pair, from the definition; ``widths`` fixes the three σ²."""
        x, y = _numpy_samples(student_features, self.spatial_avg), _numpy_samples(teacher_features, self.spatial_avg)
        own = _widths(x, y, self.bandwidth) if widths is None else widths

        def mean_kernel(a, b, width):
            if width <= 1e-20:
                return 5.0
            return sum(np.exp(-_distances(a, b) / (2 * f * width)).mean() for f in (1, 2, 4, 8, 16))

        return mean_kernel(y, y, own[0]) + mean_kernel(x, x, own[1]) - 2 * mean_kernel(x, y, own[2])

    def constants(self, student_features, teacher_features):
        """The bandwidths, through which no gradient flows."""
        x, y = _numpy_samples(student_features, self.spatial_avg), _numpy_samples(teacher_features, self.spatial_avg)
        return {"widths": _widths(x, y, self.bandwidth)}


def _numpy_samples(features, spatial_avg):
    """One unit vector per batch row, in float64."""
    if spatial_avg == "mean":
        features = features.mean(axis=1, keepdims=True)
    return [unit(np.concatenate([unit(token) for token in tokens])) for tokens in features]


def _distances(a, b):
    return np.array([[((u - v) ** 2).sum() for v in b] for u in a])


def _widths(x, y, bandwidth):
    """σ² of the sums over teacher pairs, student pairs and mixed pairs."""
    n = len(x)
    if bandwidth == "joint":
        return [_distances(x + y, x + y).sum() / (2 * n * (2 * n - 1))] * 3
    pairs = max(n * (n - 1), 1)
    return [_distances(y, y).sum() / pairs, _distances(x, x).sum() / pairs, _distances(x, y).mean()]
