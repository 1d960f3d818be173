"""Dynamic temperature distillation: every sample has a temperature of its own, the lower the more confusing it is."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Alias, Case, Loss, Properties, Spec, choice, number, ops, register, scalar
from pykd.definition.reference import expectation, log_softmax, unit

WEIGHTS = ("flsw", "cwsm")
FORMS = ("cross_entropy", "mse")


def _confusion(student: Tensor, teacher: Tensor, weights: str, exponent: float) -> Tensor:
    """How confusing each sample is to the student."""
    if weights == "flsw":
        cosine = (ops.normalize(student, dim=[-1]) * ops.normalize(teacher, dim=[-1])).sum(dim=-1)
        return torch.pow((1.0 - cosine).clamp(min=0.0), exponent)
    return 1.0 / (torch.softmax(student, dim=-1).amax(dim=-1) + 1e-3)


def _scaled(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Each row divided by its temperature, of which a softmax is to be taken."""
    return (logits - logits.detach().amax(dim=-1, keepdim=True)) / temperatures


def dynamic_temperature(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    strength: float,
    weights: str,
    exponent: float,
    form: str,
    minimum_temperature: float,
) -> Tensor:
    """Soft targets at a temperature per sample; see :class:`DynamicTemperature`."""
    student, teacher = ops.upcast(student_logits), ops.upcast(teacher_logits.detach())
    confusion = _confusion(student.detach(), teacher, weights, exponent)
    temperatures = temperature + strength * (confusion.mean() - confusion)
    temperatures = temperatures.clamp(min=minimum_temperature).unsqueeze(-1)
    if form == "mse":
        differences = (student - teacher) / temperatures
        return (differences * differences).mean(dim=-1).mean()
    p = torch.softmax(_scaled(teacher, temperatures), dim=-1)
    return ops.negative_of(ops.expectation(p, torch.log_softmax(_scaled(student, temperatures), dim=-1))).mean()


@register(dynamic_temperature)
class DynamicTemperature(Loss):
    r"""Soft targets with a temperature per sample: below the base where the sample confuses the student more than others of the batch do.

    .. math:: \ell = \frac1B \sum_b \Big(-\sum_c p_{bc} \log q_{bc}\Big), \quad
              p_b = \mathrm{softmax}(t_b/\tau_b), \; q_b = \mathrm{softmax}(s_b/\tau_b), \quad
              \tau_b = \max\big(\tau_0 + \beta\, (\bar w - w_b), \tau_{\min}\big)

    with the batch's mean :math:`\bar w` of

    - ``weights="flsw"`` (focal loss style): :math:`w_b = \big(1 - \frac{s_b \cdot t_b}{\lVert s_b \rVert \lVert t_b \rVert}\big)^\gamma`;
    - ``weights="cwsm"`` (confidence): :math:`w_b = 1 / (\max_c \mathrm{softmax}(s_b)_c + 10^{-3})`.

    The temperatures are constants as far as the gradient goes. ``form="mse"`` has the mean over the classes of
    :math:`(s_{bc}/\tau_b - t_{bc}/\tau_b)^2` in the place of the cross-entropy.

    Args:
        temperature: τ₀ > 0, the base.
        strength: β, at least 0; with 0 every sample has the temperature τ₀.
        weights: ``"flsw"`` or ``"cwsm"``.
        exponent: γ of ``"flsw"``, greater than 0; nothing else looks at it.
        form: ``"cross_entropy"`` or ``"mse"``.
        minimum_temperature: τ_min > 0, which no temperature falls below.
        reduction: ``"mean"`` alone.

    Inputs:
        student_logits: ``(batch, classes)``, any floating type; receives the gradient.
        teacher_logits: the same shape and type; constant.

    Returns:
        A scalar: nats, at least 0, or a mean of squares. float32 for half-precision inputs, which are computed in float32. Logits of
        length 0 have the cosine 0. A class of −inf makes the cosine NaN, and with it the loss.

    Raises:
        ValueError: for numbers out of their ranges, shapes that do not fit, an empty batch.

    There is no value per sample: the mean of the batch is part of every temperature.

    Who differs: TextBrewer's schedulers ``flsw`` and ``cwsm`` give these temperatures to its ``kd_ce_loss`` and ``kd_mse_loss``,
    without a minimum: β above τ₀/2^γ, or confidences far apart, make them negative there.

    Example:
        >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> DynamicTemperature(temperature=2.0, strength=1.0)(student, teacher)
        tensor(0.7895)

    References:
        Wen, Lai, Qian: Preparing Lessons: Improve Knowledge Distillation with Better Supervision, 2019, arXiv:1911.07471.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
    }
    cases = (
        Case(),
        Case({"temperature": 3.0, "strength": 0.5, "weights": "cwsm"}),
        Case({"exponent": 2.0, "form": "mse", "minimum_temperature": 4.1}),
    )
    couples_batch = "has the mean of the batch in every temperature"
    aliases = ("DTD", "FLSW", Alias("CWSM", weights="cwsm"))

    temperature: float = scalar(default=4.0, minimum=0.0, exclusive=True)
    strength: float = scalar(default=1.0, minimum=0.0)
    weights: str = choice(WEIGHTS, default="flsw")
    exponent: float = number(default=1.0, above=0.0)
    form: str = choice(FORMS, default="cross_entropy")
    minimum_temperature: float = number(default=1.0, above=0.0)

    def properties(self) -> Properties:
        shift = self.weights == "cwsm" and self.form == "cross_entropy"
        return Properties(
            logit_shift=shift or "the cosine, or the difference, is of the logits themselves",
            masked_classes=shift or "the cosine, or the difference, of what is infinite is none",
            zero_when_equal=self.form == "mse" or "the entropy of the teacher is left",
            symmetric=(self.weights == "flsw" and self.form == "mse")
            or "the teacher weighs the logarithms, or the student's confidence counts",
        )

    def constants(self, student_logits, teacher_logits):
        confusion = []
        for s, t in zip(student_logits, teacher_logits, strict=True):
            if self.weights == "flsw":
                confusion.append(max(1 - unit(s) @ unit(t), 0.0) ** self.exponent)
            else:
                confusion.append(1 / (np.exp(log_softmax(s)).max() + 1e-3))
        temperatures = self.temperature + self.strength * (np.mean(confusion) - np.array(confusion))
        return {"temperatures": np.maximum(temperatures, self.minimum_temperature)}

    def reference(self, student_logits, teacher_logits, temperatures=None):
        if temperatures is None:
            temperatures = self.constants(student_logits, teacher_logits)["temperatures"]
        values = []
        for s, t, temperature in zip(student_logits, teacher_logits, temperatures, strict=True):
            if self.form == "mse":
                values.append(np.mean((s / temperature - t / temperature) ** 2))
            else:
                values.append(-expectation(log_softmax(t / temperature), log_softmax(s / temperature)))
        return np.mean(values)
