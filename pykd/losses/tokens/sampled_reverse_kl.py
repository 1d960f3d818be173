"""Reverse KL divergence from one token that the student has drawn: its log-probability, times by how much the teacher's is less."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register, scalar
from pykd.definition.reference import log_softmax, reduce_samples, rows
from pykd.fused.description import TOP_K, KernelPoint
from pykd.losses.tokens._shared import take


def _rows(student: Tensor, teacher: Tensor, ids: Tensor, temperature: float, form: str) -> Tensor:
    """One value per row, of each of whose classes drawn the ids are; see :class:`SampledReverseKL`."""
    log_q = take(torch.log_softmax(ops.soften(student, temperature), dim=-1), ids)
    return ((log_q.detach() - ops.upcast(teacher)) * log_q).sum(dim=-1)


def sampled_reverse_kl(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    sampled_ids: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    reduction: str,
) -> Tensor:
    """Log-probability of the drawn class times its log-ratio to the teacher's, a constant; see :class:`SampledReverseKL`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    log_p = ops.without_left_out(teacher_log_probs.detach(), weight)
    values = _rows(student, log_p.unsqueeze(-1), sampled_ids.unsqueeze(-1), temperature, "sampled")
    return ops.reduce(values, weight, reduction)


@register(sampled_reverse_kl)
class SampledReverseKL(Loss):
    r"""What stands in for the reverse KL divergence where only the teacher's log-probability of each drawn token is known.

    .. math:: \ell_b = \mathrm{sg}(\log q_{by} - \log p_{by}) \, \log q_{by}, \quad q = \mathrm{softmax}(s/T)

    with the class y that was drawn from q, and sg for what no gradient flows through. The mean of its gradient over y is
    the gradient of KL(q‖p). Its value is no divergence: it may be negative, and says nothing of how far student
    and teacher are apart.

    Args:
        temperature: T > 0, of the student: that at which y was drawn. The teacher's log-probability is taken as it is.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1, so the mean over kept tokens; ``"sum"``;
            ``"none"``: ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. −inf masks a class.
        teacher_log_probs: ``(batch,)`` or ``(batch, tokens)``, same type; constant: log p of the class that was drawn.
        sampled_ids: the same shape, int64: y, from 0 to classes − 1.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers), such as that of the completion; constant. A sample of weight 0 has no part in value and gradient,
            whatever it holds.

    Returns:
        Squared nats, of any sign; a scalar unless ``reduction="none"``. 0 with a zero gradient where p = q for the class drawn.
        Not finite where the student or the teacher rules that class out. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch, or a class out of range (on
            the CPU; on a GPU, which is not waited for, in compiled code and in exported files run elsewhere, the loss is NaN).

    Who differs: TRL's ``sampled_token`` mode of self-distillation is this, at T = 1. The estimator k1, log q − log p, which is
    logged often, has the divergence for its mean, and no such gradient.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
        >>> loss = SampledReverseKL()(logits, torch.tensor([0.5]).log(), torch.tensor([2]))
        >>> round(loss.item(), 4)
        0.9609
        >>> loss.backward()
        >>> logits.grad
        tensor([[ 0.1733,  0.1733, -0.5199,  0.1733]])

    References:
        Gu et al.: MiniLLM, 2023, arXiv:2306.08543; Williams: Simple Statistical Gradient-Following Algorithms for
        Connectionist Reinforcement Learning, Machine Learning, 1992.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits"),
        "teacher_log_probs": Spec("batch", draw="partial_log_probabilities"),
        "sampled_ids": Spec("batch", dtype="int64", index_of="classes", draw="indices"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(layouts={"student_logits": "batch tokens classes"}),
        Case(
            {"temperature": 2.0, "reduction": "sum"},
            optional=("sample_weight",),
        ),
    )
    aliases = ("SampledTokenRKL", "OnPolicyReverseKL")

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)

    def fused(self, kernel: KernelPoint, student_logits, teacher_log_probs, sampled_ids, sample_weight, temperature):
        tensors = {
            "student": student_logits,
            "teacher": teacher_log_probs.detach().unsqueeze(-1),
            "ids": sampled_ids.unsqueeze(-1),
            "temperature": temperature,
        }
        values = kernel(TOP_K, "value", _rows, tensors, {"form": "sampled"}, weight="weight")
        return ops.reduce(values, ops.optional_weight(sample_weight), self.reduction)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            distils="its value is not what its gradient is of: that is in the mean",
        )

    def reference(self, student_logits, teacher_log_probs, sampled_ids, sample_weight=None, log_ratios=None):
        ratios = log_ratios
        if ratios is None:
            ratios = self.constants(student_logits, teacher_log_probs, sampled_ids)["log_ratios"]
        drawn = zip(rows(student_logits, 1), np.ravel(sampled_ids), ratios, strict=True)
        values = [ratio * log_softmax(s / self.temperature)[y] for s, y, ratio in drawn]
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])

    def constants(self, student_logits, teacher_log_probs, sampled_ids, sample_weight=None):
        """log q − log p, through which no gradient flows."""
        drawn = zip(rows(student_logits, 1), np.ravel(teacher_log_probs), np.ravel(sampled_ids), strict=True)
        return {"log_ratios": [log_softmax(s / self.temperature)[y] - log_p for s, log_p, y in drawn]}
