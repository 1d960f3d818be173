"""The README shows what runs: its blocks are executed, its tables generated."""

import importlib.machinery
import importlib.util
import re
from pathlib import Path

import pytest

from pykd.command_line import table
from pykd.definition import Loss, registry
from pykd.export.verification import LIMITS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def script():
    loader = importlib.machinery.SourceFileLoader("readme_script", str(ROOT / "scripts" / "readme"))
    spec = importlib.util.spec_from_loader("readme_script", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.slow
def test_generated_parts_are_up_to_date():
    parts = script().quick_parts(TEXT)
    for name, part in parts.items():
        assert f"<!-- pykd:{name} -->\n{part}\n<!-- /pykd:{name} -->" in TEXT, (
            f"{name} is out of date; run `make readme`"
        )


def test_the_tables_of_losses_are_up_to_date():
    for path, part in ((ROOT / "README.md", "losses"), (ROOT / "docs" / "losses.md", "catalogue")):
        assert f"<!-- pykd:{part} -->" in path.read_text(encoding="utf-8")
        assert not table.stale(path), f"{path.name} is out of date; run `scripts/generate`"


def test_every_loss_is_in_the_tables():
    registry.load_all()
    families, catalogue = table.families(), table.catalogue()
    for name, cls in registry.registered().items():
        (line,) = [line for line in families.splitlines() if f" `{name}` " in line]
        assert line.startswith(f"| {cls.family or 'elsewhere'} |")
        (line,) = [line for line in catalogue.splitlines() if line.startswith(f"| `{name}` |")]
        assert all(alias in line for alias in cls.aliases)


@pytest.mark.parametrize(
    ("references", "shown"),
    [
        ("Hinton, Vinyals, Dean: Distilling, 2015, arXiv:1503.02531 (KL); Gu: MiniLLM, 2023.", "Hinton, Vinyals, Dean 2015, arXiv:1503.02531"),
        ("Zhou, Song, Chen, Zhou: Rethinking Soft\n    Labels, ICLR 2021, arXiv:2102.00650.", "Zhou et al. 2021, arXiv:2102.00650"),
        ("Feng et al.: Double Similarity: 1984 again, IEEE, 2021.", "Feng et al. 2021"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_paper_of_a_loss_is_its_first_reference(references, shown):
    class Described(Loss):
        pass

    Described.__doc__ = f"A loss.\n\nReferences:\n    {references}\n" if references else "A loss."
    assert table._row(Described).endswith(f"| {shown} |")


@pytest.mark.parametrize(("path", "part"), [("README.md", "how-close"), ("docs/losses.md", "how-close-each")])
def test_the_tables_of_errors_name_what_there_is_and_no_error_beyond_the_limits(path, part):
    text = (
        (ROOT / path).read_text(encoding="utf-8").split(f"<!-- pykd:{part} -->")[1].split(f"<!-- /pykd:{part} -->")[0]
    )
    registry.load_all()
    known = registry.registered()
    rows = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert rows and set(rows) <= (set(known) if part == "how-close-each" else {cls.family for cls in known.values()})
    pairs = re.findall(r"(\d+e[+-]\d+), (\d+e[+-]\d+)(†?)", text)
    assert len(pairs) == 4 * len(rows)
    most_value, most_gradient = LIMITS["float32"]
    # scripts/readme takes what verification lets pass, which is more where the rounding of inputs alone moves a gradient that
    # far: the text has a mark for it.
    assert all(float(value) <= most_value for value, _, _ in pairs)
    assert all(float(gradient) <= most_gradient * (50 if mark else 1) for _, gradient, mark in pairs)
    assert sum(bool(mark) for *_, mark in pairs) < len(pairs) / 2


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_recipes_in_the_docs_build():
    from pykd.composition import recipe

    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        recipe.build(recipe.tomllib.loads(block))
