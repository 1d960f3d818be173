"""The loader's limits against what is exported: enough for every loss, and not much more."""

import re
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import pykd
from pykd import _core, integrity
from pykd.composition import MAX_PARTS
from pykd.export import tracing
from tests.conftest import subjects

ROOT = Path(__file__).parents[1]


def expanded(model):
    """How many nodes a model has with its functions in place."""
    sizes = {}
    for function in model.functions:
        sizes[function.name] = sum(sizes[n.op_type] if n.domain == "pykd" else 1 for n in function.node)
    return sum(sizes[n.op_type] if n.domain == "pykd" else 1 for n in model.graph.node)


@pytest.fixture(scope="module")
def models(exported):
    return [
        onnx.load(exported(subject, dtype) / name)
        for subject in subjects()
        for dtype in ("float32", "float64", "float16", "bfloat16")
        for name in ("loss.onnx", "loss.grad.onnx")
    ]


@pytest.mark.slow
def test_no_product_of_float64_reads_a_transpose(exported):
    """ONNX Runtime 1.21 to 1.24 would fuse the two, and have no float64 kernel for what comes out."""
    products = 0
    for subject in subjects():
        for name in ("loss.onnx", "loss.grad.onnx"):
            nodes = onnx.load(exported(subject, "float64") / name).graph.node
            transposed = {node.output[0] for node in nodes if node.op_type == "Transpose"}
            for node in nodes:
                if node.op_type == "MatMul":
                    products += 1
                    assert transposed.isdisjoint(node.input), (subject.name, name, node.name)
    assert products > 0


@pytest.mark.slow
def test_a_composition_of_the_largest_losses_is_within_the_limit_of_nodes(models):
    limit = int(re.search(r"kMaxNodes = (\d+)", (ROOT / "cpp/runtime/artefact/onnx_contents.h").read_text()).group(1))
    largest = max(expanded(model) for model in models if len(model.functions) <= 1)
    assert largest * MAX_PARTS < limit < 2 * largest * MAX_PARTS


def sealed(model):
    return integrity.seal_onnx(model.SerializeToString(deterministic=True))


@pytest.fixture
def model(exported):
    """loss.onnx of a soft target in standard operators: float64 files have no kernels."""
    subject = next(s for s in subjects() if s.name == "soft_target[temperature=2.0]")
    return onnx.load(exported(subject, "float64") / "loss.onnx")


def test_a_file_at_the_limit_of_nodes_opens_in_seconds(model):
    constant = numpy_helper.from_array(np.zeros(()), "zero")
    model.graph.initializer.append(constant)
    last = model.graph.input[0].name
    for i in range(59_000):
        model.graph.node.append(helper.make_node("Neg", [last], [f"n{i}"]))
        last = f"n{i}"
    before = time.perf_counter()
    pykd.load(sealed(model), engine="onnxruntime")
    assert time.perf_counter() - before < 30
    for i in range(1_000):
        model.graph.node.append(helper.make_node("Neg", [last], [f"m{i}"]))
    with pytest.raises(ValueError, match="at most 60000 nodes"):
        pykd.load(sealed(model), engine="onnxruntime")


BOMBS = {
    "ConstantOfShape": lambda: [helper.make_node("ConstantOfShape", ["shape"], ["bomb"])],
    "Expand": lambda: [helper.make_node("Expand", ["one", "shape"], ["bomb"])],
    "Tile": lambda: [helper.make_node("Tile", ["one", "shape"], ["bomb"])],
    "Range": lambda: [helper.make_node("Range", ["zero", "many", "step"], ["bomb"])],
    "MatMul": lambda: [helper.make_node("MatMul", ["column", "row"], ["bomb"])],
    "Add": lambda: [helper.make_node("Add", ["column", "row"], ["bomb"])],
    "Pad": lambda: [helper.make_node("Pad", ["one", "shape"], ["bomb"])],
    "a long Concat": lambda: [helper.make_node("Concat", ["row"] * 200, ["bomb"], axis=0)],
    # Not constant, but its shape is known when the file is opened.
    "Expand of an input": lambda: [
        helper.make_node("Expand", ["temperature", "shape"], ["large"]),
        helper.make_node("Shape", ["large"], ["same"]),
        helper.make_node("Expand", ["one", "same"], ["bomb"]),
    ],
}


@pytest.mark.parametrize("nodes", BOMBS.values(), ids=BOMBS)
def test_bombs_of_constants_do_not_load(model, nodes):
    arrays = {
        "shape": np.array([30_000, 30_000]),
        "one": np.ones((1, 1)),
        "zero": np.array(0),
        "many": np.array(10**9),
        "step": np.array(1),
        "column": np.ones((50_000, 1)),
        "row": np.ones((1, 50_000)),
    }
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model.graph.node.extend(nodes())
    before = time.perf_counter()
    with pytest.raises(ValueError, match="expected "):
        pykd.load(sealed(model), engine="onnxruntime")
    with pytest.raises(ValueError, match="expected "):
        _core.check_onnx(sealed(model))
    assert time.perf_counter() - before < 1


def test_check_onnx_needs_no_engine(model):
    _core.check_onnx(sealed(model))
    with pytest.raises(ValueError, match="checksum"):
        _core.check_onnx(sealed(model)[:-1] + b"x")
    with pytest.raises(ValueError, match="an empty one"):
        _core.check_onnx(b"")
    with pytest.raises(ValueError, match="a ZIP archive"):
        _core.check_onnx(b"PK\x03\x04")


def test_numbers_in_float64_files_are_those_of_the_formula():
    """The exporter would write them as float32: 2e-308 would be 0, and a vector of length 0 not below it."""

    def formula(x):
        chosen = torch.where(x < 2.2e-308, 0.3 * x + 0.7, 0.6).masked_fill(x == 0.1, 0.4)
        filled = torch.full_like(x, 0.2) + torch.full((3,), 0.8, dtype=x.dtype)
        return (chosen.sum() + (x >= 0.9).to(x.dtype).sum() + filled.sum(),)

    model = tracing.to_onnx(formula, {"x": torch.ones(3, dtype=torch.float64)}, ["loss"])
    found = [float(number) for each in model.graph.initializer for number in numpy_helper.to_array(each).ravel()]
    assert {2.2e-308, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9} <= set(found), found
