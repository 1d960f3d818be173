"""Pixel-wise distillation: the teacher's class probabilities at every pixel."""

import numpy as np
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, flag, ops, register, scalar
from pykd.definition.reference import divergence, expectation, log_softmax, reduce_samples

FORMS = ("kl", "cross_entropy")


def pixel_wise(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    form: str,
    tau_squared: bool,
    reduction: str,
) -> Tensor:
    """Divergence between the class probabilities of every pixel; see :class:`PixelWise`."""
    weight = ops.optional_weight(sample_weight)
    per_pixel = weight is not None and weight.dim() == 3
    left_out = weight.unsqueeze(1) if weight is not None and per_pixel else weight  # beside the classes
    student = ops.without_left_out(student_logits, left_out)
    teacher = ops.without_left_out(teacher_logits, left_out)
    values = ops.softened_divergence(student, teacher, temperature, form, dim=1)
    if not per_pixel:
        values = values.flatten(1).mean(dim=1)
    return ops.reduce_softened(values, weight, temperature, tau_squared, reduction)


@register(pixel_wise)
class PixelWise(Loss):
    r"""KL divergence (or cross-entropy) of the student against the teacher's class probabilities, mean over the pixels.

    .. math:: \ell_b = \frac{1}{HW} \sum_{hw} \sum_c p_{bchw} (\log p_{bchw} - \log q_{bchw}), \quad
              p = \mathrm{softmax}_c(t / T), \; q = \mathrm{softmax}_c(s / T)

    With ``form="cross_entropy"`` :math:`-\sum_c p \log q` stands in the place of the divergence: the same gradient, and the
    entropy of the teacher more in the value.

    Args:
        temperature: T > 0; larger is softer. The paper has none: 1.
        form: ``"kl"`` or ``"cross_entropy"``.
        tau_squared: whether to multiply by T².
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``. Where
            ``sample_weight`` is per pixel every pixel is a sample: ``"mean"`` divides by the kept pixels of the whole batch,
            and ``"none"`` gives ``(batch, height, width)``.

    Inputs:
        student_logits: ``(batch, classes, height, width)``, any floating type; receives the gradient. −inf masks a class.
        teacher_logits: the same shape and type; constant. Resize one of them first where they differ in size.
        sample_weight: optional ``(batch,)``, or ``(batch, height, width)`` for pixels, at least 0, of any floating type, or a
            mask (bool or integers) such as ``labels != 255``; constant. A sample of weight 0 has no part in
            value and gradient, whatever it holds.

    Returns:
        Nats, at least 0; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which are computed in
        float32. A class that the teacher rules out (−inf) adds 0 whatever the student says; one that only the student rules
        out gives +inf. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, shapes that do not fit, an empty batch.

    Who differs: the authors' CriterionPixelWise is the cross-entropy, divided by height · width and not by the batch, as
    the alias here. CIRKD's CriterionKD, too, is the alias. TorchDistiller's averages over the classes as well: so
    many times less.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1)
        >>> PixelWise()(student, teacher)
        tensor(0.3278)
        >>> PixelWise(temperature=2.0, form="cross_entropy")(student, teacher)
        tensor(0.6931)

    References:
        Liu et al.: Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019, arXiv:1903.04197.
    """

    inputs = {
        "student_logits": Spec("batch classes height width", grad=True, draw="logits", like="teacher_logits"),
        "teacher_logits": Spec("batch classes height width", draw="logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch height width")
    cases = (
        Case(),
        Case({"temperature": 2.0, "tau_squared": True, "reduction": "sum"}, optional=("sample_weight",)),
        Case(
            {"form": "cross_entropy"},
            layouts={"sample_weight": "batch height width"},
            optional=("sample_weight",),
        ),
    )
    aliases = (
        Alias("CriterionPixelWise", form="cross_entropy", reduction="sum"),
        Alias("CriterionKD", tau_squared=True),
    )

    temperature: float = scalar(default=1.0, minimum=0.0, exclusive=True)
    form: str = choice(FORMS, default="kl")
    tau_squared: bool = flag(default=False)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=self.form == "kl" or "the entropy of the teacher is left",
            symmetric="the teacher weighs the logarithms",
        )

    def reference(self, student_logits, teacher_logits, sample_weight=None):
        factor = self.temperature**2 if self.tau_squared else 1.0
        pixels = []
        for s, t in zip(_pixels(student_logits), _pixels(teacher_logits), strict=True):
            log_q, log_p = log_softmax(s / self.temperature), log_softmax(t / self.temperature)
            pixels.append(factor * (divergence(log_p, log_q) if self.form == "kl" else -expectation(log_p, log_q)))
        batch, _, height, width = np.shape(student_logits)
        if np.ndim(sample_weight) == 3:
            return reduce_samples(pixels, sample_weight, self.reduction, (batch, height, width))
        images = np.reshape(pixels, (batch, -1)).mean(axis=1)
        return reduce_samples(images, sample_weight, self.reduction)


def _pixels(logits):
    """The logits of one pixel after the other."""
    return [image[:, h, w] for image in logits for h in range(image.shape[1]) for w in range(image.shape[2])]
