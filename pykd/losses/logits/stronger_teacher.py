"""Distillation from a stronger teacher: correlations of predictions within samples and within classes, instead of equality."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, flag, number, ops, register, scalar
from pykd.definition.reference import log_softmax, unit


def _deviations(x: Tensor, axis: int) -> Tensor:
    """``x`` less its mean along an axis; 0 where that is no more than rounding, which has a direction like any other."""
    mean = x.mean(dim=axis, keepdim=True)
    deviations = x - mean
    rounding = mean.detach().abs() * (4e-15 if x.dtype == torch.float64 else 2e-6)
    constant = deviations.detach().abs().amax(dim=axis, keepdim=True) <= rounding
    return deviations.masked_fill(constant, 0.0)


def _correlation_distance(x: Tensor, y: Tensor, axis: int, epsilon: float) -> Tensor:
    """The mean of 1 − Pearson's correlation along an axis, which is 0 for what is constant; at least 0."""
    x, y = _deviations(x, axis), _deviations(y, axis)
    unit_x, unit_y = ops.normalize(x, dim=[axis]), ops.normalize(y, dim=[axis])
    correlation = (unit_x * unit_y).sum(dim=axis)
    if epsilon > 0.0:
        norms = (x * unit_x).sum(dim=axis) * (y * unit_y).sum(dim=axis)
        correlation = correlation * (norms / (norms + epsilon))
    return ops.at_least_0(1.0 - correlation).mean()


def stronger_teacher(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    inter_class_weight: float,
    intra_class_weight: float,
    epsilon: float,
    tau_squared: bool,
) -> Tensor:
    """One less the correlations within samples and within classes; see :class:`StrongerTeacher`."""
    p = torch.softmax(ops.soften(teacher_logits.detach(), temperature), dim=-1)
    q = torch.softmax(ops.soften(student_logits, temperature), dim=-1)
    inter_class = _correlation_distance(q, p, 1, epsilon)
    intra_class = _correlation_distance(q, p, 0, epsilon)
    value = inter_class_weight * inter_class + intra_class_weight * intra_class
    return value * (temperature * temperature) if tau_squared else value


@register(stronger_teacher)
class StrongerTeacher(Loss):
    r"""One less Pearson's correlation of student and teacher: of each sample's probabilities, and of each class's over the batch.

    .. math:: \ell = T^2 \Big( \beta \, \frac1B \sum_b \big(1 - \rho(q_{b \cdot}, p_{b \cdot})\big)
              + \gamma \, \frac1C \sum_c \big(1 - \rho(q_{\cdot c}, p_{\cdot c})\big) \Big), \quad
              p = \mathrm{softmax}(t/T), \; q = \mathrm{softmax}(s/T)

    with B samples, C classes and :math:`\rho(x, y) = \hat x \cdot \hat y`, where :math:`\hat x` is x less its mean, divided by its
    length. The first sum compares the classes of one sample (inter-class), the second the samples of one class (intra-class).

    Args:
        temperature: T > 0; larger is softer.
        inter_class_weight: β, at least 0.
        intra_class_weight: γ, at least 0.
        epsilon: at least 0, added to the product of the two lengths by which a correlation is divided. With 0 a class that nobody
            takes for likely counts as much as any other.
        tau_squared: whether to multiply by T².
        reduction: ``"mean"`` alone; the means are part of the definition.

    Inputs:
        student_logits: ``(batch, classes)``, any floating type; receives the gradient. −inf gives a class the probability 0.
        teacher_logits: the same shape and type; constant.

    Returns:
        A scalar without unit, from 0 to 2 T² (β + γ). float32 for half-precision inputs, which are computed in float32. What is
        constant but for rounding has the correlation 0, without a gradient: so the second sum is γ T² for a batch of one sample, and
        the first β T² for one class.

    Raises:
        ValueError: for a temperature that is not positive, a negative weight or epsilon, shapes that do not fit, an empty batch.

    There is no value per sample: every class compares all samples.

    Who differs: the authors' code and MMRazor add 1e-8 to the product of the lengths (``epsilon=1e-8`` here). Among many
    classes that is more than the product itself for those that are rare in the batch, and leaves these out, as it were. torchdistill
    adds nothing, and takes a length for 1e-8 where it is less. All have T², which the authors' loss for segmentation has not. The
    paper trains with β = γ = 2 beside a cross-entropy of weight 1.

    Example:
        >>> student = torch.tensor([[0.0, 0.0, 2.0], [1.0, 0.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
        >>> StrongerTeacher(intra_class_weight=0.0)(student, teacher)
        tensor(0.0172)

    References:
        Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv:2205.10536.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
    }
    cases = (
        Case(),
        Case(
            {
                "temperature": 4.0,
                "inter_class_weight": 2.0,
                "intra_class_weight": 0.5,
                "epsilon": 1e-3,
                "tau_squared": False,
            }
        ),
    )
    couples_batch = "compares the samples of every class"
    aliases = ("DIST", "DISTLoss")

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    inter_class_weight: float = scalar(default=1.0, minimum=0.0)
    intra_class_weight: float = scalar(default=1.0, minimum=0.0)
    epsilon: float = number(default=0.0, minimum=0.0)
    tau_squared: bool = flag(default=True)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes="a class of probability 0 has a part in both means",
            zero_when_equal=self.epsilon == 0 or "epsilon makes every correlation smaller",
            symmetric=True,
        )

    def reference(self, student_logits, teacher_logits):
        p = np.array([np.exp(log_softmax(t / self.temperature)) for t in teacher_logits])
        q = np.array([np.exp(log_softmax(s / self.temperature)) for s in student_logits])
        inter_class = np.mean([1 - self._correlation(x, y) for x, y in zip(q, p, strict=True)])
        intra_class = np.mean([1 - self._correlation(x, y) for x, y in zip(q.T, p.T, strict=True)])
        value = self.inter_class_weight * inter_class + self.intra_class_weight * intra_class
        return value * (self.temperature**2 if self.tau_squared else 1.0)

    def _correlation(self, x, y):
        x, y = x - x.mean(), y - y.mean()
        norms = np.linalg.norm(x) * np.linalg.norm(y)
        return unit(x) @ unit(y) * (norms / (norms + self.epsilon) if self.epsilon > 0 else 1.0)
