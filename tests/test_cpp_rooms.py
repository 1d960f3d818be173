"""The rooms of cpp/: base → kernels → ops → runtime. An #include names the room of a header, none runs upward, none in a circle."""

import re
from pathlib import Path

import pytest

CPP = Path(__file__).parents[1] / "cpp"
SUFFIXES = {".h", ".hpp", ".c", ".cpp", ".cu", ".cuh"}

# What a room may know beside the public headers. Whoever uses the library as a user does knows nothing else.
LIBRARY = ["base", "kernels", "ops", "runtime"]
MAY_KNOW = {
    "include": [],
    **{room: LIBRARY[: i + 1] for i, room in enumerate(LIBRARY)},
    "bindings": ["base", "bindings"],
    "examples": ["examples"],
    "tests": [*LIBRARY, "tests"],
    "fuzz": [*LIBRARY, "tests", "fuzz"],
    "bench": [*LIBRARY, "bench"],
}
# Engines and languages, by the start of their headers' names, and who may include them.
FOREIGN = re.compile(r"^(torch/|ATen/|c10/|c10d/|onnxruntime|Python\.h|pybind11)")
NEUTRAL = ["base", "kernels", "runtime/signature", "runtime/artefact"]


def includes(cpp: Path) -> dict[str, list[tuple[str, str]]]:
    """By file: what it includes, each with its opening quote."""
    return {
        path.relative_to(cpp).as_posix(): re.findall(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)[">]', path.read_text(), re.M)
        for path in sorted(cpp.rglob("*"))
        if path.suffix in SUFFIXES
    }  # fmt: skip


def target(cpp: Path, file: str, name: str) -> str | None:
    """The file of cpp/ that an include of `file` means; None: it is somebody else's."""
    if (cpp / "include" / name).is_file():
        return f"include/{name}"
    if file.startswith("examples/"):  # they are copied, and so include each other by name
        return f"examples/{name}" if (cpp / "examples" / name).is_file() else None
    return name if (cpp / name).is_file() else None


def room(file: str) -> str:
    return file.split("/")[0]


def arrows(cpp: Path) -> dict[str, set[str]]:
    return {
        file: {found for _, name in names if (found := target(cpp, file, name))}
        for file, names in includes(cpp).items()
    }


def unknown(cpp: Path) -> list[str]:
    """Includes in quotes that name no file by its room."""
    return [
        f"{file} includes {name}"
        for file, names in includes(cpp).items()
        for quote, name in names
        if quote == '"' and not name.startswith("hwy/") and target(cpp, file, name) is None
    ]


def upward(cpp: Path) -> list[str]:
    return [
        f"{file} includes {found}"
        for file, targets in arrows(cpp).items()
        for found in sorted(targets)
        if room(found) not in [*MAY_KNOW[room(file)], "include"]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle, from a node to itself; empty where there is none."""
    finished: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        for after in sorted(graph.get(node, ())):
            if found := walk(after, [*path, node]):
                return found
        finished.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def folders(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file, targets in graph.items():
        here = file.rpartition("/")[0]
        found.setdefault(here, set()).update(after for t in targets if (after := t.rpartition("/")[0]) != here)
    return found


def foreign(cpp: Path) -> list[str]:
    return [
        f"{file} includes {name}"
        for file, names in includes(cpp).items()
        if any(file.startswith(f"{place}/") for place in NEUTRAL)
        for _, name in names
        if FOREIGN.match(name)
    ]


def test_every_include_names_its_room():
    assert unknown(CPP) == []


def test_every_folder_is_a_room():
    assert {room(file) for file in includes(CPP)} == set(MAY_KNOW)


def test_no_room_knows_one_above_it():
    assert upward(CPP) == []


def test_no_file_includes_itself():
    assert circle(arrows(CPP)) == []


def test_no_folder_includes_itself():
    assert circle(folders(arrows(CPP))) == []


def test_kernels_and_files_know_no_engine():
    assert foreign(CPP) == []


# ---- The checks see what they are for ----------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path):
    def build(**files: str) -> Path:
        for name, text in {"base__error.h": "", "kernels__kernel.h": '#include "base/error.h"\n', **files}.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


def test_an_include_without_its_room_is_found(house):
    cpp = house(**{"kernels__kernel.cpp": '#include "kernel.h"\n'})
    assert unknown(cpp) == ["kernels/kernel.cpp includes kernel.h"]


def test_an_arrow_upward_is_found(house):
    cpp = house(**{"base__error.cpp": '  #  include "kernels/kernel.h"\n'})
    assert upward(cpp) == ["base/error.cpp includes kernels/kernel.h"]


def test_circles_are_found(house):
    cpp = house(**{"base__error.h": '#include "base/tensor.h"\n', "base__tensor.h": '#include "base/error.h"\n'})
    assert circle(arrows(cpp)) == ["base/error.h", "base/tensor.h", "base/error.h"]
    cpp = house(
        **{
            "base__error.h": "",
            "kernels__kernel.cpp": '#include "kernels/host/threads.h"\n',
            "kernels__host__threads.h": '#include "kernels/kernel.h"\n',
        }
    )
    assert circle(arrows(cpp)) == []
    assert circle(folders(arrows(cpp))) == ["kernels", "kernels/host", "kernels"]


def test_a_header_of_an_engine_is_found(house):
    cpp = house(**{"kernels__kernel.cpp": "#include <onnxruntime_c_api.h>\n"})
    assert foreign(cpp) == ["kernels/kernel.cpp includes onnxruntime_c_api.h"]
