"""Generated parts of texts, from the registry: the families of losses in the README, the table of all losses in docs/losses.md.

A part stands between ``<!-- pykd:NAME -->`` and ``<!-- /pykd:NAME -->``; ``pykd table --write FILE`` renews those that a file
has, and tests fail where one is out of date.
"""

import importlib
import inspect
import re
from pathlib import Path

from pykd.definition import Alias, Loss, registry


def parts() -> dict[str, str]:
    """Every generated part by its name."""
    return {"losses": families(), "catalogue": catalogue()}


def families() -> str:
    """The families with the names of their losses, in Markdown."""
    lines = ["| family | what they compare | losses |", "|---|---|---|"]
    for family, losses in registry.search(()).items():
        names = " · ".join(f"`{cls.name}`" for cls in losses)
        lines.append(f"| {family} | {_subject(family)} | {names} |")
    return "\n".join(lines)


def catalogue() -> str:
    """Every loss in a table of its family, in Markdown."""
    texts = []
    for family, losses in registry.search(()).items():
        head = [f"## {family.capitalize()}", "", f"{_subject(family)}", ""]
        lines = [
            "| loss | class | what it is | inputs | per sample | also called | paper |",
            "|---|---|---|---|---|---|---|",
        ]
        texts.append("\n".join([*(head if _subject(family) else head[:2]), *lines, *map(_row, losses)]))
    return "\n\n".join(texts)


def _subject(family: str) -> str:
    """What the losses of a family are about, as the first line of its folder says; empty for what lies elsewhere."""
    if family == "elsewhere":
        return ""
    return (inspect.getdoc(importlib.import_module(f"pykd.losses.{family}")) or "").splitlines()[0]


def _row(cls: type[Loss]) -> str:
    inputs = "<br>".join(
        f"`{given}` ({' or '.join(', '.join(spec.names) for spec in cls.declared(given))})"
        + (" ∇" if cls.layouts(given)[0].grad else "")
        for given in cls.inputs
        if not cls.layouts(given)[0].optional
    )
    what = (inspect.getdoc(cls) or "").splitlines()[0]
    per_sample = "no" if cls.couples_batch else "yes, and per token" if len(cls.sample_axes) > 1 else "yes"
    aliases = ", ".join(alias.described() if isinstance(alias, Alias) else alias for alias in cls.aliases)
    return f"| `{cls.name}` | `{cls.__name__}` | {what} | {inputs} | {per_sample} | {aliases} | {_paper(cls)} |"


def _paper(cls: type[Loss]) -> str:
    """Authors, year and arXiv id of the first of the loss's references; empty where it names none."""
    _, _, references = (inspect.getdoc(cls) or "").partition("\nReferences:\n")
    authors, _, work = " ".join(references.split()).split(";")[0].partition(":")
    names = authors.split(", ")
    shown = authors if len(names) <= 3 else f"{names[0]} et al."
    arxiv = re.findall(r"arXiv:[\d.]*\d", work)
    years = re.findall(r"\b(?:19|20)\d\d\b", re.sub(r"arXiv:\S+", "", work))
    return ", ".join([" ".join([shown, *years[-1:]]).strip(), *arxiv])


def renew(text: str) -> str:
    """``text`` with every generated part that it has as it should be."""
    for name, part in parts().items():
        pattern = re.compile(rf"(<!-- pykd:{name} -->\n).*?(\n<!-- /pykd:{name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, part=part: match[1] + part + match[2], text)  # type: ignore[misc]
    return text


def stale(path: Path) -> list[str]:
    """The parts of a file that differ from what they should be."""
    text = _read(path)
    return [
        name
        for name, part in parts().items()
        if f"<!-- pykd:{name} -->" in text and f"<!-- pykd:{name} -->\n{part}\n<!-- /pykd:{name} -->" not in text
    ]


def write(path: Path) -> None:
    """Renews the generated parts of a file."""
    path.write_text(renew(_read(path)), encoding="utf-8")


def _read(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if not any(f"<!-- pykd:{name} -->" in text for name in parts()):
        known = " or ".join(f"<!-- pykd:{name} -->" for name in parts())
        raise ValueError(
            f"expected {path} to have a place for a generated part, got none; write {known} where it shall be"
        )
    return text
