"""The reference is tested as well: files that are wrong in one way each, and what verify() says of them.

A rule of the verification that is loosened (a limit, a size, an output that is not looked at) lets one of these files pass.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import pykd
from pykd import integrity
from pykd.export import metadata, torchscript, verification
from pykd.export.verification import LIMITS, Report, Row, errors, verify
from tests import make_vectors
from tests.conftest import Subject

BOTH = ("loss.onnx", "loss.grad.onnx")


def composition(**settings):
    """Two terms, parameters, and two inputs that receive a gradient."""
    return pykd.DistillationLoss(
        **{"logit_loss": "soft_entropy", "gamma": 0.5, "lambda2": 0.25, "tau": 2.0, "mode": "student_softening"}
        | settings
    )


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> Path:
    """Files as they should be."""
    return pykd.export(
        composition(),
        tmp_path_factory.mktemp("right") / "loss",
        layouts={"labels": "batch"},
        per_sample=True,
        kernels="off",
        progress=lambda line: None,
    )


@pytest.fixture
def folder(right, tmp_path) -> Path:
    """A copy of the right files."""
    return shutil.copytree(right, tmp_path / "loss")


def write(folder: Path, name: str, data: bytes) -> None:
    """A file of the folder, of which the manifest knows."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change(folder: Path, *edits, files=BOTH) -> None:
    """Makes edits of the ONNX files."""
    for name in files:
        model = onnx.load(folder / name)
        for edit in edits:
            edit(model)
        helper.set_model_props(model, {e.key: e.value for e in model.metadata_props if e.key == "pykd"})
        write(folder, name, integrity.seal_onnx(model.SerializeToString()))


def constant(model, value, dtype=np.float32) -> str:
    """The name of a number in the graph."""
    name = f"_wrong_{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
    return name


def node(model, operator: str, *inputs: str, **attributes) -> str:
    """The name of the output of one more node."""
    name = f"_wrong_node_{len(model.graph.node)}"
    model.graph.node.append(helper.make_node(operator, inputs, [name], name, **attributes))
    return name


def replace(output: str, computed):
    """An edit: the output becomes what ``computed`` makes, in the graph, of what it was."""

    def edit(model):
        if output not in [item.name for item in model.graph.output]:
            return
        for each in model.graph.node:
            for names in (each.input, each.output):
                names[:] = [f"_right_{name}" if name == output else name for name in names]
        made = computed(model, f"_right_{output}")
        model.graph.node.append(helper.make_node("Identity", [made], [output], f"_last_{output}"))

    return edit


def times(output: str, factor: float):
    """An edit: the output is multiplied."""
    return replace(output, lambda model, x: node(model, "Mul", x, constant(model, factor)))


def length(model, axis: int) -> str:
    """The batch (0) or the classes (1), as an int64 scalar."""
    return node(model, "Gather", node(model, "Shape", "student_logits"), constant(model, axis, np.int64))


def times_where(output: str, axis: int, size: int, factor: float):
    """An edit: the output is multiplied at one length of an axis."""

    def computed(model, x):
        here = node(model, "Equal", length(model, axis), constant(model, size, np.int64))
        return node(model, "Mul", x, node(model, "Where", here, constant(model, factor), constant(model, 1.0)))

    return replace(output, computed)


def plus_where(output: str, axis: int, size: int, amount: float):
    """An edit: something is added to the output at one length of an axis."""

    def computed(model, x):
        here = node(model, "Equal", length(model, axis), constant(model, size, np.int64))
        return node(model, "Add", x, node(model, "Where", here, constant(model, amount), constant(model, 0.0)))

    return replace(output, computed)


def times_length(output: str, axis: int):
    """An edit: the output is multiplied by the length of an axis."""

    def computed(model, x):
        return node(model, "Mul", x, node(model, "Cast", length(model, axis), to=onnx.TensorProto.FLOAT))

    return replace(output, computed)


def nan_at_the_largest(output: str):
    """An edit: one entry of the output is NaN, at least, and the others are as they were."""

    def computed(model, x):
        here = node(model, "Equal", x, node(model, "ReduceMax", x, keepdims=0))
        return node(model, "Where", here, constant(model, np.nan), x)

    return replace(output, computed)


def without(output: str, term: str, weight: float):
    """An edit: a weighted term is missing from the output."""
    return replace(
        output,
        lambda model, x: node(model, "Sub", x, node(model, "Mul", term, constant(model, weight))),
    )


def frozen(parameter: str, value: float):
    """An edit: the parameter stays at its value, whatever a call says."""

    def edit(model):
        name = constant(model, value)
        for each in model.graph.node:
            each.input[:] = [name if given == parameter else given for given in each.input]

    return edit


def other_default(parameter: str, value: float):
    """An edit: the parameter is another number where a call does not say it, and the file says so."""

    def edit(model):
        for item in model.graph.initializer:
            if item.name == parameter:
                item.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), parameter))
        entry = next(entry for entry in model.metadata_props if entry.key == "pykd")
        described = json.loads(entry.value)
        next(each for each in described["parameters"] if each["name"] == parameter)["default"] = value
        entry.value = json.dumps(described)

    return edit


def other_classes(output: str):
    """An edit: every class has the gradient of another; its size is as it was."""

    def computed(model, x):
        bounds = [constant(model, [n], np.int64) for n in (-1, np.iinfo(np.int64).min, 1, -1)]
        return node(model, "Slice", x, *bounds)

    return replace(output, computed)


def another_shape(output: str):
    """An edit: the output has an axis more."""
    return replace(output, lambda model, x: node(model, "Unsqueeze", x, constant(model, [0], np.int64)))


SLIGHTLY = 1 + 4e-4  # more than rounding makes of a float32 gradient
FIRST, SECOND = "grad_student_logits", "grad_student_logits_teacher_features"

# What is wrong, what is done to the files, and the columns of the report that have to say so; the other is right.
WRONG = {
    "the value by T²": ([times("loss", 4.0)], {"value"}),
    "the value by little more than rounding": ([times("loss", 1 + 1e-4)], {"value"}),
    "the value of a term": ([times("logit", 1 + 1e-4)], {"value"}),
    "the values per sample": ([times("loss_per_sample", 1 + 1e-4)], {"value"}),
    "the values per sample of a term": ([times("logit_per_sample", 1 + 1e-4)], {"value"}),
    "the values per sample in another shape": ([another_shape("hard_per_sample")], {"value", "gradient"}),
    "a term is missing": ([without("loss", "logit", 0.5)], {"value"}),
    "one value is NaN": (
        [nan_at_the_largest("loss_per_sample")],
        {"value", "gradient"},
    ),  # NaN differs in the two files
    "every gradient by N": ([times_length(FIRST, 0), times_length(SECOND, 0)], {"gradient"}),
    "the first gradient by N": ([times_length(FIRST, 0)], {"gradient"}),
    "the second gradient by N": ([times_length(SECOND, 0)], {"gradient"}),
    "the gradient by little more than rounding": ([times(FIRST, SLIGHTLY)], {"gradient"}),
    "small gradients by little more than rounding": ([times_where(FIRST, 0, 33, SLIGHTLY)], {"gradient"}),
    "the gradient's sign": ([times(SECOND, -1.0)], {"gradient"}),
    "no gradient": ([times(SECOND, 0.0)], {"gradient"}),
    "the gradients of other classes": ([other_classes(FIRST)], {"gradient"}),
    "the gradient in another shape": ([another_shape(FIRST)], {"value", "gradient"}),
    "one entry of a gradient is NaN": ([nan_at_the_largest(FIRST)], {"gradient"}),
    "a gradient is infinite": ([times(FIRST, np.inf)], {"gradient"}),
    "the value in a batch of 1": ([plus_where("loss", 0, 1, 1e-3)], {"value"}),
    "the value with 1 class": ([plus_where("loss", 1, 1, 1e-3)], {"value"}),
    "the value in an odd batch": ([plus_where("loss", 0, 33, 1e-3)], {"value"}),
    "the value in an even batch": ([plus_where("loss", 0, 8, 1e-3)], {"value"}),
    "the gradient in a batch of 1": ([times_where(FIRST, 0, 1, 2.0)], {"gradient"}),
    "the gradient with 1 class": ([plus_where(FIRST, 1, 1, 1e-3)], {"gradient"}),
    "a weight cannot be moved": ([frozen("logit_weight", 0.5)], {"value", "gradient"}),
    "a temperature cannot be moved": ([frozen("logit_temperature", 2.0)], {"value", "gradient"}),
    "the scale of the gradient is ignored": ([frozen("grad_scale", 1.0)], {"gradient"}),
    "a weight has another default": ([other_default("logit_weight", 0.75)], {"value", "gradient"}),
}


def disagreeing(report: Report) -> set[str]:
    """The columns that are beyond their limits, over all rows."""
    found = set()
    for row in report.rows:
        value, gradient = LIMITS[row.dtype]
        found |= {"value"} if row.value_error > value + row.value_room else set()
        found |= {"gradient"} if row.gradient_error > gradient + row.gradient_room else set()
    return found


def test_right_files_are_right(right):
    report = verify(right, trust=True)
    assert report.ok and disagreeing(report) == set(), str(report)
    assert {row.engine for row in report.rows} == {
        "torch.jit", "onnxruntime", "onnxruntime (C++)", "torchscript (C++)",
    }  # fmt: skip


@pytest.mark.parametrize(("edits", "columns"), WRONG.values(), ids=WRONG)
def test_a_file_that_is_wrong_is_refused(edits, columns, folder):
    change(folder, *edits)
    report = verify(folder, engines=("python",))
    assert not report.ok and disagreeing(report) == columns, str(report)


@pytest.mark.parametrize(
    "wrong", ["the value by little more than rounding", "the gradient by little more than rounding"]
)
def test_a_case_is_allowed_what_it_declares(wrong, folder, monkeypatch):
    """In verification and in the vectors of the C++ tests: with the settings of the case, in its type, and no other."""
    change(folder, *WRONG[wrong][0])
    declared = {"tolerance": {"float32": 20.0}, "why": "to see what it does"}
    part = composition().named_terms[1].parts[0].loss
    cases = type(part).cases
    for settings, allowed, ok in (
        ({**part.settings(), "reduction": "sum"}, declared, True),
        (part.settings(), {**declared, "tolerance": {"float16": 20.0}}, False),
        ({**part.settings(), "temperature": 1.5}, declared, False),
    ):
        monkeypatch.setattr(type(part), "cases", (*cases, pykd.Case(settings, **allowed)))
        assert verify(folder, engines=("python",)).ok == ok
        subject = Subject("any", composition(), {"labels": "batch"}, ())
        call = make_vectors.call(subject, 0, {}, "float32", per_sample=False)
        for limit, found in zip(LIMITS["float32"], call["tolerance"].values(), strict=True):
            assert 1 < found / limit < 2 if not ok else 20 < found / limit < 21


@pytest.mark.parametrize(
    "wrong", ["the value by little more than rounding", "the gradient by little more than rounding"]
)
def test_a_wrong_file_is_refused_in_the_runtime(wrong, folder):
    change(folder, *WRONG[wrong][0])
    report = verify(folder, engines=("runtime",))
    assert not report.ok and disagreeing(report) == WRONG[wrong][1], str(report)


@pytest.mark.parametrize("file", BOTH)
def test_the_two_files_have_to_give_the_same(file, folder):
    """To the last bit: within the limits is not enough."""
    change(folder, times("logit", 1 + 5e-7), files=[file])
    report = verify(folder, engines=("python",))
    assert not report.ok, str(report)
    # With one class the term is 0, times whatever.
    assert all(row.value_error == np.inf for row in report.rows if "classes 1 " not in f"{row.size} "), str(report)


@pytest.mark.parametrize(
    ("dtype", "value", "gradient"), [("float64", 1e-9, 1e-8), ("float16", 1e-4, 4e-3), ("bfloat16", 1e-4, 3e-2)]
)
def test_the_limits_are_those_of_the_type(dtype, value, gradient, tmp_path):
    right = tmp_path / "loss"
    loss = pykd.SoftTarget(temperature=2.0, form="kl")
    pykd.export(loss, right, dtype=dtype, kernels="off", progress=lambda line: None)
    compute = np.float64 if dtype == "float64" else np.float32
    types = {
        "float64": onnx.TensorProto.DOUBLE,
        "float16": onnx.TensorProto.FLOAT16,
        "bfloat16": onnx.TensorProto.BFLOAT16,
    }

    def more(model, x, share):
        """x + share · x: ONNX Runtime takes a product with 1 + 1e-9 out, as one with 1."""
        return node(model, "Add", x, node(model, "Mul", x, constant(model, share, compute)))

    def rounded(model, x):
        wide = node(model, "Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(compute)))
        return node(model, "Cast", more(model, wide, gradient), to=types[dtype])

    edits = {
        "value": replace("loss", lambda model, x: more(model, x, value)),
        "gradient": replace("grad_student_logits", rounded),
    }
    for column, edit in edits.items():
        wrong = shutil.copytree(right, tmp_path / column)
        change(wrong, edit)
        report = verify(wrong, engines=("python",))
        assert not report.ok and disagreeing(report) == {column}, str(report)


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ("python", {"tau": 2.001}),
        ("python", {"lambda2": 0.2505}),
        ("python", {"gamma": 0.501}),
        ("python", {"mode": None}),
        ("runtime", {"mode": None}),  # its defaults are those of the metadata
    ],
)
def test_a_wrong_program_is_refused(engine, settings, folder):
    """The TorchScript file of other settings, in the name of these."""
    graphs = [loss.graph({"labels": "batch"}, per_sample=True) for loss in (composition(), composition(**settings))]
    described = metadata.of_graph(composition(), graphs[0], "torchscript", "float", None)
    described["export_id"] = json.loads((folder / "manifest.json").read_text())["export_id"]
    torchscript.write(graphs[1], described, folder / "loss.pt")
    write(folder, "loss.pt", (folder / "loss.pt").read_bytes())
    for name in BOTH:
        (folder / name).unlink()
    report = verify(folder, engines=(engine,), trust=True)
    assert {row.engine for row in report.rows} == {"torch.jit" if engine == "python" else "torchscript (C++)"}
    assert not report.ok, str(report)


def test_a_program_that_nobody_trusts_is_not_run_and_nothing_is_claimed(folder):
    for name in BOTH:
        (folder / name).unlink()
    report = verify(folder)
    assert report.rows == () and not report.ok and any("loss.pt is a program" in line for line in report.missing)


def test_every_size_is_run_by_every_engine(right):
    report = verify(right, trust=True)
    by_engine = {}
    for row in report.rows:
        by_engine.setdefault(row.engine, []).append(row.size)
    assert len(by_engine) == 4
    for sizes in by_engine.values():
        lengths = [dict(zip(words[::2], map(int, words[1::2]), strict=True)) for words in map(str.split, sizes)]
        for axis in ("batch", "classes"):
            found = {length[axis] for length in lengths}
            assert 1 in found and any(n % 2 == 1 and n > 1 for n in found) and max(found) > 32, f"{axis}: {found}"


# ---- The measure --------------------------------------------------------------------------------

WANT = {"loss": np.array(2.0), "grad_student": np.array([[0.5, -0.25]])}
GOT = {"loss": torch.tensor(2.0), "grad_student": torch.tensor([[0.5, -0.25]])}


def test_errors_are_relative_to_what_is_wanted():
    assert errors(GOT, WANT) == (0.0, 0.0)
    assert errors({**GOT, "loss": torch.tensor(2.5)}, WANT) == (0.25, 0.0)
    assert errors({**GOT, "loss": torch.tensor(-2.0)}, WANT) == (2.0, 0.0)
    assert errors({**GOT, "grad_student": torch.tensor([[0.5, -0.5]])}, WANT) == (0.0, 0.5)
    small = {"loss": np.array(0.25), "grad_student": np.array([[0.0, 0.0]])}
    assert errors({"loss": torch.tensor(0.5), "grad_student": torch.tensor([[0.0, 0.0]])}, small) == (0.25, 0.0)
    gradient = errors({"loss": torch.tensor(0.25), "grad_student": torch.tensor([[0.0, 0.001]])}, small)[1]
    assert gradient == pytest.approx(0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_infinite_error(value):
    assert errors({**GOT, "loss": torch.tensor(value)}, WANT) == (np.inf, 0.0)
    assert errors({**GOT, "grad_student": torch.tensor([[0.5, value]])}, WANT) == (0.0, np.inf)
    with np.errstate(invalid="ignore"):
        assert errors(GOT, {**WANT, "loss": np.array(value)}) == (np.inf, 0.0)


def test_what_is_missing_or_has_another_shape_is_an_infinite_error():
    for name in WANT:
        assert errors({n: t for n, t in GOT.items() if n != name}, WANT) == (np.inf, np.inf)
        assert errors({**GOT, name: GOT[name][None]}, WANT) == (np.inf, np.inf)
    assert errors({**GOT, "more": torch.tensor(1.0)}, WANT) == (0.0, 0.0)


def test_a_row_is_right_where_both_errors_are():
    value, gradient = LIMITS["float32"]
    row = lambda *errors: Row("engine", "cpu", "float32", "batch 1", *errors)  # noqa: E731
    assert row(value, gradient).ok
    assert not row(value * 1.01, 0.0).ok and not row(0.0, gradient * 1.01).ok
    assert not row(np.inf, 0.0).ok and not row(np.nan, 0.0).ok and not row(0.0, np.nan).ok
    assert row(value * 1.01, gradient * 1.01, value, gradient).ok
    assert not row(value * 2.01, 0.0, value, gradient).ok and not row(0.0, gradient * 2.01, value, gradient).ok
    assert not Report(()).ok and Report((row(0.0, 0.0),)).ok
    assert not Report((row(0.0, 0.0), row(1.0, 0.0))).ok


def test_room_is_what_rounding_does_and_not_more():
    loss = composition()
    graph = loss.graph({"labels": "batch"}, check=False)
    inputs = loss.draw(graph.signature.inputs, {"batch": 5, "classes": 13}, 1)
    want = verification.truth(loss, graph, inputs, {}, False)
    for dtype, most in (("float32", 1e-5), ("float64", 1e-13)):
        value, gradient = verification.room(graph, inputs, {}, want, dtype)
        assert 0 < value <= most and 0 < gradient <= most
    # An error of the definition itself gives no more room than this.
    off = {name: array * 1.5 for name, array in want.items()}
    assert verification.room(graph, inputs, {}, off, "float32") == (1e-3, 2e-2)
