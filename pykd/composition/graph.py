"""Loss graphs: one concrete form of a composition, as generated code that can be read, scripted and traced."""

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from pykd.composition.interface import Interface
from pykd.composition.terms import STUDENTS, Parameter, Part, Term
from pykd.definition import Loss, Spec, checks, names, ops, routing
from pykd.fused.point import Point


class LossGraph(fx.GraphModule):
    """One concrete, scriptable form of a composition.

    Calling it (or the TorchScript module made of it) returns ``{"loss": …, "<term>": …}``; terms are
    given before their weights, and ``loss`` is the sum of weight · term. With ``per_sample`` also
    ``"<term>_per_sample"`` and ``"loss_per_sample"``, which sums the terms that split over samples.

    Its ``signature`` tells the inputs, parameters and outputs. A copy of it, or a pickled one, is built again.
    """

    if TYPE_CHECKING:  # an annotation that TorchScript sees would be compiled
        signature: "GraphSignature"
        kernel_point: Point | None  # of a graph built with fused=True that has something to fuse
        built_from: tuple[Any, ...]  # the arguments of build

    def __reduce__(self) -> tuple[Any, ...]:
        return build, self.built_from

    def __copy__(self) -> "LossGraph":
        return build(*self.built_from)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LossGraph":
        return build(*copy.deepcopy(self.built_from, memo))


@dataclasses.dataclass(frozen=True)
class GraphSignature:
    """What goes into a loss graph and what comes out.

    Attributes:
        inputs: the tensors by name, each with its one layout.
        parameters: the numbers by name, with their defaults.
        outputs: axis names of every output.
        ignore_indices: for integer inputs, the value that marks an entry to leave out.
    """

    inputs: Mapping[str, Spec]
    parameters: Mapping[str, Parameter]
    outputs: Mapping[str, tuple[str, ...]]
    ignore_indices: Mapping[str, int]


def fold(x: Tensor) -> Tensor:
    """``(batch, students, …)`` → one row per sample and student."""
    return x.flatten(0, 1)


def spread(x: Tensor, like: Tensor) -> Tensor:
    """``(batch, …)`` → the same rows as :func:`fold` of ``like``, each repeated for every student."""
    sizes = [-1, like.size(1)]
    for _ in range(x.dim() - 1):
        sizes.append(-1)
    return x.unsqueeze(1).expand(sizes).flatten(0, 1)


def unfold(x: Tensor, like: Tensor) -> Tensor:
    """One value per row → ``(batch, students)`` as ``like`` has them."""
    return x.reshape(like.size(0), like.size(1))


class _Fused(nn.Module):
    """One loss by its kernel, as a module of a graph."""

    def __init__(self, loss: Loss, point: Point) -> None:
        super().__init__()
        self.loss = loss
        self.point = point

    def forward(self, **arguments: Any) -> Tensor:
        return self.loss.by_kernel(self.point, arguments)


def _variable(graph: fx.Graph, name: str, kind: Any, *default: float) -> fx.Node:
    """An argument of the graph's code. It stands there as it is, so nothing but a checked name gets in."""
    checked = names.check_variable(name, "an input or parameter of the loss")
    return graph.placeholder(checked, type_expr=kind, **({"default_value": default[0]} if default else {}))


class Now:
    """Computes an outcome of :func:`compute_outputs` at once.

    Args:
        point: the kernel point for losses that a kernel computes; None: all are computed by their formulas.
        widen: whether halves are widened before the losses see them.
        all_kept: whether it is known that no index is ignored.
        mode: ``"auto"`` or ``"on"``, which decides what goes by blocks of rows where there is a kernel point.
    """

    def __init__(self, point: Any = None, widen: bool = True, all_kept: bool = False, mode: str = "auto") -> None:
        self.point = point
        self.widen = widen
        self.all_kept = all_kept
        self.mode = mode

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def loss(self, path: str, loss: Loss, arguments: Mapping[str, Any], covered: bool) -> Any:
        if covered and self.point is not None:
            return loss.by_kernel(self.point, arguments)
        if self.point is not None and goes_by_blocks(loss, arguments, self.mode):
            assert routing.evaluator is not None
            return routing.evaluator.by_blocks(loss, arguments)
        formula, every = loss.formula_call(arguments)
        return formula(**every)


def goes_by_blocks(loss: Loss, arguments: Mapping[str, Any], mode: str) -> bool:
    """Whether a loss of a composition is computed by blocks of rows."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    return loss.has_blocks() and not any(
        (loss.why_whole(arguments, mode), loss.has_kernel(), *(t.dtype == torch.float64 for t in tensors))
    )


class _Later:
    """Writes an outcome of :func:`compute_outputs` into a graph."""

    def __init__(self, graph: fx.Graph, point: Point | None) -> None:
        self.graph = graph
        self.point = point  # where losses go that a kernel computes
        self.widen = True
        self.all_kept = False
        self.modules: dict[str, nn.Module] = {}

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.graph.call_function(function, arguments)

    def loss(self, path: str, loss: Loss, arguments: Mapping[str, Any], covered: bool) -> Any:
        if self.point is not None and covered:
            self.modules[path] = _Fused(loss, self.point)
            return self.graph.call_module(path, kwargs=dict(arguments))
        formula, every = loss.formula_call(arguments)
        return self.graph.call_function(formula, kwargs=every)


def compute_outputs(
    make: Now | _Later,
    composition: Interface,
    specs: Mapping[str, Spec],
    given: Mapping[str, Any],
    numbers: Mapping[str, Any],
    per_sample: bool = False,
) -> dict[str, Any]:
    """The outputs of a composition by name, ``"loss"`` first: the one place that says how they come about.

    Args:
        make: whether tensors are computed or nodes of a graph are made.
        composition: the terms.
        specs: the layout of every input that is there.
        given: the inputs by name.
        numbers: every parameter by name.
        per_sample: whether to add the vectors per sample.
    """
    # Halves are widened once, here, so that the gradients of all terms are added in float32 and rounded once.
    rows = {
        name: make.call(ops.upcast, given[name]) if make.widen and spec.dtype == "float" else given[name]
        for name, spec in specs.items()
    }
    like = None
    if composition.students:
        like = next(given[name] for name, spec in specs.items() if spec.grad)
        for name, spec in specs.items():
            if STUDENTS in spec.names:
                rows[name] = make.call(fold, rows[name])
            elif spec.names[0] == "batch":
                rows[name] = make.call(spread, rows[name], like)
    kept = None  # the samples that not every input of labels ignores
    if composition.share_ignored and not make.all_kept:
        for name, index in composition.ignore_indices(specs).items():
            own = make.call(operator.ne, rows[name], index)
            kept = own if kept is None else make.call(operator.or_, kept, own)
    weights: dict[str, Any] = {}  # of the terms without labels, by the input that weighs them

    def arguments_of(term: Term, part: Part) -> dict[str, Any]:
        arguments = {n: rows[part.graph_input(n)] for n in part.loss.inputs if part.graph_input(n) in specs}
        weight = None if kept is None or part.has_labels(specs) else part.loss.weight_input()
        if weight is not None:
            name = part.graph_input(weight)
            if name not in weights:
                weights[name] = make.call(ops.weigh, kept, rows.get(name))
            arguments[weight] = weights[name]
        return {**arguments, **composition.numbers_of(term, part, numbers)}

    def term_value(term: Term, reduction: str | None) -> Any:
        total = None
        for i, part in enumerate(term.parts):
            path = f"{term.name}_{i}" + ("_per_sample" if reduction else "")
            loss = part.loss.with_settings(reduction=reduction) if reduction else part.loss
            own = {n: specs[part.graph_input(n)] for n in loss.inputs if part.graph_input(n) in specs}
            value = make.loss(path, loss, arguments_of(term, part), loss.has_kernel() and loss.covered_by_kernel(own))
            if part.weight_name is not None:
                value = make.call(operator.mul, value, numbers[part.weight_name])
            elif part.weight != 1.0:
                value = make.call(operator.mul, value, float(part.weight))
            total = value if total is None else make.call(operator.add, total, value)
        assert total is not None
        return total

    def weighted_sum(values: Mapping[str, Any]) -> Any:
        total = None
        for name, value in values.items():
            if not composition.single:
                value = make.call(operator.mul, value, numbers[f"{name}_weight"])
            total = value if total is None else make.call(operator.add, total, value)
        assert total is not None
        return total

    terms = {term.name: term_value(term, None) for term in composition.named_terms}
    outputs = {"loss": weighted_sum(terms)} | ({} if composition.single else terms)
    if per_sample:
        composition.axes_per_sample(specs)  # or an error
        samples = {term.name: term_value(term, "none") for term in composition.named_terms if not term.couples_batch}
        if like is not None:
            samples = {name: make.call(unfold, value, like) for name, value in samples.items()}
        outputs["loss_per_sample"] = weighted_sum(samples)
        if not composition.single:
            outputs |= {f"{name}_per_sample": value for name, value in samples.items()}
    return outputs


def build(composition: Interface, specs: dict[str, Spec], per_sample: bool, check: bool, fused: bool) -> LossGraph:
    graph = fx.Graph()
    point = Point()
    nodes = {name: _variable(graph, name, Tensor) for name in specs}
    numbers = {
        name: _variable(graph, name, float, float(parameter.default)) for name, parameter in composition.scalars.items()
    }
    if check:
        axes = [list(spec.names) for spec in specs.values()]
        least = checks.least_of(specs, composition.least_lengths)
        graph.call_function(checks.check_axes, (list(nodes.values()), list(specs), axes, least))
    for term in composition.named_terms:
        names.check(term.name, "the name of a term")  # it becomes an attribute in the graph's code
    make = _Later(graph, point if fused else None)
    outputs = compute_outputs(make, composition, specs, nodes, numbers, per_sample)
    graph.output(outputs, type_expr=dict[str, Tensor])
    used = graph.python_code("self").globals
    for name in (*nodes, *numbers):
        names.check_variable(name, "an input or parameter of the loss", used)
    made = LossGraph(make.modules, graph, class_name="LossGraph")
    made.kernel_point = point if any(isinstance(module, _Fused) for module in make.modules.values()) else None
    made.built_from = (composition, specs, per_sample, check, fused)
    samples = composition.axes_per_sample(specs) if per_sample else ()
    made.signature = GraphSignature(
        inputs=specs,
        parameters=dict(composition.scalars),
        outputs={name: samples if name.endswith("_per_sample") else () for name in outputs},
        ignore_indices=composition.ignore_indices(specs),
    )
    return made
