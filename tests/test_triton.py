"""A model repository for Triton: the published protobuf and the server's rules hold of it, and its files give the scores of `pykd score`.

No server runs here. What it does when it loads a repository is written below from its sources: model_config_utils.cc and ensemble_utils.cc of
triton-inference-server/core (73aad7c), onnxruntime.cc and onnxruntime_utils.cc of onnxruntime_backend (00fd3e8).
"""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as parquet
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

import pykd
from pykd import integrity
from pykd.command_line import main
from pykd.scoring.merge import merge
from pykd.scoring.stream import score_files
from pykd.scoring.triton import write_repository
from tests import oracles

WIDTH, CLASSES, ROWS = 6, 5, 23
PROTOBUF = Path(oracles.FOLDER) / "tritonclient" / "grpc" / "model_config_pb2.py"


@pytest.fixture(scope="module")
def published():
    """Triton's own definition of config.pbtxt."""
    if not PROTOBUF.is_file():
        why = f"{PROTOBUF} is missing: scripts/python-environment installs it"
        assert os.environ.get("CI") != "true", why
        pytest.skip(why)
    spec = importlib.util.spec_from_file_location("model_config_pb2", PROTOBUF)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def losses(per_sample, tmp_path):
    """Folders of losses: two as they were exported, one without values per sample, and one whose temperature has no default."""
    for name in ("soft", "both"):
        (tmp_path / name).symlink_to(per_sample(name))
    mean = onnx.load(tmp_path / "both" / "loss.onnx")
    scalars = [value for value in mean.graph.output if not value.type.tensor_type.shape.dim]
    del mean.graph.output[:]
    mean.graph.output.extend(scalars)
    onnx.save(mean, tmp_path / "mean.onnx")
    given = onnx.load(tmp_path / "soft" / "score.onnx")
    (place,) = [i for i, tensor in enumerate(given.graph.initializer) if tensor.name == "temperature"]
    del given.graph.initializer[place]
    onnx.save(given, tmp_path / "given.onnx")
    return tmp_path


def model(name, seed, first="n", dtype=TensorProto.FLOAT, inputs="pixels", opset=18, more=()):
    """A linear classifier with an output that nobody asks for, and its weights beside it."""
    weights = np.random.default_rng(seed).normal(size=(WIDTH, CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", [inputs, "weights"], ["products"]),
        helper.make_node("Cast", ["products"], ["logits"], to=dtype),
        helper.make_node("ReduceMean", ["products"], ["mean of all"], keepdims=0),
    ]
    outputs = [helper.make_tensor_value_info("logits", dtype, [first, CLASSES])]
    outputs += [helper.make_tensor_value_info("mean of all", TensorProto.FLOAT, [])]
    graph = helper.make_graph(
        [*nodes, *more], "model", [helper.make_tensor_value_info(inputs, TensorProto.FLOAT, [first, WIDTH])],
        outputs, [numpy_helper.from_array(weights, "weights")],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path = f"{name}.onnx"
    Path(f"{name}.bin").unlink(missing_ok=True)  # which onnx does not write over
    onnx.save(made, path, save_as_external_data=True, location=f"{name}.bin", size_threshold=0)
    return path


CONNECT = {"teacher:logits": "teacher_logits", "student:logits": "student_logits"}


def written(losses, kind, loss="soft", out="out", **arguments):
    """A repository of a merged file, or of three, that is served where it lies."""
    teacher, student = model("teacher", 0), model("student", 1)
    arguments = {"served_at": os.path.abspath(out)} | arguments
    if kind == "ensemble":
        return write_repository(out, teacher=teacher, student=student, loss=losses / loss, connect=CONNECT, **arguments)
    return write_repository(out, merge(teacher, student, losses / loss, "scorer.onnx", connect=CONNECT), **arguments)


# ---- The server's rules --------------------------------------------------------------------------


def configurations(published, repository):
    """Every folder of a repository is a model, with a configuration that the published protobuf reads and a version."""
    found = {}
    for folder in sorted(path for path in Path(repository).iterdir() if path.is_dir()):
        config = text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), published.ModelConfig())
        assert config.name == folder.name
        assert [path.name for path in folder.iterdir() if path.is_dir()] == ["1"]
        found[config.name] = config
    return found


def validate(published, config):
    """ValidateModelConfig and ValidateModelIOConfig."""
    assert config.max_batch_size > 0
    assert (config.backend, config.platform) in (("onnxruntime", ""), ("", "ensemble"))
    assert config.HasField("ensemble_scheduling") == (config.platform == "ensemble")
    for tensor in (*config.input, *config.output):
        assert tensor.name and tensor.data_type != published.TYPE_INVALID and tensor.dims
        assert all(length == -1 or length >= 1 for length in (*tensor.dims, *tensor.reshape.shape))
        if tensor.HasField("reshape"):  # the one kind that is written: of one entry to none
            assert list(tensor.dims) == [1] and list(tensor.reshape.shape) == []
    for group in config.instance_group:
        assert group.kind == published.ModelInstanceGroup.KIND_CPU
    if config.platform == "ensemble":
        assert (
            not config.instance_group
            and not config.HasField("optimization")
            and not config.HasField("dynamic_batching")
        )


def opened(folder, config):
    """The session that Triton makes: libraries registered by their paths, as they are written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for path in config.model_operations.op_library_filename:
        options.register_custom_ops_library(path)
    return onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), options, providers=["CPUExecutionProvider"])


def validate_session(published, config, session):
    """ValidateInputs, ValidateOutputs and CompareDimsSupported."""
    assert len(session.get_inputs()) == sum(not tensor.optional for tensor in config.input)
    assert all(value.type.startswith("tensor(") for value in (*session.get_inputs(), *session.get_outputs()))
    taken = {value.name: value for value in (*session.get_inputs(), *session.get_overridable_initializers())}
    given = {value.name: value for value in session.get_outputs()}
    types = {"tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(int64)": "TYPE_INT64"}
    for tensors, known, exactly in ((config.input, taken, False), (config.output, given, True)):
        for tensor in tensors:
            value = known[tensor.name]
            assert published.DataType.Name(tensor.data_type) == types[value.type]
            shape = [length if isinstance(length, int) else -1 for length in value.shape]
            dims = [-1, *(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)]
            assert shape and shape[0] == -1 and len(shape) == len(dims)
            assert all(a == b for a, b in zip(shape, dims, strict=True) if exactly or a != -1)
            assert exactly or not tensor.optional


def validate_ensemble(config, others):
    """ValidateEnsembleSchedulingConfig, ValidateEnsembleConfig and ValidateTensorMapping."""
    known = {
        tensor.name: (tensor.data_type, list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims))
        for tensor in (*config.input, *config.output)
    }
    ready = {tensor.name for tensor in config.input}
    written, read = set(), set()
    assert config.ensemble_scheduling.step
    for step in config.ensemble_scheduling.step:
        other = others[step.model_name]
        assert other.max_batch_size >= config.max_batch_size and step.input_map and step.output_map
        assert set(step.input_map) == {tensor.name for tensor in other.input}
        assert set(step.output_map) <= {tensor.name for tensor in other.output}
        assert not written & set(step.output_map.values()) and len(set(step.output_map.values())) == len(
            step.output_map
        )
        written |= set(step.output_map.values())
        read |= set(step.input_map.values())
        assert set(step.input_map.values()) <= ready  # the steps are in order
        ready |= set(step.output_map.values())
        for tensors, names in ((other.input, step.input_map), (other.output, step.output_map)):
            for tensor in tensors:
                if tensor.name in names:
                    kind, dims = known.setdefault(names[tensor.name], (tensor.data_type, list(tensor.dims)))
                    assert kind == tensor.data_type and len(dims) == len(tensor.dims)
                    assert all(a == b or -1 in (a, b) for a, b in zip(dims, tensor.dims, strict=True))
    outputs = {tensor.name for tensor in config.output}
    assert outputs <= written and {tensor.name for tensor in config.input} <= read
    assert written - outputs <= read  # nothing is made in vain


class Server:
    """What serves a repository: every rule is checked, then requests run in batches as the server makes them."""

    def __init__(self, published, repository):
        self.configs = configurations(published, repository)
        self.sessions = {}
        for name, config in self.configs.items():
            validate(published, config)
            if config.platform == "ensemble":
                validate_ensemble(config, self.configs)
            else:
                self.sessions[name] = opened(Path(repository) / name, config)
                validate_session(published, config, self.sessions[name])

    def __call__(self, name, request):
        config = self.configs[name]
        assert request.keys() == {tensor.name for tensor in config.input}
        for tensor in config.input:
            shape = request[tensor.name].shape
            assert len(shape) == 1 + len(tensor.dims) and 1 <= shape[0] <= config.max_batch_size
            assert all(want in (-1, got) for want, got in zip(tensor.dims, shape[1:], strict=True))
        if config.platform == "ensemble":
            tensors = dict(request)
            for step in config.ensemble_scheduling.step:
                answer = self(step.model_name, {key: tensors[value] for key, value in step.input_map.items()})
                tensors |= {step.output_map[key]: value for key, value in answer.items() if key in step.output_map}
            return {tensor.name: tensors[tensor.name] for tensor in config.output}
        inside = {t.name: self._reshaped(t, request[t.name], into=True) for t in config.input}
        outputs = [tensor.name for tensor in config.output]
        found = self.sessions[name].run(outputs, inside)
        return {t.name: self._reshaped(t, v, into=False) for t, v in zip(config.output, found, strict=True)}

    @staticmethod
    def _reshaped(tensor, value, into):
        if not tensor.HasField("reshape"):
            return value
        return value.reshape(len(value), *(tensor.reshape.shape if into else tensor.dims))


def scored(losses, loss, labels=None, **arguments):
    """What `pykd score` says of the logits of the two models."""
    for role in ("teacher", "student"):
        np.save(f"{role}.npy", onnxruntime.InferenceSession(f"{role}.onnx").run(["logits"], {"pixels": PIXELS})[0])
    if labels is not None:
        np.save("labels.npy", labels)
        arguments["labels"] = "labels.npy"
    score_files("teacher.npy", "student.npy", "scores.parquet", (str(losses / loss),), **arguments)
    name = json.loads((losses / loss / "manifest.json").read_text())["name"]
    return parquet.read_table("scores.parquet")[name].to_numpy()


PIXELS = np.random.default_rng(9).normal(size=(ROWS, WIDTH)).astype(np.float32)
LABELS = np.random.default_rng(9).integers(0, CLASSES, ROWS)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kind", ["merged", "ensemble"])
def test_a_repository_serves_the_scores_of_pykd_score(published, losses, kind, kernels):
    server = Server(published, written(losses, kind, kernels=kernels))
    want = scored(losses, "soft")
    for size in (1, 7, ROWS):
        got = [server("scorer", {"pixels": PIXELS[i : i + size]})["loss_per_sample"] for i in range(0, ROWS, size)]
        got = np.concatenate(got)
        assert got.shape == (ROWS, 1)
        np.testing.assert_allclose(got[:, 0], want, rtol=2e-5 if not kernels else 1e-6, atol=1e-7)
    for name, config in server.configs.items():
        batched = config.HasField("dynamic_batching")
        assert batched == (config.platform != "ensemble")
        ours = kernels and name in ("scorer", "scorer_loss") and config.platform != "ensemble"
        assert bool(config.model_operations.op_library_filename) == ours
        assert len(config.instance_group) == ours


@pytest.mark.parametrize("kind", ["merged", "ensemble"])
def test_labels_are_numbers_of_a_row(published, losses, kind):
    server = Server(published, written(losses, kind, "both", max_batch=ROWS, name="kd"))
    got = server("kd", {"pixels": PIXELS, "labels": LABELS[:, None]})
    assert set(got) == {"loss_per_sample", "hard_per_sample", "soft_per_sample"}
    np.testing.assert_allclose(got["loss_per_sample"][:, 0], scored(losses, "both", LABELS), rtol=1e-6)
    with pytest.raises(AssertionError):  # one row more than it says
        server("kd", {"pixels": PIXELS[[0, *range(ROWS)]], "labels": LABELS[[0, *range(ROWS)], None]})


@pytest.mark.parametrize("kind", ["merged", "ensemble"])
def test_numbers_are_written_into_the_file_or_keep_their_defaults(published, losses, kind):
    server = Server(published, written(losses, kind, fixed={"temperature": 4.0}))
    got = server("scorer", {"pixels": PIXELS})["loss_per_sample"][:, 0]
    np.testing.assert_allclose(got, scored(losses, "soft", temperature=4.0), rtol=1e-6)
    sealed = [path for path in Path("out").rglob("model.onnx") if b"pykd.crc32" in path.read_bytes()]
    assert bool(sealed) == (kind == "merged")
    for path in sealed:
        integrity.check(path.read_bytes(), str(path))
    (session,) = [s for s in server.sessions.values() if "loss_per_sample" in {o.name for o in s.get_outputs()}]
    assert "temperature" not in {value.name for value in session.get_overridable_initializers()}
    with pytest.raises(ValueError, match="write a value into the file \\(--fix temperature=…\\)"):
        written(losses, kind, "given.onnx", out="other")
    server = Server(published, written(losses, kind, "given.onnx", out="other", fixed={"temperature": 4.0}))
    np.testing.assert_allclose(server("scorer", {"pixels": PIXELS})["loss_per_sample"][:, 0], got, rtol=2e-5)
    with pytest.raises(ValueError, match=r"a number of the loss \(temperature\), got 'tau'"):
        written(losses, kind, out="no", fixed={"tau": 4.0})
    for number, said in (
        (float("nan"), "a finite number for temperature, got nan"),
        (1e50, r"a finite number for temperature, got 1e\+50 \(float32: inf\); correct --fix"),
        (-2.0, "expected temperature above 0, got -2; correct --fix"),
        (1e-50, "expected temperature above 0, got 1e-50, which is 0 in float32; correct --fix"),
    ):
        with pytest.raises(ValueError, match=said):
            written(losses, kind, out="no", fixed={"temperature": number})
    assert not Path("no").exists() and not Path("no.writing").exists()


def test_the_folder_alone_runs_with_its_own_operators(losses):
    """Moved to where it is served, in a process that knows nothing of pykd."""
    written(losses, "merged", served_at=os.path.abspath("served/models"))
    Path("served").mkdir()
    Path("out").rename("served/models")
    for path in ("teacher.onnx", "teacher.bin", "student.onnx", "student.bin", "scorer.onnx"):
        Path(path).unlink()
    np.save("pixels.npy", PIXELS)
    program = """
import re, sys
import numpy as np, onnxruntime
folder = "served/models/scorer/"
(library,) = re.findall('op_library_filename: "(.*)"', open(folder + "config.pbtxt").read())
options = onnxruntime.SessionOptions()
options.enable_profiling = True
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(folder + "1/model.onnx", options, providers=["CPUExecutionProvider"])
np.save("got.npy", session.run(["loss_per_sample"], {"pixels": np.load("pixels.npy")})[0])
assert "soft_target_float32" in open(session.end_profiling()).read(), "the kernel did not run"
libraries = {line.split()[-1] for line in open("/proc/self/maps") if re.search("libpykd|libhwy", line)}
ours = [path for path in libraries if "served/models" in path]
assert any("libpykd" in path for path in ours) and not any("site-packages/pykd" in path for path in libraries), libraries
assert not {"torch", "pykd", "onnx"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    model("teacher", 0), model("student", 1)
    np.testing.assert_allclose(np.load("got.npy"), scored(losses, "soft"), rtol=1e-6)


def test_a_link_leads_to_the_new_folder(losses):
    Path("elsewhere").mkdir()
    os.symlink("elsewhere/served", "out")
    written(losses, "merged", operators="/opt/libpykd.so")
    assert Path("out").is_symlink() and Path("elsewhere/served/README.md").is_file()
    assert os.listdir("elsewhere") == ["served"]


def test_operators_may_lie_elsewhere(published, losses):
    library = pykd.onnxruntime_ops_path()
    server = Server(published, written(losses, "merged", operators=library))
    assert list(server.configs["scorer"].model_operations.op_library_filename) == [library]
    assert [path.name for path in sorted(Path("out/scorer").iterdir())] == ["1", "config.pbtxt"]
    text = Path("out/README.md").read_text()
    assert library in text and "batch × 6" in text and "tritonserver --model-repository=" in text


def test_names_are_quoted(published):
    from pykd.scoring.triton import _lines

    name = 'a "name"\\ \n of ü'
    message = {"name": name, "max_batch_size": 3, "input": [{"name": name, "dims": [-1, 2], "reshape": {"shape": []}}]}
    config = text_format.Parse("\n".join(_lines(message)), published.ModelConfig())
    assert config.name == config.input[0].name == name and list(config.input[0].dims) == [-1, 2]
    assert config.input[0].HasField("reshape")


def test_what_triton_would_not_load_or_batch_is_refused(losses):
    teacher, student = model("teacher", 0), model("student", 1)

    def fails(match, error=ValueError, **arguments):
        arguments = {"teacher": teacher, "student": student, "loss": losses / "soft", "connect": CONNECT} | arguments
        with pytest.raises(error, match=match):
            write_repository("out", **arguments)
        assert not Path("out").exists() and not Path("out.writing").exists()

    fails("a loss that compares the samples of a batch with each other has none", loss=losses / "mean.onnx")
    fails("got neither the one nor the three", loss=None)
    Path("out.writing").mkdir()
    Path("out.writing/notes.txt").write_text("of somebody")
    with pytest.raises(ValueError, match="expected nothing at out.writing, got what another run writes, or one that"):
        write_repository("out", teacher=teacher, student=student, loss=losses / "soft", connect=CONNECT)
    assert Path("out.writing/notes.txt").read_text() == "of somebody"
    Path("out.writing/notes.txt").unlink()
    Path("out.writing").rmdir()

    def changed(path, change):
        """The loss with another description of itself."""
        proto = onnx.load(losses / "soft" / "score.onnx")
        (entry,) = [entry for entry in proto.metadata_props if entry.key == "pykd"]
        described = json.loads(entry.value)
        change(described)
        entry.value = json.dumps(described)
        onnx.save(proto, path)
        return path

    why = "matches distributions over the batch"
    coupled = changed("a.onnx", lambda found: found["terms"][0].update(per_sample=False, couples_batch=why))
    weight = {"name": "class_weight", "axes": ["classes"], "dtype": "float32"}
    shared = changed("b.onnx", lambda found: found["inputs"].append(weight))
    only = {"teacher": None, "student": None, "loss": None, "connect": None}
    for path, match in (
        (coupled, f"got the term soft_target, which {why}: the server puts"),
        (shared, "got class_weight"),
    ):
        fails(match, loss=path)
        fails(match, scorer=merge(teacher, student, path, "scorer.onnx", connect=CONNECT), **only)
    fails("got neither the one nor the three", scorer="scorer.onnx")
    fails(
        r"any number of rows in the input pixels of the teacher, got the shape \[1, 6\]",
        teacher=model("fixed", 0, first=1),
    )
    fails("got a half: an ensemble converts nothing", teacher=model("half", 0, dtype=TensorProto.FLOAT16))
    sequence = helper.make_node("SequenceConstruct", ["products"], ["sequence"])
    path = model("sequence", 0, more=[sequence])
    proto = onnx.load(path, load_external_data=False)
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    proto.graph.output.append(helper.make_value_info("sequence", kind))
    onnx.save(proto, path)
    fails(r"outputs are tensors, as Triton's backend does, got seq\(tensor\(float\)\) of sequence", teacher=path)
    fails("at least one row, got max_batch 0", max_batch=0)
    fails("an absolute path on the server for served_at, got 'models'", served_at="models")
    fails("an absolute path on the server for operators, got 'libpykd.so'", operators="libpykd.so")
    fails("a name of letters.*, got 'a/b'", name="a/b")
    fails("a file that `pykd merge` wrote", scorer=teacher, **only)
    scorer = merge(teacher, student, losses / "soft", "scorer.onnx", connect=CONNECT, keep=["student:mean of all"])
    fails("an axis of rows in the output student/mean of all of the scorer, got a single number", scorer=scorer, **only)
    Path("out").mkdir()
    Path("out/file").touch()
    with pytest.raises(ValueError, match="an empty one, got one with files"):
        write_repository("out", scorer)


def test_the_command(published, losses, capsys):
    teacher, student = model("teacher", 0), model("student", 1, inputs="image")
    call = [
        "triton",
        "out",
        "--teacher",
        teacher,
        "--student",
        student,
        "--loss",
        str(losses / "soft"),
        "--max-batch",
        "8",
    ]
    call += ["--connect", "teacher:logits=teacher_logits", "--connect", "student:logits=student_logits"]
    call += ["--share", "student:image=teacher:pixels", "--name", "kd", "--no-kernels", "--fix", "temperature=3"]
    assert main(call) == 0
    assert "out/README.md says how to start the server" in capsys.readouterr().out
    server = Server(published, "out")
    assert set(server.configs) == {"kd", "kd_teacher", "kd_student", "kd_loss"}
    assert server.configs["kd"].max_batch_size == 8
    assert server("kd", {"pixels": PIXELS[:3]})["loss_per_sample"].shape == (3, 1)
    assert main([*call[:-1], "temperature=hot"]) == 2
    assert "--fix temperature with a number, got 'hot'" in capsys.readouterr().err


def test_the_commands_of_the_docs_run(published, losses):
    text = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text(encoding="utf-8")
    commands = text.split("<!-- pykd:triton -->")[1].split("<!-- /pykd:triton -->")[0].strip().splitlines()
    for name, seed in (("teacher", 0), ("student", 1)):
        proto = onnx.load(model(name, seed))
        del proto.graph.output[1:]
        onnx.save(proto, f"{name}.onnx")
    Path("kd").symlink_to(losses / "soft")
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "pykd" and main(arguments) == 0
    configs = {folder: configurations(published, folder) for folder in ("merged", "ensemble")}
    assert [len(found) for found in configs.values()] == [1, 4]
    (library,) = configs["merged"]["scorer"].model_operations.op_library_filename
    assert library.startswith("/models/scorer/libpykd.so.")
