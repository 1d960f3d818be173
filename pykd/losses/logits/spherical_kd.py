"""Spherical knowledge distillation: the student's logits at the teacher's length, so that their direction alone is taught."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, flag, ops, register, scalar
from pykd.definition.reference import divergence, log_softmax, reduce_samples, rows
from pykd.losses.logits._shared import deviations


def _deviation(deviations: Tensor, masked: Tensor) -> Tensor:
    """The standard deviation of each row, of what is not masked."""
    count = (~masked).to(deviations.dtype).sum(dim=-1, keepdim=True)
    return (deviations * ops.normalize(deviations, dim=[-1])).sum(dim=-1, keepdim=True) / torch.sqrt(count)


def spherical_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """KL divergence after the student's logits have got the teacher's length; see :class:`SphericalKD`."""
    weight = ops.optional_weight(sample_weight)
    teacher = ops.upcast(ops.without_left_out(teacher_logits.detach(), weight))
    student, masked = deviations(ops.without_left_out(student_logits, weight))
    wanted, ruled_out = deviations(teacher)
    length = _deviation(student, masked)
    still = length == 0
    factor = (_deviation(wanted, ruled_out) / length.masked_fill(still, 1.0)).masked_fill(still, 0.0)
    scaled = (student * factor).masked_fill(masked, float("-inf"))
    wanted = wanted.masked_fill(ruled_out, float("-inf"))
    log_p = torch.log_softmax(ops.soften(wanted, temperature), dim=-1)
    log_q = torch.log_softmax(ops.soften(scaled, temperature), dim=-1)
    values = ops.forward_kl(log_p, log_q, temperature)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(spherical_kd)
class SphericalKD(Loss):
    r"""KL divergence of soft targets after the student's logits have been brought to the standard deviation of the teacher's.

    .. math:: \ell_b = T^2 \, \mathrm{KL}\left(\mathrm{softmax}\Big(\frac{t}{T}\Big) \,\Big\Vert\,
              \mathrm{softmax}\Big(\frac{\sigma(t)}{\sigma(s)} \frac{s}{T}\Big)\right), \quad
              \sigma(x)^2 = \frac1C \sum_c (x_c - \bar x)^2

    for each sample: logits less their mean lie on a sphere, and how far out they lie, the student's confidence, is the teacher's.

    Args:
        temperature: T > 0; larger is softer.
        tau_squared: whether to multiply by T².
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``:
            ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class, which has no part in mean and standard deviation.
        teacher_logits: the same shape and type; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats (times T²), at least 0, and 0 where the student's logits are the teacher's, multiplied by any positive number and moved
        by any; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which are computed in float32. Student's
        logits that are all equal stay so, and have no gradient.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: the authors' code divides by the batch size twice. PaddleSlim normalises by the biased and
    scales by the unbiased standard deviation (a factor √(C/(C − 1)) of both logits), has no temperature, and returns the
    cross-entropy. PaddleClas scales both by one number m instead: that is ``logit_standardization`` with the temperature T/m, times
    m².

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 6.0]])
        >>> SphericalKD(temperature=2.0)(student, teacher)
        tensor(0.2968)

    References:
        Guo, Chen, Lu, Zhao, Liu, Yin, Li: Reducing the Teacher-Student Gap via Spherical Knowledge Distillation, 2020,
        arXiv:2010.07485.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(),
        Case({"temperature": 1.5, "tau_squared": False, "reduction": "sum"}, optional=("sample_weight",)),
        Case(layouts={"student_logits": "batch tokens classes"}, optional=("sample_weight",)),
    )
    aliases = ("SphericalKnowledgeDistillation",)

    temperature: float = scalar(default=4.0, minimum=0.0, exclusive=True)
    tau_squared: bool = flag(default=True)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=True,
            symmetric="the teacher says how far out logits lie, and weighs the logarithms",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            deviation = np.std(s[s > -np.inf])
            scaled = s / deviation * np.std(t[t > -np.inf]) if deviation > 0 else np.where(s == -np.inf, s, 0.0)
            value = divergence(log_softmax(t / self.temperature), log_softmax(scaled / self.temperature))
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
