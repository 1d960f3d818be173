"""Soft targets: match the teacher's softened class probabilities."""

import math

import numpy as np
import torch
from torch import Tensor

from pykd.definition import (
    SAMPLE_WEIGHT,
    Alias,
    Case,
    Loss,
    Properties,
    Spec,
    choice,
    flag,
    number,
    ops,
    register,
    scalar,
)
from pykd.definition.reference import divergence, expectation, log_softmax, reduce_samples, rows
from pykd.fused.description import SOFT_TARGET, KernelPoint

FORMS = ("cross_entropy", "kl", "reverse_kl", "symmetric_kl", "jsd")


def soft_target_rows(
    student: Tensor, teacher: Tensor, temperature: float, form: str, soften_student: bool, beta: float
) -> Tensor:
    """One value per row, at least 0; see :class:`SoftTarget`."""
    softened = ops.soften(teacher.detach(), temperature)
    log_q = torch.log_softmax(ops.soften(student, temperature) if soften_student else ops.upcast(student), dim=-1)
    if form == "cross_entropy":
        return ops.negative_of(ops.expectation(torch.softmax(softened, dim=-1), log_q))
    log_p = torch.log_softmax(softened, dim=-1)
    if form == "kl":
        return ops.forward_kl(log_p, log_q, temperature)
    if form == "reverse_kl":
        return ops.reverse_kl(log_p, log_q, temperature)
    p, q = torch.exp(log_p), torch.exp(log_q)
    if form == "symmetric_kl":
        forward = ops.expectation(p, log_q - log_p)
        return ops.at_least_0((ops.mean_of_logs(q, log_q - log_p) - forward) / 2)
    # KL(p‖m) and KL(q‖m) by log(m / p) and log(m / q), of which little is left where p and q are almost equal.
    log_ratio = ops.log_ratio(log_p, log_q)
    teacher_side = p * torch.log1p((1 - beta) * torch.expm1(log_ratio))
    student_side = q * torch.log1p(beta * torch.expm1(-log_ratio))
    return ops.negative_of(beta * teacher_side.sum(dim=-1) + (1 - beta) * student_side.sum(dim=-1))


def soft_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    soften_student: bool,
    form: str,
    beta: float,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """Cross-entropy or a divergence to the teacher's softened targets; see :class:`SoftTarget`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits, weight)
    values = soft_target_rows(student, teacher, temperature, form, soften_student, beta)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(soft_target)
class SoftTarget(Loss):
    r"""Cross-entropy (or KL divergence, forward, reverse or in between) of the student against the softened teacher.

    .. math:: \ell_b = -\sum_c p_{bc} \log q_{bc}, \quad p = \mathrm{softmax}(t/T), \;
              q = \mathrm{softmax}(s/T) \text{ or } \mathrm{softmax}(s)

    That is ``form="cross_entropy"``. The other forms are divergences, 0 when q = p:

    - ``"kl"`` (forward): :math:`\mathrm{KL}(p \Vert q) = \sum_c p_c (\log p_c - \log q_c)`; the gradient is that of
      the cross-entropy.
    - ``"reverse_kl"``: :math:`\mathrm{KL}(q \Vert p)`, which prefers to miss modes of the teacher over covering all.
    - ``"symmetric_kl"``: :math:`\frac12 \mathrm{KL}(p \Vert q) + \frac12 \mathrm{KL}(q \Vert p)`.
    - ``"jsd"``: the generalised Jensen-Shannon divergence :math:`\beta \mathrm{KL}(p \Vert m) + (1 - \beta)
      \mathrm{KL}(q \Vert m)` with :math:`m = \beta p + (1 - \beta) q`.

    Args:
        temperature: T > 0; larger is softer.
        soften_student: whether the student's logits are divided by T too, as Hinton et al. do.
        form: ``"cross_entropy"``, ``"kl"``, ``"reverse_kl"``, ``"symmetric_kl"`` or ``"jsd"``.
        beta: β of ``"jsd"``, between 0 and 1 and neither; no other form looks at it. Near 0 the divergence tends to
            β times the forward KL, near 1 to 1 − β times the reverse.
        tau_squared: whether to multiply by T², which keeps the size of the gradient comparable when T
            changes (Hinton et al., section 2). Off by default.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``:
            ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class.
        teacher_logits: the same shape and type; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers), such as ``labels != -100``; constant. A sample of weight 0 has no part in value and gradient,
            whatever it holds.

    Returns:
        Nats, at least 0; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which
        are computed in float32. A class that the teacher rules out (−inf) adds 0 whatever the student
        says; one that only the student rules out gives +inf. In the reverse direction the two change places, and ``"jsd"``
        is finite always, at most log 2. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: timm, MMRazor, RepDistiller and mdistiller take the KL form with T², summed over classes and averaged over
    the batch (``form="kl", tau_squared=True``); torchdistill has T² beside a cross-entropy with labels alone; DeiT divides by the
    number of classes, too, and so does Model-Optimizer by default. TextBrewer has the cross-entropy without T² (the
    default here). torchtune's forward KL is the cross-entropy at T = 1, and its symmetric KL mixes that with the reverse KL
    in a free ratio, 0.5 by default: half the teacher's entropy more than here. For ``"jsd"`` TRL and Liger take β = 0 for the
    forward and β = 1 for the reverse KL, which are not the limits of the formula: use ``"kl"`` and ``"reverse_kl"``.

    The same formula goes by other names where the teacher is another one: deep mutual learning is the mean of it, at
    ``form="kl", temperature=1.0``, over all other students, each of them a teacher to this one; born-again networks, teacher
    assistants and class-wise self-distillation take the model's own past, a model in between, and another image of the class.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> SoftTarget(temperature=2.0)(student, teacher)
        tensor(0.6931)
        >>> SoftTarget(temperature=2.0, form="kl", tau_squared=True)(student, teacher)
        tensor(0.4438)

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531; Gu et al.: MiniLLM,
        2023, arXiv:2306.08543 (reverse KL); Agarwal et al.: GKD, 2023, arXiv:2306.13649 (generalised JSD); Zhang et al.: Deep
        Mutual Learning, 2018, arXiv:1706.00384.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case({"temperature": 2.0}),
        Case({"temperature": 3.0, "soften_student": False}),
        Case({"temperature": 4.0, "form": "kl", "tau_squared": True}),
        Case({"temperature": 1.5, "form": "kl", "reduction": "sum"}, optional=("sample_weight",)),
        Case({"temperature": 2.0, "form": "reverse_kl"}),
        Case({"temperature": 1.5, "form": "symmetric_kl"}),
        Case({"temperature": 2.5, "form": "jsd", "beta": 0.3}),
        Case({"temperature": 3.0}, layouts={"student_logits": "batch tokens classes"}, optional=("sample_weight",)),
    )
    aliases = (
        "KD",
        "ST",
        "KDSoftCELoss",
        "kd_ce_loss",
        Alias("KDLoss", form="kl", tau_squared=True),
        Alias("DistillKL", form="kl", tau_squared=True),
        Alias("KLDivergence", form="kl", tau_squared=True),
        Alias("LogitsDistillationLoss", form="kl", tau_squared=True),
        Alias("FKL", form="kl"),
        Alias("DML", form="kl", temperature=1.0),
        Alias("KLD", form="kl"),
        Alias("forward_kl", form="kl"),
        Alias("ForwardKLLoss", temperature=1.0),  # the cross-entropy
        Alias("RKL", form="reverse_kl"),
        Alias("reverse_kl", form="reverse_kl"),
        Alias("ReverseKLLoss", form="reverse_kl", temperature=1.0),
        Alias("symmetric_kl", form="symmetric_kl"),
        Alias("SymmetricKLLoss", form="symmetric_kl", temperature=1.0),
        Alias("JSD", form="jsd"),
        Alias("GJSD", form="jsd"),
        Alias("GKD", form="jsd", temperature=1.0),
        Alias("generalized_jsd_loss", form="jsd", temperature=1.0),
    )

    temperature: float = scalar(default=2.0, minimum=0.0, exclusive=True)
    soften_student: bool = flag(default=True)
    form: str = choice(FORMS, default="cross_entropy")
    beta: float = number(default=0.5, above=0.0, below=1.0)  # whose ends are form="kl" and form="reverse_kl"
    tau_squared: bool = flag(default=False)

    def fused(self, kernel: KernelPoint, student_logits, teacher_logits, sample_weight, temperature):
        values = kernel(
            SOFT_TARGET,
            "soft",
            soft_target_rows,
            {"student": student_logits, "teacher": teacher_logits, "temperature": temperature},
            {"form": self.form, "soften_student": self.soften_student, "beta": self.beta},
            weight="soft_weight",
        )
        return ops.reduce_softened(
            ops.at_least_0(values), ops.optional_weight(sample_weight), temperature, self.tau_squared, self.reduction
        )

    def properties(self) -> Properties:
        alike = self.soften_student or float(self.temperature) == 1  # student and teacher are softened alike
        even = self.form == "symmetric_kl" or (self.form == "jsd" and self.beta == 0.5)
        zero: bool | str = True
        if self.form == "cross_entropy":
            zero = "the entropy of the teacher is left"
        elif not alike:
            zero = "the teacher alone is softened"
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=zero,
            symmetric=(even and alike)
            or "the teacher weighs the logarithms, or is softened, in another way than the student",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        """One sample at a time, from the definition."""
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            log_q = log_softmax(s / self.temperature if self.soften_student else s)
            log_p = log_softmax(t / self.temperature)
            value = {
                "cross_entropy": lambda p, q: -expectation(p, q),
                "kl": divergence,
                "reverse_kl": lambda p, q: divergence(q, p),
                "symmetric_kl": lambda p, q: (divergence(p, q) + divergence(q, p)) / 2,
                "jsd": lambda p, q: _jensen_shannon(p, q, self.beta),
            }[self.form](log_p, log_q)
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])


def _jensen_shannon(log_p, log_q, beta):
    log_m = np.logaddexp(math.log(beta) + log_p, math.log(1 - beta) + log_q)
    return beta * divergence(log_p, log_m) + (1 - beta) * divergence(log_q, log_m)
