"""Tensors that say that they lie on a GPU, without one: how their memory is borrowed, and on which stream they are used."""

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pykd import kernels


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    )


FromObject = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))


class Exchange(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("from_object", FromObject),
        ("rest", ctypes.c_void_p * 3),
    )


def tensor_type(of_torch: bool, asked: list[str]) -> type:
    """A type whose tensors lie on cuda:3 and offer themselves to C; `asked`: each time that `__dlpack__` is called."""
    numbers = (ctypes.c_float * 6)()
    shape = (ctypes.c_int64 * 2)(2, 3)
    there = DLTensor(ctypes.addressof(numbers), 2, 3, 2, 2, 32, 1, ctypes.addressof(shape), None, 0)
    versioned = Versioned(1, 0, None, None, 0, there)

    @FromObject
    def from_object(_: Any, target: Any) -> int:
        target[0] = ctypes.addressof(versioned)
        return 0

    exchange = Exchange(1, 3, None, None, from_object)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

    def dlpack(self: Any, **keywords: Any) -> Any:
        asked.append(repr(keywords.get("stream")))
        raise BufferError("another device is current")

    members: dict[str, Any] = {
        "__dlpack_c_exchange_api__": new_capsule(ctypes.addressof(exchange), b"dlpack_exchange_api", None),
        "__dlpack__": dlpack,
        "keep": (numbers, shape, versioned, from_object, exchange),
    }
    if of_torch:
        members |= {"is_neg": lambda self: False, "requires_grad": False}
    return type("Tensor", (), members)


def run(tensor: Any) -> None:
    """On a machine without a GPU, this fails at the latest where the library for CUDA says so."""
    inputs = {"student": tensor, "labels": np.zeros(2, np.int64)}
    kernels.run("soft_target", inputs, {}, {"hard": np.zeros(2, np.float32)})


def test_torchs_memory_is_borrowed_without_an_event_on_a_stream() -> None:
    # __dlpack__ would make the default stream wait for torch's, which ends a capture, and refuses a device that is not current.
    asked: list[str] = []
    with pytest.raises(TypeError, match=r"labels on cuda:3, as student is"):
        run(tensor_type(of_torch=True, asked=asked)())
    assert asked == []


def test_others_are_asked_so_that_they_wait() -> None:
    asked: list[str] = []
    with pytest.raises(TypeError, match="another device is current"):
        run(tensor_type(of_torch=False, asked=asked)())
    assert asked[0] == "None"


def test_a_subclass_of_torchs_is_asked_without_a_stream() -> None:
    asked: list[Any] = []

    class Subclass(torch.Tensor):
        def __dlpack__(self, *, stream: Any = None, **keywords: Any) -> Any:
            asked.append(stream)
            return super().__dlpack__(stream=stream, **keywords)

    student = torch.tensor([[1.0, 2.0]]).as_subclass(Subclass)
    value = np.zeros(1, np.float32)
    kernels.run("soft_target", {"student": student, "labels": np.zeros(1, np.int64)}, {}, {"hard": value})
    assert asked == [-1]
    assert value[0] == pytest.approx(np.log1p(np.e))


@pytest.mark.parametrize(("given", "used"), [(None, 77), (0, 0), (5, 5)])
def test_a_kernel_runs_on_torchs_current_stream(monkeypatch: pytest.MonkeyPatch, given: int | None, used: int) -> None:
    class OnDevice(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    streams = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(kernels._core, "run_kernel", lambda *arguments: streams.append(arguments[-1]))
    kernels.run("soft_target", {"student": torch.ones(1, 2).as_subclass(OnDevice)}, {}, {}, cuda_stream=given)
    kernels.run("soft_target", {"student": np.ones((1, 2), np.float32)}, {}, {}, cuda_stream=given)
    assert streams == [used, given or 0]
