"""The base of every loss: what it declares, and the checks and copies that follow from that."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pykd.definition import checks
from pykd.definition.spec import Case, Layouts, Scalar, Spec

REDUCTIONS = ("mean", "sum", "none")


class Loss(nn.Module):
    """Base of every loss.

    A subclass declares, besides ``forward`` and a docstring that is its specification:

    Attributes:
        name: how it is called in recipes, files and tables. Set by :func:`register`.
        inputs: tensors by name, in the order of ``forward``; a tuple of Specs where one input may take
            several forms (class indices or probabilities, say).
        scalars: those constructor arguments that can change in every call. ``forward`` takes each as
            ``Optional[float] = None`` after the tensors, and uses the attribute of that name for None.
        cases: settings to test.
        sample_axes: the axes that may count the samples: ``"batch"``, and ``"batch tokens"`` where a sample may also be one
            token of a sequence; all inputs of a call agree on them, and values per sample have these axes.
        couples_batch: why there is no value per sample; empty where the loss splits over samples.
        paper: author, year, arXiv id.
    """

    name: ClassVar[str] = ""
    inputs: ClassVar[Mapping[str, Spec | Layouts]] = {}
    scalars: ClassVar[Mapping[str, Scalar]] = {}
    cases: ClassVar[Sequence[Case]] = (Case(),)
    sample_axes: ClassVar[Sequence[str]] = ("batch",)
    couples_batch: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    reduction: str
    _layouts: ClassVar[Mapping[str, Layouts]] = {}
    _forms: ClassVar[Mapping[str, Mapping[str, Sequence[str]]]] = {}
    _weight_input: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        over = {
            samples: {n: [spec.over(samples) for spec in cls.declared(n)] for n in cls.inputs}
            for samples in cls.sample_axes
        }
        cls._layouts = {
            name: tuple(dict.fromkeys(spec for specs in over.values() for spec in specs[name])) for name in cls.inputs
        }
        cls._weight_input = next(
            (
                name
                for name in cls.inputs
                if (spec := cls.declared(name)[0]).dtype == "weight" and spec.names[0] == "batch"
            ),
            None,
        )
        cls._forms = {
            samples: {name: [spec.axes for spec in own] for name, own in specs.items()}
            for samples, specs in over.items()
        }

    def __init__(self, reduction: str = "mean", **scalars: float) -> None:
        super().__init__()
        allowed = ("mean",) if self.couples_batch else REDUCTIONS
        if reduction not in allowed:
            why = f", since {type(self).__name__} {self.couples_batch}" if self.couples_batch else ""
            raise ValueError(
                f"expected reduction to be one of {', '.join(map(repr, allowed))}{why}, "
                f"got {reduction!r}; pass one of these"
            )
        self.reduction = reduction
        self.checks_inputs = True  # a loss graph, which checks for all its losses at once, turns it off
        for name, value in scalars.items():
            setattr(self, name, self.scalars[name].check(name, value))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Checks the tensors by their declared axes, then computes."""
        if self.checks_inputs:
            # By position as forward takes them; what it does not take, it refuses itself.
            by_position = dict(zip((*self.inputs, *self.scalars), args, strict=False))
            self.check_call({**by_position, **kwargs})
        return super().__call__(*args, **kwargs)

    def check_call(self, arguments: Mapping[str, object]) -> None:
        """Raises where tensors or numbers do not fit the declaration."""
        specs: dict[str, Spec] = {}
        tensors: dict[str, Tensor] = {}
        for name in self.inputs:
            tensor = arguments.get(name)
            if tensor is not None:
                specs[name] = checks.resolve(name, tensor, self.layouts(name))  # type: ignore[arg-type]
                tensors[name] = tensor  # type: ignore[assignment]
        if len(self.sample_axes) > 1:
            checks.samples_of(self.forms(), {name: spec.axes for name, spec in specs.items()})
        checks.check_tensors(specs, tensors)
        if not checks.are_data_visible():
            return
        ignore_index = getattr(self, "ignore_index", None)
        checks.check_ranges(specs, tensors, {} if ignore_index is None else dict.fromkeys(specs, ignore_index))
        for name, scalar in self.scalars.items():
            value = arguments.get(name)
            if value is not None:
                scalar.check(name, value)

    def fused(self, kernel: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The same as ``forward``, with a fused kernel in the middle; see :mod:`pykd.fused.point`. Losses without one have none."""
        raise NotImplementedError

    @classmethod
    def has_kernel(cls) -> bool:
        """Whether a fused kernel computes this loss."""
        return cls.fused is not Loss.fused

    def covered_by_kernel(self, given: Mapping[str, Spec]) -> bool:
        """Whether ``fused`` computes it with these settings and inputs; where not, the formula does."""
        return self.has_kernel()

    @classmethod
    def weight_input(cls) -> str | None:
        """The input that weighs samples, where there is one."""
        return cls._weight_input

    @staticmethod
    def reference(**inputs: Any) -> Any:
        """The same in NumPy float64, written from the paper, to be obvious."""
        raise NotImplementedError

    @staticmethod
    def constants(**inputs: Any) -> dict[str, Any]:
        """What the gradient treats as constant although it is computed from the inputs (a bandwidth, say).

        Takes the arguments of :meth:`reference` and returns further ones for it, so that differences of the
        reference can be taken with these held fast.
        """
        return {}

    def zero_when_equal(self) -> bool:
        """Whether the value is 0 when every student tensor equals the teacher's, under these settings."""
        return False

    def sees_masked_classes(self) -> bool:
        """Whether a class whose logits are −inf, for student and teacher, makes the loss infinite, where others leave it out."""
        return False

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
    def forms(cls) -> Mapping[str, Mapping[str, Sequence[str]]]:
        """For each of ``sample_axes``: the axes that every input may have with it."""
        return cls._forms

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as this instance has them."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        return {name: getattr(self, name) for name in names}

    def with_settings(self, **changes: Any) -> "Loss":
        """A copy with other settings."""
        return type(self)(**{**self.settings(), **changes})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
