"""One file that scores: it returns, bit for bit, what three sessions do, and says what does not fit."""

import contextlib
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

import pykd
from pykd import integrity
from pykd.command_line import main
from pykd.demo import programs
from pykd.scoring import merge as merging
from pykd.scoring.merge import merge
from pykd.scoring.sessions import Sessions

CLASSES, WIDTH, ROWS = 5, 7, 6
RANDOM = np.random.default_rng(3)
PIXELS = RANDOM.standard_normal((ROWS, WIDTH)).astype(np.float32)
LABELS = np.array([0, 4, -100, 2, 1, 1])


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Folders of exported losses."""
    folder = tmp_path_factory.mktemp("losses")
    soft = pykd.SoftTarget(temperature=2.0, form="kl", tau_squared=True)
    both = pykd.compose({"hard": (pykd.HardTarget(), 1.0), "soft": (soft, 0.5)})

    def say(line):
        pass

    pykd.export(soft, folder / "soft", per_sample=True, progress=say)
    pykd.export(soft, folder / "off", per_sample=True, kernels="off", progress=say)
    pykd.export(soft, folder / "score", kind="score", progress=say)
    pykd.export(soft, folder / "half", per_sample=True, dtype="float16", progress=say)
    pykd.export(soft, folder / "mean", progress=say)
    pykd.export(both, folder / "both", layouts={"labels": "batch"}, per_sample=True, progress=say)
    return folder


def model(
    path,
    opset=18,
    classes=CLASSES,
    inputs="pixels",
    output="logits",
    dtype=TensorProto.FLOAT,
    seed=0,
    ir=8,
    domain=None,
):
    """A linear classifier; of other types than float32 by a Cast at its end."""
    weights = np.random.default_rng(seed).standard_normal((WIDTH, classes)).astype(np.float32)
    nodes = [helper.make_node("MatMul", [inputs, "weights"], ["products"], name="product")]
    last = "products"
    imports = [helper.make_opsetid("", opset)]
    functions = []
    if domain is not None:
        nodes.append(helper.make_node("shifted", ["products"], ["moved"], domain="here"))
        body = [
            helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.float32(domain))),
            helper.make_node("Add", ["x", "one"], ["y"]),
        ]
        functions = [helper.make_function("here", "shifted", ["x"], ["y"], body, [helper.make_opsetid("", opset)])]
        imports.append(helper.make_opsetid("here", 1))
        last = "moved"
    nodes.append(helper.make_node("Cast", [last], [output], to=dtype))
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info(inputs, TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info(output, dtype, ["n", classes])],
        [numpy_helper.from_array(weights, "weights")],
    )
    if ir == 3:
        graph.input.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, [WIDTH, classes]))
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=ir, functions=functions), path)
    return path


@pytest.fixture
def models(tmp_path):
    return model(tmp_path / "teacher.onnx"), model(tmp_path / "student.onnx", seed=1)


def scored(path, feeds, kernels=True):
    options = onnxruntime.SessionOptions()
    if kernels:
        options.register_custom_ops_library(pykd.onnxruntime_ops_path())
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def logits_of(path, feeds):
    return onnxruntime.InferenceSession(str(path)).run(None, feeds)[0].astype(np.float64)


def divergence(teacher, student, temperature=2.0):
    """T² KL(p‖q) per row, by its definition."""
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum(axis=1, keepdims=True) for x in (teacher, student))
    return temperature**2 * (p * np.log(p / q)).sum(axis=1)


def check(out, teacher, student, loss, feeds, want, **arguments):
    """The merged file, three sessions and the definition agree."""
    merge(teacher, student, loss, out, **arguments)
    onnx.checker.check_model(str(out))
    kernels = any(f.domain == "pykd" for f in onnx.load(out, load_external_data=False).functions)
    for run in (True, False) if kernels else (False,):
        got = scored(out, feeds, run)
        apart = Sessions(teacher, student, loss, kernels=run, **{k: v for k, v in arguments.items() if k != "keep"})(
            feeds
        )
        for name, value in apart.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        np.testing.assert_allclose(got["loss_per_sample"], want, rtol=2e-5, atol=1e-6)
    return got


def test_scores_are_those_of_three_sessions_bit_for_bit(tmp_path, models, losses):
    feeds = {"pixels": PIXELS}
    want = divergence(*(logits_of(path, feeds) for path in models))
    got = check(tmp_path / "scorer.onnx", *models, losses / "soft", feeds, want)
    assert list(got) == ["loss_per_sample"] and got["loss_per_sample"].shape == (ROWS,)
    check(tmp_path / "scorer.onnx", *models, losses / "score", feeds, want)
    got = check(tmp_path / "scorer.onnx", *models, losses / "soft" / "loss.onnx", feeds, want, keep=["student:logits"])
    np.testing.assert_array_equal(got["student/logits"], logits_of(models[1], feeds).astype(np.float32))
    # The kernel is found by its name.
    assert any(n.domain == "pykd" for n in onnx.load(tmp_path / "scorer.onnx").graph.node)


@pytest.mark.slow
def test_the_example_scores_a_stream_as_three_sessions_do(tmp_path, models, losses):
    """Without Python, in blocks of 256 rows: the same bits, bad rows told apart."""
    out = merge(*models, losses / "both", tmp_path / "scorer.onnx")
    rows = 700
    feeds = {"pixels": RANDOM.standard_normal((rows, WIDTH)).astype(np.float32), "labels": np.arange(rows) % CLASSES}
    apart = Sessions(*models, losses / "both")
    blocks = [{name: array[at : at + 256] for name, array in feeds.items()} for at in range(0, rows, 256)]
    want = np.concatenate([apart(block)["loss_per_sample"] for block in blocks])
    feeds["pixels"][3, 1], feeds["labels"][4], feeds["labels"][rows - 1] = np.nan, CLASSES, -100
    for name, array in feeds.items():
        array.tofile(tmp_path / name)
    program = programs.find()["evaluate"].with_name("score_merged")

    def run(*names, stdout=subprocess.PIPE):
        command = [program, out, *(tmp_path / name for name in names)]
        environment = programs.environment()
        return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)

    done = run("pixels", "labels")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    bad = {3: "nan", 4: "label_out_of_range", rows - 1: "ignored"}
    assert [line[1] for line in lines] == [bad.get(row, "ok") for row in range(rows)]
    good = [row for row in range(rows) if row not in bad]
    np.testing.assert_array_equal(np.array([lines[row][0] for row in good], np.float32), want[good])
    assert float(done.stderr.removeprefix("mean ")) == pytest.approx(want[good].mean(dtype=np.float64), rel=1e-7)
    assert "expected a file for every input" in run("pixels").stderr
    assert "expected a file that can be read for labels" in run("pixels", "nothing").stderr
    (tmp_path / "labels").write_bytes(feeds["labels"].tobytes()[:-1])
    failed = run("pixels", "labels")
    assert failed.returncode == 1 and "cut off" in failed.stderr
    (tmp_path / "labels").write_bytes(feeds["labels"].tobytes()[:-8])
    failed = run("pixels", "labels")
    assert failed.returncode == 1 and "labels of length 188" in failed.stderr
    for name, kept in (("pixels", 512), ("labels", 256)):  # a file that ends with a block
        for other, array in feeds.items():
            (tmp_path / other).write_bytes(array[: kept if other == name else rows].tobytes())
        failed = run("pixels", "labels")
        assert failed.returncode == 1 and "expected as many rows for every input" in failed.stderr
    for name, array in feeds.items():
        array.tofile(tmp_path / name)
    with open("/dev/full", "w") as full:
        assert run("pixels", "labels", stdout=full).returncode == 1


def test_parameters_and_other_inputs_of_the_loss_are_inputs(tmp_path, models, losses):
    merge(*models, losses / "soft", tmp_path / "scorer.onnx")
    feeds = {"pixels": PIXELS}
    teacher, student = (logits_of(path, feeds) for path in models)
    got = scored(tmp_path / "scorer.onnx", {**feeds, "temperature": np.array(3.0, np.float32)})
    np.testing.assert_allclose(got["loss_per_sample"], divergence(teacher, student, 3.0), rtol=2e-5)
    out = merge(*models, losses / "both", tmp_path / "both.onnx")
    integrity.check(out.read_bytes(), out.name)
    assert merging.described(onnx.load(out))["lengths"] == {"classes": CLASSES}
    got = scored(out, {**feeds, "labels": LABELS})
    apart = Sessions(*models, losses / "both")
    assert apart.inputs == ["pixels", "labels"] and apart.outputs == list(got)
    for name, value in apart({**feeds, "labels": LABELS}).items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert set(got) == {"loss_per_sample", "hard_per_sample", "soft_per_sample"}
    assert got["soft_per_sample"][2] == 0 and got["soft_per_sample"][0] > 0
    with pytest.raises(ValueError, match="expected the inputs pixels, labels, got pixels; look at labels"):
        apart(feeds)


@pytest.mark.parametrize("opset", [13, 17, 19, 21, 22])
def test_the_loss_is_written_at_the_opset_of_the_models(tmp_path, losses, opset):
    paths = model(tmp_path / "t.onnx", opset), model(tmp_path / "s.onnx", opset, seed=1)
    feeds = {"pixels": PIXELS}
    want = divergence(*(logits_of(path, feeds) for path in paths))
    for loss in ("soft", "off"):
        merge(*paths, losses / loss, tmp_path / "scorer.onnx")
        written = onnx.load(tmp_path / "scorer.onnx")
        assert {o.version for o in written.opset_import if o.domain == ""} == {opset}
        assert {o.version for f in written.functions for o in f.opset_import if o.domain == ""} <= {opset}
        got = scored(tmp_path / "scorer.onnx", feeds)["loss_per_sample"]
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_models_that_cannot_be_merged_have_three_sessions(tmp_path, losses):
    teacher, student = model(tmp_path / "t.onnx", 17), model(tmp_path / "s.onnx", 18, seed=1)
    with pytest.raises(
        ValueError, match="expected models of one version of the operators 'ai.onnx', got 17 of the teacher and 18"
    ):
        merge(teacher, student, losses / "soft", tmp_path / "scorer.onnx")
    feeds = {"pixels": PIXELS}
    want = divergence(logits_of(teacher, feeds), logits_of(student, feeds))
    np.testing.assert_allclose(Sessions(teacher, student, losses / "soft")(feeds)["loss_per_sample"], want, rtol=2e-5)
    old = model(tmp_path / "old.onnx", 11)
    with pytest.raises(ValueError, match="expected models at opset 13 or later, got 11"):
        merge(old, old, losses / "soft", tmp_path / "scorer.onnx")


def test_a_quantised_student(tmp_path, models, losses):
    quantize_dynamic(models[1], tmp_path / "int8.onnx")
    assert "MatMulInteger" in {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    feeds = {"pixels": PIXELS}
    want = divergence(logits_of(models[0], feeds), logits_of(tmp_path / "int8.onnx", feeds))
    assert want.max() > 1e-6
    check(tmp_path / "scorer.onnx", models[0], tmp_path / "int8.onnx", losses / "soft", feeds, want)


def test_a_model_of_another_domain(tmp_path, models, losses):
    """What scikit-learn's converters write."""
    coefficients = np.random.default_rng(5).standard_normal(CLASSES * WIDTH).tolist()
    node = helper.make_node(
        "LinearRegressor",
        ["pixels"],
        ["scores"],
        domain="ai.onnx.ml",
        coefficients=coefficients,
        intercepts=[0.0] * CLASSES,
        targets=CLASSES,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [None, WIDTH])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, CLASSES])],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "linear.onnx")
    feeds = {"pixels": PIXELS}
    want = divergence(logits_of(tmp_path / "linear.onnx", feeds), logits_of(models[1], feeds))
    check(tmp_path / "scorer.onnx", tmp_path / "linear.onnx", models[1], losses / "soft", feeds, want)


def test_weights_outside_of_the_file_stay_bytes(tmp_path, models, losses):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    onnx.save(
        onnx.load(models[0]), folder / "teacher.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    feeds = {"pixels": PIXELS}
    want = divergence(*(logits_of(path, feeds) for path in models))
    out = tmp_path / "scorer.onnx"
    check(out, folder / "teacher.onnx", models[1], losses / "soft", feeds, want)
    (data,) = weights_of(out)
    assert data.read_bytes() == (folder / "w.bin").read_bytes()[: WIDTH * CLASSES * 4]
    (folder / "w.bin").write_bytes((folder / "w.bin").read_bytes()[:-8])
    before = out.read_bytes()
    with pytest.raises(ValueError, match="expected 8 bytes more of the weight teacher/weights"):
        merge(folder / "teacher.onnx", models[1], losses / "soft", out)
    assert out.read_bytes() == before and not list(tmp_path.glob("*.writing"))
    (folder / "w.bin").rename(tmp_path / "w.bin")
    with pytest.raises(ValueError, match="expected the weight weights in a file beside its model, got 'w.bin'"):
        merge(folder / "teacher.onnx", models[1], losses / "soft", out)


def test_models_too_large_for_one_file_have_their_weights_beside_it(tmp_path, losses, monkeypatch):
    monkeypatch.setattr(merging, "INLINE_LIMIT", 1000)
    monkeypatch.setattr(merging, "PAGE", 64)
    paths = model(tmp_path / "t.onnx"), model(tmp_path / "s.onnx", seed=1)
    feeds = {"pixels": PIXELS}
    want = divergence(*(logits_of(path, feeds) for path in paths))
    check(tmp_path / "scorer.onnx", *paths, losses / "soft", feeds, want)
    (data,) = weights_of(tmp_path / "scorer.onnx")
    assert data.stat().st_size >= 2 * WIDTH * CLASSES * 4


def test_old_files_list_their_weights_among_their_inputs(tmp_path, models, losses):
    old = model(tmp_path / "old.onnx", 13, ir=3)
    new = model(tmp_path / "new.onnx", 13, seed=1)
    feeds = {"pixels": PIXELS}
    check(
        tmp_path / "scorer.onnx",
        old,
        new,
        losses / "soft",
        feeds,
        divergence(logits_of(old, feeds), logits_of(new, feeds)),
    )
    assert [i.name for i in onnx.load(tmp_path / "scorer.onnx").graph.input] == ["pixels", "temperature"]


def test_functions_of_one_name_that_differ_stay_apart(tmp_path, losses):
    teacher, student = model(tmp_path / "t.onnx", domain=0.5), model(tmp_path / "s.onnx", domain=-2.0)
    feeds = {"pixels": PIXELS}
    # The same weights: that the two functions differ shows in the logits alone, which are moved by a constant.
    out = merge(teacher, student, losses / "soft", tmp_path / "scorer.onnx", keep=["teacher:logits", "student:logits"])
    got = scored(out, feeds)
    np.testing.assert_allclose(got["teacher/logits"] - got["student/logits"], 2.5, rtol=1e-5)


def nested(path, factor, seed=0):
    """A classifier whose function, alike in all of them, calls another one, which multiplies by the factor."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("here", 1)]
    outer = helper.make_function(
        "here", "outer", ["x"], ["y"], [helper.make_node("inner", ["x"], ["y"], domain="here")], opsets
    )
    body = [
        helper.make_node("Constant", [], ["factor"], value=numpy_helper.from_array(np.float32(factor))),
        helper.make_node("Mul", ["x", "factor"], ["y"]),
    ]
    inner = helper.make_function("here", "inner", ["x"], ["y"], body, opsets[:1])
    loaded = onnx.load(model(path, seed=seed))
    loaded.graph.node.insert(1, helper.make_node("outer", ["products"], ["multiplied"], domain="here"))
    loaded.graph.node[2].input[0] = "multiplied"
    loaded.functions.extend([outer, inner])
    loaded.opset_import.append(opsets[1])
    onnx.save(loaded, path)
    return path


def test_functions_that_call_others_of_one_name_stay_apart(tmp_path, losses):
    teacher, student = nested(tmp_path / "t.onnx", 1.0), nested(tmp_path / "s.onnx", 3.0, seed=1)
    feeds = {"pixels": PIXELS}
    want = divergence(logits_of(teacher, feeds), logits_of(student, feeds))
    check(tmp_path / "scorer.onnx", teacher, student, losses / "soft", feeds, want)


def weights_of(out):
    return list(out.parent.glob(f"{out.name}.*.data"))


def with_weights_at(path, location, seed=0):
    loaded = onnx.load(model(path, seed=seed))
    onnx.save_model(loaded, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def test_nothing_that_is_read_is_written_over(tmp_path, models, losses):
    out = merge(with_weights_at(tmp_path / "big.onnx", "big.bin"), models[1], losses / "soft", tmp_path / "scorer.onnx")
    (data,) = weights_of(out)
    weights = data.read_bytes()
    teacher = tmp_path / "copy.onnx"
    teacher.write_bytes(out.read_bytes())
    for path in (out, data):
        with pytest.raises(ValueError, match="expected another file than the models, the loss and their weights"):
            merge(teacher, models[1], losses / "soft", path)
    assert data.read_bytes() == weights
    with pytest.raises(ValueError, match="expected another file than the models, the loss and their weights"):
        merge(*models, losses / "soft", losses / "soft" / "loss.onnx")
    with pytest.raises(FileNotFoundError, match="expected a folder for the scorer, got none at .*nowhere; make it"):
        merge(*models, losses / "soft", tmp_path / "nowhere" / "scorer.onnx")


def test_files_of_others_stay(tmp_path, models, losses):
    """Also where nothing says so but their names; a pipe would be read without end."""
    big = with_weights_at(tmp_path / "big.onnx", "big.bin")
    out, pipe = tmp_path / "scorer.onnx", tmp_path / "pipe"
    for name in ("scorer.onnx.data.writing", "scorer.onnx.writing"):
        other = tmp_path / name
        other.write_bytes(b"of others")
        with pytest.raises(ValueError, match=f"expected nothing at .*{name}, got what another run writes"):
            merge(big, models[1], losses / "soft", out)
        assert other.read_bytes() == b"of others" and not out.exists() and not weights_of(out)
        other.unlink()
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="a regular file to replace at .*pipe, or none, got a folder, pipe or device"):
        merge(big, models[1], losses / "soft", pipe)
    for name in (b"\xff.onnx", b"a\\b.onnx"):
        with pytest.raises(ValueError, match="expected a printable name without"):
            merge(big, models[1], losses / "soft", tmp_path / os.fsdecode(name))
    assert pipe.is_fifo() and not list(tmp_path.glob("*.data")) and not list(tmp_path.glob("*.writing"))


def test_a_model_of_any_name_is_named_in_text(tmp_path, models, losses):
    """Half of a surrogate pair is none, which JSON in C++ refuses."""
    odd = models[0].rename(tmp_path / os.fsdecode(b"\xff.onnx"))
    out = onnx.load(merge(odd, models[1], losses / "soft", tmp_path / "scorer.onnx"))
    assert merging.described(out)["models"]["teacher"]["file"] == "\\udcff.onnx"


def test_damage_of_a_merged_file_or_its_weights_is_told(tmp_path, models, losses, capsys):
    """Loading compares the lengths of weights alone."""
    out = merge(with_weights_at(tmp_path / "big.onnx", "big.bin"), models[1], losses / "soft", tmp_path / "scorer.onnx")
    (weights,) = weights_of(out)
    assert main(["verify", str(out)]) == 0
    assert f"its weights in {weights}" in capsys.readouterr().out

    def fails(path, data, message):
        whole = path.read_bytes()
        path.write_bytes(data)
        assert main(["verify", str(out)]) == 2
        assert re.search(message, capsys.readouterr().err)
        path.write_bytes(whole)

    whole = weights.read_bytes()
    fails(weights, whole[:-1] + bytes([whole[-1] ^ 1]), "expected weights whose SHA-256 begins with [0-9a-f]{16} in ")
    text = out.read_bytes()
    fails(out, text.replace(b"teacher", b"taecher", 1), "expected .*scorer.onnx")
    fails(out, models[0].read_bytes(), "expected a file that `pykd merge` wrote")
    weights.rename(tmp_path / "elsewhere")
    assert main(["verify", str(out)]) == 2
    assert "merge again" in capsys.readouterr().err


def test_weights_of_the_scorer_before_do_not_stay_behind(tmp_path, models, losses):
    out, others = tmp_path / "scorer.onnx", tmp_path / "scorer.onnx.data"
    others.write_bytes(b"of somebody else")
    big = [with_weights_at(tmp_path / f"big{seed}.onnx", f"big{seed}.bin", seed) for seed in (0, 1)]
    for teacher, count in ((models[0], 0), (big[0], 1), (big[0], 1), (big[1], 1), (models[0], 0)):
        merge(teacher, models[1], losses / "soft", out)
        assert len(weights_of(out)) == count
        scored(out, {"pixels": PIXELS})
    assert others.read_bytes() == b"of somebody else"


@pytest.mark.parametrize("step", range(4))
def test_a_merge_that_dies_anywhere_leaves_a_scorer_and_its_weights(tmp_path, models, losses, monkeypatch, step):
    """Before each rename, and after the last one: the old scorer or the new one, with the weights of its own."""
    out, feeds = tmp_path / "scorer.onnx", {"pixels": PIXELS}
    big = [with_weights_at(tmp_path / f"big{seed}.onnx", f"big{seed}.bin", seed) for seed in (0, 2)]
    want = [scored(merge(teacher, models[1], losses / "soft", out), feeds)["loss_per_sample"] for teacher in big[::-1]]
    steps = 0

    class Died(BaseException):
        pass

    def dying(call):
        def wrapped(*arguments, **settings):
            nonlocal steps
            steps += 1
            if steps > step:
                raise Died
            return call(*arguments, **settings)

        return wrapped

    with monkeypatch.context() as context:
        context.setattr(os, "replace", dying(os.replace))
        context.setattr(Path, "unlink", dying(Path.unlink))  # nothing is tidied up by a process that is dead
        with pytest.raises(Died) if step < 3 else contextlib.nullcontext():
            merge(big[1], models[1], losses / "soft", out)
    got = scored(out, feeds)["loss_per_sample"]
    np.testing.assert_array_equal(got, want[1] if step < 2 else want[0])
    for left in tmp_path.glob("scorer.onnx*.writing"):  # as the next merge says
        left.unlink()
    merge(big[1], models[1], losses / "soft", out)
    np.testing.assert_array_equal(scored(out, feeds)["loss_per_sample"], want[0])
    assert len(weights_of(out)) == (1 if step != 2 else 2), "the next merge takes over what is the same"


def test_an_empty_weight_outside_of_the_file(tmp_path, models, losses):
    path = model(tmp_path / "empty.onnx")
    loaded = onnx.load(path)
    loaded.graph.node.append(helper.make_node("Concat", ["all", "none"], ["logits"], axis=0))
    loaded.graph.node[1].output[0] = "all"
    none = loaded.graph.initializer.add(name="none", data_type=TensorProto.FLOAT, dims=[0, CLASSES])
    none.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "none.bin"), ("offset", "0"), ("length", "0")):
        none.external_data.add(key=key, value=value)
    (tmp_path / "none.bin").touch()
    onnx.save(loaded, path)
    feeds = {"pixels": PIXELS}
    want = divergence(logits_of(path, feeds), logits_of(models[1], feeds))
    check(tmp_path / "scorer.onnx", path, models[1], losses / "soft", feeds, want)


def test_links_to_files_beside_each_other(tmp_path, models, losses):
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    with_weights_at(tmp_path / "blobs" / "a.onnx", "weights.bin")
    teacher = tmp_path / "snapshot" / "model.onnx"
    teacher.symlink_to(tmp_path / "blobs" / "a.onnx")
    (tmp_path / "snapshot" / "weights.bin").symlink_to(tmp_path / "blobs" / "weights.bin")
    feeds = {"pixels": PIXELS}
    want = divergence(logits_of(teacher, feeds), logits_of(models[1], feeds))
    check(tmp_path / "scorer.onnx", teacher, models[1], losses / "soft", feeds, want)
    # Elsewhere is elsewhere.
    (tmp_path / "snapshot" / "weights.bin").unlink()
    (tmp_path / "blobs" / "weights.bin").rename(tmp_path / "weights.bin")
    (tmp_path / "snapshot" / "weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="expected the weight weights in a file beside its model"):
        merge(teacher, models[1], losses / "soft", tmp_path / "scorer.onnx")


def test_an_input_named_as_a_tensor_with_its_prefix(tmp_path, models, losses):
    teacher = model(tmp_path / "prefixed.onnx", inputs="teacher/logits")
    with pytest.raises(
        ValueError, match="expected models without inputs named as their tensors .* got teacher/logits; rename"
    ):
        merge(teacher, models[1], losses / "soft", tmp_path / "scorer.onnx")


def test_an_output_that_is_no_tensor(tmp_path, models, losses):
    loaded = onnx.load(model(tmp_path / "sequence.onnx"))
    loaded.graph.node.append(helper.make_node("SequenceConstruct", ["logits"], ["list"]))
    del loaded.graph.output[:]
    loaded.graph.output.append(helper.make_tensor_sequence_value_info("list", TensorProto.FLOAT, None))
    onnx.save(loaded, tmp_path / "sequence.onnx")
    with pytest.raises(
        ValueError, match="expected teacher:list to be a tensor, as teacher_logits is, got sequence; connect"
    ):
        merge(tmp_path / "sequence.onnx", models[1], losses / "soft", tmp_path / "scorer.onnx")


def test_three_sessions_take_parameters_and_widen_bfloat16(tmp_path, models, losses):
    half = model(tmp_path / "half.onnx", dtype=TensorProto.BFLOAT16, seed=1)
    feeds = {"pixels": PIXELS, "temperature": np.array(3.0, np.float32)}
    got = Sessions(models[0], half, losses / "soft")(feeds)["loss_per_sample"]
    out = merge(models[0], half, losses / "soft", tmp_path / "scorer.onnx")
    np.testing.assert_array_equal(got, scored(out, feeds)["loss_per_sample"])


def test_halves_are_widened(tmp_path, models, losses):
    half = model(tmp_path / "half.onnx", dtype=TensorProto.FLOAT16, seed=1)
    feeds = {"pixels": PIXELS}
    want = divergence(logits_of(models[0], feeds), logits_of(half, feeds))
    check(tmp_path / "scorer.onnx", models[0], half, losses / "soft", feeds, want)
    with pytest.raises(
        ValueError,
        match="expected teacher:logits to hold float16 as teacher_logits does, got float32; export the loss with dtype",
    ):
        merge(models[0], half, losses / "half", tmp_path / "scorer.onnx")


def test_inputs_are_one_by_their_name_or_as_told(tmp_path, models, losses):
    other = model(tmp_path / "other.onnx", inputs="images", seed=1)
    feeds = {"pixels": PIXELS, "images": PIXELS[::-1].copy()}
    want = divergence(logits_of(models[0], {"pixels": PIXELS}), logits_of(other, {"images": feeds["images"]}))
    check(tmp_path / "scorer.onnx", models[0], other, losses / "soft", feeds, want)
    want = divergence(logits_of(models[0], {"pixels": PIXELS}), logits_of(other, {"images": PIXELS}))
    check(
        tmp_path / "scorer.onnx",
        models[0],
        other,
        losses / "soft",
        {"pixels": PIXELS},
        want,
        share={"student:images": "teacher:pixels"},
    )
    apart = {"teacher/pixels": PIXELS, "student/pixels": feeds["images"]}
    want = divergence(logits_of(models[0], {"pixels": PIXELS}), logits_of(models[1], {"pixels": feeds["images"]}))
    check(tmp_path / "scorer.onnx", *models, losses / "soft", apart, want, separate=["pixels"])


def test_what_does_not_fit_says_what_to_write(tmp_path, models, losses):
    out = tmp_path / "scorer.onnx"
    wide = model(tmp_path / "wide.onnx", classes=CLASSES + 1)
    labels = model(tmp_path / "labels.onnx", inputs="student_logits")
    (tmp_path / "text.onnx").write_text("no model at all")
    for error, message, arguments in (
        (
            ValueError,
            "expected one length of the axis 'classes', got 6 of teacher:logits and 5 of student:logits",
            (wide, models[1], losses / "soft"),
        ),
        (
            ValueError,
            "expected a loss with a value per sample, got one without; export it with kind='score'",
            (*models, losses / "mean"),
        ),
        (
            FileNotFoundError,
            "expected the teacher in .*none.onnx, got no such file",
            (tmp_path / "none.onnx", models[1], losses / "soft"),
        ),
        (
            ValueError,
            "expected the student to be an ONNX model, got .*text.onnx",
            (models[0], tmp_path / "text.onnx", losses / "soft"),
        ),
        (ValueError, "expected the loss to be a file that pykd.export wrote", (*models, models[0])),
        (
            ValueError,
            "got 'student_logits' in the teacher and in the loss; rename that of the model",
            (labels, models[1], losses / "soft"),
        ),
    ):
        with pytest.raises(error, match=message):
            merge(*arguments, out)
    for message, arguments in (
        (
            "expected an output of a model \\(teacher:logits, student:logits\\), got 'student:scores'",
            {"connect": {"student:scores": "student_logits"}},
        ),
        (
            "expected an input of the loss \\(student_logits, teacher_logits\\), got 'logits'",
            {"connect": {"student:logits": "logits"}},
        ),
        (
            "got nothing for student_logits; write --connect student:logits=student_logits",
            {"connect": {"student:logits": "teacher_logits"}},
        ),
        ("expected the names of inputs that both models have \\(pixels\\), got images", {"separate": ["images"]}),
        ("expected an input of a model", {"share": {"student:images": "teacher:pixels"}}),
        ("expected another file than the models, the loss and", {"out": models[0]}),
    ):
        with pytest.raises(ValueError, match=message):
            merge(*models, losses / "soft", **{"out": out, **arguments})
    assert not out.exists()


def test_the_command(tmp_path, models, losses, capsys):
    out = tmp_path / "scorer.onnx"
    arguments = [
        "merge",
        "--teacher",
        str(models[0]),
        "--student",
        str(models[1]),
        "--loss",
        str(losses / "soft"),
        "-o",
        str(out),
    ]
    assert (
        main([*arguments, "--connect", "student:logits=student_logits", "--connect", "teacher:logits=teacher_logits"])
        == 0
    )
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert scored(out, {"pixels": PIXELS})["loss_per_sample"].shape == (ROWS,)
    assert main([*arguments, "--connect", "student_logits"]) == 2
    assert re.search("expected --connect with a name on each side of =, got 'student_logits'", capsys.readouterr().err)
    described = [p.value for p in onnx.load(out).metadata_props if p.key == "pykd.scorer"]
    assert len(described) == 1 and '"student_logits": "student:logits"' in described[0]
    with pytest.raises((ValueError, RuntimeError)):  # it is no loss
        pykd.load(out)


def test_what_two_nodes_leave_out_is_no_link_between_them():
    dead = helper.make_node("Dropout", ["x"], ["", "mask"])
    alive = helper.make_node("Clip", ["x", "", "highest"], ["y"])
    assert merging._needed([dead, alive], ["y"]) == [alive]


# ---- Rows that are infinite ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "dtype"), [(13, TensorProto.FLOAT), (18, TensorProto.FLOAT), (18, TensorProto.FLOAT16)]
)
def test_infinite_rows_have_no_score_though_the_loss_gives_one(tmp_path, opset, dtype):
    """A hinge gives 0 where the student is +∞; `pykd score` calls such a row infinite."""

    def saved(name, nodes, inputs, outputs, initializers=(), metadata=None):
        graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        if metadata is not None:
            made.metadata_props.add(key="pykd", value=json.dumps(metadata))
        onnx.save(made, tmp_path / name)
        return tmp_path / name

    def rows(name):
        return helper.make_tensor_value_info(name, dtype, ["batch", CLASSES])

    as_it_is = [helper.make_node("Identity", ["rows"], ["logits"])]
    role = saved("model.onnx", as_it_is, [rows("rows")], [rows("logits")])
    hinge = [
        helper.make_node("Cast", ["teacher_logits"], ["t"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["student_logits"], ["s"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["t", "s"], ["ahead"]),
        helper.make_node("Relu", ["ahead"], ["short"]),
        helper.make_node("ReduceSum", ["short", "last"], ["loss_per_sample"], keepdims=0),
    ]
    described = {"inputs": [
        {"name": f"{side}_logits", "axes": ["batch", "classes"], "dtype": "float16" if dtype == TensorProto.FLOAT16 else "float32"}
        for side in merging.ROLES
    ]}  # fmt: skip
    score = helper.make_tensor_value_info("loss_per_sample", TensorProto.FLOAT, ["batch"])
    sides = [rows("student_logits"), rows("teacher_logits")]
    loss = saved("loss.onnx", hinge, sides, [score], [numpy_helper.from_array(np.array([1]), "last")], described)
    teacher, student = np.zeros((2, 6, CLASSES), helper.tensor_dtype_to_np_dtype(dtype))
    student[0, 0] = student[1, 2] = student[4, 1] = -np.inf
    student[1, 3] = teacher[2, 0] = np.inf
    student[3], teacher[4] = np.nan, -np.inf
    student[5] = -1
    want = [np.inf, np.nan, np.nan, np.nan, np.nan, CLASSES]  # an infinite score is told as one; one −∞ masks a class
    feeds = {"teacher/rows": teacher, "student/rows": student}
    out = merge(role, role, loss, tmp_path / "scorer.onnx", separate=["rows"])
    np.testing.assert_array_equal(scored(out, feeds)["loss_per_sample"], want)
    np.testing.assert_array_equal(Sessions(role, role, loss, separate=["rows"])(feeds)["loss_per_sample"], want)
