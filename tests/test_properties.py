"""What a loss declares to change nothing changes nothing, and what it declares to change something does.

Generated from the declarations (:class:`pykd.definition.Properties`): nothing here names a loss, or reads one's name.
"""

import dataclasses
import math

import pytest
import torch

from pykd.definition import Case, Properties, Scalar, Spec
from pykd.definition.sizes import draw, example_sizes, fitting, trial_sizes
from tests.conftest import subjects

NAMES = [field.name for field in dataclasses.fields(Properties) if field.name != "distils"]  # tests/test_distils.py


def value_and_gradients(subject, tensors):
    given = {name: t.clone().requires_grad_(subject.specs[name].grad) for name, t in tensors.items()}
    value = subject.graph()(**given)["loss"]
    value.backward()
    return value.detach(), {name: t.grad for name, t in given.items() if t.requires_grad}


def in_another_order(subject, tensors):
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    return subject.take(tensors, order)


def shifted(subject, tensors):
    """Every sample's logits by a number of its own."""
    return {
        name: t + torch.randn_like(t.narrow(subject.specs[name].class_axis, 0, 1))
        if name in subject.inputs_of("logits")
        else t
        for name, t in tensors.items()
    }


def with_a_masked_class(subject, tensors):
    """One class more, the last, that no label means; in every vocabulary, where there are several."""
    fill = {"logits": -math.inf, "log_probabilities": -math.inf, "probabilities": 0.0, "weights": 1.0, "mask": 1.0}
    more = dict(tensors)
    specs = [subject.specs[name] for name in subject.inputs_of("logits")]
    for axis in {spec.names[spec.class_axis] for spec in specs}:
        for name, spec in subject.specs.items():
            if axis in spec.names:
                at = spec.names.index(axis)
                entry = torch.full_like(more[name].narrow(at, 0, 1), fill[spec.draw])
                more[name] = torch.cat([more[name], entry], dim=at)
    return more


def scaled(subject, tensors):
    """Every sample's features by a number of its own."""
    changed = dict(tensors)
    for name in subject.inputs_of("features"):
        t = tensors[name]
        factors = torch.exp(torch.randn(len(t), dtype=t.dtype))
        changed[name] = t * factors.reshape(-1, *[1] * (t.dim() - 1))
    return changed


def pairs(subject):
    return {name: spec.like for name, spec in subject.specs.items() if spec.like is not None}


def equal(subject, tensors):
    return {**tensors, **{student: tensors[teacher].clone() for student, teacher in pairs(subject).items()}}


def exchanged(subject, tensors):
    return {
        **tensors,
        **{student: tensors[teacher] for student, teacher in pairs(subject).items()},
        **{teacher: tensors[student] for student, teacher in pairs(subject).items()},
    }


CHANGES = {
    "batch_order": in_another_order,
    "logit_shift": shifted,
    "masked_classes": with_a_masked_class,
    "feature_scale": scaled,
    "zero_when_equal": equal,
    "symmetric": exchanged,
}


def has_inputs(subject, name):
    """Whether the loss has inputs that the property is about."""
    if name in ("logit_shift", "masked_classes"):
        return bool(subject.inputs_of("logits"))
    if name == "feature_scale":
        return bool(subject.inputs_of("features"))
    if name in ("zero_when_equal", "symmetric"):
        return bool(pairs(subject))
    return any("batch" in spec.names for spec in subject.specs.values())


@pytest.mark.parametrize("name", NAMES)
def test_properties_are_declared_where_there_is_an_input_for_them(loss_subject, name):
    declared = getattr(loss_subject.loss.properties(), name)
    if has_inputs(loss_subject, name):
        assert declared is True or (isinstance(declared, str) and declared), f"declare {name}: True, or why not"
    else:
        assert declared is None, f"{name} says something of inputs that {loss_subject.loss.name} does not have"


def declarations():
    return [
        (s, name)
        for s in subjects()
        for name in NAMES
        if s.holds(name) is not None and (s.composition.single or name not in ("zero_when_equal", "symmetric"))
    ]


@pytest.mark.parametrize(("declaring", "name"), declarations(), ids=str)
def test_what_is_declared_is_so(declaring, name):
    subject = declaring
    torch.manual_seed(0)
    declared = subject.holds(name)
    tensors = subject.draw({"batch": 6}, seed=7)
    if name == "symmetric":
        tensors |= {n: torch.ones_like(tensors[n]) for n in subject.inputs_of("weights")}
    got, gradients = value_and_gradients(subject, CHANGES[name](subject, tensors))
    want, plain = value_and_gradients(subject, tensors)
    if name == "zero_when_equal":
        want = torch.zeros_like(got)
    same = torch.allclose(got, want, rtol=1e-9, atol=1e-11)
    assert same == (declared is True), f"{name} is declared as {declared!r}, got {got} for {want}"
    if declared is not True:
        return
    logits = subject.inputs_of("logits")
    for student, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), student
        if name == "masked_classes":
            kept, more = gradient, torch.zeros(1)
            if student in logits:
                at = subject.specs[student].class_axis
                kept, more = gradient.narrow(at, 0, gradient.size(at) - 1), gradient.select(at, -1)
            torch.testing.assert_close(kept, plain[student])
            assert (more == 0).all(), student
        if name == "logit_shift":
            torch.testing.assert_close(gradient, plain[student])


# ---- The declarations themselves ----------------------------------------------------------------

LEAST = {"classes": 2}


def test_any_axis_has_lengths():
    """No name is special; all axes of an example differ, and every one is tried at its least, alone and with the others."""
    for axes in (
        ["batch", "classes"],
        ["batch", "height", "width", "channels"],
        ["queue", *(f"axis_{i}" for i in range(9))],
    ):
        example = example_sizes(axes)
        assert list(example) == axes and len(set(example.values())) == len(axes) and min(example.values()) > 1
        trials = trial_sizes(axes)
        assert all(list(sizes) == axes for sizes in trials.values())
        assert set(trials["smallest"].values()) == {1}
        assert all(size % 2 == 1 for size in trials["odd"].values())
        for axis in axes:
            lengths = [sizes[axis] for sizes in trials.values()]
            alone = [s for s in trials.values() if s[axis] == 1 and max(s.values()) > 1]
            assert alone and max(lengths) > 1 and any(size % 2 == 0 for size in [*lengths, example[axis]]), axis
            assert any(sizes[axis] != example[axis] for sizes in trials.values())


def test_no_length_is_below_the_least():
    for axes in (["batch", "classes"], ["classes"], ["batch", "tokens", "classes"]):
        for sizes in (example_sizes(axes, {"classes": 12}), *trial_sizes(axes, {"classes": 12}).values()):
            assert sizes["classes"] >= 12
        assert trial_sizes(axes, LEAST)["smallest"]["classes"] == 2
    assert example_sizes(["a", "b", "c"], {"a": 10, "c": 11}) == {"a": 10, "b": 11, "c": 12}  # none is another's


KINDS = ["logits", "features", "unit", "positive", "probabilities", "log_probabilities", "partial_log_probabilities"]


@pytest.mark.parametrize("kind", [*KINDS, "weights", "mask"])
def test_what_is_drawn_is_what_was_asked_for(kind):
    spec = Spec("batch classes", dtype="weight" if kind in ("weights", "mask") else "float", draw=kind)
    x = draw(spec, {"batch": 50, "classes": 7}, torch.Generator().manual_seed(0), torch.float64)
    assert x.shape == (50, 7) and torch.isfinite(x).all()
    ones = torch.ones(50, dtype=torch.float64)
    checks = {
        "logits": lambda: x.std() > 1.5,
        "features": lambda: x.std() > 1.5,
        "unit": lambda: torch.allclose(x.norm(dim=-1), ones),
        "positive": lambda: (x > 0).all() and x.std() > 0.1,
        "probabilities": lambda: torch.allclose(x.sum(dim=-1), ones) and (x > 0).all(),
        "log_probabilities": lambda: torch.allclose(x.exp().sum(dim=-1), ones),
        "partial_log_probabilities": lambda: (x.exp().sum(dim=-1) < 0.9999).all() and x.exp().sum(dim=-1).mean() > 0.5,
        "weights": lambda: x.dtype == torch.float32 and (x >= 0).all() and (x == 0).any() and x.unique().numel() > 10,
        "mask": lambda: x.dtype == torch.float32 and sorted(x.unique().tolist()) == [0.0, 1.0],
    }
    assert checks[kind]()
    twice = draw(
        dataclasses.replace(spec, scale=2.0),
        {"batch": 50, "classes": 7},
        torch.Generator().manual_seed(0),
        torch.float64,
    )
    torch.testing.assert_close(twice, 2 * x)


def test_different_indices_differ_and_leave_something_out():
    spec = Spec("batch top_k", dtype="int64", index_of="classes", draw="different_indices")
    for classes in (2, 5, 40):
        sizes = fitting([spec], {"batch": 30, "classes": classes, "top_k": 9})
        assert sizes == {"batch": 30, "classes": classes, "top_k": min(classes - 1, 9)}
        x = draw(spec, sizes, torch.Generator().manual_seed(0), torch.float64)
        assert x.shape == (30, sizes["top_k"]) and x.dtype == torch.int64
        assert all(len(set(row)) == len(row) and min(row) >= 0 and max(row) < classes for row in x.tolist())
        assert set(x.flatten().tolist()) == set(range(classes))


def test_an_unknown_kind_is_an_error():
    with pytest.raises(
        ValueError,
        match="expected draw to be one of indices, different_indices, logits, .*, got 'normal'; correct the Spec",
    ):
        draw(Spec("batch", draw="normal"), {"batch": 2}, torch.Generator(), torch.float32)


@pytest.mark.parametrize(
    ("scalar", "inside", "outside", "words"),
    [
        (Scalar(minimum=0.0, maximum=1.0), [0.0, 0.5, 1.0], [-0.1, 1.1], "of at least 0 and of at most 1"),
        (Scalar(minimum=0.0, maximum=1.0, exclusive=True), [0.5, 1.0], [0.0, 1.5], "greater than 0 and of at most 1"),
        (Scalar(minimum=-1.0), [-1.0, 0.0, 3.0], [-1.5], "of at least -1"),
        (Scalar(maximum=2.0), [-9.0, 2.0], [2.5], "of at most 2"),
        (Scalar(minimum=0.0), [0.0, 1e9], [-1.0], "of at least 0"),
        (Scalar(minimum=0.0, exclusive=True), [1e-3], [0.0], "greater than 0"),
        (Scalar(), [-1e9, 1e9], [math.inf, math.nan], "that is finite"),
    ],
)
def test_numbers_have_a_range(scalar, inside, outside, words):
    for number in inside:
        assert scalar.check("beta", number) == number
    for number in outside:
        with pytest.raises(ValueError, match=f"expected beta to be a number {words}, got "):
            scalar.check("beta", number)
    for default in inside:
        tried = [scalar.moved(default, number) for number in range(6)]
        assert tried[0] == default and len(set(tried)) == 6, tried
        assert all(scalar.check("beta", number) == number for number in tried)


def test_a_tolerance_has_a_reason():
    assert Case(tolerance={"float16": 2.0}, why="it squares what half types have rounded").tolerance
    for wrong in ({"tolerance": {"float16": 2.0}}, {"why": "no tolerance"}):
        with pytest.raises(ValueError, match="expected a tolerance together with why it is needed"):
            Case(**wrong)
