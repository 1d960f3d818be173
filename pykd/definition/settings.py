"""Settings: the fields of a loss that its constructor takes, each with a default and what is allowed.

    temperature: float = scalar(default=2.0, minimum=0.0, exclusive=True)
    form: str = choice(FORMS, default="cross_entropy")
    beta: float = number(default=0.5, above=0.0, below=1.0)

The base class makes the constructor of these, as ``dataclasses`` does, and type checkers know it does.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pykd.definition.spec import Scalar


@dataclasses.dataclass(frozen=True)
class Setting:
    """One argument of a constructor: its default, and what else it may be.

    Attributes:
        default: what holds where nothing is said.
        choices: all that it may be; none: anything of its kind.
        scalar: the range of a setting that can change in every call.
        kind: ``"number"``, ``"whole"``, ``"flag"`` or ``"choice"``.
        minimum, maximum: the ends of its range, which belong to it.
        above, below: the ends of its range, which do not.
    """

    default: Any
    kind: str
    choices: Sequence[Any] = ()
    scalar: Scalar | None = None
    minimum: float = -math.inf
    maximum: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def check(self, name: str, value: Any) -> Any:
        """``value`` as the loss keeps it; an error that names ``name`` where it is not allowed."""
        if getattr(value, "requires_grad", False):
            instead = f"pass it in each call, as {name}=…" if self.scalar is not None else "pass a number"
            raise ValueError(
                f"expected {name} to be a number, got a tensor that requires a gradient, which a setting has none of; {instead}"
            )
        if self.scalar is not None:
            return self.scalar.check(name, value)
        if self.kind == "choice":
            if value not in self.choices:
                known = ", ".join(map(repr, self.choices))
                raise ValueError(f"expected {name} to be one of {known}, got {value!r}; pass one of these")
            return value
        if self.kind == "flag":
            if value not in (True, False):
                raise ValueError(f"expected {name} to be True or False, got {value!r}; pass one of these")
            return bool(value)
        try:
            number = int(value) if self.kind == "whole" else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        exact = self.kind != "whole" or number == value
        fits = self.minimum <= number <= self.maximum and self.above < number < self.below
        is_text = isinstance(value, str | bytes)
        if is_text or not exact or not fits:
            error = TypeError if is_text else ValueError
            raise error(f"expected {name} to be {self._described()}, got {value!r}; pass another {name}")
        return number

    def _described(self) -> str:
        what = "a whole number" if self.kind == "whole" else "a number"
        if math.isfinite(self.minimum) and math.isfinite(self.maximum):
            return f"{what} from {self.minimum:.12g} to {self.maximum:.12g}"
        bounds = [
            f"{word} {bound:.12g}"
            for word, bound in (
                ("of at least", self.minimum),
                ("greater than", self.above),
                ("of at most", self.maximum),
                ("less than", self.below),
            )
            if math.isfinite(bound)
        ]
        return " ".join([what, " and ".join(bounds)]).strip()


# They return Any, as dataclasses.field does: what stands in the class is the setting, what instances have is its value. Type
# checkers take a field for optional where its default has the name "default"; so it has no other place.


def scalar(
    *,
    default: float,
    minimum: float = -math.inf,
    exclusive: bool = False,
    maximum: float = math.inf,
    kw_only: bool = False,
) -> Any:
    """A number that can also change in every call without a new export: a temperature, a weight."""
    return Setting(default, "number", scalar=Scalar(minimum, exclusive, maximum))


def number(
    *,
    default: float,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    kw_only: bool = False,
) -> Any:
    """A finite number, fixed when the loss is made."""
    return Setting(default, "number", minimum=minimum, maximum=maximum, above=above, below=below)


def whole(*, default: int, minimum: float = -math.inf, maximum: float = math.inf, kw_only: bool = False) -> Any:
    """A whole number."""
    return Setting(default, "whole", minimum=minimum, maximum=maximum)


def choice(choices: Sequence[Any], *, default: Any, kw_only: bool = False) -> Any:
    """One of a few words, or None where that is among them."""
    return Setting(default, "choice", choices=tuple(choices))


def flag(*, default: bool, kw_only: bool = False) -> Any:
    """True or False."""
    return Setting(default, "flag")


def option(*, default: Any, kw_only: bool = True) -> Any:
    """What an instance may be told beside its settings: nothing that changes a number, and no part of a recipe or a file."""
    return default
