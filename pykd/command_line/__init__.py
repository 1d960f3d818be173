"""The command line: ``pykd list``, ``show``, ``table``, ``export``, ``verify``, ``score``, ``teacher``, ``merge``, ``triton``, ``demo``, ``env``.

Each file holds one family of commands: ``add`` declares them to the parser, and says which function runs each.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from pykd import files
from pykd._version import __version__
from pykd.command_line import artefacts, losses, machine, merging, scoring, teacher


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
    for family in (losses, artefacts, scoring, teacher, merging, machine):
        family.add(commands)
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any bytes, and terminals few signs
    try:
        code = int(options.run(options) or 0)
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
        remedy = "make room" if error.errno in files.FULL else "check the path, and who may use it"
        return f"expected to read or write {where or 'a file'}, got {error.strerror!r}; {remedy}"
    if isinstance(error, ArithmeticError):
        return f"expected numbers that can be computed with, got {str(error)!r}; check the settings"
    if isinstance(error, MemoryError):
        return "expected enough memory, got too little; free some, or use smaller tensors"
    return str(error)
