"""Teacher outputs on disk, once for any number of students: ``pykd teacher``."""

import argparse
from pathlib import Path
from typing import Any

_KEPT = 128


def add(commands: Any) -> None:
    teacher = commands.add_parser(
        "teacher",
        help="write a teacher's outputs once, small, for any number of students to be scored against",
        description="Writes what `pykd score --teacher` reads: of each row the most probable classes and the mass of all others. Files that are "
        "read: those of `pykd score`. What is written has a checksum per block, and is written whole or not at all.",
    )
    teacher.add_argument("--teacher", metavar="FILE", required=True, help="logits of the teacher, (rows, classes)")
    teacher.add_argument("--out", type=Path, metavar="FILE.safetensors", required=True, help="the file to write")
    teacher.add_argument(
        "--keep", type=int, metavar="K", default=_KEPT, help=f"classes per row (default {_KEPT}, at most all)"
    )
    teacher.add_argument(
        "--temperature",
        type=float,
        action="append",
        default=[],
        metavar="T",
        help="students can be scored at 1 and at this one; again: one more",
    )
    teacher.add_argument("--classes", type=int, metavar="N", help="the first that count, where the others are padding")
    teacher.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="of the log-probabilities (default float16)"
    )
    teacher.add_argument("--tokenizer", metavar="FILE", help="its SHA-256 is noted")
    teacher.add_argument("--threads", type=int, default=0, help="that work at once (default: one per core)")
    teacher.set_defaults(run=_teacher)


def _teacher(options: argparse.Namespace) -> int:
    from pykd.command_line.scoring import progress
    from pykd.scoring.sources import open_matrix, path_of
    from pykd.scoring.stream import cores
    from pykd.scoring.teacher import write_top_k

    if options.threads < 0:
        raise ValueError(f"expected --threads from 0, got {options.threads}")
    if options.out.suffix != ".safetensors":
        raise ValueError(f"expected --out FILE.safetensors, got {options.out}; name it so")
    if not options.out.parent.is_dir():
        raise FileNotFoundError(f"expected a folder for --out, got none at {options.out.parent}; make it")
    if options.out.resolve() == Path(path_of(options.teacher)).resolve():
        raise ValueError(f"expected another file for --out than the teacher, got {options.out}; name another")
    source = open_matrix(options.teacher, "teacher")
    write_top_k(
        source,
        options.out,
        min(options.keep, options.classes or source.width or 0),
        temperatures=options.temperature,
        classes=options.classes,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        threads=options.threads or cores(),
        progress=progress(),
    )
    size = options.out.stat().st_size
    print(f"{options.out}: {source.rows:,} rows, {size:,} bytes, {size / source.rows:,.0f} per row")
    return 0
