"""``python -m benchmarks.gpu.one_launch 4096x32000``: KL in bfloat16, three times, and nothing else. For a profiler to look at."""

import os
import sys

from benchmarks.gpu import soft_target
from benchmarks.gpu.device import device_of
from benchmarks.gpu.soft_target import Case, Outputs

if __name__ == "__main__":
    device = device_of(os.environ.get("GPU_CHECK_DEVICE", "cuda"))
    batch, classes = map(int, sys.argv[1].split("x"))
    case = Case("kl", "", "bfloat16", batch, classes)
    inputs, outputs = soft_target.draw(case, device.name), Outputs(case, device.name, soft_target.POISONS[0])
    for _ in range(3):
        device.launch(lambda stream: soft_target.launch(case, inputs, outputs.tensors, stream))
    device.synchronize()
