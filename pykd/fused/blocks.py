"""Losses that compare every sample with every other, block by block of rows, without ever holding all pairs at once.

The formula of such a loss holds a dozen matrices of the size samples × samples. Its method ``in_blocks`` says the same of a block of
their rows, with the functions that the formula itself is made of, and hands these to the *block point* that it is given:

    blocks.over_pairs(_differences, Products(x, x), Products(y, y), weight=weight)

which calls the function once per block, in ordinary operators of torch with autograd, and has the gradient of a block before it
goes on to the next: the memory is that of one block, and of the gradient. What is known of all samples before their pairs are
looked at (a mean distance, the largest one) is a sum of its own, whose gradient autograd adds.

The numbers are those of the formula but for the order of sums. Second derivatives go through the whole at once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykd.definition import Loss, ops, routing
from pykd.fused import torch_operators
from pykd.fused.description import Columns, Piece, Products, Rows, Same

# Numbers in one matrix of a block. At 1,024 × 512 on two cores SP takes 4, 6, 7, 10 and 12 MiB with 2, 3, 4, 6 and 8 times 2^15, RKD 14,
# 16, 19, 24 and 30; fewer take longer, by the operators themselves.
_ENTRIES = 3 << 15
# In the largest matrix of a loss that goes by blocks without being told to. Of 256 samples formulas take 2.5 to 5 MiB and blocks no less;
# of 512 they take 11 to 19 MiB, and blocks 5 to 12.
LEAST_ENTRIES = 1 << 18


def evaluate(loss: Loss, given: Mapping[str, Any]) -> Tensor:
    """A loss block by block, with autograd.

    Args:
        loss: one that has ``in_blocks``.
        given: tensors and numbers by name.
    """
    routing.note_kernel("blocks")
    samples, per_sample = loss.relation(given)
    return loss.by_blocks(Blocks(max(1, min(samples, _ENTRIES // per_sample))), given)


class Blocks:
    """The block point: see :class:`pykd.fused.description.BlockPoint`.

    Args:
        rows: of a block.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def each(self, function: Callable[..., Tensor], *pieces: Piece) -> Tensor:
        job = _Job(pieces, self.rows)
        job.rows = max(1, _ENTRIES * job.samples // job.tensors[0].numel() // 2)  # beside all that is there by then
        job.function = function
        made: Tensor = _Each.apply(job, *job.tensors)  # type: ignore[no-untyped-call]
        return made

    def over_rows(
        self, function: Callable[..., Tensor], *pieces: Piece, weight: Tensor | None, reduction: str = "mean"
    ) -> Tensor:
        job = _Job(pieces, self.rows)
        if weight is not None:
            weight = ops.shares(weight.to(job.tensors[0].dtype), reduction)
        share = 1.0 / job.samples if reduction == "mean" else 1.0

        def of_block(*arguments: Any) -> Tensor:
            *own, shares = arguments
            values = function(*own)
            return values.sum() * share if shares is None else ops.product_or_zero(shares, values).sum()

        return job.sum(of_block, None if weight is None else Rows(weight))

    def over_pairs(
        self, function: Callable[..., Tensor], *pieces: Piece, weight: Tensor | None, symmetric: bool = False
    ) -> Tensor:
        job = _Job(pieces, self.rows, symmetric)
        if weight is None and not symmetric:  # a sum does without weights

            def of_block(*arguments: Any) -> Tensor:
                return function(*arguments).sum() / job.samples**2

            return job.sum(of_block)
        like = job.tensors[0]
        if weight is None:
            shares = like.new_full((job.samples,), 1.0 / job.samples)
        else:
            shares = ops.shares(weight.to(like.dtype), "mean")

        def weighted(*arguments: Any) -> Tensor:
            *own, rows, columns, counts = arguments
            total: Tensor = (rows * ops.matmul(function(*own), (columns * counts).unsqueeze(1)).squeeze(1)).sum()
            return total

        return job.sum(weighted, Rows(shares), Columns(shares), _Counts(shares))

    def largest(self, function: Callable[..., Tensor], *pieces: Piece) -> Tensor:
        job = _Job(pieces, self.rows, symmetric=True)
        with torch.no_grad():
            best = job.tensors[0].new_full((job.samples,), -torch.inf)  # of every sample
            for block in job.blocks():
                values = function(*job.arguments(job.tensors, block))
                for place, dim in ((block.rows, 1), (block.columns, 0)):
                    best[place] = torch.maximum(best[place], values.amax(dim=dim))
            largest = best.amax()
            reached = (best == largest).nonzero().squeeze(1)
        if len(reached) == 0:  # NaN
            return largest
        # All pairs that have the largest value, and share its gradient, are among these samples.
        chosen = {id(tensor): tensor[reached] for piece in pieces for tensor in _tensors_of(piece)}
        own = [_with(piece, chosen) for piece in pieces]
        few = _Job(own, len(reached))
        return function(*few.arguments(few.tensors, few.whole)).amax()


class _Block(NamedTuple):
    rows: slice
    columns: slice
    once: int  # how many of these columns come once; the others stand for their mirror images, too


@dataclasses.dataclass(frozen=True)
class _Counts:
    """How many pairs each column of a block stands for."""

    like: Tensor


class _Job:
    """A sum over blocks.

    Attributes:
        pieces: the arguments of the function.
        tensors: every tensor among them, once.
        samples: how many there are.
    """

    def __init__(self, pieces: Sequence[Any], rows: int, symmetric: bool = False) -> None:
        self.pieces = list(pieces)
        self.rows = rows
        self.symmetric = symmetric
        self.samples = next(len(piece.x) for piece in pieces if isinstance(piece, Products | Rows))
        self.whole = _Block(slice(0, self.samples), slice(0, None), self.samples)
        self.function: Callable[..., Tensor]
        self._take_tensors()

    def _take_tensors(self) -> None:
        found: dict[int, Tensor] = {}
        for piece in self.pieces:
            for tensor in _tensors_of(piece):
                found.setdefault(id(tensor), tensor)
        self.tensors = list(found.values())
        self.places = {key: place for place, key in enumerate(found)}
        self.versions = [_version(tensor) for tensor in self.tensors]

    def sum(self, function: Callable[..., Tensor], *more: Any) -> Tensor:
        """The sum of what the function makes of every block, with autograd."""
        self.function = function
        self.pieces += more
        self._take_tensors()
        value: Tensor = _Sum.apply(self, *self.tensors)  # type: ignore[no-untyped-call]
        return value

    def blocks(self) -> Iterator[_Block]:
        """The blocks of rows; of a symmetric sum each has the columns from its first row on."""
        for start in range(0, self.samples, self.rows):
            stop = min(start + self.rows, self.samples)
            first = start if self.symmetric else 0
            yield _Block(slice(start, stop), slice(first, None), stop - first if self.symmetric else self.samples)

    def arguments(self, tensors: Sequence[Tensor], block: _Block) -> list[Any]:
        """What the function is given of a block of these tensors."""
        return [self._of_block(piece, tensors, block) for piece in self.pieces]

    def _of_block(self, piece: Any, tensors: Sequence[Tensor], block: _Block) -> Any:
        own = [tensors[self.places[id(tensor)]] for tensor in _tensors_of(piece)]
        if isinstance(piece, Products):
            return ops.matmul(own[0][block.rows], own[1][block.columns].transpose(0, 1))
        if isinstance(piece, Rows):
            return own[0][block.rows]
        if isinstance(piece, Columns):
            return own[0][block.columns]
        if isinstance(piece, Same):
            columns = range(self.samples)[block.columns]
            same = own[0].new_zeros((block.rows.stop - block.rows.start, len(columns)), dtype=torch.bool)
            same.diagonal(block.rows.start - columns.start).fill_(True)
            return same
        if isinstance(piece, _Counts):
            counts = torch.full_like(own[0][block.columns], 2.0)
            counts[: block.once] = 1.0
            return counts
        return own[0] if own else piece

    def run(self, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
        """The sum, and its gradients with respect to the tensors that these are wanted of."""
        tensors = [tensor.detach() for tensor in self.tensors]
        gradients = [torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)]
        total = tensors[0].new_zeros((), dtype=torch.float64)
        for block in self.blocks():
            total += self._differentiated(tensors, wanted, gradients, block)
        return total.to(tensors[0].dtype), [gradient for gradient in gradients if gradient is not None]

    def rows_of_each(self) -> Tensor:
        """What the function makes of every block, one after the other."""
        tensors = [tensor.detach() for tensor in self.tensors]
        made: Tensor | None = None
        for block in self.blocks():
            rows = self.function(*self.arguments(tensors, block))
            if made is None:
                made = rows.new_empty((self.samples, *rows.shape[1:]))
            made[block.rows] = rows
        assert made is not None
        return made

    def gradients_of_each(self, wanted: Sequence[bool], upstream: Tensor) -> list[Tensor]:
        """The gradients of what :meth:`rows_of_each` gave, whose blocks are computed again."""
        tensors = [tensor.detach() for tensor in self.tensors]
        gradients = [torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)]
        for block in self.blocks():
            self._differentiated(tensors, wanted, gradients, block, upstream[block.rows])
        return [gradient for gradient in gradients if gradient is not None]

    def _differentiated(
        self,
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
        gradients: Sequence[Tensor | None],
        block: _Block,
        upstream: Tensor | None = None,
    ) -> Tensor:
        """What the function makes of a block; adds its gradients to those of the tensors."""
        arguments = self.arguments(tensors, block)
        differentiated = [
            (piece, place)
            for place, piece in enumerate(self.pieces)
            if not isinstance(piece, Same | _Counts) and any(wanted[self.places[id(t)]] for t in _tensors_of(piece))
        ]
        with torch.enable_grad():
            for _, place in differentiated:
                arguments[place] = arguments[place].detach().requires_grad_()
            value = self.function(*arguments)
        if not differentiated:
            return value
        leaves = [arguments[place] for _, place in differentiated]
        found = torch.autograd.grad(value, leaves, upstream)
        value = value.detach()
        del arguments, leaves  # nothing is left of the block but its gradients
        for (piece, _), gradient in zip(differentiated, found, strict=True):
            self._add(piece, gradient, tensors, gradients, block)
        return value

    def _add(
        self,
        piece: Any,
        gradient: Tensor,
        tensors: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        block: _Block,
    ) -> None:
        """Adds the gradient of a piece of a block to those of its tensors."""
        places = [self.places[id(tensor)] for tensor in _tensors_of(piece)]
        own = gradients[places[0]]
        if isinstance(piece, Products):
            x, y = (tensors[place] for place in places)
            other = gradients[places[1]]
            if own is not None:
                own[block.rows].addmm_(gradient, y[block.columns])
            if other is not None:
                other[block.columns].addmm_(gradient.transpose(0, 1), x[block.rows])
        elif own is not None:
            part = block.rows if isinstance(piece, Rows) else block.columns if isinstance(piece, Columns) else ...
            own[part] += gradient

    def check_inputs(self) -> None:
        """Raises where what was given has changed since."""
        if not self.tensors:
            raise RuntimeError(
                "expected one backward pass through a loss, got a second time; pass retain_graph=True to the first"
            )
        if self.versions != [_version(tensor) for tensor in self.tensors]:
            raise RuntimeError(
                "expected the inputs of a loss as they were until backward() has run, got some that were modified by an "
                "inplace operation; change copies of them"
            )

    def again(self, wanted: Sequence[bool], upstream: Tensor) -> list[Tensor]:
        """The gradients in a form that can be differentiated, by all blocks at once."""
        self.check_inputs()
        with torch.enable_grad():
            # Each has an alias of its own: autograd adds up what flows to the tensors that they are of.
            tensors = [t.view_as(t) if w else t.detach() for t, w in zip(self.tensors, wanted, strict=True)]
            value = self.function(*self.arguments(tensors, self.whole))
            leaves = [tensor for tensor, needed in zip(tensors, wanted, strict=True) if needed]
            return list(torch.autograd.grad(value, leaves, upstream, create_graph=True))

    def release(self) -> None:
        """Lets go of the tensors, unless this backward pass leaves the graph for another one."""
        if not torch_operators.graph_is_kept():
            self.tensors = []


class _Sum(torch.autograd.Function):
    """The sum of a job. The gradient is made with the value, where one is wanted."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> Tensor:
        ctx.job = job
        value, gradients = job.run(ctx.needs_input_grad[1:])
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            gradients = ctx.job.again(wanted, upstream[0])
        else:
            gradients = [torch_operators.scaled(gradient, upstream[0]) for gradient in ctx.saved_tensors]
        ctx.job.release()
        return None, *_of_all(gradients, wanted)


class _Each(torch.autograd.Function):
    """What a job makes of every sample. Its blocks are computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> Tensor:
        ctx.job = job
        return job.rows_of_each()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        wanted = ctx.needs_input_grad[1:]
        job: _Job = ctx.job
        if torch.is_grad_enabled() or not torch_operators.is_plain(upstream[0]):
            gradients = job.again(wanted, upstream[0])
        else:
            job.check_inputs()
            gradients = job.gradients_of_each(wanted, upstream[0])
        job.release()
        return None, *_of_all(gradients, wanted)


def _of_all(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> Iterator[Tensor | None]:
    """The gradients that were wanted, with None for the others."""
    found = iter(gradients)
    return (next(found) if needed else None for needed in wanted)


def _tensors_of(piece: Any) -> list[Tensor]:
    if isinstance(piece, Products):
        return [piece.x, piece.y]
    if isinstance(piece, Rows | Columns):
        return [piece.x]
    if isinstance(piece, Same | _Counts):
        return [piece.like]
    return [piece] if isinstance(piece, Tensor) else []


def _with(piece: Any, others: Mapping[int, Tensor]) -> Any:
    """The piece with other tensors, by the ids of its own."""
    if isinstance(piece, Products | Rows | Columns | Same):
        return type(piece)(*(others[id(tensor)] for tensor in _tensors_of(piece)))
    return others[id(piece)] if isinstance(piece, Tensor) else piece


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
