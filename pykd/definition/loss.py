"""The base of every loss: what it declares, and the constructor, checks and copies that follow from that."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Optional, cast

from torch import Tensor, fx, nn
from typing_extensions import dataclass_transform

from pykd.definition import checks, names, ops, plan, routing
from pykd.definition.plan import PlannedCall, Plans, key_of
from pykd.definition.settings import Setting, choice, flag, number, option, scalar, whole
from pykd.definition.spec import Case, Form, Layouts, Properties, Scalar, Spec, forms

REDUCTIONS = ("mean", "sum", "none")


@dataclass_transform(field_specifiers=(scalar, number, whole, choice, flag, option))
class _WithFields(nn.Module):
    """Says to type checkers that fields make the constructor; of what stands below it alone, so of ``reduction`` as well."""


class Loss(_WithFields):
    """Base of every loss.

    A subclass declares its settings as fields (:mod:`pykd.definition.settings`), of which the constructor is made, and its
    formula is the function of the loss's name in the same file, which takes the inputs, then the settings, and gets their
    defaults from here. Besides, and besides a docstring that is its specification:

    Attributes:
        name: how it is called in recipes, files and tables. Set by :func:`register`.
        family: the folder of ``pykd/losses`` that its file lies in; empty for a file elsewhere. Set by :func:`register`.
        aliases: what papers and other libraries call it: ``("KD", Alias("RKL", form="reverse_kl"))``. :func:`pykd.get`, recipes and
            the command line find it by these, too; an :class:`Alias` brings settings with it, as defaults.
        inputs: tensors by name, in the order in which the formula takes them; a tuple of Specs where one input may take
            several forms (class indices or probabilities; vectors, tokens or maps). In a call any two inputs agree on the axes
            that both can have, and all layers of a list on one form.
        cases: settings to test.
        sample_axes: the axes that may count the samples: ``"batch"``, and ``"batch tokens"`` where a sample may also be one
            token of a sequence; all inputs of a call agree on them, and values per sample have these axes. An input that is
            declared with these axes is taken as it is declared; any other has them in the place of ``"batch"``.
        couples_batch: why there is no value per sample; empty where the loss splits over samples.
        no_kernel: why there is no fused kernel for it, as far as that has been measured: ``pykd list --support`` says it.
        least_lengths: of axes that need more than one entry: ``{"classes": 2}``. A shorter call is an error.
        scalars: the settings that can change in every call. A call takes them after the tensors. Follows from the fields.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    aliases: ClassVar[Sequence[str]] = ()
    inputs: ClassVar[Mapping[str, Spec | Layouts]] = {}
    scalars: ClassVar[Mapping[str, Scalar]] = {}
    cases: ClassVar[Sequence[Case]] = (Case(),)
    sample_axes: ClassVar[Sequence[str]] = ("batch",)
    couples_batch: ClassVar[str] = ""
    no_kernel: ClassVar[str] = ""
    least_lengths: ClassVar[Mapping[str, int]] = {}

    reduction: str = choice(REDUCTIONS, default="mean", kw_only=True)
    kernels: str | None = option(default=None)

    _lists: ClassVar[Mapping[str, Sequence[str]]] = {}  # inputs that are lists, with the flat names of their tensors
    _formula: ClassVar[Callable[..., Tensor]]
    _formula_settings: ClassVar[Sequence[str]] = ()
    _of_layers: ClassVar[dict[tuple[int, ...], "type[Loss]"]] = {}
    _settings: ClassVar[Mapping[str, Setting]] = {"reduction": cast("Setting", reduction)}
    _layouts: ClassVar[Mapping[str, Layouts]] = {}
    _forms: ClassVar[Sequence[Form]] = ()
    _arguments: ClassVar[Sequence[str]] = ()  # of a call
    _written: ClassVar[Callable[..., Any] | None] = None  # the forward that is the formula
    __jit_ignored_attributes__: ClassVar[Sequence[str]] = ("_plans", "kernels")
    _weight_input: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._declare_settings()
        over = {samples: {name: cls._layouts_over(samples, name) for name in cls.inputs} for samples in cls.sample_axes}
        cls._layouts = {
            name: tuple(dict.fromkeys(spec for specs in over.values() for spec in specs[name])) for name in cls.inputs
        }
        for name, layouts in cls._layouts.items():
            kinds = [(len(spec.names), spec.dtype == "int64") for spec in layouts]
            if len(set(kinds)) < len(kinds):
                raise TypeError(
                    f"expected the layouts of {cls.__name__}'s {name} to differ in their number of axes, or one to hold integers, "
                    f"got {' and '.join(repr(spec.axes) for spec in layouts)}; a call could not tell which one it has"
                )
        cls._weight_input = next(
            (
                name
                for name in cls.inputs
                if (spec := cls.declared(name)[0]).dtype == "weight" and spec.axes in cls.sample_axes
            ),
            None,
        )
        cls._arguments = (*cls.inputs, *cls.scalars)
        if not cls._lists:  # whose layers take one form
            optional = {name for name in cls.inputs if cls.declared(name)[0].optional}
            cls._forms = [form for samples, specs in over.items() for form in forms(samples, specs, optional)]

    @classmethod
    def _layouts_over(cls, samples: str, name: str) -> list[Spec]:
        """The layouts of an input where these axes count the samples: those that have them, or else each of them with them; and
        those that all samples share."""
        declared = cls.declared(name)
        having = any(spec.has(samples) for spec in declared)
        return [s.over(samples) for s in declared if s.has(samples) or s.names[0] != "batch" or not having]

    @classmethod
    def _declare_settings(cls) -> None:
        own = {name: value for name, value in cls.__dict__.items() if isinstance(value, Setting)}
        known = {name: setting for name, setting in cls._settings.items() if name != "reduction"}
        reduction = own.pop("reduction", Loss._settings["reduction"])  # the last, wherever it is declared
        cls._settings = {**known, **own, "reduction": reduction}
        cls.scalars = {name: setting.scalar for name, setting in cls._settings.items() if setting.scalar is not None}
        kinds: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            kinds |= inspect.get_annotations(base)
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=setting.default,
                annotation=kinds.get(name, inspect.Parameter.empty),
            )
            for name, setting in cls._settings.items()
        ]
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    @classmethod
    def with_defaults(cls, settings: Mapping[str, Any]) -> "type[Loss]":
        """The class with other defaults. What it makes are instances of the class itself, which know nothing of it."""
        changed = {name: replace(cls._settings[name], default=value) for name, value in settings.items()}

        def make(kind: type[Loss], *args: Any, **given: Any) -> Loss:
            kernels = given.pop("kernels", None)
            named = cls._by_name("the settings", tuple(cls._settings), args, given)
            return cls(**{**settings, **named}, kernels=kernels)

        namespace = {**cls._settings, **changed, "__new__": make, "__module__": cls.__module__, "__doc__": cls.__doc__}
        made: type[Loss] = type(cls.__name__, (cls,), namespace)
        return made

    @classmethod
    def takes(cls, formula: Callable[..., Tensor]) -> None:
        """Makes ``formula`` that of the class, and ``forward`` the call of it with the settings.

        The formula gets the defaults that the class declares: None for tensors that may be missing, those of the settings.
        """
        parameters = inspect.signature(formula).parameters
        settings = [name for name in cls._settings if name in parameters]
        optional = [name for name in cls.inputs if cls.declared(name)[0].optional]
        if list(parameters) != [*cls.inputs, *settings]:
            raise TypeError(
                f"expected the function {formula.__name__} to take the inputs of {cls.__name__}, then its settings, as they are "
                f"declared ({', '.join([*cls.inputs, *settings])}), got ({', '.join(parameters)}); correct one of them"
            )
        defaults = dict.fromkeys(optional, None) | {name: cls._settings[name].default for name in settings}
        if [*parameters][len(parameters) - len(defaults) :] != [*defaults]:
            raise TypeError(
                f"expected the inputs of {cls.__name__} that may be missing to come last, got {', '.join(cls.inputs)} of which "
                f"{', '.join(optional)} may; declare these after the others"
            )
        for name, parameter in parameters.items():
            if parameter.default not in (parameter.empty, defaults.get(name, parameter.empty)):
                raise TypeError(
                    f"expected the function {formula.__name__} to leave the default of {name} to {cls.__name__}, got "
                    f"{parameter.default!r}; remove it"
                )
        formula.__defaults__ = tuple(defaults.values())
        cls._of_layers = {}
        cls._formula = staticmethod(formula)
        cls._formula_settings = settings
        if "forward" not in cls.__dict__:
            cls.forward = cls._written = _forward(
                formula, cls.inputs, set(optional), cls.scalars, cls._formula_settings
            )

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Takes the settings that the class declares, by position or by name, and ``kernels`` (:mod:`pykd.definition.routing`)."""
        super().__init__()
        self.kernels = routing.checked(settings.pop("kernels", None))
        kind = type(self)
        given = kind._by_name("the settings", tuple(kind._settings), args, settings)
        for name, setting in kind._settings.items():
            value = given.get(name, setting.default)
            if name == "reduction" and self.couples_batch and value != "mean":
                raise ValueError(
                    f"expected reduction to be 'mean', since {kind.__name__} {self.couples_batch}, got {value!r}; pass that"
                )
            setattr(self, name, setting.check(name, value))
        counts = {name: spec.layers for name in self.inputs if (spec := self.declared(name)[0]).layers}
        if counts:
            self.__class__ = kind._with_flat_inputs({name: getattr(self, setting) for name, setting in counts.items()})

    @classmethod
    def _with_flat_inputs(cls, counts: Mapping[str, int]) -> "type[Loss]":
        """The class with so many tensors in the place of each input that is a list; what comes after knows flat names alone."""
        key = tuple(counts.values())
        if key not in cls._of_layers:
            inputs: dict[str, Spec | Layouts] = {}
            for name in cls.inputs:
                layouts = cls.declared(name)
                for i in range(counts.get(name, 0)):
                    inputs[f"{name}_{i}"] = tuple(spec.of_layer(i) for spec in layouts)
                if name not in counts:
                    inputs[name] = layouts
            least = {
                name: length
                for axis, length in cls.least_lengths.items()
                for name in (axis, *(f"{axis}_{i}" for i in range(max(counts.values()))))
            }
            lists = {name: [f"{name}_{i}" for i in range(count)] for name, count in counts.items()}
            made: Any = type(
                cls.__name__,
                (cls,),
                {
                    "inputs": inputs,
                    "_lists": lists,
                    "least_lengths": least,
                    "__module__": cls.__module__,
                    "__doc__": cls.__doc__,
                },
            )
            optional = {name for name in inputs if made.declared(name)[0].optional}
            made._forms = [
                Form(
                    form.samples,
                    {
                        flat: [Spec(axes).of_layer(i).axes if name in lists else axes for axes in form.axes[name]]
                        for name in cls.inputs
                        for i, flat in enumerate(lists.get(name, [name]))
                    },
                )
                for form in cls._forms
            ]
            made.forward = made._written = _forward(
                cls._formula, inputs, optional, cls.scalars, cls._formula_settings, lists
            )
            cls._of_layers[key] = made
        return cls._of_layers[key]

    @classmethod
    def _as_declared(cls) -> "type[Loss]":
        """The class in the loss's file, for one that was made for a count of layers."""
        return cls.__mro__[1] if cls._lists else cls

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self._lists:
            return super().__reduce_ex__(protocol)
        # Pickle would not find the class.
        return _remake, (self._as_declared(), {**self.settings(), "kernels": self.kernels})

    @classmethod
    def grouped(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Flat tensors by name, with lists where the formula takes lists; one that is not there is None."""
        flat = {name for names in cls._lists.values() for name in names}
        lists = {name: [given.get(one) for one in names] for name, names in cls._lists.items()}
        return lists | {name: value for name, value in given.items() if name not in flat}

    @classmethod
    def flat(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, with the tensors of lists by their own names."""
        found: dict[str, Any] = {}
        for name, value in given.items():
            names = cls._lists.get(name)
            if names is None:
                found[name] = value
            elif isinstance(value, list | tuple) and len(value) == len(names):
                found |= dict(zip(names, value, strict=True))
            else:
                got = f"{len(value)} of them" if isinstance(value, list | tuple) else type(value).__name__
                raise ValueError(f"expected {name} to be a list of {len(names)} tensors, got {got}; pass one per layer")
        return found

    def __call__(self, *args: Any, kernels: str | None = None, **kwargs: Any) -> Any:
        """Checks the tensors by their declared axes, then computes.

        Args:
            args: the inputs and scalars, in the order of their declaration.
            kernels: ``"auto"``, ``"on"`` or ``"off"`` for this call; see :func:`pykd.set_kernels`.
            kwargs: inputs and scalars by name.
        """
        given = self.flat_arguments(args, kwargs)
        why = routing.obstacle()
        mode = routing.wanted(kernels, self.kernels)
        call = None if why else self.planned(given)
        if call is None:
            self.check_call(given)
            why = why or "a tensor stands for others"
        else:
            why = self.why_formula(call, mode) or self._hooks()
            if not why:
                return self.compute_by_kernel(call)
        routing.note_formula(self.name, why, mode)
        numbers: Mapping[str, Any] = {name: number for name in self.scalars if (number := given.get(name)) is not None}
        if numbers:
            if call is not None:
                numbers = {name: call.numbers[name] for name in numbers}
            floats = (given.get(name) for name in self.inputs if self.declared(name)[0].dtype == "float")
            numbers = routing.without_axes(numbers, floats)
        if self._lists:
            return super().__call__(**{**given, **numbers})
        if not numbers:
            return super().__call__(*args, **kwargs)
        args = tuple(numbers.get(name, one) for name, one in zip(self._arguments, args, strict=False))
        return super().__call__(*args, **{name: numbers.get(name, one) for name, one in kwargs.items()})

    def flat_arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by flat names. Lists come by the names that the class declares, or their tensors by flat names."""
        if not self._lists:
            return self._by_name("the inputs", self._arguments, args, kwargs)
        flat = {one: kwargs[one] for names in self._lists.values() for one in names if one in kwargs}
        others = {name: value for name, value in kwargs.items() if name not in flat}
        return self.flat(self._by_name("the inputs", self._as_declared()._arguments, args, others)) | flat

    def planned(self, given: Mapping[str, Any]) -> PlannedCall | None:
        """The arguments of a call, checked, with what is known of such calls; None where a tensor is no ordinary one.

        Args:
            given: tensors and numbers by their flat names.
        """
        key = key_of([given.get(name) for name in self.inputs])
        if key is None:
            return None
        plans: Plans | None = self.__dict__.get("_plans")
        if plans is None:
            plans = self.__dict__["_plans"] = Plans()
        known = plans.find(key)
        if known is None:
            specs, tensors = self._check_tensors(given)
            known = plans.keep(key, specs, tensors, self._ignored(specs))
        kept = known.check_indices(given)
        numbers = {
            name: getattr(self, name)
            if (value := given.get(name)) is None
            else routing.number(name, self.scalars[name], value)
            for name in self.scalars
        }
        return PlannedCall(known, {name: given[name] for name in known.specs}, numbers, kept)

    def why_formula(self, call: PlannedCall, mode: str) -> str:
        """Why the formula computes a call; empty where a kernel does."""
        if mode == "off":
            return 'kernels="off"'
        if type(self).forward is not type(self)._written or "forward" in self.__dict__:
            return "it has a forward of its own"
        if call.plan.refusal is None:
            call.plan.refusal = self._refusal(call.tensors, call.plan.specs)
        return call.plan.refusal or self.why_whole(call.tensors, mode) or routing.learned(call.numbers)

    def compute_by_kernel(self, call: PlannedCall) -> Tensor:
        """The loss by its kernel, with autograd, where :meth:`why_formula` says nothing."""
        assert routing.evaluator is not None
        return routing.evaluator.loss(self, call)

    def _refusal(self, tensors: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> str:
        if not self.is_accelerated() or routing.evaluator is None:
            return self.without_kernel()
        if self.has_kernel() and not self.covered_by_kernel(specs):
            return "no kernel computes these settings and inputs"
        return routing.evaluator.refusal(self, tensors)

    def _hooks(self) -> str:
        """Why the formula computes a call that hooks are to see, which is one of ``forward``; empty where there are none."""
        own = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        hooked = own or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        return "hooks of a module take the formula" if hooked else ""

    def __setattr__(self, name: str, value: Any) -> None:
        setting = self._settings.get(name)
        if setting is not None and name in self.__dict__:
            value = setting.check(name, value)
            if setting.scalar is None:  # scalars are numbers of every call
                plan.forget_all()  # this loss may be part of any composition
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the plans, which are made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_plans"}

    @classmethod
    def _by_name(cls, what: str, known: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by their names; a TypeError says which is one too many."""
        given = dict(zip(known, args, strict=False))
        if not kwargs and len(args) <= len(known):
            return given
        if len(args) > len(known):
            got = f"{len(args)} of them"
        elif unknown := kwargs.keys() - set(known):
            got = f"the unknown {', '.join(sorted(unknown))}"
        elif twice := kwargs.keys() & given.keys():
            got = f"{', '.join(sorted(twice))} twice"
        else:
            return given | kwargs
        raise TypeError(f"expected {what} of {cls.__name__} ({', '.join(known)}), got {got}; pass these by name")

    def formula_call(self, given: Mapping[str, Any]) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        """The formula and its arguments: tensors and numbers as given, everything else as set."""
        settings = {name: getattr(self, name) for name in self._formula_settings if name not in given}
        return type(self)._formula, {**self.grouped(given), **settings}

    def check_call(self, arguments: Mapping[str, object]) -> None:
        """Raises where tensors or numbers do not fit the declaration."""
        specs, tensors = self._check_tensors(arguments)
        if not checks.are_data_visible():
            return
        checks.check_ranges(specs, tensors, self._ignored(specs))
        for name, declared in self.scalars.items():
            value = arguments.get(name)
            if value is not None:
                declared.check(name, value)

    def _ignored(self, specs: Mapping[str, Spec]) -> dict[str, int]:
        """The index that is ignored, for every input that could hold it."""
        ignore_index = getattr(self, "ignore_index", None)
        return {} if ignore_index is None else dict.fromkeys(specs, ignore_index)

    def _check_tensors(self, arguments: Mapping[str, object]) -> tuple[dict[str, Spec], dict[str, Tensor]]:
        """The layout of every tensor that is there, and the tensors, after a check of all but their numbers."""
        specs: dict[str, Spec] = {}
        tensors: dict[str, Tensor] = {}
        optional = [name for name in self.inputs if self.declared(name)[0].optional]
        required = [name for name in self.inputs if name not in optional]
        checks.check_names({name for name in self.inputs if arguments.get(name) is not None}, required, optional)
        for name in self.inputs:
            tensor = arguments.get(name)
            if tensor is not None:
                specs[name] = checks.resolve(name, tensor, self.layouts(name))  # type: ignore[arg-type]
                tensors[name] = tensor  # type: ignore[assignment]
        if len(self.forms()) > 1:
            checks.samples_of(self.forms(), {name: spec.axes for name, spec in specs.items()})
        checks.check_tensors(specs, tensors, self.least_lengths)
        return specs, tensors

    def fused(self, kernel: Any, *inputs_and_scalars: Any) -> Tensor:
        """The same as the formula, with a fused kernel in the middle; see :mod:`pykd.fused.point`. Losses without one have none.

        Takes every input, or None, and the value of every scalar, in the order of their declaration; all else it reads from
        ``self``.
        """
        raise NotImplementedError

    def by_kernel(self, kernel: Any, given: Mapping[str, Any]) -> Tensor:
        """``fused`` of these tensors and numbers."""
        return self.fused(kernel, *self._in_order(given))

    def _in_order(self, given: Mapping[str, Any]) -> list[Any]:
        """Every input, or None, and the value of every scalar."""
        numbers = (given.get(name) for name in self.scalars)
        scalars = [getattr(self, name) if n is None else n for name, n in zip(self.scalars, numbers, strict=True)]
        return [*map(given.get, self.inputs), *scalars]

    @classmethod
    def has_kernel(cls) -> bool:
        """Whether a fused kernel computes this loss: by a ``fused`` that is of its own formula, or of a base without one."""
        return cls._is_of_own_formula("fused")

    @classmethod
    def _is_of_own_formula(cls, method: str) -> bool:
        """Whether a method that this class has, and no loss as such, says the same as its formula."""
        if getattr(cls, method) is getattr(Loss, method) or cls.formula_call is not Loss.formula_call:
            return False
        owner: Any = next(base for base in cls.__mro__ if method in base.__dict__)
        return "_formula" not in owner.__dict__ or owner._formula is cls._formula

    def in_blocks(self, blocks: Any, *inputs_and_scalars: Any) -> Tensor:
        """The same as the formula, by blocks of rows; see :mod:`pykd.fused.blocks`. Losses that hold no large matrices have none.

        Takes what ``fused`` takes.
        """
        raise NotImplementedError

    def by_blocks(self, blocks: Any, given: Mapping[str, Any]) -> Tensor:
        """``in_blocks`` of these tensors and numbers."""
        return self.in_blocks(blocks, *self._in_order(given))

    @classmethod
    def has_blocks(cls) -> bool:
        """Whether this loss can go by blocks of rows."""
        return cls._is_of_own_formula("in_blocks")

    @classmethod
    def is_accelerated(cls) -> bool:
        """Whether anything but the formula, as it stands, computes this loss."""
        return cls.has_kernel() or cls.has_blocks()

    def relation(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """The samples, and how many numbers each of them has in the largest matrix that the formula holds."""
        samples = next(tensors[name] for name in self.inputs).size(0)
        return samples, samples

    def why_whole(self, tensors: Mapping[str, Tensor], mode: str) -> str:
        """Why a loss that has blocks does not go by them, as far as shapes and settings go; empty where it does, or has none."""
        if not self.has_blocks():
            return ""
        if self.reduction == "none":
            return "it has no kernel, and blocks of rows add up their values"
        if mode == "on":
            return ""
        if any(isinstance(tensor, Tensor) and tensor.device.type != "cpu" for tensor in tensors.values()):
            return "it has no kernel, and blocks of rows are measured on the CPU alone"
        samples, per_sample = self.relation(tensors)
        return (
            "it has no kernel, and is too small for blocks of rows"
            if samples * per_sample < routing.least_entries
            else ""
        )

    def covered_by_kernel(self, given: Mapping[str, Spec]) -> bool:
        """Whether ``fused`` computes it with these settings and inputs; where not, the formula does."""
        return self.has_kernel()

    @classmethod
    def without_kernel(cls) -> str:
        """That no kernel computes it, and why there is none."""
        return f"it has no kernel: {cls.no_kernel}" if cls.no_kernel else "it has no kernel"

    @classmethod
    def weight_input(cls) -> str | None:
        """The input that weighs samples, where there is one."""
        return cls._weight_input

    def reference(self, *args: Any, **inputs: Any) -> Any:
        """The same in NumPy float64, written from the paper, to be obvious. Takes the inputs as arrays; settings are those of ``self``."""
        raise NotImplementedError

    def constants(self, *args: Any, **inputs: Any) -> dict[str, Any]:
        """What the gradient treats as constant although it is computed from the inputs (a bandwidth, say).

        Takes the inputs and returns further arguments of :meth:`reference`, so that differences of the reference can be
        taken with these held fast.
        """
        return {}

    def properties(self) -> Properties:
        """What changes nothing under these settings, and why the rest does; tests assert both."""
        return Properties()

    @classmethod
    def declared(cls, name: str) -> Layouts:
        """The forms of the input ``name`` as ``inputs`` has them: one sample per entry of the batch."""
        spec = cls.inputs[name]
        return (spec,) if isinstance(spec, Spec) else tuple(spec)

    @classmethod
    def layouts(cls, name: str) -> Layouts:
        """The forms that the input ``name`` may take, over all ``sample_axes``; the first is the default."""
        return cls._layouts[name]

    @classmethod
    def forms(cls) -> Sequence[Form]:
        """The layouts that go together, for each of ``sample_axes``."""
        return cls._forms

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as this instance has them."""
        return {name: getattr(self, name) for name in self._settings}

    def with_settings(self, **changes: Any) -> "Loss":
        """A copy with other settings."""
        return self._as_declared()(**{**self.settings(), "kernels": self.kernels, **changes})

    def tolerance(self, dtype: str) -> float:
        """The factor for errors in a type that a case with these settings declares, however it reduces; 1: none does."""

        def but_for_reduction(settings: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in settings.items() if name != "reduction"}

        kind = self._as_declared()
        declaring = (case for case in self.cases if dtype in case.tolerance)
        own = but_for_reduction(self.settings())
        return max(
            (c.tolerance[dtype] for c in declaring if but_for_reduction(kind(**c.settings).settings()) == own),
            default=1.0,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


def _forward(
    formula: Callable[..., Tensor],
    inputs: Sequence[str] | Mapping[str, Any],
    optional: set[str],
    scalars: Mapping[str, Scalar],
    settings: Sequence[str],
    lists: Mapping[str, Sequence[str]] | None = None,
) -> Callable[..., Any]:
    """``forward(self, <inputs>, <scalars>)``, which calls the formula with the settings of ``self``.

    Written by torch.fx, as loss graphs are, so that TorchScript finds a source with every argument by its name.
    """
    graph, root = fx.Graph(), nn.Module()
    arguments: dict[str, Any] = {}
    for name in inputs:
        names.check_variable(name, "an input of the loss")
        arguments[name] = (
            graph.placeholder(name, Optional[Tensor], None) if name in optional else graph.placeholder(name, Tensor)  # noqa: UP045
        )
    given = {
        names.check_variable(name, "a setting of the loss"): graph.placeholder(name, Optional[float], None)  # noqa: UP045
        for name in scalars
    }
    for name, flat in (lists or {}).items():
        arguments[name] = [arguments.pop(one) for one in flat]
    for name in settings:
        setattr(root, name, None)
        own = graph.get_attr(name)
        arguments[name] = graph.call_function(ops.given_or, (given[name], own)) if name in given else own
    graph.output(graph.call_function(formula, (), arguments))
    return type(fx.GraphModule(root, graph, "Forward")).forward


def _remake(cls: type[Loss], settings: Mapping[str, Any]) -> Loss:
    return cls(**settings)
