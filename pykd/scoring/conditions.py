"""Conditions such as ``kl.p99 > 0.1`` over the numbers of a report. They are read, never run."""

from __future__ import annotations

import difflib
import math
import operator
import re
from dataclasses import dataclass
from typing import Any

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_FORM = re.compile(
    r"\s*(?P<name>[\w.\-]+)\s*(?P<operator><=|>=|<|>)\s*(?P<limit>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*",
    re.ASCII,
)


@dataclass(frozen=True)
class Condition:
    """A named number, compared with a limit."""

    name: str
    operator: str
    limit: float

    @staticmethod
    def of(text: str) -> Condition:
        """Reads ``"kl.p99 > 0.1"``."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(
                f"expected a condition such as 'kl.p99 > 0.1' (a name, one of {' '.join(_OPERATORS)}, a number), got "
                f"{text[:80]!r}; correct --fail-if"
            )
        limit = float(match["limit"])
        if not math.isfinite(limit):
            raise ValueError(
                f"expected a limit that a float64 can hold, got {match['limit'][:80]!r}, which no number passes; correct --fail-if"
            )
        return Condition(match["name"], match["operator"], limit)

    def holds(self, numbers: dict[str, float | None]) -> bool:
        """Whether it does for these numbers of :func:`numbers_of`."""
        if self.name not in numbers:
            if not numbers.get("counted", numbers.get("paired")):
                raise ValueError(
                    f"expected rows that count for --fail-if {self.name}, got none of {numbers['rows']}; look at what is wrong with them"
                )
            near = difflib.get_close_matches(self.name, numbers, 3) or list(numbers)[:3]
            raise ValueError(
                f"expected the name of a number of the report in --fail-if, got {self.name!r}; such as {', '.join(near)}"
            )
        value = numbers[self.name]
        if value is None:
            raise ValueError(
                f"expected {self.name} to have a value for --fail-if, got none: too few rows tell it, or float64 cannot hold it; score more rows, "
                "or use another number"
            )
        return bool(_OPERATORS[self.operator](value, self.limit))

    def __str__(self) -> str:
        return f"{self.name} {self.operator} {self.limit:g}"


def numbers_of(report: dict[str, Any]) -> dict[str, float | None]:
    """Every number of a report that a condition can name: ``kl.mean``, ``kl.p99``, ``kl.p99.high``, ``agreement.top1``,
    ``bad_rows.nan``, ``rows``, …; ``.low`` and ``.high`` are the ends of its interval."""
    numbers: dict[str, float | None] = {}

    def add(name: str, value: float | None, interval: list[float | None] | None) -> None:
        low, high = interval or (None, None)
        numbers.update({name: value, f"{name}.low": low, f"{name}.high": high})

    for name, score in report["scores"].items():
        add(f"{name}.mean", score["mean"], score["interval"])
        for share, value in score["quantiles"].items():
            add(f"{name}.{share}", value, score["quantile_intervals"][share])
        for fact in ("minimum", "maximum", "root_mean_square", "count"):
            numbers[f"{name}.{fact}"] = score.get(fact)
    for part in ("agreement", "accuracy", "perplexity", "calibration_error"):
        for name, entry in report.get(part, {}).items():
            add(f"{part}.{name}", entry["value"], entry["interval"])
    for kind, count in report["bad_rows"].items():
        numbers[f"bad_rows.{kind}"] = count
    numbers["bad_rows"] = sum(report["bad_rows"].values())
    numbers["rows"], numbers["counted"] = report["rows"], report["counted"]
    return numbers
