"""Every loss distils: descent on the student's tensors alone leads to where the teacher is.

Reference and formula may share a sign that is wrong, or a student that is detached; that cannot hide from what the loss is
for. The value falls. The teacher's own tensors have a lower one than others. A divergence falls to 0, which it is at the teacher
alone and where the loss sees no difference (what is shifted, rotated, permuted …). What is no divergence makes each sample like the
teacher, or the labels. Generated from the declarations: nothing here names a loss.
"""

import pytest
import torch

from tests.conftest import forms_of_inputs

STEPS = 200


def setting(subject):
    """Small tensors in float64, every sample of which counts."""
    sizes = {axis: min(length, 4) for axis, length in subject.composition.trial_sizes(subject.specs)["odd"].items()}
    least = subject.composition.least_lengths
    tensors = subject.draw({axis: max(length, least.get(axis, 1)) for axis, length in sizes.items()}, seed=21)
    counting = {name: torch.ones_like(tensors[name]) for name in subject.inputs_of("weights", "mask")}
    ignored = getattr(subject.loss, "ignore_index", None)
    labels = {
        name: torch.where(tensors[name] == ignored, ignored - 1, tensors[name])
        for name in subject.inputs_of("indices")
        if ignored is not None and ignored > 0
    }
    return {**tensors, **counting, **labels}


def loss_of(subject, tensors):
    """The loss as a function of the student's tensors by name."""
    graph = subject.graph()
    return lambda student: graph(**{**tensors, **student})["loss"]


def students_of(subject, tensors):
    return {name: tensors[name].clone() for name, spec in subject.specs.items() if spec.grad}


def descended(loss, student):
    """The student's tensors after some steps of Adam, whose length goes to 0; None where there is no gradient."""
    given = {name: tensor.clone().requires_grad_() for name, tensor in student.items()}
    groups = [{"params": [t], "lr": 0.15 * float(t.detach().square().mean().sqrt())} for t in given.values()]
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / STEPS) ** 2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(given)
        if not value.requires_grad:
            return None
        value.backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in given.items()}


def likeness(subject, tensors, student):
    """How like the teacher (or the labels) the student is, at most 1: what a trainer wants of it. None where nothing says so."""
    found = []
    for name, tensor in student.items():
        spec = subject.specs[name]
        if spec.like is not None:
            a, b = tensor, tensors[spec.like]
            if spec.draw == "logits":  # a shift of all classes says nothing
                a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
            found.append(torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).mean())
        elif spec.draw == "logits":
            for other, labels in tensors.items():
                if subject.specs[other].draw == "indices" and subject.specs[other].index_of == spec.names[-1]:
                    found.append(torch.softmax(tensor, dim=-1).gather(-1, labels.unsqueeze(-1)).mean())
                elif subject.specs[other].draw == "probabilities" and subject.specs[other].axes == spec.axes:
                    found.append((torch.softmax(tensor, dim=-1) * labels).sum(dim=-1).mean())
    return float(sum(found) / len(found)) if found else None


def complaints(subject, loss, tensors):
    """What says that the loss does not distil."""
    start = students_of(subject, tensors)
    end = descended(loss, start)
    if end is None:
        return ["the student has no gradient"]
    found = []
    before, after = float(loss(start)), float(loss(end))
    if not after < before - 1e-9 * (1 + abs(before)):
        found.append(f"descent leads from {before} to {after}")
    teacher = {name: tensors[subject.specs[name].like].clone() for name in start if subject.specs[name].like}
    if teacher and not float(loss({**start, **teacher})) < before:
        found.append(f"at the teacher the value is {float(loss({**start, **teacher}))}, elsewhere {before}")
    if subject.loss.properties().zero_when_equal is True:
        if not -1e-12 <= after <= 0.1 * before:
            found.append(f"descent leads from {before} to {after}, but the value is 0 at the teacher")
        generator = torch.Generator().manual_seed(3)
        for size in (1e-3, 0.1, 1.0):
            moved = {
                name: t + size * torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in teacher.items()
            }
            if not float(loss(moved)) > 0:
                found.append(f"{size} beside the teacher the value is {float(loss(moved))}")
    elif not subject.loss.couples_batch:
        likes = [likeness(subject, tensors, student) for student in (start, end)]
        if None not in likes and not likes[1] > likes[0] + 0.2 * (1 - likes[0]):
            found.append(f"the student was like the teacher by {likes[0]}, and now is by {likes[1]}")
    return found


def test_descent_brings_the_student_to_the_teacher(loss_subject):
    tensors = setting(loss_subject)
    found = complaints(loss_subject, loss_of(loss_subject, tensors), tensors)
    assert not found, "; ".join(found)


SINGLE = [form for form in forms_of_inputs() if form.composition.single]


@pytest.mark.parametrize("form", SINGLE, ids=str)
@pytest.mark.parametrize("fault", ["a flipped sign", "a detached student"])
def test_a_fault_that_formula_and_reference_share_is_seen(form, fault):
    tensors = setting(form)
    right = loss_of(form, tensors)

    def wrong(student):
        if fault == "a flipped sign":
            return -right(student)
        value = right({name: tensor.detach() for name, tensor in student.items()})
        return value + 0 * sum(tensor.sum() for tensor in student.values())

    assert complaints(form, wrong, tensors)
