"""One stage, in a process of its own: ``python -m benchmarks.gpu.stage NAME [--set KEY=VALUE …]``.

The runner says where through the environment: ``GPU_CHECK_DEVICE`` (``cuda``, or ``cpu`` in a rehearsal), ``GPU_CHECK_LARGEST`` (the
most elements of a tensor), ``GPU_CHECK_PACK`` (the folder of the pack), ``GPU_CHECK_OUT`` (where results go).
"""

import argparse
import dataclasses
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = "gpu-check.jsonl"
NOT_RUN = 77  # the exit code of a stage that lacks what it needs


class NotRun(Exception):
    """A stage that this machine cannot run; the text says what is missing."""


@dataclasses.dataclass
class Context:
    """What a stage knows, and where it writes what it finds.

    Attributes:
        stage: its title.
        device: ``"cuda"`` or ``"cpu"``.
        largest: the most elements of one tensor.
        pack: the folder of the pack.
        out: the folder of the results; few files come back from a lent machine.
        arguments: as in the plan.
        failed: how many checks were not well.
        checks: how many there were.
    """

    stage: str
    device: str
    largest: int
    pack: Path
    out: Path
    arguments: Mapping[str, str] = dataclasses.field(default_factory=dict)
    failed: int = 0
    checks: int = 0

    def report(self, ok: bool | None, **found: Any) -> None:
        """Writes one result down, for good. ``ok``: of a check; None: a fact or a figure."""
        if ok is not None:
            self.checks += 1
            self.failed += not ok
        write_row(self.out, {"stage": self.stage, **({} if ok is None else {"ok": ok}), **found})

    def attempt(self, work: Callable[[], Any], **found: Any) -> None:
        """Does work that reports by itself; an error is a check that failed, and not the end of the stage."""
        try:
            work()
        except NotRun:
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {error}"[:1000]
            self.report(False, **found, error=told, where=traceback.format_exc()[-1000:])

    def check(self, test: Callable[[], bool], **found: Any) -> None:
        """A check that is a question."""
        self.attempt(lambda: self.report(bool(test()), **found), **found)


def write_row(out: Path, row: Mapping[str, Any]) -> None:
    """Appends a row to the results; it is on the disk when this returns."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    print(line[:400], flush=True)
    with open(out / RESULTS, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def run(name: str, context: Context) -> int:
    """Runs a stage and returns its exit code: 0 where every check was well, and there was one."""
    start = time.monotonic()
    try:
        context.attempt(lambda: importlib.import_module(f"benchmarks.gpu.stages.{name}").run(context))
    except NotRun as reason:
        context.report(None, not_run=str(reason))
        return NOT_RUN
    if context.checks == 0:
        context.report(False, error="expected a stage that checks something, got none")
    context.report(None, checks=context.checks, failed=context.failed, seconds=round(time.monotonic() - start, 2))
    return 1 if context.failed else 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.stage", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    told = dict(item.split("=", 1) for item in options.set)
    environment = os.environ
    context = Context(
        stage=" ".join([options.name, *told.values()]),
        device=environment.get("GPU_CHECK_DEVICE", "cuda"),
        largest=int(environment.get("GPU_CHECK_LARGEST", 1 << 30)),
        pack=Path(environment.get("GPU_CHECK_PACK", ".cache/gpu")),
        out=Path(environment.get("GPU_CHECK_OUT", "benchmarks/results")),
        arguments=told,
    )
    return run(options.name, context)


if __name__ == "__main__":
    from benchmarks.gpu.stage import main as main_of_the_module  # whose NotRun is the one that stages raise

    sys.exit(main_of_the_module(sys.argv[1:]))
