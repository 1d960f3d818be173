"""Scoring two files of logits, end to end, beside what people write by hand.

Two float16 arrays in ``.npy`` files that the machine has in memory (the page cache is warm), and the same as Parquet lists; and two
base files of llama.cpp with 32,000 classes, beside the tool's loop over rows alone (``cpp/bench/llama_rows.cpp``), which has its logits in memory. The limit is reading the same bytes and widening them to float32, with the same number of threads; for Parquet it is pyarrow's ``iter_batches``, each file on a thread of its own. Every
route's divergences are compared with float64 before it is timed; routes by hand compute the divergence and the agreement,
and nothing else. Rates are rows per second, medians of runs in turn. The hand-written routes run on the first rows alone.

``python -m benchmarks scoring --rows N`` sets the number of rows (default 200,000; 4 kB each in ``.npy``, twice that on the disk in all).
"""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import pykd
from pykd.scoring import llama, quantiles
from pykd.scoring.results import Scores
from pykd.scoring.statistics import SHARES, summary
from pykd.scoring.stream import score_files

CLASSES = 1000
_VOCABULARY = 32_000
_BLOCK = 1000  # rows of the routes by hand
_FEW = 20_000  # rows that they run on
_SOME = 200_000  # that one reader of Parquet reads
_ROUNDS = 3
_PROBED = 500  # rows that are compared with float64
_TWO_READERS = "pyarrow iter_batches, 2 threads"  # as `pykd score` reads two files

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


def _iter_batches(folder: Path, rows: int, threads: int) -> None:
    """The limit for Parquet: pyarrow alone, both files, on one thread or on one for each."""
    import pyarrow.parquet as parquet

    def read(name: str) -> None:
        with parquet.ParquetFile(folder / f"{name}.parquet", pre_buffer=False, buffer_size=1 << 20) as file:
            batches = file.iter_batches(_BLOCK, use_threads=False)
            assert sum(batch.num_rows for batch in itertools.islice(batches, -(-rows // _BLOCK))) == rows

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, ("teacher", "student")))


def _score(folder: Path, ending: str, threads: int = 0) -> Array:
    out = folder / "scores.parquet"
    out.unlink(missing_ok=True)
    scores = score_files(
        folder / f"teacher.{ending}", folder / f"student.{ending}", out, threads=threads, say=lambda line: None
    )
    return np.concatenate([block["kl"] for block in scores.blocks("kl")])


_MEMORY = """
import sys
from pykd.command_line import main
assert main(sys.argv[1:]) == 0
with open("/proc/self/status") as file:
    print(next(line.split()[1] for line in file if line.startswith("VmHWM")))
"""


def _memory(folder: Path, ending: str, report: bool = True) -> int:
    """Largest resident bytes of the whole command."""
    (folder / "scores.parquet").unlink(missing_ok=True)
    command = [sys.executable, "-c", _MEMORY, "score", "--out", str(folder / "scores.parquet")]
    command += ["--teacher", str(folder / f"teacher.{ending}"), "--student", str(folder / f"student.{ending}")]
    command += ["--report", str(folder / "report.html")] if report else []
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


def _write_base_files(folder: Path) -> None:
    """Two of one text: a teacher, and a student that is a little off."""
    rng = np.random.default_rng(1)
    chunks, context = 8, 514  # 2,048 rows
    tokens = rng.integers(0, _VOCABULARY, (chunks, context), np.int32)
    for name in ("teacher", "student"):
        with open(folder / f"{name}.kld", "wb") as file:
            file.write(llama.MAGIC + np.array([context, _VOCABULARY, chunks], "<i4").tobytes() + tokens.tobytes())
    with open(folder / "teacher.kld", "ab") as teacher, open(folder / "student.kld", "ab") as student:
        for _ in range(chunks):
            logits = 3 * rng.standard_normal((context - 1 - context // 2, _VOCABULARY), np.float32)
            teacher.write(llama.encoded(logits).tobytes())
            student.write(llama.encoded(logits + 0.3 * rng.standard_normal(logits.shape, np.float32)).tobytes())


def _row_loop(folder: Path, threads: int) -> tuple[float, Array]:
    """Seconds of the loop of llama-perplexity over the rows, and its divergences."""
    program, found = folder / "llama_rows", folder / "found"
    if not program.exists():
        source = Path(__file__).parents[1] / "cpp" / "bench" / "llama_rows.cpp"
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, "-O3", "-march=native", "-pthread", source, "-o", program], check=True)
    files = [folder / f"{name}.kld" for name in ("teacher", "student")]
    done = subprocess.run(
        [program, *files, str(threads), "2", found], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return float(done.stdout.split()[-1]), np.fromfile(found, np.float32)


def _base_files(folder: Path) -> list[dict[str, Any]]:
    """Two base files, on one thread and on all."""
    _write_base_files(folder)
    head = llama.read_head(str(folder / "teacher.kld"), "the teacher")
    sides = []
    for name in ("teacher", "student"):
        words = np.fromfile(folder / f"{name}.kld", "<u2", offset=head.offset, count=_PROBED * head.codes)
        sides.append(llama.decoded(words.reshape(_PROBED, -1), _VOCABULARY).astype(np.float64))
    log_p, log_q = (_log_softmax(side) for side in sides)
    want = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    entries = []
    for threads in dict.fromkeys([1, len(os.sched_getaffinity(0))]):
        loop: dict[str, Any] = {"route": f"row loop of llama-perplexity alone, {threads} threads", "rows": head.rows}
        entry: dict[str, Any] = {
            "route": f"pykd score, base files of llama.cpp, {threads} threads",
            "rows": head.rows,
        }
        taken: dict[str, list[float]] = {route["route"]: [] for route in (loop, entry)}
        for number in range(2 * _ROUNDS + 1):
            of_loop, theirs = _row_loop(folder, threads)
            start = time.perf_counter()
            got = _score(folder, "kld", threads)
            if number:
                taken[loop["route"]].append(of_loop)
                taken[entry["route"]].append(time.perf_counter() - start)
                continue
            # The loop leaves out classes from −16 down.
            for route, found, limit in ((loop, theirs, 1e-2), (entry, got, 1e-4)):
                if (error := float(np.abs(found[:_PROBED] - want).max())) > limit:
                    route["wrong"] = error
        for route in (loop, entry):
            seconds = taken[route["route"]]
            route["rows_per_second"] = head.rows / statistics.median(seconds)
            route["best_rows_per_second"] = head.rows / min(seconds)
        entry["times_as_fast"] = entry["rows_per_second"] / loop["rows_per_second"]
        entries += [loop, entry]
    memory = _memory(folder, "kld", report=False)
    return [*entries, {"route": "largest resident memory, base files of llama.cpp", "bytes": memory, "rows": head.rows}]


def run(bandwidth: float, rows: int = 200_000) -> list[dict[str, Any]]:
    """Measures; one row per route."""
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, rows)
        _write_parquet(folder)
        few, some = min(rows, _FEW), min(rows, _SOME)
        routes: dict[str, tuple[int, Callable[[], Any]]] = {
            "read and widen": (rows, lambda: _read_and_widen(folder, rows, threads)),
            "pykd score, .npy": (rows, lambda: _score(folder, "npy")),
            "pyarrow iter_batches, 1 thread": (some, lambda: _iter_batches(folder, some, 1)),
            _TWO_READERS: (rows, lambda: _iter_batches(folder, rows, 2)),
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
        processor: dict[str, list[float]] = {route: [] for route in routes}
        result: dict[str, dict[str, Any]] = {
            route: {"route": route, "rows": count} for route, (count, _) in routes.items()
        }
        for number in range(_ROUNDS + 1):  # the first one warms up
            for route, (_, call) in routes.items():
                start, of_processor = time.perf_counter(), time.process_time()
                got = call()
                if number:
                    taken[route].append(time.perf_counter() - start)
                    processor[route].append(time.process_time() - of_processor)
                elif got is not None and (error := float(np.abs(got[:_PROBED] - want).max())) > 1e-4:
                    result[route]["wrong"] = error
        for route, (count, _) in routes.items():
            result[route]["rows_per_second"] = count / statistics.median(taken[route])
            result[route]["processor_microseconds_per_row"] = 1e6 * statistics.median(processor[route]) / count
        rate = {route: entry["rows_per_second"] for route, entry in result.items()}
        for route, limit in (
            ("pykd score, .npy", "read and widen"),
            ("pykd score, Parquet lists", _TWO_READERS),
        ):
            result[route]["of_limit"] = rate[route] / rate[limit]
        for route, entry in result.items():
            entry["times_as_long"] = rate["pykd score, .npy"] / rate[route]
            print(
                f"{route:38} {entry['rows_per_second']:12,.0f} rows/s  {entry['processor_microseconds_per_row']:6.2f} µs of processor time  "
                f"{entry['times_as_long']:6.2f} ×  of limit {entry.get('of_limit', float('nan')):.2f}"
            )
        start = time.perf_counter()
        summary(Scores(folder / "scores.parquet"))
        others = {
            "numbers of the report": {"seconds": time.perf_counter() - start, "rows": rows},
            "start to end on ten rows": {"seconds": _start(folder), "rows": 10},
            "largest resident memory, .npy": {"bytes": _memory(folder, "npy"), "rows": rows},
            "largest resident memory, Parquet lists": {"bytes": _memory(folder, "parquet"), "rows": rows},
            "exact quantiles": _of_quantiles(100 * rows),
        }
        for route, entry in others.items():
            print(route, entry)
        base_files = _base_files(folder)
        for entry in base_files:
            print(entry)
        return [*result.values(), *base_files, *({"route": route, **entry} for route, entry in others.items())]


def _of_quantiles(count: int) -> dict[str, Any]:
    """Of values that are drawn anew in each pass, so that what is held is the method's own: bytes are its largest memory."""
    block = 1 << 17

    def stream() -> Any:
        for first in range(0, count, block):
            yield np.random.default_rng(first).standard_normal(min(block, count - first), np.float32)

    start = time.perf_counter()
    tracemalloc.start()
    got = quantiles.quantiles(stream, count, SHARES)
    entry: dict[str, Any] = {"bytes": tracemalloc.get_traced_memory()[1], "rows": count}
    tracemalloc.stop()
    entry["seconds"] = time.perf_counter() - start
    places = [share * (count - 1) for share in SHARES]
    whole = np.concatenate(list(stream()))
    whole.partition(sorted({int(place) + side for place in places for side in (0, 1)}))
    for value, place in zip(got, places, strict=True):
        low, high = map(float, whole[int(place) : int(place) + 2])
        if value != low + (high - low) * (place - int(place)):
            entry["wrong"] = got
    return entry
