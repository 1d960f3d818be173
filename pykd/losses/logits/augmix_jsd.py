"""The consistency loss of AugMix: three views of an image are to have one prediction."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register
from pykd.definition.reference import divergence, log_softmax, reduce_samples, rows


def _log_probs(logits: Tensor, weight: Tensor | None) -> Tensor:
    return torch.log_softmax(ops.upcast(ops.without_left_out(logits, weight)), dim=-1)


def augmix_jsd(
    student_logits: Tensor,
    first_augmented_logits: Tensor,
    second_augmented_logits: Tensor,
    sample_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Jensen-Shannon divergence of three predictions; see :class:`AugMixJSD`."""
    weight = ops.optional_weight(sample_weight)
    views = [_log_probs(x, weight) for x in (student_logits, first_augmented_logits, second_augmented_logits)]
    log_p = torch.stack(views)
    # log(m / p_i) by the ratios of every two views, of which little is left where they are almost equal; a class with less than e⁻⁸⁰
    # counts for nothing beside the others.
    counted = log_p.clamp(min=-80.0)
    ratios = torch.expm1(counted.unsqueeze(0) - counted.unsqueeze(1)).mean(dim=1)
    values = (torch.exp(log_p) * torch.log1p(ratios)).sum(dim=-1).mean(dim=0)
    return ops.reduce(ops.negative_of(values), weight, reduction)


@register(augmix_jsd)
class AugMixJSD(Loss):
    r"""Jensen-Shannon divergence of the predictions for an image and two augmented versions of it, all of them the student's.

    .. math:: \ell_b = \frac13 \sum_{i=1}^3 \mathrm{KL}(p_{bi} \Vert m_b), \quad m_b = \frac13 \sum_{i=1}^3 p_{bi}, \quad
              p_{bi} = \mathrm{softmax}(x_{bi})

    No view is a teacher: all three receive a gradient, through m as well. AugMix adds 12 times this to the cross-entropy of
    the clean images.

    Args:
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``:
            ``(batch,)`` or ``(batch, tokens)``.

    Inputs:
        student_logits: ``(batch, classes)``, or ``(batch, tokens, classes)``, where each token is a sample; any floating type;
            receives the gradient. Of the clean images. −inf masks a class.
        first_augmented_logits: the same shape and type; of an augmented version of the same images; receives the gradient.
        second_augmented_logits: the same of another; receives the gradient.
        sample_weight: optional ``(batch,)`` or ``(batch, tokens)``, at least 0, of any floating type, or a mask (bool or
            integers); constant. A sample of weight 0 has no part in value and gradient, whatever it holds.

    Returns:
        Nats, from 0, where all three agree, to log 3; a scalar unless ``reduction="none"``. float32 for half-precision inputs, which
        are computed in float32.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Who differs: the authors' code and timm's ``JsdCrossEntropy`` take m as at least 1e-7 in every class, so that a class which no view
    takes for likely adds something; timm takes the three views as one batch, in three equal parts, and adds the cross-entropy.

    Example:
        >>> sure = torch.tensor([[100.0, 0.0, 0.0]])
        >>> AugMixJSD()(sure, sure.roll(1, -1), sure.roll(2, -1))
        tensor(1.0986)
        >>> AugMixJSD()(sure, sure, sure)
        tensor(0.)

    References:
        Hendrycks, Mu, Cubuk, Zoph, Gilmer, Lakshminarayanan: AugMix: A Simple Data Processing Method to Improve Robustness and
        Uncertainty, ICLR 2020, arXiv:1912.02781.
    """

    inputs = {
        "student_logits": Spec("batch classes", grad=True, draw="logits"),
        "first_augmented_logits": Spec("batch classes", grad=True, draw="logits", like="student_logits"),
        "second_augmented_logits": Spec("batch classes", grad=True, draw="logits", like="student_logits"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    sample_axes = ("batch", "batch tokens")
    cases = (
        Case(optional=("sample_weight",)),
        Case({"reduction": "sum"}, layouts={"student_logits": "batch tokens classes"}),
    )
    aliases = ("AugMix", "JsdCrossEntropy")
    no_kernel = (
        "its three views all receive a gradient, and jsd of the kernel soft_target compares two, one of them constant"
    )

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=True,
            symmetric="three cannot change places in pairs",
        )

    def reference(self, student_logits, first_augmented_logits, second_augmented_logits, sample_weight=None):
        views = (student_logits, first_augmented_logits, second_augmented_logits)
        values = []
        for logits in zip(*(rows(view, 1) for view in views), strict=True):
            log_p = [log_softmax(x) for x in logits]
            log_m = np.logaddexp.reduce(log_p) - np.log(3)
            values.append(np.mean([divergence(p, log_m) for p in log_p]))
        return reduce_samples(values, sample_weight, self.reduction, np.shape(student_logits)[:-1])
