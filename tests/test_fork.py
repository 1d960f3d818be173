"""fork(): a child has none of its parent's threads. It runs, or says what to do; it never hangs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SETUP = """
import os, sys, time, traceback, numpy as np, pykd
from pykd import kernels
folder, engine, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
r = np.random.default_rng(0)
student, teacher = r.normal(size=(2, 300, 512)).astype(np.float32)
inputs = dict(student=student, teacher=teacher, labels=r.integers(0, 512, 300))

def kernel():
    value = np.empty(300, np.float32)
    given = dict(student=student, teacher=teacher, temperature=2.0)
    kernels.run("soft_target", given, {}, {"soft": value})
    return float(value.sum())

def in_child(body):
    "What the exit status of a child is after that: -1 where it does not end."
    pid = os.fork()
    if pid == 0:
        body()
        sys.exit(0)  # with everything that Python and the libraries do at the end
    end = time.monotonic() + 120
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -1

if engine == "torchscript":
    import torch
    torch.set_num_threads(max(threads, 1))
loss = pykd.load(folder, engine, threads=0 if engine == "torchscript" else threads)
expected, sum_of_kernel = loss.value_and_gradient(**inputs), kernel()

def agrees(result):
    np.testing.assert_allclose(result["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(result["grad_student"], expected["grad_student"], rtol=1e-5, atol=1e-9)
"""


def run(code: str, folder: Path, engine: str, threads: int) -> None:
    command = [sys.executable, "-c", SETUP + code, str(folder), engine, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.parametrize(("engine", "threads"), [("onnxruntime", 1), ("torchscript", 1), ("torchscript", 2)])
def test_a_child_runs_what_needs_no_threads(engine: str, threads: int, folder: Path) -> None:
    run("assert in_child(lambda: agrees(loss.value_and_gradient(**inputs))) == 0", folder, engine, threads)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_child_is_told_that_the_threads_are_gone(threads: int, folder: Path) -> None:
    code = """
def body():
    try:
        loss.value(**inputs)
    except RuntimeError as error:
        assert "from before fork()" in str(error) and "load it in the child" in str(error), error
    else:
        sys.exit(3)
assert in_child(body) == 0
agrees(loss.value_and_gradient(**inputs))
"""
    run(code, folder, "onnxruntime", threads)


@pytest.mark.parametrize(("engine", "threads"), [("onnxruntime", 1), ("onnxruntime", 0), ("torchscript", 2)])
def test_a_child_frees_loads_and_ends(engine: str, threads: int, folder: Path) -> None:
    code = """
def free():
    global loss
    del loss

def load():
    again = pykd.load(folder, engine, threads=0 if engine == "torchscript" else threads)
    agrees(again.value_and_gradient(**inputs))
    assert in_child(lambda: None) == 0  # and a child of the child

for body in (free, load, lambda: None, kernel):
    status = in_child(body)
    assert status == 0, (body, status)
"""
    run(code, folder, engine, threads)


def test_kernels_in_children(folder: Path) -> None:
    code = """
def body():
    assert abs(kernel() - sum_of_kernel) <= 1e-3

for _ in range(5):
    assert in_child(body) == 0
"""
    run(code, folder, "onnxruntime", 1)


@pytest.mark.parametrize("engine", ["onnxruntime", "torchscript"])
def test_workers_as_a_data_loader_has_them(engine: str, folder: Path) -> None:
    """multiprocessing by fork, while other threads of the parent load and run."""
    code = """
import multiprocessing, threading
context = multiprocessing.get_context("fork")
stop = threading.Event()

def busy():
    while not stop.is_set():
        pykd.load(folder, engine, threads=2).value(**inputs)
        kernel()

def work(queue):
    mine = pykd.load(folder, engine, threads=1)
    agrees(mine.value_and_gradient(**inputs))
    queue.put(kernel())

if engine == "onnxruntime":  # LibTorch's own locks are not safe to fork with
    thread = threading.Thread(target=busy)
    thread.start()
queue = context.Queue()
workers = [context.Process(target=work, args=(queue,)) for _ in range(6)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join(120)
stop.set()
codes = [worker.exitcode for worker in workers]
for worker in workers:
    worker.kill()
assert codes == [0] * 6, codes
assert all(abs(queue.get() - sum_of_kernel) <= 1e-3 for _ in range(6))
"""
    run(code, folder, engine, 0)
