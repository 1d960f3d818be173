"""Every loss behind a model in DistributedDataParallel: two processes train as one does on the whole batch."""

import os

import pytest
import torch
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import loss_subjects

PROCESSES, ROWS, ROUNDS = 2, 3, 3
MODES = ("off", "auto")


class Distilled(torch.nn.Module):
    """A layer for each tensor of the student, and the loss of what they give."""

    def __init__(self, subject, kernels):
        super().__init__()
        torch.manual_seed(0)
        self.loss, self.kernels = subject.loss, kernels
        lengths = {name: tensor.shape[-1] for name, tensor in subject.draw().items() if subject.specs[name].grad}
        self.layers = torch.nn.ModuleDict({name: torch.nn.Linear(n, n) for name, n in lengths.items()})

    def forward(self, **tensors):
        return self.loss(
            **{name: self.layers[name](t) if name in self.layers else t for name, t in tensors.items()},
            kernels=self.kernels,
        )


def every_case():
    """What each process trains with, the same in each: the loss, how, and the whole batch."""
    for subject in loss_subjects():
        tensors = subject.draw({"batch": PROCESSES * ROWS}, seed=1, dtype=torch.float32)
        # Labels and weights are those of the first rows again, so that no process's mean is of more than another's.
        for name in tensors.keys() - set(subject.inputs_of("logits", "features")):
            if subject.specs[name].names[0] == "batch":
                tensors[name] = torch.cat([tensors[name][:ROWS]] * PROCESSES)
        for kernels in MODES:
            yield subject, kernels, tensors


def gradients(module, model, tensors):
    module.zero_grad()
    model(**tensors).backward()
    return [p.grad.clone() for p in module.parameters()]


def share_of(subject, tensors, rank):
    return subject.take(tensors, slice(rank * ROWS, (rank + 1) * ROWS))


def train(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", PROCESSES)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    found = []
    for subject, kernels, tensors in every_case():
        module = Distilled(subject, kernels)
        model = DistributedDataParallel(module)
        own = share_of(subject, tensors, rank)
        found.append([gradients(module, model, own) for _ in range(ROUNDS)][-1])
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()
    # torch's threads outlive the group, and now and then abort the process when the interpreter ends beneath them.
    os._exit(0)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(train, (str(tmp_path),), nprocs=PROCESSES)
    every = [torch.load(tmp_path / str(rank)) for rank in range(PROCESSES)]
    for (subject, kernels, tensors), *processes in zip(every_case(), *every, strict=True):
        module = Distilled(subject, kernels)
        if subject.loss.couples_batch:  # every process compares its own samples with each other
            shares = [gradients(module, module, share_of(subject, tensors, rank)) for rank in range(PROCESSES)]
            want = [torch.stack(each).mean(dim=0) for each in zip(*shares, strict=True)]
        else:
            want = gradients(module, module, tensors)
            if subject.loss.reduction == "sum":  # the processes' gradients are averaged
                want = [gradient / PROCESSES for gradient in want]
        for rank, found in enumerate(processes):
            largest = max(
                wanted.abs().max().item() for wanted in want
            )  # beside which one that is 0 by symmetry is rounding
            for got, wanted in zip(found, want, strict=True):
                limit = 1e-6 * largest + 1e-5 * wanted.abs().max().item() + 1e-4 * wanted.abs()
                assert ((got - wanted).abs() <= limit).all(), f"{subject}, kernels={kernels}, process {rank}"
