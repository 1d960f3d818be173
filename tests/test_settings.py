"""What a loss declares is its constructor: ranges and choices with their messages, one default, and a call in every form."""

import copy
import inspect
import math
import pickle

import pytest
import torch

import pykd
from pykd.definition import Loss, Spec, choice, flag, number, registry, scalar, whole


def outside(setting) -> list[object]:
    """Values that a setting refuses."""
    if setting.kind == "choice":
        return ["no such word", "", 3]
    if setting.kind == "flag":
        return ["yes", 2]
    limits = setting.scalar or setting
    values = [math.nan, math.inf, "1"]
    if math.isfinite(limits.minimum):
        values += [limits.minimum if setting.scalar and limits.exclusive else limits.minimum - 1]
    if math.isfinite(limits.maximum):
        values += [limits.maximum + 1]
    if not setting.scalar:
        values += [end for end in (setting.above, setting.below) if math.isfinite(end)]
    return [*values, 2.5] if setting.kind == "whole" else values


def test_every_setting_refuses_what_is_outside_by_its_name(loss_class):
    for name, setting in loss_class._settings.items():
        assert getattr(loss_class(), name) == setting.default
        for value in outside(setting):
            with pytest.raises((ValueError, TypeError), match=rf"^expected {name} to be .*, got .*; pass "):
                loss_class(**{name: value})


def test_choices_are_named():
    with pytest.raises(
        ValueError, match="expected bandwidth to be one of 'joint', 'per_block', got 'x'; pass one of these"
    ):
        pykd.MKMMD(bandwidth="x")
    with pytest.raises(
        ValueError, match="expected beta to be a number greater than 0 and less than 1, got 1.0; pass another"
    ):
        pykd.SoftTarget(beta=1.0)
    with pytest.raises(
        ValueError, match="expected bins to be a whole number from 2 to 10000, got 1; pass another bins"
    ):
        pykd.DistributionDistillation(bins=1)
    with pytest.raises(ValueError, match="expected reduction to be 'mean', since MKMMD compares every sample"):
        pykd.MKMMD(reduction="sum")


def test_arguments_by_position_and_by_name(loss_class):
    settings = loss_class().settings()
    names = list(inspect.signature(loss_class).parameters)
    assert names == list(settings) and names[-1] == "reduction"
    assert loss_class(*settings.values()).settings() == settings
    with pytest.raises(
        TypeError, match=f"expected the settings of {loss_class.__name__} .*, got the unknown colour; pass"
    ):
        loss_class(colour=1)
    with pytest.raises(TypeError, match=f"got {names[0]} twice"):
        loss_class(settings[names[0]], **{names[0]: settings[names[0]]})
    with pytest.raises(TypeError, match=f"got {len(names) + 1} of them"):
        loss_class(*settings.values(), 1)


def test_a_call_says_which_name_is_wrong(loss_subject):
    loss = loss_subject.composition.named_terms[0].parts[0].loss
    tensors = loss_subject.draw()
    with pytest.raises(
        TypeError, match=f"expected the inputs of {type(loss).__name__} .*, got the unknown colour; pass"
    ):
        loss(**tensors, colour=tensors["student_" + next(iter(tensors)).removeprefix("student_")])


def test_a_tensor_that_is_missing_is_named(loss_subject):
    loss, tensors = loss_subject.loss, loss_subject.draw()
    for name in tensors:
        if not loss_subject.specs[name].optional:
            others = {other: tensor for other, tensor in tensors.items() if other != name}
            for given in (others, {**others, name: None}):
                with pytest.raises(ValueError, match=rf"^expected the tensors .*, got none for {name}; pass "):
                    loss(**given)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensor_of_one_number_leaves_shape_and_type_of_the_value(loss_subject, dtype, learned):
    loss = loss_subject.loss
    composed = pykd.compose({"term": (loss, 1.0)})
    tensors = loss_subject.draw(dtype=dtype)
    want, weighed = loss(**tensors), composed(**tensors)["loss"]
    for make in (torch.tensor, lambda x, dtype: torch.tensor([x], dtype=dtype)):
        for kind in (torch.float32, torch.float64):
            for name in loss.scalars:
                given = make(getattr(loss, name), dtype=kind).requires_grad_(learned)
                rtol = 1e-5 if dtype == torch.float32 else 1e-6 if kind == torch.float32 else 1e-9
                torch.testing.assert_close(loss(**tensors, **{name: given}).detach(), want, rtol=rtol, atol=rtol)
                if want.dim() == 0:
                    anew = pykd.compose({"term": (loss, 1.0)})  # which has no plan for such a call
                    got = anew(**tensors, **{f"term_{name}": given})["loss"]
                    torch.testing.assert_close(got.detach(), weighed, rtol=rtol, atol=rtol)
            if want.dim() == 0:
                given = make(1.0, dtype=kind).requires_grad_(learned)
                for each in (composed, pykd.compose({"term": (loss, 1.0)})):
                    got = each(**tensors, term_weight=given)["loss"]
                    torch.testing.assert_close(got.detach(), weighed, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_script_compile_copies_and_positions_agree(loss_subject):
    torch.compiler.reset()  # it compiles one function for a few classes only
    loss = loss_subject.composition.named_terms[0].parts[0].loss
    tensors = loss_subject.draw()
    want = loss(**tensors)
    grouped = loss.grouped(tensors)
    by_position = [grouped.get(name) for name in loss._as_declared().inputs]
    made = {
        "position": loss(*by_position),
        "script": torch.jit.script(loss)(**tensors),
        "deepcopy": copy.deepcopy(loss)(**tensors),
        "pickle": pickle.loads(pickle.dumps(loss))(**tensors),
        "settings": loss.with_settings()(**tensors),
        "compile": torch.compile(loss, fullgraph=True, backend="eager")(**tensors),
    }
    for way, got in made.items():
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=way)
    numbers = {name: scalar.check(name, 1.5 * getattr(loss, name) + 0.1) for name, scalar in loss.scalars.items()}
    moved = loss.with_settings(**numbers)(**tensors)
    torch.testing.assert_close(loss(**tensors, **numbers), moved)
    torch.testing.assert_close(torch.jit.script(loss)(**tensors, **numbers), moved)
    assert repr(loss) == f"{type(loss).__name__}({', '.join(f'{n}={v!r}' for n, v in loss.settings().items())})"


def declare(formula, called="ALoss", **fields):
    """A loss of this formula with these fields; the registry forgets it again."""
    inputs = {"student_logits": Spec("batch classes", grad=True), "teacher_logits": Spec("batch classes")}
    body = {"inputs": inputs, "reference": lambda self, **arrays: 0.0, **fields}
    try:
        return registry.register(formula)(type(called, (Loss,), body))
    finally:
        registry._LOSSES.pop(getattr(formula, "__name__", None), None)


def test_the_formula_has_the_defaults_and_the_order_of_the_class():
    def power_loss(student_logits, teacher_logits, power: float, rough: bool, reduction: str):
        return (student_logits - teacher_logits).abs().pow(power).mean()

    x, zero = torch.full((2, 3), 3.0), torch.zeros(2, 3)
    made = declare(power_loss, power=number(default=2.0), rough=flag(default=False))
    assert str(inspect.signature(made)) == "(power=2.0, rough=False, reduction: str = 'mean')"
    assert float(made(power=1.0)(x, zero)) == 3.0
    assert float(power_loss(x, zero)) == float(torch.jit.script(made())(x, zero)) == 9.0
    assert (
        declare(power_loss, power=number(default=2.0), rough=flag(default=False)) is not made
    )  # a cell that runs again
    with pytest.raises(
        TypeError, match="expected the function power_loss to leave the default of power to ALoss, got 2.0; remove it"
    ):
        declare(power_loss, power=number(default=3.0), rough=flag(default=False))
    with pytest.raises(
        TypeError, match="expected the function power_loss to take the inputs of ALoss, then its settings"
    ):
        declare(power_loss, rough=flag(default=False), power=number(default=2.0))
    with pytest.raises(TypeError, match="expected the formula of a loss, a function, got 'power_loss'"):
        declare("power_loss", power=number(default=2.0))


def test_tensors_that_may_be_missing_come_last():
    def a_loss(student_logits, sample_weight, teacher_logits):
        return (student_logits - teacher_logits).abs().mean()

    inputs = {
        "student_logits": Spec("batch classes", grad=True),
        "sample_weight": Spec("batch", optional=True),
        "teacher_logits": Spec("batch classes"),
    }
    with pytest.raises(
        TypeError,
        match="expected the inputs of ALoss that may be missing to come last, got .* of which sample_weight may",
    ):
        declare(a_loss, inputs=inputs)


def test_the_reference_takes_the_inputs_by_their_names():
    def a_loss(student_logits, teacher_logits, sample_weight):
        return (student_logits - teacher_logits).abs().mean()

    inputs = {
        "student_logits": Spec("batch classes", grad=True),
        "teacher_logits": Spec("batch classes"),
        "sample_weight": Spec("batch", optional=True),
    }
    declare(a_loss, inputs=inputs, reference=lambda self, student_logits, teacher_logits, sample_weight=None: 0.0)
    for wrong in (
        lambda self, s, t, w=None: 0.0,
        lambda self, student_logits, teacher_logits: 0.0,
        lambda self, student_logits, teacher_logits, sample_weight: 0.0,
    ):
        with pytest.raises(
            TypeError,
            match=r"expected the reference of ALoss to take the inputs by their names "
            r"\(self, student_logits, teacher_logits, sample_weight=None\), got \(self, .*\); correct one of them",
        ):
            declare(a_loss, inputs=inputs, reference=wrong)


def test_a_scalar_may_have_a_maximum():
    def mixed(student_logits, teacher_logits, share: float, steps: int, word: str):
        return share * (student_logits - teacher_logits).square().mean()

    made = declare(
        mixed,
        share=scalar(default=0.5, minimum=0.0, maximum=1.0),
        steps=whole(default=3, minimum=1),
        word=choice(("a", "b"), default="a"),
    )
    loss, x = made(), torch.ones(2, 3)
    message = "expected share to be a number of at least 0 and of at most 1, got 1.5; pass another share"
    for call in (lambda: made(share=1.5), lambda: loss(x, x, share=1.5)):
        with pytest.raises(ValueError, match=message):
            call()
    assert all(0 <= made.scalars["share"].moved(default, n) <= 1 for default in (0.0, 0.5, 1.0) for n in range(6))
    assert len({made.scalars["share"].moved(0.5, n) for n in range(5)}) == 5
