"""How the folder of an export is replaced: killed or failing at any step, by two at once, with other files in it."""

import errno
import hashlib
import json
import os
import signal
import stat
import tempfile
from pathlib import Path

import onnx
import pytest

import pykd
from pykd import files, integrity
from pykd.export import FILES, MANIFEST, folder

NAMES = [*FILES.values(), MANIFEST]
OLD_EXPORTS = Path(__file__).parent / "data" / "format-1"


def write_files(target: Path, export_id: str) -> None:
    """What an export might write: whole files, with this id."""
    composed = OLD_EXPORTS / "composed"
    manifest = json.loads((composed / MANIFEST).read_text()) | {"export_id": export_id}
    (target / "loss.pt").write_bytes(f"of {export_id}".encode())  # nobody reads it here
    for name in ("loss.onnx", "loss.grad.onnx"):
        model = onnx.load(composed / name)
        entries = {entry.key: entry.value for entry in model.metadata_props}
        described = json.loads(entries["pykd"]) | {"export_id": export_id}
        onnx.helper.set_model_props(model, {"pykd": json.dumps(described)})
        (target / name).write_bytes(integrity.seal_onnx(model.SerializeToString()))
    for name, entry in manifest["files"].items():
        data = (target / name).read_bytes()
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (target / MANIFEST).write_text(json.dumps(manifest))


def replace(target: Path, export_id: str) -> None:
    with folder.replacing(target, NAMES) as made:
        write_files(made, export_id)


def loaded_id(target: Path) -> str:
    return str(pykd.load(target, engine="onnxruntime", threads=1).metadata["export_id"])


def id_or_error(target: Path) -> str:
    try:
        return loaded_id(target)
    except ValueError as error:
        return str(error)


class Steps:
    """Stands for the module ``os`` in folder.py and files.py: something happens instead of the call with a certain number."""

    def __init__(self, at: int, what) -> None:
        self.count, self.at, self.what = 0, at, what

    def __getattr__(self, name):
        found = getattr(os, name)
        if not callable(found) or name in ("close", "fsencode", "strerror") or isinstance(found, type):
            return found

        def call(*arguments, **options):
            self.count += 1
            if self.count == self.at:
                self.what()
            return found(*arguments, **options)

        return call


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.ENOSPC, "no space left")


def in_child(function) -> int:
    """The status with which a child process that calls the function ends."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def no_exchange(*folders) -> None:
    raise OSError(errno.EINVAL, "the file system does not know it")


@pytest.fixture(params=["nothing there", "exchange", "other files", "one by one", "other folders"])
def scene(request, tmp_path, monkeypatch):
    """A target, and whether it is replaced in one step."""
    target = tmp_path / "recipe"
    if request.param != "nothing there":
        replace(target, "old")
    if request.param in ("other files", "one by one", "other folders"):
        (target / "notes.txt").write_text("mine")
        (target / "link").symlink_to("notes.txt")
    if request.param == "other folders":
        (target / "logs").mkdir()
        (target / "logs" / "a").write_text("mine, too")
    if request.param == "one by one":
        monkeypatch.setattr(folder, "_exchange", no_exchange)
    return target, request.param


def others(target: Path) -> dict[str, str]:
    """Everything in the target that is not the export's."""
    return {
        str(path.relative_to(target)): path.read_text()
        for path in target.rglob("*")
        if path.is_file() and path.name not in NAMES and ".export-" not in str(path.relative_to(target))
    }


def leftovers(target: Path) -> list[str]:
    return [path.name for path in (*target.parent.iterdir(), *target.iterdir()) if ".export-" in path.name]


@pytest.mark.slow
def test_killed_at_every_step(scene, monkeypatch):
    target, name = scene
    mine = others(target)
    refused = 0
    for step in range(1, 200):
        if name == "nothing there":
            for path in target.iterdir() if target.exists() else ():
                path.unlink()
            if target.exists():
                target.rmdir()
        else:
            replace(target, "old")
        before = set(os.listdir(target.parent))

        def killed(step=step):
            folder.os = files.os = Steps(step, die)
            replace(target, "new")

        status = in_child(killed)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert others(target) == mine
        if name in ("one by one", "other folders"):
            found = id_or_error(target)
            if "do not belong together" in found:
                refused += 1
            else:
                assert found in ("old", "new")
        elif name == "nothing there" and not target.exists():
            assert len(set(os.listdir(target.parent)) - before) <= 1  # the new one, under way
        else:
            assert loaded_id(target) in ("old", "new")
        replace(target, "next")
        assert loaded_id(target) == "next"
        assert others(target) == mine
        assert leftovers(target) == [], f"after step {step}"
    else:
        pytest.fail("never came to an end")
    assert step > 15
    assert loaded_id(target) == "new"
    if name in ("one by one", "other folders"):
        assert 0 < refused <= 5


@pytest.mark.slow
def test_failing_at_every_step(scene, monkeypatch):
    target, name = scene
    mine = others(target)
    for step in range(1, 200):
        if name != "nothing there":
            replace(target, "old")
        steps = Steps(step, fail)
        with monkeypatch.context() as patch:
            patch.setattr(folder, "os", steps)
            patch.setattr(files, "os", steps)
            failed = False
            try:
                replace(target, "new")
            except OSError:
                failed = True
        if steps.count < step:
            break
        assert others(target) == mine
        if target.exists() and any(target.iterdir()):
            found = id_or_error(target)
            if "do not belong together" in found:
                assert failed and name in ("one by one", "other folders")
            else:
                assert found in ({"old", "new", "next"} if failed else {"new"})
        replace(target, "next")
        assert loaded_id(target) == "next" and leftovers(target) == [] and others(target) == mine
    else:
        pytest.fail("never came to an end")


def test_two_at_once_and_a_reader(tmp_path):
    """Two replace the folder, 40 times each at least, until the reader has seen many of their exports."""
    target, enough = tmp_path / "recipe", tmp_path / "enough"
    replace(target, "a-0")
    (target / "notes.txt").write_text("mine")

    def replace_often(name):
        number = 0
        while number < 40 or not enough.exists():
            number += 1
            replace(target, f"{name}-{number}")
        (tmp_path / name).write_text(f"{name}-{number}")

    children = []
    for name in ("a", "b"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                replace_often(name)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    seen = set()
    waiting = set(children)
    while waiting:
        seen.add(loaded_id(target))  # never an error
        if len(seen) > 10:
            enough.touch()
        for child in list(waiting):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0
                waiting.remove(child)
    assert loaded_id(target) in {(tmp_path / name).read_text() for name in ("a", "b")}
    assert others(target) == {"notes.txt": "mine"} and leftovers(target) == []


def test_one_that_runs_is_left_alone(tmp_path):
    target = tmp_path / "recipe"
    with folder.replacing(target, NAMES) as made:
        replace(target, "quicker")
        assert made.is_dir() and loaded_id(target) == "quicker"
        write_files(made, "slower")
    assert loaded_id(target) == "slower" and leftovers(target) == []


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, True), (errno.EIO, True), (errno.EINVAL, False)])
def test_a_disk_that_cannot_hold_it_is_an_error(tmp_path, monkeypatch, number, told):
    """Some report a full disk here first; file systems that cannot be asked say so by another number."""
    target = tmp_path / "recipe"
    replace(target, "old")

    def failing(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    if told:
        with pytest.raises(OSError, match=rf"{os.strerror(number)}: '.*loss"):
            replace(target, "new")
    else:
        replace(target, "new")
    assert loaded_id(target) == ("old" if told else "new") and leftovers(target) == []


def test_leftovers_of_earlier_releases_go(tmp_path):
    left = tmp_path / "recipe" / ".export-abc12_3z"
    left.mkdir(parents=True)
    (left / "loss.pt").write_bytes(b"half")
    replace(tmp_path / "recipe", "new")
    assert leftovers(tmp_path / "recipe") == [] and loaded_id(tmp_path / "recipe") == "new"


def test_folders_that_are_only_called_so_stay(tmp_path):
    target = tmp_path / "recipe"
    mine = [target / ".export-settings" / "a", tmp_path / ".recipe.export-backup" / "loss.pt"]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    for export_id in ("old", "new"):
        replace(target, export_id)
        assert loaded_id(target) == export_id and all(path.read_text() == "mine" for path in mine)


def test_links_modes_and_the_current_folder_stay(tmp_path, monkeypatch):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir(mode=0o751)
    real.chmod(0o751)
    link.symlink_to("real")
    replace(link, "new")
    assert link.is_symlink() and loaded_id(real) == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o751
    monkeypatch.chdir(real)
    inode = real.stat().st_ino
    replace(Path("."), "here")
    assert real.stat().st_ino == inode and loaded_id(Path.cwd()) == "here"
    (tmp_path / "dangling").symlink_to(tmp_path / "far" / "away")
    replace(tmp_path / "dangling", "far")
    assert loaded_id(tmp_path / "far" / "away") == "far"
    long = tmp_path / ("n" * 255)
    replace(long, "old")
    replace(long, "new")
    assert loaded_id(long) == "new" and leftovers(long) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected a folder, or nothing yet, at .*file, got a file"):
        replace(tmp_path / "file", "new")
    with pytest.raises(OSError, match="expected to make the folder .*file/new, got"):
        replace(tmp_path / "file" / "new", "new")
    if os.geteuid() != 0:
        pytest.skip("the rest takes the place of another user")
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "mine").mkdir()
    (parent / "not-mine").mkdir()
    os.chown(parent / "mine", 65534, 65534)
    temporary = Path(tempfile.gettempdir())
    for path in (tmp_path, *tmp_path.parents):  # another user may pass through these
        if temporary in path.parents:
            path.chmod(0o755)

    def as_another():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with folder.replacing(parent / "mine", NAMES) as made:  # its parent cannot be written
            for name in NAMES:
                (made / name).write_bytes(b"")
        for place in ("not-mine", "new"):
            with pytest.raises(PermissionError, match="expected"), folder.replacing(parent / place, NAMES):
                pass

    assert in_child(as_another) == 0
    assert sorted(os.listdir(parent / "mine")) == sorted(NAMES)


def test_two_exports_in_one_folder_do_not_load(tmp_path):
    """In Python as in C++: what verify() and load() say of a file that another export has written."""
    for name in ("loss.onnx", "loss.grad.onnx", "loss.pt", MANIFEST):
        replace(tmp_path / "old", "old")
        replace(tmp_path / "new", "newer")
        os.replace(tmp_path / "new" / name, tmp_path / "old" / name)
        with pytest.raises(ValueError, match="expected .* to be the file of .*manifest"):
            pykd.load(tmp_path / "old", engine="onnxruntime")
        if name != "loss.pt":
            (tmp_path / "old" / "loss.pt").unlink()  # which is whole, but none
        with pytest.raises(ValueError, match="expected .* to be the file of the manifest"):
            pykd.export.verify(tmp_path / "old", engines=("python",))
