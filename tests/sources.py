"""Which source files of pykd a module uses, read from its imports: directly, through others, and inside functions."""

import ast
import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path


def used_by(modules: Iterable[str], *, not_through: str = "") -> dict[str, Path]:
    """The files of ``modules`` and of every module of pykd that they import, by name.

    Args:
        modules: names of modules.
        not_through: a package whose modules are left out, unless they are among ``modules``.
    """
    found: dict[str, Path] = {}
    open_ones = list(modules)
    while open_ones:
        name = open_ones.pop()
        path = _file(name) if name and name not in found else None
        if path is None:
            continue
        found[name] = path
        names = _imports(path, name) | {name.rpartition(".")[0]}  # to import a module runs the package it is in
        if not_through:
            names = {each for each in names if not f"{each}.".startswith(f"{not_through}.")}
        open_ones += names
    return found


@functools.cache
def _file(name: str) -> Path | None:
    """The Python file of a module; None for what is none."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # what it would be in is no package
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@functools.cache
def _imports(path: Path, module: str) -> frozenset[str]:
    """Names that may be modules of pykd: ``from pykd import checks`` may mean a module or what lies in one."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for each in node.orelse:
                visit(each)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found.update([source, *(f"{source}.{alias.name}" for alias in node.names)])
        for each in ast.iter_child_nodes(node):
            visit(each)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(name for name in found if name.partition(".")[0] == "pykd")
