"""NumPy float64 pieces that the references of several losses share. No torch in here."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def log_softmax(logits: Any) -> np.ndarray:
    """log softmax of one row, by log-sum-exp; −inf logits have probability 0."""
    row = np.asarray(logits, dtype=np.float64)
    shifted = row - row.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def reduce_samples(values: Sequence[float], weights: Sequence[float], reduction: str) -> Any:
    """Σ w·v / Σ w (0 where nothing is kept), Σ w·v, or the vector w·v; a weight of 0 drops its value."""
    weighted = np.array([0.0 if w == 0 else w * v for v, w in zip(values, weights, strict=True)])
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = float(np.sum(weights))
    return weighted.sum() / total if total != 0 else 0.0


def unit(vector: Any) -> np.ndarray:
    """A vector divided by its Euclidean norm; the zero vector stays zero."""
    row = np.asarray(vector, dtype=np.float64)
    norm = np.sqrt((row**2).sum())
    return row / norm if norm > 1e-12 else np.zeros_like(row)
