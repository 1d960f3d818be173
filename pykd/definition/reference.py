"""NumPy float64 pieces that the references of several losses share. No torch in here."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def log_softmax(logits: Any) -> np.ndarray:
    """log softmax of one row, by log-sum-exp; −inf logits have probability 0."""
    row = np.asarray(logits, dtype=np.float64)
    shifted = row - row.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def expectation(log_probabilities: Any, terms: Any) -> float:
    """Σ p · term of two rows, where a probability of 0 takes its term out, even an infinite one."""
    p = np.exp(log_probabilities)
    return float((p[p != 0] * np.asarray(terms)[p != 0]).sum())


def divergence(log_p: Any, log_q: Any) -> float:
    """KL(p‖q) = Σ p (log p − log q) of two rows."""
    log_p, log_q = np.asarray(log_p), np.asarray(log_q)
    kept = np.exp(log_p) != 0
    return expectation(log_p[kept], log_p[kept] - log_q[kept])


def part(weight: float, value: float) -> float:
    """weight · value of a part of a loss, which with the weight 0 counts for nothing, even where it is infinite."""
    return 0.0 if weight == 0 and np.isinf(value) else weight * value


def rows(array: Any, axes: int) -> np.ndarray:
    """An array with one row per sample: its last ``axes`` axes are kept, those before become one."""
    shape = np.shape(array)
    return np.reshape(np.asarray(array), (-1, *shape[len(shape) - axes :]))


def labelled(labels: Any, sample_weight: Any, ignore_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights of all samples: weight 0 where the label is ``ignore_index``, label 0 where the weight is 0."""
    labels = np.asarray(labels)
    weights = np.ones(labels.shape) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    weights = np.where(labels == ignore_index, 0.0, weights)
    return np.where(weights == 0, 0, labels), weights


def reduce_samples(
    values: Sequence[float],
    weights: Any,
    reduction: str,
    shape: Sequence[int] | None = None,
    counts: Sequence[float] | None = None,
) -> Any:
    """Σ w·v / Σ w (0 where nothing is kept), Σ w·v, or every w·v; a weight of 0 drops its value.

    Args:
        values: one per sample.
        weights: as many, in any shape; None: 1 each.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        shape: of what ``"none"`` returns.
        counts: what a sample counts in the divisor, where it is not its weight.
    """
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64).ravel()
    weighted = np.array([0.0 if w == 0 else w * v for v, w in zip(values, weights, strict=True)])
    if reduction == "none":
        return weighted if shape is None else weighted.reshape(shape)
    if reduction == "sum":
        return weighted.sum()
    total = float(np.sum(weights if counts is None else counts))
    return weighted.sum() / total if total != 0 else 0.0


def unit(vector: Any) -> np.ndarray:
    """A vector divided by its Euclidean norm; the zero vector stays zero."""
    row = np.asarray(vector, dtype=np.float64)
    largest = np.abs(row).max()
    if largest == 0:
        return np.zeros_like(row)
    scaled = row / largest  # squares of very large and very small numbers would not fit
    return np.asarray(scaled / np.sqrt((scaled**2).sum()))
