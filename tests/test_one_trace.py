"""The exporter hands its own trace to torch.onnx; where that cannot be it has it traced again. Both write the same file."""

import hashlib
import json
import logging
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import pykd
from pykd.composition import as_composition
from pykd.export import onnx_files, tracing
from tests.conftest import subjects
from tests.make_vectors import DTYPES


def computed(model, axes):
    """What every output of a model is computed by, as a digest. Lengths count by the name of their axis: which of the
    inputs that have it they are read from is nobody's business."""

    def digest(*parts):
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def run(nodes, values, lengths):
        for node in nodes:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Shape" and attributes["start"] + 1 == attributes.get("end"):
                axis = lengths.get((node.input[0], attributes["start"]))
                if axis is not None:
                    values[node.output[0]] = f"length of {axis}"
                    continue
            given = {
                name: numpy_helper.to_array(value).tobytes() if isinstance(value, onnx.TensorProto) else value
                for name, value in sorted(attributes.items())
            }
            inputs = [values[name] if name else "" for name in node.input]
            for at, name in enumerate(node.output):
                values[name] = digest(node.domain, functions.get(node.op_type, node.op_type), inputs, given, at)

    functions = {}
    for function in model.functions:
        values = {name: name for name in function.input}
        run(function.node, values, {})
        functions[function.name] = digest(function.name, [values[name] for name in function.output])
    values = {item.name: item.name for item in model.graph.input}
    for item in model.graph.initializer:
        array = numpy_helper.to_array(item)
        values.setdefault(item.name, digest(str(array.dtype), array.shape, array.tobytes()))
    run(model.graph.node, values, {(name, at): axis for name, names in axes.items() for at, axis in enumerate(names)})
    return {item.name: values[item.name] for item in model.graph.output}


def traced(composition, graph, dtype="float32"):
    """What the outputs of the plain formulas are computed by, and how many nodes that takes."""
    model, _ = onnx_files._export(composition, graph, dtype)
    axes = {name: spec.names for name, spec in graph.signature.inputs.items()}
    return computed(model, axes), len(model.graph.node)


def not_called(*_):
    raise AssertionError("the other route was taken")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "dtype"),
    [  # lengths that are products, numbers that are no float32, tokens as rows, several terms
        ("mk_mmd[default]", "float32"),
        ("hard_target[label_smoothing=0.1,labels:batch,+class_weight]", "float64"),
        ("soft_target[temperature=3.0,student_logits:batch×tokens×classes,+sample_weight]", "float32"),
        ("two-parts-two-features", "float32"),
    ],
)
def test_both_routes_write_the_same_graph(one, dtype, monkeypatch):
    (subject,) = (subject for subject in subjects() if subject.name == one)
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "retraced", not_called)
        once = traced(subject.composition, subject.graph(), dtype)
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "direct", not_called)
        again = traced(subject.composition, subject.graph(), dtype)
    assert once == again


@pytest.mark.slow
def test_no_loss_needs_a_second_trace(subject, exported):
    folders = [exported(subject, dtype) for dtype in DTYPES]
    assert not any(json.loads((folder / "vectors.json").read_text())["traced again"] for folder in folders)


@pytest.mark.parametrize("other", ["no such module", "another signature"])
def test_another_torch_writes_the_same_the_ordinary_way(other, monkeypatch, caplog):
    """A private interface of torch that is another one costs time and nothing else."""
    composition = as_composition(pykd.HardTarget())
    graph = composition.graph({"labels": "batch"}, check=False)
    before = traced(composition, graph)
    if other == "no such module":
        monkeypatch.setitem(sys.modules, "torch.onnx._internal.exporter._registration", None)
        tracing._registry.cache_clear()
    else:
        monkeypatch.setattr(tracing, "_Decomposed", lambda root, graph: None)
    with caplog.at_level(logging.INFO, "pykd.export"):
        after = traced(composition, graph)
    tracing._registry.cache_clear()
    assert any("twice more" in record.getMessage() for record in caplog.records)
    assert before == after


def in_place(x):
    return (x.clone().mul_(2.0).add_(1.0),)


def of_one_length(x):
    return (x + torch.ones(3),)


@pytest.mark.parametrize("function", [in_place, of_one_length])
def test_what_one_trace_cannot_carry_is_traced_again(function):
    with pytest.raises(ValueError, match="expected"):
        tracing.direct(function, (torch.randn(3),))
    model = tracing.to_onnx(function, {"x": torch.randn(3)}, ["y"])
    values = np.arange(3, dtype=np.float32)
    (got,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": values})
    np.testing.assert_array_equal(got, function(torch.tensor(values))[0].numpy())


def test_lengths_are_read_from_the_inputs():
    """Read off a tensor on the way, a length would wait for that tensor."""
    composition = as_composition(pykd.SoftTarget(temperature=2.0))
    graph = composition.graph(check=False)
    model, _ = onnx_files._export(composition, graph, "float32")
    read = {n.input[0] for n in model.graph.node if n.op_type == "Shape" and any(a.name == "end" for a in n.attribute)}
    assert read and read <= graph.signature.inputs.keys()
