"""What the stored kernel results look like: the table of the README and the picture beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "kernels.png"

# The routes in the order of the picture, best first, with their colours. Competitors are grey.
ROUTES = {
    "kernel alone": "#08519c",
    "pykd_run (C)": "#2171b5",
    "pykd.load": "#4292c6",
    "torch, backward()": "#6baed6",
    "LibTorch, backward() (C++)": "#9ecae1",
    "ONNX Runtime, portable": "#a63603",
    "torch.compile": "#fd8d3c",
    "torch.compile, definition": "#fdae6b",
    "eager": "#636363",
    "eager definition": "#bdbdbd",
}

# Without our kernels.
COMPETITORS = (
    "ONNX Runtime, portable",
    "torch.compile",
    "torch.compile, definition",
    "eager",
    "eager definition",
    "NumPy and SciPy",
    "torch",
)


def newest(benchmark: str = "kernels") -> dict[str, Any] | None:
    """The newest stored result of a benchmark; None where there is none."""
    found = sorted(RESULTS.glob(f"{benchmark}-*.json"), key=lambda path: path.stat().st_mtime)
    result: dict[str, Any] | None = json.loads(found[-1].read_text(encoding="utf-8")) if found else None
    return result


def by_case(result: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """case → route → row, without the rows that were wrong."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if "seconds" in row:
            cases.setdefault(row["case"], {})[row["route"]] = row
    return cases


def fastest(rows: Mapping[str, Mapping[str, Any]], *routes: str) -> Mapping[str, Any] | None:
    """The fastest of these routes: what a user of that competitor could have at best."""
    found = [rows[route] for route in routes if route in rows]
    return min(found, key=lambda row: row["seconds"], default=None)


def table(result: Mapping[str, Any]) -> str:
    """The table: times of our routes, and how many times as long the others take."""
    lines = [
        "| value + gradient | kernel alone | `pykd_run` (C) | `pykd.load` | torch | LibTorch | kernel × memory limit | eager | `torch.compile` | ONNX Runtime, portable |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, rows in by_case(result).items():
        alone = rows["kernel alone"]
        limit = f"{alone['times_limit']:.1f}" if alone.get("bound_by_memory", True) else "–"
        others = [
            fastest(rows, "eager", "eager definition", "NumPy and SciPy", "torch"),
            fastest(rows, "torch.compile", "torch.compile, definition"),
            fastest(rows, "ONNX Runtime, portable"),
        ]
        ratios = [f"{row['seconds'] / alone['seconds']:.1f} ×" if row else "–" for row in others]
        own = [_time(rows[route]["seconds"]) if route in rows else "–" for route in list(ROUTES)[:5]]
        if "kernel alone, AVX2" in rows:
            own[0] += f" ({_time(rows['kernel alone, AVX2']['seconds'])})"
        lines.append(f"| {case} | {' | '.join(own)} | {limit} | {' | '.join(ratios)} |")
    memory = [
        f"{case}: {_size(rows['kernel alone']['peak_bytes'])} for the kernel, {_size(eager['peak_bytes'])} eager"
        for case, rows in by_case(result).items()
        if (eager := fastest(rows, "eager", "eager definition", "NumPy and SciPy", "torch")) and "peak_bytes" in eager
    ]
    if memory:
        lines.append("\nMemory that a call adds at its peak. " + "; ".join(memory) + ".")
    where = result["conditions"]
    if "simd" in where:
        in_brackets = "; in brackets with AVX2" if any("AVX2" in row["route"] for row in result["rows"]) else ""
        lines.append(f"\nKernels with Highway's {_simd(where['simd'])}{in_brackets}.")
    lines.append(
        f"\n{where['cpu']}, {where['threads']} threads, torch {where['torch']}, ONNX Runtime {where['onnxruntime']}; medians of one run; "
        f"copy bandwidth {result['bandwidth'] / 1e9:.1f} GB/s, read and write."
    )
    return "\n".join(lines)


def table_in_torch(result: Mapping[str, Any]) -> str:
    """The table of a loss in a training loop, beside the lines that it replaces; a column per instruction set."""
    targets = list(dict.fromkeys(row["simd"] for row in result["rows"]))
    heads = [f"{title}, {_simd(target)}" for target in targets for title in ("by hand", "pykd")]
    lines = [
        f"| value + gradient | sizes | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(heads)}",
    ]
    for title, sizes in dict.fromkeys((row["title"], row["sizes"]) for row in result["rows"]):
        rows = {(r["simd"], r["route"]): r for r in result["rows"] if (r["title"], r["sizes"]) == (title, sizes)}
        cells = []
        for target in targets:
            hand, own = (rows[target, route].get("seconds") for route in ("by hand", "pykd"))
            cells.append(_time(hand) if hand else "wrong")
            ratio = f" ({own / hand:.2f} ×)" if own and hand else ""
            cells.append((_time(own) if own else "wrong") + ratio)
        lines.append(f"| {title} | {sizes} | {' | '.join(cells)} |")
    where = result["conditions"]
    lines.append(
        f"\n{where['cpu']}, {where['threads']} threads, torch {where['torch']}; medians, the two taken in turn."
    )
    return "\n".join(lines)


def picture(result: Mapping[str, Any], path: Path = PICTURE) -> None:
    """Every route of every case, as multiples of the memory limit."""
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    cases = by_case(result)
    figure, axis = plt.subplots(figsize=(11, 0.95 * len(cases) + 2.2))
    height = 0.86 / len(ROUTES)
    for place, (_, rows) in enumerate(cases.items()):
        shown = [route for route in ROUTES if route in rows]
        for number, route in enumerate(shown):
            at = place + (number - (len(shown) - 1) / 2) * height
            value = rows[route]["times_limit"]
            axis.barh(at, value, height * 0.92, color=ROUTES[route])
            axis.text(value * 1.05, at, f"{value:.1f}", va="center", fontsize=6.5)
    axis.axvline(1.0, color="black", linestyle=":", linewidth=1)
    axis.text(1.0, -0.62, " memory limit", fontsize=8, va="center")
    axis.set_xscale("log")
    axis.set_yticks(range(len(cases)), list(cases))
    axis.invert_yaxis()
    axis.set_xlabel("time of value + gradient, as a multiple of the memory limit (shorter is better)")
    used = [route for route in ROUTES if any(route in rows for rows in cases.values())]
    handles = [plt.Rectangle((0, 0), 1, 1, color=ROUTES[route]) for route in used]
    axis.legend(handles, used, fontsize=8, loc="center right")
    where = result["conditions"]
    axis.set_title(f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}", fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _simd(target: str) -> str:
    """An instruction set of Highway, and what processors call it."""
    return f"{target} (AVX-512)" if target.startswith("AVX3") else target


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _size(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"
