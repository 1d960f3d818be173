"""Settings at the ends of their ranges: the formula keeps its digits, valid losses export, wrong files are refused."""

import json

import pytest
import torch

import pykd
from pykd.composition import as_composition
from pykd.export import verification
from pykd.export.verification import LIMITS, Row, errors, room, truth, verify

FORMS = ("cross_entropy", "kl", "reverse_kl", "symmetric_kl", "jsd")
TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 10.0, 100.0)
SIZES = ((1, 1), (5, 13), (1, 7), (33, 101))


def found(loss, dtype, seed, size):
    """Value and gradient in ``dtype``, at numbers that are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(size, generator=generator) for _ in range(2))
    leaf = student.to(dtype).requires_grad_()
    value = loss(leaf, teacher.to(dtype))
    value.backward()
    return {"loss": value.detach(), "grad_student_logits": leaf.grad}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("soften_student", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_formula_keeps_its_digits_at_every_temperature(form, soften_student, temperature):
    loss = pykd.SoftTarget(temperature=temperature, form=form, soften_student=soften_student)
    for seed, size in enumerate(SIZES):
        value, gradient = errors(found(loss, torch.float32, seed, size), found(loss, torch.float64, seed, size))
        assert value <= LIMITS["float32"][0] and gradient <= LIMITS["float32"][1], f"{size}: {value}, {gradient}"


EXPORTED = [
    pykd.SoftTarget(temperature=0.05, form="reverse_kl"),
    pykd.SoftTarget(temperature=0.01, form="reverse_kl"),
    pykd.SoftTarget(temperature=0.01, form="symmetric_kl", tau_squared=True),
    pykd.SoftTarget(temperature=100.0, form="kl", tau_squared=True),
    pykd.SoftTarget(temperature=100.0, form="jsd", beta=1e-3, tau_squared=True),
    pykd.DistributionDistillation(width=0.001, bins=101, negatives="all"),
    pykd.DistributionDistillation(width=50.0, bins=2),
]


@pytest.mark.parametrize("loss", EXPORTED, ids=str)
def test_a_valid_loss_exports_at_extreme_settings(loss, tmp_path):
    pykd.export(loss, tmp_path / "loss", progress=lambda line: None)  # which verifies


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
                if (form, soften_student, temperature) == ("jsd", True, 100.0):
                    continue  # the test below
                numbers = {parameter: temperature}
                want = truth(composition, graph, inputs, numbers, False)
                rounding = room(graph, inputs, numbers, want, dtype)
                for engine, run in runs.items():
                    row = Row(engine, "cpu", dtype, str(sizes), *errors(run(inputs, numbers), want), *rounding)
                    assert row.ok, f"{temperature}: {row}"


@pytest.mark.xfail(
    reason="a divergence of 1e-5 times T² = 10⁴: the rounding of the log-softmax is 2e-4 of it, and room() finds half of that"
)
def test_the_divergence_of_two_that_are_almost_equal_exports_in_float16(tmp_path):
    loss = pykd.SoftTarget(temperature=100.0, form="jsd", tau_squared=True)
    pykd.export(loss, tmp_path / "loss", dtype="float16", progress=lambda line: None)


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
