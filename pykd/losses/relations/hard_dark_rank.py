"""Hard DarkRank: the teacher's order of each sample's nearest neighbours."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Properties, flag, ops, register, scalar, whole
from pykd.definition.reference import unit
from pykd.fused.description import BlockPoint, Chosen, Columns, Rows
from pykd.losses.relations._shared import Relation, kept, normalized_rows, numpy_kept, own_products


def _samples(embeddings: Tensor, weight: Tensor | None, normalized: bool) -> Tensor:
    x = ops.upcast(ops.without_left_out(embeddings, weight))
    return ops.normalize(x, dim=[-1]) if normalized else x


def _nearest(distances: Tensor, alike: Tensor, same: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of every row, the columns of its nearest others that are kept, nearest first, and which of these places are taken."""
    columns = torch.arange(distances.size(1), device=distances.device).unsqueeze(0)
    others = (alike != 0) & ~same
    count = others.sum(dim=1, keepdim=True)
    far = torch.where(others, distances, float("inf"))
    found: list[Tensor] = []
    taken: list[Tensor] = []
    for place in range(length):
        nearest = far.argmin(dim=1, keepdim=True)
        found.append(nearest)
        taken.append(count > place)
        far = torch.where(columns == nearest, float("inf"), far)
    return torch.cat(found, dim=1), torch.cat(taken, dim=1)


def _values(distances: Tensor, taken: Tensor, alpha: float, beta: float, length: int) -> Tensor:
    """One value for every row, of the student's distances to the teacher's nearest, and which of these places are taken."""
    scores = distances.pow(beta) * -alpha
    scores = torch.where(taken, scores, -1e30)  # not −∞, which would have gradients of NaN where nobody is left
    values = torch.zeros_like(scores[:, 0])
    for place in range(length):
        better = torch.logsumexp(scores[:, place:], dim=1) - scores[:, place]
        values = values + torch.where(taken[:, place], better, 0.0)
    return values


def _nothing(teacher: Tensor) -> Tensor:
    """0; NaN where the teacher has any, which its order alone would lose."""
    return (teacher - teacher).sum()


def _nearest_of(products: Tensor, rows: Tensor, columns: Tensor, same: Tensor, alike: Tensor, length: int) -> Tensor:
    """:func:`_nearest` of a block, with −1 in the places that nobody takes."""
    nearest, taken = _nearest(ops.distances_of(products, rows, columns, same), alike, same, length)
    return torch.where(taken, nearest, -1)


def _block(
    student: Tensor, others: Tensor, nearest: Tensor, teacher: Tensor, alpha: float, beta: float, length: int
) -> Tensor:
    """Of samples, those that are nearest to each of them, the numbers of these, and the teacher's samples."""
    own = student.unsqueeze(1)
    products = ops.matmul(others, own.transpose(1, 2)).squeeze(2)
    distances = ops.distances_between(
        products, ops.squares(own), ops.squares(others), torch.zeros_like(products, dtype=torch.bool)
    )
    return _values(distances, nearest >= 0, alpha, beta, length) + _nothing(teacher)


def hard_dark_rank(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None,
    alpha: float,
    beta: float,
    length: int,
    normalized: bool,
) -> Tensor:
    """Likelihood of the teacher's order of neighbours; see :class:`HardDarkRank`."""
    weight = ops.optional_weight(sample_weight)
    x, y = _samples(student_embeddings, weight, normalized), _samples(teacher_embeddings.detach(), weight, normalized)
    teacher = ops.distances(y)
    nearest, taken = _nearest(teacher, kept(x, weight), ops.same_pairs(x), length)
    distances = torch.gather(ops.distances(x), 1, nearest)
    values = _values(distances, taken, alpha, beta, length) + _nothing(teacher)
    return ops.reduce(values, weight, "mean")


@register(hard_dark_rank)
class HardDarkRank(Relation):
    r"""Negative log-likelihood, under the student, of the order in which the teacher has each sample's nearest neighbours.

    For every sample i, the n others that are nearest to it in the teacher's embeddings, nearest first, are
    :math:`\pi_i(1), \ldots, \pi_i(n)`. The Plackett-Luce model of the student's distances d gives that order

    .. math:: \ell = -\frac1N \sum_i \log \prod_{r=1}^{n} \frac{\exp S_{i\pi_i(r)}}{\sum_{m \ge r} \exp S_{i\pi_i(m)}}, \quad
              S_{ij} = -\alpha\, d_{ij}^{\,\beta}, \quad d_{ij} = \lVert \hat x_i - \hat x_j\rVert

    The sum in the denominator goes over these n alone. A batch of fewer others has fewer places.

    Args:
        alpha: α of at least 0.
        beta: β of at least 1.
        length: n, from 2 to 100.
        normalized: whether embeddings are divided by their lengths first.
        reduction: ``"mean"`` alone; see ``sample_weight``.

    Inputs:
        student_embeddings: ``(batch, channels)``, any floating type; receives the gradient.
        teacher_embeddings: ``(batch, teacher_channels)``, same type; constant. Only the order of its distances counts, so
            the widths may differ. At least two channels: of one, normalised, there are two places, and no order.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. Weighs
            the samples i of the mean: Σ w ℓ / Σ w. A sample of weight 0 is nobody's neighbour, either, and has no part in value
            and gradient, whatever it holds.

    Returns:
        A scalar in nats, at least 0 (though not 0 where the embeddings agree); 0 for up to two samples, and where none is kept.
        float32 for half-precision inputs, which are computed in float32. Of others that are equally near to the teacher, the
        first in the batch counts as the nearest. A normalised embedding of length 0 stays 0, with the gradient 0.
        NaN in an input gives NaN.

    Raises:
        ValueError: for an alpha below 0, a beta below 1, another length, one channel of the teacher, shapes that do not fit, an
            empty batch.

    There is no value per sample: every sample is compared with every other. The formula's memory is O(batch²) beside the
    embeddings; from 512 samples on ``kernels="auto"`` goes by blocks of rows, which is O(batch).

    Who differs: TFace agrees. The code of Park et al. takes embeddings as they are (``normalized=False``). Both take the first
    of the sorted row to be the sample itself, which need not be so where embeddings coincide.

    Example:
        The teacher's nearest neighbour of the first sample is the second, then the third; the student has it the other way round.

        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
        >>> teacher = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> HardDarkRank(length=2)(student, teacher)
        tensor(5.2259)

    References:
        Chen et al.: DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer, AAAI 2018,
        arXiv:1707.01220.
    """

    least_lengths = {"teacher_channels": 2}
    cases = (
        Case(),
        Case(
            {"alpha": 0.1, "beta": 2.0, "length": 4, "normalized": False},
            optional=("sample_weight",),
        ),
    )
    aliases = ("DarkRank",)

    alpha: float = scalar(default=3.0, minimum=0.0)
    beta: float = scalar(default=3.0, minimum=1.0)
    length: int = whole(default=3, minimum=2, maximum=100)
    normalized: bool = flag(default=True)

    def in_blocks(self, blocks: BlockPoint, student_embeddings, teacher_embeddings, sample_weight, alpha, beta):
        weight = ops.optional_weight(sample_weight)
        x, y = (
            normalized_rows(embeddings, weight) if self.normalized else _samples(embeddings, weight, False)
            for embeddings in (student_embeddings, teacher_embeddings.detach())
        )
        count = Columns(kept(x, weight))
        # The student's distances are wanted of these pairs alone.
        nearest = blocks.each(_nearest_of, *own_products(blocks, y), count, self.length)
        pieces = (Rows(x), Chosen(x, nearest.clamp(min=0)), Rows(nearest), Rows(y))
        return blocks.over_rows(_block, *pieces, alpha, beta, self.length, weight=weight)

    def properties(self) -> Properties:
        return Properties(
            feature_scale=self.normalized or "distances are taken of the embeddings as they are",
            zero_when_equal="the order is not certain under the student's own distances",
            symmetric="the teacher gives the order, the student the distances",
        )

    def reference(self, student_embeddings, teacher_embeddings, sample_weight=None):
        """Sample by sample, from the definition."""
        weights, student, teacher = numpy_kept(sample_weight, student_embeddings, teacher_embeddings)

        def distance(points, i, j):
            a, b = (unit(points[k]) if self.normalized else points[k] for k in (i, j))
            return np.sqrt(((a - b) ** 2).sum())

        total = 0.0
        for i in range(len(weights)):
            others = [j for j in range(len(weights)) if j != i]
            order = sorted(others, key=lambda j: distance(teacher, i, j))[: self.length]
            scores = [-self.alpha * distance(student, i, j) ** self.beta for j in order]
            for place in range(len(order)):
                total += weights[i] * (np.logaddexp.reduce(scores[place:]) - scores[place])
        return total / weights.sum() if len(weights) > 0 else 0.0
