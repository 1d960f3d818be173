"""Probabilistic knowledge transfer: how probable each sample's neighbours are."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Alias, Case, Properties, choice, flag, number, ops, register
from pykd.definition.reference import unit
from pykd.fused.description import BlockPoint, Columns, Piece, Rows, Same
from pykd.losses.relations._shared import Relation, alike, kept, normalized_rows, numpy_kept


def _samples(embeddings: Tensor, weight: Tensor | None) -> Tensor:
    return ops.normalize(ops.upcast(ops.without_left_out(embeddings, weight)), dim=[-1])


def _affinities(cosines: Tensor, alike: Tensor | None, same: Tensor | None) -> Tensor:
    """Cosines, moved to between 0 and 2; 0 in the columns of what is left out.

    Args:
        cosines: of some samples with others.
        alike: 1 for every column that counts, else 0; None: all do.
        same: where row and column are one sample; None: a sample is a neighbour of itself.
    """
    affinities: Tensor = cosines + 1.0
    rounding = 2e-14 if cosines.dtype == torch.float64 else 2e-6  # of opposite embeddings
    affinities = torch.ops.aten.threshold_backward(affinities, affinities.detach(), rounding)  # 0 up to there
    if alike is not None:
        affinities = affinities.masked_fill(alike == 0, 0.0)
    if same is not None:
        affinities = affinities.masked_fill(same, 0.0)
    return affinities


def _divisors(sums: Tensor) -> Tensor:
    return torch.where(sums == 0, torch.ones_like(sums), sums)


def _factors(sums: Tensor, epsilon: float) -> Tensor:
    """What affinities are multiplied by for probabilities over ε, from the sums of all of the same row."""
    return 1.0 / (torch.where(sums == 0, torch.ones_like(sums), sums) * epsilon)


def _divergences(q: Tensor, p: Tensor) -> Tensor:
    """One value for every pair, over ε, of the student's probabilities over ε and the teacher's."""
    return p * (torch.log1p(p) - torch.log1p(q))  # log(p + ε) is log(1 + p/ε), but for what both have


def _both(cosines: Tensor, row_alike: Tensor | None, alike: Tensor | None, same: Tensor | None) -> Tensor:
    """:func:`_affinities`, which are 0 in the rows of what is left out, too."""
    own = _affinities(cosines, alike, same)
    return own if row_alike is None else own * row_alike.unsqueeze(1)


def _values(
    student: Tensor,
    rows: Tensor,
    columns: Tensor,
    teacher: Tensor,
    teacher_rows: Tensor,
    teacher_columns: Tensor,
    row_alike: Tensor | None,
    alike: Tensor | None,
    same: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`_divergences` of cosines in a block of rows, and of its mirror image, with the factors of both."""
    own, others = _both(student, row_alike, alike, same), _both(teacher, row_alike, alike, same)
    return (
        _divergences(own * rows.unsqueeze(1), others * teacher_rows.unsqueeze(1)),
        _divergences(own * columns, others * teacher_columns),
    )


def _average(value: Tensor, count: Tensor, average: str) -> Tensor:
    return ops.at_least_0(value / count.clamp(min=1.0) if average == "pairs" else value)


def probabilistic_transfer(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    sample_weight: Tensor | None,
    own: bool,
    average: str,
    epsilon: float,
) -> Tensor:
    """Divergence of the probabilities of neighbours; see :class:`ProbabilisticTransfer`."""
    weight = ops.optional_weight(sample_weight)
    x, y = _samples(student_embeddings, weight), _samples(teacher_embeddings.detach(), weight)
    student, teacher = ops.matmul(x, x.transpose(0, 1)), ops.matmul(y, y.transpose(0, 1))
    same = None if own else ops.same_pairs(x)
    q, p = _affinities(student, alike(x, weight), same), _affinities(teacher, alike(x, weight), same)
    q = q * _factors(q.sum(dim=1, keepdim=True), epsilon)
    p = p * _factors(p.sum(dim=1, keepdim=True), epsilon)
    values = _divergences(q, p).sum(dim=1) * epsilon
    return _average(ops.reduce(values, weight, "mean"), kept(x, weight).sum(), average)


@register(probabilistic_transfer)
class ProbabilisticTransfer(Relation):
    r"""Divergence between the teacher's and the student's probabilities of each sample's neighbours in the batch (PKT).

    .. math:: \ell = \frac1N \sum_i \sum_{j \ne i} p_{ij} \log\frac{p_{ij} + \varepsilon}{q_{ij} + \varepsilon}, \quad
              p_{ij} = \frac{1 + \cos(y_i, y_j)}{\sum_{k \ne i} (1 + \cos(y_i, y_k))}, \quad
              q_{ij} = \frac{1 + \cos(x_i, x_j)}{\sum_{k \ne i} (1 + \cos(x_i, x_k))}

    with the student's embeddings x and the teacher's y.

    Args:
        own: whether a sample is a neighbour of itself, as in the authors' code (j and k may be i); the paper leaves it out.
        average: ``"samples"``: the mean over samples of the divergence of each; ``"pairs"``: that mean divided by the number of
            samples, the mean over all N² pairs as code takes it.
        epsilon: ε > 0; keeps the logarithm of opposite embeddings finite.
        reduction: ``"mean"`` alone; see ``average``.

    Inputs:
        student_embeddings: ``(batch, channels)``, any floating type; receives the gradient.
        teacher_embeddings: ``(batch, teacher_channels)``, same type; constant. Only their cosines are compared, so the
            widths may differ.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. Weighs
            the samples i of the mean: Σ w ℓ / Σ w. A sample of weight 0 is nobody's neighbour, either, and has no part in value
            and gradient, whatever it holds.

    Returns:
        A scalar in nats, at least 0; 0 where all cosines agree, for a single sample, and where none is kept. float32 for
        half-precision inputs, which are computed in float32. An embedding of length 0 has the cosine 0 with all others, and the
        gradient 0. Embeddings that are opposite, but for rounding, are no neighbours. NaN in an input gives NaN.

    Raises:
        ValueError: for an epsilon that is not positive, another average, shapes that do not fit, an empty batch.

    There is no value per sample: every sample is compared with every other. The formula's memory is O(batch²) beside the
    embeddings; from 512 samples on ``kernels="auto"`` goes by blocks of rows, which is O(batch).

    Who differs: the paper sums over samples, N times this. The authors' code, RepDistiller, MDistiller and torchdistill have
    ``own=True, average="pairs"`` and add ε to the lengths of embeddings, too; the Zoo has ε = 1e-6.

    Example:
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> ProbabilisticTransfer()(student, teacher)
        tensor(0.1155)

    References:
        Passalis and Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018, arXiv:1803.10837.
    """

    cases = (
        Case(),
        Case({"own": True, "average": "pairs", "epsilon": 1e-6}, optional=("sample_weight",)),
    )
    aliases = ("PKT", Alias("PKTLoss", own=True, average="pairs"))

    own: bool = flag(default=False)
    average: str = choice(("samples", "pairs"), default="samples")
    epsilon: float = number(default=1e-7, above=0.0)

    def in_blocks(self, blocks: BlockPoint, student_embeddings, teacher_embeddings, sample_weight):
        weight = ops.optional_weight(sample_weight)
        count = kept(ops.upcast(student_embeddings.detach()), weight)
        rows, columns = (None, None) if weight is None else (Rows(count), Columns(count))
        same = None if self.own else Same(count)
        pieces: list[Piece] = [rows, columns, same]
        for embeddings in (teacher_embeddings.detach(), student_embeddings):
            products = blocks.products(normalized_rows(embeddings, weight))
            factors = _factors(blocks.row_sums(_both, products, rows, columns, same), self.epsilon)
            pieces = [products, Rows(factors), Columns(factors), *pieces]
        value = blocks.over_pairs(_values, *pieces, weight=weight, columns=False, last=True) * self.epsilon
        return _average(value, count.sum(), self.average)

    def properties(self) -> Properties:
        return Properties(
            feature_scale=True,
            zero_when_equal=True,
            symmetric="the divergence goes from the teacher to the student",
        )

    def reference(self, student_embeddings, teacher_embeddings, sample_weight=None):
        """Sample by sample, from the definition."""
        weights, student, teacher = numpy_kept(sample_weight, student_embeddings, teacher_embeddings)
        n = len(weights)
        if n == 0:
            return 0.0

        def probabilities(points, i):
            x = [unit(point) for point in points]
            affinities = np.array([(x[i] @ x[j] + 1) / 2 if self.own or i != j else 0.0 for j in range(n)])
            affinities[affinities < 1e-14] = 0.0  # rounding
            return affinities / (affinities.sum() or 1.0)

        total = 0.0
        for i in range(n):
            p, q = probabilities(teacher, i), probabilities(student, i)
            total += weights[i] * sum(p * np.log((p + self.epsilon) / (q + self.epsilon)))
        return total / weights.sum() / (n if self.average == "pairs" else 1)
