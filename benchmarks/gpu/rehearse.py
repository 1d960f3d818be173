"""The whole check on the CPU: ``scripts/gpu-check --rehearse``.

It runs in a folder that holds what the machine will hold and no more: the tracked files, a pack, a Python with the packages that
machine has (links to this one's) and without this pykd; no network, where the system lets us take it away; and stand-ins for
NVIDIA's tools, which run what they are told to look at. The kernels are the CPU's, behind the same calls.
"""

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import pack
from benchmarks.gpu.runner import ROOT
from benchmarks.gpu.stage import RESULTS
from pykd import config

LARGEST = 1 << 13  # elements of a tensor: the small shapes
FOLDERS = {
    "soft_target": "float32",
    "hard_target": "bfloat16",
    "composed": "float32",
}  # the first of that name, in this dtype

# `tool … python …`: runs what follows its own arguments; ncu also writes the report that it was asked for.
STAND_IN = """#!/usr/bin/env python3
import os, subprocess, sys
arguments = sys.argv[1:]
if "--import" in arguments:
    print("Duration us 1.0")
    sys.exit(0)
code = subprocess.run(arguments[next(i for i, a in enumerate(arguments) if "python" in os.path.basename(a)):]).returncode
if "--export" in arguments:
    open(arguments[arguments.index("--export") + 1], "w").write("stand-in")
sys.exit(code)
"""


def main(options: argparse.Namespace) -> int:
    """Returns 0 where every stage was well, rows and all."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        folder = options.keep or Path(temporary)
        prepare(folder)
        first = run(folder, *(["--only", *options.only] if options.only else []))
        return first if options.only else run(folder, "--onnxruntime") or first


def prepare(folder: Path) -> None:
    """Everything that the machine will hold."""
    tree = folder / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    pack.of_this_environment(tree / ".cache" / "gpu", exported_folders())
    second = tree / ".cache" / "gpu-onnxruntime"
    second.mkdir()
    pack.compress_pack(tree / ".cache" / "gpu", second)
    library = config.onnxruntime_library()  # without CUDA, in place of the one with
    pack.compress(library.read_bytes(), second / f"{library.name}.xz", preset=0)
    python_of_the_machine(folder / "machine")
    for tool in ("ncu", "compute-sanitizer"):
        path = folder / "machine" / "bin" / tool
        path.write_text(STAND_IN)
        path.chmod(0o755)


def exported_folders() -> list[Path]:
    """A few of those that travel."""
    from tests.conftest import subjects
    from tests.make_vectors import prepare as export

    root = ROOT / "build" / "vectors"
    found = []
    for name, dtype in FOLDERS.items():
        subject = next(subject for subject in subjects() if subject.name.split("[")[0] == name)
        found.append(export(subject, dtype, root))
    return found


def python_of_the_machine(folder: Path) -> None:
    """A virtual environment with links to this one's packages, pykd left out."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    ours = Path(sysconfig.get_path("platlib"))
    theirs = next((folder / "lib").glob("python3*/site-packages"))
    for entry in ours.iterdir():
        if "pykd" not in entry.name and entry.suffix != ".pth" and entry.name != "__pycache__":
            (theirs / entry.name).symlink_to(entry)


def run(folder: Path, *arguments: str) -> int:
    """The check itself, as it will be called."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    environment = {
        "PATH": f"{folder / 'machine' / 'bin'}:/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        "OUT": str(out),
        "PYTHON": "python3",
        "OMP_NUM_THREADS": "2",
    }
    limits = [
        "--largest",
        str(LARGEST),
        "--patience",
        "6",
        "--budget",
        "3000",
    ]  # other tests may keep the processors busy
    command = ["scripts/gpu-check", "--device", "cpu", *limits, *arguments]
    code = subprocess.run([*without_network(), *command], cwd=folder / "tree", env=environment, check=False).returncode
    wrong = complaints(out)
    print("\n".join(wrong) or "rehearsed: every stage was well", flush=True)
    return code or (1 if wrong else 0)


def without_network() -> Sequence[str]:
    """A command before the command, or nothing where the system does not let us."""
    unshare = shutil.which("unshare")
    if unshare and subprocess.run([unshare, "-n", "true"], capture_output=True, check=False).returncode == 0:
        return [unshare, "-n"]
    print("rehearsal: with the network, which this system does not let us take away")
    return []


def rows(out: Path) -> list[dict[str, Any]]:
    """The results."""
    path = out / RESULTS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def complaints(out: Path) -> list[str]:
    """What was not well, and results that would not come back from a lent machine: a few files of some MB, no more."""
    found = [json.dumps(row) for row in rows(out) if row.get("ok") is False or row.get("outcome", "ok") != "ok"]
    files = [path for path in out.rglob("*") if path.is_file()]
    if len(files) > 8 or any(path.stat().st_size > 15 << 20 for path in files):
        found.append(f"expected at most 8 files of 15 MiB in $OUT, got {[(p.name, p.stat().st_size) for p in files]}")
    return found
