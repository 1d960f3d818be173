"""Generated parts of the README: the table of losses, from the registry.

A part stands between ``<!-- pykd:NAME -->`` and ``<!-- /pykd:NAME -->``; ``pykd table --write README.md`` renews it,
and a test fails where it is out of date.
"""

import inspect
import re
from pathlib import Path

from pykd.definition import registry


def parts() -> dict[str, str]:
    """Every generated part by its name."""
    return {"losses": losses()}


def losses() -> str:
    """The table of losses in Markdown."""
    registry.load_all()
    lines = ["| loss | class | inputs | per sample | what it is | paper |", "|---|---|---|---|---|---|"]
    for name, cls in registry.registered().items():
        inputs = "<br>".join(
            f"`{given}` ({' or '.join(', '.join(spec.names) for spec in cls.declared(given))})"
            + (" ∇" if cls.layouts(given)[0].grad else "")
            for given in cls.inputs
            if not cls.layouts(given)[0].optional
        )
        what = (inspect.getdoc(cls) or "").splitlines()[0]
        per_sample = "no" if cls.couples_batch else "yes, and per token" if len(cls.sample_axes) > 1 else "yes"
        lines.append(f"| `{name}` | `{cls.__name__}` | {inputs} | {per_sample} | {what} | {cls.paper} |")
    return "\n".join(lines)


def renew(text: str) -> str:
    """``text`` with every generated part as it should be."""
    for name, part in parts().items():
        pattern = re.compile(rf"(<!-- pykd:{name} -->\n).*?(\n<!-- /pykd:{name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, part=part: match[1] + part + match[2], text)  # type: ignore[misc]
    return text


def stale(path: Path) -> list[str]:
    """The parts of a file that differ from what they should be, or are missing."""
    text = path.read_text(encoding="utf-8")
    return [
        name for name, part in parts().items() if f"<!-- pykd:{name} -->\n{part}\n<!-- /pykd:{name} -->" not in text
    ]


def write(path: Path) -> None:
    """Renews the generated parts of a file."""
    path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")
