"""Reading files that somebody else may have written, and writing files of which nobody sees a half."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write says where there is no room


def read(path: str | Path, limit: int) -> bytes:
    """The contents of a regular file of at most ``limit`` bytes.

    A link is followed; a pipe, a device or a folder is an error, at once, and so is a larger file, before it is read.
    """
    try:
        # Opening a pipe without this waits for somebody at its other end.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"expected a file at {path}, got nothing there; check the path") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a file that can be read at {path!s}, got {error}; check it") from error
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"expected a regular file at {path}, got a folder, pipe or device; check the path")
        data = b""
        if status.st_size <= limit:
            with os.fdopen(number, "rb", closefd=False) as file:
                data = file.read(limit + 1)
        size = max(status.st_size, len(data))
        if size > limit:
            raise ValueError(f"expected a file of at most {limit} bytes at {path}, got {size}; check what it is")
    finally:
        os.close(number)
    return data


def parse_json(data: bytes, name: object) -> Any:
    """A document of JSON; ``name`` says in the message what was no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected {name} to be JSON, got {error}; correct the file") from error


def beside(path: Path) -> Path:
    """Where a file lies until all of it is written."""
    return path.with_name(path.name + ".writing")


def check_place(path: Path) -> None:
    """A regular file may be replaced, or lies nowhere yet; a folder, a pipe and a device stay what they are."""
    if path.exists() and not path.is_file():
        raise OSError(
            f"expected a regular file to replace at {path}, or none, got a folder, pipe or device; name another"
        )


def already_there(path: Path) -> ValueError:
    """The message for a file or folder in the place of what is about to be written."""
    return ValueError(
        f"expected nothing at {path}, got what another run writes, or one that was killed has left; wait for it, or remove it"
    )


@contextlib.contextmanager
def writing(path: Path, alone: bool = False) -> Iterator[IO[bytes]]:
    """A file to write, of which the disk holds everything when the block ends; an error removes it.

    Where ``alone``, a file that lies there is an error, and stays.
    """
    try:
        opened = open(path, "xb" if alone else "wb")  # noqa: SIM115
    except FileExistsError as error:
        raise already_there(path) from error
    try:
        with opened as file:
            yield file
            file.flush()
            sync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path, alone: bool = False) -> Iterator[IO[bytes]]:
    """A file to write; when the block ends without an error, it takes the place of ``path`` in one step.

    Until then it lies beside it as ``<path>.writing``, which an error removes. A loss of power leaves the old file or the new one,
    whole. Where ``alone``, a file at ``<path>.writing`` is an error, and stays.
    """
    check_place(path)
    half = beside(path)
    with writing(half, alone) as file:
        yield file
    put_in_place(half, path)


def put_in_place(half: Path, path: Path) -> None:
    """Gives a file of which the disk holds everything its name, in one step; an error removes it."""
    try:
        os.replace(half, path)
    except OSError:
        half.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """A whole file of UTF-8, or none; bytes of names of files that are none are written as \\udc80 and so on."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def sync_path(path: Path) -> None:
    """Has what was written to a file, or the names in a folder, on the disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Has what was written on the disk, where the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
