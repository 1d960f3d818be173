"""What holds for every loss, judged by its NumPy reference in float64. Nothing here names a loss."""

import ast
import doctest
import importlib
import inspect
import sys

import numpy as np
import pytest
import torch

import pykd
from pykd.composition import as_composition
from tests import tolerances
from tests.conftest import TRIALS


def as_numpy(tensors):
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def per_row(weights, like):
    """Weights that are the same along every axis of ``like`` but the first."""
    return torch.tensor(weights).reshape(-1, *[1] * (like.dim() - 1)).expand_as(like).clone()


def leaves(subject, tensors):
    """Copies of the tensors; those that receive the gradient require it."""
    specs = subject.graph().signature.inputs
    return {name: t.clone().requires_grad_(specs[name].grad) for name, t in tensors.items()}


@pytest.mark.parametrize("sizes", TRIALS)
def test_value_matches_the_reference(subject, sizes):
    tensors = subject.draw(subject.trial_sizes()[sizes], seed=1)
    got = (
        subject.composition.terms(**tensors)
        if subject.composition.__class__ is pykd.Composition
        else subject.graph()(**tensors)
    )
    want = subject.composition.reference(**as_numpy(tensors))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name].numpy(), want[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_parameters_reach_the_value(subject):
    tensors = subject.draw(seed=2)
    numbers = {name: p.scalar.moved(p.default, 3) for name, p in subject.composition.scalars.items()}
    got = subject.graph()(**tensors, **numbers)
    want = subject.composition.reference(parameters=numbers, **as_numpy(tensors))
    for name in want:
        np.testing.assert_allclose(got[name].numpy(), want[name], rtol=1e-12, atol=1e-12, err_msg=name)
    for name in numbers:
        alone = subject.graph()(**tensors, **{name: numbers[name]})["loss"]
        assert alone != subject.graph()(**tensors)["loss"], f"{name} changes nothing"


@pytest.mark.parametrize("sizes", [name for name in TRIALS if name != "large"])
def test_gradient_matches_central_differences_of_the_reference(subject, sizes):
    tensors = subject.draw(subject.trial_sizes()[sizes], seed=3)
    with_grad = leaves(subject, tensors)
    subject.graph()(**with_grad)["loss"].backward()
    generator = np.random.default_rng(0)
    for name, tensor in with_grad.items():
        if not tensor.requires_grad:
            assert tensor.grad is None
            continue
        arrays = as_numpy(tensors)
        for _ in range(6):
            at = tuple(int(generator.integers(length)) for length in tensor.shape)
            step = 1e-5
            ends = []
            for sign in (1, -1):
                moved = {key: value.copy() for key, value in arrays.items()}
                moved[name][at] += sign * step
                ends.append(float(subject.composition.reference(constants_at=arrays, **moved)["loss"]))
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(tensor.grad[at], slope, rtol=1e-5, atol=1e-8, err_msg=f"{name}{at}")


def test_per_sample_values_match_the_reference(subject):
    if all(term.couples_batch for term in subject.composition.named_terms):
        with pytest.raises(ValueError, match="splits over samples"):
            subject.graph(per_sample=True)
        return
    tensors = subject.draw(seed=4)
    got = subject.graph(per_sample=True)(**tensors)
    want = subject.composition.reference(per_sample=True, **as_numpy(tensors))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name].numpy(), want[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_only_the_student_receives_a_gradient(subject):
    tensors = subject.draw(seed=5)
    with_grad = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    subject.graph()(**with_grad)["loss"].backward()
    specs = subject.graph().signature.inputs
    for name, tensor in with_grad.items():
        if specs[name].grad:
            assert tensor.grad is not None and tensor.grad.abs().sum() > 0, f"{name} gets no gradient"
        elif tensor.is_floating_point():
            assert tensor.grad is None or not tensor.grad.any(), f"{name} is a constant, got a gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_smaller_types_compute_in_float32(subject, dtype):
    tensors = subject.draw(seed=6, dtype=dtype)
    got = leaves(subject, tensors)
    value = subject.graph()(**got)["loss"]
    assert value.dtype == torch.float32
    value.backward()
    exact = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    want = leaves(subject, exact)
    subject.graph()(**want)["loss"].backward()
    reference = subject.composition.reference(**as_numpy(exact))["loss"]
    name = str(dtype).removeprefix("torch.")
    value_limit, gradient_limit = tolerances.of_formula(subject, name)
    assert abs(value.item() - reference) <= value_limit * max(1.0, abs(reference))
    for tensor in (each for each in got if got[each].requires_grad):
        assert got[tensor].grad.dtype == dtype
        wanted = want[tensor].grad
        limit = gradient_limit * wanted.abs().max() + tolerances.LEAST.get(name, 0.0)
        assert (got[tensor].grad.double() - wanted).abs().max() <= limit, tensor


def test_torchscript_equals_eager_in_calls_with_changing_shapes(subject):
    module = torch.jit.script(subject.graph(check=True))
    trials = subject.trial_sizes()
    for seed, sizes in enumerate(({}, *trials.values(), {}, trials["smallest"])):
        tensors = subject.draw(sizes, seed=seed)
        scripted, eager = leaves(subject, tensors), leaves(subject, tensors)
        got, want = module(**scripted), subject.graph()(**eager)
        got["loss"].backward()
        want["loss"].backward()
        for name in want:
            torch.testing.assert_close(got[name], want[name])
        for name, tensor in eager.items():
            if tensor.requires_grad:
                torch.testing.assert_close(scripted[name].grad, tensor.grad)


def test_samples_that_nearly_coincide_are_told_apart(loss_subject):
    """What is left of them is far above rounding: no threshold may take it for nothing."""
    tensors = loss_subject.draw(seed=16)
    generator = torch.Generator().manual_seed(0)
    same = {}  # by their axes
    for name, spec in loss_subject.graph().signature.inputs.items():
        if spec.draw in ("logits", "features"):
            noise = torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
            tensors[name] = same.setdefault(spec.axes, tensors[name][:1]) + 1e-8 * noise
    got = loss_subject.graph()(**tensors)["loss"]
    want = loss_subject.composition.reference(**as_numpy(tensors))["loss"]
    np.testing.assert_allclose(got.item(), want, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4], ids=["equal", "tiny", "saturated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_finite_where_the_value_is(subject, scale, dtype):
    tensors = subject.draw(seed=10, dtype=dtype)
    for name in subject.inputs_of("logits", "features"):
        tensors[name] = tensors[name] * scale
    with_grad = leaves(subject, tensors)
    value = subject.graph()(**with_grad)["loss"]
    assert torch.isfinite(value)
    value.backward()
    for name, tensor in with_grad.items():
        if tensor.requires_grad:
            assert torch.isfinite(tensor.grad).all(), name


def test_nothing_kept_is_zero_with_a_zero_gradient(subject):
    if "sample_weight" not in subject.optional:
        pytest.skip("every sample counts")
    tensors = subject.draw(seed=12)
    tensors["sample_weight"] = torch.zeros_like(tensors["sample_weight"])
    with_grad = leaves(subject, tensors)
    values = subject.graph()(**with_grad)
    values["loss"].backward()
    aux_without_weight = [
        t for t in subject.composition.named_terms if not any("sample_weight" in p.loss.inputs for p in t.parts)
    ]
    if not aux_without_weight:
        assert values["loss"] == 0
        for tensor in with_grad.values():
            if tensor.requires_grad:
                assert (tensor.grad == 0).all()


def test_weight_zero_equals_leaving_the_sample_out(subject):
    if "sample_weight" not in subject.optional or subject.composition.students:
        pytest.skip("no weight per row")
    tensors = subject.draw({"batch": 5}, seed=13)
    tensors["sample_weight"] = per_row([0.5, 0.0, 2.0, 0.0, 1.0], tensors["sample_weight"])
    kept = torch.tensor([0, 2, 4])
    fewer = subject.take(tensors, kept)
    torch.testing.assert_close(subject.graph()(**tensors)["loss"], subject.graph()(**fewer)["loss"])


def test_nan_propagates(subject):
    for name, spec in subject.graph().signature.inputs.items():
        if spec.dtype != "float" or name == "sample_weight":
            continue
        tensors = subject.draw(seed=14)
        tensors[name].fill_(float("nan"))
        value = subject.graph()(**tensors)["loss"]
        assert torch.isnan(value), f"NaN in {name} was lost"


def test_a_weighted_sample_with_an_infinite_value_does_not_leak_when_left_out(subject):
    if "sample_weight" not in subject.optional or subject.composition.students:
        pytest.skip("no weight per row")
    tensors = subject.draw({"batch": 3}, seed=15)
    tensors["sample_weight"] = per_row([1.0, 0.0, 1.0], tensors["sample_weight"])
    for name in subject.inputs_of("logits"):
        if subject.specs[name].grad:
            tensors[name][1, 0] = float("-inf")
    assert torch.isfinite(subject.graph()(**tensors)["loss"])


def test_docstring_is_a_specification(loss_class):
    doc = inspect.getdoc(loss_class) or ""
    for part in (".. math::", "Inputs:", "Returns:", "Raises:", "Example:", ">>>", "References:"):
        assert part in doc, f"{loss_class.__name__} does not say {part}"
    for name in (*loss_class.inputs, *(n for n in inspect.signature(loss_class).parameters)):
        assert f"{name}:" in doc, f"{loss_class.__name__} does not explain {name}"


def test_docstring_examples_print_what_they_say(loss_class):
    module = importlib.import_module(loss_class.__module__)
    tests = doctest.DocTestFinder(recurse=False).find(
        loss_class, loss_class.__name__, globs={**vars(module), "torch": torch}
    )
    runner = doctest.DocTestRunner()
    assert sum(len(test.examples) for test in tests) > 0
    for test in tests:
        assert runner.run(test).failed == 0


def test_settings_build_the_same_loss(loss_subject):
    loss = loss_subject.composition.named_terms[0].parts[0].loss
    again = type(loss)(**loss.settings())
    assert again.settings() == loss.settings()
    assert repr(again) == repr(loss)


def test_function_of_the_same_name_is_public(loss_class):
    function = getattr(pykd.functional, loss_class.name)
    assert function.__wrapped__ is getattr(sys.modules[loss_class.__module__], loss_class.name)
    given = inspect.signature(function).parameters
    settings = inspect.signature(loss_class).parameters
    assert all(given[name].default == settings[name].default for name in settings.keys() & given.keys())
    assert torch.jit.script(function).name == loss_class.name
    assert getattr(pykd, loss_class.__name__) is loss_class


def test_a_default_stands_in_one_place(loss_class):
    """The class has it; the formula, as it is written, has none."""
    written = ast.parse(inspect.getsource(sys.modules[loss_class.__module__]))
    (formula,) = [n for n in written.body if isinstance(n, ast.FunctionDef) and n.name == loss_class.name]
    assert not formula.args.defaults and not formula.args.kw_defaults


def test_every_case_exercises_every_setting(loss_class):
    """A setting that no case moves off its default is a setting that no test sees."""
    defaults = {n: p.default for n, p in inspect.signature(loss_class).parameters.items()}
    moved = {name for case in loss_class.cases for name, value in case.settings.items() if value != defaults[name]}
    allowed = {"reduction"} if loss_class.couples_batch else set()
    assert set(defaults) - moved <= allowed, f"no case of {loss_class.name} moves {set(defaults) - moved - allowed}"


def test_every_case_exercises_every_layout(loss_class):
    """Of every input; those over tokens that follow from ``sample_axes`` are in tests/test_tokens.py."""
    seen = set()
    for case in loss_class.cases:
        composition = as_composition(loss_class(**case.settings))
        seen |= {(name, spec.axes) for name, spec in composition.choose(case.layouts, case.optional).items()}
    for name in loss_class.inputs:
        if loss_class.declared(name)[0].layers is None:
            missing = [spec.axes for spec in loss_class.declared(name) if (name, spec.axes) not in seen]
            assert not missing, f"no case of {loss_class.name} has {name} with the axes {missing}"
