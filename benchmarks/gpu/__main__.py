"""``scripts/gpu-check``: the check itself, or what has to be done before. See docs/gpu.md."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import runner
from benchmarks.gpu.plan import ONNXRUNTIME_PLAN, PLAN

PACK = runner.ROOT / ".cache" / "gpu"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pack", action="store_true", help="beforehand: build and collect what travels, in .cache/gpu")
    what.add_argument(
        "--pack-onnxruntime",
        action="store_true",
        help="beforehand: the same for --onnxruntime, in .cache/gpu-onnxruntime",
    )
    what.add_argument(
        "--rehearse",
        action="store_true",
        help="run the check on the CPU, in a folder that holds what the machine will hold",
    )
    what.add_argument("--onnxruntime", action="store_true", help="the second run: ONNX Runtime's CUDA provider")
    parser.add_argument("--pack-folder", type=Path, default=PACK, help="where the pack lies")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--largest", type=int, default=1 << 31, help="leave out cases with more elements in a tensor")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all stages together")
    parser.add_argument(
        "--patience", type=float, default=1, help="times the limit of every stage, for a machine that is busy"
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    parser.add_argument("--keep", type=Path, help="of a rehearsal: the folder to work in, which is left there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Returns 0 where every stage was well."""
    options = parse(arguments)
    if options.pack or options.pack_onnxruntime:
        from benchmarks.gpu import pack

        (pack.make if options.pack else pack.make_onnxruntime)(PACK if options.pack else pack.ONNXRUNTIME_PACK)
        return 0
    if options.rehearse:
        from benchmarks.gpu import rehearse

        return rehearse.main(options)
    return check(options)


def check(options: argparse.Namespace) -> int:
    """The check, on this machine. Results go to the folder that $OUT names, else to benchmarks/results/."""
    out = Path(os.environ.get("OUT") or runner.ROOT / "benchmarks" / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    runner.clear(out)
    pack = options.pack_folder.resolve()
    plan = ONNXRUNTIME_PLAN if options.onnxruntime else PLAN
    if options.only:
        known = {stage.name for stage in plan}
        if unknown := set(options.only) - known:
            sys.exit(f"gpu-check: expected stages among {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
        plan = tuple(stage for stage in plan if stage.name in options.only)
    plan = tuple(stage.with_patience(options.patience) for stage in plan)
    more: dict[str, str] = {}
    if options.onnxruntime:
        from benchmarks.gpu import pack as packing

        pack, more = packing.unpack_onnxruntime(packing.ONNXRUNTIME_PACK)
    variables = runner.environment(pack / "site", options.device, options.largest, pack, out) | more
    outcomes = runner.run(plan, out, variables, options.budget)
    print(f"\n{runner.summary(outcomes)}\nresults: {out / runner.RESULTS}")
    return 0 if all(outcome.outcome == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
