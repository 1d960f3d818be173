"""The page that a person looks at: one HTML file with everything in it, of the same size for any number of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pykd._version import __version__
from pykd.scoring import charts

_ABOVE = "above 1e308"  # what float64 cannot hold
MEANINGS = {
    "nan": "NaN in the logits",
    "infinite": "+∞, or nothing but −∞, in the logits",
    "infinite_score": "an infinite score: one side rules out what the other holds possible",
    "label_out_of_range": "a label outside the classes",
    "ignored": "the label −100, which asks for it",
    "ragged": "another number of classes than the other rows",
    "missing": "null in place of a row or label",
}
_SHOWN = 12  # lines of a table before the rest is folded away


def as_html(report: dict[str, Any]) -> str:
    """The page of a report of :func:`pykd.scoring.statistics.summary`."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    inputs = report["inputs"]
    bad = {kind: count for kind, count in report["bad_rows"].items() if count}
    temperature = report["temperature"]
    return environment.get_template("report.html").render(
        teacher=Path(inputs["teacher"]["path"]).name,
        student=Path(inputs["student"]["path"]).name,
        rows=f"{report['rows']:,}",
        classes=f"{report['classes_compared']:,}",
        temperature=None if temperature is None else f"{temperature:g}",
        independent=report["independent"],
        bad_count=f"{sum(bad.values()):,}",
        bad=[(kind, f"{count:,}", MEANINGS[kind]) for kind, count in bad.items()],
        left_out=list(report["left_out"].items()),
        tiles=_tiles(report),
        charts=_charts(report) if report["counted"] else [],
        tables=_tables(report) if report["counted"] else [],
        inputs=[(name, entry["path"], _kind(entry)) for name, entry in inputs.items()],
        version=__version__,
    )


def _kind(entry: dict[str, Any]) -> str:
    width = "" if entry["classes"] is None else f" × {entry['classes']:,}"
    return f"{entry['rows']:,}{width}, {entry['dtype']}"


def _tiles(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    tiles = []
    for name in report["losses"]:
        score = report["scores"][name]
        if score["count"]:
            tiles.append((f"mean {name}", f"{score['mean']:.3g}", interval(score["interval"], "{:.3g}")))
            ends = score["quantile_intervals"]["p99"]
            tiles.append((f"{name}: 99 % of rows below", f"{score['quantiles']['p99']:.3g}", interval(ends, "{:.3g}")))
    named = {
        ("agreement", "top1"): ("same best class", "{:.1%}"),
        ("accuracy", "student"): ("accuracy of the student", "{:.1%}"),
        ("accuracy", "teacher"): ("accuracy of the teacher", "{:.1%}"),
        ("perplexity", "student_over_teacher"): ("perplexity, student ÷ teacher", "{:.4g}"),
        ("calibration_error", "student_minus_teacher"): ("calibration gap to the teacher", "{:+.2%}"),
    }
    for (part, name), (title, form) in named.items():
        entry = report.get(part, {}).get(name)
        if entry is not None:
            value = _ABOVE if entry["value"] is None else form.format(entry["value"])
            tiles.append((title, value, interval(entry["interval"], form)))
    return tiles


def interval(ends: list[float | None] | None, form: str = "{:.4g}") -> str:
    """Both ends, or why there are none."""
    if ends is None:
        return "too few rows"
    return " to ".join("…" if end is None else form.format(end) for end in ends)


def _charts(report: dict[str, Any]) -> list[tuple[str, str, Markup]]:
    loss = report["losses"][0]
    scale = "logarithmic axis" if report["histogram"]["logarithmic"] else "linear axis"
    drawn = [
        (f"How far the rows are apart ({loss})", f"Rows by their {loss}; {scale}.", charts.histogram),
        ("Over the file", f"Quantiles of {loss} in up to 48 stretches of the file, in its order.", charts.course),
        ("Where the teacher is sure", f"Mean {loss} by the teacher's confidence.", charts.loss_by_confidence),
        ("Agreement", "How often both have the same best class.", charts.agreement_by_confidence),
    ]
    return [(title, note, Markup(draw(report))) for title, note, draw in drawn]  # drawn here, of numbers


def _tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    loss = report["losses"][0]
    scores = [
        [name.replace("_", " "), _number(s["mean"]), interval(s["interval"]),
         *(_number(s["quantiles"][share]) for share in ("p1", "p50", "p90", "p99", "p99.9")), _number(s["maximum"])]
        for name, s in report["scores"].items()
    ]  # fmt: skip
    shares = [
        [f"{part} {name}".replace("_", " "), _ABOVE if entry["value"] is None else _number(entry["value"]),
         interval(entry["interval"])]
        for part in ("agreement", "accuracy", "perplexity", "calibration_error")
        for name, entry in report.get(part, {}).items()
    ]  # fmt: skip
    classes = report["by_class"]
    by = "label" if classes["by"] == "label" else "the teacher's best class"
    listed = [
        [str(c["class"]), f"{c['count']:,}", _number(c["mean"]), interval(c["interval"]), f"{c['agreement']:.1%}"]
        for c in classes["classes"]
    ]
    worst = report["worst_rows"]
    columns = [name for name in worst[0] if not name.endswith("mass_cut")] if worst else []
    return [
        _table("Scores", "Per row. Losses and NLL in nats.",
               ["", "mean", "95 % interval", "p1", "median", "p90", "p99", "p99.9", "largest"], scores),
        _table("Shares and labels", "Of all rows that count.", ["", "value", "95 % interval"], shares),
        _table("By class", f"By {by}: {len(listed)} of {classes['present']:,}, those first that add most to the mean {loss}.",
               ["class", "rows", f"mean {loss}", "95 % interval", "same best class"], listed),
        _table("Worst rows", f"The {len(worst)} rows with the largest {loss}. Rows are counted from 0.",
               [name.replace("_", " ") for name in columns], [[_cell(entry[name]) for name in columns] for entry in worst]),
    ]  # fmt: skip


def _table(title: str, note: str, head: list[str], lines: list[list[str]]) -> dict[str, Any]:
    return {"title": title, "note": note, "head": head, "lines": lines, "shown": _SHOWN}


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else _number(value)


def _number(value: float) -> str:
    return f"{value:.4g}"
