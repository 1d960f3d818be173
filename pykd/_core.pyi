"""Types of the compiled module: libpykd by DLPack. `pykd.runtime` is the face of it."""

from collections.abc import Callable
from typing import Any

version: str
kept_from: int  # bytes from which on Memory is kept from call to call

class Memory:
    """Memory for a result: a buffer of bytes. `allocate` makes it."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

def check_onnx(data: bytes) -> None:
    """A ValueError where the loader refuses an ONNX file before an engine sees it."""

def allocate(bytes: int) -> Memory:
    """Memory of that size, not cleared."""

class Loss:
    """What `load` makes."""

    @property
    def metadata(self) -> str: ...
    @property
    def engine(self) -> str: ...
    @property
    def engine_version(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def kernels_in_use(self) -> str:
        """Names separated by spaces."""
    @property
    def passed_over(self) -> str: ...
    @property
    def inputs(self) -> list[tuple[str, tuple[str, ...], tuple[str, ...], bool, tuple[int, ...]]]:
        """Per input: name, axes, dtypes, whether it receives a gradient, the least lengths of the axes."""
    @property
    def outputs(self) -> list[tuple[str, tuple[str, ...], tuple[str, ...], bool, tuple[int, ...]]]:
        """Per output: name, axes, dtypes, whether it is a gradient, the least lengths of the axes."""
    @property
    def parameters(self) -> list[tuple[str, float, float, bool, float]]:
        """Per parameter: name, default, minimum, whether the minimum itself is excluded, maximum."""
    def output_shape(self, inputs: dict[str, Any], name: str) -> tuple[tuple[int, ...], str]:
        """The shape and dtype that an output has for these inputs."""
    def run(self, inputs: dict[str, Any], parameters: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Runs the loss and writes into the memory of `outputs`."""
    def run_into_new(
        self,
        inputs: dict[str, Any],
        parameters: dict[str, Any],
        names: tuple[str, ...],
        allocate: Callable[[tuple[int, ...], str], Any],
    ) -> dict[str, Any]:
        """The same, into what `allocate(shape, dtype)` returns for each of `names`."""

def load(
    path: bytes | None,
    contents: bytes | None,
    engine: str | None,
    device: str | None,
    onnxruntime_library: bytes | None,
    torch_library: bytes | None,
    threads: int,
    check_integrity: bool,
    cuda_stream: int,
    kernels: str | None,
) -> Loss:
    """Loads an artefact from a path, as os.fsencode() gives it, or from the bytes of a file."""

def kernel_descriptions() -> list[str]:
    """One JSON object per kernel, as ``pykd/kernels.h`` says."""

def run_kernel(
    name: str,
    inputs: dict[str, Any],
    attributes: dict[str, str | float],
    outputs: dict[str, Any],
    threads: int = 0,
    cuda_stream: int = 0,
) -> None:
    """Runs a kernel and writes into the memory of `outputs`."""

class KernelCall:
    """A kernel call that is made again and again with other tensors of the same shapes. `prepare_kernel` makes it."""

    def run(self, inputs: tuple[Any, ...], gradients: tuple[Any, ...], threads: int) -> tuple[float, ...]:
        """Writes the gradients, where any are given, and returns the sums."""

def prepare_kernel(
    kernel: str,
    numbers: dict[str, float],
    inputs: tuple[str, ...],
    attributes: dict[str, Any],
    weights: dict[str, Any],
    values: tuple[tuple[str, int], ...],
    gradients: tuple[str, ...],
    sums: tuple[tuple[int, Any, bool], ...],
) -> KernelCall:
    """What `cpp/bindings/kernel_call.h` says."""

def weighted_sum(weights: Any, values: Any, at_least_0: bool) -> float:
    """Σ weight · value in float64; negative values count as 0 where asked."""

def simd_targets() -> str:
    """Names separated by spaces, best first."""

def use_simd(target: str | None) -> None:
    """Uses that one; None: the best."""
