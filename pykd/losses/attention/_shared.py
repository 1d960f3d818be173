"""What losses on attention share: masks of queries and keys."""

import torch
from torch import Tensor

from pykd.definition import ops


def with_heads(attention: Tensor) -> Tensor:
    """``(batch, heads, queries, keys)`` in the compute type; one head where the input has none."""
    return ops.upcast(attention if attention.dim() == 4 else attention.unsqueeze(1))


def query_weights(attention: Tensor, query_mask: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """``(batch, queries)``: what every query counts; 0 for all of a sample of which no key is kept."""
    weights = torch.ones_like(attention[:, 0, :, 0].detach())
    queries, keys = ops.optional_weight(query_mask), ops.optional_weight(key_mask)
    if queries is not None:
        weights = weights * queries.to(weights.dtype)
    if keys is not None:
        weights = weights * (keys != 0).any(dim=1, keepdim=True)
    return weights


def kept_scores(scores: Tensor, queries: Tensor, key_mask: Tensor | None) -> Tensor:
    """``scores`` with −inf for the keys that are masked, and with zeros for the queries of weight 0, whatever they hold.

    Args:
        scores: ``(batch, heads, queries, keys)``.
        queries: of :func:`query_weights`.
        key_mask: ``(batch, keys)``, or None.
    """
    left_out = (queries == 0).unsqueeze(1).unsqueeze(-1)
    scores = scores.masked_fill(left_out, 0.0)
    keys = ops.optional_weight(key_mask)
    if keys is None:
        return scores
    masked = (keys == 0).unsqueeze(1).unsqueeze(1)
    return scores.masked_fill(masked & ~left_out, float("-inf"))


def mean_over_queries(values: Tensor, queries: Tensor) -> Tensor:
    """``(batch, heads, queries)`` → ``(batch,)``: mean over heads and, by their weights, queries; 0 where none is kept."""
    total = queries.sum(dim=1, keepdim=True)
    shares = queries / torch.where(total == 0, 1.0, total)
    return ops.product_or_zero(shares, values.mean(dim=1)).sum(dim=1)
