"""Logit standardisation: soft targets of logits of mean 0 and variance 1."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, flag, ops, register, scalar
from pykd.definition.reference import divergence, log_softmax, reduce_samples, rows
from pykd.fused.description import SOFT_TARGET, KernelPoint
from pykd.losses.logits._shared import deviations


def _z_scores(logits: Tensor, unbiased: bool) -> Tensor:
    """Each row less its mean, divided by its standard deviation; 0 for a constant row. A class of −inf stays so, and counts for neither."""
    centred, masked = deviations(logits)
    count = (~masked).to(centred.dtype).sum(dim=-1, keepdim=True)
    # A row divided by its length has the variance 1 / count; a constant one stays 0, with no gradient.
    scores = ops.normalize(centred, dim=[-1]) * torch.sqrt(count - 1.0 if unbiased else count)
    return scores.masked_fill(masked, float("-inf"))


def logit_standardization(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    unbiased: bool,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """KL divergence of softened z-scores; see :class:`LogitStandardization`."""
    weight = ops.optional_weight(sample_weight)
    teacher = _z_scores(ops.without_left_out(teacher_logits.detach(), weight), unbiased)
    student = _z_scores(ops.without_left_out(student_logits, weight), unbiased)
    values = ops.softened_divergence(student, teacher, temperature)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(logit_standardization)
class LogitStandardization(Loss):
    r"""KL divergence of soft targets whose logits are standardised first, so that the student need not match their range.

    .. math:: \ell_b = T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z(t)/T) \,\Vert\, \mathrm{softmax}(z(s)/T)\big), \quad
              z(x) = \frac{x - \bar x}{\sigma(x)}, \quad
              \sigma(x)^2 = \frac1C \sum_c (x_c - \bar x)^2

    over the C classes of each sample.

    Args:
        temperature: T > 0, the "base temperature"; larger is softer.
        unbiased: whether the variance is the sum of squares divided by C − 1, as PyTorch's ``std`` has it, instead of C.
        tau_squared: whether to multiply by T².
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``:
            ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class, which has no part in mean and variance.
        teacher_logits: the same shape and type; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats (times T²), at least 0, and 0 where the student's logits are the teacher's, multiplied by any positive number and moved
        by any; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which are computed in float32. Logits that are
        all equal have z = 0, and no gradient.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: the authors' code and torchdistill use the unbiased variance (``unbiased=True`` here), and add 1e-7 to
    the standard deviation, which is not seen unless logits differ by less than about 1e-4. torchdistill has no T² unless it adds the
    cross-entropy itself.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 30.0, 60.0]])
        >>> LogitStandardization()(student, teacher)
        tensor(0.0990)
        >>> LogitStandardization()(student, 7 * student + 3)
        tensor(0.)

    References:
        Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv:2403.01427.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(),
        Case(
            {"temperature": 0.5, "unbiased": True, "tau_squared": False, "reduction": "sum"},
            optional=("sample_weight",),
        ),
        Case(layouts={"student_logits": "batch tokens classes"}, optional=("sample_weight",)),
    )
    aliases = ("LSKD", Alias("LogitStdKDLoss", unbiased=True))

    temperature: float = scalar(default=2.0, minimum=0.0, exclusive=True)
    unbiased: bool = flag(default=False)
    tau_squared: bool = flag(default=True)

    def fused(self, kernel: KernelPoint, student_logits, teacher_logits, sample_weight, temperature):
        weight = ops.optional_weight(sample_weight)
        tensors = {
            "student": _z_scores(ops.without_left_out(student_logits, weight), self.unbiased),
            "teacher": _z_scores(ops.without_left_out(teacher_logits.detach(), weight), self.unbiased),
            "temperature": temperature,
        }
        values = kernel(SOFT_TARGET, "soft", ops.softened_divergence, tensors, {"form": "kl"}, weight="soft_weight")
        factor = temperature * temperature if self.tau_squared else 1.0
        return ops.reduce(ops.at_least_0(values), weight, self.reduction) * factor

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=True,
            symmetric="the teacher weighs the logarithms",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            log_p = log_softmax(self._numpy_z_scores(t) / self.temperature)
            log_q = log_softmax(self._numpy_z_scores(s) / self.temperature)
            values.append(divergence(log_p, log_q) * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])

    def _numpy_z_scores(self, logits):
        finite = [x for x in logits if x != -np.inf]
        deviations = logits - np.mean(finite)
        squares = sum(d**2 for d in deviations if d != -np.inf)
        if squares == 0:
            return np.where(deviations == -np.inf, -np.inf, 0.0)
        return deviations / np.sqrt(squares / (len(finite) - 1 if self.unbiased else len(finite)))
