"""Flow of the solution procedure: match how the channels of one layer go with those of a later one."""

import numpy as np
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, ops, register
from pykd.definition.reference import reduce_samples
from pykd.losses.features._shared import kept_features, per_sample, products_of_channels, products_of_tokens


def _flow(first: Tensor, later: Tensor) -> Tensor:
    """``(batch, channels, later channels)``: mean products over the places."""
    if first.dim() == 4:
        return products_of_channels(first.flatten(2), later.flatten(2)) / (first.size(2) * first.size(3))
    return products_of_tokens(first, later) / first.size(1)


def flow_of_solution(
    student_features: Tensor,
    teacher_features: Tensor,
    student_later_features: Tensor | None,
    teacher_later_features: Tensor | None,
    sample_weight: Tensor | None,
    entry_reduction: str,
    reduction: str,
) -> Tensor:
    """Squared difference of the matrices of mean products; see :class:`FlowOfSolution`."""
    weight = ops.optional_weight(sample_weight)
    student = kept_features(student_features, weight)
    teacher = kept_features(teacher_features.detach(), weight)
    student_later, teacher_later = student, teacher
    if student_later_features is not None and teacher_later_features is not None:
        student_later = kept_features(student_later_features, weight)
        teacher_later = kept_features(teacher_later_features.detach(), weight)
    elif student_later_features is not None or teacher_later_features is not None:
        raise ValueError(
            "expected student_later_features and teacher_later_features, or neither, got one of them; pass the other one, too"
        )
    difference = _flow(student, student_later) - _flow(teacher, teacher_later)
    return ops.reduce(per_sample(difference * difference, None, entry_reduction), weight, reduction)


@register(flow_of_solution)
class FlowOfSolution(Loss):
    r"""Squared difference of the flow matrices of student and teacher: the products of the maps of two layers.

    .. math:: \ell_b = \lVert G(x_b, x'_b) - G(y_b, y'_b) \rVert_F^2, \quad
              G_{ij}(u, v) = \frac1N \sum_n u_{in} v_{jn}

    over the N places of a map, or tokens of a sequence. Without later features it is the Gram matrix of one layer, v = u.

    Args:
        entry_reduction: ``"sum"``: over the entries of a matrix, as above; ``"mean"``: divided by their number.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_features: x: ``(batch, channels, height, width)`` or ``(batch, tokens, channels)``, any floating type; receives
            the gradient.
        teacher_features: y, with as many channels as the student; height, width and tokens may be others; same type; constant.
        student_later_features: x′, optional, from a later layer: with channels of its own, and the height, width or tokens of x;
            receives the gradient.
        teacher_later_features: y′, where there is x′: with the channels of x′, and the height, width or tokens of y; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        At least 0, in units of the features to the fourth power; 0 when the matrices agree; a scalar unless
        ``reduction="none"``. float32 for half-precision inputs, which are computed in float32.

    Raises:
        ValueError: where only one of the two later features is there; for maps of two layers of different size (pool the larger
            ones first), shapes that do not fit, an empty batch.

    Who differs: the paper's is this. RepDistiller, KD Zoo and TextBrewer take the mean over the entries
    (``entry_reduction="mean"``). torchdistill adds up the norms of the columns, not squared, and pools by the maximum.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[1.0, 1.0]]]])
        >>> student_later, teacher_later = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[1.0, 3.0]]]])
        >>> FlowOfSolution()(student, teacher, student_later, teacher_later)  # (1 − 2)²
        tensor(1.)
        >>> FlowOfSolution()(student, teacher)  # (5 − 1)²
        tensor(16.)

    References:
        Yim et al.: A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning, CVPR
        2017; Gatys, Ecker, Bethge: A Neural Algorithm of Artistic Style, 2015, arXiv:1508.06576 (Gram matrices).
    """

    inputs = {
        "student_features": (
            Spec("batch channels height width", grad=True, like="teacher_features"),
            Spec("batch tokens channels", grad=True, like="teacher_features"),
        ),
        "teacher_features": (
            Spec("batch channels teacher_height teacher_width"),
            Spec("batch teacher_tokens channels"),
        ),
        "student_later_features": (
            Spec("batch later_channels height width", grad=True, optional=True, like="teacher_later_features"),
            Spec("batch tokens later_channels", grad=True, optional=True, like="teacher_later_features"),
        ),
        "teacher_later_features": (
            Spec("batch later_channels teacher_height teacher_width", optional=True),
            Spec("batch teacher_tokens later_channels", optional=True),
        ),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case(optional=("student_later_features", "teacher_later_features")),
        Case(
            {"entry_reduction": "mean", "reduction": "sum"},
            layouts={
                "student_features": "batch tokens channels",
                "teacher_features": "batch teacher_tokens channels",
            },
            optional=("student_later_features", "teacher_later_features", "sample_weight"),
        ),
        Case({"entry_reduction": "mean"}),
    )
    aliases = ("FSP", Alias("fsp_loss", entry_reduction="mean"))

    entry_reduction: str = choice(("sum", "mean"), default="sum")

    def properties(self) -> Properties:
        return Properties(feature_scale="a product grows with its factors", zero_when_equal=True, symmetric=True)

    def reference(
        self,
        student_features,
        teacher_features,
        student_later_features=None,
        teacher_later_features=None,
        sample_weight=None,
    ):
        def channels(features):
            return [one.ravel() for one in (features if features.ndim == 3 else features.T)]

        def flow(first, later):
            return np.array([[np.mean(u * v) for v in channels(later)] for u in channels(first)])

        values = []
        for b, (x, y) in enumerate(zip(student_features, teacher_features, strict=True)):
            later_x = x if student_later_features is None else student_later_features[b]
            later_y = y if teacher_later_features is None else teacher_later_features[b]
            squares = (flow(x, later_x) - flow(y, later_y)) ** 2
            values.append(squares.sum() if self.entry_reduction == "sum" else squares.mean())
        return reduce_samples(values, sample_weight, self.reduction)
