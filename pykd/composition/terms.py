"""Terms: losses with names and weights."""

import dataclasses
from collections.abc import Mapping

from pykd.definition import Loss, Scalar, Spec

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
