"""Tensors that say that they lie on a GPU, without one: how their memory is borrowed, and on which stream they are used."""

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pykd import kernels
from pykd import kernels as library
from tests import dlpack


def tensor_type(of_torch: bool, asked: list[str]) -> type:
    """A type whose tensors lie on cuda:3 and offer themselves to C; `asked`: each time that `__dlpack__` is called."""
    numbers = (ctypes.c_float * 6)()
    shape = (ctypes.c_int64 * 2)(2, 3)
    there = dlpack.Tensor(ctypes.addressof(numbers), 2, 3, 2, 2, 32, 1, ctypes.addressof(shape), None, 0)
    versioned = dlpack.Versioned(1, 0, None, None, 0, there)

    @dlpack.FromObject
    def from_object(_: Any, target: Any) -> int:
        target[0] = ctypes.addressof(versioned)
        return 0

    exchange = dlpack.Exchange(1, 3, None, None, from_object)

    def ask(self: Any, **keywords: Any) -> Any:
        asked.append(repr(keywords.get("stream")))
        raise BufferError("another device is current")

    members: dict[str, Any] = {
        "__dlpack_c_exchange_api__": dlpack.capsule_of(exchange, b"dlpack_exchange_api"),
        "__dlpack__": ask,
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
    monkeypatch.setattr(library._core, "run_kernel", lambda *arguments: streams.append(arguments[-1]))
    kernels.run("soft_target", {"student": torch.ones(1, 2).as_subclass(OnDevice)}, {}, {}, cuda_stream=given)
    kernels.run("soft_target", {"student": np.ones((1, 2), np.float32)}, {}, {}, cuda_stream=given)
    assert streams == [used, given or 0]
