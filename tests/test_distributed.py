"""Losses of the joined batch: 2 and 4 processes, of different numbers of samples, against one that has all of them."""

import os

import pytest
import torch
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

import pykd
from pykd.distributed import GRADIENTS, Gathered, gather
from tests.conftest import composed_subjects, forms_of_inputs

pytestmark = pytest.mark.slow

ROWS = {2: (3, 1), 4: (2, 1, 3, 2)}


def every_case(processes):
    """The losses that couple the batch, each in every form of its inputs, and compositions; with the whole batch."""
    composed = {str(subject) for subject in composed_subjects() if not subject.composition.students}
    for subject in forms_of_inputs():
        if str(subject) in composed or (not subject.composition.students and subject.loss.couples_batch):
            loss = subject.composition if str(subject) in composed else subject.loss
            yield subject, loss, subject.draw({"batch": sum(ROWS[processes])}, seed=1)


def evaluate(subject, loss, tensors):
    """The value, and the gradients of the student's tensors."""
    leaves = {n: t.clone().requires_grad_(subject.specs[n].grad) for n, t in tensors.items()}
    # A composition as such: its inputs are flat, those of a DistillationLoss are lists.
    module = loss.loss if isinstance(loss, Gathered) else loss
    if isinstance(module, pykd.DistillationLoss):
        leaves_given = {n: t for n, t in leaves.items() if n[-1].isalpha()}
        for name in ("student_features", "teacher_features"):
            found = {int(n.rpartition("_")[2]): t for n, t in leaves.items() if n.startswith(f"{name}_")}
            if found:
                leaves_given[name] = [found[i] for i in sorted(found)]
    else:
        leaves_given = leaves
    value = loss(**leaves_given)
    value = value["loss"] if isinstance(value, dict) else value
    value.backward()
    return [value.detach(), *(leaves[n].grad for n in leaves if leaves[n].requires_grad)]


def take(subject, tensors, rank, rows):
    start = sum(rows[:rank])
    return subject.take(tensors, slice(start, start + rows[rank]))


class Student(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.loss = torch.nn.Linear(5, 5).double(), loss

    def forward(self, x, teacher):
        return self.loss(self.layer(x), teacher)


def batch_of_models(rows):
    generator = torch.Generator().manual_seed(3)
    x, teacher = (torch.randn(sum(rows), 2, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, teacher


def error_of(call):
    try:
        call()
    except Exception as error:  # whatever it is, the test looks at it
        return f"{type(error).__name__}: {error}"
    return "none"


def work(rank, processes, folder):
    torch.set_num_threads(1)
    rows = ROWS[processes]
    not_yet = error_of(lambda: gather({"x": torch.ones(1)}))
    store = torch.distributed.FileStore(f"{folder}/store", processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    found = {
        (str(subject), gradients): evaluate(
            subject, Gathered(loss, gradients=gradients), take(subject, tensors, rank, rows)
        )
        for subject, loss, tensors in every_case(processes)
        for gradients in GRADIENTS
    }
    x, teacher = (t[sum(rows[:rank]) : sum(rows[: rank + 1])] for t in batch_of_models(rows))
    model = DistributedDataParallel(Student(Gathered(pykd.MKMMD())))
    model(x, teacher).backward()
    halves = gather(
        {"x": torch.full((rows[rank], 2), float(rank), dtype=torch.bfloat16), "mask": torch.ones(rows[rank]) > 0}
    )
    errors = [
        not_yet,
        error_of(lambda: gather({"x": torch.ones(rank + 1, 2 + rank)})),
        error_of(lambda: gather({"x": torch.ones(3), "y": torch.ones(3 + (rank == 1))})),
        error_of(lambda: Gathered(pykd.MKMMD(), gradients="mean")),
        error_of(lambda: Gathered(torch.nn.Linear(1, 1))),
    ]
    # Keywords in another order in every second process, and a group that not all are in.
    both = {"x": torch.full((rows[rank],), 1.0), "y": torch.full((rows[rank],), 2.0)}
    ordered = gather(both if rank % 2 else dict(reversed(both.items())))
    first = torch.distributed.new_group([0])
    alone = error_of(lambda: gather(both, first))
    own = [p.grad for p in model.parameters()]
    torch.save((found, own, halves, ordered, alone, errors), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()
    # torch's threads outlive the group, and now and then abort the process when the interpreter ends beneath them.
    os._exit(0)


@pytest.fixture(scope="module", params=ROWS, ids=lambda n: f"{n} processes")
def processes(request, tmp_path_factory):
    """What every process found."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(work, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / str(rank)) for rank in range(request.param)]


def test_every_process_has_the_value_of_the_joined_batch_and_its_share_of_the_gradient(processes):
    rows = ROWS[len(processes)]
    tested = 0
    for subject, loss, tensors in every_case(len(processes)):
        value, *whole = evaluate(subject, loss, tensors)
        for rank, (found, *_) in enumerate(processes):
            for gradients in GRADIENTS:
                got_value, *got = found[str(subject), gradients]
                torch.testing.assert_close(got_value, value, msg=f"{subject}, process {rank}")
                names = [n for n, spec in subject.specs.items() if spec.grad]
                wanted = take(subject, dict(zip(names, whole, strict=True)), rank, rows)
                for name, gradient in zip(names, got, strict=True):
                    want = wanted[name] * (len(processes) if gradients == "averaged" else 1)
                    torch.testing.assert_close(
                        gradient, want, rtol=1e-10, atol=1e-12, msg=f"{subject}, {name}, process {rank}"
                    )
        tested += 1
    assert tested >= 6


def test_a_model_in_data_parallel_has_the_gradients_of_one_process(processes):
    alone = Student(pykd.MKMMD())
    alone(*batch_of_models(ROWS[len(processes)])).backward()
    for _, own, *_ in processes:
        for got, parameter in zip(own, alone.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad)
    # Without gathering it is another number.
    shares = Student(pykd.MKMMD())
    for rank in range(len(processes)):
        rows = ROWS[len(processes)]
        x, teacher = (t[sum(rows[:rank]) : sum(rows[: rank + 1])] for t in batch_of_models(rows))
        (shares(x, teacher) / len(processes)).backward()
    assert not torch.allclose(shares.layer.weight.grad, alone.layer.weight.grad, rtol=0.05)


def test_every_type_travels(processes):
    rows = ROWS[len(processes)]
    want = torch.cat([torch.full((n, 2), float(rank), dtype=torch.bfloat16) for rank, n in enumerate(rows)])
    for _, _, joined, *_ in processes:
        assert joined["x"].dtype == torch.bfloat16 and torch.equal(joined["x"], want)
        assert joined["mask"].dtype == torch.bool and joined["mask"].all() and len(joined["mask"]) == sum(rows)


def test_the_order_of_the_keywords_does_not_matter(processes):
    for _, _, _, joined, *_ in processes:
        assert (joined["x"] == 1).all() and (joined["y"] == 2).all()


def test_a_process_outside_of_the_group_is_told(processes):
    first, *others = (alone for *_, alone, _ in processes)
    assert first == "none"
    assert all(text.startswith("ValueError: expected a process of the group, got one outside") for text in others)


def test_all_processes_say_what_is_wrong(processes):
    for *_, (not_yet, other, lengths, gradients, no_loss) in processes:
        assert not_yet.startswith("RuntimeError: expected a process group of torch.distributed, got none")
        assert (
            other.startswith("ValueError: expected the same tensors in every process")
            and "in process 1 than in process 0" in other
        )
        assert lengths.startswith(
            "ValueError: expected tensors that have one batch, got several lengths, or none, in process 1"
        )
        assert gradients.startswith("ValueError: expected gradients to be 'averaged' or 'summed', got 'mean'")
        assert no_loss.startswith("TypeError: expected a pykd loss, DistillationLoss or composition, got Linear")
