"""Losses through their fused kernels in eager mode, with autograd: what ``kernels="auto"`` and ``"on"`` do.

One call of the kernels computes the value and the gradient, so ``backward()`` has only to hand it on. It goes

1. through the loss once, with :class:`~pykd.fused.linear.Linear` forms in the place of the values: these say which kernels
   run, and what d(loss)/d(value) is;
2. through the kernels;
3. and the forms say what the loss is, and each of its terms.

The kernels run once more in ``backward()`` where what flows back was not known before: for values per sample, for a term
that is used by itself, and for float16 students, whose gradient must meet the factor of a scaled loss before it is rounded.
Second derivatives, and several upstream gradients at once, differentiate the formula instead.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pykd import _core, kernels
from pykd.definition import Loss, ops, routing
from pykd.definition.plan import PlannedCall
from pykd.fused import blocks, torch_operators
from pykd.fused.linear import Linear, Reduced
from pykd.fused.point import Call, Collector, Value

Outputs = Mapping[str, Tensor | Linear]


class Forms(Collector):
    """The kernel point of a call: answers with linear forms."""

    def answer(self, place: int, value: Value, samples: list[Any]) -> Any:
        return Linear([(Reduced(place, value, samples, self.calls[place].device), 1.0)])


# ---- Losses --------------------------------------------------------------------------------------


class Evaluator:
    """Losses by their kernels, for :mod:`pykd.definition.routing`."""

    def loss(self, loss: Loss, call: PlannedCall) -> Tensor:
        if loss.has_blocks() and not loss.has_kernel():
            return self.by_blocks(loss, {**call.tensors, **call.numbers})

        def walk() -> tuple[list[Call], dict[str, Any]]:
            point = Forms(call.kept)
            return point.calls, {"loss": loss.by_kernel(point, {**call.tensors, **call.numbers})}

        return evaluate(call, walk)["loss"]

    def by_blocks(self, loss: Loss, given: Mapping[str, Any]) -> Tensor:
        return blocks.evaluate(loss, given)

    def refusal(self, loss: Loss, tensors: Mapping[str, Tensor]) -> str:
        if not loss.has_kernel():
            return "it has no kernel, and no blocks of rows for float64" if _is_double(tensors.values()) else ""
        return refusal(kernel_calls(loss, tensors))


def kernel_calls(loss: Loss, tensors: Mapping[str, Tensor]) -> list[Call]:
    """The kernel calls of a loss that kernels cover."""
    point = Forms()
    with torch.no_grad():
        loss.by_kernel(point, tensors)
    return point.calls


def _is_double(tensors: Iterable[Tensor]) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors)


_descriptions = functools.cache(kernels.descriptions)


def refusal(calls: Sequence[Call]) -> str:
    """Why the library does not compute these calls, as far as types and devices go; empty where it does."""
    for call in calls:
        dtypes = _descriptions()[call.kernel.name]["dtypes"]
        for name, argument in call.kernel.inputs.items():
            tensor = call.tensors.get(name)
            if argument.role == "tensor" and isinstance(tensor, Tensor):
                dtype = str(tensor.dtype).removeprefix("torch.")
                if dtype not in dtypes:
                    return f"no kernel computes {dtype}"
        if call.device.type not in ("cpu", "cuda"):
            return f"no kernel runs on {call.device.type}"
        if call.device.type == "cuda" and (why := call.kernel.why_not_on_cuda or _why_not_on_cuda(call)):
            return why
    return ""


def _why_not_on_cuda(call: Call) -> str:
    """Where there is no kernel for the GPU, or nothing that runs it, the library says so when it is asked to."""
    try:
        run(call, {}, call.outputs({}))
    except (RuntimeError, FileNotFoundError) as error:
        return str(error)
    return ""


Walk = Callable[[], tuple[list[Call], dict[str, Any]]]


def evaluate(call: PlannedCall, walk: Walk) -> dict[str, Tensor]:
    """Every output of a call, with autograd.

    Args:
        call: the call.
        walk: the way through the loss: the kernel calls, and the outputs, the loss first. Where nothing but kernels lies on
            it, it is gone without the walk from the second call with the same numbers on.
    """
    plan, tensors, numbers, kept = call
    key = (kept, *numbers.values())
    if any(isinstance(number, Tensor) for number in numbers.values()) or _autocasts():
        return finish(*walk())
    given = list(tensors.values())
    if len(set(map(id, given))) < len(given):  # one tensor under two names is no way for others
        return finish(*walk())
    straight = plan.ways.get(key)
    if straight is not None:
        way: Straight = straight
        return way(given)
    calls, outputs = walk()
    if plan.last == key and Straight.covers(calls, outputs, given):
        if len(plan.ways) >= _MOST_WAYS:
            plan.ways = {}
        plan.ways[key] = Straight(calls, outputs, given)
    plan.last = key
    return finish(calls, outputs)


def _autocasts() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


_MOST_WAYS = 4  # of one plan


# ---- A call --------------------------------------------------------------------------------------


class Frame:
    """What stays the same of a walk, whatever its tensors hold.

    Attributes:
        calls: the kernel calls, without their tensors.
        names: the tensors of all calls, each by the place of its call and its name there.
        students: those of them that may get a gradient.
        forms: the names of the outputs that kernels have part in.
        loss_is_known: whether the loss is one of these, and one number, so that d(loss)/d(value) is known before backward().
        values: the outputs of every call that are values.
    """

    def __init__(self, calls: Sequence[Call], outputs: Outputs) -> None:
        self.calls = [
            dataclasses.replace(call, tensors={n: t for n, t in call.tensors.items() if not isinstance(t, Tensor)})
            for call in calls
        ]
        self.names = [
            (i, name) for i, call in enumerate(calls) for name, t in call.tensors.items() if isinstance(t, Tensor)
        ]
        self.students = [(i, name) for i, call in enumerate(calls) for name in call.kernel.differentiable]
        self.forms = [name for name, output in outputs.items() if isinstance(output, Linear)]
        loss = next(iter(outputs.values()))
        self.loss_is_known = isinstance(loss, Linear) and all(piece.is_scalar for piece, _ in loss.pieces)
        self.values = [[value.output for value in call.values] for call in calls]

    def with_tensors(self, tensors: Sequence[Tensor]) -> list[Call]:
        """The calls with their tensors, in the order of ``names``."""
        calls = [dataclasses.replace(call, tensors=dict(call.tensors)) for call in self.calls]
        for (place, name), tensor in zip(self.names, tensors, strict=True):
            calls[place].tensors[name] = tensor
        return calls


def finish(calls: Sequence[Call], outputs: Outputs) -> dict[str, Tensor]:
    """Runs the kernels and gives every output its value, with autograd.

    Args:
        calls: that the outputs are made of.
        outputs: the loss first; what no kernel has part in are tensors.
    """
    frame = Frame(calls, outputs)
    for call in calls:
        routing.note_kernel(call.kernel.name)
    students: list[tuple[int, str]] = []
    if torch.is_grad_enabled():
        students = [(place, name) for place, name in frame.students if calls[place].tensors[name].requires_grad]
    forms: list[Linear] = [outputs[name] for name in frame.forms]  # type: ignore[misc]
    known = frame.loss_is_known and all(calls[i].tensors[name].dtype != torch.float16 for i, name in students)
    weights: list[dict[str, Tensor]] = [{} for _ in calls]
    if students and known:
        forms[0].add_weights(weights, 1.0)
    results = [
        run(call, own, [*values, *_gradients(call)] if own else values)
        for call, own, values in zip(calls, weights, frame.values, strict=True)
    ]
    seen: dict[int, Tensor] = {}
    with torch.no_grad():
        values = [form.value(seen, results) for form in forms]
    if len(values) > 1:  # each of them another tensor
        values = [value.clone() if any(value is own for own in seen.values()) else value for value in values]
    if students:
        gradients = [results[place][f"grad_{name}"] for place, name in students] if known else []
        tensors = [calls[place].tensors[name] for place, name in frame.names]
        job = _Job(frame, forms, students, tensors)
        values = _with_autograd(job, values, gradients, [calls[place].tensors[name] for place, name in students])
    computed = dict(zip(frame.forms, values, strict=True))
    return {name: _with_rest(output, computed.get(name)) for name, output in outputs.items()}


class Straight:
    """A small call without anything but the kernels, on the CPU, where all samples of a batch count the same.

    Each output is Σ weight · value over the rows, with weights that never change.
    """

    def __init__(self, calls: Sequence[Call], outputs: Outputs, tensors: Sequence[Tensor]) -> None:
        numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        self.frame = Frame(calls, outputs)
        self.forms = [output for output in outputs.values() if isinstance(output, Linear)]
        self.kernels = [call.kernel.name for call in calls]
        self.names = [numbers[id(calls[place].tensors[name])] for place, name in self.frame.names]
        self.students = [(place, name, numbers[id(calls[place].tensors[name])]) for place, name in self.frame.students]
        weights: list[dict[str, Tensor]] = [{} for _ in calls]
        self.forms[0].add_weights(weights, 1.0)
        sums: list[list[tuple[int, Tensor, bool]]] = [[] for _ in calls]  # of every call
        self.terms: list[list[tuple[int, int]]] = []  # of every output: call and number of each sum that it is made of
        for form in self.forms:
            self.terms.append([])
            for piece, weight in form.even_sums() or ():
                of_call = sums[piece.place]
                self.terms[-1].append((piece.place, len(of_call)))
                number = self.frame.values[piece.place].index(piece.source.output)
                of_call.append((number, weight.contiguous(), piece.at_least_0))
        self.runs = [
            _Run(call, numbers, own, tuple(of_call)) for call, own, of_call in zip(calls, weights, sums, strict=True)
        ]

    @staticmethod
    def covers(calls: Sequence[Call], outputs: Outputs, tensors: Sequence[Tensor]) -> bool:
        """Whether it will do."""
        inputs = {id(tensor) for tensor in tensors}
        if not all(isinstance(output, Linear) and output.even_sums() is not None for output in outputs.values()):
            return False
        for call in calls:
            if _wants_threads(call):
                return False
            for name, value in call.tensors.items():
                if call.kernel.inputs[name].role == "number":
                    if isinstance(value, Tensor):
                        return False
                elif id(value) not in inputs or value.dtype == torch.float16 or value.device.type != "cpu":
                    return False
        return True

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        for name in self.kernels:
            routing.note_kernel(name)
        students: list[tuple[int, str, int]] = []
        if torch.is_grad_enabled():
            students = [student for student in self.students if tensors[student[2]].requires_grad]
        ran = [one(tensors, bool(students)) for one in self.runs]
        values = [
            torch.scalar_tensor(
                sum([ran[place][0][number] for place, number in term]), dtype=torch.float32, device="cpu"
            )
            for term in self.terms
        ]
        if students:
            which = [(place, name) for place, name, _ in students]
            gradients = [ran[place][1][name] for place, name in which]
            job = _Job(self.frame, self.forms, which, [tensors[number] for number in self.names])
            values = _with_autograd(job, values, gradients, [tensors[number] for _, _, number in students])
        return dict(zip(self.frame.forms, values, strict=True))


class _Run:
    """One kernel of a straight call, with everything but the tensors at hand."""

    def __init__(
        self,
        call: Call,
        numbers: Mapping[int, int],
        weights: Mapping[str, Tensor],
        sums: tuple[tuple[int, Tensor, bool], ...],
    ) -> None:
        roles = {name: call.kernel.inputs[name].role for name in call.tensors}
        inputs = [name for name, role in roles.items() if role != "number"]
        self.inputs = [numbers[id(call.tensors[name])] for name in inputs]
        self.students = [(name, inputs.index(name)) for name in call.kernel.differentiable]
        self.call = _core.prepare_kernel(
            call.kernel.name,
            {name: float(call.tensors[name]) for name, role in roles.items() if role == "number"},
            tuple(inputs),
            call.attributes,
            {name: weight.contiguous() for name, weight in weights.items()},
            tuple((value.output, value.shape[0]) for value in call.values),
            tuple(_gradients(call)),
            sums,
        )

    def __call__(self, tensors: Sequence[Tensor], wanted: bool) -> tuple[tuple[float, ...], dict[str, Tensor]]:
        """The sums, and the gradients by the names of the students."""
        inputs = tuple([_memory(tensors[number]) for number in self.inputs])
        gradients = {name: _new_like(inputs[number]) for name, number in self.students} if wanted else {}
        return self.call.run(inputs, tuple(gradients.values()), 1), gradients


def _gradients(call: Call) -> list[str]:
    return [f"grad_{name}" for name in call.kernel.differentiable]


def _with_rest(output: Tensor | Linear, value: Tensor | None) -> Tensor:
    if value is None or not isinstance(output, Linear):
        assert isinstance(output, Tensor)
        return output
    return value if output.rest is None else value + output.rest


def run(call: Call, weights: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
    """Runs one kernel call, with the weights that are given, for these outputs."""
    inputs: dict[str, Any]
    if call.device.type != "cpu" or (_wants_threads(call) and _has_threads_of_torch()):
        inputs = {name: _memory(tensor) for name, tensor in call.inputs(weights).items()}
        return torch_operators.fused_call(call.kernel.name, inputs, call.attributes, outputs)
    inputs = {
        name: float(value) if call.kernel.inputs[name].role == "number" else _memory(value)
        for name, value in (*call.tensors.items(), *weights.items())
    }
    results = {}
    for name in outputs:
        if name.startswith("grad_"):
            results[name] = _new_like(inputs[name.removeprefix("grad_")])
        else:
            results[name] = torch.empty(call.value_of(name).shape, dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads() if _wants_threads(call) else 1
    kernels.run(call.kernel.name, inputs, call.attributes, results, threads, cuda_stream=0)
    return results


def _wants_threads(call: Call) -> bool:
    """Whether it is worth waking other threads: for many numbers, and where every sample meets every other."""
    many = any(call.tensors[name].numel() > _ALONE for name in call.kernel.differentiable)
    return many or any(not value.shape for value in call.values)


_ALONE = 1 << 18  # numbers that one thread has computed before others are awake


@functools.cache
def _has_threads_of_torch() -> bool:
    """Whether kernels can have torch's threads. Its idle ones wait for work and hold up others on the same cores."""
    try:
        torch_operators.load()
    except (FileNotFoundError, RuntimeError):
        return False
    return True


def _memory(tensor: Tensor) -> Tensor:
    """The tensor as kernels read it: without autograd, contiguous, aligned, and not negated lazily."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    tensor = tensor.contiguous()
    if tensor.is_neg() or tensor.data_ptr() % tensor.element_size():
        return tensor.clone()
    return tensor


def _new_like(tensor: Tensor) -> Tensor:
    """A new tensor on the CPU; a large one in memory that is kept from step to step."""
    size = tensor.numel() * tensor.element_size()
    if size < _core.kept_from:
        return torch.empty_like(tensor)
    return torch.frombuffer(_core.allocate(size), dtype=tensor.dtype).view(tensor.shape)


# ---- Autograd ------------------------------------------------------------------------------------


class _Job:
    """What a node of autograd knows of its call, so as to run the kernels again, or their formulas, in backward().

    The tensors are no saved ones of autograd's, since most backward passes do not look at them: whoever wants to may write
    to them, and they may be those of inference mode. Where they are looked at, a change since the call is an error.

    Attributes:
        frame: of the call.
        forms: what the values are.
        students: the tensors that get a gradient.
        tensors: of the calls, in the order of the frame.
    """

    __slots__ = ("forms", "frame", "students", "tensors", "versions")

    def __init__(
        self, frame: Frame, forms: Sequence[Linear], students: Sequence[tuple[int, str]], tensors: Sequence[Tensor]
    ) -> None:
        self.frame = frame
        self.forms = forms
        self.students = students
        self.tensors: Sequence[Tensor] | None = tensors
        self.versions = [_version(tensor) for tensor in (*tensors, *self._weights())]

    def calls(self) -> list[Call]:
        """The kernel calls with their tensors, which are still as they were."""
        if self.tensors is None:
            raise RuntimeError(
                "expected one backward pass through a loss, got a second time; pass retain_graph=True to the first"
            )
        if self.versions != [_version(tensor) for tensor in (*self.tensors, *self._weights())]:
            raise RuntimeError(
                "expected the inputs of a loss as they were until backward() has run, got some that were modified by an "
                "inplace operation; change copies of them"
            )
        return self.frame.with_tensors(self.tensors)

    def _weights(self) -> list[Tensor]:
        return [piece.weight for form in self.forms for piece, _ in form.pieces if piece.weight is not None]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _with_autograd(
    job: _Job, values: Sequence[Tensor], gradients: Sequence[Tensor], students: Sequence[Tensor]
) -> list[Tensor]:
    """The values with autograd for the students; the gradients of the first value, or none of them."""
    made = _apply(job, values, gradients, *students)
    return [made] if isinstance(made, Tensor) else list(made)


class _Node(torch.autograd.Function):
    """Values that kernels gave. The first is the loss, whose gradient may be known; others are its terms."""

    @staticmethod
    def forward(ctx: Any, job: _Job, values: Sequence[Tensor], gradients: Sequence[Tensor], *students: Tensor) -> Any:
        ctx.job = job
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        if len(values) == 1:
            return values[0]
        places = {place for place, _ in job.students}
        constant = [
            value
            for value, form in zip(values, job.forms, strict=True)
            if not any(piece.place in places for piece, _ in form.pieces)
        ]
        ctx.mark_non_differentiable(*constant)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        job: _Job = ctx.job
        own = upstream[0]
        again = torch.is_grad_enabled()
        alone = own is not None and all(other is None for other in upstream[1:])
        if alone and not again and torch_operators.is_plain(own):  # type: ignore[arg-type]
            gradients = ctx.saved_tensors
            if gradients:
                if not torch_operators.graph_is_kept():
                    job.tensors = None
                return None, None, None, *[torch_operators.scaled(gradient, own) for gradient in gradients]  # type: ignore[arg-type]
        asked = [(form, each) for form, each in zip(job.forms, upstream, strict=True) if each is not None]
        calls = job.calls()
        # Terms may be used one after the other; the loss, like everything of autograd's, once.
        if own is not None and not torch_operators.graph_is_kept():
            job.tensors = None
        if again or not all(torch_operators.is_plain(each) for _, each in asked):
            return None, None, None, *_by_formula(job, asked, calls)
        return None, None, None, *_by_kernels(job, asked, calls)


# What Function.apply does besides is for transforms of torch.func, which take the formula.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Node).apply


Asked = Sequence[tuple[Linear, Tensor]]  # the forms that were used, with the upstream gradient of each


def _by_kernels(job: _Job, asked: Asked, calls: Sequence[Call]) -> list[Tensor | None]:
    """The gradients, now that the upstream ones are known."""
    weights: list[dict[str, Tensor]] = [{} for _ in calls]
    for form, own in asked:
        form.add_weights(weights, own)
    gradients = [
        run(call, own, [f"grad_{name}" for place, name in job.students if calls[place] is call]) if own else {}
        for call, own in zip(calls, weights, strict=True)
    ]
    return [gradients[place].get(f"grad_{name}") for place, name in job.students]


def _by_formula(job: _Job, asked: Asked, calls: Sequence[Call]) -> list[Tensor | None]:
    """The gradients by autograd of the formulas behind the kernels, which can be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each call has an alias of its own: autograd adds up what flows to the tensors that they are of.
        given = [calls[place].tensors[name] for place, name in job.students]
        students = [t.view_as(t) if again else t.detach().requires_grad_() for t in given]
        for (place, name), student in zip(job.students, students, strict=True):
            calls[place].tensors[name] = ops.without_left_out(student, _kept_rows(job, place))
        results = [call.formulas(call.tensors) for call in calls]
        known: dict[int, Tensor] = {}
        values = [form.value(known, results) for form, _ in asked]
        upstream = [own for _, own in asked]
        return list(torch.autograd.grad(values, students, upstream, create_graph=again, allow_unused=True))


def _kept_rows(job: _Job, place: int) -> Tensor | None:
    """Of every row of a call whether anything counts in it, as 1 or 0; None where all do."""
    kept: Tensor | None = None
    for form in job.forms:
        for piece, _ in form.pieces:
            if piece.place != place:
                continue
            if piece.weight is None:
                return None
            own = piece.weight.flatten() != 0
            kept = own if kept is None else kept | own
    return None if kept is None else kept.float()
