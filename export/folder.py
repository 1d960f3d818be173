"""A folder of files that is replaced in one step; docs/artefacts.md, «Replacing a folder», says what a user sees.

New files are made in a folder beside the old one, ``.<name>.export-<digits>``. The two then change places
(Linux's ``renameat2`` with ``RENAME_EXCHANGE``): whoever looks, and whenever the process dies, sees all files of one
export. Where that cannot be (a mount point, a parent that may not be written, a file system or a C library without the
call, other folders inside, or this process working there) files are replaced one by one, the manifest last; one that
dies between leaves a folder that does not load, since its files are not those of its manifest.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pykd.files import sync_path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def replacing(directory: str | Path, names: Sequence[str]) -> Iterator[Path]:
    """An empty folder to write files into; when the block ends without an error, they become those of ``directory``.

    Other files in ``directory`` stay. What exports that were killed have left beside it or in it is removed.

    Args:
        directory: the folder; made if it does not exist. A link to a folder stays, and that folder is replaced.
        names: the files that belong to it, in the order in which they may be replaced one by one. One that is not written is
            gone from ``directory`` afterwards.
    """
    target = Path(os.path.realpath(directory))
    _check(target)
    made, alive = _make_beside(target)
    try:
        yield made
        for name in os.listdir(made):  # so that a loss of power leaves one export, too
            sync_path(made / name)
        sync_path(made)
        _switch(made, target, names)
    finally:
        os.close(alive)
        with contextlib.suppress(OSError):  # gone, where all went well
            _remove(made, target, names)


def _check(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"expected a folder, or nothing yet, at {target}, got a file; choose another folder")
    if target.is_dir() and not os.access(target, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(f"expected a folder that can be written at {target}, got one that cannot; see its mode")


def _make_beside(target: Path) -> tuple[Path, int]:
    """A new folder, beside the target where possible, and an open descriptor that marks it as being in use."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _make(target.parent, _prefix(target))
    except OSError as error:
        if not target.is_dir():
            raise type(error)(
                f"expected to make the folder {target}, got {error.strerror}; choose another folder"
            ) from error
        return _make(target, _PREFIX)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    with _locked(parent):
        made = parent / f"{prefix}{secrets.token_hex(6)}"
        os.mkdir(made)  # with the mode that any new folder gets
        alive = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return made, alive


_PREFIX = ".export-"


def _prefix(target: Path) -> str:
    name = target.name
    if len(os.fsencode(name)) > 200:  # names have 255 bytes at most
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}{_PREFIX}"


def _switch(made: Path, target: Path, names: Sequence[str]) -> None:
    beside = made.parent != target
    with _locked(made.parent):
        _sweep(target, names, made)
        if beside and not target.exists():
            os.rename(made, target)
        elif not (beside and _exchange_with_others(made, target, names)):
            _replace_one_by_one(made, target, names)
        sync_path(target)
        sync_path(made.parent)


def _exchange_with_others(made: Path, target: Path, names: Sequence[str]) -> bool:
    """Lets the folders change places, other files of the target in both; False where it cannot be done."""
    try:
        if target in (here := Path.cwd(), *here.parents):
            return False  # it would be gone under this process, and under the shell that called it
        with os.scandir(target) as entries:
            others = [entry for entry in entries if entry.name not in names]
        if any(entry.is_dir(follow_symlinks=False) for entry in others):
            return False
        for entry in others:
            os.link(entry.path, made / entry.name, follow_symlinks=False)
        old = target.stat()
        os.chmod(made, old.st_mode & 0o7777)
        if (old.st_uid, old.st_gid) != (made.stat().st_uid, made.stat().st_gid):
            os.chown(made, old.st_uid, old.st_gid)
        _exchange(made, target)
    except OSError:
        for name in set(os.listdir(made)) - set(names):
            os.unlink(made / name)
        return False
    _remove(made, target, names)
    return True


def _exchange(first: Path, second: Path) -> None:
    """Two folders change places, in one step."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError("this C library has no renameat2")
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(second))


def _replace_one_by_one(made: Path, target: Path, names: Sequence[str]) -> None:
    written = [name for name in names if (made / name).exists()]
    if made.parent != target:  # perhaps another file system
        inside, alive = _make(target, _PREFIX)
        try:
            for name in written:
                shutil.copyfile(made / name, inside / name)
                sync_path(inside / name)
            _replace_one_by_one(inside, target, names)
        finally:
            os.close(alive)
            with contextlib.suppress(OSError):
                _remove(inside, target, names)
        return
    for name in written:
        os.replace(made / name, target / name)
    for name in set(names) - set(written):
        (target / name).unlink(missing_ok=True)


# ---- What killed exports left -------------------------------------------------------------------


def _sweep(target: Path, names: Sequence[str], mine: Path) -> None:
    """Removes the folders of exports that no longer run."""
    beside, inside = (
        re.compile(re.escape(_prefix(target)) + "[0-9a-f]{12}"),
        re.compile(re.escape(_PREFIX) + r"\w{8,12}"),
    )
    for parent, pattern in ((target.parent, beside), (target, inside)):
        with contextlib.suppress(OSError):
            for left in [parent / name for name in os.listdir(parent) if pattern.fullmatch(name)]:
                if left == mine or left.is_symlink() or not left.is_dir() or _in_use(left):
                    continue
                if parent == target and not set(os.listdir(left)) <= set(names):
                    continue  # somebody else's, which is called so
                _remove(left, target, names)


def _in_use(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _remove(left: Path, target: Path, names: Sequence[str]) -> None:
    """Removes a folder that was made here or changed places; a file of somebody else's goes back to the target."""
    for name in os.listdir(left):
        if name not in names and not os.path.lexists(target / name):
            os.rename(left / name, target / name)
        elif (left / name).is_dir() and not (left / name).is_symlink():
            return  # nothing of ours: let it be
        else:
            os.unlink(left / name)
    os.rmdir(left)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks; the lock goes with its process."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
