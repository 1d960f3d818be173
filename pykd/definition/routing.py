"""Which way a call goes: by the formula, or by a fused kernel.

``kernels`` of a call, of a loss or of :func:`set_kernels` says what is wanted:

- ``"auto"``: the kernel wherever one covers the settings, the types and the device of a call, and the formula elsewhere: in
  code that is compiled, exported, scripted or traced, under the transforms of ``torch.func``, in forward-mode AD, for
  float64, and for numbers that require a gradient.
- ``"on"``: the kernel, or an error that says why not.
- ``"off"``: the formula.

The word of a call counts more than that of the loss, and that more than the default. This module knows no kernel: it asks
:data:`evaluator`, which :mod:`pykd.fused` provides.
"""

import contextvars
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad

KERNELS = ("auto", "on", "off")


class Evaluator(Protocol):
    """What computes losses by their kernels."""

    def loss(self, loss: Any, call: Any) -> Tensor:
        """A loss, with autograd, of a :class:`pykd.definition.plan.PlannedCall` for which it has a kernel, or blocks."""

    def by_blocks(self, loss: Any, given: Mapping[str, Any]) -> Tensor:
        """A loss by blocks of rows, with autograd, of tensors and numbers by name."""

    def refusal(self, loss: Any, tensors: Mapping[str, Tensor]) -> str:
        """Why no kernel computes such a call, whatever its numbers are; empty where one does."""


evaluator: Evaluator | None = None
least_entries = (
    0  # of the largest matrix of a loss that goes by blocks of rows without being told to; pykd.fused sets it
)
_default = "auto"
_block: contextvars.ContextVar[str | None] = contextvars.ContextVar("pykd_kernels", default=None)
_ran: contextvars.ContextVar["Ran | None"] = contextvars.ContextVar("pykd_ran", default=None)
_ORDINARY = (Tensor, torch.nn.Parameter)


class Ran:
    """What computed the losses of a block.

    Attributes:
        kernels: the kernels that ran, in order.
        formulas: for every loss that was computed by its formula, why.
    """

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.formulas: list[str] = []

    def __repr__(self) -> str:
        return f"Ran(kernels={self.kernels}, formulas={self.formulas})"


def set_kernels(kernels: str) -> None:
    """Sets the default of ``kernels`` in this process: ``"auto"`` (as it starts), ``"on"`` or ``"off"``.

    Example:
        >>> pykd.set_kernels("off")  # every loss by its formula
        >>> pykd.set_kernels("auto")
    """
    global _default
    _default = _word(kernels)


@contextmanager
def using_kernels(kernels: str | None = None) -> Iterator[Ran]:
    """Sets the default of ``kernels`` for a block, in this thread, and tells what computed the losses in it.

    Args:
        kernels: ``"auto"``, ``"on"``, ``"off"``; None: as it is.

    Yields:
        a :class:`Ran`, whose ``kernels`` and ``formulas`` grow with every call.

    Example:
        >>> student, teacher = torch.zeros(2, 3), torch.ones(2, 3)
        >>> with pykd.using_kernels() as ran:
        ...     loss = pykd.SoftTarget()(student, teacher)
        ...     loss = pykd.SoftTarget()(student.double(), teacher.double())
        >>> ran.kernels
        ['soft_target']
        >>> ran.formulas
        ['soft_target: no kernel computes float64']
    """
    ran = Ran()
    before = _block.set(_block.get() if kernels is None else _word(kernels)), _ran.set(ran)
    try:
        yield ran
    finally:
        _block.reset(before[0])
        _ran.reset(before[1])


def _word(kernels: Any) -> str:
    if kernels not in KERNELS:
        raise ValueError(
            f"expected kernels to be {' or '.join(map(repr, KERNELS))}, got {kernels!r}; pass one of these"
        )
    return str(kernels)


def checked(kernels: Any) -> str | None:
    """``kernels`` of a loss, which may be None: the default."""
    return None if kernels is None else _word(kernels)


def wanted(*words: str | None) -> str:
    """What counts of ``kernels`` of a call, of a loss, and so on; the first that is not None."""
    for word in words:
        if word is not None:
            return _word(word)
    if torch.compiler.is_compiling():  # which cannot ask a context
        return _default
    return _block.get() or _default


def obstacle() -> str:
    """Why no kernel may run just now, whatever the tensors are; empty where one may."""
    if torch.compiler.is_compiling():  # first: what follows is not for it
        return "torch.compile and torch.export take the formula"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace takes the formula"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "the transforms of torch.func (grad, vjp, jvp, vmap, jacrev, jacfwd, hessian) take the formula"
    if torch._C._len_torch_dispatch_stack() > 0 or _len_torch_dispatch_stack_pre_dispatch() > 0:  # type: ignore[no-untyped-call]
        return "a mode that sees every operator of torch takes the formula"
    if forward_ad._current_level >= 0:
        return "forward-mode AD takes the formula"
    return ""


def is_ordinary(tensor: Any) -> bool:
    """Whether it is a tensor with memory of its own, and nothing that stands for one."""
    return type(tensor) in _ORDINARY


def number(name: str, scalar: Any, value: Any) -> Any:
    """A number of a call, checked: a float, or the tensor of one that is learned, without axes."""
    checked_number = scalar.check(name, value)
    is_learned = isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()
    return value.reshape(()) if is_learned else checked_number


def without_axes(numbers: Mapping[str, Any], tensors: Iterable[Any]) -> Mapping[str, Any]:
    """Numbers of a call as formulas take them: a tensor of one has no axes, which values would take over, and the type that they
    compute these tensors in."""
    if not any(isinstance(number, Tensor) for number in numbers.values()):
        return numbers
    wide = any(isinstance(tensor, Tensor) and tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if wide else torch.float32
    return {
        name: number.reshape(()).to(dtype) if isinstance(number, Tensor) else number for name, number in numbers.items()
    }


def learned(numbers: Mapping[str, Any]) -> str:
    """Why these numbers take the formula; empty where they do not."""
    for name, number in numbers.items():
        if isinstance(number, Tensor) and number.requires_grad and torch.is_grad_enabled():
            return f"{name} requires a gradient, and kernels have those of tensors alone"
    return ""


def note_kernel(name: str) -> None:
    """A kernel ran."""
    ran = _ran.get()
    if ran is not None:
        ran.kernels.append(name)


def note_formula(loss: str, why: str, mode: str) -> None:
    """A loss is computed by its formula; an error where that is not what was asked for."""
    if mode == "on":
        raise RuntimeError(
            f'expected a call that a fused kernel computes for kernels="on", got one of {loss} that none does: {why}; '
            'pass kernels="auto"'
        )
    ran = None if torch.compiler.is_compiling() else _ran.get()
    if ran is not None:
        ran.formulas.append(f"{loss}: {why}")
