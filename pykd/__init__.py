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
    from pykd import distributed as distributed
    from pykd import functional as functional
    from pykd import kernels as kernels
    from pykd import losses as losses
    from pykd import recipe as recipe
    from pykd import schedules as schedules
    from pykd import torch_kernels as torch_kernels
    from pykd.composition import Composition as Composition
    from pykd.composition import DistillationLoss as DistillationLoss
    from pykd.composition import LossGraph as LossGraph
    from pykd.composition import Part as Part
    from pykd.composition import compose as compose
    from pykd.config import onnxruntime_ops_path as onnxruntime_ops_path
    from pykd.config import torch_ops_path as torch_ops_path
    from pykd.definition import Alias as Alias
    from pykd.definition import Case as Case
    from pykd.definition import Loss as Loss
    from pykd.definition import Scalar as Scalar
    from pykd.definition import Spec as Spec
    from pykd.definition import get as get
    from pykd.definition import register as register
    from pykd.definition import set_kernels as set_kernels
    from pykd.definition import using_kernels as using_kernels
    from pykd.export import export as export
    from pykd.export import verify as verify
    from pykd.losses import *  # noqa: F403  all of them, by scripts/stubs
    from pykd.runtime import load as load

_HOME = {
    "Alias": "pykd.definition",
    "Case": "pykd.definition",
    "Composition": "pykd.composition",
    "DistillationLoss": "pykd.composition",
    "Loss": "pykd.definition",
    "LossGraph": "pykd.composition",
    "Part": "pykd.composition",
    "Scalar": "pykd.definition",
    "Spec": "pykd.definition",
    "compose": "pykd.composition",
    "export": "pykd.export",
    "get": "pykd.definition",
    "load": "pykd.runtime",
    "onnxruntime_ops_path": "pykd.config",
    "register": "pykd.definition",
    "set_kernels": "pykd.definition",
    "torch_ops_path": "pykd.config",
    "using_kernels": "pykd.definition",
    "verify": "pykd.export",
}

__all__ = ["__version__", *_HOME]


if not TYPE_CHECKING:  # who would take any name

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
    registry = importlib.import_module("pykd.definition.registry")
    registry.load_all()
    return {cls.__name__: cls for cls in registry.registered().values()}
