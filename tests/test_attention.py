"""Losses on attention: padding has no part in them, and what other libraries divide by."""

import pytest
import torch
from torch.nn import functional as F

import pykd

LENGTHS = (5, 3, 1)
MASK = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)
NAN, INFINITE = float("nan"), float("inf")


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def sides(kinds, tensors):
    """Inputs by name: of the student, which receive the gradient, and of the teacher."""
    student, teacher = tensors
    named = {f"student_{kind}": student.clone().requires_grad_() for kind in kinds}
    return named | {f"teacher_{kind}": teacher for kind in kinds}


MAPS = [
    (pykd.AttentionMapMSE(), ("attention",)),
    (pykd.AttentionMapMSE(heads="sum"), ("attention",)),
    (pykd.AttentionCrossEntropy(), ("attention",)),
    (pykd.AttentionCrossEntropy(heads="mean", form="kl"), ("attention",)),
]


def cut(x, length):
    """One sample without its padding: of maps (batch, heads, tokens, tokens), or of vectors (batch, heads, tokens, channels)."""
    return x[..., :length, :length] if x.shape[-1] == x.shape[-2] else x[..., :length, :]


@pytest.mark.parametrize("padding", [NAN, INFINITE, -INFINITE, 1e30])
@pytest.mark.parametrize(
    ("loss", "kinds"),
    [*MAPS, (pykd.SelfAttentionRelations(), ("queries", "keys", "values"))],
    ids=lambda value: str(value)[:60],
)
def test_padding_is_as_good_as_cut_off(loss, kinds, padding):
    relations = kinds != ("attention",)
    plain = draw(3, 2, 5, 4 if relations else 5)
    tensors = [x.clone() for x in plain]
    for x in tensors:
        for b, length in enumerate(LENGTHS):
            x[b, :, length:] = padding
            if not relations:
                x[b, :, :, length:] = padding
    masks = {"token_mask": MASK} if relations else {"query_mask": MASK, "key_mask": MASK}
    given = sides(kinds, tensors)
    values = loss.with_settings(reduction="none")(**given, **masks)
    values.sum().backward()
    for b, length in enumerate(LENGTHS):
        alone = sides(kinds, [cut(x[b : b + 1], length) for x in plain])
        want = loss(**alone)
        want.backward()
        torch.testing.assert_close(values[b], want)
        for name, tensor in alone.items():
            if tensor.requires_grad:
                got = given[name].grad[b : b + 1]
                torch.testing.assert_close(cut(got, length), tensor.grad)
                torch.testing.assert_close(got.abs().sum(), tensor.grad.abs().sum())  # the padding gets none


@pytest.mark.parametrize("loss", [loss for loss, _ in MAPS], ids=str)
@pytest.mark.parametrize("masks", [("query_mask",), ("key_mask",), ("query_mask", "key_mask")])
def test_a_sample_without_queries_or_keys_is_0_with_the_gradient_0(loss, masks):
    student, teacher = draw(2, 2, 3, 4)
    student.requires_grad_()
    given = {name: torch.zeros(2, 3 if name == "query_mask" else 4, dtype=torch.bool) for name in masks}
    value = loss(student, teacher, **given)
    value.backward()
    assert value == 0 and (student.grad == 0).all()


def test_textbrewer_divides_by_the_pairs_of_the_batch():
    student, teacher = draw(3, 2, 5, 5)
    pairs = MASK.unsqueeze(2) & MASK.unsqueeze(1)
    squares = (student - teacher) ** 2
    masks = {"query_mask": MASK, "key_mask": MASK, "sample_weight": MASK.sum(dim=1) ** 2}
    # Over all heads and pairs that are kept.
    got = pykd.AttentionMapMSE()(student, teacher, **masks)
    torch.testing.assert_close(got, (squares * pairs.unsqueeze(1)).sum() / (2 * pairs.sum()))
    got = pykd.get("att_mse_sum")(heads="sum")(student, teacher, **masks)
    summed = (student.sum(dim=1) - teacher.sum(dim=1)) ** 2
    torch.testing.assert_close(got, (summed * pairs).sum() / pairs.sum())


def test_textbrewer_has_the_same_cross_entropy_where_masked_scores_are_far_below():
    student, teacher = (x - 10_000.0 * ~MASK[:, None, None] for x in draw(3, 2, 5, 5))
    terms = -(F.softmax(teacher, dim=-1) * F.log_softmax(student, dim=-1) * MASK[:, None, None]).sum(dim=-1)
    want = (terms * MASK[:, None]).sum() / (2 * MASK.sum())
    masks = {"query_mask": MASK, "key_mask": MASK, "sample_weight": MASK.sum(dim=1)}
    torch.testing.assert_close(pykd.AttentionCrossEntropy()(student, teacher, **masks), want)


def test_entries_below_the_threshold_count_as_0():
    student, teacher = torch.tensor([[[-INFINITE, 1.0]]]), torch.tensor([[[-10_000.0, 3.0]]])
    assert pykd.AttentionMapMSE()(student, teacher) == 2.0
    assert pykd.AttentionMapMSE(threshold=-1e30)(student.clamp(min=-2.0), teacher.clamp(min=-3.0)) == 2.5


def test_relations_do_not_ask_for_as_many_heads_of_attention():
    """12 heads of width 2 and 2 of width 3, both split anew into 2 relation heads: see MiniLMv2, section 3.2."""
    student, teacher = draw(2, 5, 6)[0], draw(2, 5, 24)[0]
    kinds = ("queries", "keys", "values")
    heads = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (student, teacher)]
    want = 0.0
    for b in range(2):
        for h in range(2):
            q = (student[b, :, 3 * h : 3 * h + 3] @ student[b, :, 3 * h : 3 * h + 3].T / 3**0.5).log_softmax(-1)
            p = (teacher[b, :, 12 * h : 12 * h + 12] @ teacher[b, :, 12 * h : 12 * h + 12].T / 12**0.5).log_softmax(-1)
            want += 3 * F.kl_div(q, p, log_target=True, reduction="sum") / (2 * 2 * 5)
    torch.testing.assert_close(pykd.SelfAttentionRelations()(**sides(kinds, heads)), want)
