"""Mean squared difference of attention maps."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, number, ops, register
from pykd.definition.reference import reduce_samples
from pykd.losses.attention._shared import with_heads

HEADS = ("each", "sum")


def _maps(attention: Tensor, weight: Tensor | None, pairs: Tensor, heads: str, threshold: float) -> Tensor:
    maps = with_heads(ops.without_left_out(attention, weight)).masked_fill((pairs == 0).unsqueeze(1), 0.0)
    maps = torch.where(maps <= threshold, 0.0, maps)
    return maps.sum(dim=1, keepdim=True) if heads == "sum" else maps


def _pairs(attention: Tensor, query_mask: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """``(batch, queries, keys)``: what every pair counts."""
    pairs = torch.ones_like(with_heads(attention.detach())[:, 0])
    queries, keys = ops.optional_weight(query_mask), ops.optional_weight(key_mask)
    if queries is not None:
        pairs = pairs * queries.to(pairs.dtype).unsqueeze(2)
    if keys is not None:
        pairs = pairs * keys.to(pairs.dtype).unsqueeze(1)
    return pairs


def attention_map_mse(
    student_attention: Tensor,
    teacher_attention: Tensor,
    sample_weight: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    heads: str,
    threshold: float,
    reduction: str,
) -> Tensor:
    """Mean squared difference over heads and kept pairs of tokens; see :class:`AttentionMapMSE`."""
    weight = ops.optional_weight(sample_weight)
    pairs = _pairs(student_attention, query_mask, key_mask)
    student = _maps(student_attention, weight, pairs, heads, threshold)
    teacher = _maps(teacher_attention.detach(), weight, pairs, heads, threshold)
    squares = torch.square(student - teacher).mean(dim=1)
    total = pairs.sum(dim=[1, 2])
    values = (pairs * squares).sum(dim=[1, 2]) / torch.where(total == 0, 1.0, total)
    return ops.reduce(values, weight, reduction)


@register(attention_map_mse)
class AttentionMapMSE(Loss):
    r"""Mean squared difference between the student's and the teacher's attention maps, head by head or summed over the heads.

    .. math:: \ell_b = \frac{1}{H \sum_{ij} m_{bi} n_{bj}} \sum_h \sum_{ij} m_{bi} n_{bj} (A_{bhij} - B_{bhij})^2

    with the student's maps A, the teacher's B, H heads, and masks m of queries and n of keys. The maps are what comes before the
    softmax (TinyBERT found that to converge faster), or the probabilities after it.

    Args:
        heads: ``"each"``: every head of the student is compared with its like; ``"sum"``: the sum over heads is compared (and H is 1).
        threshold: entries at or below it, of student or teacher, count as 0, at most 0. They are what a mask that is added to the
            scores made of them (−10,000, −inf). TinyBERT's code has −100, TextBrewer −0.001; −1e30 keeps all that are finite.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_attention: ``(batch, heads, queries, keys)``, or ``(batch, queries, keys)``, any floating type; receives the
            gradient. Where the teacher has another number of heads pass both summed, ``attention.sum(dim=1)``.
        teacher_attention: the same shape and type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.
        query_mask: optional ``(batch, queries)``, a mask (or weights) of the tokens that look; constant. In self-attention it is
            that of the keys, too.
        key_mask: optional ``(batch, keys)``, of the tokens that are looked at; constant.

    Returns:
        At least 0, in the square of the unit of the maps; 0 for a sample of which no pair is kept; a scalar unless
        ``reduction="none"``. float32 for half-precision inputs, which are computed in float32. NaN in an input gives NaN.

    Raises:
        ValueError: for a threshold above 0, shapes that do not fit, an empty batch.

    Who differs: TextBrewer's att_mse (and att_mse_sum, ``heads="sum"``) takes its threshold only where no mask is given; with
    a mask it divides by the pairs of the whole batch: ``sample_weight=mask.sum(dim=1) ** 2``.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 0.0]], [[1.0, 2.0]]]])
        >>> AttentionMapMSE()(student, teacher)
        tensor(1.5000)
        >>> AttentionMapMSE(heads="sum")(student, teacher, key_mask=torch.tensor([[True, False]]))
        tensor(4.)

    References:
        Jiao et al.: TinyBERT, 2019, arXiv:1909.10351; Yang et al.: TextBrewer, 2020, arXiv:2002.12620 (the sum over heads).
    """

    inputs = {
        "student_attention": (
            Spec("batch heads queries keys", grad=True, like="teacher_attention"),
            Spec("batch queries keys", grad=True, like="teacher_attention"),
        ),
        "teacher_attention": (Spec("batch heads queries keys"), Spec("batch queries keys")),
        "sample_weight": SAMPLE_WEIGHT,
        "query_mask": Spec("batch queries", dtype="weight", optional=True, draw="mask"),
        "key_mask": Spec("batch keys", dtype="weight", optional=True, draw="mask"),
    }
    cases = (
        Case(),
        Case({"heads": "sum", "threshold": -1.0}, optional=("query_mask", "key_mask")),
        Case(
            {"reduction": "sum"},
            layouts={"student_attention": "batch queries keys"},
            optional=("sample_weight", "key_mask"),
        ),
    )
    aliases = ("att_mse", "att_mse_loss", Alias("att_mse_sum", heads="sum"), Alias("att_mse_sum_loss", heads="sum"))

    heads: str = choice(HEADS, default="each")
    threshold: float = number(default=-100.0, maximum=0.0)

    def properties(self) -> Properties:
        return Properties(
            feature_scale="differences have the scale of what they are taken of", zero_when_equal=True, symmetric=True
        )

    def reference(self, student_attention, teacher_attention, sample_weight=None, query_mask=None, key_mask=None):
        values = []
        for b, maps in enumerate(zip(student_attention, teacher_attention, strict=True)):
            x, y = (np.where(m <= self.threshold, 0.0, m) for m in maps)
            x, y = (m if m.ndim == 3 else m[None] for m in (x, y))
            if self.heads == "sum":
                x, y = (m.sum(axis=0, keepdims=True) for m in (x, y))
            heads, queries, keys = x.shape
            total = count = 0.0
            for i in range(queries):
                for j in range(keys):
                    pair = (1.0 if query_mask is None else query_mask[b][i]) * (
                        1.0 if key_mask is None else key_mask[b][j]
                    )
                    total += pair * sum((x[h, i, j] - y[h, i, j]) ** 2 for h in range(heads)) / heads
                    count += pair
            values.append(total / count if count != 0 else 0.0)
        return reduce_samples(values, sample_weight, self.reduction)
