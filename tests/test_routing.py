"""Which way a call goes in torch, by the formula or by a kernel, and that it changes nothing but the time."""

import copy
import io
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import pykd
from pykd.definition import Loss

STUDENT = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
TEACHER = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 4, -100, 2])


SOFT = pykd.SoftTarget(form="kl")
COMPOSED = pykd.compose({"soft": SOFT})
DISTILLED = pykd.DistillationLoss(logit_loss="soft_entropy", alpha=0, lambda2=0)


def soft(student=STUDENT, teacher=TEACHER, **given):
    return SOFT(student, teacher, **given)


def function(student=STUDENT, teacher=TEACHER, **given):
    return pykd.functional.soft_target(student, teacher, form="kl", **given)


def composed(student=STUDENT, teacher=TEACHER, **given):
    given = {f"soft_{name}" if name == "temperature" else name: value for name, value in given.items()}
    return COMPOSED(student_logits=student, teacher_logits=teacher, **given)["loss"]


def distilled(student=STUDENT, teacher=TEACHER, **given):
    given = {f"logit_{name}" if name == "temperature" else name: value for name, value in given.items()}
    return DISTILLED(student_logits=student, teacher_logits=teacher, **given)


WAYS = pytest.mark.parametrize("way", [soft, function, composed, distilled])


@pytest.fixture(autouse=True)
def as_it_starts():
    yield
    pykd.set_kernels("auto")


# ---- Who decides --------------------------------------------------------------------------------


@WAYS
def test_the_kernel_is_the_default_and_off_is_the_formula(way):
    with pykd.using_kernels() as ran:
        got = way()
    assert ran.kernels == ["soft_target"] and not ran.formulas
    with pykd.using_kernels("off") as ran:
        want = way()
    assert not ran.kernels and len(ran.formulas) == 1 and 'kernels="off"' in ran.formulas[0]
    torch.testing.assert_close(got, want)


@WAYS
def test_a_call_counts_more_than_a_block_and_a_block_more_than_the_default(way):
    def kernels(**given):
        with pykd.using_kernels() as ran:
            way(**given)
        return len(ran.kernels)

    pykd.set_kernels("off")
    assert kernels() == 0 and kernels(kernels="auto") == 1
    with pykd.using_kernels("on"):
        assert kernels() == 1 and kernels(kernels="off") == 0
    assert kernels() == 0


def test_a_loss_counts_more_than_a_block_and_less_than_a_call():
    for loss in (pykd.SoftTarget(kernels="off"), pickle.loads(pickle.dumps(pykd.SoftTarget(kernels="off")))):
        with pykd.using_kernels("on") as ran:
            loss(STUDENT, TEACHER)
            assert not ran.kernels
            loss(STUDENT, TEACHER, kernels="on")
            assert ran.kernels == ["soft_target"]
    assert loss.with_settings(temperature=3.0).kernels == "off"
    assert "kernels" not in loss.settings() and "kernels" not in repr(loss)
    for made in (
        pykd.compose({"soft": pykd.SoftTarget()}, kernels="off"),
        pykd.DistillationLoss(logit_loss="soft_entropy", alpha=0, lambda2=0, kernels="off"),
    ):
        with pykd.using_kernels() as ran:
            made(student_logits=STUDENT, teacher_logits=TEACHER)
        assert not ran.kernels and "kernels" not in str(made.recipe())


@pytest.mark.parametrize("word", ["yes", True, "", 1])
def test_other_words_are_refused(word):
    for call in (
        lambda: soft(kernels=word),
        lambda: function(kernels=word),
        lambda: composed(kernels=word),
        lambda: pykd.SoftTarget(kernels=word),
        lambda: pykd.compose({"soft": pykd.SoftTarget()}, kernels=word),
        lambda: pykd.set_kernels(word),
        lambda: pykd.using_kernels(word).__enter__(),
    ):
        with pytest.raises(ValueError, match="expected kernels to be 'auto' or 'on' or 'off', got"):
            call()


def test_a_block_is_of_its_thread_alone():
    def count():
        with pykd.using_kernels() as ran:
            soft()
        return len(ran.kernels)

    with pykd.using_kernels("off"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(count).result() == 1
        assert count() == 0


# ---- What takes the formula ---------------------------------------------------------------------


def traced(way, **given):
    return torch.jit.trace(lambda s: way(s, **given), STUDENT, check_trace=False)(STUDENT)


def compiled(way, **given):
    torch._dynamo.reset()
    return torch.compile(lambda s, t: way(s, t, **given), backend="eager", fullgraph=True)(STUDENT, TEACHER)


def dual(way, **given):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(
            way(forward_ad.make_dual(STUDENT, torch.ones_like(STUDENT)), **given)
        ).primal.clone()


def observed(way, **given):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return way(**given)


FORMULA = {
    "float64": (lambda way, **given: way(STUDENT.double(), TEACHER.double(), **given), "float64"),
    "trace": (traced, "torch.jit.trace"),
    "compile": (compiled, "torch.compile"),
    "grad": (lambda way, **given: torch.func.grad_and_value(lambda s: way(s, **given))(STUDENT)[1], "torch.func"),
    "vmap": (
        lambda way, **given: torch.vmap(lambda s: way(s, **given))(STUDENT.expand(2, 4, 5))[0],
        "torch.func",
    ),
    "jvp": (
        lambda way, **given: torch.func.jvp(lambda s: way(s, **given), (STUDENT,), (STUDENT,))[0],
        "torch.func|forward-mode",
    ),
    "dual": (dual, "forward-mode"),
    "mode": (observed, "sees every operator"),
    "learned": (
        lambda way, **given: way(temperature=torch.tensor(2.0, requires_grad=True), **given),
        "requires a gradient",
    ),
}


@WAYS
@pytest.mark.parametrize("case", FORMULA)
def test_what_no_kernel_computes_is_the_formulas_and_an_error_for_on(way, case):
    run, why = FORMULA[case]
    want = way(STUDENT.double(), TEACHER.double(), kernels="off")
    if case == "learned":
        want = way(STUDENT.double(), TEACHER.double(), kernels="off", temperature=2.0)
    with pykd.using_kernels() as ran:
        got = run(way)
    assert not ran.kernels
    if case != "compile":  # which asks nobody
        assert ran.formulas
        assert all(re.search(why, line) for line in ran.formulas), ran.formulas
    torch.testing.assert_close(got.detach().double(), want, rtol=1e-5, atol=1e-6)
    # What torch.compile sees of a function is its formula, which knows no such argument.
    message = "Argument mismatch" if (way, case) == (function, "compile") else 'kernels="on"'
    with pytest.raises(Exception, match=message):
        run(way, kernels="on")


def test_a_loss_with_hooks_takes_the_formula_which_they_see():
    loss, seen = pykd.SoftTarget(), []
    loss.register_forward_hook(lambda module, args, output: seen.append(output))
    with pykd.using_kernels() as ran:
        value = loss(STUDENT, TEACHER)
    assert seen == [value] and ran.formulas == ["soft_target: hooks of a module take the formula"]
    composition, seen = pykd.compose({"soft": pykd.SoftTarget()}), []
    composition.register_forward_hook(lambda module, args, output: seen.append(output))
    with pykd.using_kernels("on"):
        assert seen == [composition(student_logits=STUDENT, teacher_logits=TEACHER)]


class WithoutKernel(pykd.SoftTarget):
    """A loss that is its formula alone."""

    fused = Loss.fused


def test_a_loss_without_kernel_is_an_error_for_on():
    assert WithoutKernel()(STUDENT, TEACHER) == pykd.SoftTarget(kernels="off")(STUDENT, TEACHER)
    with pytest.raises(RuntimeError, match='kernels="on", got one of soft_target that none does: it has no kernel'):
        WithoutKernel()(STUDENT, TEACHER, kernels="on")
    both = pykd.compose({"soft": pykd.SoftTarget(), "plain": WithoutKernel(form="kl")})
    with pykd.using_kernels("on") as ran:
        both(student_logits=STUDENT, teacher_logits=TEACHER)
    assert ran.kernels == ["soft_target"]


def test_a_function_takes_what_only_its_formula_takes():
    """It does not check its inputs, as ever: logits of one sample, broadcast ones."""
    for student, teacher in ((STUDENT[0], TEACHER[0]), (STUDENT, TEACHER[:1])):
        torch.testing.assert_close(function(student, teacher), function(student, teacher, kernels="off"))
        with pytest.raises(ValueError, match="expected "):
            function(student, teacher, kernels="on")


# ---- Every loss, both ways ----------------------------------------------------------------------


def flat_call(composition, given, **how):
    return pykd.Composition.forward(composition, **given, **how)


def leaves(subject, tensors):
    specs = subject.graph().signature.inputs
    return {name: t.clone().requires_grad_(specs[name].grad) for name, t in tensors.items()}


def test_terms_have_autograd_of_their_own(loss_subject):
    """Used by themselves, used together with the loss, and after other calls of the same shapes."""
    tensors = loss_subject.draw(seed=4, dtype=torch.float32)
    for use in (
        lambda values: 2 * list(values.values())[-1],
        lambda values: values["loss"] + 3 * list(values.values())[-1],
        lambda values: -values["loss"],
    ):
        gradients = []
        for mode in ("off", "auto", "auto", "auto", "auto"):
            given = leaves(loss_subject, tensors)
            use(flat_call(loss_subject.composition, given, kernels=mode)).backward()
            gradients.append([t.grad for t in given.values() if t.requires_grad])
        for other in gradients[1:]:
            for got, want in zip(other, gradients[0], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item() + 1e-9)


def test_second_derivatives_are_the_formulas(loss_subject):
    tensors = loss_subject.draw(seed=5, dtype=torch.float32)
    results = []
    for mode in ("off", "auto"):
        given = leaves(loss_subject, tensors)
        students = [t for t in given.values() if t.requires_grad]
        value = flat_call(loss_subject.composition, given, kernels=mode)["loss"]
        first = torch.autograd.grad(value, students, create_graph=True)
        size = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(size, students) if size.requires_grad else [torch.zeros(())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item() + 1e-7)


def test_a_graph_that_is_kept_gives_the_same_again(loss_subject):
    given = leaves(loss_subject, loss_subject.draw(seed=6, dtype=torch.float32))
    value = flat_call(loss_subject.composition, given)["loss"]
    value.backward(retain_graph=True)
    once = [t.grad.clone() for t in given.values() if t.requires_grad]
    value.backward()
    for first, t in zip(once, (t for t in given.values() if t.requires_grad), strict=True):
        torch.testing.assert_close(t.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_without_gradients(loss_subject):
    tensors = loss_subject.draw(seed=7, dtype=torch.float32)
    want = flat_call(loss_subject.composition, leaves(loss_subject, tensors))
    with torch.no_grad():
        free = flat_call(loss_subject.composition, leaves(loss_subject, tensors))
    with torch.inference_mode():
        inferred = flat_call(loss_subject.composition, {n: t.clone() for n, t in tensors.items()})
    for name, value in want.items():
        assert not free[name].requires_grad
        torch.testing.assert_close(free[name], value.detach())
        torch.testing.assert_close(inferred[name].clone(), value.detach())


def test_copies_of_a_used_loss_work(loss_subject):
    tensors = loss_subject.draw(seed=8, dtype=torch.float32)
    parts = [part.loss for term in loss_subject.composition.named_terms for part in term.parts]
    for _ in range(3):
        want = flat_call(loss_subject.composition, tensors)["loss"]
    for original in (loss_subject.composition, *parts):
        saved = io.BytesIO()
        torch.save(original, saved)
        saved.seek(0)
        for other in (
            copy.deepcopy(original),
            copy.copy(original),
            pickle.loads(pickle.dumps(original)),
            torch.load(saved, weights_only=False),
        ):
            assert repr(other) == repr(original)
            if original is loss_subject.composition:
                assert torch.equal(flat_call(other, tensors)["loss"], want)


# ---- A plan that is kept skips no check ---------------------------------------------------------


def test_a_known_call_is_checked_as_the_first_one_is():
    loss = pykd.compose({"hard": pykd.HardTarget(), "soft": pykd.SoftTarget()})
    good = {"student_logits": STUDENT, "teacher_logits": TEACHER, "labels": LABELS}
    for _ in range(4):
        loss(**good)
    for changed, message in (
        ({"teacher_logits": TEACHER[:3]}, 'length 4 along "batch"'),
        ({"teacher_logits": TEACHER[:, :4]}, 'length 5 along "classes"'),
        ({"teacher_logits": TEACHER.double()}, "torch.float32, as"),
        ({"teacher_logits": TEACHER.to("meta")}, "on cpu, where"),
        ({"labels": LABELS + 1}, "0 to 4 or -100"),
        ({"labels": LABELS.int()}, "labels as float .* or int64"),
        ({"labels": LABELS[:3]}, 'length 4 along "batch"'),
        ({"labels": None}, "none for labels"),
        ({"soft_temperature": 0.0}, "soft_temperature"),
        ({"soft_temprature": 1.0}, "unknown soft_temprature"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss(**{**good, **changed})
        loss(**good)


def test_a_known_call_takes_the_numbers_and_the_data_of_this_one():
    loss = pykd.compose({"hard": pykd.HardTarget(), "soft": pykd.SoftTarget(form="kl")})
    plain = pykd.compose({"hard": pykd.HardTarget(), "soft": pykd.SoftTarget(form="kl")}, kernels="off")
    generator = torch.Generator().manual_seed(2)
    for round_ in range(12):
        student, teacher = torch.randn(2, 4, 5, generator=generator)
        labels = LABELS if round_ % 3 == 0 else LABELS.clamp(min=0)
        numbers = [
            {},
            {"soft_temperature": 1.0 + round_ // 4},
            {"hard_weight": 0.0},
            {"soft_weight": torch.tensor(0.5)},
        ]
        given = {"student_logits": student, "teacher_logits": teacher, "labels": labels, **numbers[round_ % 4]}
        if round_ % 5 == 4:
            given["sample_weight"] = torch.tensor([0.0, 1.0, 2.0, 0.5])
        results = []
        for each in (loss, plain):
            leaf = student.clone().requires_grad_()
            values = each(**{**given, "student_logits": leaf})
            values["loss"].backward()
            results.append([*values.values(), leaf.grad])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_one_tensor_under_two_names_is_no_way_for_others():
    loss = pykd.SoftTarget(form="kl", tau_squared=True)
    want = loss(STUDENT, TEACHER, kernels="off")
    for _ in range(4):
        assert loss(TEACHER, TEACHER) == 0
    for _ in range(4):
        torch.testing.assert_close(loss(STUDENT, TEACHER), want)
        assert loss(STUDENT, STUDENT) == 0


def test_a_setting_that_is_changed_counts():
    loss = pykd.SoftTarget(form="kl")
    for _ in range(3):
        loss(STUDENT, TEACHER)
    loss.temperature, loss.form = 5.0, "jsd"
    want = pykd.SoftTarget(5.0, form="jsd", kernels="off")(STUDENT, TEACHER)
    for _ in range(3):
        torch.testing.assert_close(loss(STUDENT, TEACHER), want)


def test_a_setting_that_is_changed_counts_in_compositions():
    loss = pykd.SoftTarget(form="kl")
    composition = pykd.compose({"soft": loss})
    for _ in range(4):
        composition(student_logits=STUDENT, teacher_logits=TEACHER)
    loss.form = "reverse_kl"
    want = pykd.SoftTarget(form="reverse_kl", kernels="off")(STUDENT, TEACHER)
    for _ in range(4):
        got = composition(student_logits=STUDENT, teacher_logits=TEACHER)["loss"]
        torch.testing.assert_close(got, want)


class WithForward(pykd.SoftTarget):
    """A loss that computes something else than the one that it comes from."""

    def forward(self, student_logits, teacher_logits):
        return 7.0 * (student_logits - teacher_logits).sum()


def test_a_forward_of_ones_own_is_what_is_computed():
    for _ in range(3):
        assert WithForward()(STUDENT, TEACHER) == 7.0 * (STUDENT - TEACHER).sum()
    with pytest.raises(RuntimeError, match="it has a forward of its own"):
        WithForward()(STUDENT, TEACHER, kernels="on")


def test_a_used_loss_goes_into_programs():
    loss = pykd.SoftTarget(form="kl")
    for _ in range(3):
        want = loss(STUDENT, TEACHER)
    torch.testing.assert_close(torch.jit.script(loss)(STUDENT, TEACHER), want)
    torch.testing.assert_close(torch.export.export(loss, (STUDENT, TEACHER)).module()(STUDENT, TEACHER), want)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(STUDENT, TEACHER), want)


def test_strided_and_expanded_tensors_are_read_as_they_are():
    loss = pykd.SoftTarget(form="kl")
    strided = torch.randn(5, 4).t()
    for teacher in (strided, strided.clone(), TEACHER[:1].expand(4, 5), torch.nn.Parameter(TEACHER.clone())) * 2:
        leaf = torch.randn(5, 4).t().requires_grad_()
        torch.testing.assert_close(loss(leaf, teacher), loss(leaf, teacher, kernels="off"))


# ---- Where a shorter way goes wrong -------------------------------------------------------------


def both_ways(make, *arguments):
    """What a function gives with kernels and by formulas."""
    results = []
    for mode in ("auto", "off"):
        with pykd.using_kernels(mode):
            results.append(make(*arguments))
    return results


def test_second_derivatives_through_several_calls_on_one_student():
    several = pykd.compose(
        {"warm": pykd.SoftTarget(temperature=2.0), "hot": (pykd.SoftTarget(temperature=4.0, form="kl"), 0.5)}
    )

    def derivatives(of):
        leaf = STUDENT.clone().requires_grad_()
        value = of(student_logits=leaf, teacher_logits=TEACHER)["loss"]
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        return first.detach(), torch.autograd.grad(first.square().sum(), leaf)[0]

    for got, want in zip(*both_ways(derivatives, several), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_hooks_of_tensors_run_once_in_second_derivatives():
    def gradient():
        leaf = STUDENT.clone().requires_grad_()
        student = leaf * 1
        student.register_hook(lambda g: 2 * g)
        return torch.autograd.grad(SOFT(student, TEACHER), leaf, create_graph=True)[0].detach()

    torch.testing.assert_close(*both_ways(gradient))


class Custom(pykd.SoftTarget):
    """A formula beside a kernel that does what it likes."""

    fused = Loss.fused


def in_place(student, teacher):
    difference = student - teacher
    difference[:, 0] = 0.0
    return difference.square().mean()


def without_grad(student, teacher):
    with torch.no_grad():
        weight = student.softmax(-1)
    return (weight * (student - teacher).square()).sum()


def with_numbers(student, teacher):
    return student.sum() * student.detach().max().item() if bool(student.sum() > 0) else teacher.sum() - student.sum()


@pytest.mark.parametrize("formula", [in_place, without_grad, with_numbers])
def test_formulas_beside_a_kernel_are_computed_anew_each_time(formula):
    class Loose(Custom):
        def formula_call(self, given):
            return (lambda **all_: formula(all_["student_logits"], all_["teacher_logits"])), dict(given)

    loss = pykd.compose({"soft": pykd.SoftTarget(), "loose": Loose()})
    for seed in range(5):
        student, teacher = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed))

        def step(student=student, teacher=teacher):
            leaf = student.clone().requires_grad_()
            value = loss(student_logits=leaf, teacher_logits=teacher)["loss"]
            value.backward()
            return value.detach(), leaf.grad

        for got, want in zip(*both_ways(step), strict=True):
            torch.testing.assert_close(got, want)


def test_a_setting_that_is_a_tensor_becomes_a_number_or_an_error():
    loss = pykd.SoftTarget()
    loss.temperature = torch.tensor(3.0)
    assert loss.temperature == 3.0 and isinstance(loss.temperature, float)
    for seed in range(5):
        student, teacher = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(loss(student, teacher), loss(student, teacher, kernels="off"))
    with pytest.raises((TypeError, ValueError), match="temperature"):
        loss.temperature = torch.tensor(2.0, requires_grad=True)
    beta = torch.tensor(0.5)
    for value in (0.5, 0.1):
        beta.fill_(value)
        got, want = both_ways(lambda: pykd.functional.soft_target(STUDENT, TEACHER, form="jsd", beta=beta))
        torch.testing.assert_close(got, want)


def test_numbers_of_every_kind():
    for number in (3, 3.0, np.float32(3.0), np.array(3.0), torch.tensor(3.0), torch.tensor([3.0])):
        got, want = both_ways(lambda number=number: SOFT(STUDENT, TEACHER, temperature=number))
        torch.testing.assert_close(got, SOFT(STUDENT, TEACHER, temperature=3.0))
        torch.testing.assert_close(got, want.float().reshape(()))  # the formula takes the number's type, and its axes
        got = COMPOSED(student_logits=STUDENT, teacher_logits=TEACHER, soft_temperature=number)["loss"]
        torch.testing.assert_close(got, SOFT(STUDENT, TEACHER, temperature=3.0))


def test_weights_that_change_before_backward_are_an_error_and_inputs_only_where_they_count():
    leaf, weight = STUDENT.clone().requires_grad_(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    value = pykd.SoftTarget(reduction="none")(leaf, TEACHER, weight)
    weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()
    buffer = TEACHER.clone()
    for _ in range(4):  # accumulated over micro batches that come in one buffer
        value = SOFT(leaf, buffer)
        buffer.copy_(torch.randn(4, 5))
        value.backward()
    value = SOFT(leaf, buffer)
    buffer.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, leaf, create_graph=True)


def test_a_teacher_of_inference_mode():
    with torch.inference_mode():
        teacher, labels = TEACHER * 2, LABELS.clone()
    both = pykd.compose({"hard": pykd.HardTarget(), "soft": pykd.SoftTarget()})

    def step():
        leaf = STUDENT.clone().requires_grad_()
        both(student_logits=leaf, teacher_logits=teacher, labels=labels)["loss"].backward()
        return leaf.grad

    for _ in range(4):
        torch.testing.assert_close(*both_ways(step))


def test_terms_one_after_the_other():
    both = pykd.compose({"hard": pykd.HardTarget(), "soft": pykd.SoftTarget()})

    def gradients():
        leaf = STUDENT.clone().requires_grad_()
        values = both(student_logits=leaf, teacher_logits=TEACHER, labels=LABELS.clamp(min=0))
        return [torch.autograd.grad(values[name], leaf)[0] for name in ("hard", "soft")]

    for _ in range(4):
        for got, want in zip(*both_ways(gradients), strict=True):
            torch.testing.assert_close(got, want)


def test_outputs_are_tensors_of_their_own():
    loss = pykd.compose({"soft": (pykd.SoftTarget(), 1.0)})
    weight = torch.ones(4)
    for _ in range(4):
        with torch.no_grad():
            values = loss(student_logits=STUDENT, teacher_logits=TEACHER, sample_weight=weight)
        before = values["soft"].item()
        values["loss"] /= 4
        assert values["soft"].item() == before


def test_the_default_device_is_not_where_results_go():
    for _ in range(4):
        with torch.device("meta"):
            value = SOFT(STUDENT, TEACHER)
        torch.testing.assert_close(value, SOFT(STUDENT, TEACHER, kernels="off"))


def test_every_setting_of_a_loss_is_computed_one_way_or_the_other():
    """A kernel may refuse settings that the loss takes; then they are the formula's."""
    embeddings = torch.randn(2, 6, 3)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for width in (1e-3, 9e-3, 0.01):
        loss = pykd.DistributionDistillation(width=width)
        torch.testing.assert_close(*both_ways(lambda loss=loss: loss(*embeddings, labels)), rtol=1e-4, atol=1e-5)


def test_what_is_known_of_calls_does_not_grow_with_their_numbers():
    loss = pykd.SoftTarget()
    for step in range(100):
        loss(STUDENT, TEACHER, temperature=2.0 + step / 100)
        loss(STUDENT, TEACHER, temperature=2.0 + step / 100)
    (plan,) = loss.__dict__["_plans"]._plans.values()
    assert len(plan.ways) <= 4


def test_an_attribute_of_a_composition_counts_when_it_is_changed():
    loss = pykd.compose({"hard": pykd.HardTarget(), "soft": pykd.SoftTarget()})
    given = {"student_logits": STUDENT, "teacher_logits": TEACHER, "labels": LABELS}
    for _ in range(3):
        loss(**given)
    loss.share_ignored = False
    torch.testing.assert_close(loss(**given)["loss"], loss(**given, kernels="off")["loss"])


def test_a_formula_of_ones_own_is_no_kernels():
    loss = pykd.SoftTarget()
    loss.forward = lambda *tensors: torch.tensor(42.0)
    assert loss(STUDENT, TEACHER) == 42.0

    class Sevenfold(pykd.SoftTarget):
        def formula_call(self, given):
            formula, every = super().formula_call(given)
            return (lambda **all_: 7.0 * formula(**all_)), every

    for _ in range(3):
        value = pykd.compose({"soft": Sevenfold()})(student_logits=STUDENT, teacher_logits=TEACHER)["loss"]
        torch.testing.assert_close(value, 7.0 * pykd.SoftTarget()(STUDENT, TEACHER))


def test_a_prepared_call_is_made_by_its_function_alone():
    from pykd import _core

    with pytest.raises(TypeError):
        _core.KernelCall.__new__(_core.KernelCall).run((), (), 1)
