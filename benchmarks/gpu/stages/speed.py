"""The kernel's time, beside that of a copy of the same bytes in the same run. Every answer is checked before it is timed."""

import torch

from benchmarks.gpu import soft_target
from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.soft_target import Case, Outputs
from benchmarks.gpu.stage import Context

VOCABULARIES = (32000, 50257, 128256, 262144)
TIMED_FORMS = ("kl", "cross_entropy", "reverse_kl", "jsd", "symmetric_kl")
MANY_BYTES = 1 << 28  # what rotating buffers hold together: several times any L2 cache
MOST_SETS = 64
BUDGET = 0.3  # seconds of measuring per case
SMALL_IN_A_GRAPH = 20  # calls per graph


def run(context: Context) -> None:
    device = device_of(context.device)
    ceiling = copy_bandwidth(device, min(1 << 30, 8 * context.largest))
    context.report(None, copy_bandwidth=ceiling)
    again = copy_bandwidth(device, min(1 << 30, 8 * context.largest))
    context.report(None, copy_bandwidth=again, spread=abs(again / ceiling - 1))
    for case, graph in timed_cases():
        if case.batch * case.classes <= context.largest:
            context.attempt(lambda c=case, g=graph: measure(context, device, c, g, ceiling), case=str(case))  # type: ignore[misc]


def timed_cases() -> list[tuple[Case, bool]]:
    """(case, whether by replaying a graph), the ones that say most first."""
    large = [(Case(form, "", "bfloat16", 4096, 32000), False) for form in TIMED_FORMS]
    small = [(Case("kl", "", "bfloat16", rows, 128256), True) for rows in (1, 2, 4, 8, 16)]
    small += [(Case("kl", "", "float32", rows, 128256), True) for rows in (1, 8)]
    few_classes = [(Case("kl", "", dtype, 65536, 10), True) for dtype in ("bfloat16", "float32")]
    vocabularies = [(Case(form, "", "bfloat16", 4096, v), False) for v in VOCABULARIES[1:] for form in TIMED_FORMS[:4]]
    others = [(Case("kl", "", dtype, 4096, 32000), False) for dtype in ("float32", "float16")]
    others += [
        (Case("kl", "labels", "bfloat16", 4096, 32000), False),
        (Case("", "labels", "bfloat16", 4096, 32000), False),
    ]
    rehearsed = [(Case("kl", "", "bfloat16", 64, 100), graph) for graph in (False, True)]
    return large + small + few_classes + vocabularies + others + rehearsed


def copy_bandwidth(device: Device, size: int) -> float:
    """Bytes read plus bytes written per second by a large copy: the ceiling."""
    source = torch.ones(size, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    return 2 * size / device.seconds([lambda: target.copy_(source)], BUDGET)


def measure(context: Context, device: Device, case: Case, graph: bool, ceiling: float) -> None:
    """Time of one case; sets of buffers take turns, so that none of them is in the cache."""
    inputs = soft_target.draw(case, device.name)
    first = Outputs(case, device.name, soft_target.POISONS[0])
    tensors = [t for name, t in inputs.items() if name != "temperature"] + list(first.tensors.values())
    moved = sum(tensor.nbytes for tensor in tensors)
    count = max(2, min(MOST_SETS, -(-MANY_BYTES // moved)))
    sets = [(inputs, first.tensors)]
    for _ in range(count - 1):
        copies = {name: t if name == "temperature" else t.clone() for name, t in inputs.items()}
        sets.append((copies, {name: torch.empty_like(t) for name, t in first.tensors.items()}))

    device.launch(lambda stream: soft_target.launch(case, inputs, first.tensors, stream))
    device.synchronize()
    errors = soft_target.errors(case, inputs, first.tensors)
    row = {"case": str(case), "errors": errors, "bytes": moved, "sets": count, "graph": graph}
    if max(errors.values()) > 1:
        context.report(False, **row)
        return

    def all_of_them(stream: int | None) -> None:
        for given, wanted in sets:
            soft_target.launch(case, given, wanted, stream)

    if graph:
        times = max(1, SMALL_IN_A_GRAPH // count)
        seconds = device.seconds([device.capture(all_of_them, times)], BUDGET) / (times * count)
    else:
        calls = [
            lambda g=given, w=wanted: device.launch(lambda s: soft_target.launch(case, g, w, s))
            for given, wanted in sets
        ]  # type: ignore[misc]
        seconds = device.seconds(calls, BUDGET)
    bandwidth = moved / seconds
    context.report(True, **row, seconds=seconds, bandwidth=bandwidth, of_copy=bandwidth / ceiling)
