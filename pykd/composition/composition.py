"""Composition: terms with names and weights, joined into one loss.

    >>> loss = compose({"hard": (HardTarget(), 1.0), "soft": (SoftTarget(temperature=2.0), 0.5)})
    >>> values = loss(student_logits=student, teacher_logits=teacher, labels=labels)
    >>> values["loss"].backward()

A :class:`Composition` is what a Python user calls. A :class:`LossGraph` is one concrete form of it: every
input has one layout, every optional input is there or not, and its ``forward`` takes plain tensors and
numbers by name. It is a ``torch.fx.GraphModule``, so its code can be read (``print(graph.code)``), scripted and traced.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pykd.composition.graph import LossGraph, Now, build, compute_outputs, goes_by_blocks
from pykd.composition.interface import Interface
from pykd.composition.terms import STUDENTS, Part, Term
from pykd.definition import Loss, Spec, checks, routing, scalar
from pykd.definition.plan import PlannedCall, Plans, key_of
from pykd.definition.sizes import draw as draw_tensor
from pykd.definition.sizes import example_sizes, fitting, trial_sizes
from pykd.fused import eager
from pykd.fused.linear import Linear
from pykd.fused.point import Call

_NOTHING = "no kernel computes these losses and inputs"


class Composition(nn.Module, Interface):
    """Named terms with weights; see :func:`compose`.

    Calling it checks the tensors by their axis names and returns the values by name, ``"loss"`` first. Inputs
    are passed by name; numbers such as ``soft_temperature`` too, to replace their default in this call.

    A sample whose class index is ignored (``ignore_index``, −100) is padding: it is left out of every term that has a value
    per sample, those without labels included (``share_ignored``). Where several inputs hold class indices, a
    term with labels goes by its own, and one without leaves out what all of them ignore.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        students: bool = False,
        single: bool = False,
        share_ignored: bool = True,
        kernels: str | None = None,
    ) -> None:
        """Use :func:`compose`.

        Args:
            terms: the terms, in order.
            students: whether student tensors carry the axis ``students`` after the batch; see ``multiple_lrs``
                of :class:`pykd.DistillationLoss`.
            single: whether this is one bare loss: no terms among the outputs, parameters without a prefix.
            share_ignored: whether a sample that is ignored by its label is left out of the terms without labels, too.
            kernels: ``"auto"``, ``"on"``, ``"off"``, or None: the default (:func:`pykd.set_kernels`).
        """
        super().__init__()
        Interface.__init__(self, terms, students, single, share_ignored)
        # Losses have no trainable state; registering them makes repr() and .to() complete.
        self.losses = nn.ModuleList(part.loss for term in self.named_terms for part in term.parts)
        self.kernels = routing.checked(kernels)
        self._graphs: dict[Any, LossGraph] = {}
        self._plans = Plans()

    def forward(self, *, kernels: str | None = None, **tensors_and_parameters: Any) -> dict[str, Tensor]:
        """The loss and its terms; see the class.

        Args:
            kernels: ``"auto"``, ``"on"`` or ``"off"`` for this call; see :func:`pykd.set_kernels`.
            tensors_and_parameters: the inputs and those numbers that differ from their default, by name.
        """
        tensors = {n: v for n, v in tensors_and_parameters.items() if n not in self.scalars and v is not None}
        numbers = {n: v for n, v in tensors_and_parameters.items() if n in self.scalars}
        why = routing.obstacle()
        mode = routing.wanted(kernels, self.kernels)
        call = None if why else self._planned(tensors, numbers)
        if call is None:
            specs = self._check_tensors(tensors)
            if checks.are_data_visible():
                self._numbers(numbers)
                checks.check_ranges(specs, tensors, self.ignore_indices(specs))
            why = why or "a tensor stands for others"
        else:
            why = self._why_formula(call, mode)
            if not why:
                return eager.evaluate(call, lambda: self._walk(call, mode))
            specs = call.plan.specs
        routing.note_formula("the composition", why, mode)
        every = self.all_numbers(numbers) if call is None else call.numbers
        floats = (tensors[name] for name, spec in specs.items() if spec.dtype == "float")
        return compute_outputs(Now(), self, specs, tensors, routing.without_axes(every, floats))

    def _check_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
        specs = self.resolve(tensors)
        checks.check_tensors(specs, tensors, self.least_lengths)
        return specs

    def _numbers(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Every number of a call: floats, and tensors of those that are learned."""
        given = {name: routing.number(name, self.scalars[name].scalar, value) for name, value in numbers.items()}
        return self.all_numbers(given)

    def _planned(self, tensors: Mapping[str, Tensor], numbers: dict[str, Any]) -> PlannedCall | None:
        """The call, checked, with what is known of such calls; None where a tensor is no ordinary one."""
        key = key_of(tensors.values())
        if key is None:
            return None
        key = (tuple(tensors), key)
        plan = self._plans.find(key)
        if plan is None:
            specs = self._check_tensors(tensors)
            plan = self._plans.keep(key, specs, tensors, self.ignore_indices(specs))
        kept = plan.check_indices(tensors)
        every = self._numbers(numbers)
        return PlannedCall(plan, {name: tensors[name] for name in plan.specs}, every, kept)

    def _why_formula(self, call: PlannedCall, mode: str) -> str:
        """Why formulas alone compute a call; empty where kernels, or blocks of rows, have part in it."""
        if mode == "off":
            return 'kernels="off"'
        plan = call.plan
        if plan.refusal is None:
            # What holds for all calls like this one, whether a number of this one is learned or not.
            numbers = {n: v.detach() if isinstance(v, Tensor) else v for n, v in call.numbers.items()}
            with torch.no_grad():
                calls, outputs = self._walk(call._replace(numbers=numbers), mode)
            plan.alone = len(calls) == 1 and all(isinstance(o, Linear) and o.rest is None for o in outputs.values())
            plan.refusal = eager.refusal(calls) if calls else _NOTHING
        if plan.refusal == _NOTHING and self._goes_by_blocks(call, mode):
            return routing.learned(call.numbers)
        return plan.refusal or routing.learned(call.numbers)

    def _goes_by_blocks(self, call: PlannedCall, mode: str) -> bool:
        """Whether any of the losses does."""
        return any(
            goes_by_blocks(
                part.loss,
                {n: call.tensors[g] for n in part.loss.inputs if (g := part.graph_input(n)) in call.tensors},
                mode,
            )
            for term in self.named_terms
            for part in term.parts
        )

    def _walk(self, call: PlannedCall, mode: str) -> tuple[list[Call], dict[str, Any]]:
        """The kernel calls, and the outputs in terms of what they return."""
        point = eager.Forms(call.kept)
        # The gradients of halves are added in float32 and rounded once, unless one kernel writes them all.
        make = Now(point, widen=not call.plan.alone, all_kept=call.kept, mode=mode)
        return point.calls, compute_outputs(make, self, call.plan.specs, call.tensors, call.numbers)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "_plans" in self.__dict__ and name not in ("_plans", "training"):
            self.__dict__["_plans"] = Plans()  # what is known of calls may be so no longer

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the graphs and plans, which are made again when they are wanted."""
        return {**self.__dict__, "_graphs": {}, "_plans": Plans()}

    def terms(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``{"loss", one value per term}``; terms are given before their weights."""
        return Composition.forward(self, *args, **kwargs)

    def graph(
        self,
        layouts: Mapping[str, str] | None = None,
        optional_inputs: Iterable[str] = (),
        per_sample: bool = False,
        check: bool = True,
        fused: bool = False,
    ) -> LossGraph:
        """The loss graph for these layouts and optional inputs.

        Args:
            layouts: input name → axes, such as ``{"labels": "batch"}`` for class indices; where nothing is said the first
                declared layout that goes with the others holds.
            optional_inputs: which of the optional inputs the graph takes.
            per_sample: whether vectors per sample are among the outputs.
            check: whether the graph checks its inputs' axes.
            fused: whether losses that have a kernel go through the graph's ``kernel_point``; such a graph runs
                inside :func:`pykd.fused.point.value_and_gradient` alone.
        """
        return self._graph(self.choose(layouts or {}, optional_inputs), per_sample, check, fused)

    def _graph(
        self, specs: dict[str, Spec], per_sample: bool = False, check: bool = True, fused: bool = False
    ) -> LossGraph:
        key = (tuple(specs.items()), per_sample, check, fused)
        if key not in self._graphs:
            self._graphs[key] = build(self, specs, per_sample, check, fused)
        return self._graphs[key]

    def reference(
        self,
        *,
        parameters: Mapping[str, float] | None = None,
        per_sample: bool = False,
        constants_at: Mapping[str, Any] | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Every output in NumPy float64, from the references of the losses.

        Args:
            parameters: numbers that differ from their defaults.
            per_sample: whether to add the vectors per sample.
            constants_at: inputs at which to compute what the gradient treats as constant; ``inputs`` where None.
            inputs: NumPy arrays by name.
        """
        numbers = self.all_numbers(parameters or {})
        arrays = self._rows(inputs)
        specs = {name: self._spec_of(name, array) for name, array in inputs.items()}
        ignored = [arrays[name] == index for name, index in self.ignore_indices(specs).items()]
        padding = np.logical_and.reduce(ignored) if ignored and self.share_ignored else None
        fixed = arrays if constants_at is None else self._rows(constants_at)
        students = self._count_students(inputs)
        outputs: dict[str, Any] = {"loss": 0.0}
        samples: dict[str, Any] = {}
        for term in self.named_terms:
            for reduction in [None, "none"] if per_sample and not term.couples_batch else [None]:
                value: Any = 0.0
                for part in term.parts:
                    settings = {**self.numbers_of(term, part, numbers), "reduction": reduction or part.loss.reduction}
                    loss = part.loss.with_settings(**settings)
                    names = {n: part.graph_input(n) for n in part.loss.inputs if part.graph_input(n) in arrays}
                    own = {name: arrays[given] for name, given in names.items()}
                    weighed = part.loss.weight_input()
                    if padding is not None and weighed is not None and not part.has_labels(specs):
                        own[weighed] = np.where(padding, 0.0, own.get(weighed, 1.0))
                    if constants_at is not None:
                        own |= loss.constants(**loss.grouped({n: fixed[given] for n, given in names.items()}))
                    factor = numbers[part.weight_name] if part.weight_name else part.weight
                    value = value + factor * loss.reference(**loss.grouped(own))
                weight = 1.0 if self.single else numbers[f"{term.name}_weight"]
                if reduction == "none":
                    value = value.reshape(-1, students) if students else value
                    samples[f"{term.name}_per_sample"] = value
                    samples["loss_per_sample"] = samples.get("loss_per_sample", 0.0) + weight * value
                else:
                    outputs[term.name] = value
                    outputs["loss"] = outputs["loss"] + weight * value
        if self.single:
            outputs = {"loss": outputs["loss"]}
            samples = {k: v for k, v in samples.items() if k == "loss_per_sample"}
        return {**outputs, **samples}

    def draw(
        self,
        specs: Mapping[str, Spec],
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """Random inputs for a graph with these Specs."""
        generator = torch.Generator().manual_seed(seed)
        axes = [axis for spec in specs.values() for axis in spec.names]
        lengths = fitting(specs.values(), example_sizes(axes, self.least_lengths) | dict(sizes or {}))
        return {name: draw_tensor(spec, lengths, generator, dtype) for name, spec in specs.items()}

    def trial_sizes(self, specs: Mapping[str, Spec]) -> dict[str, dict[str, int]]:
        """Lengths at which to try a graph with these Specs; see :func:`pykd.definition.sizes.trial_sizes`."""
        return trial_sizes([axis for spec in specs.values() for axis in spec.names], self.least_lengths)

    def recipe(self) -> dict[str, Any]:
        """The composition as data; see :mod:`pykd.recipe`."""
        if self.single:
            return _table_of_loss(self.named_terms[0].parts[0])
        terms: dict[str, Any] = {}
        for term in self.named_terms:
            plain = len(term.parts) == 1 and _table_of_part(term.parts[0]).keys() <= {"loss", "settings"}
            if plain:
                terms[term.name] = {**_table_of_loss(term.parts[0]), "weight": term.weight}
            else:
                terms[term.name] = {"weight": term.weight, "parts": [_table_of_part(part) for part in term.parts]}
        flags = {"students": self.students, "share_ignored": self.share_ignored}
        usual = {"students": False, "share_ignored": True}
        return {"terms": terms} | {name: value for name, value in flags.items() if value != usual[name]}

    def extra_repr(self) -> str:
        return ", ".join(f"{term.name}: {term.weight:g}" for term in self.named_terms)

    def _count_students(self, inputs: Mapping[str, Any]) -> int:
        """The length of the students axis; 0 where there is none."""
        if not self.students:
            return 0
        return int(next(np.shape(inputs[n])[1] for n, layouts in self.input_layouts.items() if layouts[0].grad))

    def _spec_of(self, name: str, array: Any) -> Spec:
        """The layout that a NumPy array has."""
        integer = np.asarray(array).dtype.kind == "i"
        for spec in self.input_layouts[name]:
            if len(spec.names) == np.ndim(array) and (spec.dtype == "int64") == integer:
                return spec
        return self.input_layouts[name][0]

    def _rows(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Inputs in float64 (or int64), with one row per sample and student, as the losses see them."""
        students = self._count_students(inputs)
        rows = {}
        for name, given in inputs.items():
            spec = self._spec_of(name, given)
            array = np.asarray(given, dtype=np.int64 if spec.dtype == "int64" else np.float64)
            if STUDENTS in spec.names:
                array = array.reshape(-1, *array.shape[2:])
            elif students and spec.names[0] == "batch":
                array = np.repeat(array, students, axis=0)
            rows[name] = array
        return rows


# Tensors and numbers are passed to these by name, beside arguments that have a name already.
Composition.reserved = frozenset(
    name
    for function in (Composition.forward, Composition.reference)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
)


def _table_of_loss(part: Part) -> dict[str, Any]:
    settings = {name: value for name, value in part.loss.settings().items() if value is not None}
    return {"loss": part.loss.name, "settings": settings}


def _table_of_part(part: Part) -> dict[str, Any]:
    table = _table_of_loss(part)
    if part.weight != 1.0 or part.weight_name:
        table["weight"] = part.weight
    if part.weight_name:
        table["weight_name"] = part.weight_name
    if part.inputs:
        table["inputs"] = dict(part.inputs)
    if part.axes:
        table["axes"] = dict(part.axes)
    return table


def compose(terms: Mapping[str, Any], *, share_ignored: bool = True, kernels: str | None = None) -> Composition:
    """Joins losses into one: Σ weight · term.

    Args:
        terms: name → loss, or (loss, weight), or :class:`Term`-like sequence of :class:`Part` with a weight.
            Inputs of the same name are shared between the terms. A weight of 0 keeps the term, since
            weights can change in every call.
        share_ignored: whether a sample whose class index is ignored (−100) is padding, and left out of the terms without
            labels, too; False: of the terms with labels alone, for samples without a label from which the
            student still learns what the teacher says.
        kernels: ``"auto"``, ``"on"``, ``"off"``, or None: the default (:func:`pykd.set_kernels`).

    Returns:
        A module: tensors by name in, ``{"loss", one value per term}`` out (terms before their weights).
        Parameters are named ``<term>_weight``, ``<term>_temperature`` and so on.

    Example:
        >>> loss = compose({"hard": (HardTarget(), 1.0), "soft": (SoftTarget(temperature=2.0), 0.5)})
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> loss(student_logits=student, teacher_logits=teacher, labels=torch.tensor([1]))["loss"]
        tensor(1.0397)
    """
    if not isinstance(terms, Mapping):
        raise TypeError(
            f"expected the terms by their names, got {type(terms).__name__}; pass {{name: (loss, weight), ...}}"
        )
    made = []
    for name, value in terms.items():
        loss, weight = value if isinstance(value, tuple) and len(value) == 2 else (value, 1.0)
        if isinstance(loss, Loss):
            parts = (Part(loss),)
        elif isinstance(loss, Sequence) and loss and all(isinstance(part, Part) for part in loss):
            parts = tuple(loss)
        else:
            raise TypeError(
                f"expected the term {name!r} to be a loss or a list of Part, got {type(loss).__name__}; "
                "pass {name: (loss, weight)}"
            )
        made.append(Term(name, parts, scalar(default=1.0).check(f"{name}_weight", weight)))
    return Composition(made, share_ignored=share_ignored, kernels=kernels)


def as_composition(loss: Any) -> Composition:
    """A composition as it is; a bare loss as one whose only output is ``loss``."""
    if isinstance(loss, Composition):
        return loss
    if isinstance(loss, Loss):
        return Composition([Term(loss.name, (Part(loss),))], single=True)
    raise TypeError(
        f"expected a pykd loss, DistillationLoss or composition, got {type(loss).__name__}; see pykd.compose"
    )
