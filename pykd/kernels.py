"""The fused kernels on raw tensors, through libpykd alone: no torch, no ONNX Runtime.

    >>> import numpy as np
    >>> from pykd import kernels
    >>> student = np.array([[1, 2, 3], [3, 2, 1]], np.float32)
    >>> teacher = np.array([[0, 2, 4], [4, 2, 0]], np.float32)
    >>> value, gradient = np.empty(2, np.float32), np.empty_like(student)
    >>> kernels.run(
    ...     "soft_target",
    ...     {"student": student, "teacher": teacher, "temperature": 2.0, "soft_weight": np.full(2, 0.5, np.float32)},
    ...     {"form": "kl"},
    ...     {"soft": value, "grad_student": gradient},
    ... )

This is the low level, for tests, measurements and programs that hold raw memory. An exported loss runs with them by
itself (:func:`pykd.load`), and so does a loss in torch (:func:`pykd.set_kernels`). Which kernels
there are :func:`descriptions` tells.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from pykd import _core

__all__ = ["descriptions", "run", "simd_targets", "use_simd"]


def descriptions() -> dict[str, dict[str, Any]]:
    """What every kernel takes and returns, by its name.

    Each has ``"inputs"`` (dicts with ``"name"``, ``"axes"``, ``"role"``, ``"optional"``), ``"outputs"`` (the same, all of
    them optional), ``"attributes"`` (``"name"``, ``"default"``, ``"choices"``) and ``"dtypes"``. Equal names of axes mean
    equal lengths. Roles: ``"tensor"`` has one of the dtypes, the same for all tensors of a call; ``"float32"`` has that
    dtype always; ``"number"`` is one float32 in the CPU's memory; ``"index"`` is int64.
    """
    objects = map(json.loads, _core.kernel_descriptions())
    return {kernel["name"]: kernel for kernel in objects}


def run(
    name: str,
    inputs: dict[str, Any],
    attributes: dict[str, str | float],
    outputs: dict[str, Any],
    threads: int = 0,
    cuda_stream: int | None = None,
) -> None:
    """Runs a kernel, and writes into the memory of ``outputs``.

    Args:
        name: of the kernel.
        inputs: contiguous tensors by name (NumPy arrays, torch tensors, anything with ``__dlpack__``), read where they lie;
            a Python number will do for ``"number"``. Optional ones may be left out.
        attributes: those that differ from their default.
        outputs: tensors to write into, by name: those that are wanted. A gradient comes out multiplied by the weights
            that went in.
        threads: that may work at once on the CPU; 0: one per core. The numbers do not depend on it.
        cuda_stream: the ``cudaStream_t``, as an integer, on which work for CUDA tensors is queued; None: torch's
            current stream where a tensor is torch's, else CUDA's default stream. The call does not wait for it.

    Raises:
        ValueError: a name, shape or setting is wrong, or the arguments do not go together.
        TypeError: something is no tensor, or has the wrong dtype or device.
        RuntimeError: no kernel covers that dtype or device; the message says why.
    """
    if cuda_stream is None:
        cuda_stream = _current_stream([*inputs.values(), *outputs.values()])
    _core.run_kernel(
        name,
        {key: _input(value) for key, value in inputs.items()},
        attributes,
        {key: _marked(value) for key, value in outputs.items()},
        threads,
        cuda_stream,
    )


def simd_targets() -> tuple[str, ...]:
    """The SIMD instruction sets that the kernels were compiled for and this processor has, best first."""
    return tuple(_core.simd_targets().split())


def use_simd(target: str | None) -> None:
    """Makes the kernels use that one of :func:`simd_targets`; None: the best. Not while a kernel runs."""
    _core.use_simd(target)


def _current_stream(tensors: list[Any]) -> int:
    """The stream that torch queues its work on, for the device of its first tensor on CUDA; 0 where there is none."""
    torch: Any = sys.modules.get("torch")
    for tensor in tensors if torch else ():
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            return int(torch.cuda.current_stream(tensor.device).cuda_stream)
    return 0


def _input(value: Any) -> Any:
    if isinstance(value, (int, float, np.floating)):
        return np.asarray(value, np.float32)
    if getattr(value, "requires_grad", False):  # of torch; its memory is what is wanted
        return value.detach()
    return _marked(value)


def _marked(array: Any) -> Any:
    """NumPy hands out no bfloat16 of its own: such values go as uint16, marked as what they are by a tuple."""
    if isinstance(array, np.ndarray) and array.dtype.name == "bfloat16":
        return (array.view(np.uint16),)
    return array
