"""Regression of logits: the squared difference of the student's and the teacher's, or of their softened probabilities."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, flag, ops, register, scalar
from pykd.definition.reference import log_softmax, reduce_samples, rows

OF = ("logits", "probabilities")
OVER_CLASSES = ("mean", "sum")


def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    of: str,
    over_classes: str,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """Mean squared difference over the classes; see :class:`LogitMSE`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.upcast(ops.without_left_out(student_logits, weight))
    teacher = ops.upcast(ops.without_left_out(teacher_logits.detach(), weight))
    if of == "probabilities":
        student = torch.softmax(ops.soften(student, temperature), dim=-1)
        differences = student - torch.softmax(ops.soften(teacher, temperature), dim=-1)
    else:
        differences = (student - teacher) / temperature
    squares = differences * differences
    values = squares.mean(dim=-1) if over_classes == "mean" else squares.sum(dim=-1)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(logit_mse)
class LogitMSE(Loss):
    r"""Mean squared difference of the student's and the teacher's logits, or of their softened probabilities.

    .. math:: \ell_b = \frac1C \sum_c \left(\frac{s_{bc}}{T} - \frac{t_{bc}}{T}\right)^2
              \quad \text{or} \quad \frac1C \sum_c (q_{bc} - p_{bc})^2, \quad p = \mathrm{softmax}(t/T), \; q = \mathrm{softmax}(s/T)

    Args:
        temperature: T > 0. Of logits it is no more than a factor, 1/T².
        of: what is compared, ``"logits"`` or ``"probabilities"``.
        over_classes: ``"mean"``, as written, or ``"sum"``, C times as much.
        tau_squared: whether to multiply by T².
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``:
            ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient.
        teacher_logits: the same shape and type; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        At least 0, in squares of logits, or without unit and at most 2 (times T²); 0 where student and teacher agree; a scalar
        unless ``reduction="none"``. float32 for half-precision inputs, which are computed in float32. Logits that are −inf for both have
        no difference, which is NaN; as probabilities they are 0.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: Ba and Caruana write the half of the sum over classes (½ · ``over_classes="sum"``). TextBrewer's ``kd_mse_loss`` and
    the ``Logits`` of Knowledge-Distillation-Zoo are the default here, the first with a temperature (8 in its configuration).
    KD_Lib's vanilla distillation is ``of="probabilities", tau_squared=True``.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]])
        >>> LogitMSE()(student, teacher)
        tensor(2.)
        >>> LogitMSE(of="probabilities", over_classes="sum", tau_squared=True, temperature=2.0)(student, teacher)
        tensor(0.4799)

    References:
        Ba, Caruana: Do Deep Nets Really Need to be Deep?, NeurIPS 2014, arXiv:1312.6184; Kim, Oh, Kim, Cho, Yun: Comparing
        Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation, 2021, arXiv:2105.08919.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(),
        Case({"temperature": 4.0, "of": "probabilities", "tau_squared": True}, optional=("sample_weight",)),
        Case(
            {"temperature": 2.0, "over_classes": "sum", "reduction": "sum"},
            layouts={"student_logits": "batch tokens classes"},
            optional=("sample_weight",),
        ),
        Case({"of": "probabilities", "over_classes": "sum"}),
    )
    aliases = ("Logits", "kd_mse_loss", Alias("softmax_mse", of="probabilities"))

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    of: str = choice(OF, default="logits")
    over_classes: str = choice(OVER_CLASSES, default="mean")
    tau_squared: bool = flag(default=False)

    def properties(self) -> Properties:
        masked: bool | str = self.over_classes == "sum" or "a class more makes the mean smaller"
        if self.of == "logits":
            masked = "two infinite logits have no difference"
        return Properties(
            logit_shift=self.of == "probabilities" or "logits are compared themselves",
            masked_classes=masked,
            zero_when_equal=True,
            symmetric=True,
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            x, y = s / self.temperature, t / self.temperature
            if self.of == "probabilities":
                x, y = np.exp(log_softmax(x)), np.exp(log_softmax(y))
            squares = (x - y) ** 2
            value = squares.mean() if self.over_classes == "mean" else squares.sum()
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
