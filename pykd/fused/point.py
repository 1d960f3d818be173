"""Kernel points: where a loss hands part of its work to a fused kernel, without giving up its formula.

A loss that has a kernel adds one method, ``fused``: the same as ``forward``, with the expensive middle of the formula
replaced by a call of the *kernel point* it is given,

    values = kernel(KERNEL, "soft", soft_target_rows, {"student": …, "teacher": …}, {"form": "kl"}, weight="soft_weight")

which says: the kernel's output ``soft`` is what the plain function ``soft_target_rows`` computes from these tensors
and attributes. A kernel returns its gradient already multiplied by d(loss)/d(value), which goes in as ``weight``. Since every
loss is linear in what a kernel returns (a mean, a weighted sum), that factor is known before the kernel has run:
:func:`value_and_gradient` first walks through the loss with placeholders for the values, differentiates with respect
to them, then runs the kernels, and walks again with what they returned. Terms, weights, reductions, ignored samples
and the axis of several students need no words here: autograd finds the factor.

Calls of one kernel on one student merge: the hard and the soft term of a recipe become a single pass over the logits.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pykd.definition import ops
from pykd.fused.description import Kernel, KernelPoint


@dataclasses.dataclass
class Value:
    """One value that a call returns, and the plain formula behind it.

    Attributes:
        output: the kernel's name of it.
        formula: a function of the tensors and attributes in ``names``.
        names: which of the call's tensors and attributes the formula takes.
        weight: the kernel's input for d(loss)/d(value).
        shape: of the value.
        placeholder: stands for the value while the loss is differentiated with respect to it.
    """

    output: str
    formula: Callable[..., Tensor]
    names: tuple[str, ...]
    weight: str
    shape: list[Any]
    placeholder: Tensor | None = None


@dataclasses.dataclass
class Call:
    """One run of a kernel, for all the values that share it."""

    kernel: Kernel
    tensors: dict[str, Any]
    attributes: dict[str, Any]
    values: list[Value]

    def takes(self, kernel: Kernel, tensors: Mapping[str, Any], attributes: Mapping[str, Any]) -> bool:
        """Whether a further value of these tensors and attributes can come out of this run."""
        return (
            kernel is self.kernel
            and all(name in tensors and name in self.tensors for name in kernel.differentiable)
            and all(_same(self.tensors.get(name, tensor), tensor) for name, tensor in tensors.items())
            and all(self.attributes.get(name, value) == value for name, value in attributes.items())
        )

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        tensors = (t for t in self.tensors.values() if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0)
        return next(tensors).device

    def value_of(self, output: str) -> Value:
        """The value that comes out as ``output``."""
        return next(value for value in self.values if value.output == output)

    def inputs(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything that the kernel reads, as it wants it: detached, contiguous, numbers on the CPU."""
        given = {}
        for name, value in {**self.tensors, **weights}.items():
            role = self.kernel.inputs[name].role
            if role == "number":
                given[name] = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
            else:
                given[name] = (value.float() if role == "float32" else value).detach().contiguous()
        return given

    def outputs(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The outputs to ask for: the values, and gradients where weights are given."""
        values = [value.output for value in self.values]
        return values + [name for name in self.kernel.outputs if weights and name.startswith("grad_")]

    def formulas(self, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        """The values by the plain formulas."""
        arguments = {**tensors, **self.attributes}
        return {v.output: v.formula(**{name: arguments[name] for name in v.names}) for v in self.values}

    def plain(self, tensors: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the kernel returns, by the plain formulas and autograd: the values, and gradients where weights are given."""
        tensors = dict(tensors)
        with torch.enable_grad():
            if weights:
                for name in self.kernel.differentiable:
                    tensors[name] = tensors[name].detach().requires_grad_()
            results = self.formulas(tensors)
            students = [tensors[name] for name in self.kernel.differentiable]
            gradients: list[Tensor | None] = [None] * len(students)
            for value in self.values:
                if value.weight in weights:
                    weight = weights[value.weight]
                    for i, own in enumerate(torch.autograd.grad(results[value.output], students, weight)):
                        # As the kernels have it: a row of weight 0 gets 0, whatever it holds.
                        kept = ops.without_left_out(own, weight) if weight.dim() > 0 else own
                        gradients[i] = _sum(gradients[i], kept)
        results = {name: value.detach() for name, value in results.items()}
        if weights:
            results |= {
                f"grad_{name}": gradient
                for name, gradient in zip(self.kernel.differentiable, gradients, strict=True)
                if gradient is not None
            }
        return results


def _over(rows: Tensor, samples: list[Any]) -> Tensor:
    """One value per row as one per sample, whose axes have these lengths; as it is where a sample is a row."""
    return rows.reshape(samples) if samples else rows


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b))


class Collector:
    """A kernel point that notes what is asked for, before any kernel runs; calls that one run can serve become one.

    Attributes:
        calls: the runs, in order.
        all_kept: whether it is known that no index among the inputs is ignored.
    """

    def __init__(self, all_kept: bool = False) -> None:
        self.calls: list[Call] = []
        self.all_kept = all_kept
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}  # tensors per token by their id, and the same as rows

    def __call__(
        self,
        kernel: Kernel,
        output: str,
        formula: Callable[..., Tensor],
        tensors: Mapping[str, Any],
        attributes: Mapping[str, Any],
        weight: str,
    ) -> Any:
        tensors, samples = self._as_rows(kernel, tensors)
        place = next((i for i, call in enumerate(self.calls) if call.takes(kernel, tensors, attributes)), None)
        if place is None:
            place = len(self.calls)
            self.calls.append(Call(kernel, {}, {}, []))
        call = self.calls[place]
        call.tensors |= tensors
        call.attributes |= attributes
        value = next((value for value in call.values if value.output == output), None)
        if value is None:
            value = Value(output, formula, (*tensors, *attributes), weight, kernel.shape(output, tensors))
            call.values.append(value)
        return self.answer(place, value, samples)

    def answer(self, place: int, value: Value, samples: list[Any]) -> Any:
        """What stands for the value.

        Args:
            place: of the call among the calls.
            value: one of its values.
            samples: the lengths of the axes that count samples, where these are more than one; else empty.
        """
        raise NotImplementedError

    def _as_rows(self, kernel: Kernel, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """The tensors with one row per sample where further axes after the batch count samples, and the lengths of all these.

        A tensor that comes again is the same again, so that calls merge.
        """
        rows, samples = dict(tensors), []
        for name, tensor in tensors.items():
            axes = kernel.inputs[name].axes.split()
            further = tensor.dim() - len(axes) if isinstance(tensor, Tensor) and axes[:1] == ["batch"] else 0
            if further > 0:
                samples = list(tensor.shape[: further + 1])
                rows[name] = self.rows.setdefault(id(tensor), (tensor, tensor.flatten(0, further)))[1]
        return rows, samples


class Planner(Collector):
    """The kernel point of the first walk: answers with placeholders."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Call, str, list[Any]]] = []

    def answer(self, place: int, value: Value, samples: list[Any]) -> Tensor:
        call = self.calls[place]
        if value.placeholder is None:
            value.placeholder = torch.zeros(value.shape, device=call.device).requires_grad_()
        self.asked.append((call, value.output, samples))
        return _over(value.placeholder, samples)


class Answer:
    """The kernel point of the second walk: answers with what the kernels returned, in the order of the first."""

    all_kept = False

    def __init__(
        self, asked: Sequence[tuple[Call, str, list[Any]]], results: Mapping[int, Mapping[str, Tensor]]
    ) -> None:
        self.values = [_over(results[id(call)][output], samples) for call, output, samples in asked]
        self.next = 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        value = self.values[self.next]
        self.next += 1
        return value


class Point:
    """The kernel point inside a graph: answers as the one that counts now, in each thread for itself."""

    all_kept = False

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        now = _places().get(id(self))
        if now is None:
            raise RuntimeError("expected a fused graph to run inside value_and_gradient, got a bare call; use that")
        return now(*arguments, **keywords)

    @contextlib.contextmanager
    def answering(self, now: KernelPoint) -> Iterator[None]:
        """For the length of a block, this thread's calls go to ``now``."""
        places = _places()
        before = places.get(id(self))
        places[id(self)] = now
        try:
            yield
        finally:
            if before is None:
                del places[id(self)]
            else:
                places[id(self)] = before


# Threads share a graph, and with it its point; which walk a thread is on is its own matter. Not an attribute of the
# point: a graph is copied and pickled.
_thread = threading.local()


def _places() -> dict[int, KernelPoint]:
    """What counts now in this thread, by the id of the point."""
    try:
        return _thread.places  # type: ignore[no-any-return]
    except AttributeError:
        _thread.places = {}
        return _thread.places  # type: ignore[no-any-return]


Run = Callable[[Call, Mapping[str, Tensor]], dict[str, Tensor]]


def value_and_gradient(
    function: Callable[[], dict[str, Tensor]],
    point: Point,
    students: Sequence[Tensor],
    scale: Any,
    run: Run,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The values of a function that uses kernel points, and scale · d(loss)/d(student) for each student.

    Args:
        function: returns ``{"loss": …, …}``; it is called twice.
        point: the kernel point that ``function`` uses.
        students: leaves that require a gradient; none: values alone.
        scale: a number, or a tensor with one.
        run: runs a kernel call with the weights it is given (by input name; none where no gradient is wanted)
            and returns its outputs.
    """
    planner = Planner()
    gradients: list[Tensor | None] = []
    with torch.enable_grad():
        with point.answering(planner):
            loss = function()["loss"]
        weights: dict[int, dict[str, Tensor]] = {id(call): {} for call in planner.calls}
        if students:
            every = [(call, value) for call in planner.calls for value in call.values]
            found = torch.autograd.grad(
                loss * scale,
                [*(cast(Tensor, value.placeholder) for _, value in every), *students],
                retain_graph=True,
                allow_unused=True,
            )
            gradients += found[len(every) :]  # the plain terms'
            for (call, value), weight in zip(every, found, strict=False):
                if weight is not None:  # None: a value that the loss does not depend on
                    weights[id(call)][value.weight] = weight
    results = {id(call): run(call, weights[id(call)]) for call in planner.calls}
    with torch.no_grad(), point.answering(Answer(planner.asked, results)):
        values = function()
    if not students:
        return values, []
    place = {id(student): i for i, student in enumerate(students)}
    before: list[tuple[Tensor, Tensor]] = []  # tensors made of a student's, and the gradients that their kernels gave
    for call in planner.calls:
        for name in call.kernel.differentiable if weights[id(call)] else ():
            tensor, gradient = call.tensors[name], results[id(call)][f"grad_{name}"]
            if id(tensor) in place:
                gradients[place[id(tensor)]] = _sum(gradients[place[id(tensor)]], gradient)
            else:
                before.append((tensor, gradient))
    if before:
        outputs, upstream = zip(*before, strict=True)
        further = torch.autograd.grad(outputs, list(students), upstream, allow_unused=True)
        gradients = [_sum(gradient, more) for gradient, more in zip(gradients, further, strict=True)]
    return values, [
        torch.zeros_like(student) if gradient is None else gradient
        for gradient, student in zip(gradients, students, strict=True)
    ]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
