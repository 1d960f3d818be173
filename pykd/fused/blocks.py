"""Losses that compare every sample with every other, block by block of rows, without ever holding all pairs at once.

The formula of such a loss holds a dozen matrices of the size samples × samples. Its method ``in_blocks`` says the same of a block of
their rows, with the functions that the formula itself is made of, and hands these to the *block point* that it is given:

    blocks.over_pairs(_differences, Products(x, x), Products(y, y), weight=weight)

which calls the function once per block, in ordinary operators of torch with autograd, and has the gradient of a block before it
goes on to the next: the memory is that of one block, and of the gradient. What is known of all samples before their pairs are
looked at (a mean distance, the largest one) is a sum of its own, whose gradient autograd adds.

Most of the time goes into products of matrices. Those of samples with themselves are symmetric, and half of them will do; those that
several sums look at (:meth:`Blocks.products`) are kept from one to the next as far as a fixed amount of memory goes, and their
gradients are added up before they are multiplied with the samples, once.

The numbers are those of the formula but for the order of sums. The gradient is made with the value; second derivatives are those of
the formula.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykd.definition import Loss, ops, routing
from pykd.fused import torch_operators
from pykd.fused.description import Chosen, Columns, Piece, Products, Rows, Same, Squares

# Numbers in one matrix of a block: with more of them a loss takes more memory, with fewer more time, by the operators themselves.
_ENTRIES = 3 << 15
# Numbers of products, and of their gradients, that are kept until they are wanted again: all of two sides of 2,048 samples.
_KEPT = 9 << 19
# In the largest matrix of a loss that goes by blocks without being told to. Of 256 samples formulas take 1.5 to 3.6 MiB, and blocks little
# less, in 1.1 to 1.7 times the time; of 512 they take 4 to 11 MiB, and blocks 2 to 7.
LEAST_ENTRIES = 1 << 18


def evaluate(loss: Loss, given: Mapping[str, Any]) -> Tensor:
    """A loss block by block, with autograd.

    Args:
        loss: one that has ``in_blocks``.
        given: tensors and numbers by name.
    """
    routing.note_kernel("blocks")
    # The gradient of halves meets the factor of what flows back before it is rounded.
    given = {name: ops.upcast(value) if _is_student(loss, name, value) else value for name, value in given.items()}
    students = [name for name, value in given.items() if _is_student(loss, name, value)]
    if not students or not torch.is_grad_enabled():
        with torch.no_grad():
            return _value(loss, given)
    value: Tensor = _Whole.apply(loss, given, students, *(given[name] for name in students))  # type: ignore[no-untyped-call]
    return value


def _is_student(loss: Loss, name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and any(spec.grad for spec in loss.layouts(name))


def _value(loss: Loss, given: Mapping[str, Any]) -> Tensor:
    samples, per_sample = loss.relation(given)
    device = next(value for value in given.values() if isinstance(value, Tensor)).device.type
    with torch.autocast(device, enabled=False):
        return loss.by_blocks(Blocks(max(1, min(samples, _ENTRIES // per_sample))), given)


class _Whole(torch.autograd.Function):
    """A loss. Its gradient is made with its value."""

    @staticmethod
    def forward(ctx: Any, loss: Loss, given: Mapping[str, Any], students: Sequence[str], *tensors: Tensor) -> Tensor:
        ctx.again = loss, given, students, [_version(value) for value in given.values()]
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            value = _value(loss, {**given, **dict(zip(students, leaves, strict=True))})
        ctx.save_for_backward(*torch.autograd.grad(value, leaves))
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss, given, students, versions = ctx.again
            return None, None, None, *_again(loss, given, students, versions, upstream[0])
        if not torch_operators.graph_is_kept():
            ctx.again = None
        return None, None, None, *(torch_operators.scaled(gradient, upstream[0]) for gradient in saved)


def _again(
    loss: Loss, given: Mapping[str, Any], students: Sequence[str], versions: Sequence[int], upstream: Tensor
) -> Sequence[Tensor]:
    """The gradients in a form that can be differentiated, by the formula."""
    if versions != [_version(value) for value in given.values()]:
        raise RuntimeError(
            "expected the inputs of a loss as they were until backward() has run, got some that were modified by an "
            "inplace operation; change copies of them"
        )
    # Each has an alias of its own: autograd adds up what flows to the tensors that they are of.
    aliases = {name: given[name].view_as(given[name]) for name in students}
    formula, every = loss.formula_call({**given, **aliases})
    return torch.autograd.grad(formula(**every), list(aliases.values()), upstream, create_graph=True)


class _Block(NamedTuple):
    rows: slice
    columns: slice
    once: int  # how many of these columns come once; the others stand for their mirror images, too


class Blocks:
    """The block point: see :class:`pykd.fused.description.BlockPoint`.

    Args:
        rows: of a block.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.room = _KEPT

    def each(self, function: Callable[..., Tensor], *pieces: Piece) -> Tensor:
        job = _Job(function, pieces, self.rows)
        if not any(isinstance(piece, Products) for piece in pieces):
            job.rows = max(1, _ENTRIES * job.samples // job.tensors[0].numel())
        made: Tensor = _Each.apply(job, *job.tensors)  # type: ignore[no-untyped-call]
        return made

    def over_rows(
        self, function: Callable[..., Tensor], *pieces: Piece, weight: Tensor | None, reduction: str = "mean"
    ) -> Tensor:
        job = _Job(lambda *arguments: function(*arguments).unsqueeze(1), pieces, self.rows)
        if weight is not None:
            job.row_weights = ops.shares(weight.to(job.tensors[0].dtype), reduction)
        job.share = 1.0 / job.samples if reduction == "mean" and weight is None else 1.0
        return job.sum()

    def over_pairs(
        self,
        function: Callable[..., Tensor],
        *pieces: Piece,
        weight: Tensor | None,
        symmetric: bool = False,
        columns: bool = True,
        last: bool = False,
    ) -> Tensor:
        job = _Job(function, pieces, self.rows, symmetric)
        if weight is not None:
            job.row_weights = ops.shares(weight.to(job.tensors[0].dtype), "mean")
            job.column_weights = job.row_weights if columns else None
        else:
            job.share = 1.0 / job.samples ** (2 if columns else 1)
        job.last = last
        return job.sum()

    def row_sums(self, function: Callable[..., Tensor], *pieces: Piece) -> Tensor:
        job = _Job(function, pieces, self.rows, symmetric=True)
        made: Tensor = _RowSums.apply(job, *job.tensors)  # type: ignore[no-untyped-call]
        return made

    def largest(self, function: Callable[..., Tensor], *pieces: Piece) -> Tensor:
        job = _Job(function, pieces, self.rows, symmetric=True)
        made: Tensor = _Largest.apply(job, *job.tensors)  # type: ignore[no-untyped-call]
        return made

    def with_gradient(self, function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> Tensor:
        value: Tensor = _Known.apply(function, self.rows, x, y)  # type: ignore[no-untyped-call]
        return value

    def products(self, x: Tensor, factor: float = 1.0) -> "_Kept":
        return _Kept(x, factor, self)


class _Kept:
    """The products of all samples with each other, which several sums look at.

    Attributes:
        x: the samples; None where all of their products are kept, and no gradient is wanted.
        node: stands for the products in autograd, and holds nothing.
        blocks: of rows with the columns from the first of them on.
        fitting: how many blocks are kept.
        found: sums whose gradients are wanted: called with the number of a block, they add them to those of its products.
    """

    def __init__(self, x: Tensor, factor: float, point: Blocks) -> None:
        self.x: Tensor | None = x.detach()
        self.factor = factor
        self.point = point
        self.samples = len(x)
        self.blocks = list(_symmetric_blocks(len(x), max(1, point.rows // 2)))  # beside what is kept
        self.fitting = 0
        for block in self.blocks:
            if point.room < _size(block, self.samples):
                break
            point.room -= _size(block, self.samples)
            self.fitting += 1
        self.memory: Tensor | None = None  # of all that is kept, so that nothing small lies between
        self.places: list[Tensor] = []
        self.known = 0
        self.square_gradients: Tensor | None = None
        self.found: list[Callable[[int], Tensor]] = []
        self.chosen: list[tuple[Tensor, Tensor]] = []  # samples, and what is added to their gradients
        self.node: Tensor = _Node.apply(self, x)  # type: ignore[no-untyped-call]

    @functools.cached_property
    def squares(self) -> Tensor:
        """The product of every sample with itself."""
        assert self.x is not None
        return self.point.each(ops.squares, Rows(self.x))

    def of_block(self, number: int) -> Tensor:
        """The products of a block."""
        if number < self.known:
            return self.places[number]
        assert self.x is not None
        block = self.blocks[number]
        rows, columns = self.x[block.rows], self.x[block.columns].transpose(0, 1)
        if number >= self.fitting:
            return torch.addmm(rows.new_empty(()), rows, columns, beta=0, alpha=self.factor)
        if self.memory is None:
            self.memory = rows.new_empty(sum(_size(block, self.samples) for block in self.blocks[: self.fitting]))
        start = sum(place.numel() for place in self.places)
        shape = (len(rows), columns.size(1))
        self.places.append(self.memory[start : start + shape[0] * shape[1]].view(shape))
        self.known += 1
        torch.addmm(rows.new_empty(()), rows, columns, beta=0, alpha=self.factor, out=self.places[number])
        return self.places[number]

    def forget_samples(self) -> None:
        """Lets go of the samples where all of their products are kept, and no gradient is wanted."""
        if self.known == len(self.blocks) and not self.node.requires_grad:
            self.x = None

    def forget_products(self) -> None:
        self.memory, self.places, self.fitting, self.known = None, [], 0, 0

    def add_to_squares(self, gradient: Tensor) -> None:
        if self.square_gradients is None:
            self.square_gradients = torch.zeros_like(gradient)
        self.square_gradients += gradient

    def gradient(self) -> Tensor:
        """Of the samples, from what the sums have left here."""
        assert self.x is not None
        x = self.x
        # What is kept of products makes room before there are gradients of samples.
        known: list[Tensor | None] = [
            self._gradient_of_block(number) if number < self.known else None for number in range(len(self.blocks))
        ]
        self.forget_products()
        made = torch.zeros_like(x)
        for number, block in enumerate(self.blocks):
            total, known[number] = known[number], None
            if total is None:
                total = self._gradient_of_block(number)
            if total is not None:
                made[block.rows].addmm_(total, x[block.columns], alpha=self.factor)
                made[block.columns].addmm_(total.transpose(0, 1), x[block.rows], alpha=self.factor)
        if self.square_gradients is not None:
            made.addcmul_(x, self.square_gradients.unsqueeze(1), value=2)
        for place, rows in self.chosen:
            made[place] += rows
        return made

    def _gradient_of_block(self, number: int) -> Tensor | None:
        total: Tensor | None = None
        for of_sum in self.found:
            own = of_sum(number)
            total = own if total is None else total.add_(own)
        return total


def _size(block: _Block, samples: int) -> int:
    return block.once * (samples - block.columns.start)  # type: ignore[no-any-return]


def _symmetric_blocks(samples: int, rows: int) -> Iterator[_Block]:
    """Blocks of the same size, all in all; each has the columns from its first row on."""
    start = 0
    while start < samples:
        stop = min(samples, start + max(1, rows * samples // (samples - start)))
        yield _Block(slice(start, stop), slice(start, None), stop - start)
        start = stop


class _Node(torch.autograd.Function):
    """What stands for products: the gradients of all sums of them are there when its backward pass comes."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, x: Tensor) -> Tensor:
        ctx.kept = kept
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        kept, ctx.kept = ctx.kept, None
        made = kept.gradient()
        kept.x = None
        return None, made


class _Job:
    """A sum over blocks.

    Attributes:
        pieces: the arguments of the function.
        tensors: every tensor among them, once.
        samples: how many there are.
        kept: products among them that other sums look at, too.
        row_weights, column_weights: of the values; None: all of them 1.
        share: a factor of all.
        last: whether no other sum will look at products.
    """

    def __init__(
        self, function: Callable[..., Tensor], pieces: Sequence[Any], rows: int, symmetric: bool = False
    ) -> None:
        self.function = function
        self.pieces = list(pieces)
        self.rows = rows
        self.symmetric = symmetric
        self.kept = [piece for piece in pieces if isinstance(piece, _Kept)]
        self.row_weights: Tensor | None = None
        self.column_weights: Tensor | None = None
        self.share = 1.0
        self.last = False
        found: dict[int, Tensor] = {}
        for piece in self.pieces:
            for tensor in _tensors_of(piece):
                found.setdefault(id(tensor), tensor)
        self.tensors = list(found.values())
        self.places = {key: place for place, key in enumerate(found)}
        self.samples = next(
            piece.samples if isinstance(piece, _Kept) else len(piece.x)
            for piece in pieces
            if isinstance(piece, Products | Rows | _Kept)
        )

    def sum(self) -> Tensor:
        """The sum of what the function makes of every block, with autograd."""
        value: Tensor = _Sum.apply(self, *self.tensors)  # type: ignore[no-untyped-call]
        return value

    @functools.cached_property
    def blocks(self) -> list[_Block]:
        if self.kept:
            return self.kept[0].blocks
        if self.symmetric:
            return list(_symmetric_blocks(self.samples, self.rows))
        starts = range(0, self.samples, self.rows)
        return [
            _Block(slice(start, min(start + self.rows, self.samples)), slice(0, None), self.samples) for start in starts
        ]

    # ---- Arguments ------------------------------------------------------------------------------

    def arguments(self, number: int, block: _Block) -> list[Any]:
        """What the function is given of a block."""
        return [self._of_block(piece, number, block) for piece in self.pieces]

    def _of_block(self, piece: Any, number: int, block: _Block) -> Any:
        if isinstance(piece, _Kept):
            return piece.of_block(number)
        if isinstance(piece, Squares):
            return piece.of.squares[block.rows if piece.rows else block.columns]
        if isinstance(piece, Products):
            return torch.mm(piece.x[block.rows].detach(), piece.y[block.columns].detach().transpose(0, 1))
        if isinstance(piece, Rows):
            return piece.x[block.rows].detach()
        if isinstance(piece, Columns):
            return piece.x[block.columns].detach()
        if isinstance(piece, Chosen):
            return piece.x.detach()[piece.index[block.rows]]
        if isinstance(piece, Same):
            rows, columns = (range(self.samples)[part] for part in (block.rows, block.columns))
            same = piece.like.new_zeros((len(rows), len(columns)), dtype=torch.bool)
            same.diagonal(rows.start - columns.start).fill_(True)
            return same
        return piece.detach() if isinstance(piece, Tensor) else piece

    def is_differentiable(self, piece: Any) -> bool:
        if isinstance(piece, Squares):
            return bool(piece.of.node.requires_grad)
        return not isinstance(piece, Same) and any(tensor.requires_grad for tensor in _tensors_of(piece))

    # ---- Values and gradients ---------------------------------------------------------------------

    def weights(self, block: _Block, mirrored: bool) -> tuple[Tensor | None, Tensor]:
        """What the rows, and the columns, of the values of a block are multiplied by, or those of their mirror images."""
        rows, columns = self.row_weights, self.column_weights
        if mirrored:
            rows, columns = columns, rows
        like = self.tensors[0]
        if columns is None:
            own = like.new_full((len(range(self.samples)[block.columns]),), self.share)
        else:
            own = columns[block.columns] * self.share
        if mirrored:
            own[: block.once] = 0.0
        elif self.symmetric:
            own[block.once :].mul_(2.0)
        return None if rows is None else rows[block.rows], own

    def of_block(
        self, number: int, gradients: "_Gradients | None", factors: Callable[[_Block], Tensor] | None = None
    ) -> Tensor | None:
        """The sum of the values of a block, without autograd; adds to gradients where these are wanted.

        Args:
            number: of the block.
            gradients: takes them.
            factors: of the values of a block; None: the weights.
        """
        block = self.blocks[number]
        arguments = self.arguments(number, block)
        wanted: list[Any] = []
        leaves: list[Tensor] = []
        for place, piece in enumerate(self.pieces):
            if gradients is not None and self.is_differentiable(piece) and gradients.wants(piece):
                arguments[place] = arguments[place].detach().requires_grad_()
                wanted.append(piece)
                leaves.append(arguments[place])
        with torch.set_grad_enabled(bool(leaves)):
            made: Any = self.function(*arguments)
        values: tuple[Tensor, ...] = (made,) if isinstance(made, Tensor) else made
        total: Tensor | None = None
        upstream = []
        for mirrored, value in enumerate(values):
            if factors is not None:
                upstream.append(factors(block))
                continue
            rows, columns = self.weights(block, bool(mirrored))
            columns = columns[: value.size(1)]
            sums = torch.mv(value.detach(), columns)
            own = (sums if rows is None else ops.product_or_zero(rows, sums)).sum(dtype=torch.float64)
            total = own if total is None else total + own
            if leaves:
                upstream.append(columns.expand_as(value) if rows is None else torch.outer(rows, columns))
        if leaves:
            assert gradients is not None
            del arguments
            found = torch.autograd.grad(values, leaves, upstream)
            del made, values, upstream, leaves  # nothing is left of the block but its gradients
            for piece, gradient in zip(wanted, found, strict=True):
                gradients.add(piece, block, number, gradient)
        return total


class _Gradients:
    """Where the gradients of a job go.

    Args:
        job: whose.
        of_products: whether those of kept products are wanted, else all others; None: both.
    """

    def __init__(self, job: _Job, of_products: bool | None = None) -> None:
        self.job = job
        self.of_products = of_products
        self.own: list[Tensor | None] = [None] * len(job.tensors)
        self.of_kept: dict[int, Tensor] = {}  # by the number of the block
        self.of_squares: dict[int, Tensor] = {}

    def wants(self, piece: Any) -> bool:
        return self.of_products is None or isinstance(piece, _Kept | Squares) == self.of_products

    def add(self, piece: Any, block: _Block, number: int, gradient: Tensor) -> None:
        if isinstance(piece, _Kept):
            self.of_kept[number] = gradient
        elif isinstance(piece, Squares):
            squares = self.of_squares.setdefault(id(piece.of), torch.zeros_like(piece.of.squares))
            squares[block.rows if piece.rows else block.columns].add_(gradient)
        elif isinstance(piece, Products):
            rows, columns = self._of(piece.x), self._of(piece.y)
            if rows is not None:
                rows[block.rows].addmm_(gradient, piece.y.detach()[block.columns])
            if columns is not None:
                columns[block.columns].addmm_(gradient.transpose(0, 1), piece.x.detach()[block.rows])
        else:
            own = self._of(piece if isinstance(piece, Tensor) else piece.x)
            assert own is not None
            if isinstance(piece, Chosen):
                own.index_add_(0, piece.index[block.rows].flatten(), gradient.flatten(0, 1))
            else:
                part = block.rows if isinstance(piece, Rows) else block.columns if isinstance(piece, Columns) else ...
                own[part].add_(gradient)

    def _of(self, tensor: Tensor) -> Tensor | None:
        if not tensor.requires_grad:
            return None
        place = self.job.places[id(tensor)]
        own = self.own[place]
        if own is None:
            own = self.own[place] = torch.zeros_like(tensor)
        return own

    def of_tensors(self, scale: Tensor | None = None) -> list[Tensor | None]:
        """One per tensor of the job, which are given away; of a node of products nothing that is not there already."""
        made: list[Tensor | None] = []
        for place, tensor in enumerate(self.job.tensors):
            own = self.own[place]
            if not tensor.requires_grad:
                made.append(None)
            elif own is None:
                made.append(torch.zeros_like(tensor))
            else:
                made.append(own if scale is None else own.mul_(scale))
        self.own = [None] * len(made)
        return made


class _Sum(torch.autograd.Function):
    """The sum of a job. The gradient is made with the value, but for that of products that others look at yet."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> Tensor:
        ctx.job = job
        wanted = any(tensor.requires_grad for tensor in job.tensors)
        gradients = _Gradients(job, None if job.last or not job.kept else False) if wanted else None
        total = torch.zeros((), dtype=torch.float64, device=job.tensors[0].device)
        for number in range(len(job.blocks)):
            own = job.of_block(number, gradients)
            assert own is not None
            total += own
            if gradients is not None and number in gradients.of_kept:
                _keep(job, gradients.of_kept, number)
        for kept in job.kept:
            kept.forget_samples()
            if job.last and not kept.node.requires_grad:
                kept.forget_products()
        ctx.gradients = gradients
        return total.to(job.tensors[0].dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        job, gradients = ctx.job, ctx.gradients
        ctx.job = ctx.gradients = None
        for kept in job.kept:
            if kept.node.requires_grad:
                kept.found.append(_Later(job, gradients, upstream[0], None))
                if id(kept) in gradients.of_squares:
                    kept.add_to_squares(gradients.of_squares.pop(id(kept)) * upstream[0])
        return None, *gradients.of_tensors(upstream[0])


def _keep(job: _Job, gradients: dict[int, Tensor], number: int) -> None:
    """Keeps the gradient of the products of a block where there are others that nobody will look at any more."""
    gradient = gradients.pop(number)
    for kept in job.kept:
        if not kept.node.requires_grad and number < kept.known:
            gradients[number] = kept.places[number].copy_(gradient)


class _Later:
    """The gradient of a sum with respect to products, block by block.

    Args:
        job: the sum.
        gradients: what is known of them.
        upstream: what flows back to the sum, or to the sums of rows.
        factors: of the values of a block where these are not the weights.
    """

    def __init__(
        self, job: _Job, gradients: _Gradients | None, upstream: Tensor, factors: Callable[[_Block], Tensor] | None
    ) -> None:
        self.job = job
        self.of_kept = {} if gradients is None else gradients.of_kept
        self.squares_known = job.last
        self.upstream = upstream
        self.factors = factors

    def __call__(self, number: int) -> Tensor:
        known = self.of_kept.pop(number, None)
        if known is None:
            gradients = _Gradients(self.job, of_products=True)
            self.job.of_block(number, gradients, self.factors)
            known = gradients.of_kept[number]
            if not self.squares_known:
                for kept in self.job.kept:
                    if id(kept) in gradients.of_squares:
                        own = gradients.of_squares[id(kept)]
                        kept.add_to_squares(own if self.factors is not None else own * self.upstream)
        return known if self.factors is not None else known.mul_(self.upstream)


class _RowSums(torch.autograd.Function):
    """The sum of what a job makes of every row, of values that are the same the other way round."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> Tensor:
        ctx.job = job
        made = torch.zeros(job.samples, dtype=job.tensors[0].dtype, device=job.tensors[0].device)
        for number, block in enumerate(job.blocks):
            values = job.function(*job.arguments(number, block))
            made[block.rows].add_(values.sum(dim=1))
            made[block.rows.stop :].add_(values[:, block.once :].sum(dim=0))
        job.kept[0].forget_samples()
        return made

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        job, ctx.job = ctx.job, None
        own = upstream[0]

        def factors(block: _Block) -> Tensor:
            columns = own[block.columns].clone()
            columns[: block.once] = 0.0
            return own[block.rows].unsqueeze(1) + columns.unsqueeze(0)

        for kept in job.kept:
            if kept.node.requires_grad:
                kept.found.append(_Later(job, None, own, factors))
        return None, *(torch.zeros_like(t) if t.requires_grad else None for t in job.tensors)


class _Largest(torch.autograd.Function):
    """The largest of the values of a job, of which half are looked at."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> Tensor:
        (kept,) = job.kept
        largest = -math.inf
        reached: list[Tensor] = []
        for number, block in enumerate(job.blocks):
            values = job.function(*job.arguments(number, block))
            top = values.amax().item()
            if math.isnan(top):
                largest = top
                reached.clear()
                break
            if top > largest:
                largest = top
                reached.clear()
            if top == largest:
                reached += [place + block.rows.start for place in (values == top).nonzero(as_tuple=True)]
        kept.forget_samples()
        # All pairs that have the largest value, and share its gradient, are among these samples. Of NaN there are none.
        ctx.job, ctx.reached = job, torch.cat(reached).unique() if reached else []  # type: ignore[no-untyped-call]
        return job.tensors[0].new_tensor(largest)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        job, reached = ctx.job, ctx.reached
        ctx.job = None
        (kept,) = job.kept
        if len(reached):
            with torch.enable_grad():
                few = kept.x[reached].requires_grad_()
                own = ops.squares(few)
                known = {_Kept: torch.mm(few, few.transpose(0, 1)) * kept.factor, Squares: own}
                arguments = [
                    known[type(piece)]
                    if isinstance(piece, _Kept | Squares)
                    else ops.same_pairs(few)
                    if isinstance(piece, Same)
                    else piece.x[reached]
                    if isinstance(piece, Rows | Columns)
                    else piece
                    for piece in job.pieces
                ]
                value = job.function(*arguments).amax()
            (gradient,) = torch.autograd.grad(value, few, upstream[0])
            kept.chosen.append((reached, gradient))
        return None, *(torch.zeros_like(t) if t.requires_grad else None for t in job.tensors)


class _Known(torch.autograd.Function):
    """What a function makes, which knows its gradient."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, Tensor]], rows: int, x: Tensor, y: Tensor) -> Tensor:
        value, ctx.gradient = function(x.detach(), y, rows)
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        return None, None, torch_operators.scaled(gradient, upstream[0]), None


class _Each(torch.autograd.Function):
    """What a job makes of every sample. Its blocks are computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> Tensor:
        ctx.job = job
        made: Tensor | None = None
        for number, block in enumerate(job.blocks):
            rows = job.function(*job.arguments(number, block))
            if made is None:
                made = rows.new_empty((job.samples, *rows.shape[1:]))
            made[block.rows] = rows
        assert made is not None
        return made

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        job, ctx.job = ctx.job, None
        gradients = _Gradients(job)
        for number in range(len(job.blocks)):
            job.of_block(number, gradients, lambda block: upstream[0][block.rows])
        return None, *gradients.of_tensors()


def _tensors_of(piece: Any) -> list[Tensor]:
    """The tensors that a piece has a gradient for, or is shaped like."""
    if isinstance(piece, Products):
        return [piece.x, piece.y]
    if isinstance(piece, Rows | Columns | Chosen):
        return [piece.x]
    if isinstance(piece, _Kept):
        return [piece.node]
    if isinstance(piece, Same):
        return [piece.like]
    return [piece] if isinstance(piece, Tensor) else []


def _version(value: Any) -> int:
    return -1 if not isinstance(value, Tensor) or value.is_inference() else value._version
