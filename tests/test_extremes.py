"""Settings at the ends of their ranges: the formula keeps its digits, valid losses export, wrong files are refused."""

import functools
import json

import numpy as np
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import pykd
from pykd.composition import as_composition
from pykd.export import tracing, verification
from pykd.export.verification import LIMITS, Row, errors, room, truth, verify

FORMS = ("cross_entropy", "kl", "reverse_kl", "symmetric_kl", "jsd")
TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 4.0, 10.0, 20.0, 100.0, 1000.0)
SIZES = ((1, 1), (5, 13), (1, 7), (3, 2), (33, 101))


def limits(temperature, dtype="float32"):
    """What a gradient of T · (q − p), and a value of T² · Σ p (log p − log q), may be off.

    q − p is about 1 / T of the probabilities: beyond T = 100 their rounding in float32 (6e-8 · T) is what is seen of it.
    """
    return tuple(limit * max(1.0, temperature / 100) for limit in LIMITS[dtype])


def drawn(seed, size):
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(size, generator=generator) for _ in range(2))


@functools.cache
def scripted(form, soften_student, beta):
    """One for all temperatures, as a file has it."""
    return torch.jit.script(pykd.SoftTarget(soften_student=soften_student, form=form, beta=beta, tau_squared=True))


def found(loss, dtype, seed, size, temperature):
    """Value and gradient in ``dtype``, at numbers that are exact in float32."""
    student, teacher = drawn(seed, size)
    leaf = student.to(dtype).requires_grad_()
    value = loss(leaf, teacher.to(dtype), temperature=temperature)
    value.backward()
    return {"loss": value.detach(), "grad_student_logits": leaf.grad}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("soften_student", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_formula_keeps_its_digits_at_every_temperature(form, soften_student, temperature):
    for beta in (0.5, 1e-3) if form == "jsd" else (0.5,):
        settings = {"soften_student": soften_student, "form": form, "beta": beta, "tau_squared": True}
        loss = pykd.SoftTarget(temperature, **settings, kernels="off")
        for seed, size in enumerate(SIZES):
            want = found(loss, torch.float64, seed, size, temperature)
            student, teacher = drawn(seed, size)
            want["loss"] = loss.reference(student.double().numpy(), teacher.double().numpy())
            for each in (loss, scripted(form, soften_student, beta)):
                value, gradient = errors(found(each, torch.float32, seed, size, temperature), want)
                most = limits(temperature)
                assert value <= most[0] and gradient <= most[1], f"{size}: {value}, {gradient}"


@pytest.fixture(params=pykd.kernels.simd_targets())
def simd(request):
    pykd.kernels.use_simd(request.param)
    yield
    pykd.kernels.use_simd(None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [4.0, 8.5, 20.0, 100.0, 1000.0])
@pytest.mark.usefixtures("simd")
def test_the_kernel_keeps_its_digits_at_high_temperatures(form, temperature):
    for beta in (0.5, 1e-3) if form == "jsd" else (0.5,):
        loss = pykd.SoftTarget(temperature, form=form, beta=beta, tau_squared=True)
        for seed, size in enumerate((*SIZES, (2, 2500))):
            want = found(loss, torch.float64, seed, size, temperature)
            student, teacher = drawn(seed, size)
            soft, gradient = torch.empty(size[0]), torch.empty(size)
            inputs = {"student": student, "teacher": teacher, "temperature": temperature}
            inputs["soft_weight"] = torch.full((size[0],), temperature**2 / size[0])
            pykd.kernels.run(
                "soft_target", inputs, {"form": form, "beta": beta}, {"soft": soft, "grad_student": gradient}
            )
            got = {"loss": soft.double().mean() * temperature**2, "grad_student_logits": gradient}
            value_error, gradient_error = errors(got, want)
            most = limits(temperature)
            assert value_error <= most[0] and gradient_error <= most[1], f"{size}: {value_error}, {gradient_error}"


EXPORTED = [
    pykd.SoftTarget(temperature=0.05, form="reverse_kl"),
    pykd.SoftTarget(temperature=0.01, form="reverse_kl"),
    pykd.SoftTarget(temperature=0.01, form="symmetric_kl", tau_squared=True),
    pykd.SoftTarget(temperature=100.0, form="kl", tau_squared=True),
    pykd.SoftTarget(temperature=100.0, form="jsd", beta=1e-3, tau_squared=True),
    pykd.SoftTarget(temperature=100.0, form="jsd", tau_squared=True),
    pykd.DistributionDistillation(width=0.001, bins=101, negatives="all"),
    pykd.DistributionDistillation(width=50.0, bins=2),
]


@pytest.mark.parametrize("loss", EXPORTED, ids=str)
def test_a_valid_loss_exports_at_extreme_settings(loss, tmp_path):
    pykd.export(loss, tmp_path / "loss", progress=lambda line: None)  # which verifies


@pytest.mark.parametrize(("form", "dtype"), [("jsd", "float32"), ("jsd", "float16"), ("kl", "float32")])
def test_files_of_a_divergence_that_is_almost_0_agree_at_every_size(form, dtype, tmp_path):
    folder = tmp_path / "loss"
    loss = pykd.SoftTarget(100.0, form=form, tau_squared=True)
    pykd.export(loss, folder, dtype=dtype, progress=lambda line: None)
    report = verify(folder, trust=True)
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_onnx_keeps_the_digits_of_log1p_and_expm1(dtype):
    """ONNX has neither; log(1 + x) and exp(x) − 1 would lose those of a small x."""
    small, ends = (
        torch.logspace(-12, -0.001, 500, dtype=torch.float64),
        torch.tensor([0.0, 1e-30, torch.inf, torch.nan]),
    )
    x = torch.cat([small, -small, ends, 90 * small]).to(getattr(torch, dtype))
    model = tracing.to_onnx(lambda x, y: (torch.log1p(x), torch.expm1(y)), {"x": x, "y": -x}, ["log1p", "expm1"])
    given, wide = {"x": x.numpy(), "y": -x.numpy()}, x.numpy().astype(np.longdouble)
    want = {"log1p": np.log1p(wide), "expm1": np.expm1(-wide)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for got in (session.run(None, given), ReferenceEvaluator(model).run(None, given)):
        for each, exact in zip(got, want.values(), strict=True):
            np.testing.assert_allclose(each, exact.astype(dtype), rtol=10 * torch.finfo(x.dtype).eps, atol=0)


EXTREMES = (0.01, 0.05, 0.3, 10.0, 100.0)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("soften_student", [True, False])
def test_every_form_exports_and_its_files_are_right_at_every_temperature(form, soften_student, tmp_path):
    """A temperature is an input of the files: each pair is exported at one of them, in every dtype, and called at all."""
    default = EXTREMES[(FORMS.index(form) + 2 * soften_student) % len(EXTREMES)]
    loss = pykd.SoftTarget(temperature=default, form=form, soften_student=soften_student, tau_squared=True)
    composition = as_composition(loss)  # one, so that its dtypes share what they can
    graph = composition.graph(check=False)
    (parameter,) = graph.signature.parameters
    for dtype in LIMITS:
        folder = tmp_path / dtype
        pykd.export(composition, folder, dtype=dtype, progress=lambda line: None)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        runs = {
            "onnxruntime": verification._both_files(files, verification._onnxruntime),
            "torch.jit": verification._torch_jit(files["loss.pt"], ["student_logits"]),
        }
        for seed, (batch, classes) in enumerate(SIZES[:3]):  # those of an export's own check
            sizes = {"batch": batch, "classes": classes}
            inputs = composition.draw(graph.signature.inputs, sizes, seed, getattr(torch, dtype))
            for temperature in EXTREMES:
                numbers = {parameter: temperature}
                want = truth(composition, graph, inputs, numbers, False)
                rounding = room(graph, inputs, numbers, want, dtype)
                for engine, run in runs.items():
                    row = Row(engine, "cpu", dtype, str(sizes), *errors(run(inputs, numbers), want), *rounding)
                    assert row.ok, f"{temperature}: {row}"


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"temperature": 0.05, "form": "reverse_kl"}, {"form": "symmetric_kl"}),
        ({"temperature": 0.05, "form": "reverse_kl"}, {"soften_student": False}),
        ({"temperature": 0.01, "form": "jsd", "beta": 0.5}, {"beta": 0.52}),
        ({"temperature": 100.0, "form": "kl", "tau_squared": True}, {"form": "jsd"}),
        ({"temperature": 100.0, "form": "kl", "tau_squared": True}, {"tau_squared": False}),
    ],
)
def test_a_wrong_file_is_refused_at_extreme_settings(settings, wrong, tmp_path):
    """The files of one setting under the recipe of another."""
    folder = tmp_path / "loss"
    pykd.export(pykd.SoftTarget(**settings), folder, progress=lambda line: None)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["recipe"]["settings"].update(wrong)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = verify(folder, engines=("python",), quick=True)
    assert not report.ok, str(report)


def test_room_is_small_where_numbers_are_well_conditioned_and_bounded_where_not():
    for temperature, least, most in ((2.0, 0.0, 2e-5), (0.01, 1e-6, 1e-2)):
        composition = pykd.compose({"soft": (pykd.SoftTarget(temperature=temperature, form="reverse_kl"), 1.0)})
        graph = composition.graph(check=False)
        inputs = composition.draw(graph.signature.inputs, {"batch": 33, "classes": 101}, 4, torch.float32)
        want = truth(composition, graph, inputs, {}, False)
        value, gradient = room(graph, inputs, {}, want, "float32")
        assert 0 < value <= 1e-5 and least <= gradient <= most
    broken = {name: torch.full_like(torch.as_tensor(array), torch.inf) for name, array in want.items()}
    assert room(graph, inputs, {}, broken, "float32") == (0.0, 0.0)
