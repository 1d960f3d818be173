"""List-wise KL divergence: how the student shares its preference among the candidates of a query, beside the teacher."""

from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, flag, ops, register, scalar
from pykd.definition.reference import divergence, log_softmax, reduce_samples
from pykd.fused.description import SOFT_TARGET, KernelPoint


def listwise_kl(
    student_scores: Tensor,
    teacher_scores: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """KL divergence of softmaxes over candidates; see :class:`ListwiseKL`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_scores, weight)
    teacher = ops.without_left_out(teacher_scores.detach(), weight)
    return ops.reduce_softened(
        ops.softened_divergence(student, teacher, temperature), weight, temperature, tau_squared, reduction
    )


@register(listwise_kl)
class ListwiseKL(Loss):
    r"""KL divergence between the teacher's and the student's softmax over the candidates of a query.

    .. math:: \ell_b = T^2 \sum_i p_{bi} \log \frac{p_{bi}}{q_{bi}}, \quad p = \mathrm{softmax}(t/T), \;
              q = \mathrm{softmax}(s/T)

    with the scores s and t of the candidates, such as passages: the positive one and negatives, in any order. It is the
    divergence of soft targets, of scores in the place of logits.

    Args:
        temperature: T > 0; larger is softer.
        tau_squared: whether to multiply by T².
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_scores: ``(batch, candidates)``, any floating type; receives the gradient.
        teacher_scores: the same shape and type; constant. −inf in both: a candidate that is not there, as in lists of different
            lengths.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats (times T²), at least 0; 0 where the scores agree but for an offset; a scalar unless ``reduction="none"``. +inf
        where the student alone rules out (−inf) a candidate. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: sentence-transformers' ``DistillKLDivLoss`` is the same, from embeddings, and averages over the batch.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> ListwiseKL(temperature=2.0)(student, teacher)
        tensor(0.4438)

    References:
        Lin, Yang, Lin: Distilling Dense Representations for Ranking using Tightly-Coupled Teachers, 2020, arXiv:2010.11386.
    """

    inputs = {
        "student_scores": Spec("batch candidates", grad=True, draw="logits", like="teacher_scores"),
        "teacher_scores": Spec("batch candidates", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case({"temperature": 2.0}),
        Case({"tau_squared": False, "reduction": "sum", "temperature": 3.0}, optional=("sample_weight",)),
    )
    aliases = ("DistillKLDivLoss", "DistillKLDiv")

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    tau_squared: bool = flag(default=True)

    def fused(self, kernel: KernelPoint, student_scores, teacher_scores, sample_weight, temperature):
        tensors = {"student": student_scores, "teacher": teacher_scores, "temperature": temperature}
        values = kernel(SOFT_TARGET, "soft", ops.softened_divergence, tensors, {"form": "kl"}, weight="soft_weight")
        return ops.reduce_softened(
            ops.at_least_0(values), ops.optional_weight(sample_weight), temperature, self.tau_squared, self.reduction
        )

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=True,
            symmetric="the teacher weighs the logarithms",
        )

    def reference(self, student_scores, teacher_scores, sample_weight=None):
        values = []
        for s, t in zip(student_scores, teacher_scores, strict=True):
            log_q, log_p = log_softmax(s / self.temperature), log_softmax(t / self.temperature)
            values.append(divergence(log_p, log_q) * (self.temperature**2 if self.tau_squared else 1.0))
        return reduce_samples(values, sample_weight, self.reduction)
