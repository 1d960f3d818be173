"""Contrast within a batch: the student's embedding of a sample finds the teacher's of the same sample among all."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, choice, ops, register, scalar
from pykd.definition.reference import log_softmax, reduce_samples, unit
from pykd.losses.relations._shared import COUPLES, kept, numpy_kept


def _negative_log_probability(scores: Tensor, own: Tensor, weight: Tensor | None, dim: int) -> Tensor:
    """−log of the softmax over an axis at every sample's own score, among the samples that are kept."""
    if weight is not None:  # not by −∞, which would have gradients of NaN where all are left out
        scores = scores.masked_fill(kept(scores, weight).unsqueeze(1 - dim) == 0, -1e30)
    return ops.reduce(ops.at_least_0(torch.logsumexp(scores, dim=dim) - own), weight, "mean")


def in_batch_contrastive(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None,
    temperature: float,
    direction: str,
) -> Tensor:
    """InfoNCE between student and teacher; see :class:`InBatchContrastive`."""
    weight = ops.optional_weight(sample_weight)
    x = ops.normalize(ops.upcast(ops.without_left_out(student_embeddings, weight)), dim=[-1])
    y = ops.normalize(ops.upcast(ops.without_left_out(teacher_embeddings.detach(), weight)), dim=[-1])
    scores = ops.matmul(x, y.transpose(0, 1)) / temperature
    own = (x * y).sum(dim=-1) / temperature
    if direction == "student":
        return _negative_log_probability(scores, own, weight, 1)
    backward = _negative_log_probability(scores, own, weight, 0)
    if direction == "teacher":
        return backward
    return (_negative_log_probability(scores, own, weight, 1) + backward) / 2


@register(in_batch_contrastive)
class InBatchContrastive(Loss):
    r"""InfoNCE: the student's embedding of each sample is to find the teacher's of the same sample among those of the batch.

    .. math:: \ell = -\frac1N \sum_i \log \frac{\exp(\cos(x_i, y_i) / T)}{\sum_j \exp(\cos(x_i, y_j) / T)}

    with the student's embeddings x and the teacher's y.

    Args:
        temperature: T > 0.
        direction: ``"student"``: each embedding of the student finds the teacher's, as above; ``"teacher"``: each of the teacher's
            finds the student's (the sum in the denominator goes over the student's); ``"both"``: the mean of the two.
        reduction: ``"mean"`` alone; see ``sample_weight``.

    Inputs:
        student_embeddings: ``(batch, channels)``, any floating type; receives the gradient.
        teacher_embeddings: ``(batch, channels)``, same type; constant. The teacher's, projected to the student's width (or
            the other way round) before.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. Weighs
            the samples i of the mean: Σ w ℓ / Σ w. A sample of weight 0 is among nobody's candidates, either, and has
            no part in value and gradient, whatever it holds.

    Returns:
        A scalar in nats, at least 0 (though not 0 where the embeddings agree); log N where all cosines are equal, 0 for a single
        sample and where none is kept. float32 for half-precision inputs, which are computed in float32. An embedding of length 0
        has the cosine 0 with all others, and the gradient 0. NaN in an input gives NaN.

    Raises:
        ValueError: for a temperature that is not positive, another direction, shapes that do not fit, an empty batch.

    There is no value per sample: every sample is compared with every other. Memory is O(batch²) beside the embeddings.

    Who differs: NTXentLoss of pytorch-metric-learning with ``ref_emb`` is ``direction="student"``, CLIP's loss is ``"both"``.
    SimCLR's NT-Xent has the embeddings of one side among the candidates of the same side, too.

    Example:
        Two samples that the teacher cannot tell apart.

        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> InBatchContrastive()(student, teacher)
        tensor(0.6931)

    References:
        van den Oord et al.: Representation Learning with Contrastive Predictive Coding, 2018, arXiv:1807.03748; Tian et al.:
        Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699 (between student and teacher, with a memory).
    """

    inputs = {
        "student_embeddings": Spec("batch channels", grad=True, like="teacher_embeddings"),
        "teacher_embeddings": Spec("batch channels"),
        "sample_weight": SAMPLE_WEIGHT,
    }
    cases = (
        Case(),
        Case({"temperature": 0.2, "direction": "both"}, optional=("sample_weight",)),
        Case({"temperature": 1.0, "direction": "teacher"}),
    )
    couples_batch = COUPLES
    aliases = ("InfoNCE", "NTXentLoss")

    temperature: float = scalar(default=0.07, minimum=0.0, exclusive=True)
    direction: str = choice(("student", "teacher", "both"), default="student")

    def properties(self) -> Properties:
        return Properties(
            feature_scale=True,
            zero_when_equal="the cosines with other samples are not −∞",
            symmetric=self.direction == "both" or "every row has one of the student's and all of the teacher's",
        )

    def reference(self, student_embeddings, teacher_embeddings, sample_weight=None):
        """Sample by sample, from the definition."""
        weights, student, teacher = numpy_kept(sample_weight, student_embeddings, teacher_embeddings)
        x, y = [unit(point) for point in student], [unit(point) for point in teacher]

        def found(a, b):
            values = [-log_softmax([a[i] @ other / self.temperature for other in b])[i] for i in range(len(a))]
            return reduce_samples(values, weights, "mean")

        values = {"student": [found(x, y)], "teacher": [found(y, x)], "both": [found(x, y), found(y, x)]}
        return np.mean(values[self.direction])
