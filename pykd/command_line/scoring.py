"""Scores of a student against its teacher: ``pykd score``."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pykd import files


def add(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="how far a student has drifted from its teacher, row by row",
        description="Scores every row of two files of logits, and says what it found. Files: .npy, .npz, .safetensors, "
        "Parquet (columns of lists, or flat), Arrow IPC; FILE#NAME names an array, tensor or column. "
        "What was begun and not finished is taken up where it ended.",
    )
    score.add_argument("--teacher", metavar="FILE", help="logits of the teacher, (rows, classes)")
    score.add_argument(
        "--distillkit",
        metavar="FILE",
        help="the teacher has rows of DistillKit: the settings of their compression, JSON or YAML",
    )
    score.add_argument("--student", metavar="FILE", help="logits of the student, the same rows")
    score.add_argument("--labels", metavar="FILE", help="the right class of each row; -100 leaves a row out")
    score.add_argument(
        "--group", metavar="FILE", help="what belongs together, such as documents: intervals allow for it"
    )
    score.add_argument(
        "--loss",
        action="append",
        metavar="LOSS",
        help="kl (default), reverse_kl, symmetric_kl, jsd, cross_entropy, or an exported loss with values per sample; again: "
        "one more. The first is the one that bins and worst rows are of",
    )
    score.add_argument("--temperature", type=float, help="divides the logits in the losses (default 1)")
    score.add_argument("--classes", type=int, help="compares the first ones alone")
    score.add_argument(
        "--compare",
        nargs=2,
        metavar=("FIRST", "SECOND"),
        help="two files of scores of the same rows, such as of two students: what changed, row by row; nothing is scored",
    )
    score.add_argument("--out", type=Path, metavar="FILE", help="the scores, as Parquet")
    score.add_argument("--report", type=Path, metavar="FILE", help="writes a page to look at, as HTML")
    score.add_argument("--json", type=Path, metavar="FILE", help="writes the numbers as JSON")
    score.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="CONDITION",
        help="exit with 1 where it holds, such as 'kl.p99 > 0.1'; again: one more",
    )
    score.add_argument(
        "--format",
        choices=("text", "llama"),
        default="text",
        help="what is printed: llama is what llama-perplexity --kl-divergence prints at its end, with its arithmetic",
    )
    score.add_argument("--seed", type=int, default=0, help="of the intervals (default 0)")
    score.add_argument("--threads", type=int, default=0, help="that work at once (default: one per core)")
    score.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> int:
    from pykd.scoring.conditions import Condition, numbers_of

    conditions = [Condition.of(text) for text in options.fail_if]
    if not 0 <= options.seed < 1 << 63:
        raise ValueError(f"expected --seed from 0 to 2^63 - 1, got {options.seed}; correct it")
    if options.compare is not None:
        return _compare(options, conditions)
    llama_alone = options.format == "llama" and options.out is None
    for name in ("teacher", "student") if llama_alone else ("teacher", "student", "out"):
        if getattr(options, name) is None:
            raise ValueError(f"expected --{name} FILE, got none; add it")
    if options.threads < 0:
        raise ValueError(f"expected --threads from 0, got {options.threads}; correct it")
    if llama_alone:
        if conditions or options.report is not None or options.json is not None:
            raise ValueError("expected --out FILE with --report, --json and --fail-if, got none; add it")
        print(_as_llama(options))
        return 0
    from pykd.scoring.sources import require
    from pykd.scoring.statistics import summary
    from pykd.scoring.stream import score_files

    _check_outputs(options)
    if options.report is not None:
        require("jinja2", "matplotlib")
    scores = score_files(
        options.teacher,
        options.student,
        options.out,
        losses=tuple(options.loss or ["kl"]),
        labels=options.labels,
        group=options.group,
        temperature=options.temperature,
        classes=options.classes,
        distillkit=options.distillkit,
        threads=options.threads,
        progress=progress(),
        say=lambda text: print(text, file=sys.stderr),
    )
    report = summary(scores, options.seed)
    if options.json is not None:
        files.write_text(options.json, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if options.report is not None:
        from pykd.scoring.report import as_html

        files.write_text(options.report, as_html(report))
    print(_as_llama(options) if options.format == "llama" else as_text(report))
    return _judged(conditions, numbers_of(report))


def _check_outputs(options: argparse.Namespace) -> None:
    """Nothing that is read is written over, and what cannot be written is said before the work."""
    from pykd.scoring.results import journal_of
    from pykd.scoring.sources import path_of

    inputs = [
        *(getattr(options, name) for name in ("teacher", "student", "labels", "group", "distillkit")),
        *(options.compare or ()),
    ]
    taken = {os.path.realpath(path_of(where)) for where in inputs if where is not None}
    for name in ("out", "report", "json"):
        path = getattr(options, name)
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"expected a folder for --{name}, got none at {path.parent}; make it")
        if path is None:
            continue
        if path.is_dir():
            raise IsADirectoryError(f"expected a file for --{name}, got the folder {path}; name a file in it")
        files.check_place(path)
        on_the_way = [files.beside(path)] + ([journal_of(path)] if name == "out" else [])
        written = {os.path.realpath(place) for place in (path, *on_the_way)}
        if written & taken:
            raise ValueError(
                f"expected another file for --{name} than for what is read or written besides, got {path}; name another"
            )
        taken |= written


def _judged(conditions: list[Any], numbers: dict[str, float | None]) -> int:
    failed = [condition for condition in conditions if condition.holds(numbers)]
    for condition in failed:
        print(f"FAILED: {condition} ({condition.name} is {numbers[condition.name]:.6g})")
    return 1 if failed else 0


def _compare(options: argparse.Namespace, conditions: list[Any]) -> int:
    from pykd.scoring.compare import compare, numbers_of_comparison
    from pykd.scoring.results import Scores

    of_scoring = (
        "teacher",
        "student",
        "labels",
        "group",
        "loss",
        "temperature",
        "classes",
        "out",
        "report",
        "distillkit",
    )
    given = [name for name in of_scoring if getattr(options, name) is not None]
    for name in given + ["format"] * (options.format != "text"):
        raise ValueError(f"expected no --{name} with --compare, which scores nothing, got one; leave it out")
    _check_outputs(options)
    first, second = options.compare
    report = compare(Scores(first), Scores(second), options.seed)
    if options.json is not None:
        files.write_text(options.json, json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(comparison_as_text(report))
    return _judged(conditions, numbers_of_comparison(report))


def comparison_as_text(report: dict[str, Any]) -> str:
    """Effect, interval, p-value, and what these rows could have shown."""
    lines = [f"{report['paired']:,} of {report['rows']:,} rows count in both"]
    for name in report["settings_that_differ"]:
        lines.append(f"scored with different settings ({name}): what that changes is part of the differences")
    head = ("", "first", "second", "difference", "95 % interval", "in st. dev.", "p", "smallest seen")
    rows: list[tuple[str, ...]] = [head]
    quantiles: list[tuple[str, ...]] = []
    for name, entry in {**report["scores"], **report["shares"]}.items():
        for title, quantile in entry.get("quantiles", {}).items():
            if name in report["losses"] and title in ("p50", "p90", "p99"):
                quantiles.append(
                    (
                        f"{name} {title}",
                        *(f"{quantile[side]:.5g}" for side in ("first", "second", "difference")),
                        _interval(quantile["interval"]),
                        "",
                        "",
                        "",
                    )
                )
        changed = f" (+{entry['gained']:,} −{entry['lost']:,})" if "gained" in entry else ""
        numbers = (entry["first"], entry["second"], entry["difference"])
        rest = (entry["standard_deviations"], entry["p_value"], entry["smallest_seen"])
        rows.append(
            (
                name + changed,
                *(f"{number:.5g}" for number in numbers),
                _interval(entry["interval"]),
                *("–" if number is None else f"{number:.3g}" for number in rest),
            )
        )
    return "\n".join(lines + _table(rows + quantiles))


def _as_llama(options: argparse.Namespace) -> str:
    from pykd.scoring import sources
    from pykd.scoring.llama import print_out
    from pykd.scoring.stream import cores, labels_of

    for name in ("temperature", "classes", "loss", "distillkit"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"expected no --{name} with --format llama, whose numbers are fixed, got one; leave it out"
            )
    teacher = sources.open_matrix(options.teacher, "teacher")
    student = sources.open_matrix(options.student, "student")
    if sources.base_file(options.teacher) is None:
        raise ValueError(
            f"expected a base file of llama.cpp as the teacher with --format llama, got {options.teacher}; leave it out, or write one with "
            "`pykd teacher --form llama`"
        )
    if student.kept is not None:
        raise ValueError(
            f"expected logits of all classes of the student, got {student.stored} in {student.name}; only the teacher may be a top K"
        )
    labels = labels_of(options.teacher, options.student, options.labels)
    if labels is None:
        raise ValueError(
            "expected labels for --format llama, got none; pass --labels, or a base file, which holds them"
        )
    label = sources.open_column(labels, "labels")
    for other, what in ((student.rows, "rows of the student"), (label.rows, "labels")):
        if other != teacher.rows:
            raise ValueError(
                f"expected {teacher.rows} {what}, as the teacher has, got {other}; pass files of the same rows"
            )
    if student.width != teacher.width:
        raise ValueError(
            f"expected {teacher.width} classes of the student, got {student.width}; pass models of one vocabulary"
        )
    return print_out(teacher, student, label, options.threads or cores())


def progress() -> Callable[[int, int], None] | None:
    """A bar on stderr where somebody looks at it."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    from pykd.scoring.sources import require

    require("tqdm")
    from tqdm import tqdm

    bar: Any = None

    def show(done: int, rows: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=rows, initial=done, unit=" rows", unit_scale=True, leave=False)
        bar.update(done - bar.n)
        if done == rows:
            bar.close()

    return show


def as_text(report: dict[str, Any]) -> str:
    """The numbers that matter most, in a few lines."""
    bad = {kind: count for kind, count in report["bad_rows"].items() if count}
    lines = [
        f"{report['rows']:,} rows" + "".join(f", {count:,} {kind.replace('_', ' ')}" for kind, count in bad.items())
    ]
    if bad:
        lines[0] += f": {report['counted']:,} count"
    rows: list[tuple[str, ...]] = [("", "mean", "95 % interval", "median", "p90", "p99", "largest")]
    for name, score in report["scores"].items():
        if score["count"]:
            quantiles = score["quantiles"]
            rows.append(
                (
                    name,
                    f"{score['mean']:.5g}",
                    _interval(score["interval"]),
                    *(f"{quantiles[share]:.5g}" for share in ("p50", "p90", "p99")),
                    f"{score['maximum']:.5g}",
                )
            )
    lines += _table(rows)
    rows = []
    for part in ("agreement", "accuracy", "perplexity", "calibration_error"):
        for name, entry in report.get(part, {}).items():
            title = f"{part} {name}".replace("_", " ")
            value = "above 1e308" if entry["value"] is None else f"{entry['value']:.5g}"
            rows.append((title, value, _interval(entry["interval"])))
    lines += ([""] if rows else []) + _table(rows)
    return "\n".join(lines + [f"left out: {name} ({why})" for name, why in report["left_out"].items()])


def _interval(ends: list[float | None] | None) -> str:
    if ends is None:
        return "too few rows"
    return " to ".join("…" if end is None else f"{end:.5g}" for end in ends)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
