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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pykd import _core, kernels
from pykd.definition import Loss, ops, routing
from pykd.definition.plan import PlannedCall
from pykd.fused import torch_operators
from pykd.fused.linear import Linear, Reduced
from pykd.fused.point import Call, Collector, Value
from pykd.fused.program import Program, record

Outputs = Mapping[str, Tensor | Linear]


class Forms(Collector):
    """The kernel point of a call: answers with linear forms."""

    def answer(self, place: int, value: Value, samples: list[Any]) -> Any:
        return Linear([(Reduced(place, value, samples, self.calls[place].device), 1.0)])


# ---- Losses --------------------------------------------------------------------------------------


class Evaluator:
    """Losses by their kernels, for :mod:`pykd.definition.routing`."""

    def loss(self, loss: Loss, call: PlannedCall) -> Tensor:
        def walk() -> tuple[list[Call], dict[str, Any]]:
            point = Forms(call.kept)
            return point.calls, {"loss": loss.by_kernel(point, {**call.tensors, **call.numbers})}

        return evaluate(call, walk)["loss"]

    def refusal(self, loss: Loss, tensors: Mapping[str, Tensor]) -> str:
        point = Forms()
        with torch.no_grad():
            loss.by_kernel(point, tensors)
        return refusal(point.calls)


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
        if call.device.type == "cuda" and (why := _why_not_on_cuda(call)):
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
        walk: the way through the loss: the kernel calls, and the outputs, the loss first. The second time with the same
            numbers it is noted, and gone without it from then on.
    """
    plan, tensors, numbers, kept = call
    key = (kept, *numbers.items())
    if any(isinstance(number, Tensor) for number in numbers.values()) or _autocasts():
        return finish(*walk())
    given = list(tensors.values())
    if len(set(map(id, given))) < len(given):  # one tensor under two names is no way for others
        return finish(*walk())
    again = plan.programs.get(key, _NEVER_SEEN)
    if again is _NEVER_SEEN:
        plan.programs[key] = _SEEN_ONCE
        return finish(*walk())
    if again is _SEEN_ONCE:
        again = _noted(given, walk)
        if len(plan.programs) >= _MOST_PROGRAMS:
            plan.programs.clear()
        plan.programs[key] = again
    way: Way = again
    return way(given)


def _autocasts() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


Way = Callable[[Sequence[Tensor]], dict[str, Tensor]]


def _noted(tensors: Sequence[Tensor], walk: Walk) -> Way:
    """The way through a loss as a function of the tensors, in the shortest form that it has."""
    program = record(tensors, walk)
    if program is None:  # it cannot be noted
        return lambda _: finish(*walk())
    calls, outputs = program(tensors)
    if Straight.covers(program, calls, outputs):
        return Straight(calls, outputs, tensors)
    frame = Frame(calls, outputs)
    return lambda given: finish(*program(given), frame)


_NEVER_SEEN, _SEEN_ONCE = object(), object()
_MOST_PROGRAMS = 16


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


def finish(calls: Sequence[Call], outputs: Outputs, frame: Frame | None = None) -> dict[str, Tensor]:
    """Runs the kernels and gives every output its value, with autograd.

    Args:
        calls: that the outputs are made of.
        outputs: the loss first; what no kernel has part in are tensors.
        frame: of such calls and outputs, where it is at hand.
    """
    frame = frame or Frame(calls, outputs)
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
    if students:
        gradients = [results[place][f"grad_{name}"] for place, name in students] if known else []
        kept = [*gradients, *(calls[place].tensors[name] for place, name in frame.names)]
        job = _Job(frame, forms, students, len(gradients))
        if len(values) > 1:  # each of them another tensor
            values = [value.clone() if any(value is own for own in seen.values()) else value for value in values]
        values = _with_autograd(job, values, kept, [calls[place].tensors[name] for place, name in students])
    computed = dict(zip(frame.forms, values, strict=True))
    return {name: _with_rest(output, computed.get(name)) for name, output in outputs.items()}


class Straight:
    """A call without anything but the kernels, on the CPU, where all samples of a batch count the same: what most calls are.

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
    def covers(program: Program, calls: Sequence[Call], outputs: Outputs) -> bool:
        """Whether it will do."""
        even = all(isinstance(output, Linear) and output.even_sums() is not None for output in outputs.values())
        students = [call.tensors[name] for call in calls for name in call.kernel.differentiable]
        on_cpu = all(call.device.type == "cpu" for call in calls)
        return even and on_cpu and not program.has_steps and all(t.dtype != torch.float16 for t in students)

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        for name in self.kernels:
            routing.note_kernel(name)
        students: list[tuple[int, str, int]] = []
        if torch.is_grad_enabled():
            students = [student for student in self.students if tensors[student[2]].requires_grad]
        ran = [one(tensors, bool(students)) for one in self.runs]
        values = [
            torch.scalar_tensor(sum([ran[place][0][number] for place, number in term]), dtype=torch.float32)
            for term in self.terms
        ]
        if students:
            which = [(place, name) for place, name, _ in students]
            kept = [ran[place][1][name] for place, name in which] + [tensors[number] for number in self.names]
            job = _Job(self.frame, self.forms, which, len(which))
            values = _with_autograd(job, values, kept, [tensors[number] for _, _, number in students])
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
        self.call = _core.KernelCall(
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
        return self.call.run(inputs, tuple(gradients.values()), torch.get_num_threads()), gradients


def _gradients(call: Call) -> list[str]:
    return [f"grad_{name}" for name in call.kernel.differentiable]


def _with_rest(output: Tensor | Linear, value: Tensor | None) -> Tensor:
    if value is None or not isinstance(output, Linear):
        assert isinstance(output, Tensor)
        return output
    return value if output.rest is None else value + output.rest


def run(call: Call, weights: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
    """Runs one kernel call, with the weights that are given, for these outputs."""
    if call.device.type != "cpu":
        return torch_operators.fused_call(call.kernel.name, call.inputs(weights), call.attributes, outputs)
    inputs: dict[str, Any] = {}
    for name, value in call.tensors.items():
        if call.kernel.inputs[name].role == "number":
            inputs[name] = np.array(float(value), np.float32)
        else:
            inputs[name] = _memory(value)
    for name, value in weights.items():
        inputs[name] = value.contiguous()
    results = {}
    for name in outputs:
        if name.startswith("grad_"):
            results[name] = _new_like(inputs[name.removeprefix("grad_")])
        else:
            results[name] = torch.empty(call.value_of(name).shape, dtype=torch.float32)
    _core.run_kernel(call.kernel.name, inputs, call.attributes, results, torch.get_num_threads(), 0)
    return results


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


@dataclasses.dataclass
class _Job:
    """What a node of autograd knows of its call, but for the tensors, which autograd keeps.

    Attributes:
        frame: of the call.
        forms: what the values are.
        students: the tensors that get a gradient.
        known: how many gradients are kept before the tensors of the calls: those of the first form, or none.
    """

    frame: Frame
    forms: Sequence[Linear]
    students: Sequence[tuple[int, str]]
    known: int


def _with_autograd(
    job: _Job, values: Sequence[Tensor], kept: Sequence[Tensor], students: Sequence[Tensor]
) -> list[Tensor]:
    made = _apply(job, values, kept, *students)
    return [made] if isinstance(made, Tensor) else list(made)


class _Node(torch.autograd.Function):
    """Values that kernels gave. The first is the loss, whose gradient may be known; others are its terms."""

    @staticmethod
    def forward(ctx: Any, job: _Job, values: Sequence[Tensor], kept: Sequence[Tensor], *students: Tensor) -> Any:
        ctx.job = job
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        return tuple(values) if len(values) > 1 else values[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        job: _Job = ctx.job
        kept = ctx.saved_tensors
        own = upstream[0]
        again = torch.is_grad_enabled()
        alone = own is not None and all(other is None for other in upstream[1:])
        if job.known and alone and not again and torch_operators.is_plain(own):  # type: ignore[arg-type]
            return None, None, None, *[torch_operators.scaled(gradient, own) for gradient in kept[: job.known]]  # type: ignore[arg-type]
        asked = [(form, each) for form, each in zip(job.forms, upstream, strict=True) if each is not None]
        calls = job.frame.with_tensors(kept[job.known :])
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
        students = [calls[place].tensors[name] for place, name in job.students]
        if not again:
            students = [student.detach().requires_grad_() for student in students]
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
