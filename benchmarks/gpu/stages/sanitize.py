"""compute-sanitizer over the smoke test: accesses out of bounds (memcheck), races in shared memory (racecheck), barriers that not all
threads reach (synccheck)."""

import os
import shutil
import subprocess
import sys

from benchmarks.gpu.stage import Context, NotRun

FOUND = 9  # the exit code where the sanitizer has found something


def run(context: Context) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise NotRun("no compute-sanitizer on the PATH; it comes with the CUDA toolkit")
    tool = context.arguments["tool"]
    # Every tensor in memory of its own: what torch's allocator keeps would hide accesses beside it.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", str(FOUND),
        sys.executable, "-m", "benchmarks.gpu.stage", "smoke", "--set=plain=yes",
    ]  # fmt: skip
    code = subprocess.run(command, env=environment, check=False).returncode
    context.report(
        code == 0, check=tool, exit_code=code, meaning="found something, see the log" if code == FOUND else ""
    )
