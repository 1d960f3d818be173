"""Lengths for named axes, and random tensors of these lengths."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pykd.definition.spec import Spec

# Lengths for examples. No two axes share a length (tracing would take them for one axis), none is 1.
_SIZES = {"batch": 6, "classes": 10, "tokens": 5, "channels": 7, "students": 3}


def example_sizes(axes: Sequence[str]) -> dict[str, int]:
    """A length for each axis name, all different."""
    sizes: dict[str, int] = {}
    for axis in axes:
        size = _SIZES.get(axis, 8)
        while size in sizes.values():
            size += 1
        sizes.setdefault(axis, size)
    return sizes


def draw(spec: Spec, sizes: Mapping[str, int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A random tensor as ``spec`` describes it; exact in ``dtype``."""
    shape = [sizes[axis] for axis in spec.names]
    if spec.draw == "indices":
        limit = sizes[spec.index_of] if spec.index_of else 2
        return torch.randint(limit, shape, generator=generator)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if spec.draw == "probabilities":
        values = torch.softmax(2 * values, dim=-1)
    elif spec.draw == "weights":
        values = torch.clamp(values + 0.5, min=0.0)
        values.reshape(-1)[0] = 0.75  # at least one sample is kept
        return values.float()
    elif spec.draw == "normal":
        values = 2 * values
    else:
        raise ValueError(
            f"expected draw to be normal, probabilities, indices or weights, got {spec.draw!r}; correct the Spec"
        )
    return values.to(dtype)
