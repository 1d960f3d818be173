"""The ends of the numbers: very long and very short rows; the bits of a value.

Formula, kernel and reference say the same. Generated from the registry: nothing here names a loss.
"""

import numpy as np
import pytest
import torch

from pykd import kernels
from pykd.fused.point import value_and_gradient
from tests.conftest import loss_subjects
from tests.test_kernels import DTYPES, in_library, through, with_kernel

FUSABLE = pytest.mark.parametrize("fusable", with_kernel(), ids=str)


def vectors(subject):
    """Inputs whose rows are divided by their norms."""
    return subject.inputs_of("features") if subject.holds("feature_scale") is True else []


def leaves(subject, tensors):
    specs = subject.graph().signature.inputs
    return {name: t.clone().requires_grad_(specs[name].grad) for name, t in tensors.items()}


# ---- Long and short rows ------------------------------------------------------------------------

NORMALISING = pytest.mark.parametrize("normalising", [s for s in loss_subjects() if vectors(s)], ids=str)
SCALES = {
    torch.float32: [1e-37, 1e-30, 1e-20, 1e-13, 1e13, 1e19, 1e30, 1e37],
    torch.float64: [1e-300, 1e-160, 1e-30, 1e-13, 1e30, 1e160, 1e300],
}


@pytest.mark.parametrize(("dtype", "scale"), [(d, s) for d, all_ in SCALES.items() for s in all_], ids=str)
@pytest.mark.parametrize("side", ["both", "student", "teacher"])
@NORMALISING
def test_lengths_do_not_matter(normalising, dtype, scale, side):
    """Neither value nor direction of the gradient: it is as much smaller as the row is longer."""
    subject = normalising
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in subject.draw(seed=1).items()}
    names = [name for name in vectors(subject) if side == "both" or side in name]
    if not names:
        pytest.skip("nothing on this side is normalised")
    power = 2.0 ** round(np.log2(scale))  # exact
    results = []
    for factor in (1.0, power):
        moved = {name: t * factor if name in names else t for name, t in tensors.items()}
        given = leaves(subject, moved)
        value = subject.graph()(**given)["loss"]
        value.backward()
        student = next(name for name in given if given[name].requires_grad)
        results.append((value.detach(), given[student].grad * (factor if student in names else 1.0)))
        reference = subject.composition.reference(
            **{n: t.double().numpy() if t.is_floating_point() else t.numpy() for n, t in moved.items()}
        )
        np.testing.assert_allclose(value.item(), reference["loss"], rtol=1e-5, atol=3e-6)
        if dtype == torch.float32 and subject.has_kernel:
            fast = through(subject, moved, in_library())
            torch.testing.assert_close(fast["loss"], value.detach(), rtol=1e-5, atol=3e-6)
            close = fast[f"grad_{student}"] * (factor if student in names else 1.0)
            torch.testing.assert_close(close, results[-1][1], rtol=1e-3, atol=1e-4 * results[-1][1].abs().max().item())
    (plain, gradient), (scaled, scaled_gradient) = results
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled_gradient, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("what", ["zero", "subnormal", "infinite", "nan"])
@NORMALISING
def test_rows_without_a_direction(normalising, dtype, what):
    """0 (and, in the type that is computed in, subnormal): direction and gradient 0; not finite: NaN."""
    subject = normalising
    names = vectors(subject)
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in subject.draw(seed=2).items()}
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    fill = {"zero": 0.0, "subnormal": torch.finfo(compute).tiny / 64, "infinite": torch.inf, "nan": torch.nan}[what]
    if "sample_weight" in tensors:
        tensors["sample_weight"] = torch.ones_like(tensors["sample_weight"])  # nothing is left out
    ignored = getattr(subject.loss, "ignore_index", None)
    for name in subject.inputs_of("indices") if ignored else ():
        tensors[name] = torch.where(tensors[name] == ignored, ignored - 1, tensors[name])
    for name in names:
        tensors[name][0] = fill if not (what == "subnormal" and dtype == torch.float16) else 0.0
    routes = {"formula": lambda given: subject.graph()(**given)["loss"]}
    if dtype != torch.float64 and subject.has_kernel:
        routes["kernel"] = lambda given: subject.composition(**given, kernels="on")["loss"]
    for route, run in routes.items():
        given = leaves(subject, tensors)
        value = run(given)
        value.backward()
        student = next(name for name in given if given[name].requires_grad)
        if what in ("zero", "subnormal"):
            assert torch.isfinite(value), route
            assert (given[student].grad[0] == 0).all(), route
            assert torch.isfinite(given[student].grad).all(), route
        else:
            assert torch.isnan(value), route
            assert torch.isnan(given[student].grad[0]).all(), route


# ---- The bits of a value ------------------------------------------------------------------------


@FUSABLE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", kernels.simd_targets())
def test_the_value_alone_has_the_bits_of_the_value_with_its_gradient(fusable, dtype, target):
    kernels.use_simd(target)
    try:
        for seed, sizes in enumerate((*fusable.long_sizes()[:1], fusable.trial_sizes()["large"])):
            tensors = fusable.draw(sizes, seed=seed, dtype=DTYPES[dtype])
            graph = fusable.composition.graph(fusable.layouts, fusable.optional, check=False, fused=True)
            for threads in (1, 3):
                both = through(fusable, tensors, in_library(threads))
                alone, _ = value_and_gradient(
                    lambda graph=graph, tensors=tensors: graph(**tensors),
                    graph.kernel_point,
                    [],
                    1.0,
                    in_library(threads),
                )
                for name, value in alone.items():
                    assert torch.equal(value, both[name]), f"{name}: {value} {both[name]}"
    finally:
        kernels.use_simd(None)
