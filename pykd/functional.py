"""The formulas as functions: ``pykd.functional.soft_target(student_logits, teacher_logits, temperature=4.0)``.

Each function is the one that the loss of the same name computes with; it takes tensors and settings in one
call, can be scripted (``torch.jit.script(pykd.functional.soft_target)``), and does not check its inputs. See the
class for the specification.

``fused=True`` computes the same through the loss's fused kernel, where it has one: worth it for large inputs. Then
inputs are checked, only first derivatives exist, and a call that no kernel covers is an error (:mod:`pykd.fused`).
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pykd.definition import Loss, registry

if TYPE_CHECKING:
    from pykd.losses._formulas import *  # noqa: F403  all of them, by scripts/stubs
else:

    def __getattr__(name: str) -> Any:
        if not registry.is_registered(name):
            registry.load_all()
        if not registry.is_registered(name):
            raise AttributeError(f"module 'pykd.functional' has no attribute {name!r}; it has {', '.join(__dir__())}")
        return _with_fused(name)


def __dir__() -> list[str]:
    registry.load_all()
    return list(registry.registered())


@functools.cache
def _with_fused(name: str) -> Callable[..., Any]:
    """The formula of a loss, with the argument ``fused``."""
    cls = registry.get(name)
    formula: Callable[..., Any] = getattr(sys.modules[cls.__module__], name)
    signature = inspect.signature(formula)

    @functools.wraps(formula)
    def call(*args: Any, fused: bool = False, **kwargs: Any) -> Any:
        if not fused:
            return formula(*args, **kwargs)
        from pykd.fused import autograd

        given = signature.bind(*args, **kwargs).arguments
        tensors = {name: value for name, value in given.items() if name in cls.inputs and value is not None}
        numbers = {name: value for name, value in given.items() if name in cls.scalars}
        settings = {name: value for name, value in given.items() if name not in cls.inputs and name not in numbers}
        try:
            loss = _with_settings(name, tuple(settings.items()))
        except TypeError:  # a setting that cannot be hashed
            loss = cls(**settings)
        loss.check_call({**tensors, **numbers})
        return autograd.evaluate(loss, tensors, numbers)

    call.__module__, call.__qualname__ = __name__, name  # where it is found again, by pickle as well
    # torch.jit.script takes the formula itself.
    call.__script_if_tracing_wrapper = True  # type: ignore[attr-defined]
    call.__original_fn = formula  # type: ignore[attr-defined]
    return call


@functools.lru_cache(maxsize=256)
def _with_settings(name: str, settings: tuple[tuple[str, Any], ...]) -> Loss:
    """The loss with these settings: making it takes longer than a small call."""
    return registry.get(name)(**dict(settings))
