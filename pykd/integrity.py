"""The checksum at the end of every artefact; docs/artefacts.md, «Integrity», describes it."""

import struct
import zlib
from typing import Any

_ONNX_PREFIX = b"\x72\x16\x0a\x0apykd.crc32\x12\x08"  # one more metadata_props entry, 24 bytes with its digits
_ZIP_PREFIX = b"pykd.crc32="  # the comment of the archive, 19 bytes with its digits
_DIGITS = 8
_END_OF_ZIP = b"PK\x05\x06"


def _digits(data: bytes) -> bytes:
    return f"{zlib.crc32(data):08x}".encode()


def onnx_seal(model: bytes) -> bytes:
    """What a serialised ONNX model has at its end."""
    return _ONNX_PREFIX + _digits(model)


def seal_onnx(model: bytes) -> bytes:
    """A serialised ONNX model with its checksum appended."""
    return model + onnx_seal(model)


def resealed_onnx(model: Any) -> bytes:
    """A serialised ``ModelProto`` that was read from a file and changed, with a checksum of what it is now where it had one."""
    seals = [entry for entry in model.metadata_props if entry.key == "pykd.crc32"]
    for entry in seals:
        model.metadata_props.remove(entry)
    data: bytes = model.SerializeToString(deterministic=True)
    return seal_onnx(data) if seals else data


def seal_zip(archive: bytes) -> bytes:
    """A ZIP archive without a comment, with its checksum as the comment."""
    end = len(archive) - 22
    if archive[end : end + 4] != _END_OF_ZIP:
        raise RuntimeError("expected a ZIP archive without a comment from torch.jit.save, got another end; report this")
    body = archive[:-2] + struct.pack("<H", len(_ZIP_PREFIX) + _DIGITS)
    return body + _ZIP_PREFIX + _digits(body)


def check(data: bytes, name: str) -> None:
    """Raises a ValueError where ``data`` is not as :func:`seal_onnx` or :func:`seal_zip` made it."""
    prefix = _ZIP_PREFIX if data.startswith(b"PK") else _ONNX_PREFIX
    body, seal = data[: -len(prefix) - _DIGITS], data[-len(prefix) - _DIGITS :]
    if not seal.startswith(prefix):
        raise ValueError(f"expected {name} to end with a checksum, got none: truncated or changed; export it again")
    if seal[len(prefix) :] != _digits(body):
        raise ValueError(f"expected {name} to match its checksum, got other bytes: damaged; export it again")
