"""Exported files refuse tensors whose axes of one name differ in length, and empty ones, in any session."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import pykd
from pykd.export import onnx_files
from pykd.export.verification import _onnx_reference
from tests.conftest import forms_of_inputs

FILES = {"value": "loss.onnx", "gradient": "loss.grad.onnx"}


def models(subject, kernels, exported):
    """The serialised models of a subject; those that every export has, or made here."""
    if kernels == "auto" or not any(part.loss.has_kernel() for part in parts(subject)):
        folder = exported(subject)
        return {kind: (folder / name).read_bytes() for kind, name in FILES.items()}
    given = (subject.layouts, subject.optional)
    graph = subject.composition.graph(*given, check=False)
    fused = subject.composition.graph(*given, check=False, fused=True)
    built = onnx_files.build(subject.composition, graph, fused, "float32", kernels)
    return {kind: model.SerializeToString() for kind, model in built.items()}


def parts(subject):
    return [part for term in subject.composition.named_terms for part in term.parts]


def session(data, kernels=False):
    options = onnxruntime.SessionOptions()
    if kernels:
        options.register_custom_ops_library(pykd.onnxruntime_ops_path())
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(data, options)
    return lambda inputs: opened.run(["loss"], {name: tensor.numpy() for name, tensor in inputs.items()})[0]


def session_with_kernels(data):
    return session(data, kernels=True)


def reference(data):
    run = _onnx_reference(data)
    return lambda inputs: run(inputs, {})["loss"]


def is_refused(run, inputs):
    """Whether it ends in an error, or a NaN."""
    try:
        with np.errstate(all="ignore"):
            return bool(np.isnan(float(run(inputs))))
    except Exception:  # each runtime has errors of its own
        return True


def draw(subject, sizes):
    return subject.draw(sizes, seed=1, dtype=torch.float32)


def mismatches(subject):
    """Inputs of which one has another length along an axis that others have, too; and inputs with an empty axis."""
    specs = subject.graph().signature.inputs
    axes = dict.fromkeys(axis for spec in specs.values() for axis in spec.names)
    for axis in axes:
        having = [name for name, spec in specs.items() if axis in spec.names]
        for others, own in ((3, 1), (1, 3), (3, 2)):
            base = dict.fromkeys(axes, 3) | {axis: others}
            right, wrong = draw(subject, base), draw(subject, base | {axis: own})
            for name in having if len(having) > 1 else ():
                if right[name].shape != wrong[name].shape:  # some lengths follow from others
                    yield f"{name}: {axis} {own}, others {others}", right | {name: wrong[name]}
        one = draw(subject, dict.fromkeys(axes, 1) | {axis: 2})
        empty = {
            name: tensor[tuple(slice(0, 0 if own == axis else None) for own in specs[name].names)]
            for name, tensor in one.items()
        }
        yield f"{axis} 0", empty
    for first in specs:  # as many elements, in another order
        names = specs[first].names
        if len(names) > 1:
            base = dict.fromkeys(axes, 3) | {names[0]: 2}
            tensors = draw(subject, base)
            if tensors[first].shape[0] == tensors[first].shape[1]:  # a length that follows from others
                continue
            if any(first != name and spec.names[:2] == names[:2] for name, spec in specs.items()):
                yield f"{first}: transposed", tensors | {first: tensors[first].transpose(0, 1).contiguous()}


def files():
    """The forms of inputs, with nodes for kernels where those make another file."""
    for form in forms_of_inputs():
        for kernels in ("off", "auto") if any(part.loss.has_kernel() for part in parts(form)) else ("off",):
            yield pytest.param(form, kernels, id=f"{form}-{kernels}")


@pytest.mark.slow
@pytest.mark.parametrize(("form", "kernels"), list(files()))
def test_lengths_that_differ_and_empty_axes_are_refused(form, kernels, exported):
    for kind, data in models(form, kernels, exported).items():
        for open_file in (session, reference if kernels == "off" else session_with_kernels):
            run = open_file(data)
            assert np.isfinite(float(run(draw(form, {}))))
            taken = [what for what, inputs in mismatches(form) if not is_refused(run, inputs)]
            assert not taken, f"{open_file.__name__}, {kind}: computed a loss for {taken}"


def test_the_checks_come_first_and_are_used(exported):
    form = forms_of_inputs()[-1]
    for data in models(form, "off", exported).values():
        graph = onnx.load_from_string(data).graph
        produced = {output for node in graph.node for output in node.output if "_checked_" in output}
        used = {name for node in graph.node for name in node.input}
        assert produced and produced <= used
