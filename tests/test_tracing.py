"""Losses inside torch.compile, torch.export and torch.func: in one graph, with the numbers of the eager call.

What depends on numbers (a label out of range) is checked in eager calls, and under torch.func as well.
"""

import inspect

import pytest
import torch

import pykd
from pykd.composition import Composition
from tests.conftest import composed_subjects, forms_of_inputs, one_per_loss, subjects

FORM = pytest.mark.parametrize("form", forms_of_inputs(), ids=str)
ONE = pytest.mark.parametrize("form", [*one_per_loss(), *composed_subjects()], ids=str)


class Named(torch.nn.Module):
    """A module whose loss is called by its flat names, as a training step calls it."""

    def __init__(self, subject):
        super().__init__()
        self.loss = (
            subject.composition.named_terms[0].parts[0].loss if subject.composition.single else subject.composition
        )

    def forward(self, **tensors):
        if isinstance(self.loss, Composition):
            return Composition.forward(self.loss, **tensors)["loss"]
        return self.loss(**tensors)


class InADictionary(Named):
    """The same for torch.export, whose free shapes do not go with keywords."""

    def forward(self, tensors):
        return super().forward(**tensors)


def value_and_gradients(function, subject, tensors):
    specs = subject.graph().signature.inputs
    given = {name: tensor.clone().requires_grad_(specs[name].grad) for name, tensor in tensors.items()}
    value = function(**given)
    value.backward()
    return [value.detach(), *(given[name].grad for name in given if specs[name].grad)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def in_every_form(subject):
    """A step that calls the module, and of one loss its function and a composition of it as well."""
    module = Named(subject)
    if not subject.composition.single:
        return module
    loss = subject.loss
    function = getattr(pykd.functional, loss.name)
    known = inspect.signature(function).parameters
    settings = {name: value for name, value in loss.settings().items() if name in known}
    composition = pykd.compose({"term": (loss, 0.5)})

    def step(**tensors):
        by_function = function(**loss.grouped(tensors), **settings)
        return module(**tensors) + 5 * by_function + 3 * Composition.forward(composition, **tensors)["loss"]

    return step


@pytest.mark.slow
@ONE
def test_compiles_to_one_graph(form):
    """With its gradients, and again with another batch; tests/test_settings.py has the value in every case."""
    step = in_every_form(form)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed, sizes in enumerate(({}, {"batch": 4})):
        tensors = form.draw(sizes, seed=seed)
        got = value_and_gradients(compiled, form, tensors)
        for a, b in zip(got, value_and_gradients(step, form, tensors), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hard_target[labels:batch]", "composed", "recipe-l1"])
def test_inductor(name):
    subject = next(subject for subject in subjects() if subject.name == name)
    tensors = subject.draw(seed=1, dtype=torch.float32)
    compiled = torch.compile(Named(subject), fullgraph=True)
    got = value_and_gradients(compiled, subject, tensors)
    for a, b in zip(got, value_and_gradients(Named(subject), subject, tensors), strict=True):
        torch.testing.assert_close(a, b)


def exports_with_a_free_batch(subject, strict):
    module = InADictionary(subject)
    tensors = subject.draw(seed=3)
    free = {name: dict.fromkeys(range(tensor.dim()), torch.export.Dim.AUTO) for name, tensor in tensors.items()}
    program = torch.export.export(module, (tensors,), dynamic_shapes=(free,), strict=strict)
    for sizes in ({"batch": 4}, {"batch": 9}):
        others = subject.draw(sizes, seed=4)
        torch.testing.assert_close(program.module()(others), module(others))


@pytest.mark.slow
@FORM
def test_exports_with_a_free_batch(form):
    exports_with_a_free_batch(form, strict=False)


@pytest.mark.slow
@ONE
def test_exports_with_a_free_batch_by_its_source(form):
    exports_with_a_free_batch(form, strict=True)


def test_vmap_and_grad_see_several_batches_at_once(subject):
    module = Named(subject)
    specs = subject.graph().signature.inputs
    batches = [subject.draw(seed=seed) for seed in range(3)]
    stacked = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
    got = torch.func.vmap(lambda tensors: module(**tensors))(stacked)
    torch.testing.assert_close(got, torch.stack([module(**batch) for batch in batches]))

    students = {name for name, spec in specs.items() if spec.grad}

    def loss_of(student, rest):
        return module(**student, **rest)

    def parts(tensors):
        return {n: t for n, t in tensors.items() if n in students}, {
            n: t for n, t in tensors.items() if n not in students
        }

    gradients = torch.func.vmap(torch.func.grad(loss_of))(*parts(stacked))
    for i, batch in enumerate(batches):
        want = value_and_gradients(module, subject, batch)[1:]
        for name, gradient in zip((n for n in batch if n in students), want, strict=True):
            torch.testing.assert_close(gradients[name][i], gradient)


def test_make_fx_and_jit_trace(subject):
    module = Named(subject)
    tensors = subject.draw(seed=5)
    names = list(tensors)

    def positional(*values):
        return module(**dict(zip(names, values, strict=True)))

    traced = torch.fx.experimental.proxy_tensor.make_fx(positional)(*tensors.values())
    torch.testing.assert_close(traced(*tensors.values()), module(**tensors))
    others = subject.draw(seed=6)
    torch.testing.assert_close(torch.jit.trace(positional, tuple(tensors.values()))(*others.values()), module(**others))


def test_labels_out_of_range_are_found_under_torch_func_and_are_nan_in_a_trace():
    loss = pykd.HardTarget()
    student, labels = torch.randn(2, 3, 4), torch.tensor([[0, 1, 2], [0, 4, 1]])
    with pytest.raises(ValueError, match="got 4"):
        torch.func.vmap(loss)(student, labels)
    with pytest.raises(ValueError, match="got 4"):
        torch.func.grad(loss)(student[1], labels[1])
    torch.func.functionalize(loss)(student[0], labels[0])
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.isnan(compiled(student[1], labels[1]))
    with pytest.raises(Exception, match="expected teacher_logits to have length 4"):
        torch.compile(pykd.SoftTarget(), fullgraph=True, backend="eager")(torch.zeros(2, 4), torch.zeros(2, 5))


def test_a_training_step_compiles_with_its_loss():
    """Model, composition and class indices in one compiled step, with a temperature that changes."""
    loss = pykd.compose({"hard": pykd.HardTarget(), "soft": (pykd.SoftTarget(), 0.5)})
    model = torch.nn.Linear(4, 3)

    def step(x, teacher, labels, temperature):
        return loss(student_logits=model(x), teacher_logits=teacher, labels=labels, soft_temperature=temperature)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    x, teacher, labels = torch.randn(5, 4), torch.randn(5, 3), torch.tensor([0, 1, 2, -100, 1])
    for temperature in (2.0, 3.0, 5.0):
        got, want = compiled(x, teacher, labels, temperature), step(x, teacher, labels, temperature)
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name])
