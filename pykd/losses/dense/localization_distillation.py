"""Localization distillation: where the teacher expects the edges of a box."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, flag, ops, register, scalar
from pykd.definition.reference import divergence, log_softmax, reduce_samples, rows
from pykd.fused.description import SOFT_TARGET, KernelPoint

BINS = ("sum", "mean")


def localization_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    tau_squared: bool,
    over_bins: str,
    reduction: str,
) -> Tensor:
    """Divergence of the distributions of box edges; see :class:`LocalizationDistillation`."""
    weight = ops.optional_weight(sample_weight)
    student = ops.without_left_out(student_logits, weight)
    teacher = ops.without_left_out(teacher_logits, weight)
    values = ops.softened_divergence(student, teacher, temperature)
    if over_bins == "mean":
        values = values / student.size(-1)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(localization_distillation)
class LocalizationDistillation(Loss):
    r"""KL divergence between the teacher's and the student's distributions of where an edge of a box lies, over bins.

    .. math:: \ell_b = T^2 \sum_n p_{bn} (\log p_{bn} - \log q_{bn}), \quad
              p = \mathrm{softmax}(t / T), \; q = \mathrm{softmax}(s / T)

    for an edge b and the bins n of its distance from the point that predicts it, as heads with a distribution per edge
    (generalized focal loss) have them.

    Args:
        temperature: T > 0; larger is softer.
        tau_squared: whether to multiply by T².
        over_bins: ``"sum"``, as a divergence has it, or ``"mean"``: divided by the number of bins, as the authors' code.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)`` or
            ``(batch, edges)``.

    Inputs:
        student_logits: ``(batch, bins)``, an edge a row, or ``(batch, edges, bins)``, a box an entry, where each edge is a sample;
            any floating type; receives the gradient. −inf masks a bin.
        teacher_logits: the same shape and type; constant.
        sample_weight: optional ``(batch,)`` or ``(batch, edges)``, at least 0, of any floating type, or a mask (bool or
            integers), such as the quality of a box, or whether it lies in the valuable region; constant. A sample of weight 0
            has no part in value and gradient, whatever it holds.

    Returns:
        Nats (times T² with ``tau_squared``), at least 0; a scalar unless ``reduction="none"``. float32 for half-precision
        inputs, which are computed in float32. A bin that the teacher rules out (−inf) adds 0 whatever the student says; one
        that only the student rules out gives +inf. NaN in an input gives NaN.

    The kernel computes the sum over bins; the mean is computed by the formula.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: the authors' KnowledgeDistillationKLDivLoss (also in MMDetection) divides by the number of bins, 17:
    ``over_bins="mean"``. Its ``avg_factor`` is a divisor of one's own: ``reduction="sum"``, and divide.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 2.0]])
        >>> LocalizationDistillation(temperature=2.0)(student, teacher)
        tensor(0.4438)
        >>> LocalizationDistillation(temperature=2.0, over_bins="mean")(student, teacher)
        tensor(0.2219)

    References:
        Zheng et al.: Localization Distillation for Dense Object Detection, CVPR 2022, arXiv:2102.12252.
    """

    inputs = {
        "student_logits": Spec("batch bins", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch bins", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch edges")
    cases = (
        Case(),
        Case({"temperature": 3.0, "tau_squared": False, "reduction": "sum"}, optional=("sample_weight",)),
        Case(
            {"over_bins": "mean"},
            layouts={"student_logits": "batch edges bins"},
            optional=("sample_weight",),
        ),
    )
    aliases = ("LD", Alias("KnowledgeDistillationKLDivLoss", over_bins="mean"))

    temperature: float = scalar(default=10.0, minimum=0.0, exclusive=True)
    tau_squared: bool = flag(default=True)
    over_bins: str = choice(BINS, default="sum")

    def covered_by_kernel(self, given: Mapping[str, Spec]) -> bool:
        return self.over_bins == "sum"

    def fused(self, kernel: KernelPoint, student_logits, teacher_logits, sample_weight, temperature):
        tensors = {"student": student_logits, "teacher": teacher_logits, "temperature": temperature}
        values = kernel(SOFT_TARGET, "soft", ops.softened_divergence, tensors, {"form": "kl"}, weight="soft_weight")
        return ops.reduce_softened(
            ops.at_least_0(values), ops.optional_weight(sample_weight), temperature, self.tau_squared, self.reduction
        )

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=self.over_bins == "sum" or "a bin more is one more to divide by",
            zero_when_equal=True,
            symmetric="the teacher weighs the logarithms",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        factor = self.temperature**2 if self.tau_squared else 1.0
        if self.over_bins == "mean":
            factor = factor / np.shape(student_logits)[-1]
        values = []
        for s, t in zip(rows(student_logits, 1), rows(teacher_logits, 1), strict=True):
            values.append(factor * divergence(log_softmax(t / self.temperature), log_softmax(s / self.temperature)))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
