"""One file that scores: ``pykd merge``."""

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
    merge.add_argument(
        "--connect",
        action="append",
        default=[],
        metavar="MODEL:OUTPUT=INPUT",
        help="an output of a model and the input of the loss that it is, such as student:logits=student_logits; not needed where each "
        "model has one output, and the loss one input of each",
    )
    merge.add_argument(
        "--share",
        action="append",
        default=[],
        metavar="student:INPUT=teacher:INPUT",
        help="inputs of two names that are one; those of one name are one anyway",
    )
    merge.add_argument(
        "--separate",
        action="append",
        default=[],
        metavar="INPUT",
        help="a name that both models have, and that is two inputs",
    )
    merge.add_argument("--keep", action="append", default=[], metavar="MODEL:OUTPUT", help="returns this one, too")
    merge.add_argument("-o", "--out", required=True, type=Path, metavar="FILE", help="where to write")
    merge.set_defaults(run=_merge)


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
