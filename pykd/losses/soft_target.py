"""Soft targets: match the teacher's softened class probabilities."""

import numpy as np
import torch
from torch import Tensor

from pykd import ops
from pykd.reference import log_softmax, reduce_samples
from pykd.registry import Case, Loss, Scalar, Spec, register


def soft_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None = None,
    temperature: float = 2.0,
    soften_student: bool = True,
    form: str = "cross_entropy",
    tau_squared: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy or KL divergence to the teacher's softened targets; see :class:`SoftTarget`."""
    student = ops.upcast(student_logits)
    if soften_student:
        student = student / temperature
    log_q = torch.log_softmax(student, dim=-1)
    log_p = torch.log_softmax(ops.upcast(teacher_logits.detach()) / temperature, dim=-1)
    p = torch.exp(log_p)
    if form == "kl":
        values = ops.product_or_zero(p, log_p - log_q).sum(dim=-1)
    else:
        values = -ops.product_or_zero(p, log_q).sum(dim=-1)
    if tau_squared:
        values = values * (temperature * temperature)
    return ops.reduce(values, ops.optional_weight(sample_weight), reduction)


@register("soft_target")
class SoftTarget(Loss):
    r"""Cross-entropy (or KL divergence) of the student against the teacher's softened probabilities.

    .. math:: \ell_b = -\sum_c p_{bc} \log q_{bc}, \quad p = \mathrm{softmax}(t/T), \;
              q = \mathrm{softmax}(s/T) \text{ or } \mathrm{softmax}(s)

    With ``form="kl"`` the teacher's entropy is taken off, :math:`\sum_c p_{bc} (\log p_{bc} - \log q_{bc})`:
    the gradient is the same, and the value is 0 when the student equals the teacher.

    Args:
        temperature: T > 0; larger is softer.
        soften_student: whether the student's logits are divided by T too, as Hinton et al. do.
        form: ``"cross_entropy"`` or ``"kl"``.
        tau_squared: whether to multiply by T², which keeps the size of the gradient comparable when T
            changes (Hinton et al., section 2). Off by default.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_logits: ``(batch, classes)``, any floating type; receives the gradient. −inf masks a class.
        teacher_logits: ``(batch, classes)``, same type; constant.
        sample_weight: optional ``(batch,)``, at least 0; constant.

    Returns:
        Nats, at least 0; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which
        are computed in float32. A class that the teacher rules out (−inf) adds 0 whatever the student
        says; one that only the student rules out gives +inf. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: timm, RepDistiller and mdistiller take the KL form with T², summed over classes and
    averaged over the batch (``form="kl", tau_squared=True``); TextBrewer the cross-entropy without T² (the default
    here); torchtune's forward KL is the cross-entropy at T = 1; DeiT also divides by the number of classes.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> SoftTarget(temperature=2.0)(student, teacher)
        tensor(0.6931)
        >>> SoftTarget(temperature=2.0, form="kl", tau_squared=True)(student, teacher)
        tensor(0.4438)

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True),
        "teacher_logits": Spec("batch classes"),
        "sample_weight": Spec("batch", optional=True, draw="weights"),
    }
    scalars = {"temperature": Scalar(minimum=0.0, exclusive=True)}
    cases = (
        Case({"temperature": 2.0}),
        Case({"temperature": 3.0, "soften_student": False}),
        Case({"temperature": 4.0, "form": "kl", "tau_squared": True}),
        Case({"temperature": 1.5, "form": "kl", "reduction": "sum"}, optional=("sample_weight",)),
    )
    paper = "Hinton, Vinyals, Dean 2015, arXiv:1503.02531"

    def __init__(
        self,
        temperature: float = 2.0,
        soften_student: bool = True,
        form: str = "cross_entropy",
        tau_squared: bool = False,
        reduction: str = "mean",
    ):
        super().__init__(reduction, temperature=temperature)
        if form not in ("cross_entropy", "kl"):
            raise ValueError(f"expected form to be 'cross_entropy' or 'kl', got {form!r}; pass one of these")
        self.soften_student = soften_student
        self.form = form
        self.tau_squared = tau_squared

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        sample_weight: Tensor | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        if temperature is None:
            temperature = self.temperature
        return soft_target(
            student_logits,
            teacher_logits,
            sample_weight,
            temperature,
            self.soften_student,
            self.form,
            self.tau_squared,
            self.reduction,
        )

    def zero_when_equal(self) -> bool:
        return self.form == "kl"

    @staticmethod
    def reference(
        student_logits,
        teacher_logits,
        sample_weight=None,
        temperature=2.0,
        soften_student=True,
        form="cross_entropy",
        tau_squared=False,
        reduction="mean",
    ):
        """One sample at a time, from the definition."""
        values = []
        for s, t in zip(student_logits, teacher_logits, strict=True):
            log_q = log_softmax(s / temperature if soften_student else s)
            log_p = log_softmax(t / temperature)
            value = 0.0
            for lp, lq in zip(log_p, log_q, strict=True):
                if np.exp(lp) != 0:
                    value += np.exp(lp) * ((lp if form == "kl" else 0.0) - lq)
            values.append(value * (temperature**2 if tau_squared else 1.0))
        weights = np.ones(len(values)) if sample_weight is None else sample_weight
        return reduce_samples(values, weights, reduction)
