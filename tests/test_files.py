"""Files that are written whole or not at all."""

import errno
import os

import pytest

from pykd import files


def test_a_file_is_replaced_when_all_of_it_is_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with files.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    files.write_text(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n"
    assert os.listdir(tmp_path) == ["file"]


def fail_after_writing(file, error):
    file.write(b"new")
    raise error


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for context in (files.replacing(path), files.writing(tmp_path / "other")):
        with pytest.raises(error), context as file:
            fail_after_writing(file, error)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_what_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"), files.replacing(tmp_path / "folder"):
        pass
    assert os.listdir(tmp_path) == ["folder"]


def test_what_is_no_file_and_what_others_write_stay(tmp_path):
    pipe, other = tmp_path / "pipe", tmp_path / "file.writing"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="a regular file to replace at .*pipe, or none, got a folder, pipe or device"):
        files.write_text(pipe, "text")
    other.write_bytes(b"of others")
    with (
        pytest.raises(ValueError, match=r"expected nothing at .*file.writing, got what another run writes"),
        files.replacing(tmp_path / "file", alone=True),
    ):
        pass
    assert pipe.is_fifo() and other.read_bytes() == b"of others" and len(os.listdir(tmp_path)) == 2


def test_the_disk_has_the_contents_before_the_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    sync = os.fsync

    def noted(descriptor):
        seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    files.write_text(path, "text")
    assert seen == [(f"{path}.writing", False), (str(tmp_path), True)]


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, True), (errno.EIO, True), (errno.EINVAL, False)])
def test_a_disk_that_cannot_hold_it_is_an_error(tmp_path, monkeypatch, number, told):
    """Some report a full disk here first; file systems that cannot be asked say so by another number."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def failing(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    if told:
        with pytest.raises(OSError, match=os.strerror(number)):
            files.write_text(path, "new")
    else:
        files.write_text(path, "new")
    assert path.read_text() == ("old" if told else "new") and os.listdir(tmp_path) == ["file"]
