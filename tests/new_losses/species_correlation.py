"""A loss on logits, of axes and names of its own: see tests/test_new_loss.py."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, ops, register, scalar
from pykd.definition.reference import log_softmax, reduce_samples, unit


def species_correlation(
    seen: Tensor,
    expected: Tensor,
    sample_weight: Tensor | None,
    sharpness: float,
    reduction: str,
) -> Tensor:
    """One less the correlation of two rows of probabilities; see :class:`SpeciesCorrelation`."""
    weight = ops.optional_weight(sample_weight)
    s = torch.softmax(ops.upcast(ops.without_left_out(seen, weight)) * sharpness, dim=-1)
    t = torch.softmax(ops.upcast(ops.without_left_out(expected.detach(), weight)) * sharpness, dim=-1)
    x = ops.normalize(s - s.mean(dim=-1, keepdim=True), dim=[-1])
    y = ops.normalize(t - t.mean(dim=-1, keepdim=True), dim=[-1])
    return ops.reduce(((x - y) * (x - y)).sum(dim=-1) / 2, weight, reduction)


@register(species_correlation)
class SpeciesCorrelation(Loss):
    r"""One less Pearson's correlation of the student's and the teacher's probabilities.

    .. math:: \ell_b = 1 - \rho(p_b, q_b)

    Args:
        sharpness: greater than 0, at most 1: a factor of the logits.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Inputs:
        seen: ``(batch, species)``, at least two species; receives the gradient.
        expected: the same shape; constant.
        sample_weight: optional ``(batch,)``.

    Returns:
        From 0 to 2.

    Raises:
        ValueError: for one species alone.

    Example:
        >>> SpeciesCorrelation()(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 0.0]]))
        tensor(2.)

    References:
        Huang et al.: Knowledge Distillation from A Stronger Teacher, 2022, arXiv:2205.10536.
    """

    inputs = {
        "seen": Spec("batch species", grad=True, draw="logits", like="expected"),
        "expected": Spec("batch species", draw="logits"),
        "sample_weight": Spec("batch", dtype="weight", optional=True, draw="weights"),
    }
    least_lengths = {"species": 2}
    cases = (Case(), Case({"sharpness": 0.75, "reduction": "sum"}, optional=("sample_weight",)))

    sharpness: float = scalar(default=0.5, minimum=0.0, exclusive=True, maximum=1.0)

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes="a class of probability 0 has a part in the mean",
            zero_when_equal=True,
            symmetric=True,
        )

    def reference(self, seen, expected, sample_weight=None):
        values = []
        for s, t in zip(seen, expected, strict=True):
            q, p = np.exp(log_softmax(s * self.sharpness)), np.exp(log_softmax(t * self.sharpness))
            values.append(((unit(q - q.mean()) - unit(p - p.mean())) ** 2).sum() / 2)
        return reduce_samples(values, sample_weight, self.reduction)
