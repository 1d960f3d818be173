"""What is known of losses on the scores of candidates."""

import math

import torch

import pykd


def scores(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_margins_are_those_of_mean_squared_error():
    """As sentence-transformers computes it: the mean over all margins of the batch."""
    student, teacher = scores(5, 4), scores(5, 4, seed=1)
    margins = [x[:, :1] - x[:, 1:] for x in (student, teacher)]
    torch.testing.assert_close(pykd.MarginMSE()(student, teacher), torch.nn.functional.mse_loss(*margins))


def test_candidates_that_are_not_there_do_not_count():
    student, teacher = scores(3, 5), scores(3, 5, seed=1)
    fewer = [torch.cat([x[:, :3], torch.full((3, 2), -math.inf).double()], dim=-1) for x in (student, teacher)]
    for loss in (pykd.MarginMSE(), pykd.ListwiseKL(temperature=2.0)):
        given = fewer[0].clone().requires_grad_()
        value = loss(given, fewer[1])
        value.backward()
        torch.testing.assert_close(value.detach(), loss(student[:, :3], teacher[:, :3]))
        assert torch.isfinite(given.grad).all() and (given.grad[:, 3:] == 0).all()
    alone = [torch.cat([x[:, :1], torch.full((3, 2), -math.inf).double()], dim=-1) for x in (student, teacher)]
    assert pykd.MarginMSE()(*alone) == 0


def test_a_list_is_a_distribution():
    student, teacher = scores(5, 4), scores(5, 4, seed=1)
    soft = pykd.SoftTarget(3.0, form="kl", tau_squared=True)
    torch.testing.assert_close(pykd.ListwiseKL(temperature=3.0)(student, teacher), soft(student, teacher))
