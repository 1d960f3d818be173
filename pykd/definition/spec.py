"""What a loss declares of its inputs, its scalars and its test cases."""

import dataclasses
import itertools
import reprlib
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Spec:
    """One tensor input of a loss.

    Attributes:
        axes: names separated by spaces, such as ``"batch classes"``. Equal names mean equal lengths.
            The names become the dynamic axes of the ONNX file and the words of error messages.
        grad: whether the student is behind this tensor, so that it receives the gradient.
        dtype: ``"float"`` (any floating type, the same for all inputs of a call), ``"int64"``, or ``"weight"``: numbers of
            at least 0 of any floating type, or a mask of True and False (or of 1 and 0), whatever the type of the other
            inputs; exported files take float32, since every engine and language has it, and one file serves both.
        index_of: for integers: the axis whose entries they count, such as ``"classes"``.
        optional: whether the input may be left out.
        draw: what it holds, and so how examples and tests draw it. ``"logits"``: scores of classes along the axis
            ``"classes"``, or the last where none is called so; ``"features"``: any numbers; ``"unit"``: vectors of length 1
            along the last axis (embeddings, or a queue of them, with an axis of its own in the place of the batch);
            ``"positive"``; ``"probabilities"``, which sum to 1 along the last axis; ``"log_probabilities"``;
            ``"partial_log_probabilities"``, those of some of the things that there are; ``"indices"``; ``"different_indices"``, of
            which no two are equal along the last axis; and of the dtype ``"weight"``: ``"weights"``, at least 0 and some of
            them 0, or ``"mask"``, 0 or 1.
        like: of the student's tensors: the name of the teacher's that it is compared with. Where that has axes of its own, the
            loss takes tensors of either shape for both.
        scale: a factor of what is drawn, where the loss is at home with other numbers.
        layers: the input is a list of tensors, one per layer: the setting that says how many. Each has axes of its own but for
            the batch. In graphs and files they are flat: ``student_features_0`` with ``"batch channels_0"``, and so on.
    """

    axes: str
    grad: bool = False
    dtype: str = "float"
    index_of: str | None = None
    optional: bool = False
    draw: str = "features"
    like: str | None = None
    scale: float = 1.0
    layers: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("float", "int64", "weight"):
            hint = (
                "a mask is a 'weight' drawn as 'mask': calls take bool, files float32"
                if self.dtype == "bool"
                else "take one"
            )
            raise ValueError(
                f"expected the dtype of a Spec to be 'float', 'int64' or 'weight', got {self.dtype!r}; {hint}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The axes as a tuple."""
        return tuple(self.axes.split())

    def over(self, samples: str) -> "Spec":
        """The same input where these axes count its samples in the place of ``"batch"``; as it is where it has them."""
        if self.names[0] != "batch" or self.has(samples):
            return self
        return dataclasses.replace(self, axes=" ".join([samples, *self.names[1:]]))

    @property
    def class_axis(self) -> int:
        """Of logits: which axis counts the classes."""
        return self.names.index("classes") if "classes" in self.names else len(self.names) - 1

    def has(self, axes: str) -> bool:
        """Whether all of these axes are among its own."""
        return set(axes.split()) <= set(self.names)

    def of_layer(self, number: int) -> "Spec":
        """One of the tensors of a list, with axes of its own."""
        own = self.rename({axis: f"{axis}_{number}" for axis in self.names if axis != "batch"})
        return dataclasses.replace(own, layers=None, like=None if self.like is None else f"{self.like}_{number}")

    def rename(self, axes: Mapping[str, str]) -> "Spec":
        """The same input with some axes called otherwise."""
        return dataclasses.replace(
            self,
            axes=" ".join(axes.get(axis, axis) for axis in self.names),
            index_of=None if self.index_of is None else axes.get(self.index_of, self.index_of),
        )


# The weights that a loss takes wherever it splits over samples.
SAMPLE_WEIGHT = Spec("batch", dtype="weight", optional=True, draw="weights")


@dataclasses.dataclass(frozen=True)
class Properties:
    """What changes nothing, under the settings of a loss: True, or the reason why it does; tests assert the one or the other.

    None: the loss has no input of this kind.

    Attributes:
        batch_order: all inputs may be taken in another order of the batch.
        logit_shift: a number may be added to all logits of a sample, the student's or the teacher's.
        masked_classes: a class whose logits are −inf, for student and teacher, is as good as absent.
        feature_scale: the features of each sample may be multiplied by a positive number, the student's or the teacher's.
        zero_when_equal: the value is 0 where the student's tensors equal the teacher's.
        symmetric: student and teacher may change places.
        distils: descent on the student's tensors lowers the value and leads to the teacher (tests/test_distils.py says what that is);
            a reason where it does not, such as "its value is not what its gradient is of". True of most.
    """

    batch_order: bool | str | None = True
    logit_shift: bool | str | None = None
    masked_classes: bool | str | None = None
    feature_scale: bool | str | None = None
    zero_when_equal: bool | str | None = None
    symmetric: bool | str | None = None
    distils: bool | str = True


Layouts = tuple[Spec, ...]  # the forms that one input may take; the first is the default


class Form(NamedTuple):
    """Layouts of all inputs that go together in a call.

    Attributes:
        samples: the axes that count the samples.
        axes: those that each input may have; none where it does not go with the others.
    """

    samples: str
    axes: Mapping[str, Sequence[str]]


def forms(samples: str, layouts: Mapping[str, Sequence[Spec]], optional: Set[str] = frozenset()) -> list[Form]:
    """The layouts that go together over samples that these axes count.

    They do where any two inputs agree on the axes that both can have: ``"batch channels height width"`` of the student goes
    with ``"batch teacher_channels height width"`` of the teacher and with a mask ``"batch height width"``, not with
    ``"batch teacher_channels"``. Entries that count along an axis (``index_of``) have it for that.
    """
    had = {
        name: [{*spec.names, *((spec.index_of,) if spec.index_of else ())} for spec in specs]
        for name, specs in layouts.items()
    }
    known = {name: set().union(*every) for name, every in had.items()}
    varying = {axis for every in had.values() for axes in every for axis in axes if any(axis not in a for a in every)}
    varying -= set(samples.split())  # what is given for every sample goes with what they all share
    found: dict[frozenset[str], Form] = {}
    nothing: frozenset[str] = frozenset()
    choices = [
        {frozenset(axes & varying) for axes in every} | ({nothing} if name in optional else set())
        for name, every in had.items()
    ]
    for chosen in itertools.product(*choices):
        together = frozenset().union(*chosen)
        if together in found:
            continue
        axes = {
            name: [
                s.axes
                for s, own in zip(layouts[name], had[name], strict=True)
                if own & varying == together & known[name]
            ]
            for name in layouts
        }
        if all(axes[name] for name in layouts if name not in optional):
            found[together] = Form(samples, axes)
    order = {spec.axes: number for specs in layouts.values() for number, spec in enumerate(specs)}
    return sorted(
        found.values(), key=lambda form: [min(map(order.__getitem__, one), default=0) for one in form.axes.values()]
    )


class Alias(str):
    """Another name of a loss, together with the settings that it means: ``Alias("RKL", form="reverse_kl")``.

    Attributes:
        settings: arguments of the constructor that are the defaults where the loss is called by this name.
    """

    settings: Mapping[str, Any]

    def __new__(cls, name: str, **settings: Any) -> "Alias":
        made = super().__new__(cls, name)
        made.settings = settings
        return made

    def described(self) -> str:
        """The name, and what it sets."""
        return f"{self} ({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A setting that can change in every call without a new export: a temperature, a weight."""

    minimum: float = float("-inf")
    exclusive: bool = False  # whether the minimum itself is out of range
    maximum: float = float("inf")

    def check(self, name: str, value: Any) -> float:
        """``value`` as a float; a ValueError that names ``name`` where it is out of range."""
        if isinstance(value, str | bytes):
            raise TypeError(f"expected {name} to be a number, got {value[:40]!r}; pass a number")
        try:
            number = float(value.detach() if hasattr(value, "detach") else value)
        except OverflowError:  # of a whole number
            number = float("inf")
        except (
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:  # the last two: a tensor of several numbers, or without data
            got = reprlib.repr(value)
            raise TypeError(f"expected {name} to be a number, got {got}; pass a number, or a tensor of one") from error
        if not np.isfinite(number) or not self.holds(number):
            raise ValueError(f"expected {name} to be a number {self._bounds()}, got {number:g}; pass another {name}")
        if number != 0 and not _LEAST <= abs(number) <= _MOST:
            zero = "0 or " if self.holds(0.0) else ""
            raise ValueError(
                f"expected {name} to be {zero}a magnitude from {_LEAST:g} to {_MOST:g}, which float32 holds in full "
                f"precision, got {number:g}; pass another {name}"
            )
        return number

    def holds(self, number: float) -> bool:
        """Whether a number is in range."""
        low = number <= self.minimum if self.exclusive else number < self.minimum
        return not low and number <= self.maximum

    def moved(self, default: float, number: int) -> float:
        """The ``number``-th of numbers in range that verification and tests try instead of the default; 0: the default."""
        if number == 0:
            return default
        wanted = default * (1 + 0.25 * number) if default != 0 else 0.25 * number
        if self.holds(wanted):
            return wanted
        # Part of the way to the farther end of the range, or away from the only one.
        ends = [end for end in (self.minimum, self.maximum) if np.isfinite(end)]
        end = max(ends, key=lambda end: abs(end - default))
        if end == default:
            return default - 0.25 * number if end == self.maximum else default + 0.25 * number
        return default + (end - default) * number / (number + 4)

    def _bounds(self) -> str:
        bounds = []
        if self.minimum != float("-inf"):
            bounds.append(f"greater than {self.minimum:g}" if self.exclusive else f"of at least {self.minimum:g}")
        if self.maximum != float("inf"):
            bounds.append(f"of at most {self.maximum:g}")
        return " and ".join(bounds) or "that is finite"


# What float32 holds in full precision, but for 0.
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings under which a loss is tested, exported and benchmarked.

    Attributes:
        settings: arguments of the constructor.
        layouts: input name → axes where an input may take several forms.
        optional: optional inputs that are given.
        tolerance: by dtype, a factor for the errors that tests and verification allow, where a loss is not as well conditioned as others.
        why: the reason for it.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional: Sequence[str] = ()
    tolerance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    why: str = ""

    def __post_init__(self) -> None:
        if bool(self.tolerance) != bool(self.why):
            raise ValueError(
                f"expected a tolerance together with why it is needed, got {dict(self.tolerance)} and {self.why!r}; give both"
            )

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.settings.items()]
        words += [f"{name}:{axes.replace(' ', '×')}" for name, axes in self.layouts.items()]
        words += [f"+{name}" for name in self.optional]
        return ",".join(words) or "default"
