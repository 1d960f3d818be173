"""The C++ example programs: where they are, and how to run them."""

import csv
import dataclasses
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pykd import config

NAMES = ("evaluate", "train_eigen", "train_libtorch")


def find(folder: str | Path | None = None) -> dict[str, Path]:
    """The programs by name.

    Args:
        folder: where they were built; else the environment variable PYKD_EXAMPLES_DIR, else the places where this
            repository's own builds put them.

    Raises:
        FileNotFoundError: where one of them is not there.
    """
    given = folder or os.environ.get("PYKD_EXAMPLES_DIR")
    if given:
        candidates = [Path(given)]
    else:
        root = Path(__file__).resolve().parents[2]  # of a source tree or an editable install
        candidates = sorted((*root.glob("build/cpp/examples"), *root.glob("build/*/cpp/examples")), key=_age)
    for candidate in candidates:
        found = {name: candidate / name for name in NAMES if os.access(candidate / name, os.X_OK)}
        if len(found) == len(NAMES):
            return found
    raise FileNotFoundError(
        f"expected the example programs {', '.join(NAMES)} in {given or 'build/cpp/examples'}, got no such files; "
        "build them with `make demo` (CMake option PYKD_EXAMPLES=ON), or set PYKD_EXAMPLES_DIR to their folder"
    )


def environment() -> dict[str, str]:
    """The environment for the programs: it tells them where this Python's ONNX Runtime lies."""
    variables = dict(os.environ)
    variables.setdefault("PYKD_ONNXRUNTIME_LIBRARY", str(config.onnxruntime_library()))
    return variables


def run(command: Sequence[str | Path], say: Callable[[str], None]) -> None:
    """Runs a program and passes on what it prints, line by line."""
    with subprocess.Popen(
        [str(word) for word in command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"))
    if process.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} ended with exit code {process.returncode}; its words are above")


@dataclasses.dataclass(frozen=True)
class Curves:
    """Test accuracy in percent, ``[seeds, epochs]``; both runs of a seed start from the same weights."""

    without: np.ndarray
    with_: np.ndarray

    def summary(self) -> dict[str, dict[str, float | list[float]]]:
        """Mean, standard deviation (of the sample) and single values after the last epoch."""
        last = {
            "without_distillation": self.without[:, -1],
            "with_distillation": self.with_[:, -1],
            "gain": self.with_[:, -1] - self.without[:, -1],
        }
        return {
            name: {"mean": float(v.mean()), "standard_deviation": float(v.std(ddof=1)), "by_seed": v.tolist()}
            for name, v in last.items()
        }


def read_curves(path: Path) -> Curves:
    """Reads the CSV file of a trainer."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    seeds = 1 + max(int(row["seed"]) for row in rows)
    epochs = max(int(row["epoch"]) for row in rows)
    accuracy = {kind: np.full((seeds, epochs), np.nan) for kind in ("without", "with")}
    for row in rows:
        accuracy[row["distillation"]][int(row["seed"]), int(row["epoch"]) - 1] = 100 * float(row["test_accuracy"])
    for values in accuracy.values():
        if np.isnan(values).any():
            raise RuntimeError(f"expected {path} to hold every epoch of every seed, got gaps; run the trainer anew")
    return Curves(accuracy["without"], accuracy["with"])


def _age(path: Path) -> float:
    """For sorting: the newest first."""
    return -path.stat().st_mtime
