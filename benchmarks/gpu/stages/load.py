"""Whether the pykd that was built elsewhere opens here, and which of its parts are usable."""

import ctypes
import time

from benchmarks.gpu.stage import Context


def run(context: Context) -> None:
    start = time.monotonic()
    import torch

    import pykd
    from pykd import config, kernels

    context.report(None, torch_seconds=round(time.monotonic() - start, 2), pykd=pykd.__version__, folder=pykd.__file__)
    context.report("soft_target" in kernels.descriptions(), check="libpykd", kernels=sorted(kernels.descriptions()))
    if context.device == "cuda":
        # One launch says more than a status: the library is found, of this version, and has code for this device.
        student, value = torch.zeros(1, 8, device="cuda"), torch.empty(1, device="cuda")
        inputs = {"student": student, "labels": torch.zeros(1, dtype=torch.int64, device="cuda")}
        kernels.run("soft_target", inputs, {}, {"hard": value}, cuda_stream=torch.cuda.current_stream().cuda_stream)
        got = float(value)
        context.report(abs(got - 2.0794415) < 1e-5, check="libpykd_cuda", value=got)
    for name in ("libpykd_torch", "libpykd_torch_ops"):
        try:
            ctypes.CDLL(str(config.libdir() / f"{name}.so"))
            context.report(True, check=name)
        except OSError as error:  # FileNotFoundError is one
            context.report(False, check=name, error=str(error))
