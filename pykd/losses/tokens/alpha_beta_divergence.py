"""Alpha-beta divergence: two exponents lead from the forward to the reverse KL divergence, and beyond."""

from collections.abc import Mapping

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
from pykd.definition.reference import log_softmax, reduce_samples, rows
from pykd.fused.description import DIVERGENCE, KernelPoint


def _power(log: Tensor) -> Tensor:
    """exp, finite: of negative exponents nothing above e⁶⁰ comes."""
    return torch.exp(_at_most_60(log))


def _at_most_60(x: Tensor) -> Tensor:
    """As ``clamp``, whose gradient would be 0 where x is NaN."""
    return torch.where(x > 60.0, 60.0, x)


def _divergence(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """Σ over classes; see :class:`AlphaBetaDivergence`."""
    absent = (log_p == float("-inf")) & (log_q == float("-inf"))
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    if alpha == 0 and beta == 0:
        terms = 0.5 * (log_q - log_p) * (log_q - log_p)
    elif alpha == 0:
        power_q = _power(beta * log_q)
        difference = _power(beta * log_p) - power_q
        terms = (ops.product_or_zero(power_q, beta * (log_q - log_p)) + difference) / (beta * beta)
    elif beta == 0:
        power_p = _power(alpha * log_p)
        difference = _power(alpha * log_q) - power_p
        terms = (ops.product_or_zero(power_p, alpha * (log_p - log_q)) + difference) / (alpha * alpha)
    elif alpha + beta == 0:
        log_ratio = _at_most_60(alpha * (log_p - log_q))
        terms = (torch.exp(log_ratio) - 1 - log_ratio) / (alpha * alpha)
    else:
        # Finite logarithms, so that exponents of both signs have a sum; and differences, which are exactly 0 where p = q.
        x, y = log_p.clamp(min=-1e30), log_q.clamp(min=-1e30)
        power_p = _power(alpha * x + beta * x)
        of_q, of_both = _power(alpha * y + beta * y) - power_p, _power(alpha * x + beta * y) - power_p
        terms = (beta / (alpha + beta) * of_q - of_both) / (alpha * beta)
    return ops.at_least_0(terms.sum(dim=-1))


def _rows(student: Tensor, teacher: Tensor, temperature: float, form: str, alpha: float, beta: float) -> Tensor:
    """One value per row; see :class:`AlphaBetaDivergence`."""
    log_q = torch.log_softmax(ops.soften(student, temperature), dim=-1)
    log_p = torch.log_softmax(ops.soften(teacher.detach(), temperature), dim=-1)
    return _divergence(log_p, log_q, alpha, beta)


def alpha_beta_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
    limits: str,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """Divergence with an exponent for each side; see :class:`AlphaBetaDivergence`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits, weight)
    values = _rows(student, teacher, temperature, "alpha_beta", alpha, beta)
    if limits == "authors":
        if alpha != 0 and (beta == 0 or alpha + beta == 0):
            values = values * alpha
        elif alpha == 0 and beta != 0:
            values = values * beta
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(alpha_beta_divergence)
class AlphaBetaDivergence(Loss):
    r"""Divergence with two exponents, of which the forward and the reverse KL divergence are corners.

    .. math:: \ell_b = -\frac{1}{\alpha \beta} \sum_c \left( p_c^\alpha q_c^\beta - \frac{\alpha}{\alpha + \beta}
              p_c^{\alpha + \beta} - \frac{\beta}{\alpha + \beta} q_c^{\alpha + \beta} \right), \quad
              p = \mathrm{softmax}(t/T), \; q = \mathrm{softmax}(s/T)

    and, where that is 0/0, its limit:

    - β = 0: :math:`\frac{1}{\alpha^2} \sum_c (p_c^\alpha \log \frac{p_c^\alpha}{q_c^\alpha} - p_c^\alpha + q_c^\alpha)`,
      the forward KL divergence at α = 1;
    - α = 0: :math:`\frac{1}{\beta^2} \sum_c (q_c^\beta \log \frac{q_c^\beta}{p_c^\beta} - q_c^\beta + p_c^\beta)`,
      the reverse one at β = 1;
    - α + β = 0: :math:`\frac{1}{\alpha^2} \sum_c (\frac{p_c^\alpha}{q_c^\alpha} - 1 - \log \frac{p_c^\alpha}{q_c^\alpha})`;
    - α = β = 0: :math:`\frac12 \sum_c (\log p_c - \log q_c)^2`.

    α + β = 1 are the α-divergences, α = 1 the β-divergences; α = β = ½ is 4 times the squared Hellinger distance. A smaller
    α + β lets unlikely classes count more, a larger α the classes that the student underestimates.

    Args:
        temperature: T > 0; larger is softer. The paper has 1.
        alpha: α, from −5 to 5, the exponent of the teacher.
        beta: β, from −5 to 5, the exponent of the student.
        limits: what holds where α, β or α + β is 0: ``"exact"``, or ``"authors"``, as in their code: with 1/α in the place of
            1/α² (1/β for 1/β²), so α or β times as much, which is no limit of the formula but for α = 1 or β = 1, and
            negative for a negative one.
        tau_squared: whether to multiply by T². Off by default.
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
        At least 0, no unit; 0 when q = p; a scalar unless ``reduction="none"``. A class that both rule out (−inf) is as good as
        absent. Finite where α and β are above 0; powers of negative exponents are cut off at e⁶⁰. Close to a limit but not
        in it digits are lost as 1 / |αβ| grows: take the limit. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, exponents out of range, shapes that do not fit, an empty batch.

    The kernel computes α and β above 0; anything else is computed by the formula.

    Who differs: ABKD's code: see ``limits``; it leaves out classes with infinite logits.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> AlphaBetaDivergence()(student, teacher)
        tensor(0.4441)
        >>> AlphaBetaDivergence(alpha=1.0, beta=0.0)(student, teacher)
        tensor(0.3278)

    References:
        Wang et al.: ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via α-β-Divergence,
        2025, arXiv:2505.04560; Cichocki, Cruces, Amari: Generalized Alpha-Beta Divergences and Their Application to Robust
        Nonnegative Matrix Factorization, Entropy, 2011 (the limits).
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(layouts={"student_logits": "batch tokens classes"}),
        Case({"alpha": 0.5, "beta": 0.0, "limits": "authors"}),
        Case({"alpha": 0.0, "beta": 0.4, "limits": "authors", "temperature": 2.0}),
        Case({"alpha": 0.3, "beta": -0.3}),
        Case(
            {"alpha": 0.0, "beta": 0.0, "temperature": 3.0, "tau_squared": True, "reduction": "sum"},
            optional=("sample_weight",),
        ),
    )
    aliases = ("ABKD", Alias("ab_div", limits="authors"), "ABDivergence")

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    alpha: float = number(default=0.2, minimum=-5.0, maximum=5.0)
    beta: float = number(default=0.7, minimum=-5.0, maximum=5.0)
    limits: str = choice(("exact", "authors"), default="exact")
    tau_squared: bool = flag(default=False)

    def covered_by_kernel(self, given: Mapping[str, Spec]) -> bool:
        return self.alpha > 0 and self.beta > 0

    def fused(self, kernel: KernelPoint, student_logits, teacher_logits, sample_weight, temperature):
        tensors = {"student": student_logits, "teacher": teacher_logits, "temperature": temperature}
        settings = {"form": "alpha_beta", "alpha": self.alpha, "beta": self.beta}
        values = kernel(DIVERGENCE, "value", _rows, tensors, settings, weight="weight")
        return ops.reduce_softened(
            values, ops.optional_weight(sample_weight), temperature, self.tau_squared, self.reduction
        )

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=True,
            symmetric=self.alpha == self.beta or "α and β change places",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        a, b = self.alpha, self.beta
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            log_p, log_q = log_softmax(t / self.temperature), log_softmax(s / self.temperature)
            terms = [self._term(x, y) for x, y in zip(log_p, log_q, strict=True) if not np.isneginf([x, y]).all()]
            value = sum(terms) * ((a or b or 1.0) if self.limits == "authors" and 0 in (a, b, a + b) else 1.0)
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])

    def _term(self, log_p, log_q):
        """What one class adds."""
        a, b = self.alpha, self.beta

        def power(p_exponent, q_exponent):  # p^… q^…, of which negative exponents make no more than e⁶⁰
            exponents = [(e, x) for e, x in ((p_exponent, log_p), (q_exponent, log_q)) if e != 0]
            return np.exp(min(sum(e * x for e, x in exponents), 60.0))

        if a == 0 and b == 0:
            return (log_p - log_q) ** 2 / 2
        if a == 0:
            logarithm = b * (log_q - log_p) if power(0, b) != 0 else 0.0
            return (power(0, b) * logarithm - power(0, b) + power(b, 0)) / b**2
        if b == 0:
            logarithm = a * (log_p - log_q) if power(a, 0) != 0 else 0.0
            return (power(a, 0) * logarithm - power(a, 0) + power(0, a)) / a**2
        if a + b == 0:
            return (power(a, -a) - 1 - min(a * (log_p - log_q), 60.0)) / a**2
        return -(power(a, b) - a / (a + b) * power(a + b, 0) - b / (a + b) * power(0, a + b)) / (a * b)
