"""Total variation distance: how much probability the student has elsewhere than the teacher."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, flag, ops, register, scalar
from pykd.definition.reference import log_softmax, reduce_samples, rows
from pykd.fused.description import DIVERGENCE, KernelPoint


def _rows(student: Tensor, teacher: Tensor, temperature: float, form: str) -> Tensor:
    """One value per row; see :class:`TotalVariation`."""
    q = torch.softmax(ops.soften(student, temperature), dim=-1)
    p = torch.softmax(ops.soften(teacher.detach(), temperature), dim=-1)
    return 0.5 * ops.absolute(q - p).sum(dim=-1)


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """Half the sum of absolute differences of probabilities; see :class:`TotalVariation`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits, weight)
    values = _rows(student, teacher, temperature, "total_variation")
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(total_variation)
class TotalVariation(Loss):
    r"""Total variation distance between the teacher's and the student's softened probabilities.

    .. math:: \ell_b = \frac12 \sum_c |p_{bc} - q_{bc}|, \quad p = \mathrm{softmax}(t/T), \; q = \mathrm{softmax}(s/T)

    Args:
        temperature: T > 0; larger is softer.
        tau_squared: whether to multiply by T². Off by default: unlike that of a KL divergence the gradient does not shrink as
            1/T².
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1, so the mean over kept tokens; ``"sum"``;
            ``"none"``: ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class.
        teacher_logits: the same shape and type; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers), such as ``labels != -100``; constant. A sample of weight 0 has no part in value and gradient,
            whatever it holds.

    Returns:
        Between 0 and 1 (T² with ``tau_squared``), no unit; 0 when q = p; a scalar unless ``reduction="none"``. A class
        of which p = q exactly has the subgradient 0. Where student and teacher rule each other's classes out, the
        distance is 1 and its gradient 0. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: DistillKit multiplies by T² (``tau_squared=True``); Liger and DistiLLM do not. Liger's kernel has −½ for the
    subgradient where p = q. All divide by the number of kept tokens.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> TotalVariation()(student, teacher)
        tensor(0.3808)
        >>> TotalVariation(temperature=2.0, tau_squared=True)(student, teacher)
        tensor(0.9242)

    References:
        Wen et al.: f-Divergence Minimization for Sequence-Level Knowledge Distillation, 2023, arXiv:2307.15190.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(layouts={"student_logits": "batch tokens classes"}),
        Case(
            {"temperature": 2.0, "tau_squared": True, "reduction": "sum"},
            optional=("sample_weight",),
        ),
    )
    aliases = ("TVD", "TVDLoss", "tv_distance")

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    tau_squared: bool = flag(default=False)

    def fused(self, kernel: KernelPoint, student_logits, teacher_logits, sample_weight, temperature):
        tensors = {"student": student_logits, "teacher": teacher_logits, "temperature": temperature}
        values = kernel(DIVERGENCE, "value", _rows, tensors, {"form": "total_variation"}, weight="weight")
        return ops.reduce_softened(
            values, ops.optional_weight(sample_weight), temperature, self.tau_squared, self.reduction
        )

    def properties(self) -> Properties:
        return Properties(logit_shift=True, masked_classes=True, zero_when_equal=True, symmetric=True)

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            p, q = np.exp(log_softmax(t / self.temperature)), np.exp(log_softmax(s / self.temperature))
            values.append(0.5 * np.abs(p - q).sum() * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
