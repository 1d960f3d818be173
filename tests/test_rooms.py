"""The house has no circle and no upward arrow: what every module may import is read from the modules themselves.

A module may import its own room's modules below it and any room further down; what is inside a function, and what only
type checkers read, counts as well.
"""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A name stands for the module and everything inside it; the longest that fits counts. Rooms on one
# floor do not import each other.
FLOORS = [
    ("pykd._version", "pykd._core", "pykd.config", "pykd.files", "pykd.integrity"),
    ("pykd.runtime", "pykd.kernels", "pykd.definition"),
    ("pykd.fused", "pykd.scoring"),
    ("pykd.torch_kernels", "pykd.losses"),
    ("pykd.composition", "pykd.functional"),
    ("pykd.recipe", "pykd.distributed", "pykd.export"),
    ("pykd.demo",),
    ("pykd.command_line",),
    ("pykd", "pykd.__main__"),  # the entrance: names of all rooms, looked up on first use
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("pykd", *parts) if parts[0] == "export" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path): path
    for folder in ("pykd", "export")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "export" not in path.relative_to(ROOT).parts[1:]  # a link to export/
}
# What has no source in Python: the extension, and what type checkers alone read.
COMPILED = {module_of(path) for path in (ROOT / "pykd").rglob("*.pyi")} - MODULES.keys()


def imports_of(path: Path) -> set[str]:
    """The modules of pykd that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES or inner in COMPILED else str(node.module))
    return {name for name in found if name.split(".")[0] == "pykd"}


def room_of(module: str) -> str:
    parts = module.split(".")
    return next(room for n in range(len(parts), 0, -1) if (room := ".".join(parts[:n])) in FLOOR_OF)


IMPORTS = {module: imports_of(path) - {module} for module, path in MODULES.items()}


def test_every_module_is_read():
    assert {"pykd.definition.spec", "pykd.losses.logits.soft_target", "pykd.export.verification"} <= MODULES.keys()
    assert "pykd.export.verification" in IMPORTS["pykd.export"]
    for module, imported in IMPORTS.items():
        assert imported <= MODULES.keys() | COMPILED, f"{module} imports what is not there"
    for room in FLOOR_OF.keys() - COMPILED:
        assert room in MODULES, f"there is no room {room}"


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_runs_upward(module):
    own = room_of(module)
    for other in IMPORTS[module]:
        room = room_of(other)
        assert room == own or FLOOR_OF[room] < FLOOR_OF[own], f"{module} imports {other}, which is not below {own}"


def test_no_circle():
    # Importing a package's own modules in its __init__ is a face, not an arrow: they must not import the face.
    graphlib.TopologicalSorter(IMPORTS).prepare()


def test_a_room_of_losses_takes_nothing_of_another_loss():
    """A loss stands on the definition, on kernels' descriptions, and on what its family shares."""
    for module in MODULES:
        if module.startswith("pykd.losses."):
            for other in IMPORTS[module]:
                same_family = other.rpartition(".")[0] == module.rpartition(".")[0]
                assert (
                    room_of(other) == "pykd.definition"
                    or other == "pykd.fused.description"
                    or (same_family and other.rpartition(".")[2].startswith("_"))
                ), f"{module} imports {other}"
