"""The command line on bad input: one line that says what to do, exit code 2, and no traceback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pykd import command_line
from pykd.command_line import losses

GOOD = 'loss = "soft_target"\n'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a bit of everything, which is the current one."""
    monkeypatch.chdir(tmp_path)
    Path("good.toml").write_text(GOOD)
    Path("folder").mkdir()
    Path("file").write_text("text")
    os.mkfifo("pipe")
    Path("bytes.toml").write_bytes(b"\xff\xfe\0")
    Path("loop").symlink_to("loop")
    for name, manifest in (("no-json", "{"), ("a-list", "[]"), ("empty", "{}"), ("number", "1")):
        Path(name).mkdir()
        Path(name, "manifest.json").write_text(manifest)
    Path("piped").mkdir()
    os.mkfifo("piped/manifest.json")
    Path("nested", "manifest.json").mkdir(parents=True)
    return tmp_path


RECIPES = {
    "text for a number": 'loss = "soft_target"\nsettings = {temperature = "2"}',
    "text for a switch": GOOD + '[export]\nper_sample = "no"',
    "a number for a switch": GOOD + "[export]\nper_sample = 1",
    "text for a list": GOOD + '[export]\noptional_inputs = "sample_weight"',
    "a number for a table": GOOD + "[export]\nlayouts = 3",
    "a table for a name": "loss = {}",
    "a number for a name": "loss = 3",
    "settings that are a list": GOOD + "settings = [1]",
    "export that is a number": GOOD + "export = 1",
    "terms that are text": 'terms = "x"',
    "a term that is a number": "[terms]\na = 1",
    "a weight that is text": '[terms.a]\nloss = "soft_target"\nweight = "1"',
    "a weight that is infinite": '[terms.a]\nloss = "soft_target"\nweight = inf',
    "parts that are a number": "[terms.a]\nparts = 1",
    "a number too large": f'loss = "soft_target"\nsettings = {{temperature = {10**400}}}',
    "a float too large": 'loss = "soft_target"\nsettings = {temperature = 1e400}',
    "a number that is none": 'loss = "soft_target"\nsettings = {temperature = nan}',
    "a number too small": 'loss = "soft_target"\nsettings = {temperature = 1e-40}',
    "a date": 'loss = "soft_target"\nsettings = {temperature = 2020-01-01}',
    "a switch for a number": 'loss = "soft_target"\nsettings = {temperature = true}',
    "another loss": 'loss = "soft_targets"',
    "another setting": 'loss = "soft_target"\nsettings = {temprature = 1.0}',
    "another dtype": GOOD + '[export]\ndtype = "float128"',
    "another argument": GOOD + "[export]\nfast = true",
    "nothing": "",
    "no TOML": "loss = ",
    "two forms": GOOD + '[terms.a]\nloss = "soft_target"',
}

CALLS = [
    "list no such words",
    "show soft_targets",
    "export --recipe missing.toml --out out",
    "export --recipe folder --out out",
    "export --recipe pipe --out out",
    "export --recipe bytes.toml --out out",
    "export --recipe loop --out out",
    "export --recipe file/good.toml --out out",
    "export --recipe good.toml --out file",
    "export --recipe good.toml --out file/out",
    "export --recipe good.toml --out loop/out",
    "export --recipe good.toml --out /proc/nowhere/out",
    "export --recipe good.toml --out out --dtype float128",
    "export --recipe good.toml --out out --dtype int64",
    "verify missing",
    "verify file",
    "verify pipe",
    "verify loop",
    "verify folder",
    "verify no-json",
    "verify a-list",
    "verify empty",
    "verify number",
    "verify piped",
    "verify nested",
    "show nothing",
    "table --check missing",
    "table --check folder",
    "table --write folder",
    "table --write missing/README.md",
    "demo --out file",
    "demo --out file/demo",
]

USAGE = [
    "",
    "unknown",
    "export",
    "export --recipe good.toml",
    "verify empty --seed x",
    "verify empty --seed -1",
    "verify empty --seed 1.5",
    "verify empty --seed " + "9" * 40,
    "verify empty --seed " + "9" * 5000,
    "show",
]


def refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert command_line.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"pykd {arguments[0]}: .*expected .*, got .*; .*\n", error, re.DOTALL), error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("call", CALLS)
def test_bad_calls(call: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    refuses(call.split(), capsys)
    assert [path for path in sorted(place.rglob("*")) if path not in before and path.name != "out"] == []


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_bad_recipes(recipe: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.toml").write_text(recipe)
    refuses(["export", "--recipe", "bad.toml", "--out", "out"], capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize("call", USAGE, ids=lambda call: call[:40])
def test_wrong_usage(call: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.main(call.split())
    assert ended.value.code == 2
    assert "usage: pykd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            PermissionError(13, "Permission denied", "/somewhere/x"),
            "expected to read or write /somewhere/x, got 'Permission denied'",
        ),
        (OSError(28, "No space left on device"), "expected to read or write a file, got 'No space left on device'"),
        (OverflowError("too large"), "expected numbers that can be computed with, got 'too large'"),
        (MemoryError(), "expected enough memory, got too little"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_system_refuses(
    error: Exception, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(options: object) -> None:
        raise error

    monkeypatch.setattr(losses, "_list", fails)
    assert text in refuses(["list"], capsys)


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(losses, "_list", interrupted)
    assert command_line.main(["list"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "pykd", "table"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_signal_from_the_keyboard_is_quiet() -> None:
    """While a command is at work: in an import, torch itself may take the signal for something else."""
    code = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell's background job ignores
from pykd import command_line
from pykd.command_line import losses
losses._list = lambda options: (print("at work", flush=True), time.sleep(600))
sys.exit(command_line.main(["list"]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"at work\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate() == (b"", b"")
    assert process.returncode == 130
