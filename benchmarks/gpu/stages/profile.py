"""Nsight Compute on one launch of the kernel: why its warps wait. The report comes back as gpu-check.ncu-rep, its tables in the log."""

import shutil
import subprocess
import sys

from benchmarks.gpu.stage import Context, NotRun


def run(context: Context) -> None:
    ncu = shutil.which("ncu")
    if ncu is None:
        raise NotRun("no ncu on the PATH; it comes with the CUDA toolkit")
    report = context.out / "gpu-check.ncu-rep"
    case = "4096x32000" if context.largest >= 4096 * 32000 else "64x1000"
    # The clocks stay as they are: the card is lent. The second launch: the first one loads the code.
    command = [
        ncu, "--set", "full", "--clock-control", "none", "--kernel-name", "regex:rows_kernel", "--launch-skip", "1",
        "--launch-count", "1", "--export", str(report), "--force-overwrite",
        sys.executable, "-m", "benchmarks.gpu.one_launch", case,
    ]  # fmt: skip
    made = subprocess.run(command, check=False)
    context.report(made.returncode == 0 and report.is_file(), check="ncu", case=case, exit_code=made.returncode)
    if report.is_file():
        pages = subprocess.run(
            [ncu, "--import", str(report), "--page", "details"], capture_output=True, text=True, check=False
        )
        print(pages.stdout)
        wanted = (
            "Duration",
            "Memory Throughput",
            "Registers Per Thread",
            "Achieved Occupancy",
            "No Eligible",
            "Executed Ipc",
        )
        context.report(None, ncu=[line.strip() for line in pages.stdout.splitlines() if any(w in line for w in wanted)])
