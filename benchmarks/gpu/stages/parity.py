"""The matrix of the emulated tests, on the device: every form × kind of label × dtype × shape × alignment, against float64.

Every call is made twice, on outputs poisoned differently: both times the same bits, everything written, nothing beside it. Before it
come the controls: what is wrong on purpose, and has to be seen as wrong.
"""

import itertools
from collections.abc import Iterable, Iterator

from benchmarks.gpu import controls, soft_target
from benchmarks.gpu.controls import answer
from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.soft_target import Case
from benchmarks.gpu.stage import Context

KERNEL = soft_target.KERNEL
SHAPES = (
    (1, 1), (7, 2), (33, 77), (256, 10), (64, 1001), (5, 4096),
    (4000, 10), (1000, 300),  # lanes of a warp
    (32, 32000),  # a cluster of 8
    (600, 32000),  # of 2, all of a row in shared memory
    (20, 50257),  # odd: every row begins elsewhere
    (280, 128256),  # more than fits in shared memory, in float32
    (1, 262144),  # a cluster of 16
    (3, 1 << 20),
)  # fmt: skip
LEADS = ((0, 0, 0, 0), (1, 1, 1, 1), (1, 0, 0, 0), (0, 0, 3, 2))
MANY_ELEMENTS = 1 << 23  # from here on two alignments, and a case in three kinds


def run(context: Context) -> None:
    device = device_of(context.device)
    context.attempt(lambda: check_controls(context, device), control="all")
    for shape in (s for s in SHAPES if s[0] * s[1] <= context.largest):
        for dtype in soft_target.DTYPES:
            title = f"{shape[0]}x{shape[1]} {dtype}"
            context.attempt(lambda s=shape, d=dtype, t=title: check_all(context, device, t, cases(s, d)), cases=title)  # type: ignore[misc]
    for classes in (5, 77, 1001, 32000, 262144):
        if 10 * classes <= context.largest:
            for dtype in soft_target.DTYPES:
                odd = [
                    Case(form, hard, dtype, 10, classes, odd_rows=True, temperature=t, soften_student=soften)
                    for form, hard in soft_target.kinds()
                    for t, soften in ((2.5, True), (1.0, True), (3.0, False))
                ]
                title = f"odd rows 10x{classes} {dtype}"
                context.attempt(lambda o=odd, t=title: check_all(context, device, t, o), cases=title)  # type: ignore[misc]


def cases(shape: tuple[int, int], dtype: str) -> Iterator[Case]:
    large = shape[0] * shape[1] >= MANY_ELEMENTS
    for number, (form, hard) in enumerate(soft_target.kinds()):
        for leads in LEADS[:2] if large else LEADS:
            yield Case(form, hard, dtype, *shape, leads=leads, seed=number)


def check_all(context: Context, device: Device, title: str, some: Iterable[Case]) -> None:
    """One row for all of them together, and one for each that is wrong."""
    count, failed, largest = 0, 0, 0.0
    for case in some:
        inputs = soft_target.draw(case, device.name)
        found = answer(device, case, inputs).judge(soft_target.expected(case, inputs))
        count += 1
        largest = max(largest, found["error"])
        if found.pop("right"):
            continue
        failed += 1
        if failed <= 5:
            context.report(None, wrong=str(case), **found)
    context.report(failed == 0, cases=title, calls=count, wrong=failed, error=largest)


def check_controls(context: Context, device: Device) -> None:
    """Of the answer in float64, and of the comparison with it."""
    for form, hard in soft_target.kinds():
        case = Case(form, hard, "float32", 6, 11, seed=3)
        context.report(controls.agrees_with_numpy(case), control="float64 is what the losses say", case=str(case))
    for (form, hard), dtype in itertools.product(soft_target.kinds(), soft_target.DTYPES):
        case = Case(form, hard, dtype, 9, 130, seed=5)
        missed = controls.missed(device, case)
        context.report(not missed, control="what is wrong is seen", case=str(case), missed=missed)
