"""Teacher outputs on disk, once for any number of students: ``pykd teacher``."""

import argparse
from pathlib import Path
from typing import Any

from pykd import files

_KEPT = 128


def add(commands: Any) -> None:
    teacher = commands.add_parser(
        "teacher",
        help="write a teacher's outputs once, small, for any number of students to be scored against",
        description="Writes what `pykd score --teacher` reads: of each row the most probable classes and the mass of all others. Files that are "
        "read: those of `pykd score`. What is written has a checksum per block, and is written whole or not at all.",
    )
    teacher.add_argument(
        "--teacher",
        metavar="FILE",
        help="logits of the teacher, (rows, classes); of --form hidden its states",
    )
    teacher.add_argument(
        "--model",
        metavar="FILE.onnx",
        help="in place of --teacher: a model, run by ONNX Runtime over the files of --input",
    )
    teacher.add_argument(
        "--input",
        action="append",
        metavar="NAME=FILE",
        help="of --model: an input, and the file of its samples; again: one more",
    )
    teacher.add_argument("--output", metavar="NAME", help="of --model: its output, where there are several")
    teacher.add_argument("--batch", type=int, metavar="N", help="of --model: samples of a run (default 32)")
    teacher.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        required=True,
        help="the file to write: FILE.safetensors; of --form full FILE.npy or FILE.arrow as well",
    )
    teacher.add_argument(
        "--form",
        choices=("top-k", "full", "hidden", "llama"),
        default="top-k",
        help="top-k: the most probable classes (default); full: all; hidden: hidden states, and the head that makes logits of them; llama: the base file of llama-perplexity --kl-divergence",
    )
    teacher.add_argument("--keep", type=int, metavar="K", help=f"classes per row of a top-k (default {_KEPT}, or all)")
    teacher.add_argument(
        "--temperature",
        type=float,
        action="append",
        metavar="T",
        help="students can be scored against a top-k at 1 and at this one; again: one more",
    )
    teacher.add_argument(
        "--head", metavar="FILE", help="of hidden states: the matrix, (classes, length), as the last layer's weight"
    )
    teacher.add_argument("--bias", metavar="FILE", help="of hidden states: one number per class")
    teacher.add_argument("--tokens", metavar="FILE", help="of a base file: the text, whole numbers, chunk by chunk")
    teacher.add_argument("--context", type=int, metavar="N", help="of a base file: tokens of a chunk")
    teacher.add_argument("--classes", type=int, metavar="N", help="the first that count, where the others are padding")
    teacher.add_argument(
        "--dtype", choices=("float16", "float32"), help="of what is stored (default float16; that of hidden states)"
    )
    teacher.add_argument("--tokenizer", metavar="FILE", help="its SHA-256 is noted")
    teacher.add_argument("--threads", type=int, default=0, help="that work at once (default: one per core)")
    teacher.set_defaults(run=_teacher)


# What a form alone takes.
_OF_FORM = {
    "keep": "top-k",
    "temperature": "top-k",
    "head": "hidden",
    "bias": "hidden",
    "tokens": "llama",
    "context": "llama",
}
# What it must have.
_NEEDED = {"hidden": ("head",), "llama": ("tokens", "context")}


def _teacher(options: argparse.Namespace) -> int:
    from pykd.command_line.scoring import progress
    from pykd.scoring import teacher
    from pykd.scoring.sources import open_column, open_matrix
    from pykd.scoring.stream import cores

    _check(options)
    source = open_matrix(options.teacher, "teacher") if options.model is None else _of_model(options)
    if options.form == "llama":
        return _base_file(options, source)
    shared: dict[str, Any] = {
        "classes": options.classes,
        "tokenizer": options.tokenizer,
        "threads": options.threads or cores(),
        "progress": progress(),
    }
    if options.form == "hidden":
        bias = None if options.bias is None else open_column(options.bias, "bias", "f")
        teacher.write_hidden(
            source, open_matrix(options.head, "head"), options.out, bias, dtype=options.dtype, **shared
        )
    elif options.form == "full":
        teacher.write_full(source, options.out, dtype=options.dtype or "float16", **shared)
    else:
        kept = min(_KEPT, options.classes or source.width or 0) if options.keep is None else options.keep
        teacher.write_top_k(
            source, options.out, kept, options.temperature or (), dtype=options.dtype or "float16", **shared
        )
    _say(options.out, source.rows)
    return 0


def _of_model(options: argparse.Namespace) -> Any:
    from pykd.scoring.model_rows import open_model

    inputs = {}
    for text in options.input or ():
        name, sign, where = text.partition("=")
        if not sign or name in inputs:
            raise ValueError(f"expected --input NAME=FILE, each name once, got {text}; correct it")
        inputs[name] = where
    return open_model(options.model, inputs, options.output, 32 if options.batch is None else options.batch)


def _base_file(options: argparse.Namespace, source: Any) -> int:
    from pykd.command_line.scoring import progress
    from pykd.scoring.llama import read_head, write_base
    from pykd.scoring.sources import open_column
    from pykd.scoring.stream import cores

    tokens = open_column(options.tokens, "tokens")
    write_base(source, tokens, options.context, options.out, options.threads or cores(), progress())
    _say(options.out, read_head(str(options.out), str(options.out)).rows)
    return 0


def _say(out: Path, rows: int) -> None:
    size = out.stat().st_size
    print(f"{out}: {rows:,} rows, {size:,} bytes, {size / rows:,.0f} per row")


def _check(options: argparse.Namespace) -> None:
    from pykd.scoring.sources import path_of
    from pykd.scoring.teacher import writer_of

    if (options.teacher is None) == (options.model is None):
        raise ValueError("expected either --teacher FILE or --model FILE.onnx, got both or none; pass one")
    for name in ("input", "output", "batch"):
        if options.model is None and getattr(options, name) is not None:
            raise ValueError(f"expected no --{name} without --model, got one; leave it out, or pass --model")
    for name, form in _OF_FORM.items():
        if getattr(options, name) is not None and options.form != form:
            raise ValueError(
                f"expected no --{name} with --form {options.form}, got one; leave it out, or write --form {form}"
            )
    for name in _NEEDED.get(options.form, ()):
        if getattr(options, name) is None:
            raise ValueError(f"expected --{name} with --form {options.form}, got none; add it")
    fixed = (options.classes, options.dtype, options.tokenizer)
    if options.form == "llama" and fixed != (None, None, None):
        raise ValueError(
            "expected no --classes, --dtype and --tokenizer with --form llama, whose format is fixed, got one; leave it out"
        )
    if options.threads < 0:
        raise ValueError(f"expected --threads from 0, got {options.threads}; correct it")
    if options.form != "llama":
        writer_of(options.form, options.out)
    if not options.out.parent.is_dir():
        raise FileNotFoundError(f"expected a folder for --out, got none at {options.out.parent}; make it")
    written = {path.resolve() for path in (options.out, files.beside(options.out.resolve()))}
    read = {name: getattr(options, name) for name in ("teacher", "model", "head", "bias", "tokenizer", "tokens")}
    read |= {f"input {text.partition('=')[0]}": text.partition("=")[2] for text in options.input or ()}
    for name, where in read.items():
        if where is not None and Path(path_of(where)).resolve() in written:
            raise ValueError(f"expected another file for --out than the {name}, got {options.out}; name another")
