"""The whole way, once: a loss from Python to two C++ trainers, with every number checked.

``python -m pykd demo`` trains a teacher on scikit-learn's digits, exports a recipe, evaluates it in PyTorch,
TorchScript and ONNX Runtime, in Python and in C++, against float64, trains students with it in C++, and scores a student and its
quantised form against the teacher.
"""

import dataclasses
import importlib.util
import json
import platform
import time
from pathlib import Path
from typing import Any

LAYOUTS = {"labels": "batch"}  # class indices

# example program → how it is called in prints and pictures
TRAINERS = {"train_eigen": "plain C++ (Eigen), ONNX Runtime", "train_libtorch": "LibTorch, TorchScript"}


def main(
    out_dir: str | Path = "build/demo", examples_dir: str | Path | None = None, seeds: int = 10, epochs: int = 60
) -> int:
    """Runs the demo.

    Args:
        out_dir: takes the recipe, the data, ``results.json``, ``parity.png`` and ``learning_curves.png``, and in
            ``scoring/`` the models, the scorers, and the pages ``student.html`` and ``student_int8.html``.
        examples_dir: where the C++ example programs are; see :func:`pykd.demo.programs.find`.
        seeds: how many students each trainer trains, with and without distillation; at least 2.
        epochs: how long.

    Returns:
        0; 1 where a route disagreed with float64, or the ways to score with each other.

    Raises:
        ImportError, OSError, RuntimeError: something could not be run, read or written.
    """
    if seeds < 2:
        raise ValueError(f"expected at least 2 seeds, got {seeds}; a standard deviation needs them")
    _need("jinja2", "matplotlib", "onnxruntime", "pyarrow", "sklearn", "torch")
    return _run(Path(out_dir), examples_dir, seeds, epochs)


def _need(*modules: str) -> None:
    """An ImportError before the work starts, not in the middle of it."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(missing).replace("sklearn", "scikit-learn")
        raise ImportError(f"expected the Python packages {packages}, got none of that name; pip install {packages}")


def _run(out: Path, examples_dir: str | Path | None, seeds: int, epochs: int) -> int:
    import torch

    from pykd.composition import DistillationLoss
    from pykd.demo import digits as data
    from pykd.demo import parity, plots, programs, scoring, tensor_file
    from pykd.export import export

    found = programs.find(examples_dir)
    out.mkdir(parents=True, exist_ok=True)
    say = _Steps(8)

    say.step("training the teacher: 8×8 pixels, 898 images")
    digits = data.load()
    teacher = data.train_teacher(digits)
    teacher_accuracy = 100 * teacher.accuracy(digits.test_sharp, digits.test_labels)
    tensor_file.write(out / "digits.bin", data.for_cpp(digits, teacher))
    say(f"test accuracy {teacher_accuracy:.2f} %")

    say.step(f"exporting the recipe to {out / 'recipe'}")
    # beta = 0.1 and the training settings were chosen by cross-validation within the training images.
    loss = DistillationLoss(
        logit_loss="soft_entropy",
        aux_loss="l1",
        alpha=1.0,
        beta=0.1,
        gamma=1.0,
        lambda1=1.0,
        lambda2=0,
        tau=2,
        mode="student_softening",
        features_index=[-1],
    )
    export(loss, out / "recipe", layouts=LAYOUTS, progress=say)
    export(loss, out / "recipe_float64", layouts=LAYOUTS, dtype="float64", progress=say)

    say.step("evaluating it on the teacher's and a student's outputs, on every route")
    student = data.train_student(digits, teacher, loss)
    outputs = data.outputs(digits, teacher, student)
    rows = parity.measure(loss, LAYOUTS, out / "recipe", outputs, found["evaluate"], out)
    say(parity.table(rows))

    say.step("checking the Eigen student's backward pass with central differences, in float64")
    arguments: list[str | Path] = ["--data", out / "digits.bin", "--seeds", str(seeds), "--epochs", str(epochs)]
    programs.run([found["train_eigen"], "--check", "--loss", out / "recipe_float64", *arguments], say)

    curves = {}
    for program, title in TRAINERS.items():
        say.step(f"training students of 4×4 pixels: {title}")
        csv = out / f"{program}.csv"
        programs.run([found[program], "--loss", out / "recipe", *arguments, "--out", csv], say)
        curves[title] = programs.read_curves(csv)

    say.step("scoring the student and its quantised form against the teacher, on 899 test images")
    scored = scoring.run(digits, teacher, student, out / "scoring", say)

    say.step("drawing")
    plots.parity(out / "parity.png", rows)
    plots.learning_curves(out / "learning_curves.png", curves, teacher_accuracy)
    results: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "teacher_test_accuracy": teacher_accuracy,
        "parity": [{**dataclasses.asdict(row), "ok": row.ok} for row in rows],
        "students": {title: curve.summary() for title, curve in curves.items()},
        "scores": {"ways_agree": scored.agree, "int8_minus_full_precision": scored.difference},
        "seconds": round(say.seconds(), 1),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    pictures = f"{out / 'parity.png'}, {out / 'learning_curves.png'}"
    say(f"wrote {pictures}, {out / 'results.json'}, {', '.join(map(str, scored.reports.values()))}")

    agreed = all(row.ok for row in rows)
    largest = max(max(row.value_error, row.gradient_error) for row in rows)
    verdict = "every route agrees with float64" if agreed else "A ROUTE DISAGREES with float64 (table above)"
    print(f"\n{verdict}; largest error {largest:.1e}; {say.seconds():.0f} s in all", flush=True)
    if not scored.ok:
        print("THE WAYS TO SCORE DISAGREE (above)", flush=True)
    return 0 if agreed and scored.ok else 1


class _Steps:
    """Prints what is being done, numbered, and what comes of it, indented."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.number = 0
        self.start = time.perf_counter()

    def step(self, text: str) -> None:
        self.number += 1
        print(f"[{self.number}/{self.count}] {text}", flush=True)

    def __call__(self, text: str) -> None:
        print("\n".join("    " + line for line in text.splitlines()), flush=True)

    def seconds(self) -> float:
        return time.perf_counter() - self.start
