"""The fused kernels (``cpp/kernels/``) on torch tensors: one pass over memory for the value and the gradient.

The low level under ``fused=True`` in :mod:`pykd.functional`. Names of kernels, inputs, outputs and attributes are passed
on to the library, which checks them; ``torch.ops.pykd.kernels()`` describes what there is, as JSON.

:func:`fused_call` returns a kernel's outputs and knows nothing of autograd. :func:`fused_loss` is a loss with a
gradient. Both also work without this module, as ``torch.ops.pykd.kernel`` and ``torch.ops.pykd.loss``, once the library
is loaded (:func:`load`); ``torch.ops.pykd.loss`` goes into TorchScript and ``torch.compile`` as well, and costs two
more passes over memory than :func:`fused_loss`. What ``torch.compile`` traces gets that operator from
:func:`fused_loss`, too; call :func:`load` before.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
    ``requires_grad`` says. First derivatives only: ``create_graph=True`` raises. Rows of weight 0 count as 0 whatever
    their value is.

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
    students = []
    if torch.is_grad_enabled():
        students = [name for name, tensor in inputs.items() if tensor.requires_grad and name in _differentiable(kernel)]
    call = (kernel, list(inputs.values()), " ".join(inputs), _text(attributes or {}), " ".join(students))
    if not students:
        with torch.no_grad():
            value: Tensor = torch.ops.pykd.value_and_gradient(*call)[0]
    else:
        value = _Loss.apply(call, *(inputs[name] for name in students))  # type: ignore[no-untyped-call]
    return value


class _Loss(torch.autograd.Function):
    """What ``FusedLossFunction`` of ``pykd/torch_kernels.hpp`` is."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *students: Tensor) -> Tensor:
        value, *gradients = torch.ops.pykd.value_and_gradient(*call)
        ctx.save_for_backward(*gradients)
        result: Tensor = value
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        refuse_second_derivatives()
        return None, *(scaled(gradient, upstream[0]) for gradient in ctx.saved_tensors)


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
    if not _is_plain(upstream) or _graph_is_kept():
        return saved * upstream
    if upstream.device.type == "cpu" and upstream.item() == 1.0:  # on a GPU, looking at it would wait for it
        return saved
    return saved.mul_(upstream)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is one tensor, and not several at once (vmap) or a stand-in."""
    wrapped = torch._C._functorch
    return (
        type(tensor) is Tensor and not wrapped.is_batchedtensor(tensor) and not wrapped.is_legacy_batchedtensor(tensor)
    )


def _graph_is_kept() -> bool:
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


@functools.cache
def _differentiable(kernel: str) -> frozenset[str]:
    """The inputs that have a gradient among the outputs."""
    described = {entry["name"]: entry for entry in json.loads(torch.ops.pykd.kernels())}
    outputs = described[kernel]["outputs"] if kernel in described else []  # else the library says that there is none
    return frozenset(output["name"].removeprefix("grad_") for output in outputs if output["name"].startswith("grad_"))


def _text(attributes: Settings) -> str:
    return " ".join(
        f"{name}={value if isinstance(value, str) else repr(float(value))}" for name, value in attributes.items()
    )
