"""Checks of tensors against declared axes: one wording for every shape, type and range error.

Every message has three parts: what was expected, what came, what to do; and it names the argument.
"""

import dataclasses
from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pykd.definition.spec import Form, Layouts, Spec

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_axes(tensors: list[Tensor], names: list[str], axes: list[list[str]], least: list[list[int]]) -> None:
    """Raises where a tensor's rank or lengths differ from its axis names, or are below the least. Scriptable.

    It is the first line of every loss graph, so a TorchScript file checks its inputs by itself.
    """
    known_axes: list[str] = []
    known_sizes: list[int] = []
    known_from: list[str] = []
    for i in range(len(tensors)):
        shape = tensors[i].shape
        if len(shape) != len(axes[i]):
            raise ValueError(
                f"expected {names[i]} with axes ({', '.join(axes[i])}), got shape {list(shape)}; pass a tensor with {len(axes[i])} axes"
            )
        for j in range(len(shape)):
            axis = axes[i][j]
            size = shape[j]
            if size == 0:
                raise ValueError(
                    f'expected {names[i]} to have at least one entry along "{axis}", got shape {list(shape)}; leave empty batches out'
                )
            found = -1
            for k in range(len(known_axes)):
                if known_axes[k] == axis:
                    found = k
            if found < 0:
                known_axes.append(axis)
                known_sizes.append(size)
                known_from.append(names[i])
            if size < least[i][j]:
                raise ValueError(
                    f'expected {names[i]} to have at least {least[i][j]} entries along "{axis}", got shape {list(shape)}; pass more of them'
                )
            if found >= 0 and known_sizes[found] != size:
                raise ValueError(
                    f'expected {names[i]} to have length {known_sizes[found]} along "{axis}", as {known_from[found]} has, got {size}; cut, pad or map one of them first'
                )


def check_names(given: Set[str], required: Sequence[str], optional: Sequence[str], numbers: Sequence[str] = ()) -> None:
    """Raises where a tensor is missing, or has a name that nobody knows; it may have been meant as one of the ``numbers``."""
    missing = [name for name in required if name not in given]
    unknown = [name for name in given if name not in (*required, *optional)]
    if missing or unknown:
        known = ", ".join([*required, *(f"{name} (optional)" for name in optional)])
        problem = " and ".join(
            text
            for text in (
                f"none for {', '.join(missing)}" if missing else "",
                f"the unknown {', '.join(unknown)}" if unknown else "",
            )
            if text
        )
        if unknown and numbers:
            known += f", and the numbers {', '.join(numbers)}"
        raise ValueError(f"expected the tensors {known}, got {problem}; pass each of them by its name")


def resolve(name: str, tensor: Tensor, layouts: Layouts) -> Spec:
    """The one of ``layouts`` that ``tensor`` has, by its rank and type."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} to be a torch.Tensor, got {type(tensor).__name__}; convert it first")
    if tensor.layout is not torch.strided or tensor.is_nested:
        got = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise TypeError(
            f"expected {name} to be a dense tensor, got {got}; convert it first, as by to_dense() or to_padded_tensor()"
        )
    for spec in layouts:
        if tensor.dim() == len(spec.names) and tensor.dtype in _dtypes(spec):
            return spec
    kinds = {"weight": "float, bool or integers"}
    wanted = " or ".join(f"{kinds.get(spec.dtype, spec.dtype)} with axes ({', '.join(spec.names)})" for spec in layouts)
    got = f"{tensor.dtype} with shape {list(tensor.shape)}"
    fits_rank = any(tensor.dim() == len(spec.names) for spec in layouts)
    error = TypeError if fits_rank else ValueError
    raise error(f"expected {name} as {wanted}, got {got}; convert or reshape it first")


def samples_of(forms: Sequence[Form], axes: Mapping[str, str]) -> str:
    """The axes that count the samples of a loss, after a check that the layouts of its inputs go together.

    Args:
        forms: the layouts that do; see :class:`pykd.Loss`.
        axes: those that the inputs at hand have.
    """
    for samples, fitting in forms:
        if all(own in fitting[name] for name, own in axes.items()):
            return samples
    first = next(iter(axes))
    here = [form for form in forms if axes[first] in form.axes[first]]
    for name, own in axes.items():
        wanted = [one for form in here for one in form.axes[name]]
        if own not in wanted:
            known = " or ".join(_words(one) for one in dict.fromkeys(wanted))
            raise ValueError(
                f"expected {f'{name} with axes {known}' if known else f'no {name}'}, as {first} has {_words(axes[first])}, "
                f"got {_words(own)}; pass tensors that go together"
            )
    got = ", ".join(f"{name} {_words(own)}" for name, own in axes.items())
    raise ValueError(f"expected tensors whose axes go together, got {got}; pass one of them in another form")


def _words(axes: str) -> str:
    return f"({', '.join(axes.split())})"


def least_of(specs: Mapping[str, Spec], least: Mapping[str, int]) -> list[list[int]]:
    """The least length along every axis of every input, as :func:`check_axes` takes it."""
    return [[least.get(axis, 1) for axis in spec.names] for spec in specs.values()]


def check_tensors(
    specs: Mapping[str, Spec], tensors: Mapping[str, Tensor], least: Mapping[str, int] | None = None
) -> None:
    """Axes, one floating type, one device, integer ranges (on the CPU; a GPU is not waited for)."""
    names = list(specs)
    axes = [list(specs[n].names) for n in names]
    check_axes([tensors[n] for n in names], names, axes, least_of(specs, least or {}))
    first = names[0]
    floating = ""
    for name in names:
        tensor = tensors[name]
        if tensor.device != tensors[first].device:
            raise TypeError(
                f"expected {name} on {tensors[first].device}, where {first} is, got {tensor.device}; move one of them"
            )
        if specs[name].dtype == "float":
            floating = floating or name
            if tensor.dtype != tensors[floating].dtype:
                raise TypeError(
                    f"expected {name} to be {tensors[floating].dtype}, as {floating} is, got {tensor.dtype}; cast one of them"
                )


def are_data_visible() -> bool:
    """Whether this is a call with numbers in it, and no trace of one that is to serve for others.

    A trace (torch.compile, torch.export, torch.jit.trace, make_fx) sees shapes and types; what depends on numbers is
    checked in eager calls.
    """
    tracing = torch._C._get_tracing_state() is not None
    return not (torch.compiler.is_compiling() or tracing or get_proxy_mode() is not None)


def _data(tensor: Tensor) -> Tensor | None:
    """The tensor on the CPU whose numbers ``tensor`` holds, under what torch.func puts around it; None: not to be seen."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_functionaltensor(tensor):
            return None
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" else None


def check_range(name: str, tensor: Tensor, limit: int, axis: str, ignore_index: int | None) -> None:
    """Raises where an integer tensor on the CPU leaves 0 … limit − 1 (and is not ``ignore_index``)."""
    data = _data(tensor)
    if data is None:
        return  # the loss turns NaN there; see the docstring of the loss
    bad = (data < 0) | (data >= limit)
    if ignore_index is not None:
        bad = bad & (data != ignore_index)
    if bool(bad.any()):
        value = int(data[bad][0])
        allowed = f"0 to {limit - 1}" + (f" or {ignore_index} (ignored)" if ignore_index is not None else "")
        raise ValueError(
            f'expected {name} to hold indices along "{axis}" from {allowed}, got {value}; correct the data or the number of {axis}'
        )


@dataclasses.dataclass(frozen=True)
class Counted:
    """An input of indices along an axis."""

    name: str
    axis: str
    limit: int  # the length of the axis
    ignore_index: int | None


def counted(
    specs: Mapping[str, Spec], tensors: Mapping[str, Tensor], ignore_indices: Mapping[str, int]
) -> list[Counted]:
    """The inputs that count along an axis."""
    sizes = {
        axis: size for name, spec in specs.items() for axis, size in zip(spec.names, tensors[name].shape, strict=True)
    }
    return [
        Counted(name, spec.index_of, sizes[spec.index_of], ignore_indices.get(name))
        for name, spec in specs.items()
        if spec.index_of is not None
    ]


def check_ranges(specs: Mapping[str, Spec], tensors: Mapping[str, Tensor], ignore_indices: Mapping[str, int]) -> None:
    """:func:`check_range` for every input that counts along an axis."""
    for one in counted(specs, tensors, ignore_indices):
        check_range(one.name, tensors[one.name], one.limit, one.axis, one.ignore_index)


def _dtypes(spec: Spec) -> tuple[torch.dtype, ...]:
    if spec.dtype == "weight":
        return (*_FLOATS, torch.bool, torch.uint8, torch.int32, torch.int64)
    return _FLOATS if spec.dtype == "float" else (torch.int64,)
