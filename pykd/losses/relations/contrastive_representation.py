"""Contrastive representation distillation: the teacher's embedding of the same sample against those of others."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, choice, number, ops, register, scalar
from pykd.definition.reference import reduce_samples, unit


def contrastive_representation(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    negatives: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    log_normalizer: float,
    form: str,
    reduction: str,
) -> Tensor:
    """Contrast with given negatives; see :class:`ContrastiveRepresentation`."""
    weight = ops.optional_weight(sample_weight)
    x = ops.normalize(ops.upcast(ops.without_left_out(student_embeddings, weight)), dim=[-1])
    y = ops.normalize(ops.upcast(ops.without_left_out(teacher_embeddings.detach(), weight)), dim=[-1])
    own = (x * y).sum(dim=-1) / temperature
    noise = ops.upcast(negatives.detach())
    if noise.dim() == 2:
        others = ops.matmul(x, noise.transpose(0, 1)) / temperature
    else:
        noise = ops.without_left_out(noise, weight)
        others = ops.matmul(noise, x.unsqueeze(2)).squeeze(2) / temperature
    if form == "info_nce":
        values = -logsigmoid(own - torch.logsumexp(others, dim=1))
    else:
        level = log_normalizer + torch.logsumexp(torch.zeros_like(others[0]), dim=0)  # the latter: log of their number
        values = -logsigmoid(own - level) - logsigmoid(level - others).sum(dim=1)
    return ops.reduce(values, weight, reduction)


@register(contrastive_representation)
class ContrastiveRepresentation(Loss):
    r"""Contrast of the student's embedding with the teacher's of the same sample and with given negatives (CRD).

    With the student's embedding x, the teacher's y, both over their lengths, and M negatives n:

    .. math:: \ell_b = -\log h(x_b, y_b) - \sum_{m=1}^{M} \log\big(1 - h(x_b, n_m)\big), \quad
              h(x, n) = \frac{e^{x \cdot n / T}}{e^{x \cdot n / T} + M c}

    which is noise-contrastive estimation of whether a pair is of one sample. Drawing the negatives from a bank and keeping that up to
    date is the caller's.

    Args:
        temperature: T > 0.
        log_normalizer: log c, the logarithm of the mean of exp(x · n / T) over noise. The authors take it once, of the first
            batch, and keep it (their Z is c times the size of the bank). ``"info_nce"`` has none.
        form: ``"noise_contrastive"``, as above, or ``"info_nce"``: the negative log of the softmax of x · y / T among itself
            and the x · n / T.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_embeddings: ``(batch, channels)`` of at least two channels, any floating type; receives the gradient.
        teacher_embeddings: ``(batch, channels)``, same type; constant. The positives.
        negatives: ``(entries, channels)``, the same for every sample, or ``(batch, entries, channels)``, same type; constant.
            Embeddings of the teacher's of other samples, of length 1 (they are taken as they are).
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats, at least 0 (though not 0 where student and teacher agree); a scalar unless ``reduction="none"``. float32 for
        half-precision inputs, which are computed in float32. An embedding of length 0 stays 0, with the gradient 0.
        NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, another form, shapes that do not fit, an empty batch.

    Who differs: the authors' code, RepDistiller, torchdistill and MMRazor add 1e-7 to the denominator of h (where both of its terms
    are over c times the size of the bank), learn a projection of each embedding inside, and add the same with the teacher's
    embedding against a bank of the student's, of which the student has no gradient. MMRazor does not apply its ``loss_weight``.

    Example:
        One negative, as near to the student as the positive: both are as likely as not.

        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> ContrastiveRepresentation()(student, teacher, torch.tensor([[0.0, -1.0]]))
        tensor(1.3863)

    References:
        Tian et al.: Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699.
    """

    inputs = {
        "student_embeddings": Spec("batch channels", grad=True, like="teacher_embeddings"),
        "teacher_embeddings": Spec("batch channels"),
        "negatives": (Spec("entries channels", draw="unit"), Spec("batch entries channels", draw="unit")),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case(),
        Case(
            {"temperature": 0.5, "log_normalizer": 0.5, "reduction": "sum"},
            layouts={"negatives": "batch entries channels"},
            optional=("sample_weight",),
        ),
        Case({"form": "info_nce"}),
    )
    least_lengths = {"channels": 2}  # of one channel a direction is but a sign
    aliases = ("CRD", "CRDLoss")

    temperature: float = scalar(default=0.07, minimum=0.0, exclusive=True)
    log_normalizer: float = number(default=0.0)
    form: str = choice(("noise_contrastive", "info_nce"), default="noise_contrastive")

    def properties(self) -> Properties:
        return Properties(
            feature_scale=True,
            zero_when_equal="the negatives are never out of question",
            symmetric="the student's embeddings alone are compared with the negatives",
        )

    def reference(self, student_embeddings, teacher_embeddings, negatives, sample_weight=None):
        """Sample by sample, from the definition."""
        values = []
        for b, (x, y) in enumerate(zip(student_embeddings, teacher_embeddings, strict=True)):
            noise = negatives if negatives.ndim == 2 else negatives[b]
            own = unit(x) @ unit(y) / self.temperature
            others = [unit(x) @ n / self.temperature for n in noise]
            if self.form == "info_nce":
                values.append(np.logaddexp.reduce([own, *others]) - own)
            else:
                level = self.log_normalizer + np.log(len(noise))  # of M c
                values.append(np.logaddexp(0, level - own) + sum(np.logaddexp(0, other - level) for other in others))
        return reduce_samples(values, sample_weight, self.reduction)
