"""Named tensors in one small file, for the C++ examples; the format is in ``cpp/examples/tensor_file.h``."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"PYKDTNS1"
_DTYPES: dict[int, np.dtype[Any]] = {
    3: np.dtype("<f4"),
    4: np.dtype("<f8"),
    5: np.dtype("<i8"),
}  # the values of pykd_dtype


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes float32, float64 and int64 arrays by name."""
    parts = [_MAGIC, struct.pack("<I", len(tensors))]
    for name, array in tensors.items():
        codes = [code for code, dtype in _DTYPES.items() if dtype == array.dtype]
        if not codes:
            raise TypeError(f"expected {name} to be float32, float64 or int64, got {array.dtype}; cast it first")
        encoded = name.encode()
        parts.append(struct.pack("<I", len(encoded)) + encoded)
        parts.append(struct.pack(f"<II{array.ndim}q", codes[0], array.ndim, *array.shape))
        parts.append(np.ascontiguousarray(array).tobytes())
    path.write_bytes(b"".join(parts))


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads what :func:`write` or the C++ examples wrote."""
    data = path.read_bytes()
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if count > len(data) - position:
            raise ValueError(f"expected {path} to hold whole tensors, got a file that ends too early; write it anew")
        position += count
        return data[position - count : position]

    if take(len(_MAGIC)) != _MAGIC:
        raise ValueError(f"expected {path} to start with {_MAGIC!r}, got something else; write it anew")
    tensors = {}
    (count,) = struct.unpack("<I", take(4))
    for _ in range(count):
        (length,) = struct.unpack("<I", take(4))
        name = take(length).decode()
        code, rank = struct.unpack("<II", take(8))
        if code not in _DTYPES or rank > 8:
            raise ValueError(f"expected {name} in {path} to have a known dtype and 8 axes at most; write it anew")
        shape = struct.unpack(f"<{rank}q", take(8 * rank))
        size = int(np.prod(shape, dtype=np.int64)) * _DTYPES[code].itemsize
        tensors[name] = np.frombuffer(take(size), dtype=_DTYPES[code]).reshape(shape)
    return tensors
