"""The fallback where the packed pykd does not load: libpykd, libpykd_cuda and the extension, built here. Not libpykd_torch."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.runner import REBUILT, ROOT
from benchmarks.gpu.stage import Context


def run(context: Context) -> None:
    site = REBUILT
    # As an environment variable: the setting of CMake would hide what scikit-build-core finds by itself, pybind11 above all.
    environment = {**os.environ, "CMAKE_PREFIX_PATH": str(context.pack / "prefix"), "PYTHONPATH": ""}
    settings = {
        "build-dir": str(ROOT / "build" / "gpu"),
        "cmake.define.PYKD_TORCH": "OFF",
        "cmake.define.PYKD_CUDA": "ON" if context.device == "cuda" else "AUTO",
        "cmake.define.CMAKE_CUDA_ARCHITECTURES": "90",
        "cmake.define.PYKD_ORT_INCLUDE_DIR": str(context.pack / "prefix" / "include" / "onnxruntime"),
    }
    command = [
        sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--no-deps",
        "--no-build-isolation", "--upgrade", "--target", str(site), str(ROOT),
        *(f"--config-settings={key}={value}" for key, value in settings.items()),
    ]  # fmt: skip
    code = subprocess.run(command, env=environment, check=False).returncode
    context.report(code == 0, check="pip install", site=str(site))
    for package in Path(context.pack / "site").iterdir():  # what this machine lacks, such as tomli_w
        target = site / package.name
        if code == 0 and not package.name.startswith("pykd") and not target.exists():
            target.symlink_to(package)
