"""This machine: ``pykd demo``, ``env``."""

import argparse
from pathlib import Path
from typing import Any

from pykd._version import __version__


def add(commands: Any) -> None:
    demo = commands.add_parser("demo", help="train teacher and students on the digits, with every engine")
    demo.add_argument("--out", type=Path, default=Path("build/demo"), help="where results go (default build/demo)")
    demo.set_defaults(run=_demo)

    environment = commands.add_parser("env", help="versions of everything involved, for bug reports")
    environment.set_defaults(run=_env)


def _demo(options: argparse.Namespace) -> int:
    from pykd import demo

    return int(demo.main(options.out) or 0)


def _env(options: argparse.Namespace) -> None:
    import platform
    from importlib import metadata

    print(f"pykd {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name}: not installed")
    import torch

    print(f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'torch sees no GPU'}")
