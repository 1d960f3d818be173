"""Damaged TorchScript files: every one of them gives a loss or an exception, and no process ends."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pykd import runtime
from tests.conftest import composed_subjects
from tests.test_runtime import tensors

pytestmark = pytest.mark.slow

Change = Callable[[str, bytes], bytes | None]  # None: leave it out


def rewritten(data: bytes, change: Change) -> bytes:
    """The archive with other contents, and the checksums of those."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as made:
        for entry in archive.infolist():
            contents = change(entry.filename, archive.read(entry.filename))
            if contents is not None:
                made.writestr(entry.filename, contents)
    return out.getvalue()


def damaged(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        length = rng.randrange(1, 20)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[rng.randrange(len(data) + 1) :][:length]
            case 3:
                del data[at:]
    return bytes(data)


def made_by_hand(data: bytes) -> Iterator[bytes]:
    """Code that does not compile, fails when it runs or is not there, with no way to its place in the source."""
    beyond = "of pieces of the source that are not there"
    for debug in (None, beyond, b"", b"\x80\x02.", b"\x80\x02N.", b"\x80\x02K\x01.", b"rubbish"):

        def changed(code: Change, debug: bytes | str | None = debug) -> bytes:
            def change(name: str, content: bytes) -> bytes | None:
                if name.endswith(".debug_pkl") and debug == beyond:
                    return content.replace(b"K\x01K\x02K\x03", b"K\x01K\xfeK\xff")
                if name.endswith(".debug_pkl") and isinstance(debug, bytes):
                    return debug
                return code(name, content)

            return rewritten(data, change)

        for more in (b"", b"(", b"class", b"\xff", b"raise"):
            yield changed(lambda name, content, more=more: content + more if name.endswith(".py") else content)
        yield changed(lambda name, content: content.replace(b"mean", b"meen") if name.endswith(".py") else content)
        for entry in zipfile.ZipFile(io.BytesIO(data)).namelist():
            yield changed(lambda name, content, entry=entry: None if name == entry else content)


def mutant(data: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.2:
        return damaged(data, rng)
    kinds = rng.choice([(".py",), (".py", ".debug_pkl"), (".debug_pkl",), (".pkl",), (".json",), ("version",)])
    return rewritten(data, lambda name, content: damaged(content, rng) if name.endswith(kinds) else content)


def try_all(path: str, count: int) -> None:
    data, inputs = Path(path).read_bytes(), tensors()
    loaded = 0
    for number, contents in enumerate([*made_by_hand(data), *(mutant(data, seed) for seed in range(count))]):
        print(number, flush=True)  # the last one is who did it
        try:
            loss = runtime.load(contents, "torchscript", check_integrity=False)
            loaded += 1
            loss.value_and_gradient(**inputs)  # of some files
        except (ValueError, RuntimeError, TypeError, FileNotFoundError) as error:
            print(len(str(error)))
    print(f"done: {loaded} loaded")


def check(path: Path) -> None:
    command = [sys.executable, "-m", "tests.test_damaged_torchscript", str(path), "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, f"{done.stdout.split()[-1]}: {done.stderr[:2000]}"
    assert "done" in done.stdout and "done: 0" not in done.stdout


def test_damaged_files(folder: Path) -> None:
    check(folder / "loss.pt")


def test_damaged_files_of_several_modules(exported: Any) -> None:
    (subject,) = (subject for subject in composed_subjects() if subject.name == "composed")
    check(exported(subject) / "loss.pt")


if __name__ == "__main__":
    try_all(sys.argv[1], int(sys.argv[2]))
