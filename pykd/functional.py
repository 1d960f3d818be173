"""The formulas as functions: ``pykd.functional.soft_target(student_logits, teacher_logits, temperature=4.0)``.

Each function is the one that the loss of the same name computes with; it takes tensors and settings in one
call, can be scripted (``torch.jit.script(pykd.functional.soft_target)``), and does not check its inputs. See the
class for the specification.

Where the loss has a fused kernel that covers a call, the kernel computes it; ``kernels="off"`` (or ``"on"``) in a call, or
:func:`pykd.set_kernels`, says otherwise. A kernel's inputs are checked; a call that does not fit is the formula's, or an error
with ``kernels="on"``. What TorchScript and ``torch.compile`` read is the formula itself, without the argument ``kernels``.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pykd.definition import Loss, registry, routing

if TYPE_CHECKING:
    from pykd.losses._formulas import *  # noqa: F403  all of them, by scripts/stubs
else:

    def __getattr__(name: str) -> Any:
        if not registry.is_registered(name):
            registry.load_all()
        if not registry.is_registered(name):
            raise AttributeError(f"module 'pykd.functional' has no attribute {name!r}; it has {', '.join(__dir__())}")
        return _routed(name)


def __dir__() -> list[str]:
    registry.load_all()
    return list(registry.registered())


@functools.cache
def _routed(name: str) -> Callable[..., Any]:
    """The formula of a loss, or its kernel, with the argument ``kernels``."""
    cls = registry.get(name)
    formula = cls._formula
    if not cls.is_accelerated():

        @functools.wraps(formula)
        def by_formula(*args: Any, kernels: str | None = None, **kwargs: Any) -> Any:
            routing.note_formula(name, routing.obstacle() or cls.without_kernel(), routing.wanted(kernels))
            return formula(*args, **kwargs)

        return _named(by_formula, name, formula)
    parameters = tuple(inspect.signature(formula).parameters)

    @functools.wraps(formula)
    def call(*args: Any, kernels: str | None = None, **kwargs: Any) -> Any:
        mode = routing.wanted(kernels)
        why = routing.obstacle() or ('kernels="off"' if mode == "off" else "")
        if not why and len(args) <= len(parameters):
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            settings = tuple([item for item in given.items() if item[0] not in cls._arguments])
            try:
                if any(isinstance(value, Tensor) for _, value in settings):
                    raise TypeError("a setting is a tensor")
                loss = _with_settings(name, settings)
                tensors_and_numbers = {key: value for key, value in given.items() if key in cls._arguments}
                planned = loss.planned(loss.flat_arguments((), tensors_and_numbers))
            except (TypeError, ValueError) as error:  # not what the loss takes; the formula may take it all the same
                if mode == "on":
                    raise
                planned, why = None, str(error)
            if planned is not None:
                why = loss.why_formula(planned, mode)
                if not why:
                    return loss.compute_by_kernel(planned)
        routing.note_formula(name, why or "a tensor stands for others", mode)
        return formula(*args, **kwargs)

    return _named(call, name, formula)


def _named(call: Any, name: str, formula: Any) -> Callable[..., Any]:
    """The function with its public name, as torch.jit.script and torch.compile are to see it."""
    call.__module__, call.__qualname__ = __name__, name  # where it is found again, by pickle as well
    call.__script_if_tracing_wrapper = True
    call.__original_fn = formula
    public: Callable[..., Any] = call
    return public


@functools.lru_cache(maxsize=256)
def _with_settings(name: str, settings: tuple[tuple[str, Any], ...]) -> Loss:
    """The loss with these settings: making it takes longer than a small call."""
    return registry.get(name)(**dict(settings))
