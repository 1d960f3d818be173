"""A sample that is left out has no part in anything: the loss is as if it were not there, whatever it holds.

Every registered loss that weighs samples, in every form. The judge is the same loss on the samples that are kept.
"""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

import pykd
from pykd.composition import as_composition
from pykd.definition import REDUCTIONS, Loss, registry
from tests.conftest import forms_of_inputs, subjects

KEPT = [0, 2, 3, 5]
LEFT_OUT = [1, 4]
WEIGHTS = torch.tensor([0.5, 0.0, 1.0, 2.0, 0.0, 1.5])
POISON = (float("nan"), float("inf"), float("-inf"))


@dataclasses.dataclass(frozen=True)
class Way:
    """A loss, and how it leaves samples out."""

    loss: Loss
    layouts: tuple[tuple[str, str], ...]
    by: str  # "weight", "mask" or "label"
    others: tuple[str, ...] = ()  # further optional inputs

    @property
    def optional(self):
        return [*self.others, *([] if self.by == "label" else ["sample_weight"])]

    def specs(self):
        optional = self.optional
        return self.composition().choose(dict(self.layouts), optional)

    def composition(self):
        """The loss with a reduction to a scalar."""
        return as_composition(self.loss.with_settings(reduction="mean") if self.loss.reduction == "none" else self.loss)

    def draw(self, dtype=torch.float64):
        tensors = self.composition().draw(self.specs(), {"batch": 6}, seed=3, dtype=dtype)
        if self.by == "label":
            tensors["labels"][LEFT_OUT] = self.loss.ignore_index
            tensors["labels"][KEPT] = torch.where(
                tensors["labels"][KEPT] == self.loss.ignore_index, 0, tensors["labels"][KEPT]
            )
        else:
            weights = WEIGHTS if self.by == "weight" else WEIGHTS > 0
            like = tensors["sample_weight"]
            tensors["sample_weight"] = weights.reshape(-1, *[1] * (like.dim() - 1)).expand_as(like).clone()
        return tensors

    def take(self, tensors, rows):
        specs = self.specs()
        return {name: t[rows] if specs[name].names[0] == "batch" else t for name, t in tensors.items()}

    def __str__(self):
        words = [self.loss.name, *(f"{k}={v}" for k, v in self.loss.settings().items()), self.by]
        return ",".join([*words, *(axes.replace(" ", "×") for _, axes in self.layouts)])


def ways():
    registry.load_all()
    for cls in registry.registered().values():
        made = set()
        for case in cls.cases:
            splits = "sample_weight" in cls.inputs and not cls.couples_batch
            for reduction in REDUCTIONS if splits else ("mean",):
                loss = cls(**{**case.settings, "reduction": reduction})
                layouts = tuple(case.layouts.items())
                others = tuple(name for name in case.optional if name != "sample_weight")
                if (repr(loss), layouts) in made:
                    continue
                made.add((repr(loss), layouts))
                if "sample_weight" in cls.inputs:
                    yield Way(loss, layouts, "weight", others)
                    yield Way(loss, layouts, "mask", others)
                if hasattr(loss, "ignore_index") and any(
                    spec.dtype == "int64" for spec in Way(loss, layouts, "label").specs().values()
                ):
                    yield Way(loss, layouts, "label")


@pytest.fixture(params=list(ways()), ids=str)
def way(request):
    return request.param


def poisoned(way, tensors, value):
    """Every floating tensor's left-out rows hold ``value``, all over or in one entry."""
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, spec in way.specs().items():
        if spec.dtype == "float" and spec.names[0] == "batch":
            changed[name][LEFT_OUT[0]] = value
            changed[name].reshape(len(changed[name]), -1)[LEFT_OUT[1], 0] = value
    return changed


def evaluate(specs, function, tensors, samples=range(6)):
    """The value, and the gradients by name, of a function of named tensors; values of these samples are weighed first."""
    given = {n: t.detach().clone().requires_grad_(specs[n].grad) for n, t in tensors.items()}
    value = function(**given)
    if value.dim() > 0:
        upstream = torch.linspace(0.5, 1.5, 6 * value[0].numel(), dtype=value.dtype).reshape(6, *value.shape[1:])
        (value * upstream[list(samples)]).sum().backward()
    else:
        value.backward()
    return value.detach(), {n: t.grad for n, t in given.items() if specs[n].grad}


def check(way, function, dtype=torch.float64, kept_function=None, **tolerance):
    tensors = way.draw(dtype)
    plain, plain_gradients = evaluate(way.specs(), kept_function or function, way.take(tensors, KEPT), KEPT)
    for value in POISON:
        got, gradients = evaluate(way.specs(), function, poisoned(way, tensors, value))
        if way.loss.reduction == "none":
            assert (got[LEFT_OUT] == 0).all()
            torch.testing.assert_close(got[KEPT], plain, **tolerance)
        else:
            torch.testing.assert_close(got, plain, **tolerance)
        for name, gradient in gradients.items():
            if way.specs()[name].names[0] == "batch":
                assert (gradient[LEFT_OUT] == 0).all(), f"{name}: {gradient[LEFT_OUT]}"
                gradient = gradient[KEPT]
            torch.testing.assert_close(gradient, plain_gradients[name], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_in_the_class(way, dtype):
    check(way, way.loss, dtype)


def test_in_the_function(way):
    function = getattr(pykd.functional, way.loss.name)
    known = inspect.signature(function).parameters
    settings = {name: value for name, value in way.loss.settings().items() if name in known}
    check(way, lambda **tensors: function(**way.loss.grouped(tensors), **settings))


def test_in_torchscript(way):
    check(way, torch.jit.script(way.loss), kept_function=way.loss)


def test_in_the_graph(way):
    optional = way.optional
    output = "loss_per_sample" if way.loss.reduction == "none" else "loss"
    graph = way.composition().graph(dict(way.layouts), optional, per_sample=not way.loss.couples_batch)
    check(way, lambda **tensors: graph(**tensors)[output])


def test_in_the_kernel_and_in_the_formula_behind_it(way, monkeypatch):
    """The formula behind a kernel is what runs in ONNX files where the kernel does not."""
    from pykd.fused import eager

    if not way.loss.covered_by_kernel(way.specs()):
        pytest.skip("no kernel")

    def run(**given):
        return way.loss(**given, kernels="on")

    check(way, run, torch.float32, way.loss, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(eager, "run", lambda call, weights, outputs: call.plain(call.tensors, weights))
    check(way, run, torch.float32, way.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "by", [torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_masks_and_weights_of_any_type_go_with_logits_of_any_type(loss_class, dtype, by):
    if "sample_weight" not in loss_class.inputs:
        pytest.skip("no weights")
    for layouts in {tuple(case.layouts.items()) for case in loss_class.cases}:
        for reduction in ("mean",) if loss_class.couples_batch else REDUCTIONS:
            way = Way(loss_class(reduction=reduction), layouts, "weight")
            tensors = way.draw(dtype)
            tensors["sample_weight"] = tensors["sample_weight"].to(by)
            value, gradients = evaluate(way.specs(), way.loss, tensors)
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            exact = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
            exact["sample_weight"] = tensors["sample_weight"].double()
            want = way.loss.reference(**way.loss.grouped({n: t.numpy() for n, t in exact.items()}))
            np.testing.assert_allclose(value.numpy(), want, rtol=1e-5, atol=1e-6)
            assert all(gradient.dtype == dtype for gradient in gradients.values())


def weighted():
    """What is exported with weights per row, and whether with kernels, where there are any."""
    for form in forms_of_inputs():
        if "sample_weight" in form.optional and not form.composition.students:
            for kernels in ("auto", "off") if form.has_kernel else ("off",):
                yield pytest.param(form, kernels, id=f"{form}-{kernels}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("engine", ["onnxruntime", "torchscript"])
@pytest.mark.parametrize(("form", "kernels"), list(weighted()))
def test_in_every_exported_form(form, kernels, engine, dtype, exported):
    subject = form
    loss = pykd.load(str(exported(subject, dtype)), engine=engine, kernels=kernels)
    specs = subject.graph().signature.inputs
    tensors = subject.draw({"batch": 6}, dtype=getattr(torch, dtype))
    like = tensors["sample_weight"]
    tensors["sample_weight"] = WEIGHTS.reshape(-1, *[1] * (like.dim() - 1)).expand_as(like).contiguous()
    mask = (tensors["sample_weight"] > 0).float()
    plain = loss.value(**{**tensors, "sample_weight": mask})
    for kind in (torch.bool, torch.int64, torch.float16, torch.float64):
        assert loss.value(**{**tensors, "sample_weight": mask.to(kind)})["loss"] == plain["loss"]
    if dtype in ("float32", "float64"):
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        assert loss.value(**{**arrays, "sample_weight": mask.bool().numpy()})["loss"] == plain["loss"].numpy()
    want = loss.value_and_gradient(**subject.take(tensors, KEPT))
    for value in POISON:
        for name, spec in specs.items():
            if spec.dtype == "float" and spec.names[0] == "batch":
                tensors[name][LEFT_OUT] = value
        got = loss.value_and_gradient(**tensors)
        for name in want:
            if "batch" not in next(output.axes for output in loss.signature.outputs if output.name == name):
                torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
            else:
                assert (got[name][LEFT_OUT] == 0).all(), name
                torch.testing.assert_close(got[name][KEPT], want[name], rtol=1e-5, atol=1e-6)


def test_every_loss_with_weights_is_here(loss_class):
    here = {way.loss.name for way in ways()}
    assert ("sample_weight" in loss_class.inputs) == (loss_class.name in here)
    assert any(str(subject).startswith(loss_class.name) for subject in subjects())
