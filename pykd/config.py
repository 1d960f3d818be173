"""Where the C++ side of the installed package lies, for build scripts.

    cmake -S . -B build -Dpykd_DIR="$(python -m pykd.config --cmake-dir)"
    c++ -std=c++17 main.cpp $(python -m pykd.config --cflags --libs)

It imports neither torch nor the extension.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = [
    "cmake_dir", "includedir", "libdir", "library", "onnxruntime_library", "onnxruntime_ops_path", "pkgconfig_dir",
    "root", "torch_ops_path",
]  # fmt: skip


def root() -> Path:
    """The folder that holds ``include`` and ``lib``.

    Raises:
        FileNotFoundError: where this pykd is a source tree that was never built and installed.
    """
    package = sys.modules["pykd"].__path__  # of an editable install: the source tree, and the place of what was built
    for folder in package:
        if Path(folder, "lib", "cmake", "pykd", "pykdConfig.cmake").is_file():
            return Path(folder)
    raise FileNotFoundError(
        f"expected an installed pykd, got one without libraries ({', '.join(package)}); "
        "run `make build`, or `pip install --no-build-isolation .`"
    )


def cmake_dir() -> Path:
    """The folder of ``pykdConfig.cmake``: CMake's ``pykd_DIR``."""
    return root() / "lib" / "cmake" / "pykd"


def includedir() -> Path:
    """The folder that holds ``pykd/pykd.h``."""
    return root() / "include"


def libdir() -> Path:
    """The folder that holds the libraries."""
    return root() / "lib"


def library() -> Path:
    """The file of libpykd, for programs that load it at run time: ``libpykd.so.<version of its interface>``."""
    header = (includedir() / "pykd" / "pykd.h").read_text(encoding="utf-8")
    version = re.search(r"^#define PYKD_ABI_VERSION (\d+)", header, re.MULTILINE)
    assert version is not None, "pykd.h says which version it is"
    return libdir() / f"libpykd.so.{version[1]}"


def pkgconfig_dir() -> Path:
    """The folder of ``pykd.pc``, for ``PKG_CONFIG_PATH``."""
    return libdir() / "pkgconfig"


def torch_ops_path() -> Path:
    """The library that registers the fused kernels as ``torch.ops.pykd``.

    Python programs need not load it themselves: :mod:`pykd.torch_kernels` does. C++ programs ``dlopen()`` it before they
    load a TorchScript file that uses the operators.

    Raises:
        FileNotFoundError: where this pykd was installed without it.
    """
    path = libdir() / "libpykd_torch_ops.so"
    if not path.is_file():
        raise FileNotFoundError(
            f"expected {path}, which holds the fused kernels as torch operators, got a pykd that was built without it; "
            "install pykd where torch 2.10 or newer is installed, and do not set PYKD_TORCH=OFF"
        )
    return path


def onnxruntime_ops_path() -> str:
    """The library of ONNX Runtime custom ops: with it, sessions of your own run exported files with the fused kernels.

    Without it they run the portable operators that the files carry. :func:`pykd.load` needs none of this.

        >>> options = onnxruntime.SessionOptions()
        >>> options.register_custom_ops_library(pykd.onnxruntime_ops_path())
        >>> session = onnxruntime.InferenceSession("recipe/loss.grad.onnx", options)

    The ops are for the CPU. It is a str because ONNX Runtime takes nothing else.
    """
    return str(library())


def onnxruntime_library() -> Path:
    """The library inside the installed wheel ``onnxruntime`` (or ``onnxruntime-gpu``), which is not imported.

    libpykd finds it by itself where pykd is installed in the same folder; elsewhere it takes it from the environment
    variable ``PYKD_ONNXRUNTIME_LIBRARY``.

    Raises:
        FileNotFoundError: where no such wheel is installed.
    """
    spec = importlib.util.find_spec("onnxruntime")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        found = sorted(Path(folder, "capi").glob("libonnxruntime.so.1.*"))
        if found:
            return found[-1]
    raise FileNotFoundError("expected the package onnxruntime, got none; run `pip install onnxruntime`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was asked for, in the order asked; returns the exit code."""
    answers: dict[str, tuple[str, Callable[[], str]]] = {
        "--cmake-dir": ("the folder of pykdConfig.cmake, for CMake's pykd_DIR", lambda: str(cmake_dir())),
        "--includedir": ("the folder of the headers", lambda: str(includedir())),
        "--libdir": ("the folder of the libraries", lambda: str(libdir())),
        "--cflags": ("flags for the compiler", lambda: f"-isystem {includedir()}"),
        "--libs": ("flags for the linker", lambda: f"-L{libdir()} -lpykd -Wl,-rpath,{libdir()}"),
        "--library": ("libpykd itself, for dlopen()", lambda: str(library())),
        "--pkgconfig-dir": ("the folder of pykd.pc, for PKG_CONFIG_PATH", lambda: str(pkgconfig_dir())),
        "--torch-ops": ("libpykd_torch_ops.so, the kernels as torch operators", lambda: str(torch_ops_path())),
        "--onnxruntime-library": ("libonnxruntime.so of the installed wheel", lambda: str(onnxruntime_library())),
    }
    parser = argparse.ArgumentParser(prog="python -m pykd.config", description="Where the C++ side of pykd lies.")
    for option, (text, _) in answers.items():
        parser.add_argument(option, dest="asked", action="append_const", const=option, help=text)
    asked = parser.parse_args(arguments).asked
    if not asked:
        parser.error(f"expected one of {', '.join(answers)}")
    try:
        print(" ".join(answers[option][1]() for option in asked))
    except FileNotFoundError as error:
        print(f"pykd.config: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
