"""Runs exported losses from Python, by libpykd: the code that C++ programs run, on the same files.

    >>> import numpy as np, pykd
    >>> loss = pykd.load("build/losses/hard_soft")
    >>> result = loss.value_and_gradient(
    ...     student_logits=np.array([[2.0, 0.0]], np.float32),
    ...     teacher_logits=np.array([[1.0, 1.0]], np.float32),
    ...     labels=np.array([0]),
    ...     soft_temperature=4.0)
    >>> result["loss"], result["grad_student_logits"]

It needs NumPy and nothing else: torch is imported where a TorchScript file is loaded, never otherwise.
"""

from __future__ import annotations

import difflib
import glob
import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pykd import _core

__all__ = ["LoadedLoss", "Loss", "ParameterInfo", "Signature", "TensorInfo", "load"]

_DEFAULT_STREAM = 1  # cudaStreamLegacy: the default stream's other name, where 0 says that none was named


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a loss."""

    name: str
    axes: tuple[str, ...]  # equal names mean equal lengths, across all tensors of a call
    dtypes: tuple[str, ...]  # those it may have; all floating tensors of a call have the same
    gradient: bool  # an input: it receives a gradient. An output: it is one
    least_lengths: tuple[int, ...]  # along each axis


@dataclass(frozen=True)
class ParameterInfo:
    """One scalar that every call may set."""

    name: str
    default: float
    minimum: float | None
    minimum_exclusive: bool
    maximum: float | None


@dataclass(frozen=True, repr=False)
class Signature:
    """What a loss takes and returns; printed, it is a table."""

    inputs: tuple[TensorInfo, ...]
    parameters: tuple[ParameterInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def __repr__(self) -> str:
        rows = [("input", *_row(info), "gradient" if info.gradient else "") for info in self.inputs]
        for parameter in self.parameters:
            bounds = []
            if parameter.minimum is not None:
                bounds.append(f"{'>' if parameter.minimum_exclusive else '>='} {parameter.minimum:g}")
            if parameter.maximum is not None:
                bounds.append(f"<= {parameter.maximum:g}")
            rows.append(("parameter", parameter.name, f"{parameter.default:g}", ", ".join(bounds), ""))
        rows += [("output", *_row(info), "") for info in self.outputs]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def _row(info: TensorInfo) -> tuple[str, str, str]:
    dtypes = "any float" if len(info.dtypes) > 1 else info.dtypes[0]
    axes = [
        axis if least == 1 else f"{axis} >= {least}" for axis, least in zip(info.axes, info.least_lengths, strict=True)
    ]
    return info.name, f"({', '.join(axes)})", dtypes


class LoadedLoss:
    """A loaded loss. Immutable; any number of threads may call it at once, and calls release the GIL.

    :func:`load` makes it. ``print(loss.signature)`` shows what it takes and returns.
    """

    __slots__ = (
        "_core",
        "_everything",
        "_fixed",
        "_metadata",
        "_parameters",
        "_signature",
        "_stream",
        "_values",
        "_weights",
    )

    def __init__(self, core: _core.Loss, cuda_stream: int | None) -> None:
        self._core = core
        self._stream = cuda_stream
        self._metadata: dict[str, Any] = json.loads(core.metadata)
        self._signature = Signature(
            tuple(TensorInfo(*info) for info in core.inputs),
            tuple(
                ParameterInfo(
                    name,
                    default,
                    None if math.isinf(minimum) else minimum,
                    exclusive,
                    None if math.isinf(maximum) else maximum,
                )
                for name, default, minimum, exclusive, maximum in core.parameters
            ),
            tuple(TensorInfo(*info) for info in core.outputs),
        )
        self._parameters = frozenset(info.name for info in self._signature.parameters)
        self._fixed: dict[str, float] = {}
        if self._metadata.get("parameters_as") == "fixed":
            self._fixed = {entry["name"]: entry["default"] for entry in self._metadata["parameters"]}
        self._weights = frozenset(e["name"] for e in self._metadata.get("inputs", ()) if e.get("role") == "weight")
        self._values = tuple(info.name for info in self._signature.outputs if not info.gradient)
        self._everything = tuple(info.name for info in self._signature.outputs)

    @property
    def metadata(self) -> dict[str, Any]:
        """What the artefact says of itself (docs/artefacts.md); a copy."""
        return json.loads(self._core.metadata)  # type: ignore[no-any-return]

    @property
    def signature(self) -> Signature:
        """The inputs, parameters and outputs."""
        return self._signature

    @property
    def engine(self) -> str:
        """What runs it: ``"onnxruntime"`` or ``"torchscript"``."""
        return self._core.engine

    @property
    def engine_version(self) -> str:
        """The version of that engine, such as ``"1.32.0"``."""
        return self._core.engine_version

    @property
    def device(self) -> str:
        """Where it runs, as it was asked for: ``"cpu"``, ``"cuda:0"``."""
        return self._core.device

    @property
    def kernels_in_use(self) -> tuple[str, ...]:
        """The fused kernels that run it, such as ``("soft_target_float32",)``; empty where it runs without."""
        return tuple(self._core.kernels_in_use.split())

    @property
    def passed_over(self) -> str:
        """Why it is that engine, or no kernels, where the choice was free; empty where nothing was passed over."""
        return self._core.passed_over

    def __repr__(self) -> str:
        name = self._metadata.get("name", "loss")
        return f"<pykd loss {name!r}: {self.engine} {self.engine_version} on {self.device}>\n{self._signature!r}"

    def value(self, **tensors_and_parameters: Any) -> dict[str, Any]:
        """Computes the loss.

        Args:
            tensors_and_parameters: every input of the signature by name, and any of its parameters as a
                float, in place of its default. Tensors are NumPy arrays, torch tensors or other objects with
                ``__dlpack__``; they are read where they lie, without a copy, and must be contiguous. Weights of samples
                alone may be masks, integers or any floating type, and are converted to float32.
                Axes with equal names in the signature have equal lengths, at least 1, or more where it says so.

        Returns:
            A new dict with ``"loss"`` (scalar, in float32, or float64 for float64 inputs), each term by
            its name (scalar), and ``"loss_per_sample"`` and the like (batch) where they were exported; of an export with
            ``kind="score"`` these alone.
            Torch inputs give torch tensors on their device, detached; all others give NumPy arrays.

        Raises:
            ValueError: a name, shape, stride, label or parameter is wrong.
            TypeError: something is no tensor, or has the wrong dtype or device.
            RuntimeError: the engine failed.

        Example:
            >>> loss.value(student_logits=student, teacher_logits=teacher)["loss"]
            array(0.125, dtype=float32)
        """
        return self._run(self._values, tensors_and_parameters)

    def value_and_gradient(self, **tensors_and_parameters: Any) -> dict[str, Any]:
        """Computes the loss and its gradient with respect to the student's tensors.

        Arguments, results and errors are those of :meth:`value`. In addition the dict has
        ``"grad_<input>"`` for each input that receives a gradient, with the shape and the dtype of that
        input: d(loss)/d(input), times the parameter ``grad_scale`` (default 1), which is applied
        before the gradient is rounded to float16 or bfloat16. A ValueError where the artefact holds
        the value alone (``loss.onnx``) or scores (``score.onnx``).

        The results take no part in torch's autograd. In a training loop hand them on:

            >>> result = loss.value_and_gradient(student_logits=logits, teacher_logits=teacher)
            >>> logits.backward(result["grad_student_logits"])
        """
        if self._values == self._everything and "loss" not in self._values:
            raise ValueError(
                "expected an artefact with gradients, got scores of samples (kind='score'), which have none; call value(), or "
                "export the loss with kind='loss'"
            )
        if self._values == self._everything:
            raise ValueError(
                "expected an artefact with gradients, got one that holds the value alone; load "
                "loss.grad.onnx, loss.pt or their folder"
            )
        return self._run(self._everything, tensors_and_parameters)

    def _run(self, names: tuple[str, ...], arguments: dict[str, Any]) -> dict[str, Any]:
        torch = sys.modules.get("torch")
        tensor_type = None if torch is None else torch.Tensor
        torch_device = None
        any_bfloat16 = False
        inputs: dict[str, Any] = {}
        parameters: dict[str, Any] = {}
        for name, argument in arguments.items():
            if name in self._weights:
                argument = _as_float32(argument)
            if name in self._parameters:
                parameters[name] = argument
            elif name in self._fixed:
                raise ValueError(self._fixed_parameter(name, argument))
            elif type(argument) is np.ndarray:
                if argument.dtype.kind == "V":
                    argument, any_bfloat16 = _bfloat16_as_uint16(argument), True
                inputs[name] = argument
            elif tensor_type is not None and isinstance(argument, tensor_type):
                inputs[name] = argument.detach() if argument.requires_grad else argument
                if torch_device is None or argument.is_cuda:
                    torch_device = argument.device
            elif isinstance(argument, (int, float)):
                raise ValueError(self._unknown_parameter(name))
            else:
                inputs[name], any_bfloat16 = argument, True  # it may be
        if torch_device is not None:
            return self._run_torch(torch, torch_device, inputs, parameters, names)
        results = self._core.run_into_new(inputs, parameters, names, _new_array)
        if any_bfloat16:
            for name, array in results.items():
                if array.dtype == np.uint16:
                    results[name] = array.view(_bfloat16())
        return results

    def _fixed_parameter(self, name: str, argument: Any) -> str:
        return (
            f"expected no value for the parameter {name}, which is fixed at {self._fixed[name]:g} here, got {argument}; "
            'leave it out, or export the loss without parameters="fixed"'
        )

    def _unknown_parameter(self, name: str) -> str:
        if any(info.name == name for info in self._signature.inputs):
            return f"expected a tensor for the input {name}, got a number; pass an array of its axes"
        known = [info.name for info in self._signature.parameters]
        near = difflib.get_close_matches(name, known, 1)
        remedy = f"did you mean {near[0]}?" if near else "print(loss.signature) shows what it takes"
        return f"expected one of the parameters {', '.join(known) or '(none)'}, got {name}; {remedy}"

    def _run_torch(
        self,
        torch: Any,
        device: Any,
        inputs: dict[str, Any],
        parameters: dict[str, Any],
        names: tuple[str, ...],
    ) -> dict[str, Any]:
        def new_tensor(shape: tuple[int, ...], dtype: str) -> Any:
            kind = getattr(torch, dtype)
            if device.type == "cpu" and (size := math.prod(shape) * kind.itemsize) >= _core.kept_from:
                return torch.frombuffer(_core.allocate(size), dtype=kind).view(shape)
            return torch.empty(shape, dtype=kind, device=device)

        if device.type != "cuda" or self.engine == "torchscript":  # which uses torch's current stream
            return self._core.run_into_new(inputs, parameters, names, new_tensor)
        current = torch.cuda.current_stream(device)
        if self._stream is None:  # ONNX Runtime has a stream of its own, and waits for it before it returns
            current.synchronize()
            return self._core.run_into_new(inputs, parameters, names, new_tensor)
        if self._stream == current.cuda_stream:
            return self._core.run_into_new(inputs, parameters, names, new_tensor)
        if self._stream == 0:  # ExternalStream(0) is a new stream, not this one
            other = torch.cuda.default_stream(device)
        else:
            other = torch.cuda.ExternalStream(self._stream, device=device)
        other.wait_stream(current)
        results = self._core.run_into_new(inputs, parameters, names, new_tensor)
        current.wait_stream(other)
        return results


Loss = LoadedLoss  # as it was called when the definition, pykd.Loss, was no neighbour


def load(
    path: str | os.PathLike[str] | bytes,
    engine: str | None = None,
    device: str = "cpu",
    *,
    onnxruntime_library: str | os.PathLike[str] | None = None,
    threads: int = 0,
    check_integrity: bool = True,
    cuda_stream: int | None = None,
    kernels: str = "auto",
    trust: bool = True,
) -> LoadedLoss:
    """Loads an exported loss, ready to run.

    TorchScript files (``loss.pt``) are programs: load what is not your own with ``trust=False``, which reads data alone.
    ONNX files are checked before ONNX Runtime sees them.

    Args:
        path: the folder that :func:`pykd.export` wrote, or one of its files (``loss.onnx``: the value alone;
            ``loss.grad.onnx``: value and gradient; ``loss.pt``: both; ``score.onnx``: scores of samples), or the bytes of one
            such file.
        engine: ``"onnxruntime"`` or ``"torchscript"``; None takes the first of the two for which the file
            is there and the engine can be opened, and :attr:`LoadedLoss.passed_over` tells why it is not the first.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:<id>"``.
        onnxruntime_library: path of ``libonnxruntime.so``, which also says that the engine is
            ``"onnxruntime"``. None: the path in the environment variable ``PYKD_ONNXRUNTIME_LIBRARY``. A
            library that is named is used, or it is an error. Where none is: one that the process has loaded,
            else that of the installed wheel ``onnxruntime`` (or ``onnxruntime-gpu``), else the one that the
            system finds. The first one opened in a process serves all losses.
        threads: threads of ONNX Runtime; 0 means one per core, and 1 is best for small tensors. For
            TorchScript use ``torch.set_num_threads``.
        check_integrity: False accepts a file that a tool has rewritten after its export.
        cuda_stream: the ``cudaStream_t``, as an integer, on which ONNX Runtime works, such as
            ``torch.cuda.current_stream().cuda_stream``; 0 is CUDA's default stream, on which torch works
            unless told otherwise. None: a stream of ONNX Runtime's own. Calls with torch tensors are put in
            order with torch's current stream, whichever that is. TorchScript uses torch's current stream.
        kernels: whether ONNX files run with pykd's fused kernels, which need not read the tensors as often
            as the portable operators. ``"auto"``: wherever the file has a node that a kernel computes on
            that device. ``"on"``: the same, and a RuntimeError where it has none, or one that no kernel
            computes. ``"off"``: the portable operators that the file carries.
            :attr:`Loss.kernels_in_use` tells what came of it.
        trust: whether whoever wrote the files may run programs in this process. False takes the ONNX files or nothing, as
            ``engine="onnxruntime"`` does, which is also how C and C++ say it.

    Returns:
        The loss, with :meth:`Loss.value` and :meth:`Loss.value_and_gradient`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        TypeError: an argument is of another type than is said above.
        ValueError: the file is damaged, was not made by pykd, or is newer than this release.
        RuntimeError: the engine or the device is not to be had here; the message says what to install.

    Example:
        >>> loss = pykd.load("build/losses/hard_soft", engine="onnxruntime", threads=1)
        >>> print(loss.signature)
    """
    if not isinstance(trust, bool):  # "no" would count as True
        raise TypeError(f"expected trust to be True or False, got {trust!r}; pass one of these")
    if not trust and engine == "torchscript":
        raise ValueError(
            "expected data for trust=False, got engine='torchscript', which runs a program; leave the engine out, or trust "
            "whoever wrote it"
        )
    engine = engine if trust else "onnxruntime"
    source = bytes(path) if isinstance(path, (bytes, bytearray, memoryview)) else os.fsdecode(path)
    named = None if onnxruntime_library is None else os.fsdecode(onnxruntime_library)
    if named is None and engine != "torchscript" and _has(source, onnx=True):
        named = _onnxruntime_elsewhere()
    if engine == "torchscript" or (engine is None and named is None and _may_come_to_torch(source)):
        _import_torch()
    if cuda_stream == _DEFAULT_STREAM:
        cuda_stream = 0
    handle = 0 if cuda_stream is None else cuda_stream or _DEFAULT_STREAM
    core = _core.load(
        None if isinstance(source, bytes) else os.fsencode(source),
        source if isinstance(source, bytes) else None,
        engine,
        device,
        None if named is None else os.fsencode(named),
        None,
        threads,
        check_integrity,
        handle,
        kernels,
    )
    return LoadedLoss(core, cuda_stream)


def _as_float32(weights: Any) -> Any:
    """Weights or a mask, of NumPy or torch, in the type that the file takes; anything else as it is, to be refused."""
    if isinstance(weights, np.ndarray):
        return (
            weights.astype(np.float32) if weights.dtype.kind in "bfiu" or weights.dtype.name == "bfloat16" else weights
        )
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(weights, torch.Tensor):
        return weights if weights.is_complex() else weights.to(torch.float32)
    return weights


def _onnxruntime_wheel() -> str | None:
    """The folder ``capi`` of the installed wheel, which is not imported."""
    spec = importlib.util.find_spec("onnxruntime")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if glob.glob(os.path.join(glob.escape(folder), "capi", "libonnxruntime.so.1.*")):
            return os.path.join(folder, "capi")
    return None


def _onnxruntime_elsewhere() -> str | None:
    """The library of a wheel where libpykd does not look: in another folder than the one pykd was installed in."""
    wheel = _onnxruntime_wheel()
    beside = os.path.join(os.path.dirname(_core.__file__), "..", "onnxruntime", "capi")
    if wheel is None or os.environ.get("PYKD_ONNXRUNTIME_LIBRARY"):
        return None
    if os.path.isdir(beside) and os.path.samefile(wheel, beside):
        return None
    return sorted(glob.glob(os.path.join(glob.escape(wheel), "libonnxruntime.so.1.*")))[-1]


def _has(source: str | bytes, *, onnx: bool) -> bool:
    """Whether there is an ONNX file, or a TorchScript file, in what is loaded."""
    if isinstance(source, bytes):
        return source.startswith(b"PK") != onnx  # a ZIP archive, as TorchScript files are
    if not os.path.isdir(source):
        return source.endswith(".pt") != onnx
    names = ("loss.onnx", "loss.grad.onnx", "score.onnx") if onnx else ("loss.pt",)
    return any(os.path.exists(os.path.join(source, name)) for name in names)


def _may_come_to_torch(source: str | bytes) -> bool:
    """Whether a load with nothing named may come to TorchScript."""
    if not _has(source, onnx=False):
        return False
    named = os.environ.get("PYKD_ONNXRUNTIME_LIBRARY")
    return not _has(source, onnx=True) or not (named or _onnxruntime_wheel())


def _import_torch() -> None:
    """Loads torch's libraries, in which libpykd_torch then finds LibTorch."""
    if "torch" not in sys.modules and importlib.util.find_spec("torch") is not None:
        importlib.import_module("torch")


_DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64", "int64")}
_UINT16 = np.dtype(np.uint16)
_empty: Callable[..., Any] = np.empty


def _new_array(shape: tuple[int, ...], dtype: str) -> Any:
    if dtype == "bfloat16":
        return (_new(shape, _UINT16),)  # so marked, _core takes it for bfloat16
    return _new(shape, _DTYPES[dtype])


def _new(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    size = math.prod(shape) * dtype.itemsize
    if size < _core.kept_from:
        return _empty(shape, dtype)
    return np.frombuffer(memoryview(_core.allocate(size)), dtype).reshape(shape)


def _bfloat16_as_uint16(array: Any) -> Any:
    return (array.view(np.uint16),) if array.dtype.name == "bfloat16" else array


def _bfloat16() -> Any:
    """NumPy's dtype for it, which the package ml_dtypes provides."""
    try:
        return importlib.import_module("ml_dtypes").bfloat16
    except ImportError as error:
        raise TypeError(
            "expected inputs of a dtype that NumPy has, got bfloat16; pass torch tensors, or install ml_dtypes"
        ) from error
