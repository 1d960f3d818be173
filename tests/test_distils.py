"""Every loss distils: descent on the student's tensors alone leads to where the teacher is.

Reference and formula may share a sign that is wrong, or a student that is detached; that cannot hide from what the loss is
for. The value falls, and the teacher's own tensors have a lower one than others. A divergence falls to 0, which it is at the
teacher and where the loss sees no difference (what is shifted, rotated, permuted …), and nowhere beside it. What is no divergence
makes each sample like the teacher, or the labels. A loss of which that is not so says why (``properties().distils``). Generated
from the declarations: nothing here names a loss.
"""

import inspect
import re

import pytest
import torch

from tests.conftest import forms_of_inputs

STEPS = 200
IS_POSITIVE = re.compile(r"Returns:\n\s+[^.]{0,25}?(?:[Aa]t least 0[;.,](?! and)|[Bb]etween 0 and|[Ff]rom 0[ ,])")


def partners(subject):
    """The teacher's tensor for each of the student's that has one: the same name, or what it declares to be like."""
    named = {
        name: spec.like or name.replace("student", "teacher", 1) for name, spec in subject.specs.items() if spec.grad
    }
    return {
        name: other
        for name, other in named.items()
        if name != other
        and other in subject.specs
        and len(subject.specs[other].names) == len(subject.specs[name].names)
        and subject.specs[other].draw == subject.specs[name].draw
    }


def setting(subject):
    """Small tensors in float64, as wide for the student as for the teacher, every sample of which counts."""
    least = subject.composition.least_lengths
    sizes = {axis: max(4, least.get(axis, 1)) for spec in subject.specs.values() for axis in spec.names}
    for spec in subject.specs.values():
        if spec.index_of is not None:
            sizes[spec.index_of] = max(6, sizes.get(spec.index_of, 0))  # more than are listed
    for student, teacher in partners(subject).items():
        for own, other in zip(subject.specs[student].names, subject.specs[teacher].names, strict=True):
            sizes[other] = sizes[own]
    tensors = subject.draw(sizes, seed=21)
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


# From free numbers to what a tensor may hold, and back.
FREE = {
    "positive": (torch.exp, torch.log),
    "probabilities": (lambda x: torch.softmax(x, dim=-1), torch.log),
    "log_probabilities": (lambda x: torch.log_softmax(x, dim=-1), lambda x: x),
    "unit": (lambda x: torch.nn.functional.normalize(x, dim=-1), lambda x: x),
}
ANY = (lambda x: x, lambda x: x)


def descended(subject, loss, student):
    """The student's tensors after some steps of Adam, whose length goes to 0; None where there is no gradient."""
    free = {name: FREE.get(subject.specs[name].draw, ANY)[1](t).clone().requires_grad_() for name, t in student.items()}

    def tensors():
        return {name: FREE.get(subject.specs[name].draw, ANY)[0](x) for name, x in free.items()}

    groups = [{"params": [x], "lr": 0.15 * float(x.detach().square().mean().sqrt())} for x in free.values()]
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / STEPS) ** 2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(tensors())
        if not value.requires_grad:
            return None
        value.backward()
        if all(x.grad is None or not x.grad.any() for x in free.values()):
            break
        optimizer.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in tensors().items()}


def likenesses(subject, tensors, student):
    """How like the teacher, and how like the labels, each of the student's tensors is, at most 1: what a trainer wants of it."""
    found = []
    for name, tensor in student.items():
        spec = subject.specs[name]
        if spec.like is not None:
            a, b = tensor, tensors[spec.like]
            if spec.draw == "logits":  # a shift of all classes says nothing
                a, b = (x - x.mean(dim=spec.class_axis, keepdim=True) for x in (a, b))
            found.append(torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).mean())
        for other, labels in tensors.items():
            own = subject.specs[other]
            if spec.draw == "logits" and own.index_of == spec.names[-1] and own.names == spec.names[:-1]:
                found.append(torch.softmax(tensor, dim=-1).gather(-1, labels.unsqueeze(-1)).mean())
            elif spec.draw == "logits" and own.index_of == spec.names[-1] and own.names[:-1] == spec.names[:-1]:
                at = tensor.gather(-1, labels)
                for third, listed in tensors.items():
                    if "log_prob" in subject.specs[third].draw and subject.specs[third].axes == own.axes:
                        a, b = at - at.mean(dim=-1, keepdim=True), listed - listed.mean(dim=-1, keepdim=True)
                        found.append(torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).mean())
            elif spec.draw == "logits" and own.draw == "probabilities" and own.axes == spec.axes:
                found.append((torch.softmax(tensor, dim=-1) * labels).sum(dim=-1).mean())
    return [float(one) for one in found]


def complaints(subject, loss, tensors):
    """What says that the loss does not distil."""
    start = students_of(subject, tensors)
    end = descended(subject, loss, start)
    if end is None or all(torch.equal(end[name], start[name]) for name in start):
        return ["the student has no gradient"]
    before, after = float(loss(start)), float(loss(end))
    teacher = {name: tensors[other].clone() for name, other in partners(subject).items()}
    at_teacher = float(loss({**start, **teacher})) if teacher else None
    of_value = []
    if not after < before - 1e-9 * (1 + abs(before)):
        of_value.append(f"descent leads from {before} to {after}")
    if IS_POSITIVE.search(inspect.getdoc(type(subject.loss)) or "") and min(before, after) < -1e-12:
        of_value.append(f"values are at least 0, says its docstring, and here {before} and {after}")
    if at_teacher is not None and not at_teacher < before:
        of_value.append(f"at the teacher the value is {at_teacher}, elsewhere {before}")
    if subject.loss.properties().zero_when_equal is True:
        if not -1e-12 <= after <= 0.1 * before:
            of_value.append(f"descent leads from {before} to {after}, but the value is 0 at the teacher")
        generator = torch.Generator().manual_seed(3)
        for size in (1e-3, 0.1, 1.0):
            moved = {
                name: t + size * torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in teacher.items()
            }
            if not float(loss({**start, **moved})) > 0:
                of_value.append(f"{size} beside the teacher the value is {float(loss({**start, **moved}))}")
        return of_value
    likes = [likenesses(subject, tensors, student) for student in (start, end)]
    liker = any(y > x + 0.2 * (1 - x) for x, y in zip(*likes, strict=True))
    if likes[0] and not subject.loss.couples_batch:
        if not liker:
            of_likeness = f"the student was like the teacher or the labels by {likes[0]}, and now is by {likes[1]}"
            return [of_likeness] if holds_constants(subject, tensors) else [*of_value, of_likeness]
        if holds_constants(subject, tensors):  # so that its gradient is not that of its value
            return []
        return [one for one in of_value if one.startswith("descent")]
    return of_value


def students_of(subject, tensors):
    return {name: tensors[name].clone() for name, spec in subject.specs.items() if spec.grad}


def holds_constants(subject, tensors):
    loss = subject.loss
    return bool(loss.constants(**loss.grouped({name: tensor.numpy() for name, tensor in tensors.items()})))


def test_descent_brings_the_student_to_the_teacher(loss_subject):
    tensors = setting(loss_subject)
    found = complaints(loss_subject, loss_of(loss_subject, tensors), tensors)
    reason = loss_subject.loss.properties().distils
    if reason is not True:
        assert isinstance(reason, str) and reason
        assert found, f"it does distil: declare no distils={reason!r}"
        assert "the student has no gradient" not in found
        return
    assert not found, f"{'; '.join(found)}: mend it, or declare why in properties(): distils='…'"


def judged():
    """One case per form of the inputs, of losses that distil."""
    return [form for form in forms_of_inputs() if form.composition.single and form.loss.properties().distils is True]


@pytest.mark.parametrize("form", judged(), ids=str)
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
