"""The pictures of a report: SVG drawn by Matplotlib, in colours that the page chooses.

Matplotlib gets one stand-in colour per role, which becomes a variable of CSS, so that one picture serves a light and a dark
page. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

# Role: stand-in. The page says what --name is.
_ROLES = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "one": "#040404",
    "two": "#050505",
    "three": "#060606",
}
INK, MUTED, GRID, ONE, TWO, THREE = _ROLES.values()
_WIDTH, _HEIGHT = 5.0, 2.9  # inches of 72 units

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pykd",  # the same file for the same numbers
    "font.family": "DejaVu Sans",  # by which text is measured; the page has a narrower one
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.left": False,
    "xtick.minor.visible": False,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def _drawn(name: str, draw: Callable[[Any], None]) -> str:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    for role, colour in _ROLES.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", svg)
    return _with_own_names(svg, name)


def _with_own_names(svg: str, prefix: str) -> str:
    """Names that are used, and unique in the page, where pictures would find each other's."""
    for name in set(re.findall(r'id="([^"]+)"', svg)):
        if f"#{name}" in svg:
            svg = svg.replace(f'id="{name}"', f'id="{prefix}-{name}"').replace(f"#{name}", f"#{prefix}-{name}")
        else:
            svg = svg.replace(f' id="{name}"', "")
    return svg


def histogram(report: dict[str, Any]) -> str:
    """How many rows have which first loss."""
    data = report["histogram"]
    score = report["scores"][data["score"]]
    edges, counts = data["edges"], data["counts"]

    def draw(axes: Any) -> None:
        axes.stairs(counts, edges, fill=True, color=ONE)
        if data["logarithmic"]:
            axes.set_xscale("log")
        axes.set_xlabel(f"{data['score']} of a row (nats)")
        axes.set_ylabel("rows")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_ylim(0, max(counts) * 1.15)
        for share in ("p50", "p99"):
            at = score["quantiles"][share]
            axes.axvline(at, color=INK, linewidth=1, linestyle=(0, (3, 3)))
            axes.annotate(
                f"{share} {at:.3g}", (at, 1), xycoords=("data", "axes fraction"), xytext=(3, -9),
                textcoords="offset points", fontsize=9,
            )  # fmt: skip

    return _drawn("histogram", draw)


def course(report: dict[str, Any]) -> str:
    """Quantiles of the first loss along the file."""
    parts = [part for part in report["course"] if part["count"]]
    middle = [(part["first_row"] + part["last_row"]) / 2 for part in parts]

    def draw(axes: Any) -> None:
        for name, colour in (("p50", ONE), ("p90", TWO), ("p99", THREE)):
            axes.plot(
                middle, [part[name] for part in parts], color=colour, label=name, marker="o" if len(parts) == 1 else ""
            )
        axes.set_xlabel("row of the file")
        axes.set_ylabel(f"{report['losses'][0]} (nats)")
        if report["histogram"]["logarithmic"] and all(part["p50"] > 0 for part in parts):
            axes.set_yscale("log")
            axes.set_ylim(top=axes.get_ylim()[1] * 2)  # room for the names
        else:
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]), top=axes.get_ylim()[1] * 1.1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.locator_params(axis="x", nbins=5)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0, handlelength=1.2)

    return _drawn("course", draw)


def _by_confidence(report: dict[str, Any], value: str, interval: str, label: str, percent: bool) -> str:
    parts = [part for part in report["confidence_bins"] if part["count"]]
    middle = [(part["from"] + part["to"]) / 2 for part in parts]
    values = [part[value] for part in parts]
    ends = [part[interval] or [at, at] for part, at in zip(parts, values, strict=True)]

    def draw(axes: Any) -> None:
        axes.bar(middle, values, width=0.088, color=ONE)
        spread = [
            [at - low for at, (low, _) in zip(values, ends, strict=True)],
            [high - at for at, (_, high) in zip(values, ends, strict=True)],
        ]
        axes.errorbar(middle, values, spread, fmt="none", ecolor=INK, elinewidth=1.2, capsize=0)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1 if percent else max(0, max(high for _, high in ends)) * 1.08 or 1)
        axes.set_xlabel("the teacher's confidence: probability of its best class")
        axes.set_ylabel(label)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    return _drawn(f"{value}-by-confidence", draw)


def loss_by_confidence(report: dict[str, Any]) -> str:
    """The mean of the first loss by the teacher's confidence."""
    return _by_confidence(report, "mean", "interval", f"mean {report['losses'][0]} (nats)", percent=False)


def agreement_by_confidence(report: dict[str, Any]) -> str:
    """How often student and teacher have the same best class, by the teacher's confidence."""
    return _by_confidence(report, "agreement", "agreement_interval", "same best class", percent=True)
