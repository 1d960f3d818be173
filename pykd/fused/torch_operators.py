"""The fused kernels (``cpp/kernels/``) on torch tensors: one pass over memory for the value and the gradient.

The low level under ``fused=True`` in :mod:`pykd.functional`. Names of kernels, inputs, outputs and attributes are passed
on to the library, which checks them; ``torch.ops.pykd.kernels()`` describes what there is, as JSON.

:func:`fused_call` returns a kernel's outputs and knows nothing of autograd. :func:`fused_loss` is a loss with a
gradient. Both also work without this module, as ``torch.ops.pykd.kernel`` and ``torch.ops.pykd.loss``, once the library
is loaded (:func:`load`); ``torch.ops.pykd.loss`` goes into TorchScript and ``torch.compile`` as well, and costs two
more passes over memory than :func:`fused_loss`. What ``torch.compile`` traces gets that operator from
:func:`fused_loss`, too; call :func:`load` before.
"""

import dataclasses
import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pykd import config

__all__ = ["fused_call", "fused_loss", "load"]

Settings = Mapping[str, float | str]


@functools.cache
def load() -> None:
    """Registers the operators ``torch.ops.pykd``.

    Raises:
        FileNotFoundError: where this pykd was installed without them.
        RuntimeError: where the library is there and torch cannot open it.
    """
    path = config.torch_ops_path()
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise RuntimeError(
            f"expected a {path.name} that torch {torch.__version__} can open, got {error}; "
            "pykd's operators need torch 2.10 or newer, and the libpykd they were built with"
        ) from error


def fused_call(
    kernel: str, inputs: Mapping[str, Tensor], attributes: Settings | None = None, outputs: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Runs a kernel once.

    Args:
        kernel: its name, such as ``"soft_target"``.
        inputs: by name; contiguous; numbers (a temperature) as float32 tensors without axes, on the CPU.
        attributes: those that differ from their default; a number, or the word of a choice.
        outputs: the names of those wanted.

    Returns:
        The outputs by name, without a gradient: an input that requires one, in grad mode, is an error.
    """
    if not torch.compiler.is_compiling():
        load()
    results = torch.ops.pykd.kernel(
        kernel, list(inputs.values()), " ".join(inputs), _text(attributes or {}), " ".join(outputs)
    )
    return dict(zip(outputs, results, strict=True))


def fused_loss(kernel: str, inputs: Mapping[str, Tensor], attributes: Settings | None = None) -> Tensor:
    """Σ weight · value over the rows, and over a kernel's values for which a weight is among the inputs.

    Gradients flow to the inputs that the kernel has one for (the student); the others are constants, whatever their
    ``requires_grad`` says. First derivatives only, by ``backward()``: ``create_graph=True``, forward-mode AD and the
    transforms of ``torch.func`` raise. Rows of weight 0 count as 0 whatever their value is. For float16 students the
    kernel runs once more in ``backward()``, so that the factor of a scaled loss meets the gradient before it is rounded.

    Args:
        kernel: its name.
        inputs: by name, as for :func:`fused_call`: the kernel's ``soft_weight`` or the like decides that ``soft`` counts.
        attributes: as for :func:`fused_call`.

    Returns:
        A float32 scalar.

    Example:
        >>> import torch
        >>> from pykd.torch_kernels import fused_loss
        >>> student = torch.tensor([[0.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> weight = torch.full((2,), 1 / 2)  # a mean over two rows
        >>> loss = fused_loss(
        ...     "soft_target",
        ...     {"student": student, "teacher": teacher, "temperature": torch.tensor(1.0), "soft_weight": weight},
        ...     {"form": "cross_entropy"},
        ... )
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.6931
    """
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.pykd.loss(kernel, list(inputs.values()), " ".join(inputs), _text(attributes or {}))
        return traced
    load()
    refuse_transforms(inputs, _names(kernel).differentiable, "compute the loss by its formula (pykd.functional)")
    students = []
    if torch.is_grad_enabled():
        students = [
            name for name, tensor in inputs.items() if tensor.requires_grad and name in _names(kernel).differentiable
        ]
    call = _Call(kernel, tuple(inputs), _text(attributes or {}), students)
    if not students:
        with torch.no_grad():
            return call(inputs.values(), [])[0]
    # A float16 gradient would underflow before the upstream one, of a scaled loss perhaps, meets it.
    node = _LossOfHalves if any(inputs[name].dtype == torch.float16 for name in students) else _Loss
    value: Tensor = node.apply(call, list(inputs.values()), *(inputs[name] for name in students))  # type: ignore[no-untyped-call]
    return value


@dataclasses.dataclass(frozen=True)
class _Call:
    """A loss of a kernel, but for its tensors."""

    kernel: str
    names: tuple[str, ...]
    attributes: str
    students: list[str]

    def __call__(self, tensors: Iterable[Tensor], of: Sequence[str]) -> list[Tensor]:
        """The value, and the gradients with respect to the inputs ``of``."""
        inputs = " ".join(self.names)
        results: list[Tensor] = torch.ops.pykd.value_and_gradient(
            self.kernel, list(tensors), inputs, self.attributes, " ".join(of)
        )
        return results


class _Loss(torch.autograd.Function):
    """What ``FusedLossFunction`` of ``pykd/torch_kernels.hpp`` is."""

    @staticmethod
    def forward(ctx: Any, call: _Call, tensors: list[Tensor], *students: Tensor) -> Tensor:
        value, *gradients = call(tensors, call.students)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        refuse_second_derivatives()
        return None, None, *(scaled(gradient, upstream[0]) for gradient in ctx.saved_tensors)


class _LossOfHalves(torch.autograd.Function):
    """The same in two runs of the kernel: the second, in backward(), has the upstream gradient in its weights."""

    @staticmethod
    def forward(ctx: Any, call: _Call, tensors: list[Tensor], *students: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return call(tensors, [])[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        refuse_second_derivatives()
        call, factor = ctx.call, upstream[0]
        given = dict(zip(call.names, ctx.saved_tensors, strict=True))
        if is_plain(factor):
            weights = _names(call.kernel).weights & given.keys()
            gradients = call((given | {name: given[name] * factor for name in weights}).values(), call.students)[1:]
        else:  # several factors at once: the gradient in float32 serves them all
            wide = _names(call.kernel).tensors & given.keys()
            gradients = call((given | {name: given[name].float() for name in wide}).values(), call.students)[1:]
            gradients = [(g * factor).to(given[name].dtype) for name, g in zip(call.students, gradients, strict=True)]
        return None, None, *gradients


def refuse_second_derivatives() -> None:
    """Raises inside a backward() that would be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "expected backward() with create_graph=False, got True; pykd has first derivatives only: leave this "
            "loss out of what you differentiate twice"
        )


def scaled(saved: Tensor, upstream: Tensor) -> Tensor:
    """saved · upstream, without new memory where the saved tensor is in use for the last time.

    That is where this backward pass frees its graph. Where the graph is kept, backward may come again, and whoever got
    the saved tensor might have written to it by then: that takes a product each time.
    """
    if not is_plain(upstream) or graph_is_kept():
        return saved * upstream
    if upstream.device.type == "cpu" and upstream.item() == 1.0:  # on a GPU, looking at it would wait for it
        return saved
    return saved.mul_(upstream)


def refuse_transforms(tensors: Mapping[str, Tensor], students: Collection[str], remedy: str) -> None:
    """Raises where forward-mode AD or a transform of ``torch.func`` would go through a kernel, which is no way for them.

    Backward-mode AD reaches every tensor that requires a gradient; these would find a constant without a word.
    """
    for name, tensor in tensors.items():
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            got = "it under a transform of torch.func (grad, vjp, jvp, vmap, jacrev, jacfwd, hessian)"
        elif name in students and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            got = "a dual tensor (forward-mode AD)"
        else:
            continue
        raise RuntimeError(
            f"expected {name} as a plain tensor for a fused kernel, which has backward() alone, got {got}; {remedy} there"
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether it is one tensor, and not several at once (vmap) or a stand-in."""
    wrapped = torch._C._functorch
    return (
        type(tensor) is Tensor and not wrapped.is_batchedtensor(tensor) and not wrapped.is_legacy_batchedtensor(tensor)
    )


def graph_is_kept() -> bool:
    """Whether this backward pass leaves the graph for another one."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


class _Names(NamedTuple):
    """Inputs of a kernel."""

    differentiable: frozenset[str] = frozenset()  # that have a gradient among the outputs
    weights: frozenset[str] = frozenset()  # of its values
    tensors: frozenset[str] = frozenset()  # of the floating type of a call


@functools.cache
def _names(kernel: str) -> _Names:
    described = {entry["name"]: entry for entry in json.loads(torch.ops.pykd.kernels())}
    if kernel not in described:  # the library will say so
        return _Names()
    inputs, outputs = ({each["name"]: each["role"] for each in described[kernel][way]} for way in ("inputs", "outputs"))
    return _Names(
        frozenset(name.removeprefix("grad_") for name in outputs if name.startswith("grad_")),
        frozenset("weight" if name == "value" else f"{name}_weight" for name in outputs) & inputs.keys(),
        frozenset(name for name, role in inputs.items() if role == "tensor"),
    )


def _text(attributes: Settings) -> str:
    return " ".join(
        f"{name}={value if isinstance(value, str) else repr(float(value))}" for name, value in attributes.items()
    )
