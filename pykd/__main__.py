"""The command line: ``pykd list``, ``show``, ``export``, ``verify``, ``table``, ``demo``, ``env``."""

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pykd._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0: fine. 1: a disagreement. 2: something is wrong with the call, a file or this machine; the one line on stderr says
    what was expected, what came, and what to do. 130: interrupted. 141: whoever read the output has gone.
    """
    parser = argparse.ArgumentParser(
        prog="pykd", description="Knowledge-distillation losses: one definition, every engine."
    )
    parser.add_argument("--version", action="version", version=f"pykd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("list", help="every loss in a line")

    show = commands.add_parser("show", help="the specification of one loss")
    show.add_argument("loss", help="its name, as `pykd list` prints it")

    export = commands.add_parser("export", help="write the files of a loss")
    export.add_argument("--recipe", required=True, type=Path, help="a TOML file; see `pykd show` and docs/recipes.md")
    export.add_argument("--out", required=True, type=Path, help="the folder to write")
    export.add_argument("--dtype", help="floating type of the ONNX files (default: the recipe's, or float32)")
    export.add_argument(
        "--kernels", help="nodes for fused kernels in the ONNX files: auto, on, or off for standard operators alone"
    )
    export.add_argument("--parameters", help="how ONNX files hold parameters: overridable (default), fixed or inputs")
    export.add_argument("--per-sample", action="store_true", help="add values per sample")

    verify = commands.add_parser("verify", help="run exported files on every engine here and compare with float64")
    verify.add_argument("directory", type=Path, help="what `pykd export` wrote")
    verify.add_argument("--seed", type=_seed, default=0, help="for the random inputs (default 0)")
    verify.add_argument("--trust", action="store_true", help="run loss.pt, too: it is a program, and may do anything")

    table = commands.add_parser("table", help="the generated parts of the README")
    table.add_argument("--write", type=Path, metavar="README", help="write them into this file")
    table.add_argument("--check", type=Path, metavar="README", help="exit with 1 where this file is out of date")

    demo = commands.add_parser("demo", help="train teacher and students on the digits, with every engine")
    demo.add_argument("--out", type=Path, default=Path("build/demo"), help="where results go (default build/demo)")

    commands.add_parser("env", help="versions of everything involved, for bug reports")

    options = parser.parse_args(arguments)
    try:
        code = int(_COMMANDS[options.command](options) or 0)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at the end
        return 141
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError, MemoryError) as error:
        print(f"pykd {options.command}: {_said(error)}", file=sys.stderr)
        return 2


def _said(error: Exception) -> str:
    """What went wrong in three parts, for exceptions of Python itself, too."""
    if isinstance(error, OSError) and error.errno is not None:
        where = " and ".join(str(path) for path in (error.filename, error.filename2) if path is not None)
        return (
            f"expected to read or write {where or 'a file'}, got {error.strerror!r}; check the path, and who may use it"
        )
    if isinstance(error, ArithmeticError):
        return f"expected numbers that can be computed with, got {str(error)!r}; check the settings"
    if isinstance(error, MemoryError):
        return "expected enough memory, got too little; free some, or use smaller tensors"
    return str(error)


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 of at most 18 digits, got {text[:40]!r}; pass another seed"
        )
    return int(text)


def _list(options: argparse.Namespace) -> None:
    from pykd import registry

    registry.load_all()
    for name, cls in registry.registered().items():
        print(f"{name:20} {cls.__name__:16} {(inspect.getdoc(cls) or '').splitlines()[0]}")


def _show(options: argparse.Namespace) -> None:
    from pykd import registry

    registry.load_all()
    cls = registry.get(options.loss)
    print(f"{cls.__name__}{inspect.signature(cls)}\n\n{inspect.getdoc(cls)}")


def _export(options: argparse.Namespace) -> None:
    from pykd import recipe
    from pykd.export import export

    table = recipe.load(options.recipe)
    settings = recipe.export_arguments(table)
    for name in ("dtype", "kernels", "parameters"):
        if getattr(options, name):
            settings[name] = getattr(options, name)
    if options.per_sample:
        settings["per_sample"] = True
    print(export(recipe.build(table), options.out, **settings))


def _verify(options: argparse.Namespace) -> int:
    from pykd.export import verify

    report = verify(options.directory, seed=options.seed, trust=options.trust)
    print(report)
    if not report.rows:
        raise ValueError("expected a file to run, got none; see above")
    print(report.summary() if report.ok else "DISAGREEMENT: see the rows marked so")
    return 0 if report.ok else 1


def _table(options: argparse.Namespace) -> int:
    from pykd import table

    if options.write:
        table.write(options.write)
        return 0
    if options.check:
        stale = table.stale(options.check)
        for name in stale:
            print(f"{options.check}: the part {name!r} is out of date; run `pykd table --write {options.check}`")
        return 1 if stale else 0
    for text in table.parts().values():
        print(text, end="\n\n")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from pykd import demo

    return int(demo.main(options.out) or 0)


def _env(options: argparse.Namespace) -> None:
    import platform
    from importlib import metadata

    print(f"pykd {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name}: not installed")
    import torch

    print(f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'torch sees no GPU'}")


_COMMANDS = {
    "list": _list,
    "show": _show,
    "export": _export,
    "verify": _verify,
    "table": _table,
    "demo": _demo,
    "env": _env,
}

if __name__ == "__main__":
    sys.exit(main())
