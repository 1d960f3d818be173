"""The end of a process while threads are at work in pykd.

Threads in torch are not among them: torch itself ends such a process (``terminate called…``), whatever it computes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SETUP = """
import sys, threading, time, numpy as np, pykd
from pykd import kernels
folder, r = sys.argv[1], np.random.default_rng(0)
student, teacher = r.normal(size=(2, 64, 500)).astype(np.float32)
inputs = dict(student=student, teacher=teacher, labels=r.integers(0, 500, 64))
"""
CALLS = {
    "value": "loss = pykd.load(folder, engine); call = lambda: loss.value(**inputs)",
    "gradient": "loss = pykd.load(folder, engine); call = lambda: loss.value_and_gradient(**inputs)",
    "load": "call = lambda: pykd.load(folder, engine)",
}
KERNELS = """
given = dict(student=student, teacher=teacher, temperature=2.0)
call = lambda: kernels.run('soft_target', given, {}, {'soft': np.empty(64, np.float32)})
"""
ENDING = """
call()
def work():
    while True:
        call()
for _ in range(8):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
print('the end', flush=True)
"""


def ends_well(code: str, folder: Path) -> None:
    for _ in range(3):
        command = [sys.executable, "-c", SETUP + code + ENDING, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("engine", ["onnxruntime", "torchscript"])
def test_daemon_threads_in_a_loss(call: str, engine: str, folder: Path) -> None:
    ends_well(f"engine = {engine!r}\n{CALLS[call]}", folder)


def test_daemon_threads_in_a_kernel(folder: Path) -> None:
    ends_well(KERNELS, folder)
