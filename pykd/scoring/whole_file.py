"""A file of a known size that is written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class WholeFile:
    """Takes its name when all of it is on the disk; where something fails before, nothing is left and a file of that name stays as it was.

    Args:
        path: of the file.
        size: its bytes. They are reserved at once: a disk that is too small is told before the work is done.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size
        self._beside = path.with_name(path.name + ".writing")

    def __enter__(self) -> WholeFile:
        try:
            self._file = os.open(self._beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise self._failed(error) from error
        try:
            os.posix_fallocate(self._file, 0, self._size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # where files cannot be reserved
                self._remove()
                raise self._failed(error) from error
            os.ftruncate(self._file, self._size)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self._remove()
            return
        try:
            os.fsync(self._file)
            os.close(self._file)
            os.replace(self._beside, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as failure:
            self._remove()
            raise self._failed(failure) from failure

    def write(self, place: int, data: Any) -> None:
        """Bytes from a place on; the system may take them in parts."""
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._file, view, place)
                place += written
                view = view[written:]
        except OSError as error:
            raise self._failed(error) from error

    def _remove(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            os.close(self._file)
        self._beside.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> OSError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return OSError(
                f"expected room for the {self._size:,} bytes of {self.path}, got {error.strerror!r}; make room, and run the same command "
                "again: nothing is kept"
            )
        return OSError(
            f"expected to write {self.path}, got {error.strerror!r}; check the path, and who may write there"
        )
