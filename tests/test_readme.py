"""The README shows what runs: its blocks are executed, its tables generated."""

import importlib.machinery
import importlib.util
import re
from pathlib import Path

import pytest

from pykd.definition import registry
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


def test_the_table_of_errors_names_every_loss_and_no_error_beyond_the_limits():
    table = TEXT.split("<!-- pykd:how-close -->")[1].split("<!-- /pykd:how-close -->")[0]
    registry.load_all()
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(registry.registered()), "run `make readme`"
    pairs = re.findall(r"(\d+e[+-]\d+), (\d+e[+-]\d+)", table)
    assert len(pairs) == 4 * len(registry.registered())
    most_value, most_gradient = LIMITS["float32"]
    assert all(float(value) <= most_value and float(gradient) <= most_gradient for value, gradient in pairs)


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
