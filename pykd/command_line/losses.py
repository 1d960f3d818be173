"""What there is: ``pykd list``, ``show``, ``table``."""

import argparse
import inspect
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    listing = commands.add_parser("list", help="every loss in a line, by family")
    listing.add_argument("word", nargs="*", help="show those only in whose line or family all of these stand")
    listing.add_argument("--support", action="store_true", help="where each of them runs, in which types, and why not")
    listing.set_defaults(run=_list)

    show = commands.add_parser("show", help="the specification of one loss")
    show.add_argument("loss", help="its name or an alias, as `pykd list` prints them")
    show.set_defaults(run=_show)

    table = commands.add_parser("table", help="the generated parts of the README and docs/losses.md")
    table.add_argument("--write", type=Path, metavar="FILE", help="renew those that this file has")
    table.add_argument("--check", type=Path, metavar="FILE", help="exit with 1 where this file is out of date")
    table.set_defaults(run=_table)


def _list(options: argparse.Namespace) -> None:
    from pykd.definition import registry

    families = registry.search(options.word)
    if not families:
        raise ValueError(
            f"expected words that stand in the line or the family of a loss, got {' '.join(options.word)!r}; "
            "`pykd list` shows every loss"
        )
    if options.support:
        from pykd.command_line import support

        print("\n".join(support.lines(cls for losses in families.values() for cls in losses)))
        return
    for number, (family, losses) in enumerate(families.items()):
        print(("\n" if number else "") + family)
        for cls in losses:
            aliases = f" ({', '.join(cls.aliases)})" if cls.aliases else ""
            print(f"  {cls.name:26} {cls.__name__:26} {(inspect.getdoc(cls) or '').splitlines()[0]}{aliases}")


def _show(options: argparse.Namespace) -> None:
    from pykd.definition import Alias, get

    cls = get(options.loss)
    print(f"{cls.__name__}{inspect.signature(cls)}\n\n{inspect.getdoc(cls)}")
    if cls.aliases:
        names = (name.described() if isinstance(name, Alias) else name for name in cls.aliases)
        print(f"\nAlso called: {', '.join(names)}")


def _table(options: argparse.Namespace) -> int:
    from pykd.command_line import table

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
