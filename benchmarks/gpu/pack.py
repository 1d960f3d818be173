"""Makes what travels to the machine with the GPU, where nothing can be fetched: ``scripts/gpu-check --pack``.

The pack is a folder:

    site/       pykd as it is installed, built here for that machine's Python and torch, libpykd_cuda for the H100 and H200; and
                the pure Python packages that the machine lacks
    folders/    exported losses with the answers in float64
    prefix/     headers and libraries for the fallback, which builds pykd there
    pack.json   what it was made from

The build needs no GPU and no torch that runs: of torch's wheel the headers and the three libraries that are linked are unpacked.
"""

import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import ROOT

PYTHON = "3.12"
TORCH = "2.11.0"  # its wheel for that Python is the one for CUDA 13
ARCHITECTURES = "90"
PURE_PACKAGES = ("tomli-w", "liger-kernel")
CACHE = ROOT / ".cache"
ONNXRUNTIME_PACK = CACHE / "gpu-onnxruntime"
ONNXRUNTIME = "1.31.1"  # onnxruntime-gpu for CUDA 13
PROVIDERS = ("libonnxruntime.so", "libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so")
PACK_FILE = "pack.tar.xz"
# What travels to one machine is bounded, the tree included.
MOST_BYTES = 60 << 20


def make(pack: Path) -> None:
    """The whole pack, in a few minutes and with network."""
    run(ROOT / "scripts" / "bootstrap")
    shutil.rmtree(pack, ignore_errors=True)
    pack.mkdir(parents=True)
    collect_prefix(pack / "prefix")
    build_site(pack / "site", torch_headers(), pack / "prefix")
    collect_folders(pack / "folders", all_folders())
    finish(pack, built_for=f"Python {PYTHON}, torch {TORCH}")


def of_this_environment(pack: Path, folders: Iterable[Path]) -> None:
    """The same from the pykd that is installed here, as it is: for rehearsals."""
    from pykd import config

    pack.mkdir(parents=True)
    site = pack / "site" / "pykd"
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(config.root(), site, ignore=no_caches)
    # An editable install keeps the Python files in the source tree.
    for source, target in ((ROOT / "pykd", site), (ROOT / "export", site / "export")):
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=no_caches)
    collect_folders(pack / "folders", folders)
    finish(pack, built_for=f"Python {sys.version.split()[0]}, as installed here")


def finish(pack: Path, **made_from: str) -> None:
    """Notes what the pack is, and says how large it is."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (pack / "pack.json").write_text(json.dumps({"commit": commit.stdout.strip(), **made_from}, indent=1) + "\n")
    size = sum(path.stat().st_size for path in pack.rglob("*") if path.is_file())
    print(f"packed {size / 2**20:.1f} MiB in {pack}")
    if size > MOST_BYTES:
        sys.exit(
            f"gpu-check: expected a pack of at most {MOST_BYTES >> 20} MiB, got {size / 2**20:.1f}; leave something out"
        )


def run(*command: Any, **settings: Any) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **settings)


def install(python: Path, *what: Any, **settings: Any) -> None:
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *what, **settings)


# ---- pykd, built for that machine ---------------------------------------------------------------


def interpreter() -> Path:
    """A virtual environment of that machine's Python, with what builds pykd; made once."""
    folder = CACHE / f"gpu-python{PYTHON}"
    python = folder / "bin" / "python"
    if not python.exists():
        run(base_interpreter(), "-m", "venv", folder)
    install(python, "scikit-build-core>=0.11", "pybind11>=2.13", "ninja")
    return python


def base_interpreter() -> str:
    """A Python of that version which runs: pyenv's on the PATH may be a stand-in for none."""
    named = os.environ.get("PYTHON_OF_GPU_MACHINE")
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{PYTHON}.*/bin/python{PYTHON}"))
    for candidate in [named] if named else [shutil.which(f"python{PYTHON}"), *map(str, of_pyenv)]:
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    sys.exit(
        f"gpu-check: expected a python{PYTHON}, got none that runs; install it, or name it in PYTHON_OF_GPU_MACHINE"
    )


def torch_headers() -> Path:
    """The folder ``torch`` of that machine's torch, as far as the build reads it; unpacked once."""
    folder = CACHE / f"gpu-torch-{TORCH}"
    if not (folder / "torch" / "lib" / "libtorch_cpu.so").is_file():
        wheel = download(f"torch=={TORCH}")
        with zipfile.ZipFile(wheel) as archive:
            wanted = [
                name for name in archive.namelist()
                if name.startswith("torch/include/") or name in {f"torch/lib/lib{x}.so" for x in ("torch", "torch_cpu", "c10")}
            ]  # fmt: skip
            archive.extractall(folder, wanted)
        wheel.unlink()
    return folder / "torch"


def download(requirement: str) -> Path:
    """The wheel for that machine's Python."""
    folder = CACHE / "gpu-wheels"
    run(
        sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
        "--python-version", PYTHON, "--implementation", "cp", "--platform", "manylinux_2_28_x86_64",
        "--platform", "manylinux_2_27_x86_64", "-d", folder, requirement,
    )  # fmt: skip
    name = requirement.split("==")[0].replace("-", "_")
    return max(folder.glob(f"{name}-*.whl"), key=lambda path: path.stat().st_mtime)


def build_site(site: Path, torch: Path, prefix: Path) -> None:
    """pykd for that machine, and the packages that it lacks."""
    python = interpreter()
    environment = {
        **os.environ,
        # Not as a setting of CMake, which would hide what scikit-build-core finds by itself, pybind11 above all.
        "CMAKE_PREFIX_PATH": os.pathsep.join([str(torch), str(prefix)]),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
    }
    settings = {
        "build-dir": str(ROOT / "build" / "gpu-pack"),
        "cmake.define.PYKD_CUDA": "ON",
        "cmake.define.CMAKE_CUDA_ARCHITECTURES": ARCHITECTURES,
        "cmake.define.PYKD_ORT_INCLUDE_DIR": str(prefix / "include" / "onnxruntime"),
    }
    install(
        python, "--no-deps", "--no-build-isolation", "--upgrade", "--target", site, ROOT,
        *(f"--config-settings={key}={value}" for key, value in settings.items()), env=environment,
    )  # fmt: skip
    for package in PURE_PACKAGES:
        install(python, "--no-deps", "--no-compile", "--target", site, package)


def collect_prefix(prefix: Path) -> None:
    """What a build of libpykd and the extension includes and links, beside what that machine has."""
    include, lib = prefix / "include", prefix / "lib"
    lib.mkdir(parents=True)
    for name in ("nlohmann", "protozero", "hwy"):
        shutil.copytree(Path("/usr/include") / name, include / name)
    for header in ("zlib.h", "zconf.h"):
        shutil.copy(_found("/usr/include", header), include)
    shutil.copytree(CACHE / "onnxruntime-headers", include / "onnxruntime")
    shutil.copytree("/usr/share/cmake/nlohmann_json", prefix / "share" / "cmake" / "nlohmann_json", symlinks=False)
    for library in ("libz.a", "libhwy.so.1"):
        shutil.copy(_found("/usr/lib", library), lib / library)


def _found(folder: str, name: str) -> Path:
    for path in sorted(Path(folder).rglob(name)):
        return path.resolve()
    sys.exit(f"gpu-check: expected {name} below {folder}, got none; run scripts/bootstrap")


# ---- The exported folders -----------------------------------------------------------------------


def all_folders() -> list[Path]:
    """Those of the C++ tests, in the dtypes that training uses."""
    root = ROOT / "build" / "vectors"
    run(sys.executable, "-m", "tests.make_vectors", root, cwd=ROOT)
    return sorted(
        path.parent
        for path in root.glob("*/vectors.json")
        if path.parent.name.endswith(("float32", "bfloat16", "float16"))
    )


def collect_folders(target: Path, folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.copytree(folder, target / folder.name, ignore=shutil.ignore_patterns("stamp"))


# ---- ONNX Runtime with its CUDA provider, for the second run --------------------------------------


def make_onnxruntime(pack: Path) -> None:
    """ONNX Runtime's libraries, with the machine code of other architectures taken out, and what the stage needs of the first pack:
    all of it compressed, and enough by itself, because it fills what may travel."""
    from benchmarks.gpu.fatbin import keep_architectures

    shutil.rmtree(pack, ignore_errors=True)
    pack.mkdir(parents=True)
    compress_pack(CACHE / "gpu", pack)
    wheel = download(f"onnxruntime-gpu=={ONNXRUNTIME}")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not Path(name).name.startswith(PROVIDERS):
                continue
            library = bytearray(archive.read(name))
            if "cuda" in name:
                gone = keep_architectures(library, {int(ARCHITECTURES)})
                print(f"{name}: {gone / 2**20:.0f} MiB of other architectures", flush=True)
            compress(bytes(library), pack / f"{Path(name).name}.xz")
    wheel.unlink()
    finish(pack, onnxruntime=ONNXRUNTIME)


def compress(content: bytes, target: Path, preset: int = 9 | lzma.PRESET_EXTREME) -> None:
    # The first filter makes the addresses in x86 code alike: a few per cent less.
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": preset}]
    target.write_bytes(lzma.compress(content, filters=filters))


def compress_pack(pack: Path, target: Path) -> None:
    """pykd and the exported folders of the first pack, as one file."""
    if not (pack / "pack.json").is_file():
        sys.exit(f"gpu-check: expected a pack in {pack}, got none; scripts/gpu-check --pack makes it")

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "liger_kernel" in member.name else member

    with tarfile.open(target / PACK_FILE, "w:xz") as archive:
        for folder in ("site", "folders"):
            archive.add(pack / folder, folder, filter=wanted)


def unpack_onnxruntime(packed: Path) -> tuple[Path, dict[str, str]]:
    """Unpacks it on the machine: (the pack, the variables with which pykd finds ONNX Runtime)."""
    if not (packed / PACK_FILE).is_file():
        sys.exit(
            f"gpu-check: expected {PACK_FILE} in {packed}, got none; scripts/gpu-check --pack-onnxruntime makes it"
        )
    pack = ROOT / "build" / "gpu-onnxruntime"
    shutil.rmtree(pack, ignore_errors=True)
    with tarfile.open(packed / PACK_FILE) as archive:
        archive.extractall(pack, filter="data")
    for library in packed.glob("*.so*.xz"):
        (pack / library.stem).write_bytes(lzma.decompress(library.read_bytes()))
    runtime = max(pack.glob("libonnxruntime.so*"), key=lambda path: path.stat().st_size)
    return pack, {"PYKD_ONNXRUNTIME_LIBRARY": str(runtime)}
