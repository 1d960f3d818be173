"""Edge cases by name, for every loss: the value is the reference's, and gradients are finite where it is.

Generated from the declarations: nothing here names a loss. Temperatures and other settings at their ends are in test_extremes.py,
rows without a direction in test_range.py, what is left out in test_left_out.py.
"""

import inspect
import math

import numpy as np
import pytest
import torch

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
CLOSE = {torch.float64: (1e-9, 1e-9), torch.float32: (2e-4, 2e-5)}


def logits(subject):
    return subject.inputs_of("logits") or pytest.skip("no logits")


def vectors(subject):
    return subject.inputs_of("features", "unit") or pytest.skip("no features")


def students(subject):
    return [name for name, spec in subject.specs.items() if spec.grad]


def teachers(subject):
    return [name for name in logits(subject) if not subject.specs[name].grad] or pytest.skip("no logits of a teacher")


def class_axis(subject, name):
    """Where the classes are: last, but in maps."""
    names = subject.specs[name].names
    return names.index("classes") if "classes" in names else len(names) - 1


def of_classes(subject, count):
    """As many classes; skipped where the loss needs more."""
    first = logits(subject)[0]
    axis = subject.specs[first].names[class_axis(subject, first)]
    least = subject.composition.least_lengths.get(axis, 1)
    if count < least:
        pytest.skip(f"{axis} are at least {least}")
    listed = {  # of which there are no more than classes
        spec.names[-1]: count for spec in subject.specs.values() if spec.index_of == axis and spec.draw != "indices"
    }
    return subject.draw({"batch": 4, axis: count, **listed}, seed=31)


def equal(subject):
    pairs = {name: spec.like for name, spec in subject.specs.items() if spec.like} or pytest.skip(
        "nothing to be equal to"
    )
    tensors = subject.draw(seed=32)
    return {**tensors, **{student: tensors[teacher].clone() for student, teacher in pairs.items()}}


def saturated(subject):
    tensors = subject.draw(seed=33)
    return {**tensors, **{name: 1e4 * tensors[name] for name in logits(subject)}}


def minus_infinity(subject):
    """A class of each of the teacher's rows, which no label means."""
    if subject.loss.properties().masked_classes is not True:
        pytest.skip("it says that it takes no −inf, and why")
    tensors = subject.draw(seed=34)
    for name in teachers(subject):
        tensors[name] = tensors[name].clone()
        tensors[name].select(class_axis(subject, name), 0).fill_(-math.inf)
    indices = {
        name: tensors[name].clamp(min=1) for name in subject.inputs_of("indices") if subject.specs[name].index_of
    }
    return {**tensors, **indices}


def with_offset(subject):
    tensors = subject.draw(seed=35)
    return {**tensors, **{name: tensors[name] + 1e4 for name in logits(subject)}}


def masked(subject):
    names = subject.inputs_of("weights", "mask") or pytest.skip("no weights and no mask")
    tensors = subject.draw(seed=36)
    return {**tensors, **{name: torch.zeros_like(tensors[name]) for name in names}}


def coincident(subject):
    """All samples are the first one, the student's and the teacher's."""
    tensors = subject.draw(seed=37)
    return {**tensors, **{name: tensors[name][:1].expand_as(tensors[name]).clone() for name in vectors(subject)}}


def constant_rows(subject):
    tensors = subject.draw(seed=38)
    names = subject.inputs_of("features", "logits") or pytest.skip("no rows of free numbers")
    return {**tensors, **{name: tensors[name][..., :1].expand_as(tensors[name]).clone() for name in names}}


CASES = {
    "student equals teacher": equal,
    "two classes": lambda subject: of_classes(subject, 2),
    "one class": lambda subject: of_classes(subject, 1),
    "saturated logits": saturated,
    "minus infinity in the teacher": minus_infinity,
    "an offset of 1e4 in all logits": with_offset,
    "everything masked": masked,
    "coincident embeddings": coincident,
    "constant rows": constant_rows,
}


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_edge_cases(loss_subject, case, dtype):
    subject = loss_subject
    tensors = {n: t.to(dtype) if subject.specs[n].dtype == "float" else t for n, t in CASES[case](subject).items()}
    exact = {n: t.double().numpy() if t.is_floating_point() else t.numpy() for n, t in tensors.items()}
    with np.errstate(all="ignore"):
        want = float(subject.composition.reference(**exact)["loss"])
    given = {name: t.clone().requires_grad_(subject.specs[name].grad) for name, t in tensors.items()}
    value = subject.graph()(**given)["loss"]
    rtol, atol = CLOSE[dtype]
    np.testing.assert_allclose(value.item(), want, rtol=rtol, atol=atol)
    assert not math.isnan(want), "a value that is no number says nothing to a trainer"
    nothing = case == "everything masked" and subject.loss.weight_input() in tensors and not subject.loss.couples_batch
    if nothing:
        assert value == 0
    if not math.isfinite(want):
        return
    value.backward()
    for name in students(subject):
        assert torch.isfinite(given[name].grad).all(), name
        if nothing:
            assert not given[name].grad.any(), name


def test_of_equal_logits_in_bfloat16_a_divergence_is_exactly_0(loss_subject):
    if loss_subject.loss.properties().zero_when_equal is not True or not loss_subject.inputs_of("logits"):
        pytest.skip("no divergence of logits")
    if any(loss_subject.specs[student].like is None for student in students(loss_subject)):
        pytest.skip("nothing to be equal to")
    tensors = loss_subject.draw(seed=39, dtype=torch.bfloat16)
    for student in students(loss_subject):
        tensors[student] = tensors[loss_subject.specs[student].like].clone().requires_grad_()
    value = loss_subject.graph()(**tensors)["loss"]
    divergence = "divergence" in inspect.getdoc(type(loss_subject.loss)).splitlines()[0].casefold()
    assert value == 0 if divergence else 0 <= value <= 1e-6
    value.backward()
    for student in students(loss_subject):
        assert torch.isfinite(tensors[student].grad).all()
