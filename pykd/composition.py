"""Composition: terms with names and weights, joined into one loss graph.

    >>> loss = compose({"hard": (HardTarget(), 1.0), "soft": (SoftTarget(temperature=2.0), 0.5)})
    >>> values = loss(student_logits=student, teacher_logits=teacher, labels=labels)
    >>> values["loss"].backward()

A :class:`Composition` is what a Python user calls. A :class:`LossGraph` is one concrete form of it: every
input has one layout, every optional input is there or not, and its ``forward`` takes plain tensors and
numbers by name. It is a ``torch.fx.GraphModule``, so its code can be read (``print(graph.code)``), scripted and traced.
"""

import copy
import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pykd import checks, names, ops
from pykd.kernel_point import Point
from pykd.registry import Loss, Scalar, Spec, example_sizes
from pykd.registry import draw as draw_tensor

STUDENTS = "students"  # the axis of several students behind one teacher
MAX_PARTS = 100  # losses in a composition; a file of as many of the largest is what the loader still takes


@dataclasses.dataclass(frozen=True)
class Part:
    """One loss inside a term.

    Attributes:
        loss: the loss, with a reduction to a scalar.
        weight: its factor within the term.
        weight_name: how the factor is called where it can change in every call; ``None``: it is fixed.
        inputs: the loss's input names → the graph's, where they differ.
        axes: the loss's axis names → the graph's, where they differ (two pairs of feature maps, say).
    """

    loss: Loss
    weight: float = 1.0
    weight_name: str | None = None
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    axes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def graph_input(self, name: str) -> str:
        """The graph's name of the loss's input ``name``."""
        return self.inputs.get(name, name)

    def has_labels(self, specs: Mapping[str, Spec]) -> bool:
        """Whether among the graph's inputs are class indices that this loss may ignore."""
        return bool(self.ignore_indices(specs))

    def ignore_indices(self, specs: Mapping[str, Spec]) -> dict[str, int]:
        """The graph's inputs of class indices that this loss may ignore, with the one that it ignores."""
        ignored = getattr(self.loss, "ignore_index", None)
        if ignored is None:
            return {}
        names = [self.graph_input(name) for name in self.loss.inputs]
        return {name: ignored for name in names if name in specs and specs[name].index_of is not None}


@dataclasses.dataclass(frozen=True)
class Term:
    """A named sum of losses, with a weight in the whole: weight · Σ factor · loss."""

    name: str
    parts: tuple[Part, ...]
    weight: float = 1.0

    @property
    def couples_batch(self) -> str:
        """Why this term has no value per sample; empty where it has one."""
        return next((part.loss.couples_batch for part in self.parts if part.loss.couples_batch), "")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A number that can change in every call: its default and its range."""

    default: float
    scalar: Scalar


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
        built_from: tuple[Any, ...]  # the arguments of _build

    def __reduce__(self) -> tuple[Any, ...]:
        return _build, self.built_from

    def __copy__(self) -> "LossGraph":
        return _build(*self.built_from)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LossGraph":
        return _build(*copy.deepcopy(self.built_from, memo))


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


class Composition(nn.Module):
    """Named terms with weights; see :func:`compose`.

    Calling it checks the tensors by their axis names and returns the values by name, ``"loss"`` first. Inputs
    are passed by name; numbers such as ``soft_temperature`` too, to replace their default in this call.

    A sample whose class index is ignored (``ignore_index``, −100) is padding: it is left out of every term that has a value
    per sample, those without labels included (``share_ignored``). Where several inputs hold class indices, a
    term with labels goes by its own, and one without leaves out what all of them ignore.
    """

    def __init__(
        self, terms: Sequence[Term], students: bool = False, single: bool = False, share_ignored: bool = True
    ) -> None:
        """Use :func:`compose`.

        Args:
            terms: the terms, in order.
            students: whether student tensors carry the axis ``students`` after the batch; see ``multiple_lrs``
                of :class:`pykd.DistillationLoss`.
            single: whether this is one bare loss: no terms among the outputs, parameters without a prefix.
            share_ignored: whether a sample that is ignored by its label is left out of the terms without labels, too.
        """
        super().__init__()
        self.share_ignored = share_ignored
        self.terms_ = tuple(terms)
        self.students = students
        self.single = single
        self.forms_: list[dict[str, dict[str, list[str]]]] = []  # of every part
        self._check()
        self.layouts_, self.optional_inputs = self._collect_inputs()
        self.parameters_ = self._collect_parameters()
        self._check_together()
        # Losses have no trainable state; registering them makes repr() and .to() complete.
        self.losses_ = nn.ModuleList(part.loss for term in self.terms_ for part in term.parts)
        self._graphs: dict[Any, LossGraph] = {}
        self._checked: set[Any] = set()

    def forward(self, *, fused: bool = False, **tensors_and_parameters: Any) -> dict[str, Tensor]:
        """The loss and its terms; see the class.

        Args:
            fused: whether the losses that have a kernel are computed by it (:mod:`pykd.fused`); then ``loss`` alone
                has autograd, and the terms are detached.
            tensors_and_parameters: the inputs and those numbers that differ from their default, by name.
        """
        tensors = {n: v for n, v in tensors_and_parameters.items() if n not in self.parameters_ and v is not None}
        numbers = {n: v for n, v in tensors_and_parameters.items() if n in self.parameters_}
        specs = self.resolve(tensors)
        checks.check_tensors(specs, tensors)
        if checks.are_data_visible():
            for name, value in numbers.items():
                self.parameters_[name].scalar.check(name, value)
            checks.check_ranges(specs, tensors, self.ignore_indices(specs))
        if fused:
            from pykd.fused import evaluate_graph

            return evaluate_graph(self._graph(specs, check=False, fused=True), tensors, numbers)
        every = {name: parameter.default for name, parameter in self.parameters_.items()} | numbers
        return _outputs(_Now(), self, specs, tensors, every)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the graphs, which are built again when they are wanted."""
        return {**self.__dict__, "_graphs": {}}

    def terms(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """``{"loss", one value per term}``; terms are given before their weights."""
        return Composition.forward(self, *args, **kwargs)

    def resolve(self, tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
        """The Spec of every tensor, after a check that the names are right."""
        required = [name for name in self.layouts_ if name not in self.optional_inputs]
        missing = [name for name in required if name not in tensors]
        unknown = [name for name in tensors if name not in self.layouts_]
        if missing or unknown:
            known = ", ".join([*required, *(f"{name} (optional)" for name in self.optional_inputs)])
            problem = " and ".join(
                text
                for text in (
                    f"none for {', '.join(missing)}" if missing else "",
                    f"the unknown {', '.join(unknown)}" if unknown else "",
                )
                if text
            )
            raise ValueError(f"expected the tensors {known}, got {problem}; pass each of them by its name")
        specs = {
            name: checks.resolve(name, tensors[name], layouts)
            for name, layouts in self.layouts_.items()
            if name in tensors
        }
        if not torch.compiler.is_compiling():  # a layout that has been found good is good
            key = tuple((name, spec.axes, spec.dtype) for name, spec in specs.items())
            if key not in self._checked:
                self._check_samples(specs)
                self._checked.add(key)
            return specs
        self._check_samples(specs)
        return specs

    def _check_samples(self, specs: Mapping[str, Spec]) -> list[str]:
        """The axes that count the samples of every part, after a check that its inputs agree on them."""
        parts = [part for term in self.terms_ for part in term.parts]
        return [self.samples_of(number, part, specs) for number, part in enumerate(parts)]

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
                inside :func:`pykd.kernel_point.value_and_gradient` alone.
        """
        return self._graph(self.choose(layouts or {}, optional_inputs), per_sample, check, fused)

    def _graph(
        self, specs: dict[str, Spec], per_sample: bool = False, check: bool = True, fused: bool = False
    ) -> LossGraph:
        key = (tuple(specs.items()), per_sample, check, fused)
        if key not in self._graphs:
            self._graphs[key] = _build(self, specs, per_sample, check, fused)
        return self._graphs[key]

    def choose(self, layouts: Mapping[str, str], optional_inputs: Iterable[str]) -> dict[str, Spec]:
        """The Spec of every input of a graph."""
        wanted = set(optional_inputs)
        for name in [*layouts, *wanted]:
            if name not in self.layouts_ or (name in wanted and name not in self.optional_inputs):
                kind = "an optional input" if name in wanted else "an input"
                known = ", ".join(self.optional_inputs if name in wanted else self.layouts_) or "none"
                raise ValueError(f"expected the name of {kind} ({known}), got {name!r}; mend the name")
        possible: dict[str, list[Spec]] = {}
        for name, choices in self.layouts_.items():
            if name in self.optional_inputs and name not in wanted:
                continue
            possible[name] = list(choices)
            if name in layouts:
                axes = " ".join(layouts[name].split())
                possible[name] = [spec for spec in choices if spec.axes == axes][:1]
                if not possible[name]:
                    known = " or ".join(repr(spec.axes) for spec in choices)
                    raise ValueError(f"expected the layout of {name} to be {known}, got {axes!r}; pass one of these")
        for name in possible:
            self._narrow(possible)
            possible[name] = possible[name][:1]
        specs = {name: choices[0] for name, choices in possible.items()}
        self._check_samples(specs)
        return specs

    def _narrow(self, possible: dict[str, list[Spec]]) -> None:
        """Takes out the layouts that do not go with the other inputs of a part, as long as any are left."""
        changed = True
        while changed:
            changed = False
            for forms in self.forms_:
                here = [
                    fitting
                    for fitting in forms.values()
                    if all(any(s.axes in fitting[n] for s in possible[n]) for n in fitting if n in possible)
                ]
                for name in forms[next(iter(forms))]:
                    kept = [s for s in possible.get(name, ()) if any(s.axes in fitting[name] for fitting in here)]
                    if kept and len(kept) < len(possible[name]):
                        possible[name], changed = kept, True

    def ignore_indices(self, specs: Mapping[str, Spec]) -> dict[str, int]:
        """The inputs of class indices that may be ignored, with the one that is."""
        found: dict[str, int] = {}
        for term in self.terms_:
            for part in term.parts:
                found |= part.ignore_indices(specs)
        return found

    def axes_per_sample(self, specs: Mapping[str, Spec]) -> tuple[str, ...]:
        """The axes of the values per sample; a ValueError where there are none, or terms differ in them."""
        every = iter(self._check_samples(specs))
        found = [(term, {next(every) for _ in term.parts}) for term in self.terms_]
        splitting = [(term.name, axes) for term, axes in found if not term.couples_batch]
        if not splitting:
            reasons = "; ".join(f"{term.name} {term.couples_batch}" for term in self.terms_)
            raise ValueError(
                f"expected a term that splits over samples, got none ({reasons}); leave per_sample=True out"
            )
        if self.students:
            return ("batch", STUDENTS)
        if len({frozenset(axes) for _, axes in splitting}) > 1 or len(splitting[0][1]) > 1:
            got = "; ".join(f"{name} over {' and '.join(sorted(axes))}" for name, axes in splitting)
            raise ValueError(
                f"expected every term to have its values over the same samples, got {got}; leave per_sample=True out, or "
                "weigh their samples alike"
            )
        return tuple(next(iter(splitting[0][1])).split())

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
        numbers = {name: p.default for name, p in self.parameters_.items()} | dict(parameters or {})
        arrays = self._rows(inputs)
        specs = {name: self._spec_of(name, array) for name, array in inputs.items()}
        ignored = [arrays[name] == index for name, index in self.ignore_indices(specs).items()]
        padding = np.logical_and.reduce(ignored) if ignored and self.share_ignored else None
        fixed = arrays if constants_at is None else self._rows(constants_at)
        students = self._count_students(inputs)
        outputs: dict[str, Any] = {"loss": 0.0}
        samples: dict[str, Any] = {}
        for term in self.terms_:
            for reduction in [None, "none"] if per_sample and not term.couples_batch else [None]:
                value: Any = 0.0
                for part in term.parts:
                    settings = {**part.loss.settings(), **self._numbers_of(term, part, numbers)}
                    settings["reduction"] = reduction or part.loss.reduction
                    names = {n: part.graph_input(n) for n in part.loss.inputs if part.graph_input(n) in arrays}
                    own = {name: arrays[given] for name, given in names.items()}
                    weighed = part.loss.weight_input()
                    if padding is not None and weighed is not None and not part.has_labels(specs):
                        own[weighed] = np.where(padding, 0.0, own.get(weighed, 1.0))
                    if constants_at is not None:
                        own |= part.loss.constants(**{n: fixed[given] for n, given in names.items()}, **settings)
                    factor = numbers[part.weight_name] if part.weight_name else part.weight
                    value = value + factor * part.loss.reference(**own, **settings)
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
        lengths = example_sizes([axis for spec in specs.values() for axis in spec.names]) | dict(sizes or {})
        return {name: draw_tensor(spec, lengths, generator, dtype) for name, spec in specs.items()}

    def recipe(self) -> dict[str, Any]:
        """The composition as data; see :mod:`pykd.recipe`."""
        from pykd import recipe

        return recipe.of_composition(self)

    def extra_repr(self) -> str:
        return ", ".join(f"{term.name}: {term.weight:g}" for term in self.terms_)

    # ---- construction -----------------------------------------------------------------------

    def _check(self) -> None:
        if not self.terms_:
            raise ValueError("expected at least one term, got none; pass {name: (loss, weight)}")
        count = sum(len(term.parts) for term in self.terms_)
        if count > MAX_PARTS:
            raise ValueError(f"expected at most {MAX_PARTS} losses in a composition, got {count}; split it")
        for term in self.terms_:
            name = names.check(term.name, "the name of a term")
            reserved = name in ("loss", "sample", "grad") or name.endswith("_per_sample") or name.startswith("grad_")
            if reserved or [other.name for other in self.terms_].count(name) > 1:
                raise ValueError(
                    f"expected the name of a term to be a new one other than 'loss', 'sample', 'grad', 'grad_…' and "
                    f"'…_per_sample', got {name!r}; choose another"
                )
            if not term.parts:
                raise ValueError(f"expected a loss in the term {name!r}, got none; leave the term out")
            Scalar().check(f"{term.name}_weight", term.weight)
            for part in term.parts:
                self._check_part(term, part)

    def _check_part(self, term: Term, part: Part) -> None:
        if part.loss.reduction == "none":
            raise ValueError(
                f"expected the loss of term {term.name!r} to reduce to a scalar, got reduction='none'; "
                "pass reduction='mean' or 'sum', and per_sample=True to the export for values per sample"
            )
        what = f"a part of the term {term.name!r}"
        Scalar().check(f"the weight of {what}", part.weight)
        if part.weight_name is not None:
            names.check_variable(part.weight_name, f"the weight_name of {what}", _CALLED)
        axes = {axis for name in part.loss.inputs for spec in part.loss.layouts(name) for axis in spec.names}
        for kind, known, renames in (("inputs", part.loss.inputs, part.inputs), ("axes", axes - {"batch"}, part.axes)):
            for name, new in renames.items():
                if name not in known:
                    raise ValueError(
                        f"expected {kind} of {what} to rename {', '.join(sorted(known))}, got {name!r}; mend the name"
                    )
                if kind == "inputs":
                    names.check_variable(new, f"the name for {name} in {what}", _CALLED)
                else:
                    names.check(new, f"the name of the axis {name} in {what}")

    def _check_together(self) -> None:
        """Inputs, parameters and outputs lie side by side in a file: no two of them share a name."""
        outputs = ["loss", "loss_per_sample", "grad_scale"]
        if not self.single:
            outputs += [name for term in self.terms_ for name in (term.name, f"{term.name}_per_sample")]
        outputs += [f"grad_{name}" for name, layouts in self.layouts_.items() if layouts[0].grad]
        every = [*self.layouts_, *self.parameters_, *outputs]
        for name in every:
            names.check(name, "what the loss takes or returns")
            if every.count(name) > 1:
                raise ValueError(
                    f"expected inputs, parameters and outputs to differ in name, got {name!r} twice; rename one of them"
                )

    def _collect_inputs(self) -> tuple[dict[str, tuple[Spec, ...]], list[str]]:
        layouts: dict[str, tuple[Spec, ...]] = {}
        optional: dict[str, bool] = {}
        ignored: dict[str, int] = {}
        for term in self.terms_:
            for part in term.parts:
                forms = self._forms_of(part)
                self.forms_.append(forms)
                for name in part.loss.inputs:
                    graph_name = part.graph_input(name)
                    over = {axes for fitting in forms.values() for axes in fitting[graph_name]}
                    every = [
                        layout
                        for spec in part.loss.layouts(name)
                        for layout in self._with_students(spec.rename(part.axes))
                        if layout.axes in over
                    ]
                    # Renamed axes may leave no room for a layout, as long as they leave it for another.
                    own = tuple(spec for spec in every if len(set(spec.names)) == len(spec.names)) or tuple(every)
                    here = layouts.setdefault(graph_name, own)
                    common = tuple(
                        dataclasses.replace(a, grad=a.grad or b.grad, index_of=a.index_of or b.index_of)
                        for a in here
                        for b in own
                        if a.axes == b.axes and a.dtype == b.dtype
                    )
                    if not common:
                        raise ValueError(
                            f"expected every use of the input {graph_name!r} to agree on its axes, got {here[0].axes!r} and "
                            f"{own[0].axes!r}; rename one with Part(inputs=…) or Part(axes=…)"
                        )
                    twice = [spec.axes for spec in common if len(set(spec.names)) < len(spec.names)]
                    if twice:
                        raise ValueError(
                            f"expected the axes of the input {graph_name!r} to differ in name, got {twice[0]!r}; "
                            "rename one of them otherwise"
                        )
                    layouts[graph_name] = common
                    optional[graph_name] = optional.get(graph_name, True) and common[0].optional
                    index_specs = [spec for spec in common if spec.index_of is not None]
                    specs = {graph_name: index_specs[0]} if index_specs else {}
                    for index in part.ignore_indices(specs).values():
                        if ignored.setdefault(graph_name, index) != index:
                            raise ValueError(
                                f"expected one ignore_index for the input {graph_name!r}, got {ignored[graph_name]} and "
                                f"{index}; give the losses that read it the same"
                            )
        required_first = sorted(layouts, key=lambda name: optional[name])
        return {name: layouts[name] for name in required_first}, [n for n in required_first if optional[n]]

    def _forms_of(self, part: Part) -> dict[str, dict[str, list[str]]]:
        """:meth:`Loss.forms` of a part, in the words of the graph. Where there are several students, samples are no tokens."""
        forms = {}
        for samples, fitting in list(part.loss.forms().items())[: 1 if self.students else None]:
            renamed = " ".join(part.axes.get(axis, axis) for axis in samples.split())
            forms[renamed] = {
                part.graph_input(name): [
                    layout.axes
                    for spec in part.loss.layouts(name)
                    if spec.axes in fitting[name]
                    for layout in self._with_students(spec.rename(part.axes))
                ]
                for name in part.loss.inputs
            }
        return forms

    def samples_of(self, number: int, part: Part, specs: Mapping[str, Spec]) -> str:
        """The axes that count the samples of a part, in the words of the graph.

        Args:
            number: the part's, counted over all terms.
            part: the part.
            specs: the inputs that are there.
        """
        axes = {name: specs[name].axes for name in map(part.graph_input, part.loss.inputs) if name in specs}
        samples = checks.samples_of(self.forms_[number], axes)
        weight = part.loss.weight_input()
        if not self.share_ignored or self.students or weight is None or part.has_labels(specs):
            return samples
        # The mask of what is ignored by its label weighs this part, too.
        for name in self.ignore_indices(specs):
            mask = specs[name].axes
            if len(specs[name].names) <= len(samples.split()):
                continue
            fitting = self.forms_[number].get(mask)
            others = {n: own for n, own in axes.items() if n != part.graph_input(weight)}
            if fitting is None or not all(own in fitting[n] for n, own in others.items()):
                raise ValueError(
                    f"expected {part.loss.name} to have samples along ({', '.join(mask.split())}), as {name} has, whose ignored "
                    f"entries it leaves out, got ({', '.join(samples.split())}); give the axes the same names, or pass "
                    "share_ignored=False"
                )
            samples = mask
        return samples

    def _with_students(self, spec: Spec) -> list[Spec]:
        """The layouts of one input where student tensors carry the axis of several students."""
        if not self.students or spec.names[0] != "batch":
            return [spec]
        batch, *rest = spec.names
        carrying = dataclasses.replace(spec, axes=" ".join([batch, STUDENTS, *rest]))
        if spec.grad:
            return [carrying]
        return [spec, carrying]

    def _collect_parameters(self) -> dict[str, Parameter]:
        parameters: dict[str, Parameter] = {}

        def add(name: str, default: float, scalar: Scalar) -> None:
            known = parameters.setdefault(name, Parameter(float(default), scalar))
            if known.default != float(default):
                raise ValueError(
                    f"expected one default for the parameter {name!r}, got {known.default:g} and {default:g}; "
                    "give the parts of a term the same setting"
                )
            if known.scalar != scalar:
                raise ValueError(
                    f"expected one meaning of the parameter {name!r}, got two with different ranges; rename one of them"
                )

        for term in self.terms_:
            if not self.single:
                add(f"{term.name}_weight", term.weight, Scalar())
            for part in term.parts:
                if part.weight_name:
                    add(part.weight_name, part.weight, Scalar())
                for name, scalar in part.loss.scalars.items():
                    add(self._parameter_name(term, name), getattr(part.loss, name), scalar)
        return parameters

    def _parameter_name(self, term: Term, name: str) -> str:
        return name if self.single else f"{term.name}_{name}"

    def _numbers_of(self, term: Term, part: Part, numbers: Mapping[str, Any]) -> dict[str, Any]:
        return {name: numbers[self._parameter_name(term, name)] for name in part.loss.scalars}

    def _count_students(self, inputs: Mapping[str, Any]) -> int:
        """The length of the students axis; 0 where there is none."""
        if not self.students:
            return 0
        return int(next(np.shape(inputs[n])[1] for n, layouts in self.layouts_.items() if layouts[0].grad))

    def _spec_of(self, name: str, array: Any) -> Spec:
        """The layout that a NumPy array has."""
        integer = np.asarray(array).dtype.kind == "i"
        for spec in self.layouts_[name]:
            if len(spec.names) == np.ndim(array) and (spec.dtype == "int64") == integer:
                return spec
        return self.layouts_[name][0]

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
_CALLED = frozenset(
    name
    for function in (Composition.forward, Composition.reference)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
)


def compose(terms: Mapping[str, Any], *, share_ignored: bool = True) -> Composition:
    """Joins losses into one: Σ weight · term.

    Args:
        terms: name → loss, or (loss, weight), or :class:`Term`-like sequence of :class:`Part` with a weight.
            Inputs of the same name are shared between the terms. A weight of 0 keeps the term, since
            weights can change in every call.
        share_ignored: whether a sample whose class index is ignored (−100) is padding, and left out of the terms without
            labels, too; False: of the terms with labels alone, for samples without a label from which the
            student still learns what the teacher says.

    Returns:
        A module: tensors by name in, ``{"loss", one value per term}`` out (terms before their weights).
        Parameters are named ``<term>_weight``, ``<term>_temperature`` and so on.

    Example:
        >>> loss = compose({"hard": (HardTarget(), 1.0), "soft": (SoftTarget(temperature=2.0), 0.5)})
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> loss(student_logits=student, teacher_logits=teacher, labels=torch.tensor([1]))["loss"]
        tensor(1.0397)
    """
    made = []
    for name, value in terms.items():
        loss, weight = value if isinstance(value, tuple) else (value, 1.0)
        if isinstance(loss, Loss):
            parts = (Part(loss),)
        elif isinstance(loss, Sequence) and loss and all(isinstance(part, Part) for part in loss):
            parts = tuple(loss)
        else:
            raise TypeError(
                f"expected the term {name!r} to be a loss or a list of Part, got {type(loss).__name__}; "
                "pass {name: (loss, weight)}"
            )
        made.append(Term(name, parts, float(weight)))
    return Composition(made, share_ignored=share_ignored)


def as_composition(loss: Any) -> Composition:
    """A composition as it is; a bare loss as one whose only output is ``loss``."""
    if isinstance(loss, Composition):
        return loss
    if isinstance(loss, Loss):
        return Composition([Term(loss.name, (Part(loss),))], single=True)
    raise TypeError(
        f"expected a pykd loss, DistillationLoss or composition, got {type(loss).__name__}; see pykd.compose"
    )


# ---- the graph --------------------------------------------------------------------------------


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
        return self.loss.fused(self.point, **arguments)


def _variable(graph: fx.Graph, name: str, kind: Any, *default: float) -> fx.Node:
    """An argument of the graph's code. It stands there as it is, so nothing but a checked name gets in."""
    checked = names.check_variable(name, "an input or parameter of the loss")
    return graph.placeholder(checked, type_expr=kind, **({"default_value": default[0]} if default else {}))


class _Now:
    """Computes an outcome of :func:`_outputs` at once."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def loss(self, path: str, loss: Loss, arguments: Mapping[str, Any], covered: bool) -> Any:
        return loss.forward(**arguments)


class _Later:
    """Writes an outcome of :func:`_outputs` into a graph."""

    def __init__(self, graph: fx.Graph, point: Point | None) -> None:
        self.graph = graph
        self.point = point  # where losses go that a kernel computes
        self.modules: dict[str, nn.Module] = {}

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.graph.call_function(function, arguments)

    def loss(self, path: str, loss: Loss, arguments: Mapping[str, Any], covered: bool) -> Any:
        module: nn.Module = loss.with_settings()
        module.checks_inputs = False  # type: ignore[assignment]
        if self.point is not None and covered:
            module = _Fused(module, self.point)  # type: ignore[arg-type]
        self.modules[path] = module
        return self.graph.call_module(path, kwargs=dict(arguments))


def _outputs(
    make: _Now | _Later,
    composition: Composition,
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
        name: make.call(ops.upcast, given[name]) if spec.dtype == "float" else given[name]
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
    if composition.share_ignored:
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
        return {**arguments, **composition._numbers_of(term, part, numbers)}

    def term_value(term: Term, reduction: str | None) -> Any:
        total = None
        for i, part in enumerate(term.parts):
            path = f"{term.name}_{i}" + ("_per_sample" if reduction else "")
            loss = part.loss.with_settings(reduction=reduction) if reduction else part.loss
            own = {n: specs[part.graph_input(n)] for n in loss.inputs if part.graph_input(n) in specs}
            value = make.loss(path, loss, arguments_of(term, part), loss.covered_by_kernel(own))
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

    terms = {term.name: term_value(term, None) for term in composition.terms_}
    outputs = {"loss": weighted_sum(terms)} | ({} if composition.single else terms)
    if per_sample:
        composition.axes_per_sample(specs)  # or an error
        samples = {term.name: term_value(term, "none") for term in composition.terms_ if not term.couples_batch}
        if like is not None:
            samples = {name: make.call(unfold, value, like) for name, value in samples.items()}
        outputs["loss_per_sample"] = weighted_sum(samples)
        if not composition.single:
            outputs |= {f"{name}_per_sample": value for name, value in samples.items()}
    return outputs


def _build(composition: Composition, specs: dict[str, Spec], per_sample: bool, check: bool, fused: bool) -> LossGraph:
    graph = fx.Graph()
    point = Point()
    nodes = {name: _variable(graph, name, Tensor) for name in specs}
    numbers = {
        name: _variable(graph, name, float, float(parameter.default))
        for name, parameter in composition.parameters_.items()
    }
    if check:
        axes = [list(spec.names) for spec in specs.values()]
        graph.call_function(checks.check_axes, (list(nodes.values()), list(specs), axes))
    for term in composition.terms_:
        names.check(term.name, "the name of a term")  # it becomes an attribute in the graph's code
    make = _Later(graph, point if fused else None)
    outputs = _outputs(make, composition, specs, nodes, numbers, per_sample)
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
        parameters=dict(composition.parameters_),
        outputs={name: samples if name.endswith("_per_sample") else () for name in outputs},
        ignore_indices=composition.ignore_indices(specs),
    )
    return made
