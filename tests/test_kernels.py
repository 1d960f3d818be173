"""Every loss that has a kernel, with every case it declares: kernel against float64, beside the formula in the same type.

Nothing here names a loss. A kernel may be as far from float64 as the plain formula in the working type is, plus a margin
for another order of the same sums.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import pykd
from pykd import kernels
from pykd.composition import as_composition
from pykd.definition import REDUCTIONS, Loss, ops
from pykd.export.verification import truth
from pykd.fused.linear import Linear, Reduced
from pykd.fused.point import Value, value_and_gradient
from tests import tolerances
from tests.conftest import Subject, composed_subjects, loss_subjects

CPP = Path(__file__).parents[1] / "cpp" / "kernels"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SIZES = ("example", "smallest", "some hundreds", "some thousands")


def lengths_of(subject):
    """Lengths by axis, for each of SIZES."""
    return dict(zip(SIZES, ({}, subject.trial_sizes()["smallest"], *subject.long_sizes()), strict=True))


def with_kernel():
    return [subject for subject in (*loss_subjects(), *composed_subjects()) if subject.has_kernel]


def pytest_generate_tests(metafunc):
    if "fusable" in metafunc.fixturenames:
        metafunc.parametrize("fusable", with_kernel(), ids=str)


def through(subject: Subject, tensors, run, scale=1.0, per_sample=False):
    """Loss and gradients of a fused graph whose kernel calls go to ``run``."""
    graph = subject.composition.graph(subject.layouts, subject.optional, per_sample, check=False, fused=True)
    students = [name for name, spec in graph.signature.inputs.items() if spec.grad]
    leaves = {name: t.clone().requires_grad_(name in students) for name, t in tensors.items()}
    values, gradients = value_and_gradient(
        lambda: graph(**leaves), graph.kernel_point, [leaves[name] for name in students], scale, run
    )
    return {**values, **{f"grad_{name}": g for name, g in zip(students, gradients, strict=True)}}


def in_library(threads=0):
    def run(call, weights):
        inputs = call.inputs(weights)
        kind = next(t.dtype for n, t in inputs.items() if call.kernel.inputs[n].role == "tensor")
        kinds = {name: kind if a.role == "tensor" else torch.float32 for name, a in call.kernel.outputs.items()}
        outputs = {
            name: torch.full(call.kernel.shape(name, call.tensors), torch.nan, dtype=kinds[name])
            for name in call.outputs(weights)
        }
        kernels.run(call.kernel.name, inputs, call.attributes, outputs, threads)
        return outputs

    return run


def by_formula(call, weights):
    return call.plain({n: v.detach() if torch.is_tensor(v) else v for n, v in call.tensors.items()}, weights)


def distances(got, want):
    """(of the values, of the gradients)"""
    worst = [0.0, 0.0]
    for name, expected in want.items():
        expected = np.asarray(expected, dtype=np.float64)
        difference = np.abs(got[name].detach().double().numpy() - expected)
        assert np.isfinite(difference).all(), name
        if name.startswith("grad_"):
            worst[1] = max(worst[1], difference.max() / max(np.abs(expected).max(), 1e-2))
        else:
            worst[0] = max(worst[0], (difference / np.maximum(np.abs(expected), 1.0)).max())
    return worst


def check(subject, tensors, dtype, run=None):
    """No farther from float64 than the formula in the same type, plus the margin."""
    want = truth(subject.composition, subject.graph(), tensors, {}, False)
    kernel = distances(through(subject, tensors, run or in_library()), want)
    formula = distances(through(subject, tensors, by_formula), want)
    value_margin, gradient_margin = tolerances.KERNEL[dtype]
    # A gradient of the reverse direction is a difference of numbers as large as the value, of which nothing but their
    # rounding may be left: thousands where logits are saturated.
    value = abs(float(want["loss"]))
    if value > 100:
        largest = max(np.abs(g).max() for name, g in want.items() if name.startswith("grad_"))
        gradient_margin += value * 2**-23 / max(largest, 1e-2)
    assert kernel[0] <= formula[0] + value_margin, f"values: kernel {kernel[0]}, formula {formula[0]}"
    assert kernel[1] <= formula[1] + gradient_margin, f"gradients: kernel {kernel[1]}, formula {formula[1]}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_kernel_is_as_close_as_the_formula(fusable, sizes, dtype):
    check(fusable, fusable.draw(lengths_of(fusable)[sizes], seed=1, dtype=DTYPES[dtype]), dtype)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4], ids=["equal", "tiny", "saturated"])
def test_kernel_at_the_ends_of_the_range(fusable, scale):
    tensors = fusable.draw(seed=2, dtype=torch.float32)
    for name in fusable.inputs_of("logits", "features"):
        tensors[name] = tensors[name] * scale
    check(fusable, tensors, "float32")


def test_kernel_with_masked_classes(fusable):
    tensors = fusable.draw({"classes": 37}, seed=3, dtype=torch.float32)
    logits = [name for name, spec in fusable.graph().signature.inputs.items() if spec.grad or "teacher" in name]
    logits = [name for name in logits if "classes" in fusable.graph().signature.inputs[name].names]
    if not logits:
        pytest.skip("no classes")
    for name in logits:
        tensors[name][..., ::3] = float("-inf")
    for name, spec in fusable.graph().signature.inputs.items():
        if name == "labels" and tensors[name].is_floating_point():
            tensors[name][..., ::3] = 0
        elif spec.draw == "indices":
            tensors[name] = torch.where(tensors[name] % 3 == 0, 1, tensors[name])
    got, want = (through(fusable, tensors, run) for run in (in_library(), by_formula))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-6, msg=name)


def test_kernel_with_an_infinite_logit(fusable):
    """There is no softmax of it, wherever it stands: nothing finite comes of it that the formula does not give."""
    drawn = fusable.draw({"batch": 2, "classes": 4}, seed=10, dtype=torch.float32)
    for name in fusable.inputs_of("logits"):
        for place in range(drawn[name].shape[-1]):
            tensors = dict(drawn, **{name: drawn[name].clone()})
            tensors[name].flatten(0, -2)[0, place] = float("inf")
            got, want = (through(fusable, tensors, run)["loss"] for run in (in_library(), by_formula))
            assert torch.isfinite(got) == torch.isfinite(want), f"{name} of class {place}: {got}, formula {want}"


def test_kernel_with_nothing_kept(fusable):
    if "sample_weight" not in fusable.optional:
        pytest.skip("every sample counts")
    tensors = fusable.draw(seed=4, dtype=torch.float32)
    tensors["sample_weight"] = torch.zeros_like(tensors["sample_weight"])
    got, want = (through(fusable, tensors, run) for run in (in_library(), by_formula))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-6, msg=name)


def test_upstream_gradient_reaches_the_kernel(fusable):
    tensors = fusable.draw(seed=5, dtype=torch.float32)
    got, want = through(fusable, tensors, in_library(), scale=-2.5), through(fusable, tensors, by_formula, scale=-2.5)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-5, atol=3e-6, msg=name)


def test_numbers_do_not_depend_on_the_number_of_threads(fusable):
    tensors = fusable.draw({"batch": 67, "classes": 3001, "tokens": 9, "channels": 130}, seed=6, dtype=torch.float32)
    one = through(fusable, tensors, in_library(threads=1))
    for threads in (2, 3, 8):
        for name, value in through(fusable, tensors, in_library(threads)).items():
            assert torch.equal(value, one[name]), f"{name} with {threads} threads"


@pytest.mark.slow
@pytest.mark.parametrize("target", kernels.simd_targets())
def test_every_simd_target_of_this_machine(target):
    kernels.use_simd(target)
    try:
        for subject in with_kernel():
            check(subject, subject.draw(lengths_of(subject)["some hundreds"], seed=7, dtype=torch.float32), "float32")
            check(subject, subject.draw(lengths_of(subject)["some hundreds"], seed=7, dtype=torch.bfloat16), "bfloat16")
    finally:
        kernels.use_simd(None)


def test_declarations_are_those_of_the_library():
    declared = {}
    for subject in with_kernel():
        tensors = subject.draw(dtype=torch.float32)
        seen = []
        through(subject, tensors, lambda call, weights: seen.append(call.kernel) or by_formula(call, weights))  # noqa: B023
        declared |= {kernel.name: kernel for kernel in seen}
    described = kernels.descriptions()
    assert declared.keys() == described.keys()
    for name, kernel in declared.items():
        entry = described[name]
        assert kernel.cuda == (CPP / name / f"{name}.cu").is_file(), name
        for ours, theirs in ((kernel.inputs, entry["inputs"]), (kernel.outputs, entry["outputs"])):
            assert [(n, a.axes.split(), a.role) for n, a in ours.items()] == [
                (argument["name"], argument["axes"], argument["role"]) for argument in theirs
            ]
        assert [(n, v) if isinstance(v, str) else (n, float(v)) for n, v in kernel.attributes.items()] == [
            (attribute["name"], attribute["default"]) for attribute in entry["attributes"]
        ]


# ---- Rows that hold no numbers ------------------------------------------------------------------

BAD = (math.nan, math.inf, -math.inf)


def with_settings_at_their_ends():
    """Every case of a loss with a kernel; and the first one of each with every other choice, and each number at 0 that may be."""
    found = [subject for subject in loss_subjects() if subject.loss.has_kernel()]
    for first in {subject.loss.name: subject for subject in reversed(found)}.values():
        cls, settings = type(first.loss), first.loss.settings()
        for name, setting in cls._settings.items():
            limits = setting.scalar or setting
            ends = setting.choices if setting.kind == "choice" and name != "reduction" else ()
            if setting.kind == "number" and limits.minimum == 0 and not getattr(limits, "exclusive", False):
                ends = (0.0,)
            for value in ends:
                if value != settings[name]:
                    made = as_composition(cls(**{**settings, name: value}))
                    found.append(Subject(f"{first.name}, {name}={value}", made, first.layouts, first.optional))
    return [subject for subject in found if subject.has_kernel]


def with_bad_rows(subject: Subject, where: str):
    """A batch; the same with every other row bad; and of each of these which input holds what, and where.

    ``where`` says what the other floating inputs of a bad row hold: what was drawn, zeros, or one class that has all.
    """
    specs = subject.specs
    inputs = [name for name, spec in specs.items() if spec.dtype == "float" and spec.draw not in ("weights", "mask")]
    sizes = {"tokens": 2, "classes": 4, "channels": 3, "features": 3, "height": 2, "width": 2, "top_k": 3}
    entries = {name: subject.draw({"batch": 1, **sizes})[name].numel() for name in inputs}
    bad = [(n, value, place) for n in inputs for value in BAD for place in (*range(entries[n]), slice(None))]
    good = subject.draw({"batch": 2 * len(bad), **sizes}, seed=11, dtype=torch.float32)
    for name in subject.inputs_of("weights", "mask"):
        good[name] = torch.ones_like(good[name])
    spoilt = {name: tensor.clone() for name, tensor in good.items()}
    for i, (name, value, place) in enumerate(bad):
        for other in set(inputs) - {name}:
            if where == "zeros":
                spoilt[other][2 * i] = 0.0
            elif where == "one class" and specs[other].draw == "logits":
                spoilt[other][2 * i][..., 1:] = float("-inf")
        spoilt[name][2 * i].view(-1)[place] = value
    return good, spoilt, bad


def of_each_sample(values):
    """Value and gradients of every sample, the latter as ``(samples, entries)``."""
    value = values["loss_per_sample"].detach().flatten()
    gradients = [g.detach().reshape(value.numel(), -1) for name, g in values.items() if name.startswith("grad_")]
    return value, torch.cat(gradients, dim=1)


def close(got, want, told):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda text: f"{told}: {text}")


def in_eager_mode(subject: Subject, tensors):
    graph = subject.graph(per_sample=True)
    leaves = {name: t.clone().requires_grad_(subject.specs[name].grad) for name, t in tensors.items()}
    students = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    values = graph(**leaves)
    gradients = torch.autograd.grad(values["loss"], list(students.values()))
    return {**values, **{f"grad_{name}": g for name, g in zip(students, gradients, strict=True)}}


def coupled(whether: bool):
    found = [subject for subject in with_settings_at_their_ends() if bool(subject.loss.couples_batch) is whether]
    return pytest.mark.parametrize("one", found, ids=str)


@coupled(False)
@pytest.mark.parametrize("where", ["drawn", "zeros", "one class"])
def test_rows_with_nan_or_infinity_by_kernel_and_formula(one, where):
    """Alike in value and gradient; NaN is never hidden, and nothing of a bad row reaches another one."""
    good, spoilt, bad = with_bad_rows(one, where)
    routes = {
        "kernel": lambda tensors: through(one, tensors, in_library(), per_sample=True),
        "body": lambda tensors: through(one, tensors, by_formula, per_sample=True),
        "eager": lambda tensors: in_eager_mode(one, tensors),
    }
    clean, clean_gradient = of_each_sample(in_eager_mode(one, good))
    found = {route: of_each_sample(run(spoilt)) for route, run in routes.items()}
    samples = len(clean) // (2 * len(bad))  # of a row
    kept = (torch.arange(len(clean)) // samples) % 2 == 1

    def named(which):
        return sorted({str(bad[i // samples // 2]) for i in which.nonzero().flatten().tolist()})

    want, want_gradient = found["eager"]
    for route, (value, gradient) in found.items():
        close(value[kept], clean[kept], f"{route}: other rows")
        close(gradient[kept], clean_gradient[kept], f"{route}: gradients of other rows")
        hidden = value.isnan() & ~gradient.isnan().any(dim=1)
        assert not hidden.any(), f"{route}: NaN without one in the gradient: {named(hidden)}"
        other = value.isfinite() != want.isfinite()
        assert not other.any(), f"{route}: not finite by it or by the formula, but not both: {named(other)}"
        finite, formula_finite = (g.isfinite().all(dim=1) for g in (gradient, want_gradient))
        other = finite != formula_finite
        assert not other.any(), f"{route}: gradients that are not finite by it or the formula: {named(other)}"
        close(value[value.isfinite()], want[value.isfinite()], route)
        finite &= value.isfinite()
        close(gradient[finite], want_gradient[finite], f"{route}: gradients")
    # A row that stays finite does not look at its NaN: a number in that place gives the same.
    unread = want.isfinite() & ~kept
    unread &= torch.tensor([math.isnan(bad[i // samples // 2][1]) for i in range(len(clean))])
    value, gradient = of_each_sample(
        in_eager_mode(one, {name: t.nan_to_num(0.25, math.inf, -math.inf) for name, t in spoilt.items()})
    )
    lost = unread & ((value - want).abs() > 1e-5)
    assert not lost.any(), f"NaN is lost: {named(lost)}"


@coupled(True)
def test_a_batch_with_nan_or_infinity_by_kernel_and_formula(one):
    """Of losses that compare samples with each other: no finite value, and NaN in the gradient."""
    drawn = one.draw(seed=12, dtype=torch.float32)
    for name in one.inputs_of("features", "unit"):
        for bad in BAD:
            tensors = {**drawn, name: drawn[name].clone()}
            tensors[name][1].view(-1)[0] = bad
            for route, run in (("kernel", in_library()), ("body", by_formula)):
                got = through(one, tensors, run)
                told = f"{route}: {bad} in {name}"
                assert not got["loss"].isfinite(), told
                assert any(g.isnan().any() for key, g in got.items() if key.startswith("grad_")), told


# ---- In torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [subject for subject in loss_subjects() if subject.loss.has_kernel()], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_functional_by_kernel_and_formula(one, reduction, dtype):
    loss_subject, loss = one, one.loss
    if loss.couples_batch and reduction != "mean":
        pytest.skip("no such form")
    function = getattr(pykd.functional, loss.name)
    settings = {name: value for name, value in loss.settings().items() if name != "reduction"}
    settings |= {} if loss.couples_batch else {"reduction": reduction}
    tensors = loss_subject.draw(seed=8, dtype=DTYPES[dtype])
    specs = loss_subject.graph().signature.inputs
    if not loss.covered_by_kernel(specs):
        with pytest.raises(RuntimeError, match="no kernel computes these settings and inputs; pass"):
            function(**tensors, **settings, kernels="on")
        return
    results = []
    for mode in ("off", "on"):
        given = {name: t.clone().requires_grad_(specs[name].grad) for name, t in tensors.items()}
        value = function(**given, **settings, kernels=mode)
        upstream = torch.linspace(-1, 2, value.numel()).reshape(value.shape)
        value.backward(upstream, retain_graph=True)
        once = {name: t.grad.clone() for name, t in given.items() if t.requires_grad}
        value.backward(upstream)
        for name, gradient in once.items():
            torch.testing.assert_close(given[name].grad, 2 * gradient)
        results.append((value.detach(), once))
    (plain, plain_gradients), (fast, fast_gradients) = results
    assert fast.dtype == plain.dtype
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=3e-6)
    rounding = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    for name, gradient in plain_gradients.items():
        assert fast_gradients[name].dtype == gradient.dtype
        limit = rounding * gradient.abs().max()
        assert (fast_gradients[name] - gradient).abs().max() <= limit


def test_composition_by_kernel_and_formula(fusable):
    tensors = fusable.draw(seed=9, dtype=torch.float32)
    specs = fusable.graph().signature.inputs
    results = []
    for mode in ("off", "on"):
        given = {name: t.clone().requires_grad_(specs[name].grad) for name, t in tensors.items()}
        if isinstance(fusable.composition, pykd.DistillationLoss):
            values = pykd.Composition.forward(fusable.composition, **given, kernels=mode)
        else:
            values = fusable.composition(**given, kernels=mode)
        (values["loss"] * 3).backward()
        results.append(values | {f"grad_{name}": t.grad for name, t in given.items() if t.requires_grad})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=2e-5, atol=5e-6, msg=name)


class WithoutKernel(pykd.SoftTarget):
    """A loss that is its formula alone."""

    fused = Loss.fused


def test_a_student_of_several_calls_gets_the_sum_of_their_gradients():
    """Two kernel calls, because the temperatures differ, and a plain term beside them, on one tensor."""
    composition = pykd.compose(
        {
            "warm": (pykd.SoftTarget(temperature=2.0), 1.0),
            "hot": (pykd.SoftTarget(temperature=5.0, form="kl"), 0.5),
            "plain": (WithoutKernel(form="reverse_kl"), 0.25),
        }
    )
    teacher, gradients = torch.randn(5, 7), []
    student = torch.randn(5, 7)
    for mode in ("off", "on"):
        leaf = student.clone().requires_grad_()
        composition(student_logits=leaf, teacher_logits=teacher, kernels=mode)["loss"].backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_what_on_refuses():
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    with pytest.raises((TypeError, ValueError, RuntimeError), match="float64"):
        pykd.functional.soft_target(student.double(), teacher.double(), kernels="on")
    with pytest.raises(RuntimeError, match="trace takes the formula"):
        torch.jit.trace(lambda s, t: pykd.functional.soft_target(s, t, kernels="on"), (student, teacher))
    with pytest.raises(ValueError, match='student_logits.*"classes"|teacher_logits.*"classes"'):
        pykd.functional.soft_target(student, teacher[:, :2], kernels="on")
    with torch.no_grad():
        assert not pykd.functional.soft_target(student, teacher, kernels="on").requires_grad


def test_a_learned_temperature_is_refused_and_not_left_without_a_gradient():
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    learned = torch.tensor(2.0, requires_grad=True)
    composed = pykd.compose({"soft": pykd.SoftTarget()})
    calls = {
        "temperature": [
            lambda **given: pykd.functional.soft_target(student, teacher, temperature=learned, **given),
            lambda **given: pykd.functional.soft_target(
                student, teacher, temperature=learned, reduction="none", **given
            ).sum(),
        ],
        "soft_temperature": [
            lambda **given: composed(student_logits=student, teacher_logits=teacher, soft_temperature=learned, **given)[
                "loss"
            ]
        ],
    }
    for name, forms in calls.items():
        for call in forms:
            assert torch.autograd.grad(call(), learned)[0] != 0
            with pytest.raises(RuntimeError, match=f"{name} requires a gradient, .*; pass kernels"):
                call(kernels="on")
            with torch.no_grad():
                call(kernels="on")


def test_no_part_of_a_sum_is_lost_when_it_is_reduced():
    values = Linear([(Reduced(0, Value("soft", torch.add, (), "weight", [3]), [], torch.device("cpu")), 1.0)])
    for together in (values + torch.ones(3), values + values):
        for function in (lambda x: ops.reduce(x, None, "mean"), ops.at_least_0):
            with pytest.raises(TypeError, match="got a sum; reduce each part by itself"):
                function(together)


# ---- Files --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_and_formulas_of_one_file_agree(fusable, dtype, exported):
    """The same file with and without the kernels, in calls with changing shapes."""
    folder = str(exported(fusable, dtype))
    with_kernels = pykd.load(folder, engine="onnxruntime", kernels="on")
    portable = pykd.load(folder, engine="onnxruntime", kernels="off")
    assert with_kernels.kernels_in_use and not portable.kernels_in_use
    per_sample = any(not term.couples_batch for term in fusable.composition.named_terms)
    lengths = lengths_of(fusable)
    for seed, sizes in enumerate((*SIZES, SIZES[0])):
        tensors = fusable.draw(lengths[sizes], seed=seed, dtype=DTYPES[dtype])
        want = truth(fusable.composition, fusable.graph(per_sample), tensors, {}, per_sample)
        fast, plain = (distances(loss.value_and_gradient(**tensors), want) for loss in (with_kernels, portable))
        for got, other, margin in zip(fast, plain, tolerances.KERNEL[dtype], strict=True):
            assert got <= other + margin, f"kernels {fast}, portable {plain} at {sizes}"


def test_threads_share_one_composition():
    """Each thread gets the numbers that it would get alone, whatever walks the others are on."""
    loss = pykd.compose({"hard": (pykd.HardTarget(), 1.0), "soft": (pykd.SoftTarget(temperature=2.0), 0.5)})
    shapes = [(2 + index, 3 + 2 * index) for index in range(8)]

    def call(index):
        rows, classes = shapes[index]
        generator = torch.Generator().manual_seed(index)
        student, teacher = torch.randn(2, rows, classes, generator=generator)
        student.requires_grad_()
        labels = torch.randint(classes, (rows,), generator=generator)
        values = loss(student_logits=student, teacher_logits=teacher, labels=labels, kernels="on")
        values["loss"].backward()
        return values["loss"].item(), values["soft"].item(), student.grad.tolist()

    alone = [call(index) for index in range(len(shapes))]
    with ThreadPoolExecutor(len(shapes)) as pool:
        for _ in range(30):
            assert list(pool.map(call, range(len(shapes)))) == alone
