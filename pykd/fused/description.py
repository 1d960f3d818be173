"""What losses say of work that is not theirs: to kernels, names, axes, roles and settings; to blocks of rows, what they hold."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Argument:
    """One input or output of a kernel.

    Attributes:
        axes: names separated by spaces.
        role: ``"tensor"`` (the floating type of the call), ``"float32"`` (values, weights), ``"number"`` (one
            number on the CPU) or ``"index"`` (int64).
    """

    axes: str
    role: str = "tensor"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ``cpp/kernels/<name>/`` computes, as Python needs to know it. A test compares it with the library.

    Attributes:
        name: the kernel's name.
        inputs: by name, in the library's order.
        outputs: values first, then ``grad_<input>``.
        attributes: settings with their defaults; a string where the setting is a choice.
        cuda: whether there is a version for CUDA; without one the formula computes there.
    """

    name: str
    inputs: Mapping[str, Argument]
    outputs: Mapping[str, Argument]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cuda: bool = True

    @property
    def why_not_on_cuda(self) -> str:
        """Why it does not run there, as far as that is known beforehand; empty where it may."""
        return "" if self.cuda else f"the kernel {self.name} has no version for CUDA"

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The inputs that have a gradient among the outputs."""
        return tuple(name.removeprefix("grad_") for name in self.outputs if name.startswith("grad_"))

    def shape(self, output: str, tensors: Mapping[str, Any]) -> list[Any]:
        """The shape of an output, from the axes of the tensors that are given."""
        lengths = {
            axis: length
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor)
            for axis, length in zip(self.inputs[name].axes.split(), tensor.shape, strict=True)
        }
        return [lengths[axis] for axis in self.outputs[output].axes.split()]


class KernelPoint(Protocol):
    """What a loss's method ``fused`` is given; see :mod:`pykd.fused.point`.

    Attributes:
        all_kept: whether it is known that no index among the inputs of the call is ignored.
    """

    all_kept: bool

    def __call__(
        self,
        kernel: Kernel,
        output: str,
        formula: Callable[..., Tensor],
        tensors: Mapping[str, Any],
        attributes: Mapping[str, Any],
        weight: str,
    ) -> Tensor:
        """What comes out of the kernel as ``output``: what the formula computes from these tensors and attributes.

        Args:
            kernel: the kernel.
            output: one of its outputs.
            formula: a plain function of ``tensors`` and ``attributes``, by name.
            tensors: inputs of the kernel by name; a number may be one.
            attributes: settings of the kernel that the value depends on.
            weight: the kernel's input for d(loss)/d(value).
        """


# ---- Kernels of several families ------------------------------------------------------------------

# One pass over a row of logits serves the soft term, the hard term, or both.
SOFT_TARGET = Kernel(
    "soft_target",
    inputs={
        "student": Argument("batch classes"),
        "teacher": Argument("batch classes"),
        "temperature": Argument("", "number"),
        "soft_weight": Argument("batch", "float32"),
        "labels": Argument("batch", "index"),
        "label_probs": Argument("batch classes"),
        "hard_weight": Argument("batch", "float32"),
    },
    outputs={
        "soft": Argument("batch", "float32"),
        "hard": Argument("batch", "float32"),
        "grad_student": Argument("batch classes"),
    },
    attributes={"form": "cross_entropy", "soften_student": True, "beta": 0.5},
)

# Sums over the classes of a function of both probabilities.
DIVERGENCE = Kernel(
    "divergence",
    inputs={
        "student": Argument("batch classes"),
        "teacher": Argument("batch classes"),
        "temperature": Argument("", "number"),
        "emphasis": Argument("", "number"),
        "weight": Argument("batch", "float32"),
    },
    outputs={"value": Argument("batch", "float32"), "grad_student": Argument("batch classes")},
    attributes={"form": "skewed_kl", "alpha": 0.2, "beta": 0.7, "head_mass": 0.5, "boundary": "head"},
    cuda=False,
)

# Sums over the k classes that a teacher knows, or over pairs of them.
TOP_K = Kernel(
    "top_k",
    inputs={
        "student": Argument("batch classes"),
        "teacher": Argument("batch top_k"),
        "ids": Argument("batch top_k", "index"),
        "temperature": Argument("", "number"),
        "weight": Argument("batch", "float32"),
    },
    outputs={"value": Argument("batch", "float32"), "grad_student": Argument("batch classes")},
    attributes={"form": "tail", "average": "pairs", "margin": 0.1},
    cuda=False,
)

# Divergences of soft targets with the label apart from the other classes.
LABEL_APART = Kernel(
    "label_apart",
    inputs={
        "student": Argument("batch classes"),
        "teacher": Argument("batch classes"),
        "labels": Argument("batch", "index"),
        "temperature": Argument("", "number"),
        "target_weight": Argument("", "number"),
        "other_weight": Argument("", "number"),
        "weight": Argument("batch", "float32"),
    },
    outputs={"value": Argument("batch", "float32"), "grad_student": Argument("batch classes")},
    attributes={
        "form": "decoupled",
        "threshold": 0.2,
        "raise_right": True,
        "label_probability": 0.99,
        "soften_student": True,
    },
    cuda=False,
)


# ---- Blocks of rows ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Products:
    """The products of rows of ``x`` with rows of ``y``: of a block of rows, ``(block, samples)``."""

    x: Tensor
    y: Tensor


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a tensor holds of the samples that are the rows of a block."""

    x: Tensor


@dataclasses.dataclass(frozen=True)
class Columns:
    """What a tensor holds of the samples that are the columns of a block."""

    x: Tensor


@dataclasses.dataclass(frozen=True)
class Same:
    """Where row and column of a block are one sample; of as many samples as ``like``."""

    like: Tensor


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Of the samples that are the rows of a block, what ``x`` holds of the samples that ``index`` names: ``(block, chosen, …)``."""

    x: Tensor
    index: Tensor


class KeptProducts(Protocol):
    """The products of all samples with each other, for several sums: ``(block, samples)`` of a block of rows.

    Attributes:
        node: a tensor without elements, of the type of the samples.
    """

    node: Tensor


@dataclasses.dataclass(frozen=True)
class Squares:
    """The product with itself of every sample that is a row of a block, or a column."""

    of: Any  # KeptProducts
    rows: bool


Piece = Products | Rows | Columns | Same | Chosen | KeptProducts | Squares | Tensor | float | bool | str | int | None


class BlockPoint(Protocol):
    """What a loss's method ``in_blocks`` is given; see :mod:`pykd.fused.blocks`.

    ``function`` is a plain function of what ``pieces`` hold of a block of rows, in their order; whatever is no piece is the
    same in every block. Gradients flow to the tensors of all pieces that require one.
    """

    def each(self, function: Callable[..., Tensor], *pieces: Piece) -> Tensor:
        """What a function makes of every sample by itself, a row each; nothing is kept for the gradient but the pieces."""

    def over_rows(
        self, function: Callable[..., Tensor], *pieces: Piece, weight: Tensor | None, reduction: str = "mean"
    ) -> Tensor:
        """:func:`pykd.definition.ops.reduce` of one value per row."""

    def over_pairs(
        self,
        function: Callable[..., Tensor],
        *pieces: Piece,
        weight: Tensor | None,
        symmetric: bool = False,
        columns: bool = True,
        last: bool = False,
    ) -> Tensor:
        """The mean of one value per pair of a row and a column, which weighs the product of its samples' weights.

        Args:
            function: returns ``(block, samples)``; of :meth:`products`, where it is not symmetric, a pair: of the rows with the
                columns, and of the columns with the rows.
            pieces: its arguments.
            weight: of the samples; None: all of them 1.
            symmetric: whether the value of a pair is that of the pair the other way round, so that half of them will do.
            columns: whether the weight of a column counts, too; else this is the mean over rows of the sum of each.
            last: whether nobody will look at :meth:`products` among the pieces after this.
        """

    def row_sums(self, function: Callable[..., Tensor], *pieces: Piece) -> Tensor:
        """The sum of every row of one value per pair, which is the same the other way round. Pieces are :meth:`products` and constants."""

    def largest(self, function: Callable[..., Tensor], *pieces: Piece) -> Tensor:
        """The largest of one value per pair, which is the same the other way round. Pieces are :meth:`products` and constants."""

    def with_gradient(self, function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> Tensor:
        """What a function makes of a student's ``x``, a teacher's ``y`` and the rows of a block, of which it knows the gradient."""

    def products(self, x: Tensor, factor: float = 1.0) -> KeptProducts:
        """The products of the rows of ``x`` with each other, times a factor, as a piece that several sums look at."""
