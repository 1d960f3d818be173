"""Distribution distillation: how similar pairs of samples are, matched as distributions."""

import math
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


def _positive_pairs(embeddings: Tensor, labels: Tensor, convention: str) -> tuple[Tensor, Tensor]:
    """Similarities of all ordered pairs, and which of them count: two samples of one identity."""
    similarities = ops.matmul(embeddings, embeddings.transpose(0, 1))
    same = (labels.unsqueeze(0) == labels.unsqueeze(1)) & (ops.distinct_pairs(embeddings) != 0)
    if convention == "tface":
        same = same & ~(similarities <= 0)  # NaN stays
    return similarities, same


def _negative_pairs(embeddings: Tensor, labels: Tensor, negatives: str, convention: str) -> tuple[Tensor, Tensor]:
    """Similarities across identities and which of them count: one per sample, or all ordered pairs."""
    similarities = ops.matmul(embeddings, embeddings.transpose(0, 1))
    other = labels.unsqueeze(0) != labels.unsqueeze(1)
    if negatives == "all":
        return similarities, other
    if convention == "tface":  # among later samples, and 0 at least
        rows = torch.arange(labels.size(0), device=labels.device)
        later = other & (rows.unsqueeze(0) > rows.unsqueeze(1))
        hardest = torch.where(later, similarities, torch.zeros_like(similarities)).amax(dim=1)
        return hardest, rows >= 0
    found = other.any(dim=1)
    # amax, not max: samples that are equally close share the gradient.
    hardest = torch.where(other, similarities, torch.full_like(similarities, float("-inf"))).amax(dim=1)
    return torch.where(found, hardest, torch.zeros_like(hardest)), found


def _log_histogram(similarities: Tensor, kept: Tensor, bins: int, width: float, convention: str) -> Tensor:
    """Logarithm of the soft histogram of the kept similarities; a constant one where there are none."""
    if convention == "tface":
        nodes = torch.arange(bins, dtype=similarities.dtype, device=similarities.device) / bins
    else:
        nodes = torch.linspace(-1.0, 1.0, bins, dtype=similarities.dtype, device=similarities.device)
    # What is left out lies so far away that it adds exactly 0: no mask of the size pairs × bins is needed.
    far_away = torch.full_like(similarities, 1e6 * (1.0 + width))
    distances = torch.where(kept, similarities, far_away).flatten().unsqueeze(0) - nodes.unsqueeze(1)
    # In log space, so that a node that no similarity comes near has a finite logarithm, and a finite gradient.
    sums = torch.logsumexp(torch.square(distances) * (-0.5 / (width * width)), dim=1)
    return torch.log_softmax(sums, dim=0)


def _divergence(
    teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], bins: int, width: float, convention: str
) -> Tensor:
    """KL of the histograms of similarities, each with which of them count; 0 where none does on one side."""
    log_p = _log_histogram(teacher[0], teacher[1], bins, width, convention)
    log_q = _log_histogram(student[0], student[1], bins, width, convention)
    if convention == "tface":
        # In log space: torch's exporter takes a sum with what is below 1e-8 for one with 0.
        least = torch.full_like(log_p, math.log(1e-9))
        log_p = torch.logsumexp(torch.stack([log_p, least]), dim=0)
        log_q = torch.logsumexp(torch.stack([log_q, least]), dim=0)
        value = (torch.exp(log_p) * (log_p - log_q)).sum()
        return ops.at_least_0(torch.where(teacher[1].any() & student[1].any(), value, torch.zeros_like(value)))
    return ops.at_least_0((torch.exp(log_p) * (log_p - log_q)).sum())


def _mean(similarities: Tensor, kept: Tensor) -> Tensor:
    """Mean of the kept similarities; 0 where there are none."""
    kept_ones = torch.ones_like(similarities) * kept
    return torch.where(kept, similarities, torch.zeros_like(similarities)).sum() / kept_ones.sum().clamp(min=1.0)


def positive_divergence(
    student: Tensor, teacher: Tensor, labels: Tensor, bins: int, width: float, convention: str = "paper"
) -> Tensor:
    """KL(teacher ‖ student) of the histograms of positive pairs, for embeddings of length 1."""
    p, q = _positive_pairs(teacher.detach(), labels, convention), _positive_pairs(student, labels, convention)
    return _divergence(p, q, bins, width, convention)


def negative_divergence(
    student: Tensor, teacher: Tensor, labels: Tensor, bins: int, width: float, negatives: str, convention: str = "paper"
) -> Tensor:
    """KL(teacher ‖ student) of the histograms of negative pairs, for embeddings of length 1."""
    p = _negative_pairs(teacher.detach(), labels, negatives, convention)
    q = _negative_pairs(student, labels, negatives, convention)
    return _divergence(p, q, bins, width, convention)


def order_gap(student: Tensor, teacher: Tensor, labels: Tensor, negatives: str, convention: str = "paper") -> Tensor:
    """Mean negative less mean positive similarity, summed over the four ways to take each from student or teacher."""
    gap = torch.zeros_like(student.sum())
    for embeddings in [student, teacher.detach()]:
        positive, positive_kept = _positive_pairs(embeddings, labels, convention)
        negative, negative_kept = _negative_pairs(embeddings, labels, negatives, convention)
        gap = gap + 2 * (_mean(negative, negative_kept) - _mean(positive, positive_kept))
    return gap


def distribution_distillation_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, bins: int, width: float, negatives: str, convention: str = "paper"
) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms before their weights, for embeddings of length 1; see :class:`DistributionDistillation`."""
    return (
        positive_divergence(student, teacher, labels, bins, width, convention),
        negative_divergence(student, teacher, labels, bins, width, negatives, convention),
        order_gap(student, teacher, labels, negatives, convention),
    )


def distribution_distillation(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    labels: Tensor,
    positive_weight: float,
    negative_weight: float,
    order_weight: float,
    bins: int,
    width: float,
    negatives: str,
    convention: str,
) -> Tensor:
    """Divergence between distributions of pairwise similarities; see :class:`DistributionDistillation`."""
    student = ops.normalize(ops.upcast(student_embeddings), dim=[-1])
    teacher = ops.normalize(ops.upcast(teacher_embeddings.detach()), dim=[-1])
    positive, negative, order = distribution_distillation_terms(
        student, teacher, labels, bins, width, negatives, convention
    )
    return positive_weight * positive + negative_weight * negative + order_weight * order


@register(distribution_distillation)
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
        convention: ``"paper"``: all of the above. ``"tface"``, as the authors' code has it: nodes r/R for r from 0 to R − 1, so
            from 0 up to 1 but for 1 itself; of the positive pairs those of a similarity above 0 alone, by each model's own; the
            hardest negative of a sample among those that come later in the batch, and a similarity of 0 where it is lower
            or none comes; 1e-9 added to every h of both models in the divergence. Formulas alone compute it, no kernel.
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
        With
        ``"tface"`` a divergence is also 0 where one of the models has no pair. NaN in an input gives NaN.

    Raises:
        ValueError: for negative weights, another number of bins, a width that is not positive, other negatives, another
            convention, shapes that do not fit, an empty batch.

    There is no value per sample: every sample is compared with every other. The formula as it stands needs
    O(batch² · bins) memory; the fused kernel O(batch²).

    Who differs: TFace, the authors' code, is ``convention="tface"``, and takes positive pairs and negatives (of which no two are of
    one identity) as separate inputs, and any number of students. What it adds inside the logarithm leaves at most about 20
    nats per node, with nearly no gradient where the histograms do not overlap. ppriyank's
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
        Case({"bins": 100, "convention": "tface"}),
    )
    couples_batch = "compares every sample of the batch with every other"
    aliases = ("DDL",)

    positive_weight: float = scalar(default=0.1, minimum=0.0)
    negative_weight: float = scalar(default=0.02, minimum=0.0)
    order_weight: float = scalar(default=0.5, minimum=0.0)
    bins: int = whole(default=1000, minimum=2, maximum=10_000)
    width: float = number(default=0.1, above=0.0)
    negatives: str = choice(("hardest", "all"), default="hardest")
    convention: str = choice(("paper", "tface"), default="paper")

    def covered_by_kernel(self, given: Mapping[str, Spec]) -> bool:
        return self.convention == "paper" and self.width >= 0.01  # narrower ones would have to meet a node

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
            batch_order=self.convention == "paper" or "TFace's hardest negatives come later in the batch",
            feature_scale=True,
            zero_when_equal=float(self.order_weight) == 0 or "the order term is no divergence",
            symmetric="the divergences go from the teacher to the student",
        )

    def reference(self, student_embeddings, teacher_embeddings, labels):
        """Pair by pair, from the definition."""
        student = _numpy_pairs(student_embeddings, labels, self.negatives, self.convention)
        teacher = _numpy_pairs(teacher_embeddings, labels, self.negatives, self.convention)
        nodes = np.linspace(-1, 1, self.bins) if self.convention == "paper" else np.arange(self.bins) / self.bins
        total = 0.0
        for weight, s, t in zip((self.positive_weight, self.negative_weight), student, teacher, strict=True):
            if len(s) > 0 and len(t) > 0:
                log_q, log_p = (_numpy_log_histogram(x, nodes, self.width) for x in (s, t))
                if self.convention == "tface":
                    log_q, log_p = np.logaddexp(log_q, np.log(1e-9)), np.logaddexp(log_p, np.log(1e-9))
                total += weight * sum(np.exp(lp) * (lp - lq) for lp, lq in zip(log_p, log_q, strict=True))
        for _, lower in (student, teacher):
            for upper, _ in (student, teacher):
                total += self.order_weight * (_numpy_mean(lower) - _numpy_mean(upper))
        return total


def _numpy_pairs(embeddings, labels, negatives, convention):
    """The similarities of positive pairs and of negative pairs, as two lists."""
    x = [unit(row) for row in embeddings]
    positive, negative = [], []
    for i in range(len(x)):
        others = [float(x[i] @ x[j]) for j in range(len(x)) if labels[j] != labels[i]]
        if negatives == "hardest" and convention == "tface":
            negative.append(max([0.0, *(float(x[i] @ x[j]) for j in range(i + 1, len(x)) if labels[j] != labels[i])]))
        elif negatives == "hardest":
            negative += [max(others)] if others else []
        else:
            negative += [float(x[i] @ x[j]) for j in range(i) if labels[j] != labels[i]]
        positive += [float(x[i] @ x[j]) for j in range(i) if labels[j] == labels[i]]
    if convention == "tface":
        positive = [similarity for similarity in positive if similarity > 0]
    return positive, negative


def _numpy_log_histogram(similarities, nodes, width):
    values = [np.logaddexp.reduce([-((s - t) ** 2) / (2 * width**2) for s in similarities]) for t in nodes]
    return np.array(values) - np.logaddexp.reduce(values)


def _numpy_mean(similarities):
    return sum(similarities) / len(similarities) if similarities else 0.0
