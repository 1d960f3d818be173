"""Lengths for named axes, and random tensors of these lengths."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pykd.definition.spec import Spec

# Lengths by the position of an axis among those of a call, whatever its name: the first, the second, and so on; beyond the
# last one listed they go on in steps of 2. No two are equal, since tracing would take equal axes for one.
_EXAMPLE = (6, 10, 5, 7, 3, 9)
_ODD = (5, 13, 3, 9, 7, 11)
_LARGE = (33, 101, 4, 17, 2, 6)
_LONG = ((33, 3, 257), (2, 17, 5001))  # the first axis, those between, and the last


def example_sizes(axes: Iterable[str], least: Mapping[str, int] | None = None) -> dict[str, int]:
    """A length for each axis name: all different, none 1, none below its ``least``."""
    sizes: dict[str, int] = {}
    for axis, size in _by_position(axes, _EXAMPLE).items():
        size = max(size, (least or {}).get(axis, 1))
        while size in sizes.values():
            size += 1
        sizes[axis] = size
    return sizes


def trial_sizes(axes: Iterable[str], least: Mapping[str, int] | None = None) -> dict[str, dict[str, int]]:
    """Lengths at which verification and tests try everything, by what they are.

    Every axis has its least length (1, unless the loss declares more) together with all others, and beside others that are
    longer; odd lengths, even ones, and some that no example has.
    """
    names = list(dict.fromkeys(axes))
    lowest = {axis: (least or {}).get(axis, 1) for axis in names}
    odd, large = _by_position(names, _ODD), _by_position(names, _LARGE)

    def row(lengths: Mapping[str, int], smallest: Sequence[str] = ()) -> dict[str, int]:
        return {axis: lowest[axis] if axis in smallest else max(lengths[axis], lowest[axis]) for axis in names}

    return {
        "smallest": row(odd, names),
        "odd": row(odd),
        "first smallest": row({axis: size + 2 for axis, size in odd.items()}, names[:1]),
        "every second smallest": row({axis: size + 3 for axis, size in odd.items()}, names[1::2]),
        "every third smallest": row({axis: size - 1 for axis, size in odd.items()}, names[2::2]),
        "large": row(large),
    }


def long_sizes(axes: Iterable[str]) -> list[dict[str, int]]:
    """Lengths for kernels: rows of some hundreds and some thousands along the last axis."""
    names = list(dict.fromkeys(axes))
    return [
        {axis: first if axis == names[0] else last if axis == names[-1] else between for axis in names}
        for first, between, last in _LONG
    ]


def _by_position(axes: Iterable[str], lengths: Sequence[int]) -> dict[str, int]:
    names = dict.fromkeys(axes)
    return {
        axis: lengths[i] if i < len(lengths) else max(lengths) + 2 * (i - len(lengths) + 1)
        for i, axis in enumerate(names)
    }


def fitting(specs: Iterable[Spec], sizes: Mapping[str, int]) -> dict[str, int]:
    """The same lengths, of which those of different indices are below the number of what they count."""
    lengths = dict(sizes)
    for spec in specs:
        if spec.draw == "different_indices":
            limit = max(lengths[str(spec.index_of)] - 1, 1)
            lengths[spec.names[-1]] = min(lengths[spec.names[-1]], limit)
    return lengths


def draw(spec: Spec, sizes: Mapping[str, int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A random tensor as ``spec`` describes it; exact in ``dtype``."""
    shape = [sizes[axis] for axis in spec.names]
    if spec.draw == "indices":
        limit = sizes[spec.index_of] if spec.index_of else 2
        return torch.randint(limit, shape, generator=generator)
    if spec.draw == "different_indices":
        of_all = torch.rand((*shape[:-1], sizes[str(spec.index_of)]), generator=generator)
        return of_all.argsort(dim=-1)[..., : shape[-1]].contiguous()
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if spec.draw not in _KINDS:
        known = ", ".join(("indices", "different_indices", *_KINDS))
        raise ValueError(f"expected draw to be one of {known}, got {spec.draw!r}; correct the Spec")
    values = _KINDS[spec.draw](normal) * spec.scale
    return values.float() if spec.dtype == "weight" else values.to(dtype)


def _partial_log_probabilities(normal: Tensor) -> Tensor:
    with_others = torch.cat([2 * normal, torch.zeros_like(normal[..., :1])], dim=-1)
    return torch.log_softmax(with_others, dim=-1)[..., :-1].contiguous()


def _weights(normal: Tensor) -> Tensor:
    values = torch.clamp(normal + 0.5, min=0.0)
    values.reshape(-1)[0] = 0.75  # at least one sample is kept
    return values


def _mask(normal: Tensor) -> Tensor:
    values = (normal > -0.5).double()
    values.reshape(-1)[0] = 1.0
    return values


# What a Spec may ask for, of normal numbers in float64.
_KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda normal: 2 * normal,
    "features": lambda normal: 2 * normal,
    "unit": lambda normal: torch.nn.functional.normalize(normal, dim=-1),
    "positive": lambda normal: torch.exp(normal / 2),
    "probabilities": lambda normal: torch.softmax(2 * normal, dim=-1),
    "log_probabilities": lambda normal: torch.log_softmax(2 * normal, dim=-1),
    "partial_log_probabilities": _partial_log_probabilities,
    "weights": _weights,
    "mask": _mask,
}
