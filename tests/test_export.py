"""What export() writes: files, metadata, checksums, manifest; and what verify() notices."""

import hashlib
import json

import numpy as np
import onnx
import pytest
import torch

import pykd
from pykd import MKMMD, HardTarget, SoftTarget, compose, integrity
from pykd.command_line import main
from pykd.export.verification import verify

RECIPE = """
[terms.hard]
loss = "hard_target"

[terms.soft]
loss = "soft_target"
weight = 0.5
settings = {temperature = 2.0}

[export]
layouts = {labels = "batch"}
per_sample = true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    lines = []
    loss = compose(
        {"hard": HardTarget(), "soft": (SoftTarget(temperature=2.0), 0.5), "aux": (MKMMD(spatial_avg="mean"), 0.25)}
    )
    target = pykd.export(
        loss,
        tmp_path_factory.mktemp("out") / "new",
        layouts={"labels": "batch"},
        per_sample=True,
        progress=lines.append,
    )
    assert [line.split(":")[1].split("(")[0].strip() for line in lines] == [
        "wrote loss.onnx and loss.grad.onnx",
        "wrote loss.pt",
        "verified against float64 at 3 sizes",
    ]
    return target


def test_files_and_manifest(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["loss.grad.onnx", "loss.onnx", "loss.pt", "manifest.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, described in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert described == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        integrity.check(data, name)
    assert manifest["format"] == "pykd" and manifest["format_version"] == 1


def metadata_of(folder):
    found = {}
    for name in ("loss.onnx", "loss.grad.onnx"):
        model = onnx.load(folder / name)
        found[name] = json.loads(next(p.value for p in model.metadata_props if p.key == "pykd"))
    extra = {"pykd.json": ""}
    torch.jit.load(str(folder / "loss.pt"), _extra_files=extra)
    found["loss.pt"] = json.loads(extra["pykd.json"])
    return found


def test_metadata_in_every_file(folder):
    found = metadata_of(folder)
    assert {name: m["kind"] for name, m in found.items()} == {
        "loss.onnx": "value", "loss.grad.onnx": "gradient", "loss.pt": "torchscript",
    }  # fmt: skip
    names = ["student_logits", "labels", "teacher_logits", "student_features", "teacher_features"]
    for metadata in found.values():
        assert [entry["name"] for entry in metadata["inputs"]] == names
        labels = metadata["inputs"][1]
        assert labels == {
            "name": "labels", "axes": ["batch"], "dtype": "int64", "gradient": False,
            "index_of": "classes", "ignore_index": -100,
        }  # fmt: skip
        parameters = {entry["name"]: entry for entry in metadata["parameters"]}
        assert parameters["soft_temperature"] == {
            "name": "soft_temperature", "default": 2.0, "minimum": 0.0, "minimum_exclusive": True,
        }  # fmt: skip
        assert parameters["soft_weight"]["default"] == 0.5
        by_term = {term["name"]: term for term in metadata["terms"]}
        assert by_term["soft"]["per_sample"] and not by_term["aux"]["per_sample"]
        assert by_term["aux"]["couples_batch"] == "compares every sample of the batch with every other"
        outputs = [entry["name"] for entry in metadata["outputs"]]
        assert outputs[:7] == [
            "loss", "hard", "soft", "aux", "loss_per_sample", "hard_per_sample", "soft_per_sample",
        ]  # fmt: skip
        gradients = [entry.get("gradient_of") for entry in metadata["outputs"][7:]]
        assert gradients == ([] if metadata["kind"] == "value" else ["student_logits", "student_features"])
        assert set(metadata["versions"]) == {"pykd", "python", "torch", "onnx", "onnxscript"}


def test_onnx_files_hold_standard_operators_and_kernels_with_their_formula(folder):
    for name in ("loss.onnx", "loss.grad.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        onnx.checker.check_model(model, full_check=True)
        assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 18), ("pykd", 1)}
        kernels = {node.op_type for node in model.graph.node if node.domain == "pykd"}
        assert kernels == {"soft_target_float32", "mk_mmd_float32"}
        assert {function.name for function in model.functions} == kernels
        assert all(function.domain == "pykd" for function in model.functions)
        assert all(node.domain == "" for function in model.functions for node in function.node)
        metadata = json.loads(next(p.value for p in model.metadata_props if p.key == "pykd"))
        described = {entry["name"]: entry["axes"] for entry in metadata["inputs"]}
        described |= {entry["name"]: [] for entry in metadata["parameters"]}
        got = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
        assert got == described
        defaults = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
        for entry in metadata["parameters"]:
            assert defaults[entry["name"]] == np.float32(entry["default"])
        text = model.SerializeToString()
        assert b"site-packages" not in text and b".py" not in text, "the exporting machine shows"
        for tensor in model.graph.initializer:
            assert tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data


def test_a_small_call_has_few_operators_around_its_kernel(tmp_path):
    """Each of them takes half a microsecond, where the kernel of a small batch takes two."""
    loss = compose({"hard": HardTarget(), "soft": (SoftTarget(temperature=2.0), 0.5)})
    target = pykd.export(loss, tmp_path / "new", layouts={"labels": "batch"}, progress=lambda line: None)
    nodes = onnx.load(target / "loss.grad.onnx").graph.node
    assert sum(node.domain == "pykd" for node in nodes) == 1
    assert len(nodes) <= 29  # two of them keep the soft term from falling below 0


def test_files_are_the_same_when_exported_again(tmp_path):
    folders = [pykd.export(SoftTarget(), tmp_path / name, progress=lambda line: None) for name in ("a", "b")]
    for name in ("loss.onnx", "loss.grad.onnx"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_the_reference_evaluator_agrees_too(folder):
    """A third implementation of ONNX, where onnxruntime is not installed."""
    from pykd.export.verification import _both_files, _onnx_reference, errors, truth

    loss = compose(
        {"hard": HardTarget(), "soft": (SoftTarget(temperature=2.0), 0.5), "aux": (MKMMD(spatial_avg="mean"), 0.25)}
    )
    graph = loss.graph({"labels": "batch"}, per_sample=True, check=False)
    tensors = loss.draw(graph.signature.inputs)
    want = truth(loss, graph, tensors, {}, True)
    contents = {path.name: path.read_bytes() for path in folder.glob("*.onnx")}
    value_error, gradient_error = errors(_both_files(contents, _onnx_reference)(tensors, {}), want)
    assert value_error < 1e-5 and gradient_error < 1e-4


@pytest.mark.parametrize("name", ["loss.pt", "loss.onnx", "loss.grad.onnx"])
def test_a_damaged_file_is_noticed(folder, name, tmp_path):
    data = (folder / name).read_bytes()
    for position in (0, 30, len(data) // 2, len(data) - 30, len(data) - 1):
        damaged = data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]
        with pytest.raises(ValueError, match=f"expected {name} to"):
            integrity.check(damaged, name)
    for length in (0, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=f"expected {name} to"):
            integrity.check(data[:length], name)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"expected {name} to be the file of the manifest"):
        verify(tmp_path)


def test_verify_notices_a_wrong_formula(folder, tmp_path):
    """The files of one temperature under the recipe of another."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["recipe"]["terms"]["soft"]["settings"]["tau_squared"] = True
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    report = verify(tmp_path, engines=("python",), quick=True)
    assert not report.ok and "DISAGREES" in str(report)
    assert main(["verify", str(tmp_path)]) == 1


def test_export_keeps_the_old_files_where_it_fails(tmp_path, monkeypatch):
    pykd.export(SoftTarget(), tmp_path, progress=lambda line: None)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(SoftTarget, "reference", staticmethod(lambda **inputs: np.float64(0.0)))
    with pytest.raises(RuntimeError, match="expected the written files to agree with float64"):
        pykd.export(SoftTarget(temperature=3.0), tmp_path, progress=lambda line: None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_wrong_export_arguments(tmp_path):
    with pytest.raises(ValueError, match="expected dtype to be one of float32, .*, got 'int8'"):
        pykd.export(SoftTarget(), tmp_path, dtype="int8")
    with pytest.raises(
        ValueError, match="expected the layout of labels to be 'batch classes' or 'batch' or .*, got 'batch students'"
    ):
        pykd.export(HardTarget(), tmp_path, layouts={"labels": "batch students"})
    with pytest.raises(ValueError, match="expected the name of an input .*, got 'label'"):
        pykd.export(HardTarget(), tmp_path, layouts={"label": "batch"})
    with pytest.raises(ValueError, match="expected the name of an optional input .*, got 'weight'"):
        pykd.export(HardTarget(), tmp_path, optional_inputs=["weight"])
    with pytest.raises(
        ValueError, match="expected a term that splits over samples, got none .*mk_mmd compares every sample"
    ):
        pykd.export(MKMMD(), tmp_path, per_sample=True)
    with pytest.raises(TypeError, match="expected a pykd loss, DistillationLoss or composition, got Linear"):
        pykd.export(torch.nn.Linear(1, 1), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_line_exports_a_recipe_and_verifies_it(tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    assert main(["export", "--recipe", str(recipe), "--out", str(tmp_path / "out")]) == 0
    assert "verified against float64" in capsys.readouterr().err
    assert main(["verify", "--trust", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for engine in ("torch.jit", "onnxruntime", "onnxruntime (C++)", "torchscript (C++)"):
        assert engine in printed
    recipe.write_text(RECIPE + "opset = 9\n")
    assert main(["export", "--recipe", str(recipe), "--out", str(tmp_path / "other")]) == 2
    assert "got 'opset'" in capsys.readouterr().err
