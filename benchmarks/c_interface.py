"""A prepared call of ``pykd_kernel_run()``: what the C interface itself takes, without the way there from Python."""

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import torch

from pykd import config

# pykd_dtype of pykd.h
_DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4, torch.int64: 5}
_LENGTHS = ctypes.POINTER(ctypes.c_int64)


class _Tensor(ctypes.Structure):
    """pykd_tensor of pykd.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int32),
        ("shape", _LENGTHS),
        ("strides", _LENGTHS),
        ("device", ctypes.c_int),
        ("device_id", ctypes.c_int32),
        ("extension", ctypes.c_void_p),
    )


class _Attribute(ctypes.Structure):
    """pykd_kernel_attribute of kernels.h."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_double), ("choice", ctypes.c_char_p))


@functools.cache
def library() -> ctypes.CDLL:
    """libpykd."""
    found = ctypes.CDLL(str(config.library()))
    found.pykd_last_error.restype = ctypes.c_char_p
    return found


class KernelCall:
    """The arguments of one call, on the CPU; the tensors are kept alive."""

    def __init__(
        self,
        kernel: str,
        inputs: Mapping[str, torch.Tensor],
        attributes: Mapping[str, Any],
        outputs: Mapping[str, torch.Tensor],
    ) -> None:
        self._run = library().pykd_kernel_run
        self._tensors = (dict(inputs), dict(outputs))
        settings = (_Attribute * len(attributes))()
        for setting, (name, value) in zip(settings, attributes.items(), strict=True):
            setting.name = name.encode()
            if isinstance(value, str):
                setting.choice = value.encode()
            else:
                setting.value = float(value)
        count = ctypes.c_size_t
        self._arguments = (
            kernel.encode(), _views(inputs), count(len(inputs)), settings, count(len(attributes)), _views(outputs),
            count(len(outputs)), None,
        )  # fmt: skip

    def run(self) -> None:
        if self._run(*self._arguments) != 0:
            raise RuntimeError(library().pykd_last_error().decode())


def _views(tensors: Mapping[str, torch.Tensor]) -> Any:
    views = (_Tensor * len(tensors))()
    for view, (name, tensor) in zip(views, tensors.items(), strict=True):
        shape = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
        view.name, view.data, view.dtype = name.encode(), tensor.data_ptr(), _DTYPES[tensor.dtype]
        view.rank, view.shape = tensor.dim(), ctypes.cast(shape, _LENGTHS)
    return views
