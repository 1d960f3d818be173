"""One file that scores, and a folder that a server serves: ``pykd merge``, ``triton``."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="one ONNX file out of teacher, student and loss: the models' inputs in, scores out",
        description="Writes an ONNX file that takes what the models take and returns the loss per sample. The models are not "
        "converted: their weights stay as they are, and the loss is written at their opset.",
    )
    merge.add_argument("--teacher", required=True, metavar="FILE", help="an ONNX model")
    merge.add_argument("--student", required=True, metavar="FILE", help="an ONNX model at the same opset")
    merge.add_argument("--loss", required=True, metavar="FOLDER", help="what `pykd export --kind score` wrote")
    _add_connections(merge)
    merge.add_argument("--keep", action="append", default=[], metavar="MODEL:OUTPUT", help="returns this one, too")
    merge.add_argument("-o", "--out", required=True, type=Path, metavar="FILE", help="where to write")
    merge.set_defaults(run=_merge)
    _add_triton(commands)


def _add_triton(commands: Any) -> None:
    triton = commands.add_parser(
        "triton",
        help="a model repository for NVIDIA's Triton Inference Server",
        description="Writes a folder that Triton serves: a merged scorer as one model, or a teacher, a student and a loss as an ensemble.",
    )
    triton.add_argument("out", type=Path, metavar="FOLDER", help="where to write; not there yet, or empty")
    triton.add_argument("--scorer", metavar="FILE", help="what `pykd merge` wrote")
    triton.add_argument(
        "--teacher", metavar="FILE", help="an ONNX model; with --student and --loss, in place of --scorer"
    )
    triton.add_argument("--student", metavar="FILE", help="an ONNX model")
    triton.add_argument("--loss", metavar="FOLDER", help="what `pykd export --kind score` wrote")
    _add_connections(triton)
    triton.add_argument("--name", default="scorer", help="of the model (default scorer)")
    triton.add_argument("--max-batch", type=int, default=64, metavar="N", help="the most rows of a batch (default 64)")
    triton.add_argument(
        "--served-at", default="/models", metavar="PATH", help="where the server will see the folder (default /models)"
    )
    triton.add_argument(
        "--operators", metavar="PATH", help="where libpykd lies on the server (default: it is copied into the folder)"
    )
    triton.add_argument("--no-kernels", action="store_true", help="the loss runs its formula, and needs no libpykd")
    triton.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a number of the loss, such as temperature=2, to write into the file; again: one more. The others keep their defaults",
    )
    triton.set_defaults(run=_triton)


def _add_connections(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--connect",
        action="append",
        default=[],
        metavar="MODEL:OUTPUT=INPUT",
        help="an output of a model and the input of the loss that it is, such as student:logits=student_logits; not needed where each "
        "model has one output, and the loss one input of each",
    )
    command.add_argument(
        "--share",
        action="append",
        default=[],
        metavar="student:INPUT=teacher:INPUT",
        help="inputs of two names that are one; those of one name are one anyway",
    )
    command.add_argument(
        "--separate",
        action="append",
        default=[],
        metavar="INPUT",
        help="a name that both models have, and that is two inputs",
    )


def _merge(options: argparse.Namespace) -> None:
    from pykd.scoring.merge import merge

    out = merge(
        options.teacher,
        options.student,
        options.loss,
        options.out,
        connect=_pairs("--connect", options.connect),
        share=_pairs("--share", options.share),
        separate=options.separate,
        keep=options.keep,
    )
    print(f"wrote {out}")


def _triton(options: argparse.Namespace) -> None:
    from pykd.scoring.triton import write_repository

    numbers = {}
    for name, text in _pairs("--fix", options.fix).items():
        try:
            numbers[name] = float(text)
        except ValueError as error:
            raise ValueError(f"expected --fix {name} with a number, got {text!r}; correct it") from error
    out = write_repository(
        options.out,
        options.scorer,
        teacher=options.teacher,
        student=options.student,
        loss=options.loss,
        connect=_pairs("--connect", options.connect),
        share=_pairs("--share", options.share),
        separate=options.separate,
        name=options.name,
        max_batch=options.max_batch,
        served_at=options.served_at,
        operators=options.operators,
        kernels=not options.no_kernels,
        fixed=numbers,
    )
    print(f"wrote {out}; {out / 'README.md'} says how to start the server")


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        before, sign, after = text.partition("=")
        if not (before and sign and after):
            raise ValueError(f"expected {option} with a name on each side of =, got {text!r}; write it so")
        if before in found:
            raise ValueError(f"expected {before} once, got {found[before]} and {after}; {option} one of them")
        found[before] = after
    return found
