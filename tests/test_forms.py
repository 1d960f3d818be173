"""Function, class and graph of a loss are one: the same numbers in every type, with and without weights, however reduced.

The graph widens halves and passes every argument, so what is wrong in the function or the class alone does not show in it.
Generated from the registry: nothing here names a loss.
"""

import functools
import inspect
import itertools

import numpy as np
import pytest
import torch

import pykd
from pykd.definition import REDUCTIONS
from tests import tolerances

DTYPES = ("float64", "float32", "float16", "bfloat16")


class Form:
    """One case of a loss, with or without a weight per sample."""

    def __init__(self, subject, weighted: bool) -> None:
        (term,) = subject.composition.named_terms
        self.loss = term.parts[0].loss
        self.subject = subject
        self.weight = self.loss.weight_input()
        others = [name for name in subject.optional if name != self.weight]
        self.optional = [*others, self.weight] if weighted else others
        self.layouts = {name: axes for name, axes in subject.layouts.items() if weighted or name != self.weight}
        self.reductions = ("mean",) if self.loss.couples_batch else REDUCTIONS

    @functools.cached_property
    def specs(self):
        return self.subject.composition.choose(self.layouts, self.optional)

    def draw(self, dtype: str, seed: int = 1):
        tensors = self.subject.composition.draw(self.specs, {"batch": 5}, seed, getattr(torch, dtype))
        if self.weight in tensors:
            assert (tensors[self.weight] == 0).any() or tensors[self.weight].unique().numel() > 1
        return tensors

    def settings(self, reduction: str):
        return {**self.loss.settings(), "reduction": reduction}

    def function(self, reduction: str):
        """The function with the settings of the case, which it takes by the same names."""
        function = getattr(pykd.functional, self.loss.name)
        known = inspect.signature(function).parameters
        settings = {n: v for n, v in self.settings(reduction).items() if n in known}
        return lambda **given: function(**self.loss.grouped(given), **settings)

    def cls(self, reduction: str):
        return self.loss.with_settings(reduction=reduction)

    def graph(self, reduction: str):
        """What a graph makes of it: a vector where nothing is reduced."""
        composition = pykd.composition.as_composition(self.cls("mean" if reduction == "none" else reduction))
        graph = composition.graph(self.layouts, self.optional, per_sample=reduction == "none", check=False)
        return lambda **given: graph(**given)["loss_per_sample" if reduction == "none" else "loss"]

    def reference(self, tensors, reduction: str):
        arrays = {n: t.double().numpy() if t.is_floating_point() else t.numpy() for n, t in tensors.items()}
        return self.cls(reduction).reference(**self.loss.grouped(arrays))


FORMS = ("function", "cls", "graph")


def evaluate(specs, function, tensors):
    """The value, and the gradients by name, of the sum of the value times different numbers."""
    given = {n: t.clone().requires_grad_(specs[n].grad) for n, t in tensors.items()}
    value = function(**given)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    (value if value.dim() == 0 else (value * upstream).sum()).backward()
    return value.detach(), {n: t.grad for n, t in given.items() if specs[n].grad}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_function_class_and_graph_are_the_reference(loss_subject, weighted, dtype):
    form = Form(loss_subject, weighted)
    if weighted and form.weight is None:
        pytest.skip("no weights per sample")
    tensors = form.draw(dtype)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    value_limit, gradient_limit = tolerances.of_formula(loss_subject, dtype)
    for reduction in form.reductions:
        want = np.asarray(form.reference(tensors, reduction))
        # Of the class in float64, which test_every_loss.py compares with differences of the reference.
        _, gradients = evaluate(form.specs, form.cls(reduction), exact)
        for name, kernels in itertools.product(FORMS, ("off", "auto")):  # the formula, and what is there without a word
            with pykd.using_kernels(kernels):
                value, found = evaluate(form.specs, getattr(form, name)(reduction), tensors)
            where = f"{name}, {reduction}, kernels {kernels}"
            assert value.dtype == (torch.float64 if dtype == "float64" else torch.float32), where
            assert value.shape == want.shape, where
            error = np.abs(value.double().numpy() - want) / np.maximum(np.abs(want), 1.0)
            assert error.max() <= value_limit, f"{where}: {error.max()}"
            for tensor, gradient in found.items():
                assert gradient.dtype == tensors[tensor].dtype, where
                largest = gradients[tensor].abs().max().item()
                limit = gradient_limit * largest + tolerances.LEAST.get(dtype, 0.0)
                error = (gradient.double() - gradients[tensor]).abs().max().item()
                assert error <= limit, f"{where}, {tensor}: {error / largest}"


def test_function_and_class_have_the_same_arguments_and_defaults(loss_class):
    """In the order inputs, scalars and settings of the constructor; a loss that cannot but take the mean need not say it."""
    function = inspect.signature(getattr(pykd.functional, loss_class.name)).parameters
    constructor = dict(inspect.signature(loss_class).parameters)
    if loss_class.couples_batch and "reduction" not in function:
        del constructor["reduction"]
    assert list(function) == [*loss_class.inputs, *constructor]
    for name in loss_class.inputs:
        want = None if loss_class.declared(name)[0].optional else inspect.Parameter.empty
        assert function[name].default is want, name
    for name, parameter in constructor.items():
        assert function[name].default == parameter.default, name
        assert type(function[name].default) is type(parameter.default), name
        assert function[name].annotation == parameter.annotation, name
    reference = inspect.signature(loss_class.reference).parameters
    for name in loss_class.inputs:
        assert name in reference and reference[name].default == function[name].default, f"{name} of the reference"
    assert not constructor.keys() & reference.keys(), "a reference reads the settings from the loss"


def test_what_nobody_passes_is_the_default(loss_class):
    """The function, the class and the reference with their inputs alone."""
    loss = loss_class()
    required = [name for name in loss_class.inputs if not loss_class.declared(name)[0].optional]
    composition = pykd.composition.as_composition(loss)
    tensors = composition.draw(composition.choose({}, []), seed=2, dtype=torch.float64)
    grouped = loss.grouped(tensors)
    assert sorted(grouped) == sorted(required)
    want = loss.reference(**loss.grouped({name: tensor.numpy() for name, tensor in tensors.items()}))
    for made in (loss(**tensors), loss(**grouped), getattr(pykd.functional, loss_class.name)(**grouped)):
        np.testing.assert_allclose(made.numpy(), want, rtol=1e-12, atol=1e-12)
