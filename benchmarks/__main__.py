"""``python -m benchmarks [tiny medium large]``: measures and stores the result under benchmarks/results/."""

import json
import sys
from pathlib import Path

from benchmarks import losses
from benchmarks.measure import conditions

if __name__ == "__main__":
    sizes = sys.argv[1:] or ["tiny", "medium"]
    unknown = [size for size in sizes if size not in losses.SIZES]
    if unknown:
        sys.exit(f"expected sizes out of {', '.join(losses.SIZES)}, got {', '.join(unknown)}; pass one of these")
    where = conditions()
    print(" · ".join(f"{name} {value}" for name, value in where.items()))
    rows = losses.run(sizes)
    name = f"losses-{where['machine']}-{where['threads']}threads-torch{where['torch']}.json".replace("+", "-")
    target = Path(__file__).parent / "results" / name
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"conditions": where, "rows": rows}, indent=1) + "\n")
    print(f"stored in benchmarks/results/{name}")
    sys.exit(1 if any("wrong" in row for row in rows) else 0)
