"""Scores as artefacts: ``pykd.export(…, kind="score")``, one ONNX file that gives a number per sample."""

import json
import re
import subprocess

import numpy as np
import onnx
import pytest
import torch

import pykd
from pykd import integrity
from pykd.command_line import main
from pykd.demo import programs
from pykd.export import verification
from pykd.export.verification import verify
from tests.conftest import one_per_loss

RANDOM = np.random.default_rng(0)
ROWS = {
    "student_logits": RANDOM.standard_normal((5, 7)).astype(np.float32),
    "teacher_logits": RANDOM.standard_normal((5, 7)).astype(np.float32),
    "labels": np.array([0, 6, -100, 2, 3]),
}
RECIPE = """
[terms.hard]
loss = "hard_target"
[terms.soft]
loss = "soft_target"
weight = 0.5
settings = { temperature = 2.0, form = "kl" }
[export]
layouts = { labels = "batch" }
"""


def quiet(line: str) -> None:
    pass


def both() -> pykd.Composition:
    return pykd.compose({"hard": (pykd.HardTarget(), 1.0), "soft": (pykd.SoftTarget(temperature=2.0, form="kl"), 0.5)})


@pytest.fixture(scope="module")
def loss(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "loss"
    return pykd.export(both(), folder, layouts={"labels": "batch"}, per_sample=True, progress=quiet)


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    """Written by the command, where a loss was before."""
    folder = tmp_path_factory.mktemp("exports") / "score"
    folder.mkdir()
    for name in ("loss.pt", "loss.onnx", "loss.grad.onnx", "notes.txt"):
        (folder / name).write_text("of before")
    (folder.parent / "recipe.toml").write_text(RECIPE)
    assert main(["export", "--recipe", f"{folder}/../recipe.toml", "--kind", "score", "--out", str(folder)]) == 0
    return folder


# ---- What is refused ----------------------------------------------------------------------------


def test_samples_that_depend_on_each_other_have_no_score(tmp_path):
    mk_mmd = pykd.get("mk_mmd")()
    for coupled in (mk_mmd, pykd.compose({"soft": (pykd.SoftTarget(), 1.0), "mk_mmd": (mk_mmd, 1.0)})):
        with pytest.raises(
            ValueError, match="score for every sample .* got mk_mmd, which compares every sample .*kind='loss'"
        ):
            pykd.export(coupled, tmp_path / "score", kind="score")
    assert not list(tmp_path.iterdir())


def test_inputs_that_all_samples_share_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"samples along their first axis .* got class_weight \(classes\), which all"):
        pykd.export(pykd.HardTarget(), tmp_path / "score", optional_inputs=["class_weight"], kind="score")
    with pytest.raises(ValueError, match="expected kind to be one of loss, score, got 'scores'"):
        pykd.export(pykd.HardTarget(), tmp_path / "score", kind="scores")
    assert not list(tmp_path.iterdir())


# ---- The folder ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_folder_holds_one_file_that_a_server_can_batch(score):
    assert sorted(path.name for path in score.iterdir()) == ["manifest.json", "notes.txt", "score.onnx"]
    manifest = json.loads((score / "manifest.json").read_text())
    assert manifest["kind"] == "score" and list(manifest["files"]) == ["score.onnx"]
    graph = onnx.load(score / "score.onnx").graph
    defaults = {tensor.name for tensor in graph.initializer}
    fed = [value for value in graph.input if value.name not in defaults]
    assert {value.name for value in fed} == set(ROWS)
    assert [v.name for v in graph.output] == ["loss_per_sample", "hard_per_sample", "soft_per_sample"]
    for value in (*fed, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch", value.name
    assert {"soft_temperature", "soft_weight"} <= defaults


@pytest.mark.slow
def test_scores_are_the_values_per_sample_of_the_loss(loss, score):
    whole, scores = pykd.load(loss, engine="onnxruntime"), pykd.load(score)
    assert scores.kernels_in_use == ("soft_target_float32",)
    assert {info.name for info in scores.signature.inputs if info.gradient} == set()
    for parameters in ({}, {"soft_temperature": 3.0, "soft_weight": 2.0}):
        want, got = whole.value(**ROWS, **parameters), scores.value(**ROWS, **parameters)
        assert list(got) == ["loss_per_sample", "hard_per_sample", "soft_per_sample"]
        for name in got:
            np.testing.assert_array_equal(got[name], want[name])
    bytes_alone = pykd.load((score / "score.onnx").read_bytes()).value(**ROWS)
    np.testing.assert_array_equal(bytes_alone["loss_per_sample"], whole.value(**ROWS)["loss_per_sample"])
    from_torch = scores.value(**{name: torch.from_numpy(rows) for name, rows in ROWS.items()})
    np.testing.assert_array_equal(from_torch["loss_per_sample"].numpy(), bytes_alone["loss_per_sample"])


def with_a_kernel():
    for one in one_per_loss():
        each_sample = not one.loss.couples_batch and all(spec.names[0] == "batch" for spec in one.specs.values())
        if one.has_kernel and each_sample:
            yield one


@pytest.mark.slow
@pytest.mark.parametrize("one", list(with_a_kernel()), ids=str)
def test_kernels_that_only_the_loss_needs_are_not_in_the_scores(one, tmp_path):
    """What is left of them would be calls that return nothing, which the loader refuses."""
    pykd.export(one.loss, tmp_path, kind="score", layouts=one.layouts, optional_inputs=one.optional, progress=quiet)
    nodes = onnx.load(tmp_path / "score.onnx").graph.node
    assert all(any(node.output) for node in nodes) and any(node.domain == "pykd" for node in nodes)


@pytest.mark.slow
def test_what_a_score_does_not_have_is_an_error_that_says_so(score):
    scores = pykd.load(score)
    with pytest.raises(ValueError, match="got scores of samples .*; call value"):
        scores.value_and_gradient(**ROWS)
    with pytest.raises(FileNotFoundError, match='engine "torchscript", got ONNX alone'):
        pykd.load(score, engine="torchscript")


# ---- Verification -------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_are_verified_one_by_one_as_well(score, capsys, monkeypatch):
    report = verify(score)
    assert report.ok and {row.engine for row in report.rows} == {"onnxruntime", "onnxruntime (C++)"}
    assert (
        sum(row.size.endswith(", one by one") for row in report.rows) == 4
    )  # default and other parameters, two engines
    assert main(["verify", str(score)]) == 0
    assert "gradient error 0" not in capsys.readouterr().out

    # A file and a definition whose scores grow with the batch agree on every batch, and not on single samples.
    model = onnx.load(score / "score.onnx")
    node = next(node for node in model.graph.node if "loss_per_sample" in node.output)
    node.output[:] = ["_alone"]
    of_batch = [
        ("Shape", ["_alone"], "_length"),
        ("Cast", ["_length"], "_samples"),
        ("Mul", ["_alone", "_samples"], "loss_per_sample"),
    ]
    for op, inputs, output in of_batch:
        model.graph.node.append(onnx.helper.make_node(op, inputs, [output], **({"to": 1} if op == "Cast" else {})))
    entries = [entry for entry in model.metadata_props if entry.key == "pykd"]
    del model.metadata_props[:]
    model.metadata_props.extend(entries)
    opened = verification._onnxruntime(integrity.seal_onnx(model.SerializeToString()))
    truth = verification.truth

    def coupled(*arguments):
        want = truth(*arguments)
        return want | {"loss_per_sample": want["loss_per_sample"] * len(want["loss_per_sample"])}

    monkeypatch.setattr(verification, "truth", coupled)
    monkeypatch.setattr(verification, "_onnxruntime", lambda data: opened)
    report = verify(score, engines=("python",))
    assert {row.size for row in report.rows if not row.ok} == {"batch 5 classes 13, one by one"}


@pytest.mark.slow
def test_a_manifest_names_a_score_or_a_loss(score, tmp_path):
    manifest = json.loads((score / "manifest.json").read_text())
    manifest["files"]["loss.onnx"] = manifest["files"]["score.onnx"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for name in manifest["files"]:
        (tmp_path / name).write_bytes((score / "score.onnx").read_bytes())
    with pytest.raises(ValueError, match="score.onnx alone, or files of a loss, got loss.onnx, score.onnx"):
        verify(tmp_path)
    with pytest.raises(ValueError, match="score.onnx alone, or the files of a loss"):
        pykd.load(tmp_path)


# ---- From C++ -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_scores_a_stream_as_python_does(tmp_path):
    """Rows in blocks from two files, bad ones told apart; NumPy's float64 is the judge."""
    folder = pykd.export(
        pykd.SoftTarget(temperature=2.0, form="kl", tau_squared=False), tmp_path / "kd", kind="score", progress=quiet
    )
    rows, classes = 20_000, 30  # several blocks
    teacher, student = RANDOM.standard_normal((2, rows, classes)).astype(np.float32)
    teacher[3, 1], student[rows - 2, 0], student[7, 2] = np.nan, np.inf, -np.inf
    teacher.tofile(tmp_path / "teacher.f32")
    student.tofile(tmp_path / "student.f32")
    program = programs.find()["evaluate"].with_name("score_stream")
    command = [program, folder, str(classes), tmp_path / "teacher.f32", tmp_path / "student.f32"]
    done = subprocess.run(command, env=programs.environment(), capture_output=True, text=True, timeout=60, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    bad = {3: "nan", 7: "infinite_score", rows - 2: "infinite"}
    assert [line[1] for line in lines] == [bad.get(row, "ok") for row in range(rows)]
    good = [row for row in range(rows) if row not in bad]
    p, q = (np.exp(x[good].astype(float) / 2.0) for x in (teacher, student))
    p, q = (x / x.sum(axis=1, keepdims=True) for x in (p, q))
    want = (p * np.log(p / q)).sum(axis=1)
    np.testing.assert_allclose([float(lines[row][0]) for row in good], want, rtol=3e-5, atol=3e-7)
    assert all(lines[row][0] in ("nan", "-nan") for row in bad)
    counted, mean = re.fullmatch(r"20000 rows, mean (.*) of (.*)\n", done.stderr).group(2, 1)
    assert int(counted) == rows - 3
    np.testing.assert_allclose(float(mean), want.mean(), rtol=1e-6)
    (tmp_path / "student.f32").write_bytes(student.tobytes()[:-8])
    failed = subprocess.run(command, env=programs.environment(), capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and "cut off" in failed.stderr
    block = 1 + (1 << 18) // classes
    for teachers, students in ((block, block + 1), (block + 1, block), (0, 1)):
        (tmp_path / "teacher.f32").write_bytes(teacher[:teachers].tobytes())
        (tmp_path / "student.f32").write_bytes(student[:students].tobytes())
        failed = subprocess.run(command, env=programs.environment(), capture_output=True, text=True, timeout=60)
        assert failed.returncode == 1 and "expected as many rows of the student as of the teacher" in failed.stderr
    with open("/dev/full", "w") as full:
        (tmp_path / "student.f32").write_bytes(student[: block + 1].tobytes())
        (tmp_path / "teacher.f32").write_bytes(teacher[: block + 1].tobytes())
        failed = subprocess.run(command, env=programs.environment(), stdout=full, stderr=subprocess.PIPE, timeout=60)
        assert failed.returncode == 1 and b"expected room for the scores" in failed.stderr
