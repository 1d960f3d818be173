"""The first proof: KL in every dtype, in each layout that the launcher has. ``plain=yes``: as few kernels of torch's as can be, for
compute-sanitizer, which takes its time with every one."""

from benchmarks.gpu import soft_target
from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.soft_target import Case, Outputs
from benchmarks.gpu.stage import Context

# One block; lanes of a warp; clusters of 2, 8 and 16. (On 132 multiprocessors: soft_target_plan.h.)
SHAPES = ((5, 77), (3000, 77), (600, 32000), (32, 32000), (1, 1 << 20))
PLAIN_SHAPES = ((5, 77), (300, 77), (140, 12000), (3, 32000), (1, 1 << 19))


def run(context: Context) -> None:
    device = device_of(context.device)
    plain = context.arguments.get("plain") == "yes"
    for batch, classes in PLAIN_SHAPES if plain else SHAPES:
        for dtype in soft_target.DTYPES if batch * classes <= context.largest else ():
            case = Case("kl", "", dtype, batch, classes)
            context.attempt(lambda c=case: check(context, device, c, plain), case=str(case))  # type: ignore[misc]


def check(context: Context, device: Device, case: Case, plain: bool) -> None:
    inputs = soft_target.draw(case, device.name, "cpu" if plain else None)
    outputs = Outputs(case, device.name, soft_target.POISONS[0])
    device.launch(lambda stream: soft_target.launch(case, inputs, outputs.tensors, stream))
    device.synchronize()
    there = "cpu" if plain else device.name
    got = {name: tensor.to(there) for name, tensor in outputs.tensors.items()}
    errors = soft_target.errors(case, {name: tensor.to(there) for name, tensor in inputs.items()}, got)
    context.report(max(errors.values()) <= 1, case=str(case), errors=errors)
