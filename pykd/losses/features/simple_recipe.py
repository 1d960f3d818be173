"""A simple recipe for distillation: the logarithm of the sum of high powers of differences."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Loss, Properties, number, ops, register
from pykd.losses.features._shared import MAPS, VECTORS, compared


def simple_recipe(student_features: Tensor, teacher_features: Tensor, power: float, epsilon: float) -> Tensor:
    """log Σ |difference|^α over the whole batch; see :class:`SimpleRecipe`."""
    costs = (ops.upcast(student_features) - ops.upcast(teacher_features.detach())).abs().flatten()
    largest = costs.detach().amax(dim=0).clamp(min=1.0)  # relative to it the powers fit
    total = (costs / largest).pow(power).sum()
    return power * torch.log(largest) + torch.log(total + epsilon * largest.pow(-power))


@register(simple_recipe)
class SimpleRecipe(Loss):
    r"""Logarithm of the sum, over the whole batch, of a high power of the differences of features.

    .. math:: \log \left( \varepsilon + \sum_{b,d} |x_{bd} - y_{bd}|^\alpha \right)

    The power makes the largest differences count most; the logarithm keeps the gradient from fading as all become small.

    Args:
        power: α, at least 1.
        epsilon: ε > 0, which the papers' formula does not have: without it the value is −∞ where student and teacher agree.
            Differences much below ε^(1/α), 0.001 for the defaults, no longer count.
        reduction: ``"mean"`` alone; the sum over the batch is part of the definition.

    Inputs:
        student_features: x, projected by a linear layer and then normalised over the batch (batch normalisation without an
            affine part): ``(batch, channels)`` or ``(batch, channels, height, width)``, any floating type; receives the gradient.
        teacher_features: y, normalised in the same way: the same shape and type; constant.

    Returns:
        A scalar of at least log ε, which it is when student and teacher agree, where the gradient is 0. float32 for
        half-precision inputs, which are computed in float32.

    Raises:
        ValueError: for a power below 1, an ε that is not positive, shapes that do not fit, an empty batch.

    There is no value per sample: the logarithm is of the whole batch.

    Who differs: the authors' code and torchdistill's ``SRDLoss`` have no ε, weigh this by 2 and add the KL divergence of the
    logits at temperature 1 (``soft_target`` with ``form="kl"``); torchdistill's default is α = 1.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> SimpleRecipe()(student, teacher)  # log (1 + 16 + 1)
        tensor(2.8904)

    References:
        Miles, Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024, arXiv:2303.11098.
    """

    inputs = compared(VECTORS, MAPS)
    cases = (Case(), Case({"power": 2.5, "epsilon": 1e-3}, layouts={"student_features": MAPS}))
    couples_batch = "takes the logarithm of a sum over the whole batch"
    aliases = ("SRD",)

    power: float = number(default=4.0, minimum=1.0)
    epsilon: float = number(default=1e-12, above=0.0)

    def properties(self) -> Properties:
        return Properties(
            feature_scale="a difference grows with its terms", zero_when_equal="log ε is left", symmetric=True
        )

    def reference(self, student_features, teacher_features):
        total = sum(
            abs(s - t) ** self.power
            for s, t in zip(np.ravel(student_features), np.ravel(teacher_features), strict=True)
        )
        return np.log(self.epsilon + total)
