"""Losses of the joined batch in data parallel training: tensors of all processes, gathered with their gradients.

MK-MMD, the losses on relations and the contrastive ones compare the samples of a batch with each other. Where every process
has a slice of the batch and computes such a loss of its own, the mean over the processes is another number than the loss of the
joined batch, and so is its gradient. :class:`Gathered` makes it the same:

    >>> loss = pykd.distributed.Gathered(pykd.MKMMD())                             # doctest: +SKIP
    >>> loss(student_features, teacher_features).backward()                        # doctest: +SKIP
"""

import inspect
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pykd.composition import Composition
from pykd.definition import Loss

GRADIENTS = ("averaged", "summed")


class Gathered(nn.Module):
    r"""A loss of the joined batch, in every process.

    A call gathers the tensors of all processes along the batch, in the order of the ranks, and evaluates the loss on them:
    every process computes all of it and gets the same value. Batches may differ in length between processes; everything else
    has to be alike. Inputs without a batch (a queue, class weights) stay those of each process.

    The gradient with respect to the tensors of a process is what the parameters need to get the gradient of the
    joined batch. ``DistributedDataParallel`` averages the gradients of the processes: with ``gradients="averaged"`` they are
    multiplied by the number of processes beforehand.

    Args:
        loss: a loss, a composition, or a :class:`pykd.DistillationLoss`. Of a composition all terms are of the joined batch, those
            that split over samples as well: their means are over all samples that are kept anywhere, which means of
            processes with different numbers of ignored samples are not. Where the tensors of such a term are large (logits of a vocabulary),
            compute it beside this one, and only what couples the batch here.
        group: the process group; None: the default one.
        gradients: what is done with the parameters' gradients of the processes: ``"averaged"``, as by
            ``DistributedDataParallel`` and FSDP, or ``"summed"``.

    Raises:
        RuntimeError: in a call, where ``torch.distributed`` has no process group yet.
        ValueError: in a call, in a process that is not of ``group``.
        ValueError: in a call, in every process: where the processes pass different tensors (names, types, lengths but for that of
            the batch), or the tensors of one have different batches.

    A call communicates once for the lengths, once per tensor, and in backward once per tensor with a gradient; all
    processes have to make it. There is no second derivative.
    """

    def __init__(
        self, loss: Loss | Composition, group: dist.ProcessGroup | None = None, gradients: str = "averaged"
    ) -> None:
        super().__init__()
        if not isinstance(loss, Loss | Composition):
            raise TypeError(
                f"expected a pykd loss, DistillationLoss or composition, got {type(loss).__name__}; see pykd.compose"
            )
        self.loss = loss
        self.group = group
        self.gradients = _checked(gradients)

    def forward(self, *tensors: Any, kernels: str | None = None, **tensors_and_parameters: Any) -> Any:
        """The loss of the joined batch; takes and returns what the loss does."""
        if isinstance(self.loss, Loss):
            given = self.loss.flat_arguments(tensors, tensors_and_parameters)
        else:
            bound = inspect.signature(self.loss.forward).bind_partial(*tensors, **tensors_and_parameters)
            bound.arguments |= bound.arguments.pop("parameters", {}) | bound.arguments.pop("tensors_and_parameters", {})
            given = bound.arguments
        joined = gather(dict(self._of_the_batch(given)), self.group, self.gradients)
        for name, value in given.items():
            if isinstance(value, list | tuple):
                given[name] = [joined.get(f"{name}[{i}]", each) for i, each in enumerate(value)]
            else:
                given[name] = joined.get(name, value)
        return self.loss(**given, kernels=kernels)

    def _of_the_batch(self, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        for name, value in given.items():
            if not self._has_batch(name):
                continue
            if isinstance(value, Tensor):
                yield name, value
            elif isinstance(value, list | tuple):
                yield from ((f"{name}[{i}]", each) for i, each in enumerate(value) if isinstance(each, Tensor))

    def _has_batch(self, name: str) -> bool:
        if isinstance(self.loss, Loss):
            return name in self.loss.inputs and self.loss.layouts(name)[0].names[0] == "batch"
        if name in self.loss.input_layouts:
            return self.loss.input_layouts[name][0].names[0] == "batch"
        return f"{name}_0" in self.loss.input_layouts  # the lists of features of a DistillationLoss

    def extra_repr(self) -> str:
        return f"gradients={self.gradients!r}"


def gather(
    tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None, gradients: str = "averaged"
) -> dict[str, Tensor]:
    """The tensors of all processes, joined along their first axis in the order of the ranks; see :class:`Gathered`.

    Args:
        tensors: by name; the first axis of all of them is the batch.
        group: the process group; None: the default one.
        gradients: ``"averaged"`` or ``"summed"``: what is done with the parameters' gradients of the processes.
    """
    _checked(gradients)
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "expected a process group of torch.distributed, got none; call torch.distributed.init_process_group first"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            "expected a process of the group, got one outside of it; call it in those of the group alone, or pass each its own group"
        )
    lengths = _lengths(tensors, group)
    scale = 1.0 if gradients == "averaged" else 1.0 / len(lengths)
    # By name: the order of keywords may be another in every process.
    joined = {
        name: _Joined.apply(tensor, lengths, scale, group)  # type: ignore[no-untyped-call]
        for name, tensor in sorted(tensors.items())
    }
    return {name: joined[name] for name in tensors}


def _checked(gradients: str) -> str:
    if gradients not in GRADIENTS:
        raise ValueError(
            f"expected gradients to be {' or '.join(map(repr, GRADIENTS))}, got {gradients!r}; pass one of them"
        )
    return gradients


def _lengths(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> list[int]:
    """The length of the batch in every process, after a check that the processes agree in everything else.

    One exchange of two numbers; every process sees the same of all, so that they fail together, and none waits for another.
    """
    own = {name: tensor.size(0) if tensor.dim() > 0 else -1 for name, tensor in tensors.items()}
    alike = f"{[(name, str(t.dtype), list(t.shape[1:]), t.requires_grad) for name, t in sorted(tensors.items())]}"
    length = next(iter(own.values()), -1) if len(set(own.values())) == 1 else -1
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    described = torch.tensor([zlib.crc32(alike.encode()), length], device=device)
    every = [torch.empty_like(described) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, described, group)
    numbers = [each.tolist() for each in every]
    other = next((rank for rank, (kind, _) in enumerate(numbers) if kind != numbers[0][0]), None)
    if other is not None:
        raise ValueError(
            "expected the same tensors in every process (names, types, lengths but for the batch, and which need a gradient), got "
            f"others in process {other} than in process 0; here they are {alike}"
        )
    without = next((rank for rank, (_, count) in enumerate(numbers) if count < 0), None)
    if without is not None:
        raise ValueError(
            f"expected tensors that have one batch, got several lengths, or none, in process {without}; here they are {own}"
        )
    return [count for _, count in numbers]


class _Joined(torch.autograd.Function):
    """The tensors of all processes, one after the other."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, lengths: list[int], scale: float, group: dist.ProcessGroup | None) -> Tensor:
        ctx.lengths, ctx.scale, ctx.group = lengths, scale, group
        if len(lengths) == 1:
            return own.clone()
        # As bytes: not every backend moves every type. All of one length, as all_gather wants it.
        longest = max(lengths)
        padded = own.new_zeros((longest, *own.shape[1:]))
        padded[: own.size(0)] = own
        flat = padded.reshape(-1).view(torch.uint8)
        every = [torch.empty_like(flat) for _ in lengths]
        dist.all_gather(every, flat, group)
        return torch.cat(
            [each.view(own.dtype).reshape(padded.shape)[:n] for each, n in zip(every, lengths, strict=True)]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        # Every process has a gradient with respect to the slice of this one; halves are added in float32.
        total = gradient.to(torch.float64 if gradient.dtype == torch.float64 else torch.float32)
        if len(ctx.lengths) > 1:
            total = total.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=ctx.group)
        start = sum(ctx.lengths[: dist.get_rank(ctx.group)])
        own = total[start : start + ctx.lengths[dist.get_rank(ctx.group)]] * ctx.scale
        return own.to(gradient.dtype), None, None, None
