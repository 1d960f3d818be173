"""What ``pykd list --support`` says: nothing without a reason, and nothing that tests do not know."""

import pytest

from pykd import command_line, kernels
from pykd.command_line import support
from pykd.definition import registry
from pykd.export import DTYPES
from tests import make_vectors
from tests.test_settings import declare


def holes(found):
    """The cells of routes and types of which nothing is said."""
    return [
        (route, dtype)
        for route in support.ROUTES
        for dtype in DTYPES
        if not isinstance(found.get(route, {}).get(dtype), str)
    ]


def test_every_route_and_type_is_there_or_has_a_reason(loss_class):
    found = support.support(loss_class)
    assert not holes(found)
    assert not any(found["eager"].values()), found["eager"]
    # tests/test_engines.py runs every case of every loss on these, in these types.
    assert set(make_vectors.DTYPES) == set(DTYPES)
    assert not any(why for route in support.FILES for why in found[route].values())
    for dtype, why in found["kernel, CPU"].items():
        known = {dtype for kernel in kernels.descriptions().values() for dtype in kernel["dtypes"]}
        if loss_class.has_kernel() and dtype in known and why:
            assert why.startswith("no kernel computes")
        elif not loss_class.has_kernel():
            assert why.startswith("it has no kernel")


def test_a_hole_is_seen():
    found = dict(support.support(registry.get("soft_target")))
    found["C++"] = {dtype: "" for dtype in DTYPES if dtype != "float16"}
    assert holes(found) == [("C++", "float16")]


def test_a_kernel_for_the_cpu_alone_is_told_with_the_reason():
    found = support.support(registry.get("total_variation"))
    assert not any(found["kernel, CPU"][dtype] for dtype in ("float32", "float16", "bfloat16"))
    assert found["kernel, CUDA"]["float32"] == "the kernel divergence has no version for CUDA"
    assert not support.support(registry.get("soft_target"))["kernel, CUDA"]["float32"]


def breaks(student_logits, teacher_logits, reduction: str = "mean"):
    if student_logits.element_size() == 2:
        raise RuntimeError("expected 32 bits or more, got 16; pass more")
    return (student_logits - teacher_logits).square().mean()


def test_what_does_not_run_is_told_with_the_reason(capsys):
    cls = declare(breaks)
    assert support.support(cls)["eager"]["float16"] == "expected 32 bits or more, got 16; pass more"
    text = "\n".join(support.lines([cls]))
    assert "f32 f64 [1]" in text and "[1] expected 32 bits or more, got 16; pass more" in text


@pytest.mark.parametrize("words", [[], ["features"]])
def test_the_command_prints_a_row_per_loss(words, capsys):
    assert command_line.main(["list", "--support", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [cls.name for losses in registry.search(words).values() for cls in losses]
    assert [line.split()[0] for line in lines[1 : 1 + len(names)]] == names
    assert any(line.endswith(support.NOT_RUN) for line in lines)
