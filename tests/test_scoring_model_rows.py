"""`pykd teacher --model`: an ONNX model is run over rows of files, and its outputs are written as those of a file are."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from pykd.command_line import main
from pykd.scoring.model_rows import open_model
from pykd.scoring.sources import open_array

SAMPLES, TOKENS, WIDTH, CLASSES = 45, 3, 4, 6
RANDOM = np.random.default_rng(9)
HEAD = RANDOM.normal(size=(WIDTH, CLASSES)).astype(np.float32)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save_model(batch="samples", tokens=TOKENS, two_outputs=False, cut=False):
    """logits = pixels · head + shift, per token; ``cut``: of as many tokens as the first shift says."""
    info = helper.make_tensor_value_info
    inputs = [info("pixels", TensorProto.FLOAT, [batch, tokens, WIDTH]), info("shift", TensorProto.INT64, [batch])]
    nodes = [
        helper.make_node("MatMul", ["pixels", "head"], ["product"]),
        helper.make_node("Cast", ["shift"], ["shift_float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["shift_float", "axes"], ["shift_wide"]),
        helper.make_node("Add", ["product", "shift_wide"], ["logits"]),
    ]
    outputs = [info("logits", TensorProto.FLOAT, [batch, "some" if cut else tokens, CLASSES])]
    if two_outputs:
        nodes.append(helper.make_node("Neg", ["logits"], ["others"]))
        outputs.append(info("others", TensorProto.FLOAT, [batch, tokens, CLASSES]))
    if cut:
        nodes[-1].output[0] = "whole"
        nodes.append(helper.make_node("Slice", ["shift", "zero", "one", "zero"], ["last"]))
        nodes.append(helper.make_node("Slice", ["whole", "zero", "last", "one"], ["logits"]))
    ones = [numpy_helper.from_array(np.array([i]), name) for i, name in enumerate(("zero", "one"))]
    constants = [*ones, numpy_helper.from_array(HEAD, "head"), numpy_helper.from_array(np.array([1, 2]), "axes")]
    graph = helper.make_graph(nodes, "model", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    Path("model.onnx").write_bytes(model.SerializeToString())


def draw():
    pixels = RANDOM.normal(size=(SAMPLES, TOKENS, WIDTH)).astype(np.float32)
    shift = np.arange(SAMPLES, dtype=np.int32)  # widened to int64
    np.save("pixels.npy", pixels)
    np.save("shift.npy", shift)
    return (pixels @ HEAD + shift[:, None, None]).reshape(-1, CLASSES)


INPUTS = {"pixels": "pixels.npy", "shift": "shift.npy"}


@pytest.mark.parametrize("fixed", [None, 8])
def test_rows_of_a_model_are_its_outputs(fixed):
    save_model(batch=fixed or "samples")
    logits = draw()
    source = open_model("model.onnx", INPUTS, batch=7)
    assert (source.rows, source.width, source.dtype) == (SAMPLES * TOKENS, CLASSES, np.dtype(np.float32))
    for start, rows in ((0, 10), (0, 500), (50, 11), (SAMPLES * TOKENS - 1, 4)):
        blocks = [load().values for load in source.blocks(start, rows)]
        assert all(len(block) == rows for block in blocks[:-1])
        np.testing.assert_allclose(np.concatenate(blocks), logits[start:], rtol=1e-5, atol=1e-5)


def test_a_model_is_written_as_a_file_of_its_outputs_is():
    save_model()
    np.save("teacher.npy", draw())
    call = ["teacher", "--keep", "3", "--dtype", "float32"]
    assert main([*call, "--teacher", "teacher.npy", "--out", "a.safetensors"]) == 0
    inputs = [word for pair in INPUTS.items() for word in ("--input", "=".join(pair))]
    assert main([*call, "--model", "model.onnx", *inputs, "--batch", "4", "--out", "b.safetensors"]) == 0
    one, two = load_file("a.safetensors"), load_file("b.safetensors")
    np.testing.assert_array_equal(one["ids"], two["ids"])
    for name in ("logprobs", "log_tail", "lse"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-5)


def test_samples_come_from_any_kind_of_file():
    array = RANDOM.normal(size=(SAMPLES, 2, 3, WIDTH)).astype(np.float32)
    np.save("a.npy", array)
    np.savez_compressed("b.npz", array)
    save_file({"x": array}, "c.safetensors")
    for where in ("a.npy", "b.npz", "c.safetensors"):
        source = open_array(where, "input", 4)
        assert (source.rows, source.shape) == (SAMPLES, array.shape)
        got = [load().values.reshape(-1, 2, 3, WIDTH) for load in source.blocks(5, 9)]
        assert [len(part) for part in got] == [9, 9, 9, 9, 4]
        np.testing.assert_array_equal(np.concatenate(got), array[5:])
    flat = array.reshape(SAMPLES, -1)
    parquet.write_table(
        pa.table({"x": pa.FixedSizeListArray.from_arrays(flat.reshape(-1), flat.shape[1])}), "d.parquet"
    )
    source = open_array("d.parquet", "input", 2)
    np.testing.assert_array_equal(np.concatenate([load().values for load in source.blocks(0, 20)]), flat)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "pixels=pixels.npy"], "expected files for the inputs pixels, shift, got pixels; pass --input NAME=FILE for each"),
        (["--input", "pixels"], "expected --input NAME=FILE, each name once, got pixels"),
        (["--input", "pixels=pixels.npy", "--input", "shift=few.npy"], "expected as many samples in the input shift few.npy as in the other inputs, 45, got 3 for shift"),
        (["--input", "pixels=wide.npy", "--input", "shift=shift.npy"], r"expected tensor\(float\) for the input pixels, got float64"),
        (["--input", "pixels=flat.npy", "--input", "shift=shift.npy"], r"expected 3 axes .* in the input pixels flat.npy, got the shape \(45, 12\)"),
        (["--input", "pixels=long.npy", "--input", "shift=shift.npy"], "expected the output logits of model.onnx for these inputs, got .*; check their shapes"),
        (["--output", "none"], "expected one output of floating-point numbers of model.onnx, got none"),
        (["--model", "no.onnx"], "expected a model at no.onnx, got no file there"),
        (["--model", "pixels.npy"], "expected a model that ONNX Runtime loads at pixels.npy, got "),
        (["--teacher", "pixels.npy"], "expected either --teacher FILE or --model FILE.onnx, got both or none"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_model_is_told(arguments, message, capsys):
    save_model()
    draw()
    pixels = np.load("pixels.npy")
    np.save("few.npy", np.arange(3))
    np.save("wide.npy", pixels.astype(np.float64))
    np.save("flat.npy", pixels.reshape(SAMPLES, -1))
    np.save("long.npy", np.concatenate([pixels, pixels], axis=2))
    assert main(["teacher", "--model", "model.onnx", "--out", "t.safetensors", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(Path().glob("t.safetensors*"))


def test_of_several_outputs_one_is_named():
    save_model(two_outputs=True)
    logits = draw()
    with pytest.raises(ValueError, match=r"got 2 \(there: logits, others\); name one with --output"):
        open_model("model.onnx", INPUTS)
    source = open_model("model.onnx", INPUTS, "others")
    np.testing.assert_allclose(next(source.blocks(0, 500))().values, -logits, rtol=1e-5, atol=1e-5)


def test_outputs_of_different_lengths_are_told():
    """Nobody could tell which row is whose."""
    save_model(cut=True)
    draw()
    np.save("shift.npy", np.repeat([3, 2], [40, 5]))
    with pytest.raises(ValueError, match=r"expected outputs of one shape .*, \(3, 6\), got \(2, 6\); pad the samples"):
        [load() for load in open_model("model.onnx", INPUTS, batch=20).blocks(0, 100)]
