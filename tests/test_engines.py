"""Every loss × case × dtype × engine, value and gradient, at several sizes, on one loaded artefact each.

The judge is float64: NumPy references for values, autograd of the definition in float64 for gradients (which
test_every_loss.py compares with finite differences of the references).
"""

import itertools

import pytest
import torch

import pykd
from pykd.definition import registry
from pykd.export.verification import LIMITS, errors, rooms_of, truth, verify
from tests.conftest import composed_subjects, one_per_loss, subjects

ONE = [*one_per_loss(), *composed_subjects()]


def in_every_type():
    """Every subject in float32, and every loss in the other types.

    In these, too, Python runs every case before :func:`pykd.export` returns, and C++ runs it in cpp/tests/vectors_test.cpp.
    """
    return [*itertools.product(subjects(), ["float32"]), *itertools.product(ONE, ["float64", "float16", "bfloat16"])]


@pytest.mark.slow
@pytest.mark.parametrize(("one", "dtype"), in_every_type(), ids=str)
def test_every_engine_agrees_with_float64(one, dtype, exported):
    quick = dtype in ("float16", "bfloat16")
    report = verify(exported(one, dtype), engines=("python", "runtime"), quick=quick, trust=True)
    assert {row.engine for row in report.rows} == {
        "torch.jit", "onnxruntime", "onnxruntime (C++)", "torchscript (C++)",
    }  # fmt: skip
    assert report.ok, f"\n{report}"


def reductions_that_no_case_has():
    """Loss, reduction and whether samples are weighed; values per sample (``"none"``) are in all files that can have them."""
    registry.load_all()
    for cls in registry.registered().values():
        weight = cls.weight_input()
        exported = {(cls(**case.settings).reduction, weight in case.optional) for case in cls.cases}
        weighted = (False, True) if weight is not None else (False,)
        for wanted in itertools.product(("mean",) if cls.couples_batch else ("mean", "sum"), weighted):
            if wanted not in exported:
                yield pytest.param(cls, *wanted, id=f"{cls.name}-{wanted[0]}-{'weighted' if wanted[1] else 'plain'}")


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "reduction", "weighted"), reductions_that_no_case_has())
def test_every_reduction_is_exported_with_weights_and_without(cls, reduction, weighted, tmp_path):
    case, weight = cls.cases[0], cls.weight_input()
    optional = [*(name for name in case.optional if name != weight), *([weight] if weighted else [])]
    layouts = {name: axes for name, axes in case.layouts.items() if weighted or name != weight}
    loss = cls(**{**case.settings, "reduction": reduction})
    per_sample = not cls.couples_batch
    pykd.export(
        loss, tmp_path / "loss", layouts=layouts, optional_inputs=optional, per_sample=per_sample,
        progress=lambda line: None,
    )  # fmt: skip
    report = verify(tmp_path / "loss", engines=("runtime",), quick=True, trust=True)
    assert report.ok, f"\n{report}"
    outputs = [output.name for output in pykd.load(str(tmp_path / "loss")).signature.outputs]
    assert ("loss_per_sample" in outputs) == per_sample


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "torchscript"])
@pytest.mark.parametrize("one", ONE, ids=str)
def test_runtime_in_calls_with_changing_shapes(one, engine, exported):
    """One loaded artefact, eight calls, back to the first shapes in the end; parameters change as well."""
    subject = one
    folder = exported(subject, "float32")
    loss = pykd.load(str(folder), engine=engine)
    per_sample = any(not term.couples_batch for term in subject.composition.named_terms)
    graph = subject.graph(per_sample)
    value_limit, gradient_limit = LIMITS["float32"]
    trials = subject.trial_sizes()
    for number, sizes in enumerate((*trials.values(), trials["smallest"], trials["odd"])):
        tensors = subject.composition.draw(graph.signature.inputs, sizes, seed=number)
        numbers = {name: p.scalar.moved(p.default, number) for name, p in graph.signature.parameters.items()}
        want = truth(subject.composition, graph, tensors, numbers, per_sample)
        got = loss.value_and_gradient(**tensors, **numbers)
        assert list(got) == [output.name for output in loss.signature.outputs]
        value_room, gradient_room = rooms_of(subject.composition, graph, tensors, numbers, want, "float32")
        value_error, gradient_error = errors(got, want)
        assert value_error <= value_limit + value_room and gradient_error <= gradient_limit + gradient_room
        alone = loss.value(**tensors, **numbers)
        assert not any(name.startswith("grad_") for name in alone)
        for name, value in alone.items():
            torch.testing.assert_close(value, got[name], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "torchscript"])
def test_grad_scale_multiplies_the_gradient_before_it_is_rounded(engine, exported):
    """float16 gradients of a large batch underflow; scaled, they do not."""
    subject = _subject("soft_target[temperature=2.0]")
    loss = pykd.load(str(exported(subject, "float16")), engine=engine)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(512, 64, generator=generator).half()
    teacher = torch.randn(512, 64, generator=generator).half()
    scaled = loss.value_and_gradient(student_logits=student, teacher_logits=teacher, grad_scale=4096.0)
    plain = loss.value_and_gradient(student_logits=student, teacher_logits=teacher)
    exact = student.double().requires_grad_()
    pykd.SoftTarget(temperature=2.0)(exact, teacher.double()).backward()
    error = (scaled["grad_student_logits"].double() / 4096 - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 2**-10
    assert (plain["grad_student_logits"] == 0).sum() > (scaled["grad_student_logits"] == 0).sum()
    assert plain["loss"] == scaled["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "torchscript"])
def test_nan_in_the_teacher_propagates(engine, exported):
    loss = pykd.load(str(exported(_subject("soft_target[temperature=2.0]"))), engine=engine)
    teacher = torch.zeros(2, 3)
    teacher[0, 0] = float("nan")
    assert torch.isnan(loss.value(student_logits=torch.zeros(2, 3), teacher_logits=teacher)["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "torchscript"])
def test_ignored_labels_and_labels_out_of_range(engine, exported):
    loss = pykd.load(str(exported(_subject("hard_target[labels:batch]"))), engine=engine)
    student = torch.randn(3, 4)
    got = loss.value_and_gradient(student_logits=student, labels=torch.full((3,), -100))
    assert got["loss"] == 0 and not got["grad_student_logits"].any()
    for label in (4, -1):
        with pytest.raises(ValueError, match=f"labels.*{label}"):
            loss.value(student_logits=student, labels=torch.tensor([0, label, 1]))


def _subject(name):
    return next(subject for subject in subjects() if subject.name == name)
