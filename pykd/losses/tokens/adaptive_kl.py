"""Adaptive KL divergence: forward and reverse, weighed by where student and teacher differ."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, choice, flag, number, ops, register, scalar
from pykd.definition.reference import divergence, log_softmax, reduce_samples, rows
from pykd.fused.description import DIVERGENCE, KernelPoint


def _shares(log_p: Tensor, log_q: Tensor, head_mass: float, boundary: str) -> tuple[Tensor, Tensor]:
    """What the forward and the reverse divergence count for; both 0 where p = q."""
    axis = log_p.dim() - 1
    p = torch.exp(log_p)
    differences = (p - torch.exp(log_q)).abs()
    falling = torch.sort(p, dim=axis, descending=True)[0]
    reached = torch.cumsum(falling, dim=axis)
    first = torch.arange(p.size(axis), device=p.device) == 0
    of_head = (reached - falling < head_mass if boundary == "head" else reached <= head_mass) | first
    # Of the classes with the head's least probability the first ones: what order the sort leaves equal ones in is open.
    least = torch.where(of_head, falling, 2.0).amin(dim=axis, keepdim=True)
    count = (of_head & (falling == least)).to(p.dtype).sum(dim=axis, keepdim=True)
    equal = p == least
    in_head = (p > least) | (equal & (torch.cumsum(equal.to(p.dtype), dim=axis) <= count))
    head = torch.where(in_head, differences, 0.0).sum(dim=-1)
    tail = torch.where(in_head, 0.0, differences).sum(dim=-1)
    total = head + tail
    total = torch.where(total == 0, 1.0, total)
    return head / total, tail / total


def _rows(student: Tensor, teacher: Tensor, temperature: float, form: str, head_mass: float, boundary: str) -> Tensor:
    """One value per row; see :class:`AdaptiveKL`."""
    log_q = torch.log_softmax(ops.soften(student, temperature), dim=-1)
    log_p = torch.log_softmax(ops.soften(teacher.detach(), temperature), dim=-1)
    forward, reverse = _shares(log_p, log_q.detach(), head_mass, boundary)
    values = ops.product_or_zero(forward, ops.forward_kl(log_p, log_q, temperature))
    return values + ops.product_or_zero(reverse, ops.reverse_kl(log_p, log_q, temperature))


def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    head_mass: float,
    boundary: str,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """Forward and reverse KL divergence, each with a weight of its own per sample; see :class:`AdaptiveKL`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits, weight)
    values = _rows(student, teacher, temperature, "adaptive_kl", head_mass, boundary)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(adaptive_kl)
class AdaptiveKL(Loss):
    r"""Mixture of forward and reverse KL divergence whose weights say how much student and teacher differ in head and tail.

    .. math:: \ell_b = \frac{g_h \mathrm{KL}(p \Vert q) + g_t \mathrm{KL}(q \Vert p)}{g_h + g_t}, \quad
              g_h = \sum_{c \in \text{head}} |p_c - q_c|, \; g_t = \sum_{c \notin \text{head}} |p_c - q_c|

    with p = softmax(t / T) and q = softmax(s / T). The head is the teacher's likeliest classes that together reach the
    mass μ. The weights are constants: no gradient flows through them.

    Args:
        temperature: T > 0; larger is softer. The paper has 1.
        head_mass: μ, above 0 and below 1.
        boundary: whose the class is with which the mass μ is passed: ``"head"``, as in the paper, or ``"tail"``, as in its
            authors' code, where the likeliest class alone is always of the head.
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
        Nats, at least 0; 0 when q = p; a scalar unless ``reduction="none"``. +inf where one of the two rules out (−inf) a class
        that the other does not, as far as the divergence for which that is so has a weight. Classes to which the teacher gives one
        probability are in the order of their numbers. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, a μ that is not between 0 and 1, shapes that do not fit, an empty
            batch.

    Who differs: DSKD sums from the smallest probability, and calls 1 − μ ``adaptive_kl_alpha``: at 0.5 it is this default.
    The authors' code gives 0/0 where p = q, and leaves out classes with infinite logits.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 1.0]])
        >>> AdaptiveKL()(student, teacher)
        tensor(0.2876)
        >>> AdaptiveKL(head_mass=0.7)(student, teacher)
        tensor(0.2819)

    References:
        Wu et al.: Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models, 2024,
        arXiv:2404.02657.
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
            {"temperature": 2.0, "head_mass": 0.7, "boundary": "tail", "tau_squared": True, "reduction": "sum"},
            optional=("sample_weight",),
        ),
    )
    aliases = ("AKL",)

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    head_mass: float = number(default=0.5, above=0.0, below=1.0)
    boundary: str = choice(("head", "tail"), default="head")
    tau_squared: bool = flag(default=False)

    def fused(self, kernel: KernelPoint, student_logits, teacher_logits, sample_weight, temperature):
        tensors = {"student": student_logits, "teacher": teacher_logits, "temperature": temperature}
        settings = {"form": "adaptive_kl", "head_mass": self.head_mass, "boundary": self.boundary}
        values = kernel(DIVERGENCE, "value", _rows, tensors, settings, weight="weight")
        return ops.reduce_softened(
            values, ops.optional_weight(sample_weight), temperature, self.tau_squared, self.reduction
        )

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=True,
            symmetric="the head is the teacher's",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None, shares=None):
        values = []
        for i, (s, t) in enumerate(zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True)):
            log_q, log_p = log_softmax(s / self.temperature), log_softmax(t / self.temperature)
            forward, reverse = self._numpy_shares(log_p, log_q) if shares is None else shares[i]
            value = 0.0
            for share, (a, b) in ((forward, (log_p, log_q)), (reverse, (log_q, log_p))):
                value += share * divergence(a, b) if share != 0 else 0.0
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])

    def constants(self, student_logits, teacher_logits, sample_weight=None):
        """The weights, through which no gradient flows."""
        pairs = zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True)
        return {
            "shares": [
                self._numpy_shares(log_softmax(t / self.temperature), log_softmax(s / self.temperature))
                for s, t in pairs
            ]
        }

    def _numpy_shares(self, log_p, log_q):
        """Class by class, from the likeliest on."""
        p, q = np.exp(log_p), np.exp(log_q)
        head = tail = mass = 0.0
        for rank, c in enumerate(np.argsort(-p, kind="stable")):
            if rank == 0 or (mass < self.head_mass if self.boundary == "head" else mass + p[c] <= self.head_mass):
                head += abs(p[c] - q[c])
            else:
                tail += abs(p[c] - q[c])
            mass += p[c]
        total = head + tail
        return (head / total, tail / total) if total != 0 else (0.0, 0.0)
