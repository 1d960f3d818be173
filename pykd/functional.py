"""The formulas as functions: ``pykd.functional.soft_target(student_logits, teacher_logits, temperature=4.0)``.

Each function is the one that the loss of the same name computes with; it takes tensors and settings in one
call, is scriptable, and does not check its inputs. See the class for the specification.
"""

import sys
from typing import Any

from pykd import registry


def __getattr__(name: str) -> Any:
    registry.load_all()
    cls = registry.registered().get(name)
    if cls is None:
        raise AttributeError(f"module 'pykd.functional' has no attribute {name!r}; it has {', '.join(__dir__())}")
    return getattr(sys.modules[cls.__module__], name)


def __dir__() -> list[str]:
    registry.load_all()
    return list(registry.registered())
