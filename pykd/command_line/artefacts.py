"""Files of losses: ``pykd export``, ``verify``."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    export = commands.add_parser("export", help="write the files of a loss")
    export.add_argument("--recipe", required=True, type=Path, help="a TOML file; see `pykd show` and docs/recipes.md")
    export.add_argument("--out", required=True, type=Path, help="the folder to write")
    export.add_argument("--dtype", help="floating type of the ONNX files (default: the recipe's, or float32)")
    export.add_argument(
        "--kernels", help="nodes for fused kernels in the ONNX files: auto, on, or off for standard operators alone"
    )
    export.add_argument("--parameters", help="how ONNX files hold parameters: overridable (default), fixed or inputs")
    export.add_argument("--per-sample", action="store_true", help="add values per sample")
    export.add_argument(
        "--kind",
        help="loss (default), or score: one ONNX file that gives a number per sample, without scalar and gradient",
    )
    export.set_defaults(run=_export)

    verify = commands.add_parser("verify", help="run exported files on every engine here and compare with float64")
    verify.add_argument(
        "directory",
        type=Path,
        help="what `pykd export` wrote; or a file of `pykd merge`, of which the checksums are compared",
    )
    verify.add_argument("--seed", type=_seed, default=0, help="for the random inputs (default 0)")
    verify.add_argument("--trust", action="store_true", help="run loss.pt, too: it is a program, and may do anything")
    verify.set_defaults(run=_verify)


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 of at most 18 digits, got {text[:40]!r}; pass another seed"
        )
    return int(text)


def _export(options: argparse.Namespace) -> None:
    from pykd.composition import recipe
    from pykd.export import export

    table = recipe.load(options.recipe)
    settings = export_arguments(table)
    for name in ("dtype", "kernels", "parameters", "kind"):
        if getattr(options, name):
            settings[name] = getattr(options, name)
    if options.per_sample:
        settings["per_sample"] = True
    print(export(recipe.build(table), options.out, **settings))


def export_arguments(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The table ``[export]`` of a recipe, as keyword arguments of :func:`pykd.export`."""
    from pykd.composition.recipe import arguments_of, table_of
    from pykd.export import export

    given = table_of(recipe.get("export", {}), "[export]")
    return arguments_of(export, given, "the arguments of pykd.export", without=("loss", "directory", "progress"))


def _verify(options: argparse.Namespace) -> int:
    from pykd.export import verify

    if options.directory.is_file():
        from pykd.scoring.merge import check_file

        weights = "".join(f", and its weights in {path}" for path in check_file(options.directory))
        print(f"{options.directory} is as `pykd merge` wrote it{weights}; its numbers were not compared")
        return 0
    report = verify(options.directory, seed=options.seed, trust=options.trust)
    print(report)
    if not report.rows:
        raise ValueError("expected a file to run, got none; see above")
    print(report.summary() if report.ok else "DISAGREEMENT: see the rows marked so")
    return 0 if report.ok else 1
