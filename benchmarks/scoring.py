"""Scoring two files of logits, end to end, beside what people write by hand.

Two float16 arrays in ``.npy`` files that the machine has in memory, and the same as Parquet lists. The limit is reading the same
bytes and widening them to float32, with the same number of threads; for Parquet it is pyarrow's ``iter_batches``. Every
route's divergences are compared with float64 before it is timed; routes by hand compute the divergence and the agreement,
and nothing else. Rates are rows per second, medians of runs in turn. The hand-written routes run on the first rows alone.

``PYKD_BENCHMARK_ROWS`` sets the number of rows (default 200,000).
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import pykd
from pykd.scoring import quantiles
from pykd.scoring.results import Scores
from pykd.scoring.statistics import summary
from pykd.scoring.stream import score_files

CLASSES = 1000
_BLOCK = 1000  # rows of the routes by hand
_FEW = 20_000  # rows that they run on
_ROUNDS = 3
_PROBED = 500  # rows that are compared with float64

Array = np.ndarray[Any, Any]


def _write(folder: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    for name in ("teacher", "student"):
        files = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (rows, CLASSES))
        for first in range(0, rows, 10_000):
            files[first : first + 10_000] = 3 * rng.standard_normal((min(10_000, rows - first), CLASSES), np.float32)
        files.flush()


def _write_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    for name in ("teacher", "student"):
        array = np.load(folder / f"{name}.npy", mmap_mode="r")
        schema = pa.schema([("logits", pa.list_(pa.float16()))])
        with parquet.ParquetWriter(folder / f"{name}.parquet", schema) as file:
            for first in range(0, len(array), 10_000):
                part = np.asarray(array[first : first + 10_000])
                offsets = np.arange(len(part) + 1, dtype=np.int32) * CLASSES
                lists = pa.ListArray.from_arrays(offsets, pa.array(part.reshape(-1)))
                file.write_table(pa.Table.from_arrays([lists], schema=schema))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    value: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return value


def _blocks(folder: Path, rows: int) -> Any:
    teacher, student = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("teacher", "student"))
    for first in range(0, rows, _BLOCK):
        yield np.asarray(teacher[first : first + _BLOCK]), np.asarray(student[first : first + _BLOCK])


def _by_scipy(folder: Path, rows: int) -> Array:
    from scipy.special import log_softmax, rel_entr, softmax

    found = []
    for teacher, student in _blocks(folder, rows):
        p, q = softmax(teacher.astype(np.float32), axis=1), np.exp(log_softmax(student.astype(np.float32), axis=1))
        found.append(rel_entr(p, q).sum(axis=1))
        (teacher.argmax(axis=1) == student.argmax(axis=1)).mean()
    return np.concatenate(found)


def _by_torch(folder: Path, rows: int) -> Array:
    import torch

    found = []
    for teacher, student in _blocks(folder, rows):
        t, s = torch.from_numpy(teacher.copy()).float(), torch.from_numpy(student.copy()).float()
        log_p, log_q = torch.log_softmax(t, -1), torch.log_softmax(s, -1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1).numpy())
        (t.argmax(-1) == s.argmax(-1)).float().mean()
    return np.concatenate(found)


def _onnxruntime(folder: Path) -> Callable[[Path, int], Array]:
    import onnxruntime

    loss = pykd.SoftTarget(1.0, form="kl")
    exported = pykd.export(
        loss, folder / "kl", dtype="float16", kernels="off", per_sample=True, progress=lambda line: None
    )
    session = onnxruntime.InferenceSession(f"{exported}/loss.onnx", providers=["CPUExecutionProvider"])

    def run(folder: Path, rows: int) -> Array:
        found = []
        for teacher, student in _blocks(folder, rows):
            inputs = {"student_logits": student, "teacher_logits": teacher}
            found.append(session.run(["loss_per_sample"], inputs)[0])
            (teacher.argmax(axis=1) == student.argmax(axis=1)).mean()
        return np.concatenate(found)

    return run


def _read_and_widen(folder: Path, rows: int, threads: int) -> None:
    """The limit: the same bytes, read and widened by NumPy on as many threads."""

    def part(first: int) -> None:
        wide = np.empty((_BLOCK, CLASSES), np.float32)
        buffer = np.empty((_BLOCK, CLASSES), np.float16)
        for name in ("teacher", "student"):
            with open(folder / f"{name}.npy", "rb") as file:
                for at in range(first, min(first + rows // threads, rows), _BLOCK):
                    os.preadv(file.fileno(), [buffer.reshape(-1).view(np.uint8).data], 128 + at * CLASSES * 2)
                    np.copyto(wide, buffer)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, rows, rows // threads)))


def _iter_batches(folder: Path, rows: int) -> None:
    """The limit for Parquet: pyarrow alone, both files, one after the other as they are scored."""
    import pyarrow.parquet as parquet

    for name in ("teacher", "student"):
        with parquet.ParquetFile(folder / f"{name}.parquet", pre_buffer=False, buffer_size=1 << 20) as file:
            assert sum(batch.num_rows for batch in file.iter_batches(_BLOCK, use_threads=False)) == rows


def _score(folder: Path, ending: str) -> Array:
    out = folder / "scores.parquet"
    out.unlink(missing_ok=True)
    scores = score_files(folder / f"teacher.{ending}", folder / f"student.{ending}", out, say=lambda line: None)
    return np.concatenate([block["kl"] for block in scores.blocks("kl")])


_MEMORY = """
import sys
from pykd.command_line import main
assert main(sys.argv[1:]) == 0
with open("/proc/self/status") as file:
    print(next(line.split()[1] for line in file if line.startswith("VmHWM")))
"""


def _memory(folder: Path, ending: str) -> int:
    """Largest resident bytes of the whole command, report included."""
    (folder / "scores.parquet").unlink(missing_ok=True)
    command = [sys.executable, "-c", _MEMORY, "score", "--out", str(folder / "scores.parquet")]
    command += ["--teacher", str(folder / f"teacher.{ending}"), "--student", str(folder / f"student.{ending}")]
    command += ["--report", str(folder / "report.html")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024


def _start(folder: Path) -> float:
    """Seconds of the whole command on ten rows."""
    for name in ("teacher", "student"):
        np.save(folder / f"few_{name}.npy", np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")[:10]))
    command = [sys.executable, "-m", "pykd", "score", "--teacher", str(folder / "few_teacher.npy")]
    command += ["--student", str(folder / "few_student.npy"), "--out", str(folder / "few.parquet")]
    taken = []
    for _ in range(5):
        (folder / "few.parquet").unlink(missing_ok=True)
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def run(bandwidth: float) -> list[dict[str, Any]]:
    """Measures; one row per route."""
    rows = int(os.environ.get("PYKD_BENCHMARK_ROWS", "200000"))
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, rows)
        _write_parquet(folder)
        few = min(rows, _FEW)
        routes: dict[str, tuple[int, Callable[[], Any]]] = {
            "read and widen": (rows, lambda: _read_and_widen(folder, rows, threads)),
            "pykd score, .npy": (rows, lambda: _score(folder, "npy")),
            "pyarrow iter_batches": (rows, lambda: _iter_batches(folder, rows)),
            "pykd score, Parquet lists": (rows, lambda: _score(folder, "parquet")),
            "NumPy and SciPy": (few, lambda: _by_scipy(folder, few)),
            "torch": (few, lambda: _by_torch(folder, few)),
        }
        by_onnxruntime = _onnxruntime(folder)
        routes["ONNX Runtime, portable"] = (few, lambda: by_onnxruntime(folder, few))
        teacher, student = (
            np.load(folder / f"{side}.npy", mmap_mode="r")[:_PROBED].astype(np.float64)
            for side in ("teacher", "student")
        )
        log_p, log_q = _log_softmax(teacher), _log_softmax(student)
        want = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
        taken: dict[str, list[float]] = {route: [] for route in routes}
        result: dict[str, dict[str, Any]] = {
            route: {"route": route, "rows": count} for route, (count, _) in routes.items()
        }
        for number in range(_ROUNDS + 1):  # the first one warms up
            for route, (_, call) in routes.items():
                start = time.perf_counter()
                got = call()
                if number:
                    taken[route].append(time.perf_counter() - start)
                elif got is not None and (error := float(np.abs(got[:_PROBED] - want).max())) > 1e-4:
                    result[route]["wrong"] = error
        for route, (count, _) in routes.items():
            result[route]["rows_per_second"] = count / statistics.median(taken[route])
        rate = {route: entry["rows_per_second"] for route, entry in result.items()}
        for route, limit in (
            ("pykd score, .npy", "read and widen"),
            ("pykd score, Parquet lists", "pyarrow iter_batches"),
        ):
            result[route]["of_limit"] = rate[route] / rate[limit]
        for route, entry in result.items():
            entry["times_as_long"] = rate["pykd score, .npy"] / rate[route]
            print(
                f"{route:28} {entry['rows_per_second']:12,.0f} rows/s  {entry['times_as_long']:6.2f} ×  of limit {entry.get('of_limit', float('nan')):.2f}"
            )
        start = time.perf_counter()
        summary(Scores(folder / "scores.parquet"))
        others = {
            "numbers of the report": {"seconds": time.perf_counter() - start, "rows": rows},
            "start to end on ten rows": {"seconds": _start(folder), "rows": 10},
            "largest resident memory, .npy": {"bytes": _memory(folder, "npy"), "rows": rows},
            "largest resident memory, Parquet lists": {"bytes": _memory(folder, "parquet"), "rows": rows},
            "exact quantiles": _of_quantiles(),
        }
        for route, entry in others.items():
            print(route, entry)
        return [*result.values(), *({"route": route, **entry} for route, entry in others.items())]


def _of_quantiles(count: int = 20_000_000) -> dict[str, Any]:
    values = np.random.default_rng(0).standard_normal(count, np.float32)
    shares = (0.01, 0.5, 0.9, 0.99, 0.999)

    def stream() -> Any:
        return (values[first : first + (1 << 17)] for first in range(0, count, 1 << 17))

    start = time.perf_counter()
    got = quantiles.quantiles(stream, count, shares)
    seconds = time.perf_counter() - start
    entry: dict[str, Any] = {"seconds": seconds, "rows": count}
    if not np.allclose(got, np.quantile(values.astype(np.float64), shares), rtol=1e-12):
        entry["wrong"] = got
    return entry
