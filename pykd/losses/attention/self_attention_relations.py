"""Relations of self-attention: how queries, keys and values resemble their own kind, token by token."""

import numpy as np
import torch
from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Case, Loss, Properties, Spec, ops, register, scalar
from pykd.definition.reference import divergence, log_softmax, reduce_samples
from pykd.losses.attention._shared import kept_scores, mean_over_queries, query_weights


def _relation(vectors: Tensor, weight: Tensor | None, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
    """Scaled products of all pairs of tokens, ``(batch, relation_heads, tokens, tokens)``."""
    x = ops.upcast(ops.without_left_out(vectors, weight))
    x = x.masked_fill((tokens == 0).unsqueeze(1).unsqueeze(-1), 0.0)
    channels = torch.ones([x.size(-1)], dtype=x.dtype, device=x.device).sum()
    return kept_scores(ops.matmul(x, x.transpose(-1, -2)) / torch.sqrt(channels), tokens, token_mask)


def self_attention_relations(
    student_queries: Tensor,
    student_keys: Tensor,
    student_values: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    teacher_values: Tensor,
    sample_weight: Tensor | None,
    token_mask: Tensor | None,
    query_weight: float,
    key_weight: float,
    value_weight: float,
    reduction: str,
) -> Tensor:
    """Divergence of three relations of tokens; see :class:`SelfAttentionRelations`."""
    weight = ops.optional_weight(sample_weight)
    tokens = query_weights(ops.upcast(student_queries), token_mask, None)
    students = [student_queries, student_keys, student_values]
    teachers = [teacher_queries, teacher_keys, teacher_values]
    factors = [query_weight, key_weight, value_weight]
    total = torch.zeros_like(tokens[:, 0])
    for student, teacher, factor in zip(students, teachers, factors):  # noqa: B905  TorchScript knows no strict
        rows = ops.softened_divergence(
            _relation(student, weight, tokens, token_mask),
            _relation(teacher.detach(), weight, tokens, token_mask),
            1.0,
        )
        total = total + factor * mean_over_queries(rows, tokens)
    return ops.reduce(total, weight, reduction)


@register(self_attention_relations)
class SelfAttentionRelations(Loss):
    r"""KL divergence between the teacher's and the student's relations of queries to queries, keys to keys and values to values.

    .. math:: \ell_b = \sum_{r \in \{Q, K, V\}} \alpha_r \frac{1}{H n_b} \sum_h \sum_i
              \mathrm{KL}\big(\mathrm{softmax}_j(R^t_{rbhij}) \,\Vert\, \mathrm{softmax}_j(R^s_{rbhij})\big), \quad
              R_{rbhij} = \frac{r_{bhi} \cdot r_{bhj}}{\sqrt{d}}

    over H relation heads and the n kept tokens of a sample, with the width d of a head, the student's or the teacher's. The
    relations of both are of the same size whatever their widths and their own numbers of heads: all they share is the number
    of relation heads, into which the vectors of all attention heads, side by side, are split anew.

    Args:
        query_weight: α of the queries, at least 0.
        key_weight: α of the keys, at least 0.
        value_weight: α of the values, at least 0. With it alone this is the value relation of MiniLM, whose attention transfer is
            ``attention_cross_entropy(form="kl")``.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_queries: ``(batch, relation_heads, tokens, channels)``, any floating type; receives the gradient. Of
            ``(batch, tokens, width)`` it is ``x.unflatten(-1, (relation_heads, -1)).transpose(1, 2)``.
        student_keys: the same shape and type; receives the gradient.
        student_values: the same shape and type; receives the gradient.
        teacher_queries: ``(batch, relation_heads, tokens, teacher_channels)``, same type; constant.
        teacher_keys: the same shape and type; constant.
        teacher_values: the same shape and type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.
        token_mask: optional ``(batch, tokens)``, a mask: what it leaves out (padding) is no query, and no key of the
            others, whatever it holds; constant.

    Returns:
        Nats, at least 0; 0 for a sample of which no token is kept; a scalar unless ``reduction="none"``. float32 for
        half-precision inputs, which are computed in float32. NaN in an input gives NaN.

    Raises:
        ValueError: for a negative weight, shapes that do not fit, an empty batch.

    Who differs: bloomberg/minilmv2.bb has the same numbers, relations of unlike kinds (query to key) as well, and weights of
    1/3 in its example.

    Example:
        One head of width 1. The teacher's first token is more like itself than like the second: softmax(4, 0) has
        log 2 − 0.6030 nats of entropy, where the student's is even; half the tokens are so.

        >>> student, teacher = torch.zeros(1, 1, 2, 1), torch.tensor([[[[2.0], [0.0]]]])
        >>> SelfAttentionRelations()(student, student, student, teacher, student, student)
        tensor(0.3015)

    References:
        Wang et al.: MiniLMv2, 2020, arXiv:2012.15828; Wang et al.: MiniLM, 2020, arXiv:2002.10957.
    """

    inputs = {
        **{
            f"student_{kind}": Spec("batch relation_heads tokens channels", grad=True, like=f"teacher_{kind}")
            for kind in ("queries", "keys", "values")
        },
        **{
            f"teacher_{kind}": Spec("batch relation_heads tokens teacher_channels")
            for kind in ("queries", "keys", "values")
        },
        "sample_weight": SAMPLE_WEIGHT,
        "token_mask": Spec("batch tokens", dtype="weight", optional=True, draw="mask"),
    }
    cases = (
        Case(),
        Case(
            {"query_weight": 0.5, "key_weight": 0.25, "value_weight": 2.0, "reduction": "sum"},
            optional=("sample_weight", "token_mask"),
        ),
    )
    aliases = ("MiniLMv2", "MiniLM")

    query_weight: float = scalar(default=1.0, minimum=0.0)
    key_weight: float = scalar(default=1.0, minimum=0.0)
    value_weight: float = scalar(default=1.0, minimum=0.0)

    def properties(self) -> Properties:
        return Properties(
            feature_scale="larger vectors make a sharper softmax",
            zero_when_equal=True,
            symmetric="the teacher weighs the logarithms",
        )

    def reference(
        self,
        student_queries,
        student_keys,
        student_values,
        teacher_queries,
        teacher_keys,
        teacher_values,
        sample_weight=None,
        token_mask=None,
    ):
        relations = (
            (self.query_weight, student_queries, teacher_queries),
            (self.key_weight, student_keys, teacher_keys),
            (self.value_weight, student_values, teacher_values),
        )
        batch, heads, tokens, _ = np.shape(student_queries)
        values = []
        for b in range(batch):
            counts = np.ones(tokens) if token_mask is None else np.asarray(token_mask[b], np.float64)
            kept = np.flatnonzero(counts)
            value = 0.0
            for alpha, student, teacher in relations:
                for h in range(heads):
                    x, y = student[b, h][kept], teacher[b, h][kept]
                    for i, token in enumerate(kept):
                        log_q = log_softmax(x @ x[i] / np.sqrt(x.shape[1]))
                        log_p = log_softmax(y @ y[i] / np.sqrt(y.shape[1]))
                        value += alpha * counts[token] * divergence(log_p, log_q) / (heads * counts.sum())
            values.append(value)
        return reduce_samples(values, sample_weight, self.reduction)
