"""scripts/gpu-check without a GPU: the whole of it on the CPU, and that a stage which fails, hangs or crashes costs only itself."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu_check
from benchmarks.gpu import controls, fatbin, rehearse, runner, soft_target
from benchmarks.gpu import device as device_module
from benchmarks.gpu.device import CpuDevice, copies_are_counted, count_copies
from benchmarks.gpu.plan import ONNXRUNTIME_PLAN, PLAN, Stage
from benchmarks.gpu.soft_target import Case
from benchmarks.gpu.stage import NOT_RUN, RESULTS, Context, NotRun
from benchmarks.gpu.stage import run as run_stage
from benchmarks.gpu.stages import torch_paths

# ---- The runner, with stages made for it -------------------------------------------------------------

# What a stage of that name does, in a process of its own.
PROGRAMS = {
    "good": "row(1)",
    "failing": "row(1); sys.exit(1)",
    "throwing": "row(1); raise RuntimeError('no')",
    "not_run": "sys.exit(77)",
    "crashing": "row(1); os.kill(os.getpid(), signal.SIGSEGV)",
    "aborting": "os.abort()",
    # It does not listen to SIGTERM, and has a child that would go on.
    "hanging": """
row(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, '-c', "import time; time.sleep(8); open('left behind', 'w')"])
time.sleep(60)
""",
    "broken_here": "sys.exit(0 if 'rebuilt' in os.environ['PYTHONPATH'] else 1)",
}
PREAMBLE = """
import os, signal, subprocess, sys, time
def row(n):
    with open('rows', 'a') as file:
        file.write(f'{n}\\n')
"""


def start(stage: Stage) -> Sequence[str]:
    return [sys.executable, "-c", PREAMBLE + PROGRAMS[stage.name]]


def outcomes_of(out: Path, *stages: Stage, budget: float = 60) -> list[tuple[str, str]]:
    found = runner.run(stages, out, {**os.environ, "PYTHONPATH": ""}, budget, start)
    written = [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]
    assert [(row["stage"], row["outcome"]) for row in written] == [(o.stage, o.outcome) for o in found]
    return [(o.stage, o.outcome) for o in found]


@pytest.mark.parametrize(
    ("name", "outcome", "detail"),
    [
        ("failing", "failed", "see its rows"),
        ("throwing", "failed", "see its rows"),
        ("not_run", "not run", "see its row"),
        ("crashing", "crashed", "SIGSEGV"),
        ("aborting", "crashed", "SIGABRT"),
    ],
)
def test_a_stage_costs_only_itself(tmp_path: Path, name: str, outcome: str, detail: str) -> None:
    plan = [Stage("good", 30), Stage(name, 30), Stage("good", 30)]
    assert outcomes_of(tmp_path, *plan) == [("good", "ok"), (name, outcome), ("good", "ok")]
    assert json.loads((tmp_path / RESULTS).read_text().splitlines()[1])["detail"] == detail


def test_a_stage_that_hangs_costs_its_limit(tmp_path: Path) -> None:
    began = time.monotonic()
    assert outcomes_of(tmp_path, Stage("hanging", 4), Stage("good", 30)) == [("hanging", "timed out"), ("good", "ok")]
    assert time.monotonic() - began < 50
    assert (tmp_path / "rows").read_text() == "1\n1\n"  # what it had written is there
    time.sleep(max(0.0, 10 - (time.monotonic() - began)))
    assert not (tmp_path / "left behind").exists(), "its child outlived it"


def test_what_no_time_is_left_for_is_not_run(tmp_path: Path) -> None:
    found = outcomes_of(tmp_path, Stage("hanging", 30), Stage("good", 30), budget=6)
    assert found == [("hanging", "timed out"), ("good", "not run")]


def test_the_fallback_runs_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "REBUILT", tmp_path / "rebuilt")
    fallback = Stage("good", 30)
    assert outcomes_of(tmp_path, Stage("good", 30, fallback=Stage("failing", 30))) == [("good", "ok")]
    found = outcomes_of_new(tmp_path / "a", Stage("broken_here", 30, fallback=fallback), Stage("broken_here", 30))
    assert found == [("broken_here", "failed"), ("good", "ok"), ("broken_here", "ok"), ("broken_here", "ok")]
    found = outcomes_of_new(tmp_path / "b", Stage("broken_here", 30, fallback=Stage("failing", 30)), Stage("good", 30))
    assert found == [("broken_here", "failed"), ("failing", "failed"), ("good", "ok")]


def outcomes_of_new(out: Path, *stages: Stage) -> list[tuple[str, str]]:
    out.mkdir()
    return outcomes_of(out, *stages)


@pytest.mark.parametrize(
    ("outcome", "code"), [("ok", 0), ("failed", 1), ("timed out", 1), ("crashed", 1), ("not run", 1)]
)
def test_whatever_is_not_well_shows_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, code: int
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(runner, "run", lambda *_: [runner.Outcome("facts", outcome, "", 1.0)])
    assert gpu_check.main(["--device", "cpu"]) == code


def test_every_stage_of_the_plans_is_there() -> None:
    stages = [*PLAN, *ONNXRUNTIME_PLAN, *(stage.fallback for stage in PLAN if stage.fallback)]
    for stage in stages:
        assert callable(importlib.import_module(f"benchmarks.gpu.stages.{stage.name}").run)
    assert [stage.name for stage in PLAN[:4]] == ["facts", "load", "smoke", "parity"]


def test_every_kernel_for_cuda_is_compared() -> None:
    stages = [importlib.import_module(f"benchmarks.gpu.stages.{stage.name}") for stage in PLAN]
    launchers = (runner.ROOT / "cpp" / "kernels").glob("*/*.cu")
    kernels = {launcher.parent.name for launcher in launchers} - {"cuda"}
    assert {stage.KERNEL for stage in stages if hasattr(stage, "KERNEL")} == kernels


# ---- A stage -----------------------------------------------------------------------------------------


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("some", "cpu", 1 << 13, tmp_path, tmp_path)


def with_stage(monkeypatch: pytest.MonkeyPatch, body: Any) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.stages.some", type("module", (), {"run": staticmethod(body)}))


def test_a_stage_that_checks_nothing_has_failed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    with_stage(monkeypatch, lambda context: context.report(None, figure=1))
    assert run_stage("some", context) == 1


@pytest.mark.parametrize("error", [RuntimeError, ImportError, AssertionError, FileNotFoundError])
def test_an_error_in_a_stage_is_a_failure(
    context: Context, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def body(context: Context) -> None:
        context.report(True, check="one")
        raise error("after that")

    with_stage(monkeypatch, body)
    assert run_stage("some", context) == 1
    found = rehearse.rows(context.out)
    assert found[0] == {"stage": "some", "ok": True, "check": "one"}
    assert not found[1]["ok"] and f"{error.__name__}: after that" == found[1]["error"]


def test_what_is_missing_is_said(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(context: Context) -> None:
        raise NotRun("no ncu")

    with_stage(monkeypatch, body)
    assert run_stage("some", context) == NOT_RUN
    assert rehearse.rows(context.out) == [{"stage": "some", "not_run": "no ncu"}]


# ---- What the checks see -----------------------------------------------------------------------------


def test_the_answers_in_float64_are_the_losses_own() -> None:
    for form, hard in soft_target.kinds():
        assert controls.agrees_with_numpy(Case(form, hard, "float32", 4, 7, seed=2))


@pytest.mark.parametrize("dtype", soft_target.DTYPES)
def test_what_is_wrong_is_seen(dtype: str) -> None:
    for form, hard in soft_target.kinds():
        assert controls.missed(CpuDevice(), Case(form, hard, dtype, 9, 130, seed=5)) == []


def test_a_comparison_that_sees_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_target, "worst", lambda *_: {"soft": 0.0})
    missed = controls.missed(CpuDevice(), Case("jsd", "labels", "float32", 9, 130))
    assert {"temperature", "form", "beta", "gradient one class further", "another row's hard_weight"} <= set(missed)
    assert "one element, twice what is allowed" in missed
    # The bits, and what lies beside the outputs, are looked at by themselves.
    assert not {"write_beside", "change_the_second_time"} & set(missed)


def test_a_kernel_that_is_wrong_in_one_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = soft_target.launch

    def launch(case: Case, inputs: Any, outputs: Any, stream: int | None) -> None:
        whole(case, inputs, outputs, stream)
        outputs["grad_student"][2, 5] *= 1.05

    monkeypatch.setattr(soft_target, "launch", launch)
    case = Case("kl", "", "bfloat16", 4, 9)
    inputs = soft_target.draw(case, "cpu")
    assert not controls.answer(CpuDevice(), case, inputs).judge(soft_target.expected(case, inputs))["right"]


def test_leads_and_guards_are_what_they_say() -> None:
    for dtype in soft_target.DTYPES:
        case = Case("kl", "label_probs", dtype, 3, 5, leads=(1, 2, 3, 1))
        inputs = soft_target.draw(case, "cpu")
        outputs = soft_target.Outputs(case, "cpu", 77.0)
        size = inputs["student"].element_size()
        for name, lead in (("student", 1), ("teacher", 2), ("label_probs", 3)):
            assert inputs[name].data_ptr() % 16 == lead * size
        assert outputs.tensors["grad_student"].data_ptr() % 16 == size
        assert outputs.intact()
        assert all(bool((tensor == 77.0).all()) for tensor in outputs.tensors.values())


def test_copies_are_counted() -> None:
    device = CpuDevice()
    assert copies_are_counted(device)
    there = torch.ones(100)
    assert count_copies(device, lambda: there.clone()) == 1
    device.copies = ("no such name",)
    assert not copies_are_counted(device)


def test_work_on_another_stream_is_seen() -> None:
    class OneStream(CpuDevice):
        """On which nothing is late."""

        def launch(self, work: Any, stream: Any = None) -> None:
            work(None)

    assert controls.seen_apart(CpuDevice())
    assert not controls.seen_apart(OneStream())


# ---- The pack ----------------------------------------------------------------------------------------


def library_with(content: bytes) -> bytearray:
    """An ELF file of 64 bits whose section .nv_fatbin holds `content`."""
    names = b"\0.nv_fatbin\0.shstrtab\0"
    header = 64
    table = header + len(content) + len(names)
    elf = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    )

    def entry(name: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)

    sections = entry(0, 0, 0) + entry(1, header, len(content)) + entry(12, header + len(content), len(names))
    return bytearray(elf + content + names + sections)


def fatbin_entry(kind: int, architecture: int, code: bytes) -> bytes:
    return struct.pack("<HHIQ", kind, 0, 64, len(code)) + bytes(12) + struct.pack("<I", architecture) + bytes(32) + code


def test_other_architectures_are_taken_out_of_a_library() -> None:
    entries = [(2, 80), (2, 90), (1, 90), (2, 100)]
    body = b"".join(fatbin_entry(kind, number, bytes([number]) * 16) for kind, number in entries)
    container = struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(body)) + body
    library = library_with(container + bytes(8) + container)
    size = len(library)
    assert fatbin.keep_architectures(library, {90}) == 2 * 3 * 16
    assert len(library) == size
    assert library.count(bytes([90]) * 16) == 2, "the machine code stays, the PTX goes"
    assert library.count(bytes([80]) * 16) == library.count(bytes([100]) * 16) == 0
    with pytest.raises(ValueError, match="ELF"):
        fatbin.section(b"MZ\0\0\0", b".nv_fatbin")


# ---- All of it ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_check_runs_on_the_cpu(tmp_path: Path) -> None:
    rehearse.prepare(tmp_path)
    assert rehearse.run(tmp_path) == 0
    found = rehearse.rows(tmp_path / "out")
    outcomes = {row["stage"]: row["outcome"] for row in found if "outcome" in row}
    assert outcomes == {stage.title: "ok" for stage in PLAN}
    calls = sum(row["calls"] for row in found if row["stage"] == "parity" and "calls" in row)
    assert calls >= 17 * 3 * 4 * 4, "every kind, dtype and alignment, in four shapes"
    assert {row["control"] for row in found if "control" in row} == {
        "float64 is what the losses say",
        "what is wrong is seen",
        "a kernel on the wrong stream is seen",
        "copies to and from the host are counted",
    }
    routes = {row["route"] for row in found if "route" in row and row.get("seconds")}
    assert routes == {"kernel", "torch, backward()", "eager", "torch.compile"}

    assert rehearse.run(tmp_path, "--onnxruntime") == 0
    found = rehearse.rows(tmp_path / "out")
    outcomes = {row["stage"]: row["outcome"] for row in found if "outcome" in row}
    assert outcomes == {stage.title: "ok" for stage in ONNXRUNTIME_PLAN}
    in_use = {name for row in found for name in row.get("kernels_in_use", ())}
    assert {"soft_target_float32", "soft_target_bfloat16"} <= in_use


@pytest.mark.slow
def test_cmake_needs_no_onnxruntime_to_configure_the_tests(tmp_path: Path) -> None:
    without = {name: value for name, value in os.environ.items() if name != "PYKD_ONNXRUNTIME_LIBRARY"}
    made = subprocess.run(
        ["cmake", "-S", runner.ROOT, "-B", tmp_path, "-DPYKD_TESTS=ON", "-DPYKD_TORCH=OFF", "-DPYKD_CUDA=OFF"],
        env=without, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr


def test_signals_have_names() -> None:
    assert runner._judge(-signal.SIGKILL, 1.0) == ("crashed", "SIGKILL")


# ---- The code for the GPU, with stand-ins for torch.cuda ---------------------------------------------


class LikeCuda(str):
    """Where torch makes tensors, ``"cpu"``; to everyone who asks, ``"cuda"``."""

    def __eq__(self, other: object) -> bool:
        return other == "cuda"

    def __ne__(self, other: object) -> bool:
        return other != "cuda"

    __hash__ = str.__hash__


class StandInForCuda:
    """torch.cuda as far as the check speaks to it: everything is done at once, on one stream or another."""

    def __init__(self) -> None:
        self.streams = [self.Stream()]

    def synchronize(self) -> None:
        pass

    def current_stream(self, device: Any = None) -> Any:
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.streams.append(stream or self.streams[-1])
        yield
        self.streams.pop()

    def Stream(self) -> Any:
        return SimpleNamespace(cuda_stream=64, wait_stream=lambda other: None, synchronize=lambda: None)

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 0.25)

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: None)

    def graph(self, graph: Any) -> Any:
        return self.stream(self.Stream())

    def _sleep(self, cycles: int) -> None:
        pass

    def memory_stats(self) -> dict[str, int]:
        return {"allocation.all.allocated": 7}


def nothing_is_counted(_: Any, call: Callable[[], Any]) -> list[str]:
    call()
    return []


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["smoke", "capture", "speed", "torch_paths", "competitors", "speed_features", "onnxruntime_cuda"]
)
def test_the_code_for_the_gpu_runs(stage: str, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    # The graphs of the stand-in replay nothing, and it has no copies to count: what is asked here is that the code runs, with
    # the numbers right that do not hang on these.
    context.device, context.pack = "cuda", context.out / "pack"
    folder = rehearse.exported_folders()[0]
    shutil.copytree(folder, context.pack / "folders" / folder.name)
    cuda = StandInForCuda()
    for name in (
        "synchronize",
        "current_stream",
        "stream",
        "Stream",
        "Event",
        "CUDAGraph",
        "graph",
        "_sleep",
        "memory_stats",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(device_module.CudaDevice, "name", LikeCuda("cpu"))
    monkeypatch.setattr(device_module, "events", nothing_is_counted)
    monkeypatch.setattr(torch_paths, "events", nothing_is_counted)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    run_stage(stage, context)
    wrong = [row for row in rehearse.rows(context.out) if "error" in row and isinstance(row["error"], str)]
    assert wrong == []
