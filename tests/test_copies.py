"""A loss is part of a training state: it is copied, saved and sent to processes, before its first call and after it."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import pykd
from pykd.composition import Composition
from tests.conftest import composed_subjects, one_per_loss, subjects


def saved_and_loaded(loss):
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "save": saved_and_loaded,
    "averaged": lambda loss: AveragedModel(torch.nn.ModuleList([loss])).module[0],
    "to": lambda loss: copy.deepcopy(loss).to(torch.float64),
}


def use(subject, loss):
    """The loss's value, called as its users do."""
    tensors = subject.draw(seed=1)
    return loss(**tensors) if subject.composition.single else call(loss, tensors)


def call(composition, tensors):
    """By the flat names, which a DistillationLoss has as well."""
    return Composition.forward(composition, **tensors)["loss"]


def what_users_hold(subject):
    """The bare loss, or the composition."""
    return subject.composition.named_terms[0].parts[0].loss if subject.composition.single else subject.composition


ONE = pytest.mark.parametrize("one", [*one_per_loss(), *composed_subjects()], ids=str)


@ONE
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same(one, way, used):
    subject = one
    loss = copy.deepcopy(what_users_hold(subject))
    want = use(subject, what_users_hold(subject))
    if used:
        use(subject, loss)
    made = COPIES[way](loss)
    assert repr(made) == repr(loss)
    torch.testing.assert_close(use(subject, made), want, rtol=0, atol=0)
    torch.testing.assert_close(use(subject, loss), want, rtol=0, atol=0)
    torch.testing.assert_close(use(subject, COPIES[way](made)), want, rtol=0, atol=0)


@ONE
@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "save"])
def test_copies_of_a_graph_compute_the_same(one, way):
    subject = one
    graph = subject.graph(check=True)
    tensors = subject.draw(seed=2)
    made = COPIES[way](graph)
    assert made.signature == graph.signature and made.code == graph.code
    for name, value in graph(**tensors).items():
        torch.testing.assert_close(made(**tensors)[name], value, rtol=0, atol=0)


def test_functions_are_sent_by_their_name(loss_class):
    function = getattr(pykd.functional, loss_class.name)
    assert pickle.loads(pickle.dumps(function)) is function


def in_the_child(loss, tensors, results):
    torch.set_num_threads(1)
    results.put([float(call(one, given)) for one, given in zip(loss, tensors, strict=True)])


def test_used_compositions_reach_a_spawned_process():
    """One process for all of them: it imports torch anew."""
    every = [subject for subject in subjects() if not subject.composition.single]
    tensors = [subject.draw(seed=3) for subject in every]
    losses = [subject.composition for subject in every]
    want = [float(call(loss, given)) for loss, given in zip(losses, tensors, strict=True)]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=in_the_child, args=(losses, tensors, results))
    child.start()
    got = results.get(timeout=120)
    child.join()
    assert child.exitcode == 0 and got == want
