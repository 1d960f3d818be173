"""A file of a known size that is written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from pykd import files


class WholeFile:
    """Takes its name when all of it is on the disk; where something fails before, nothing is left and a file of that name stays as it was.

    Args:
        path: of the file.
        size: its bytes. They are reserved at once: a disk that is too small is told before the work is done.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size
        self._target = Path(os.path.realpath(path))  # a link goes on leading where it leads
        self._beside = files.beside(self._target)

    def __enter__(self) -> WholeFile:
        files.check_place(self.path)
        try:
            self._file = self._alone()
        except OSError as error:
            raise self._failed(error) from error
        try:
            os.ftruncate(self._file, 0)  # what a killed run has left
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
            files.sync(self._file)
            files.put_in_place(self._beside, self._target)
            os.close(self._file)  # after it has its name: nobody else may take it before
        except OSError as failure:
            self._remove()
            raise self._failed(failure) from failure

    def _alone(self) -> int:
        """The file beside, opened and locked; a lock ends with the process that has it."""
        while True:
            file = os.open(self._beside, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), os.stat(self._beside)):
                    return file
            except FileNotFoundError:  # another run was done with it in between
                pass
            except BlockingIOError as error:
                os.close(file)
                raise RuntimeError(
                    f"expected to be alone with {self._beside}, got another run that writes it; wait for it, or take another --out"
                ) from error
            except BaseException:
                os.close(file)
                raise
            os.close(file)

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
        self._beside.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # closed already
            os.close(self._file)

    def _failed(self, error: OSError) -> OSError:
        if error.errno in files.FULL:
            return OSError(
                f"expected room for the {self._size:,} bytes of {self.path}, got {error.strerror!r}; make room, and run the same command "
                "again: nothing is kept"
            )
        return OSError(
            f"expected to write {self.path}, got {error.strerror!r}; check the path, and who may write there"
        )
