"""Multi-level logit distillation: how predictions go together, among classes and among samples."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, ops, register, scalar
from pykd.definition.reference import log_softmax


def _products(x: Tensor) -> Tensor:
    """Of every two rows."""
    return ops.matmul(x, x.transpose(0, 1))


def multi_level_correlation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    class_level_weight: float,
    batch_level_weight: float,
) -> Tensor:
    """Squared differences of the products of predictions; see :class:`MultiLevelCorrelation`."""
    p = torch.softmax(ops.soften(teacher_logits.detach(), temperature), dim=-1)
    q = torch.softmax(ops.soften(student_logits, temperature), dim=-1)
    class_level = _products(q.transpose(0, 1)) - _products(p.transpose(0, 1))
    batch_level = _products(q) - _products(p)
    class_value = (class_level * class_level).sum(dim=-1).mean()
    return class_level_weight * class_value + batch_level_weight * (batch_level * batch_level).sum(dim=-1).mean()


@register(multi_level_correlation)
class MultiLevelCorrelation(Loss):
    r"""Squared difference of how the predictions of every two classes, and of every two samples, go together.

    .. math:: \ell = \frac{\lambda_c}{C} \lVert Q^\top Q - P^\top P \rVert_F^2
              + \frac{\lambda_b}{B} \lVert Q Q^\top - P P^\top \rVert_F^2, \quad
              P = \mathrm{softmax}(t/T), \; Q = \mathrm{softmax}(s/T)

    with B samples in the rows and C classes in the columns. These are the class-level and the batch-level terms of multi-level
    logit distillation; its instance-level terms are ``soft_target`` with ``form="kl", tau_squared=True`` at several temperatures.

    Args:
        temperature: T > 0; larger is softer.
        class_level_weight: λ of the classes, at least 0.
        batch_level_weight: λ of the samples, at least 0.
        reduction: ``"mean"`` alone; the divisors are part of the definition.

    Inputs:
        student_logits: ``(batch, classes)``, any floating type; receives the gradient. −inf gives a class the probability 0.
        teacher_logits: the same shape and type; constant.

    Returns:
        A scalar without unit, at least 0, and 0 where student and teacher agree. float32 for half-precision inputs, which are
        computed in float32. It needs O(batch² + classes²) memory.

    Raises:
        ValueError: for a temperature that is not positive, negative weights, shapes that do not fit, an empty batch.

    There is no value per sample: every sample is compared with every other.

    Who differs: the authors' code adds these terms at T = 2, 3, 4, 5 and 6, without T², for a weakly and a strongly augmented view, and
    multiplies those of the weak view by masks of classes and samples; the terms are sums by then, so that what is left
    of a mask is its mean, a factor. To add several temperatures, compose several of these.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> MultiLevelCorrelation(temperature=2.0)(student, teacher)
        tensor(0.0705)

    References:
        Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
    }
    cases = (
        Case({"temperature": 1.0}),
        Case({"class_level_weight": 3.0, "batch_level_weight": 0.5}),
    )
    couples_batch = "compares every sample of the batch with every other"
    aliases = ("MLLD", "MLKD")

    temperature: float = scalar(default=4.0, minimum=0.0, exclusive=True)
    class_level_weight: float = scalar(default=1.0, minimum=0.0)
    batch_level_weight: float = scalar(default=1.0, minimum=0.0)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=float(self.class_level_weight) == 0 or "a class more makes the mean over classes smaller",
            zero_when_equal=True,
            symmetric=True,
        )

    def reference(self, student_logits, teacher_logits):
        p = np.array([np.exp(log_softmax(t / self.temperature)) for t in teacher_logits])
        q = np.array([np.exp(log_softmax(s / self.temperature)) for s in student_logits])
        class_value, batch_value = self._level(q.T, p.T), self._level(q, p)
        return self.class_level_weight * class_value + self.batch_level_weight * batch_value

    def _level(self, student, teacher):
        """Pair by pair, from the definition."""
        rows = range(len(student))
        squares = [(student[i] @ student[j] - teacher[i] @ teacher[j]) ** 2 for i in rows for j in rows]
        return sum(squares) / len(student)
