"""Likeness to a queue of kept embeddings, of which the teacher's distribution is given: see tests/test_new_loss.py."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, ops, register, scalar
from pykd.definition.reference import log_softmax, reduce_samples


def queue_likeness(
    student_embeddings: Tensor,
    queue: Tensor,
    teacher_log_probs: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    reduction: str,
) -> Tensor:
    """Divergence of likenesses; see :class:`QueueLikeness`."""
    weight = ops.optional_weight(sample_weight)
    x = ops.upcast(ops.without_left_out(student_embeddings, weight))
    log_p = ops.upcast(ops.without_left_out(teacher_log_probs.detach(), weight))
    log_q = torch.log_softmax(ops.matmul(x, ops.upcast(queue.detach()).t()) / temperature, dim=-1)
    return ops.reduce(ops.product_or_zero(torch.exp(log_p), log_p - log_q).sum(dim=-1), weight, reduction)


@register(queue_likeness)
class QueueLikeness(Loss):
    r"""Divergence between the teacher's and the student's distributions of likeness to the entries of a queue.

    .. math:: \ell_b = \sum_k p_{bk} (\log p_{bk} - \log q_{bk}), \quad q_b = \mathrm{softmax}(x_b \cdot d_k / T)

    Args:
        temperature: T > 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Inputs:
        student_embeddings: ``(batch, channels)``, of length 1; receives the gradient.
        queue: ``(entries, channels)``, of length 1; constant.
        teacher_log_probs: ``(batch, entries)``; constant.
        sample_weight: optional ``(batch,)``.

    Returns:
        Nats, at least 0.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> QueueLikeness()(torch.ones(1, 1), torch.ones(2, 1), torch.tensor([[0.5, 0.5]]).log())
        tensor(0.)

    References:
        Fang et al.: SEED, 2021, arXiv:2101.04731.
    """

    inputs = {
        "student_embeddings": Spec("batch channels", grad=True, draw="unit"),
        "queue": Spec("entries channels", draw="unit"),
        "teacher_log_probs": Spec("batch entries", draw="log_probabilities"),
        "sample_weight": Spec("batch", dtype="weight", optional=True, draw="weights"),
    }
    cases = (Case(), Case({"temperature": 0.5, "reduction": "sum"}, optional=("sample_weight",)))
    aliases = ("SEED",)

    temperature: float = scalar(default=0.2, minimum=0.0, exclusive=True)

    def properties(self) -> Properties:
        return Properties()

    def reference(self, student_embeddings, queue, teacher_log_probs, sample_weight=None):
        values = []
        for x, log_p in zip(student_embeddings, teacher_log_probs, strict=True):
            log_q = log_softmax(np.array([x @ d for d in queue]) / self.temperature)
            values.append((np.exp(log_p) * (log_p - log_q)).sum())
        return reduce_samples(values, sample_weight, self.reduction)
