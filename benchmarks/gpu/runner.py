"""Runs the stages, each in a process of its own: one that fails, hangs or crashes costs its own time and nothing else."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.plan import Stage
from benchmarks.gpu.stage import NOT_RUN, RESULTS, write_row

ROOT = Path(__file__).parents[2]
LOG = "gpu-check.log"  # what the stages print
REBUILT = ROOT / "build" / "gpu-site"  # where the fallback puts the pykd that it builds


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a stage: ``"ok"``, ``"failed"``, ``"timed out"``, ``"crashed"`` or ``"not run"``."""

    stage: str
    outcome: str
    detail: str
    seconds: float


def command(stage: Stage) -> list[str]:
    """How a stage is started."""
    settings = [f"--set={key}={value}" for key, value in stage.arguments.items()]
    return [sys.executable, "-m", "benchmarks.gpu.stage", stage.name, *settings]


def environment(site: Path, device: str, largest: int, pack: Path, out: Path) -> dict[str, str]:
    """What stages see: pykd from `site`, the benchmarks from here."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "GPU_CHECK_DEVICE": device,
        "GPU_CHECK_LARGEST": str(largest),
        "GPU_CHECK_PACK": str(pack),
        "GPU_CHECK_OUT": str(out),
    }


def run_one(
    stage: Stage,
    out: Path,
    variables: Mapping[str, str],
    start: Callable[[Stage], Sequence[str]] = command,
    limit: float | None = None,
) -> Outcome:
    """Runs one stage within its limit and writes down what came of it."""
    limit = stage.limit if limit is None else min(limit, stage.limit)
    began = time.monotonic()
    with open(out / LOG, "a", encoding="utf-8") as log:
        print(f"==== {stage.title}, at most {limit:.0f} s", file=log, flush=True)
        # A session of its own, so that what the stage has started ends with it; and not in the source tree, whose pykd
        # has no extension.
        process = subprocess.Popen(
            list(start(stage)), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(variables),
            cwd=out, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    outcome = Outcome(stage.title, *_judge(code, limit), round(time.monotonic() - began, 2))
    write_row(out, {**dataclasses.asdict(outcome), "limit": limit})
    return outcome


def _judge(code: int | None, limit: float) -> tuple[str, str]:
    if code is None:
        return "timed out", f"after {limit:.0f} s"
    if code < 0:
        return "crashed", signal.Signals(-code).name
    return {0: ("ok", ""), 1: ("failed", "see its rows"), NOT_RUN: ("not run", "see its row")}.get(
        code, ("crashed", f"exit code {code}")
    )


def run(
    plan: Sequence[Stage],
    out: Path,
    variables: Mapping[str, str],
    budget: float,
    start: Callable[[Stage], Sequence[str]] = command,
) -> list[Outcome]:
    """Works through the plan within `budget` seconds. The results lie in `out`, one row a line, as they came."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget
    outcomes = []
    for stage in plan:
        left = deadline - time.monotonic()
        if left < 5:
            outcomes.append(Outcome(stage.title, "not run", "out of time", 0.0))
            write_row(out, dataclasses.asdict(outcomes[-1]))
            continue
        outcome = run_one(stage, out, variables, start, left)
        outcomes.append(outcome)
        if outcome.outcome == "ok" or stage.fallback is None:
            continue
        outcomes.append(run_one(stage.fallback, out, variables, start, deadline - time.monotonic()))
        if outcomes[-1].outcome == "ok":
            variables = {**variables, "PYTHONPATH": os.pathsep.join([str(REBUILT), str(ROOT)])}
            outcomes.append(run_one(stage, out, variables, start, deadline - time.monotonic()))
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """A table for people."""
    width = max(len(outcome.stage) for outcome in outcomes)
    lines = [f"{o.stage:{width}}  {o.outcome:9}  {o.seconds:6.1f} s  {o.detail}".rstrip() for o in outcomes]
    return "\n".join(lines)


def clear(out: Path) -> None:
    """Takes away what an earlier run has left."""
    for name in (RESULTS, LOG):
        (out / name).unlink(missing_ok=True)
