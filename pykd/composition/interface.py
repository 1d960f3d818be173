"""What a composition takes: the inputs of its terms by name, in every layout that goes together, and its parameters."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from pykd.composition.terms import MAX_PARTS, STUDENTS, Parameter, Part, Term
from pykd.definition import Scalar, Spec, checks, names
from pykd.definition.spec import Form


class Interface:
    """The inputs, layouts and parameters of named terms; see :class:`pykd.Composition`.

    Attributes:
        named_terms: the terms, in order.
        students: whether student tensors carry the axis ``students`` after the batch.
        single: whether this is one bare loss.
        share_ignored: whether a sample that is ignored by its label is left out of the terms without labels, too.
        input_layouts: every input by name, required ones first, with the layouts it may have.
        optional_inputs: those that may be left out.
        scalars: every number that a call may set, with its default and range.
        least_lengths: the least length of axes that need more than one entry.
    """

    reserved: ClassVar[frozenset[str]] = frozenset()  # names that no input may have

    def __init__(self, terms: Sequence[Term], students: bool, single: bool, share_ignored: bool) -> None:
        self.named_terms = tuple(terms)
        self.students = students
        self.single = single
        if share_ignored not in (True, False):
            raise ValueError(f"expected share_ignored to be True or False, got {share_ignored!r}; pass one of these")
        self.share_ignored = bool(share_ignored)
        self._forms: list[list[Form]] = []  # of every part
        self._check()
        self.input_layouts, self.optional_inputs = self._collect_inputs()
        self.scalars = self._collect_parameters()
        self.least_lengths: dict[str, int] = {}
        for part in (part for term in self.named_terms for part in term.parts):
            for axis, least in part.loss.least_lengths.items():
                own = part.axes.get(axis, axis)
                self.least_lengths[own] = max(least, self.least_lengths.get(own, 1))
        self._check_together()

    def resolve(self, tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
        """The Spec of every tensor, after a check that the names are right."""
        required = [name for name in self.input_layouts if name not in self.optional_inputs]
        checks.check_names(tensors.keys(), required, self.optional_inputs, list(self.scalars))
        specs = {
            name: checks.resolve(name, tensors[name], layouts)
            for name, layouts in self.input_layouts.items()
            if name in tensors
        }
        self._check_samples(specs)
        return specs

    def _check_samples(self, specs: Mapping[str, Spec]) -> list[str]:
        """The axes that count the samples of every part, after a check that its inputs agree on them."""
        parts = [part for term in self.named_terms for part in term.parts]
        return [self.samples_of(number, part, specs) for number, part in enumerate(parts)]

    def choose(self, layouts: Mapping[str, str], optional_inputs: Iterable[str]) -> dict[str, Spec]:
        """The Spec of every input of a graph."""
        wanted = set(optional_inputs)
        for name in [*layouts, *wanted]:
            if name not in self.input_layouts or (name in wanted and name not in self.optional_inputs):
                kind = "an optional input" if name in wanted else "an input"
                known = ", ".join(self.optional_inputs if name in wanted else self.input_layouts) or "none"
                raise ValueError(f"expected the name of {kind} ({known}), got {name!r}; correct the name")
        possible: dict[str, list[Spec]] = {}
        for name, choices in self.input_layouts.items():
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
            for forms in self._forms:
                here = [
                    fitting
                    for _, fitting in forms
                    if all(any(s.axes in fitting[n] for s in possible[n]) for n in fitting if n in possible)
                ]
                for name in forms[0].axes:
                    kept = [s for s in possible.get(name, ()) if any(s.axes in fitting[name] for fitting in here)]
                    if kept and len(kept) < len(possible[name]):
                        possible[name], changed = kept, True

    def tolerance(self, dtype: str) -> float:
        """The largest factor for errors in a type that a case of its losses declares; see :meth:`pykd.Loss.tolerance`."""
        return max(part.loss.tolerance(dtype) for term in self.named_terms for part in term.parts)

    def all_numbers(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every number of a call: what is given, and the defaults of the rest."""
        return {name: parameter.default for name, parameter in self.scalars.items()} | dict(given)

    def ignore_indices(self, specs: Mapping[str, Spec]) -> dict[str, int]:
        """The inputs of class indices that may be ignored, with the one that is."""
        found: dict[str, int] = {}
        for term in self.named_terms:
            for part in term.parts:
                found |= part.ignore_indices(specs)
        return found

    def axes_per_sample(self, specs: Mapping[str, Spec]) -> tuple[str, ...]:
        """The axes of the values per sample; a ValueError where there are none, or terms differ in them."""
        every = iter(self._check_samples(specs))
        found = [(term, {next(every) for _ in term.parts}) for term in self.named_terms]
        splitting = [(term.name, axes) for term, axes in found if not term.couples_batch]
        if not splitting:
            reasons = "; ".join(f"{term.name} {term.couples_batch}" for term in self.named_terms)
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

    def samples_of(self, number: int, part: Part, specs: Mapping[str, Spec]) -> str:
        """The axes that count the samples of a part, in the words of the graph.

        Args:
            number: the part's, counted over all terms.
            part: the part.
            specs: the inputs that are there.
        """
        axes = {name: specs[name].axes for name in map(part.graph_input, part.loss.inputs) if name in specs}
        samples = checks.samples_of(self._forms[number], axes)
        weight = part.loss.weight_input()
        if not self.share_ignored or self.students or weight is None or part.has_labels(specs):
            return samples
        # The mask of what is ignored by its label weighs this part, too.
        for name in self.ignore_indices(specs):
            mask = specs[name].axes
            if len(specs[name].names) <= len(samples.split()):
                continue
            others = {n: own for n, own in axes.items() if n != part.graph_input(weight)}
            fitting = [form.axes for form in self._forms[number] if form.samples == mask]
            if not any(all(own in form[n] for n, own in others.items()) for form in fitting):
                raise ValueError(
                    f"expected {part.loss.name} to have samples along ({', '.join(mask.split())}), as {name} has, whose ignored "
                    f"entries it leaves out, got ({', '.join(samples.split())}); give the axes the same names, or pass "
                    "share_ignored=False"
                )
            samples = mask
        return samples

    def _check(self) -> None:
        if not self.named_terms:
            raise ValueError("expected at least one term, got none; pass {name: (loss, weight)}")
        count = sum(len(term.parts) for term in self.named_terms)
        if count > MAX_PARTS:
            raise ValueError(f"expected at most {MAX_PARTS} losses in a composition, got {count}; split it")
        for term in self.named_terms:
            name = names.check(term.name, "the name of a term")
            reserved = name in ("loss", "sample", "grad") or name.endswith("_per_sample") or name.startswith("grad_")
            if reserved or [other.name for other in self.named_terms].count(name) > 1:
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
            names.check_variable(part.weight_name, f"the weight_name of {what}", self.reserved)
        axes = {axis for name in part.loss.inputs for spec in part.loss.layouts(name) for axis in spec.names}
        for kind, known, renames in (("inputs", part.loss.inputs, part.inputs), ("axes", axes - {"batch"}, part.axes)):
            for name, new in renames.items():
                if name not in known:
                    raise ValueError(
                        f"expected {kind} of {what} to rename {', '.join(sorted(known))}, got {name!r}; correct the name"
                    )
                if kind == "inputs":
                    names.check_variable(new, f"the name for {name} in {what}", self.reserved)
                else:
                    names.check(new, f"the name of the axis {name} in {what}")

    def _check_together(self) -> None:
        """Inputs, parameters and outputs lie side by side in a file: no two of them share a name."""
        outputs = ["loss", "loss_per_sample", "grad_scale"]
        if not self.single:
            outputs += [name for term in self.named_terms for name in (term.name, f"{term.name}_per_sample")]
        outputs += [f"grad_{name}" for name, layouts in self.input_layouts.items() if layouts[0].grad]
        every = [*self.input_layouts, *self.scalars, *outputs]
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
        for term in self.named_terms:
            for part in term.parts:
                forms = self._forms_of(part)
                self._forms.append(forms)
                for name in part.loss.inputs:
                    graph_name = part.graph_input(name)
                    over = {axes for _, fitting in forms for axes in fitting[graph_name]}
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

    def _forms_of(self, part: Part) -> list[Form]:
        """:meth:`Loss.forms` of a part, in the words of the graph. Where there are several students, samples are no tokens."""
        every = part.loss.forms()
        return [
            Form(
                " ".join(part.axes.get(axis, axis) for axis in form.samples.split()),
                {
                    part.graph_input(name): [
                        layout.axes
                        for spec in part.loss.layouts(name)
                        if spec.axes in form.axes[name]
                        for layout in self._with_students(spec.rename(part.axes))
                    ]
                    for name in part.loss.inputs
                },
            )
            for form in every
            if not self.students or form.samples == every[0].samples
        ]

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

        for term in self.named_terms:
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

    def numbers_of(self, term: Term, part: Part, numbers: Mapping[str, Any]) -> dict[str, Any]:
        return {name: numbers[self._parameter_name(term, name)] for name in part.loss.scalars}
