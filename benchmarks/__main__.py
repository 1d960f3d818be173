"""``python -m benchmarks [kernels losses in_torch scoring tokens relations]``: measures and stores the results under benchmarks/results/."""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import figures, in_torch, kernels, losses, relations, scoring, tokens
from benchmarks.measure import conditions, copy_bandwidth

BENCHMARKS: dict[str, Callable[[float], list[dict[str, Any]]]] = {
    "kernels": kernels.run,
    "losses": losses.run,
    "in_torch": in_torch.run,
    "scoring": scoring.run,
    "tokens": tokens.run,
    "relations": relations.run,
}


def main(arguments: list[str]) -> int:
    """Runs the benchmarks of these names (all by default); 0 where every answer of ours was right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rows", type=int, default=200_000, help="that are scored (default 200,000)")
    options = parser.parse_args(arguments)
    names = options.names or list(BENCHMARKS)
    benchmarks = BENCHMARKS | {"scoring": functools.partial(scoring.run, rows=options.rows)}
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"expected benchmarks out of {', '.join(BENCHMARKS)}, got {', '.join(unknown)}; pass one of these")
        return 2
    where = conditions()
    print(" · ".join(f"{name} {value}" for name, value in where.items()))
    wrong = False
    for name in names:
        bandwidth = copy_bandwidth()
        rows = benchmarks[name](bandwidth)
        # A competitor beyond the limits has no time; one of ours is a failure.
        wrong |= any("wrong" in row and row["route"] not in figures.COMPETITORS for row in rows)
        file = f"{name}-{where['machine']}-{where['threads']}threads-torch{where['torch']}.json".replace("+", "-")
        target = figures.RESULTS / file
        target.parent.mkdir(exist_ok=True)
        result = {"conditions": where, "bandwidth": bandwidth, "rows": rows}
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"stored in {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}")
        if name == "kernels":
            figures.picture(result)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
