"""Distribution distillation: how similar pairs of samples are, matched as distributions."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pykd.definition import Case, Loss, Properties, Spec, choice, number, ops, register, scalar, whole
from pykd.definition.reference import unit
from pykd.fused.description import Argument, Kernel, KernelPoint

KERNEL = Kernel(
    "distribution_distillation",
    inputs={
        "student": Argument("batch channels"),
        "teacher": Argument("batch channels"),
        "labels": Argument("batch", "index"),
        "positive_weight": Argument("", "float32"),
        "negative_weight": Argument("", "float32"),
        "order_weight": Argument("", "float32"),
    },
    outputs={
        "positive": Argument("", "float32"),
        "negative": Argument("", "float32"),
        "order": Argument("", "float32"),
        "grad_student": Argument("batch channels"),
    },
    attributes={"bins": 1000, "width": 0.1, "negatives": "hardest"},
)


def _positive_pairs(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities of all ordered pairs, and which of them are two samples of one identity."""
    similarities = ops.matmul(embeddings, embeddings.transpose(0, 1))
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    return similarities, same & (ops.distinct_pairs(embeddings) != 0)


def _negative_pairs(embeddings: Tensor, labels: Tensor, negatives: str) -> tuple[Tensor, Tensor]:
    """Similarities across identities and which of them count: one per sample, or all ordered pairs."""
    similarities = ops.matmul(embeddings, embeddings.transpose(0, 1))
    other = labels.unsqueeze(0) != labels.unsqueeze(1)
    if negatives == "all":
        return similarities, other
    found = other.any(dim=1)
    # amax, not max: samples that are equally close share the gradient.
    hardest = torch.where(other, similarities, torch.full_like(similarities, float("-inf"))).amax(dim=1)
    return torch.where(found, hardest, torch.zeros_like(hardest)), found


def _log_histogram(similarities: Tensor, kept: Tensor, bins: int, width: float) -> Tensor:
    """Logarithm of the soft histogram of the kept similarities; a constant one where there are none."""
    nodes = torch.linspace(-1.0, 1.0, bins, dtype=similarities.dtype, device=similarities.device)
    # What is left out lies so far away that it adds exactly 0: no mask of the size pairs × bins is needed.
    far_away = torch.full_like(similarities, 1e6 * (1.0 + width))
    distances = torch.where(kept, similarities, far_away).flatten().unsqueeze(0) - nodes.unsqueeze(1)
    # In log space, so that a node that no similarity comes near has a finite logarithm, and a finite gradient.
    sums = torch.logsumexp(torch.square(distances) * (-0.5 / (width * width)), dim=1)
    return torch.log_softmax(sums, dim=0)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return ops.at_least_0((torch.exp(log_p) * (log_p - log_q)).sum())


def _mean(similarities: Tensor, kept: Tensor) -> Tensor:
    """Mean of the kept similarities; 0 where there are none."""
    kept_ones = torch.ones_like(similarities) * kept
    return torch.where(kept, similarities, torch.zeros_like(similarities)).sum() / kept_ones.sum().clamp(min=1.0)


def positive_divergence(student: Tensor, teacher: Tensor, labels: Tensor, bins: int, width: float) -> Tensor:
    """KL(teacher ‖ student) of the histograms of positive pairs, for embeddings of length 1."""
    p, kept = _positive_pairs(teacher.detach(), labels)
    q, _ = _positive_pairs(student, labels)
    return _divergence(_log_histogram(p, kept, bins, width), _log_histogram(q, kept, bins, width))


def negative_divergence(
    student: Tensor, teacher: Tensor, labels: Tensor, bins: int, width: float, negatives: str
) -> Tensor:
    """KL(teacher ‖ student) of the histograms of negative pairs, for embeddings of length 1."""
    p, kept = _negative_pairs(teacher.detach(), labels, negatives)
    q, _ = _negative_pairs(student, labels, negatives)
    return _divergence(_log_histogram(p, kept, bins, width), _log_histogram(q, kept, bins, width))


def order_gap(student: Tensor, teacher: Tensor, labels: Tensor, negatives: str) -> Tensor:
    """Mean negative less mean positive similarity, summed over the four ways to take each from student or teacher."""
    gap = torch.zeros_like(student.sum())
    for embeddings in [student, teacher.detach()]:
        positive, positive_kept = _positive_pairs(embeddings, labels)
        negative, negative_kept = _negative_pairs(embeddings, labels, negatives)
        gap = gap + 2 * (_mean(negative, negative_kept) - _mean(positive, positive_kept))
    return gap


def distribution_distillation_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, bins: int, width: float, negatives: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms before their weights, for embeddings of length 1; see :class:`DistributionDistillation`."""
    return (
        positive_divergence(student, teacher, labels, bins, width),
        negative_divergence(student, teacher, labels, bins, width, negatives),
        order_gap(student, teacher, labels, negatives),
    )


def distribution_distillation(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    labels: Tensor,
    positive_weight: float = 0.1,
    negative_weight: float = 0.02,
    order_weight: float = 0.5,
    bins: int = 1000,
    width: float = 0.1,
    negatives: str = "hardest",
) -> Tensor:
    """Divergence between distributions of pairwise similarities; see :class:`DistributionDistillation`."""
    student = ops.normalize(ops.upcast(student_embeddings), dim=[-1])
    teacher = ops.normalize(ops.upcast(teacher_embeddings.detach()), dim=[-1])
    positive, negative, order = distribution_distillation_terms(student, teacher, labels, bins, width, negatives)
    return positive_weight * positive + negative_weight * negative + order_weight * order


@register("distribution_distillation")
class DistributionDistillation(Loss):
    r"""KL divergences between the teacher's and the student's distributions of pairwise similarities.

    All embeddings are divided by their length. Two sets of cosines are taken of the student's batch
    (:math:`S^+, S^-`), and the same of the teacher's (:math:`T^+, T^-`):

    - positive: of every pair of distinct samples of one identity;
    - negative: of every sample with the most similar sample of another identity (``negatives="hardest"``), or of every
      pair of samples of different identities (``"all"``).

    The loss compares their soft histograms over the nodes :math:`t_r = -1 + 2r/(R - 1)`, and pulls the
    means of positive and negative similarities apart:

    .. math:: \ell = \lambda_+ \mathrm{KL}\big(h(T^+) \Vert h(S^+)\big)
              + \lambda_- \mathrm{KL}\big(h(T^-) \Vert h(S^-)\big)
              + \lambda_o \sum_{A, B \in \{S, T\}} \big(\overline{A^-} - \overline{B^+}\big), \quad
              h_r(A) \propto \sum_{a \in A} \exp\left(-\frac{(a - t_r)^2}{2 \sigma^2}\right), \; \sum_r h_r = 1

    The teacher's means are constants: as far as the gradient goes, the last sum is
    :math:`2(\overline{S^-} - \overline{S^+})`.

    Args:
        positive_weight: λ₊, at least 0.
        negative_weight: λ₋, at least 0.
        order_weight: λₒ, at least 0; with 0 the loss is a divergence, and 0 when student and teacher agree.
        bins: R, the number of nodes, from 2 to 10,000. Once they are closer than σ, more of them change next to nothing.
        width: σ > 0, the width of the Gaussian that stands for one pair. (The paper's γ is 1/(2σ²).)
        negatives: ``"hardest"``, one negative per sample, as the paper mines them, or ``"all"`` pairs.
        reduction: ``"mean"`` alone; the means are part of the definition.

    Inputs:
        student_embeddings: ``(batch, channels)``, any floating type; receives the gradient.
        teacher_embeddings: ``(batch, channels)``, same type; constant. They need not be of the student's images: only
            their distributions are compared, with the same identities row by row.
        labels: ``(batch,)`` int64, any numbers; equal numbers are one identity.

    Returns:
        A scalar without unit: two divergences in nats, at least 0, and the order term, from −8 to 8, by their
        weights. float32 for half-precision inputs, which are computed in float32. Without positive pairs in the
        batch their divergence and their means are 0; the same for negatives. Samples that are equally similar
        to an anchor share the gradient of its hardest negative. An embedding of length 0 (or shorter than any normal number) stays 0, with the gradient 0.
        NaN in an input gives NaN.

    Raises:
        ValueError: for negative weights, another number of bins, a width that is not positive, other negatives, shapes that
            do not fit, an empty batch.

    There is no value per sample: every sample is compared with every other. The formula as it stands needs
    O(batch² · bins) memory; the fused kernel O(batch²).

    Who differs: TFace, the authors' code, takes positive pairs and negatives as separate inputs and any number of
    students, nodes 0, 0.001 … 0.999, similarities above 0 only, and adds 1e-9 inside the logarithm (so
    at most about 20 nats per node, with nearly no gradient where the histograms do not overlap). ppriyank's
    Distillation-Loss takes all negatives and nodes from −1 on, divides the histograms by the number of pairs, so that
    they do not sum to 1, and gives the order term the other sign, plus the distances between the means.

    Example:
        One positive pair, whose similarity is 0.6 to the student and 0 to the teacher: the divergence of two Gaussians
        is (0.6 − 0)²/(2 σ²) = 12.5 nats.

        >>> student = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> DistributionDistillation(order_weight=0.0, width=0.12)(student, teacher, torch.tensor([7, 7]))
        tensor(1.2500)

    References:
        Huang et al.: Improving Face Recognition from Hard Samples via Distribution Distillation Loss,
        ECCV 2020, arXiv:2002.03662; the histograms follow Ustinova and Lempitsky: Learning Deep Embeddings with
        Histogram Loss, 2016, arXiv:1611.00822.
    """

    inputs = {
        "student_embeddings": Spec("batch channels", grad=True, like="teacher_embeddings"),
        "teacher_embeddings": Spec("batch channels"),
        "labels": Spec("batch", dtype="int64", draw="indices"),
    }
    cases = (
        Case(),
        Case({"positive_weight": 0.5, "negative_weight": 0.25, "order_weight": 0.0, "negatives": "all"}),
        Case({"bins": 101, "width": 0.05}),
    )
    couples_batch = "compares every sample of the batch with every other"
    aliases = ("DDL",)
    paper = "Huang et al. 2020, arXiv:2002.03662"

    positive_weight: float = scalar(default=0.1, minimum=0.0)
    negative_weight: float = scalar(default=0.02, minimum=0.0)
    order_weight: float = scalar(default=0.5, minimum=0.0)
    bins: int = whole(default=1000, minimum=2, maximum=10_000)
    width: float = number(default=0.1, above=0.0)
    negatives: str = choice(("hardest", "all"), default="hardest")

    def covered_by_kernel(self, given: Mapping[str, Spec]) -> bool:
        return self.width >= 0.01  # narrower ones would have to meet a node

    def fused(self, kernel: KernelPoint, student_embeddings, teacher_embeddings, labels, *weights):
        tensors = {
            "student": ops.normalize(ops.upcast(student_embeddings), dim=[-1]),
            "teacher": ops.normalize(ops.upcast(teacher_embeddings.detach()), dim=[-1]),
            "labels": labels,
        }
        histogram = {"bins": self.bins, "width": self.width}
        mining = {"negatives": self.negatives}
        positive = kernel(KERNEL, "positive", positive_divergence, tensors, histogram, weight="positive_weight")
        negative = kernel(
            KERNEL, "negative", negative_divergence, tensors, histogram | mining, weight="negative_weight"
        )
        order = kernel(KERNEL, "order", order_gap, tensors, mining, weight="order_weight")
        positive_weight, negative_weight, order_weight = weights
        divergences = positive_weight * ops.at_least_0(positive) + negative_weight * ops.at_least_0(negative)
        return divergences + order_weight * order

    def properties(self) -> Properties:
        return Properties(
            feature_scale=True,
            zero_when_equal=float(self.order_weight) == 0 or "the order term is no divergence",
            symmetric="the divergences go from the teacher to the student",
        )

    def reference(self, student_embeddings, teacher_embeddings, labels):
        """Pair by pair, from the definition."""
        student = _numpy_pairs(student_embeddings, labels, self.negatives)
        teacher = _numpy_pairs(teacher_embeddings, labels, self.negatives)
        total = 0.0
        for weight, s, t in zip((self.positive_weight, self.negative_weight), student, teacher, strict=True):
            if len(s) > 0:
                log_q, log_p = (_numpy_log_histogram(x, self.bins, self.width) for x in (s, t))
                total += weight * sum(np.exp(lp) * (lp - lq) for lp, lq in zip(log_p, log_q, strict=True))
        for _, lower in (student, teacher):
            for upper, _ in (student, teacher):
                total += self.order_weight * (_numpy_mean(lower) - _numpy_mean(upper))
        return total


def _numpy_pairs(embeddings, labels, negatives):
    """The similarities of positive pairs and of negative pairs, as two lists."""
    x = [unit(row) for row in embeddings]
    positive, negative = [], []
    for i in range(len(x)):
        others = [float(x[i] @ x[j]) for j in range(len(x)) if labels[j] != labels[i]]
        if negatives == "hardest":
            negative += [max(others)] if others else []
        else:
            negative += [float(x[i] @ x[j]) for j in range(i) if labels[j] != labels[i]]
        positive += [float(x[i] @ x[j]) for j in range(i) if labels[j] == labels[i]]
    return positive, negative


def _numpy_log_histogram(similarities, bins, width):
    values = [
        np.logaddexp.reduce([-((s - t) ** 2) / (2 * width**2) for s in similarities]) for t in np.linspace(-1, 1, bins)
    ]
    return np.array(values) - np.logaddexp.reduce(values)


def _numpy_mean(similarities):
    return sum(similarities) / len(similarities) if similarities else 0.0
