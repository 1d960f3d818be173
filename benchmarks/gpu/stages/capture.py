"""CUDA graphs and streams. The first launch of this process is made while a graph is captured: nothing has been warmed up."""

from benchmarks.gpu import controls, soft_target
from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.soft_target import Case, Outputs
from benchmarks.gpu.stage import Context

CASES = (
    Case("kl", "", "bfloat16", 1, 1 << 20),  # a cluster of 16
    Case("jsd", "labels", "float32", 64, 1001),
    Case("reverse_kl", "label_probs", "float16", 32, 32000),
    Case("symmetric_kl", "labels", "bfloat16", 600, 32000),
    Case("jsd", "", "float32", 1, 262144),
    Case("", "labels", "bfloat16", 256, 10),
    Case("jsd", "label_probs", "bfloat16", 9, 301),
)


def run(context: Context) -> None:
    device = device_of(context.device)
    cases = [case for case in CASES if case.batch * case.classes <= context.largest]
    for case in cases:
        context.check(lambda c=case: replays(device, c), check="graph", case=str(case))
    for case in cases:
        context.check(lambda c=case: keeps_to_its_stream(device, c), check="side stream", case=str(case))
    context.check(lambda: controls.seen_apart(device), control="a kernel on the wrong stream is seen")


def replays(device: Device, case: Case) -> bool:
    """A captured call, replayed on other inputs in the same memory, does what a call of its own does."""
    inputs = soft_target.draw(case, device.name)
    outputs = Outputs(case, device.name, soft_target.POISONS[0])
    device.synchronize()
    replay = device.capture(lambda stream: soft_target.launch(case, inputs, outputs.tensors, stream))
    for seed in (1, 2):
        for name, tensor in soft_target.draw(case, device.name).items():
            if name != "temperature":  # read by the host when the call is captured
                inputs[name].copy_(tensor.roll(seed, 0))
        for tensor in outputs.tensors.values():
            tensor.fill_(soft_target.POISONS[1])
        replay()
        replay()
        device.synchronize()
        alone = controls.answer(device, case, inputs)
        if not alone.judge(soft_target.expected(case, inputs))["right"]:
            return False
        if not (soft_target.same_bits(outputs.tensors, alone.first.tensors) and outputs.intact()):
            return False
    return True


def keeps_to_its_stream(device: Device, case: Case) -> bool:
    """On a stream whose inputs come late the kernel reads them all the same, and what follows there reads its results."""
    inputs = soft_target.draw(case, device.name)
    late = inputs["student"].clone()
    inputs["student"].zero_()
    outputs = Outputs(case, device.name, soft_target.POISONS[0])
    results = {name: tensor.clone() for name, tensor in outputs.tensors.items()}
    device.synchronize()
    stream = device.stream()
    device.busy(stream)
    device.launch(lambda _: inputs["student"].copy_(late), stream)
    device.launch(lambda handle: soft_target.launch(case, inputs, outputs.tensors, handle), stream)
    device.launch(lambda _: [results[name].copy_(tensor) for name, tensor in outputs.tensors.items()], stream)
    device.synchronize()
    return soft_target.right(case, results, soft_target.expected(case, inputs)) and outputs.intact()
