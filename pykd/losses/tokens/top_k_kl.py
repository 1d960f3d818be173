"""KL divergence to a teacher of which only the k likeliest tokens are known."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, flag, ops, register, scalar
from pykd.definition.reference import log_softmax, reduce_samples, rows
from pykd.fused.description import TOP_K, KernelPoint
from pykd.losses.tokens._shared import take, within

CONVENTIONS = ("tail", "ghost", "renormalized", "zero", "unnormalized")


def _log_mass_outside(log_q: Tensor, ids: Tensor, present: Tensor) -> Tensor:
    """log Σ q over the classes that no entry names, as exact as q where that is small; −inf where there is none."""
    axis = log_q.dim() - 1
    entries = torch.zeros_like(log_q).scatter_add(axis, within(ids, log_q.size(axis)), present.to(log_q.dtype))
    rest = torch.where(entries == 0, log_q, float("-inf"))
    largest = rest.detach().amax(dim=-1, keepdim=True)
    nothing = largest == float("-inf")
    shift = torch.where(nothing, 0.0, largest)
    total = torch.exp(rest - shift).sum(dim=-1, keepdim=True)
    return torch.where(nothing, float("-inf"), shift + torch.log(torch.where(nothing, 1.0, total)))


def _believable(given: Tensor, convention: str) -> Tensor:
    """The teacher's values, and NaN for a sample whose probabilities sum to more than 1.05: logits must not pass for logarithms."""
    given = given.detach()
    if convention == "renormalized" or convention == "zero":
        return given
    mass = torch.exp(ops.upcast(given)).sum(dim=-1, keepdim=True)
    return torch.where(mass > 1.05, float("nan"), given)


def _rows(student: Tensor, teacher: Tensor, ids: Tensor, temperature: float, form: str) -> Tensor:
    """One value per row; see :class:`TopKKL`."""
    given = ops.upcast(teacher)
    present = given != float("-inf")
    if form == "renormalized" or form == "zero":  # a row without an entry has no distribution: its gradient is NaN, too
        present = present | ~present.any(dim=-1, keepdim=True)
    if form == "renormalized":
        chosen = torch.where(present, take(ops.upcast(student), ids), float("-inf"))
        log_q = torch.log_softmax(ops.soften(chosen, temperature), dim=-1)
        return ops.forward_kl(torch.log_softmax(ops.soften(given, temperature), dim=-1), log_q, temperature)
    log_q_of_all = torch.log_softmax(ops.soften(student, temperature), dim=-1)
    log_q = torch.where(present, take(log_q_of_all, ids), float("-inf"))
    if form == "zero":
        log_p = torch.log_softmax(ops.soften(given, temperature), dim=-1)
        return ops.negative_of(ops.expectation(torch.exp(log_p), log_q - log_p))
    if form == "unnormalized":
        return -ops.expectation(torch.exp(given), log_q - given)
    log_q_outside = _log_mass_outside(log_q_of_all, ids, present)
    mass = torch.exp(given).sum(dim=-1, keepdim=True)
    outside = (1.0 - mass).clamp(min=0.0)
    if form == "ghost":
        outside, log_q_outside = outside.clamp(min=1e-8), torch.log(torch.exp(log_q_outside).clamp(min=1e-8))
    else:  # what is left of 1 by rounding is no tail where there is no class that it could be of
        outside = torch.where((log_q_outside == float("-inf")) & (outside < 1e-5), 0.0, outside)
    log_p = torch.cat([given, torch.log(outside)], dim=-1)
    excess = (mass.squeeze(-1) - 1.0).clamp(min=0.0)
    return ops.forward_kl(log_p, torch.cat([log_q, log_q_outside], dim=-1), temperature, excess=excess)


def top_k_kl(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_ids: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    convention: str,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """KL divergence over the teacher's k likeliest classes, and what it takes the others for; see :class:`TopKKL`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    given = _believable(ops.without_left_out(teacher_log_probs, weight), convention)
    values = _rows(student, given, teacher_ids, temperature, convention)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(top_k_kl)
class TopKKL(Loss):
    r"""Forward KL divergence to a teacher of which only the log-probabilities of its k likeliest tokens are known.

    .. math:: \ell_b = \sum_{i=1}^k p_{bi} \log \frac{p_{bi}}{q_{b, \mathrm{id}(b, i)}}
              + p_b^\ast \log \frac{p_b^\ast}{q_b^\ast}, \quad
              p_b^\ast = 1 - \sum_i p_{bi}, \; q_b^\ast = \sum_{c \text{ is no } \mathrm{id}(b, i)} q_{bc}, \;
              q = \mathrm{softmax}(s/T)

    That is ``convention="tail"``: one more class, the tail, has what is outside of the entries, on both sides. It alone is
    a divergence on the vocabulary: at least 0, at most the full KL divergence, and 0 only where student and teacher agree on
    the entries. Others are in use:

    - ``"ghost"``: the same, and neither tail has less than 10⁻⁸, which keeps the value finite.
    - ``"renormalized"``: both sides are distributions on the entries alone: p = softmax(values / T) and q = softmax of the
      student's logits at the ids, over T. How much mass the student has elsewhere does not count.
    - ``"zero"``: the teacher is renormalised on the entries, p = softmax(values / T), and takes every other class for
      impossible; q stays a distribution on the vocabulary. At least −log Σ q over the entries.
    - ``"unnormalized"``: the sum over the entries of the formula and nothing else. It may be negative.

    Args:
        temperature: T > 0; larger is softer. It divides the student's logits, and the teacher's values where those are
            renormalised. The other conventions take these as they are: for T ≠ 1 pass those of softmax(t / T).
        convention: ``"tail"``, ``"ghost"``, ``"renormalized"``, ``"zero"`` or ``"unnormalized"``.
        tau_squared: whether to multiply by T². Off by default.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1, so the mean over kept tokens; ``"sum"``;
            ``"none"``: ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. All classes of the vocabulary; −inf masks one.
        teacher_log_probs: ``(batch, top_k)`` or ``(batch, tokens, top_k)``, same type; constant. log p of the entries, by a
            softmax over the teacher's whole vocabulary; ``"renormalized"`` and ``"zero"`` take logits as well. −inf: an entry that
            is not there, as where a token has fewer than k; its id counts for nothing.
        teacher_ids: the same shape, int64: the classes of the entries, from 0 to classes − 1. Those of one sample differ, which is
            not checked: a class that is there twice counts twice.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers), such as ``labels != -100``; constant. A sample of weight 0 has no part in value and gradient,
            whatever it holds.

    Returns:
        Nats; at least 0 but for ``"unnormalized"``; a scalar unless ``reduction="none"``. +inf where the student rules out
        (−inf) an entry, or (``"tail"``) all of what is outside. NaN where probabilities sum to more than 1.05, since then they
        are none (``"tail"``, ``"ghost"``, ``"unnormalized"``), and where an input has NaN.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch, fewer than 2 classes, or an
            id out of range (on the CPU; on a GPU, which is not waited for, in compiled code and in exported files run elsewhere,
            the loss is NaN).

    Who differs: Megatron-LM's cached logits have ``"unnormalized"``, or ``"ghost"`` on request; TRL's tail bucket is
    ``"tail"`` with tails of at least 10⁻⁷; Model-Optimizer's ``TopKLogitsKLLoss``, ms-swift and NeMo-RL have
    ``"renormalized"``; DistillKit has ``"zero"``, or ``"tail"`` by the name SYMMETRIC_UNIFORM, whose temperature softens the
    teacher's k + 1 masses, and T² in both; axolotl has ``"zero"`` or, without ``normalize_topk``, ``"unnormalized"``, and divides by
    the number of entries: k times less. Masses outside that are computed as 1 − Σ q, as all of them do, lose digits where they are
    small.

    Example:
        >>> student = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> log_probs, ids = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[2, 0]])
        >>> TopKKL()(student, log_probs, ids)
        tensor(0.1733)
        >>> [round(TopKKL(convention=name)(student, log_probs, ids).item(), 4) for name in ("renormalized", "zero")]
        [0.0566, 0.7498]

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531 (the divergence); Anshumann et
        al.: Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs, 2025, arXiv:2503.16870 (what the
        conventions do to a student).
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits"),
        "teacher_log_probs": Spec("batch top_k", draw="partial_log_probabilities"),
        "teacher_ids": Spec("batch top_k", dtype="int64", index_of="classes", draw="different_indices"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    least_lengths = {"classes": 2}
    cases = (
        Case(),
        Case({"convention": "ghost", "temperature": 2.0, "tau_squared": True}, optional=("sample_weight",)),
        Case(
            {"convention": "renormalized", "temperature": 3.0, "reduction": "sum"},
            layouts={"student_logits": "batch tokens classes"},
            optional=("sample_weight",),
        ),
        Case({"convention": "zero", "temperature": 1.5}),
        Case({"convention": "unnormalized"}),
    )
    aliases = (
        "SparseKL",
        Alias("topk_kl_div", convention="unnormalized"),
        Alias("TopKLogitsKLLoss", convention="renormalized"),
        Alias("sparse_kl_div", convention="zero"),
    )

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    convention: str = choice(CONVENTIONS, default="tail")
    tau_squared: bool = flag(default=False)

    def fused(self, kernel: KernelPoint, student_logits, teacher_log_probs, teacher_ids, sample_weight, temperature):
        tensors = {
            "student": student_logits,
            "teacher": _believable(teacher_log_probs, self.convention),
            "ids": teacher_ids,
            "temperature": temperature,
        }
        values = kernel(TOP_K, "value", _rows, tensors, {"form": self.convention}, weight="weight")
        return ops.reduce_softened(
            values, ops.optional_weight(sample_weight), temperature, self.tau_squared, self.reduction
        )

    def properties(self) -> Properties:
        return Properties(logit_shift=True, masked_classes=True)

    def reference(self, student_logits, teacher_log_probs, teacher_ids, sample_weight=None):
        values = []
        for s, given, ids in zip(
            rows(student_logits, 1), rows(teacher_log_probs, 1), rows(teacher_ids, 1), strict=True
        ):
            log_q_of_all = log_softmax(s / self.temperature)
            log_q, p = log_q_of_all[ids], np.exp(given)
            if self.convention in ("renormalized", "zero"):
                p = np.exp(log_softmax(given / self.temperature))
            if self.convention == "renormalized":
                log_q = log_softmax(s[ids] / self.temperature)
            pairs = list(zip(p, log_q, strict=True))
            if self.convention in ("tail", "ghost"):
                p_outside = max(1 - sum(p), 0.0)
                log_q_outside = np.logaddexp.reduce([log_q_of_all[c] for c in range(len(s)) if c not in ids])
                if self.convention == "ghost":
                    p_outside, log_q_outside = max(p_outside, 1e-8), max(log_q_outside, np.log(1e-8))
                pairs.append((p_outside, log_q_outside))
            value = sum(a * (np.log(a) - log_b) for a, log_b in pairs if a != 0)
            values.append(value * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
