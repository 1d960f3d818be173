"""How far students drift from the teacher on images that nobody was trained on: in full precision, and with 8-bit integers.

Both students are scored three ways, which have to give the same bits: by one merged ONNX file, by a session for each part, and
by ``pykd score`` from files of logits. The commands are run as a user would.
"""

import dataclasses
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pykd import config
from pykd.demo import programs
from pykd.demo.digits import Digits, Network
from pykd.export import export
from pykd.losses.logits.soft_target import SoftTarget
from pykd.scoring.compare import compare
from pykd.scoring.results import Scores
from pykd.scoring.sessions import Sessions

STUDENTS = {"student": "full precision", "student_int8": "8-bit integers"}  # file → what it is
CONNECT = {"teacher:logits": "teacher_logits", "student:logits": "student_logits"}

Say = Callable[[str], None]
Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Two students' scores.

    Attributes:
        agree: per student, whether the three ways gave the same bits.
        difference: what ``pykd score --compare`` says: 8-bit integers − full precision.
        reports: per student, the page.
    """

    agree: dict[str, bool]
    difference: dict[str, Any]
    reports: dict[str, Path]

    @property
    def ok(self) -> bool:
        """Whether all ways agreed for every student."""
        return all(self.agree.values())


def run(digits: Digits, teacher: Network, student: Network, out: Path, say: Say) -> Scored:
    """Exports the networks, quantises the student, and scores both students on the test images.

    Args:
        digits: of which the test images are scored, and the training images calibrate the quantisation.
        teacher: sees 8×8 pixels.
        student: sees 4×4 pixels.
        out: a folder; takes the models, the scorers, the logits, the scores and the reports.
        say: called with what a person should see.
    """
    out.mkdir(parents=True, exist_ok=True)
    feeds = {"sharp_images": digits.test_sharp.numpy(), "coarse_images": digits.test_coarse.numpy()}
    _to_onnx(teacher, "sharp_images", digits.test_sharp, out / "teacher.onnx")
    _to_onnx(student, "coarse_images", digits.test_coarse, out / "student.onnx")
    _quantise(out / "student.onnx", {"coarse_images": digits.train_coarse.numpy()}, out / "student_int8.onnx")
    loss = export(SoftTarget(temperature=1.0, form="kl"), out / "kl", per_sample=True, progress=say)
    np.save(out / "labels.npy", digits.test_labels.numpy())
    agree, reports = {}, {}
    teacher_logits: Array | None = None
    for name, title in STUDENTS.items():
        say(f"\n{title}:")
        models = out / "teacher.onnx", out / f"{name}.onnx"
        merged = _run_merged(_merge(*models, loss, out / f"{name}_scorer.onnx", say), feeds)
        apart = Sessions(*models, loss, connect=CONNECT, options=_options)(feeds)
        np.save(out / f"{name}.npy", merged["student/logits"])
        if teacher_logits is None:
            teacher_logits = merged["teacher/logits"]
            np.save(out / "teacher.npy", teacher_logits)
        scores, reports[name] = _score(out, name, say)
        ways = (merged["loss_per_sample"], apart["loss_per_sample"], scores)
        agree[name] = all(_same_bits(ways[0], way) for way in ways[1:])
        agree[name] &= _same_bits(merged["teacher/logits"], teacher_logits)
        verdict = "the same scores, bit for bit" if agree[name] else "DIFFERENT SCORES"
        say(f"merged file, three sessions, and pykd score: {verdict}; report: {reports[name]}")
    say("\ndid the quantisation hurt?")
    first, second = (out / f"{name}.parquet" for name in STUDENTS)
    _command(["score", "--compare", first, second], say)
    difference = compare(Scores(first), Scores(second))
    say(_verdict(difference["scores"]["kl"]))
    return Scored(agree, difference, reports)


def _verdict(kl: dict[str, Any]) -> str:
    low, high = kl["interval"]
    size = f"{kl['difference']:+.2g} nats of KL ({low:.2g} to {high:.2g})"
    if low > 0:
        return f"yes: {size}"
    if high < 0:
        return f"no, on the contrary: {size}"
    return f"not so that {kl['count']} images show it: {size}; they would most likely show {kl['smallest_seen']:.2g}"


def _to_onnx(network: Network, name: str, images: Tensor, path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # of operators of packages that are not there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (images[:2],),
                input_names=[name],
                output_names=["logits", "features"],
                dynamic_shapes=({0: "batch"},),
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    program.save(str(path))


def _quantise(model: Path, images: Mapping[str, Array], path: Path) -> None:
    """Weights and activations as 8-bit integers, whose ranges are those of these images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Once(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Mapping[str, Array]] = iter([images])

        def get_next(self) -> Mapping[str, Array] | None:
            return next(self.left, None)

    logging.disable(logging.WARNING)  # of a preparation that makes no difference to three layers
    try:
        quantize_static(
            model, path, Once(), per_channel=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8
        )
    finally:
        logging.disable(logging.NOTSET)


def _merge(teacher: Path, student: Path, loss: Path, out: Path, say: Say) -> Path:
    connected = [word for place, name in CONNECT.items() for word in ("--connect", f"{place}={name}")]
    kept = [word for place in CONNECT for word in ("--keep", place)]
    models: list[str | Path] = ["--teacher", teacher, "--student", student, "--loss", loss]
    _command(["merge", *models, *connected, *kept, "--out", out], say)
    return out


def _run_merged(scorer: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """By name, what the file returns in a session of ONNX Runtime that knows nothing of pykd but its operators."""
    import onnxruntime

    options = _options()
    options.register_custom_ops_library(config.onnxruntime_ops_path())
    session = onnxruntime.InferenceSession(str(scorer), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # temperatures are inputs with defaults, of which it warns
    return options


def _score(out: Path, name: str, say: Say) -> tuple[Array, Path]:
    """The column of ``pykd score``, and its report."""
    page = out / f"{name}.html"
    places: list[str | Path] = ["--teacher", out / "teacher.npy", "--student", out / f"{name}.npy"]
    results: list[str | Path] = ["--out", out / f"{name}.parquet", "--report", page]
    _command(["score", *places, "--labels", out / "labels.npy", *results], say)
    return np.concatenate([block["kl"] for block in Scores(out / f"{name}.parquet").blocks("kl")]), page


def _command(arguments: list[str | Path], say: Say) -> None:
    say(" ".join(["$ pykd", *map(str, arguments)]))
    programs.run([sys.executable, "-m", "pykd", *arguments], say)


def _same_bits(first: Array, second: Array) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and first.tobytes() == second.tobytes()
