"""The two pictures of the demo."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pykd.demo.parity import GRADIENT_LIMIT, JUDGE, VALUE_LIMIT, Row
from pykd.demo.programs import Curves

plt.switch_backend("agg")  # files alone; no window, no display

_WITHOUT, _WITH = "#7f7f7f", "#1f77b4"


def learning_curves(path: Path, curves: Mapping[str, Curves], teacher_accuracy: float) -> None:
    """Test accuracy over the epochs, one panel per trainer: mean over the seeds, band of ± one standard deviation."""
    figure, axes = plt.subplots(1, len(curves), figsize=(5.2 * len(curves), 4.2), sharey=True, squeeze=False)
    for axis, (title, curve) in zip(axes[0], curves.items(), strict=True):
        for values, color, label in (
            (curve.without, _WITHOUT, "without distillation"),
            (curve.with_, _WITH, "with distillation"),
        ):
            mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
            epochs = np.arange(1, len(mean) + 1)
            final = f"{label}: {mean[-1]:.1f} ± {deviation[-1]:.1f} %"
            axis.plot(epochs, mean, color=color, label=final)
            axis.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.25, linewidth=0)
        axis.axhline(
            teacher_accuracy, color="black", linestyle=":", label=f"teacher (8×8 pixels): {teacher_accuracy:.1f} %"
        )
        axis.set_title(f"{title}, {len(curve.with_)} seeds")
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    last = [curve.without[:, -1].mean() for curve in curves.values()]
    axes[0][0].set_ylim(min(last) - 12, 100)  # the first epochs leave the picture below
    axes[0][0].set_ylabel("test accuracy (%), mean ± standard deviation")
    figure.suptitle("Students of 4×4-pixel digits, trained in C++ by the exported loss")
    _save(figure, path)


def parity(path: Path, rows: Sequence[Row]) -> None:
    """Errors against float64 for every route and batch size."""
    judged = [row for row in rows if row.route != JUDGE]
    routes = list(dict.fromkeys(row.route for row in judged))
    batches = sorted({row.batch for row in judged})
    figure, axes = plt.subplots(1, 2, figsize=(11.4, 4.8), sharey=True)
    panels = (
        ("value: error in nats, relative above 1 nat", "value_error", VALUE_LIMIT),
        ("gradient: error relative to its largest entry", "gradient_error", GRADIENT_LIMIT),
    )
    for axis, (title, field, limit) in zip(axes, panels, strict=True):
        for i, batch in enumerate(batches):
            errors = [
                getattr(row, field) for route in routes for row in judged if (row.route, row.batch) == (route, batch)
            ]
            shift = 0.14 * (i - (len(batches) - 1) / 2)
            label = f"{batch} sample" + ("s" if batch > 1 else "")
            # An error of 0 has no place on a logarithmic axis; it is drawn at the lower edge.
            axis.scatter(np.arange(len(routes)) + shift, np.maximum(errors, 1e-9), s=28, label=label)
        axis.axhline(limit, color="crimson", linestyle="--")
        axis.text(-0.4, limit * 1.25, f"accepted: up to {limit:.0e}", color="crimson", fontsize="small")
        axis.axhline(np.finfo(np.float32).eps, color="black", linestyle=":", label="spacing of float32 at 1: 1.2e-07")
        axis.set_yscale("log")
        axis.set_title(title, fontsize="medium")
        lines = [route.replace(", ", "\n").replace(" PyTorch", "\nPyTorch").replace("X R", "X\nR") for route in routes]
        axis.set_xticks(range(len(routes)), lines)
        axis.grid(alpha=0.3, axis="y")
    largest = max(max(row.value_error, row.gradient_error) for row in judged)
    axes[0].set_ylim(5e-10, max(1e-3, min(10 * largest, 1e3)))
    axes[0].set_ylabel("largest error against float64")
    figure.suptitle("One loss on every route, on the teacher's and the student's real outputs")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize="small", frameon=False)
    _save(figure, path, bottom=0.06)


def _save(figure: Figure, path: Path, bottom: float = 0.0) -> None:
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)
