"""Mean squared difference of feature maps (batch, channels, height, width) of several layers, of which each counts its share."""

import numpy as np
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, ops, register, scalar, whole
from pykd.definition.reference import reduce_samples


def layered_maps(
    student_maps: list[Tensor],
    teacher_maps: list[Tensor],
    sample_weight: Tensor | None,
    share: float,
    layers: int,
    reduction: str,
) -> Tensor:
    weight = ops.optional_weight(sample_weight)
    total = ops.upcast(student_maps[0]).flatten(1).mean(dim=1) * 0.0
    factor = 1.0
    for student, teacher in zip(student_maps, teacher_maps):  # noqa: B905  TorchScript knows no strict
        x = ops.upcast(ops.without_left_out(student, weight))
        y = ops.upcast(ops.without_left_out(teacher.detach(), weight))
        total = total + factor * ((x - y) * (x - y)).flatten(1).mean(dim=1)
        factor = factor * share
    return ops.reduce(ops.without_left_out(total, weight), weight, reduction)


@register(layered_maps)
class LayeredMaps(Loss):
    r"""Mean squared difference of the feature maps of several layers.

    .. math:: \ell_b = \sum_l r^l \, \mathrm{mean} (x_{lb} - y_{lb})^2

    Args:
        share: r, from 0 to 1; a layer counts so much of the one before it.
        layers: how many there are.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over the samples.

    Inputs:
        student_maps: list of ``(batch, channels, height, width)``, one per layer, each of its own size; receives the gradient.
        teacher_maps: the same shapes; constant.
        sample_weight: optional ``(batch,)``; constant.

    Returns:
        A number of at least 0 without unit; 0 when student and teacher agree.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Example:
        >>> one, two = torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 1, 1)
        >>> LayeredMaps(share=0.25)([one, two], [one + 1, two + 2])
        tensor(2.)

    References:
        None: a newcomer of the tests.
    """

    inputs = {
        "student_maps": Spec("batch channels height width", grad=True, like="teacher_maps", layers="layers"),
        "teacher_maps": Spec("batch channels height width", layers="layers"),
        "sample_weight": Spec("batch", dtype="weight", optional=True, draw="weights"),
    }
    cases = (Case({"share": 0.25}), Case({"layers": 3, "reduction": "sum"}, optional=("sample_weight",)))

    share: float = scalar(default=0.5, minimum=0.0, maximum=1.0)
    layers: int = whole(default=2, minimum=1, maximum=20)

    def properties(self) -> Properties:
        return Properties(
            feature_scale="differences have the scale of what they are taken of", zero_when_equal=True, symmetric=True
        )

    def reference(self, student_maps, teacher_maps, sample_weight=None):
        values = [
            sum(
                self.share**layer * np.mean((x[b] - y[b]) ** 2)
                for layer, (x, y) in enumerate(zip(student_maps, teacher_maps, strict=True))
            )
            for b in range(len(student_maps[0]))
        ]
        return reduce_samples(values, sample_weight, self.reduction)
