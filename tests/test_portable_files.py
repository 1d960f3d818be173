"""The ONNX files in other hands: standard operators alone, other runtimes, and the three forms of parameters."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import pykd
from pykd import HardTarget, SoftTarget, compose
from pykd.command_line import main
from pykd.export import metadata, onnx_files, tracing, verify
from pykd.export.verification import LIMITS, _onnx_reference, _onnxruntime, errors, truth
from tests.conftest import loss_subjects
from tests.test_axes_in_files import models

FORMS = ("overridable", "fixed", "inputs")
SIZES = ({}, {"batch": 1, "classes": 1, "tokens": 1, "channels": 1}, {"batch": 7, "classes": 3, "channels": 5})


def write(subject, folder, kernels, parameters="overridable", dtype="float32"):
    """The two files of a subject, by kind, without the checks of an export."""
    composition, given = subject.composition, (subject.layouts, subject.optional)
    plain = composition.graph(*given, check=False)
    fused = composition.graph(*given, check=False, fused=True)
    models = onnx_files.build(composition, plain, fused, dtype, kernels, parameters)
    data = {}
    for kind, model in models.items():
        described = metadata.of_graph(composition, plain, kind, dtype, tracing.OPSET, parameters)
        onnx_files.write(model, described, folder / f"{kind}.onnx")
        data[kind] = (folder / f"{kind}.onnx").read_bytes()
    return data


def ops(data):
    model = onnx.load_from_string(data)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    return {(node.domain, node.op_type) for node in nodes}


# In a process of its own: some files with functions end OpenVINO's reader in a segmentation fault.
OPENVINO = """
import sys
import numpy as np
import openvino

model, given, results = sys.argv[1:]
compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
calls = {}
for name, array in np.load(given).items():
    call, _, tensor = name.partition(".")
    calls.setdefault(call, {})[tensor] = array
found = {}
for call, feeds in calls.items():
    for item in compiled.inputs:
        feeds.setdefault(item.get_any_name(), np.array(1.0, np.float32))  # grad_scale
    got = compiled(feeds)
    for output in compiled.outputs:
        found |= {f"{call}.{name}": got[output] for name in output.get_names()}  # that of a step left out is another
np.savez(results, **found)
"""


def openvino(data, calls):
    """What each of these calls returns, all in one process."""
    with tempfile.TemporaryDirectory() as folder:
        model, given, results = (Path(folder) / name for name in ("loss.onnx", "given.npz", "results.npz"))
        model.write_bytes(data)
        np.savez(given, **{f"{i}.{name}": t.numpy() for i, call in enumerate(calls) for name, t in call.items()})
        ran = subprocess.run(
            [sys.executable, "-c", OPENVINO, model, given, results], capture_output=True, text=True, check=False
        )
        if ran.returncode != 0:
            raise RuntimeError(f"OpenVINO ended with {ran.returncode}: {ran.stderr}")
        found = [{} for _ in calls]
        for name, value in np.load(results).items():
            call, _, tensor = name.partition(".")
            found[int(call)][tensor] = torch.from_numpy(np.array(value))
        return found


def one_by_one(open_file):
    """The same of a runtime that needs no process of its own."""

    def run_all(data, calls):
        run = open_file(data)
        return [run(inputs, {}) for inputs in calls]

    return run_all


def first_cases():
    """The first case of every registered loss; as it is in files with kernels, where it has one."""
    found = {}
    for subject in loss_subjects():
        found.setdefault(subject.loss.name, subject)
    for subject in found.values():
        for kernels in ("off", "auto") if subject.has_kernel else ("off",):
            yield pytest.param(subject, kernels, id=f"{subject}-{kernels}")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kernels"), first_cases())
def test_other_runtimes_agree_with_float64(case, kernels, exported):
    written = models(case, kernels, exported)
    graph = case.graph()
    least = case.composition.least_lengths
    every = [{axis: max(length, least.get(axis, 1)) for axis, length in sizes.items()} for sizes in SIZES]
    calls = [case.draw(sizes, seed=number, dtype=torch.float32) for number, sizes in enumerate(every)]
    truths = [truth(case.composition, graph, inputs, {}, False) for inputs in calls]
    runs = {"onnxruntime": one_by_one(_onnxruntime), "onnx.reference": one_by_one(_onnx_reference)}
    if importlib.util.find_spec("openvino") is not None:
        runs["openvino"] = openvino
    for kind, data in written.items():
        found = ops(data)
        assert ("", "LogSoftmax") not in found, "some runtimes compute it as the logarithm of a softmax"
        if kernels == "off":
            assert {domain for domain, _ in found} == {""}
            model = onnx.load_from_string(data)
            assert [entry.domain for entry in model.opset_import] == [""] and not model.functions
        for runtime, run_all in runs.items():
            if runtime == "openvino" and any(domain == "pykd" for domain, _ in found):
                # It does not read functions inside a file, or dies of them: docs/artefacts.md.
                with pytest.raises(RuntimeError, match="OpenVINO ended with"):
                    run_all(data, calls[:1])
                continue
            for sizes, got, want in zip(every, run_all(data, calls), truths, strict=True):
                wanted = {n: v for n, v in want.items() if kind == "gradient" or not n.startswith("grad_")}
                value, gradient = errors(got, wanted)
                limits = LIMITS["float32"]
                assert value <= limits[0] and gradient <= limits[1], f"{runtime} {kind} {sizes}: {value} {gradient}"


def test_saturated_logits_are_finite_in_every_runtime(tmp_path):
    """A softmax that underflows: its logarithm would be −∞, and 0 · −∞ NaN."""
    subject = next(s for s in loss_subjects() if s.name.startswith("soft_target[temperature=4.0,form=kl"))
    logits = torch.tensor([[0.0, 900.0, -900.0], [500.0, 0.0, 0.0]])
    inputs = {"student_logits": logits, "teacher_logits": logits.flip(1)}
    want = truth(subject.composition, subject.graph(), inputs, {}, False)
    for kernels in ("off", "auto"):
        for kind, data in write(subject, tmp_path, kernels).items():
            wanted = {name: v for name, v in want.items() if kind == "gradient" or not name.startswith("grad_")}
            value, gradient = errors(_onnx_reference(data)(inputs, {}), wanted)
            assert value < 1e-5 * want["loss"] and gradient < 1e-5


@pytest.fixture(scope="module")
def loss():
    return compose({"hard": HardTarget(), "soft": (SoftTarget(temperature=2.0), 0.5)})


@pytest.fixture(scope="module", params=FORMS)
def exported_as(request, loss, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "recipe"
    off = "off" if request.param == "fixed" else "auto"
    pykd.export(
        loss, folder, layouts={"labels": "batch"}, kernels=off, parameters=request.param, progress=lambda line: None
    )
    return folder, request.param


CALL = {
    "student_logits": np.array([[1, 2, 3], [3, 2, 1]], np.float32),
    "labels": np.array([2, 0]),
    "teacher_logits": np.array([[0, 2, 4], [4, 2, 0]], np.float32),
}


def test_every_engine_knows_the_three_forms(exported_as, loss):
    folder, form = exported_as
    report = verify(folder, trust=True)
    assert report.ok, str(report)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.get("parameters_as", "overridable") == form
    assert manifest["format_version"] == (1 if form == "overridable" else 2)
    tensors = {name: torch.from_numpy(array) for name, array in CALL.items()}
    for engine in ("onnxruntime", "torchscript"):
        for path in (folder, folder / ("loss.grad.onnx" if engine == "onnxruntime" else "loss.pt")):
            loaded = pykd.load(path, engine=engine)
            plain = loaded.value_and_gradient(**CALL)
            np.testing.assert_allclose(plain["loss"], loss(**tensors)["loss"], rtol=1e-6)
            np.testing.assert_allclose(loaded.value(**CALL)["loss"], plain["loss"], rtol=1e-6)
            names = [info.name for info in loaded.signature.parameters]
            if form == "fixed":
                assert names == []
                for given in (4.0, np.float32(4.0), 4):
                    with pytest.raises(ValueError, match='soft_temperature, which is fixed at 2.*parameters="fixed"'):
                        loaded.value(**CALL, soft_temperature=given)
                with pytest.raises(ValueError, match="grad_scale, which is fixed at 1"):
                    loaded.value_and_gradient(**CALL, grad_scale=8.0)
                continue
            assert names == ["hard_weight", "soft_weight", "soft_temperature", "grad_scale"]
            moved = loaded.value_and_gradient(**CALL, soft_temperature=4.0, grad_scale=8.0)
            np.testing.assert_allclose(moved["loss"], loss(**tensors, soft_temperature=4.0)["loss"], rtol=1e-6)
            once = loaded.value_and_gradient(**CALL, soft_temperature=4.0)["grad_student_logits"]
            np.testing.assert_allclose(moved["grad_student_logits"], 8.0 * once, rtol=1e-6)
            with pytest.raises(ValueError, match="soft_temperature"):
                loaded.value(**CALL, soft_temperature=0.0)


def test_a_plain_session_takes_each_form_as_the_docs_say(exported_as, loss):
    import onnxruntime

    folder, form = exported_as
    tensors = {name: torch.from_numpy(array) for name, array in CALL.items()}
    for name in ("loss.onnx", "loss.grad.onnx"):
        numbers = ["hard_weight", "soft_weight", "soft_temperature"] + ["grad_scale"] * (name == "loss.grad.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(folder / name, options)
        required = [item.name for item in session.get_inputs()]
        optional = [item.name for item in session.get_overridable_initializers()]
        assert required == [*CALL, *(numbers if form == "inputs" else [])]
        assert optional == (numbers if form == "overridable" else [])
        if form != "fixed":
            values = dict.fromkeys(numbers, np.float32(1.0)) | {"soft_temperature": np.float32(4.0)}
            got = session.run(["loss"], CALL | {n: np.array(v) for n, v in values.items()})[0]
            want = loss(**tensors, soft_weight=1.0, soft_temperature=4.0)["loss"]
            np.testing.assert_allclose(got, want, rtol=1e-6)


def test_who_prints_warnings(exported_as):
    folder, form = exported_as
    for level in (None, 3):
        code = (
            "import sys, onnxruntime as o; s = o.SessionOptions();"
            f"{'' if level is None else f's.log_severity_level = {level};'} o.InferenceSession(sys.argv[1], s)"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code, str(folder / "loss.grad.onnx")], capture_output=True, text=True, check=True
        )
        warned = "appears in graph inputs" in ran.stderr
        assert warned == (form == "overridable" and level is None), ran.stderr


def test_off_has_no_kernel_and_on_needs_one(exported_as, tmp_path):
    folder, form = exported_as
    kernels = pykd.load(folder, engine="onnxruntime").kernels_in_use
    if form != "fixed":
        assert "soft_target_float32" in kernels
        return
    assert kernels == ()
    with pytest.raises(RuntimeError, match='a node that a kernel computes .*kernels="off"'):
        pykd.load(folder, engine="onnxruntime", kernels="on")
    with pytest.raises(ValueError, match="expected a loss with a kernel for float64, as kernels='on' asks for"):
        pykd.export(SoftTarget(), tmp_path / "new", kernels="on", dtype="float64", progress=lambda line: None)
    assert not (tmp_path / "new").exists() and not list(tmp_path.iterdir())


def test_wrong_forms(tmp_path, capsys):
    with pytest.raises(ValueError, match="expected kernels to be one of auto, on, off, got 'no'"):
        pykd.export(SoftTarget(), tmp_path, kernels="no")
    with pytest.raises(ValueError, match="expected parameters to be one of overridable, fixed, inputs, got 'const'"):
        pykd.export(SoftTarget(), tmp_path, parameters="const")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('loss = "soft_target"\n[export]\nkernels = "never"\n')
    assert main(["export", "--recipe", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "expected kernels to be one of auto, on, off" in capsys.readouterr().err
    assert main(["export", "--recipe", str(recipe), "--kernels", "off", "--parameters", "x", "--out", "o"]) == 2
    assert "expected parameters to be one of" in capsys.readouterr().err
