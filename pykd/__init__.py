"""Knowledge-distillation losses: one definition; the same numbers in PyTorch, TorchScript, ONNX Runtime and C++.

Everything public is here: every registered loss by its class name (``pykd.SoftTarget``), its formula as a
function in :mod:`pykd.functional`, :class:`DistillationLoss`, :func:`compose`, :func:`export`, :func:`load`.

Names are looked up on first use, so that ``pykd.load`` runs exported losses without importing torch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from pykd._version import __version__

if TYPE_CHECKING:
    from pykd.composition import Composition as Composition
    from pykd.composition import LossGraph as LossGraph
    from pykd.composition import Part as Part
    from pykd.composition import compose as compose
    from pykd.config import onnxruntime_ops_path as onnxruntime_ops_path
    from pykd.config import torch_ops_path as torch_ops_path
    from pykd.distillation_loss import DistillationLoss as DistillationLoss
    from pykd.export import export as export
    from pykd.export import verify as verify
    from pykd.registry import Case as Case
    from pykd.registry import Loss as Loss
    from pykd.registry import Scalar as Scalar
    from pykd.registry import Spec as Spec
    from pykd.registry import register as register
    from pykd.runtime import load as load

_HOME = {
    "Case": "pykd.registry",
    "Composition": "pykd.composition",
    "DistillationLoss": "pykd.distillation_loss",
    "Loss": "pykd.registry",
    "LossGraph": "pykd.composition",
    "Part": "pykd.composition",
    "Scalar": "pykd.registry",
    "Spec": "pykd.registry",
    "compose": "pykd.composition",
    "export": "pykd.export",
    "load": "pykd.runtime",
    "onnxruntime_ops_path": "pykd.config",
    "register": "pykd.registry",
    "torch_ops_path": "pykd.config",
    "verify": "pykd.export",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "export":  # a package that can be called: pykd.export(loss, "folder")
        value = importlib.import_module("pykd.export")
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif importlib.util.find_spec(f"pykd.{name}") is not None:
        return importlib.import_module(f"pykd.{name}")
    elif name in _losses():
        value = _losses()[name]
    else:
        raise AttributeError(f"module 'pykd' has no attribute {name!r}; `pykd list` shows every loss")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_losses()})


def _losses() -> dict[str, Any]:
    """Every registered loss by its class name."""
    registry = importlib.import_module("pykd.registry")
    registry.load_all()
    return {cls.__name__: cls for cls in registry.registered().values()}
