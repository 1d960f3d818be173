"""Cross-entropy between attention distributions: every query's softmax over the keys."""

from torch import Tensor

from pykd.definition import SAMPLE_WEIGHT, Alias, Case, Loss, Properties, Spec, choice, ops, register
from pykd.definition.reference import divergence, expectation, log_softmax, reduce_samples
from pykd.losses.attention._shared import kept_scores, mean_over_queries, query_weights, with_heads

HEADS = ("each", "mean")
FORMS = ("cross_entropy", "kl")


def _scores(attention: Tensor, weight: Tensor | None, queries: Tensor, key_mask: Tensor | None, heads: str) -> Tensor:
    scores = with_heads(ops.without_left_out(attention, weight))
    if heads == "mean":
        scores = scores.mean(dim=1, keepdim=True)
    return kept_scores(scores, queries, key_mask)


def attention_cross_entropy(
    student_attention: Tensor,
    teacher_attention: Tensor,
    sample_weight: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    heads: str,
    form: str,
    reduction: str,
) -> Tensor:
    """Cross-entropy of attention, mean over heads and kept queries; see :class:`AttentionCrossEntropy`."""
    weight = ops.optional_weight(sample_weight)
    queries = query_weights(with_heads(student_attention), query_mask, key_mask)
    student = _scores(student_attention, weight, queries, key_mask, heads)
    teacher = _scores(teacher_attention.detach(), weight, queries, key_mask, heads)
    values = mean_over_queries(ops.softened_divergence(student, teacher, 1.0, form), queries)
    return ops.reduce(values, weight, reduction)


@register(attention_cross_entropy)
class AttentionCrossEntropy(Loss):
    r"""Cross-entropy (or KL divergence) of the student's attention against the teacher's, each a softmax over the keys.

    .. math:: \ell_b = -\frac{1}{H \sum_i m_{bi}} \sum_h \sum_i m_{bi} \sum_j p_{bhij} \log q_{bhij}, \quad
              p = \mathrm{softmax}_j(B), \; q = \mathrm{softmax}_j(A)

    with the student's scores A, the teacher's B, H heads, and a mask m of queries. With ``form="kl"``
    :math:`\sum_j p (\log p - \log q)` stands in the place of the cross-entropy: MiniLM's attention transfer.

    Args:
        heads: ``"each"``: every head of the student is compared with its like; ``"mean"``: the scores are averaged over the
            heads before the softmax (and H is 1).
        form: ``"cross_entropy"`` or ``"kl"``.
        reduction: ``"mean"``: Σ w·ℓ / Σ w with w = ``sample_weight`` or 1; ``"sum"``; ``"none"``: ``(batch,)``.

    Inputs:
        student_attention: ``(batch, heads, queries, keys)``, or ``(batch, queries, keys)``: scores before the softmax, or
            logarithms of probabilities; any floating type; receives the gradient. −inf masks a key. Where the
            teacher has another number of heads pass both averaged, ``attention.mean(dim=1)``.
        teacher_attention: the same shape and type; constant.
        sample_weight: optional ``(batch,)``, at least 0, of any floating type, or a mask (bool or integers); constant. A
            sample of weight 0 has no part in value and gradient, whatever it holds.
        query_mask: optional ``(batch, queries)``, a mask (or weights) of the tokens that look; constant. In self-attention it is
            that of the keys, too.
        key_mask: optional ``(batch, keys)``, of the tokens that are looked at: a masked key has no part in either
            softmax; constant.

    Returns:
        Nats, at least 0; 0 for a sample of which no query or no key is kept; a scalar unless ``reduction="none"``. float32
        for half-precision inputs, which are computed in float32. A key that only the student masks (−inf) gives +inf. NaN in an
        input gives NaN.

    Raises:
        ValueError: for shapes that do not fit, an empty batch.

    Who differs: TextBrewer's att_ce (and att_ce_mean, ``heads="mean"``) leaves masked keys in both softmaxes and takes their
    terms out after that, which is the same where their scores are −10,000; without a mask it takes out every key to which the
    teacher gives a score of at most −0.001. It divides by the queries of the whole batch: ``sample_weight=mask.sum(dim=1)``.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, 2.0]]]])
        >>> AttentionCrossEntropy()(student, teacher)
        tensor(0.6931)
        >>> AttentionCrossEntropy(form="kl")(student, teacher)
        tensor(0.3278)

    References:
        Yang et al.: TextBrewer, 2020, arXiv:2002.12620; Wang et al.: MiniLM, 2020, arXiv:2002.10957 (the KL form).
    """

    inputs = {
        "student_attention": (
            Spec("batch heads queries keys", grad=True, draw="logits", like="teacher_attention"),
            Spec("batch queries keys", grad=True, draw="logits", like="teacher_attention"),
        ),
        "teacher_attention": (
            Spec("batch heads queries keys", draw="logits"),
            Spec("batch queries keys", draw="logits"),
        ),
        "sample_weight": SAMPLE_WEIGHT,
        "query_mask": Spec("batch queries", dtype="weight", optional=True, draw="mask"),
        "key_mask": Spec("batch keys", dtype="weight", optional=True, draw="mask"),
    }
    cases = (
        Case(),
        Case({"heads": "mean", "form": "kl"}, optional=("query_mask", "key_mask")),
        Case(
            {"reduction": "sum"},
            layouts={"student_attention": "batch queries keys"},
            optional=("sample_weight", "key_mask"),
        ),
    )
    aliases = ("att_ce", "att_ce_loss", Alias("att_ce_mean", heads="mean"), Alias("att_ce_mean_loss", heads="mean"))

    heads: str = choice(HEADS, default="each")
    form: str = choice(FORMS, default="cross_entropy")

    def properties(self) -> Properties:
        return Properties(
            logit_shift=True,
            masked_classes=True,
            zero_when_equal=self.form == "kl" or "the entropy of the teacher is left",
            symmetric="the teacher weighs the logarithms",
        )

    def reference(self, student_attention, teacher_attention, sample_weight=None, query_mask=None, key_mask=None):
        values = []
        for b, maps in enumerate(zip(student_attention, teacher_attention, strict=True)):
            x, y = (m if m.ndim == 3 else m[None] for m in maps)
            if self.heads == "mean":
                x, y = (m.mean(axis=0, keepdims=True) for m in (x, y))
            heads, queries, keys = x.shape
            kept = [j for j in range(keys) if key_mask is None or key_mask[b][j] != 0]
            total = count = 0.0
            for i in range(queries):
                counts = 1.0 if query_mask is None else query_mask[b][i]
                if counts == 0 or not kept:
                    continue
                for h in range(heads):
                    log_q, log_p = log_softmax(x[h, i, kept]), log_softmax(y[h, i, kept])
                    own = divergence(log_p, log_q) if self.form == "kl" else -expectation(log_p, log_q)
                    total += counts * own / heads
                count += counts
            values.append(total / count if count != 0 else 0.0)
        return reduce_samples(values, sample_weight, self.reduction)
