"""DistillationLoss: the two recipes as they stand, each argument against its formula, and wrong calls."""

import re

import numpy as np
import pytest
import torch

import pykd
from pykd import MKMMD, DistillationLoss, FeatureL1, FeatureL2, HardTarget, SoftTarget
from pykd.composition import as_composition
from pykd.composition import recipe as recipes
from pykd.definition import Spec, registry
from tests.test_settings import declare


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "teacher_logits": normal(2, 200),
        "teacher_features": [normal(2, 49, 64), normal(2, 196, 32)],
        "student_logits": normal(2, 200),
        "student_features": [normal(2, 49, 64), normal(2, 196, 32)],
        "labels": normal(2, 200).softmax(-1),
    }


@pytest.mark.parametrize("aux_loss", ["l1", "MK-MMD"])
def test_the_two_recipes_run_as_they_stand(aux_loss):
    loss = DistillationLoss(logit_loss="soft_entropy", lambda1=1.0, lambda2=0, tau=2, mode="student_softening",
                            aux_loss=aux_loss, features_index=[-1], alpha=1.0, beta=1.0, gamma=1.0)  # fmt: skip
    student_logits = torch.randn(2, 200, requires_grad=True)
    student_features = [torch.randn(2, 49, 2048), torch.randn(2, 196, 1024, requires_grad=True)]
    teacher_features = [torch.randn(2, 49, 2048), torch.randn(2, 196, 1024)]
    call = dict(
        teacher_logits=torch.randn(2, 200),
        teacher_features=teacher_features,
        student_logits=student_logits,
        student_features=student_features,
        labels=torch.randn(2, 200).softmax(-1),
    )
    value = loss(**call)
    assert value.shape == ()
    value.backward()
    assert torch.isfinite(student_logits.grad).all() and student_logits.grad.any()
    assert torch.isfinite(student_features[-1].grad).all() and student_features[-1].grad.any()
    terms = loss.terms(**call)
    assert list(terms) == ["loss", "hard", "logit", "aux"]
    torch.testing.assert_close(terms["loss"], terms["hard"] + terms["logit"] + terms["aux"])


def test_every_argument_against_its_formula(inputs):
    loss = DistillationLoss(
        logit_loss="soft_entropy", aux_loss="l2", alpha=2.0, beta=3.0, gamma=0.5, lambda1=0.25, lambda2=4.0, tau=3,
        features_index=[-1, 0],
    )  # fmt: skip
    on_teacher = torch.randn(2, 200, dtype=torch.float64)
    got = loss.terms(**inputs, student_logits_teacher_features=on_teacher)

    def cross_entropy(student, teacher):
        p = np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True)
        return -(p * (student - np.log(np.exp(student).sum(-1, keepdims=True)))).sum(-1).mean()

    s, t, y = (inputs[name].numpy() for name in ("student_logits", "teacher_logits", "labels"))
    hard = -(y * (s - np.log(np.exp(s).sum(-1, keepdims=True)))).sum(-1).mean()
    logit = 0.25 * cross_entropy(s, t / 3) + 4.0 * cross_entropy(on_teacher.numpy(), t / 3)
    aux = 0.0
    for x, z in zip(inputs["student_features"], inputs["teacher_features"], strict=True):
        x, z = (f.numpy() / np.linalg.norm(f.numpy(), axis=-1, keepdims=True) for f in (x, z))
        aux += ((x - z) ** 2).sum(-1).mean()
    np.testing.assert_allclose([got[n].item() for n in ("hard", "logit", "aux")], [hard, logit, aux], rtol=1e-12)
    np.testing.assert_allclose(got["loss"].item(), 2.0 * hard + 0.5 * logit + 3.0 * aux, rtol=1e-12)


def test_student_softening_divides_the_students_logits_alone_in_the_logit_term(inputs):
    plain = DistillationLoss(logit_loss="soft_entropy", lambda2=0, tau=4)
    soft = DistillationLoss(logit_loss="soft_entropy", lambda2=0, tau=4, mode="student_softening")
    divided = {**inputs, "student_logits": inputs["student_logits"] / 4}
    torch.testing.assert_close(soft.terms(**inputs)["logit"], plain.terms(**divided)["logit"])
    torch.testing.assert_close(soft.terms(**inputs)["hard"], plain.terms(**inputs)["hard"])


def test_terms_are_the_registered_losses(inputs):
    loss = DistillationLoss(logit_loss="soft_entropy", lambda2=0, tau=2, aux_loss="MK-MMD", spatial_avg="mean")
    terms = loss.terms(**inputs)
    torch.testing.assert_close(terms["hard"], HardTarget()(inputs["student_logits"], inputs["labels"]))
    soft = SoftTarget(temperature=2.0, soften_student=False)
    torch.testing.assert_close(terms["logit"], soft(inputs["student_logits"], inputs["teacher_logits"]))
    mmd = MKMMD(spatial_avg="mean")(inputs["student_features"][-1], inputs["teacher_features"][-1])
    torch.testing.assert_close(terms["aux"], mmd)


@pytest.mark.parametrize(("aux_loss", "cls"), [("l1", FeatureL1), ("l2", FeatureL2), ("MK-MMD", MKMMD)])
def test_features_index_counts_as_in_python(inputs, aux_loss, cls):
    loss = DistillationLoss(aux_loss=aux_loss, features_index=[0])
    want = cls()(inputs["student_features"][0], inputs["teacher_features"][0])
    torch.testing.assert_close(loss.terms(**inputs)["aux"], want)


@pytest.mark.parametrize("labels", ["indices", "probabilities"])
@pytest.mark.parametrize("per_student", [False, True])
def test_several_students_are_batch_times_students_samples(labels, per_student):
    d, batch = 3, 2
    loss = DistillationLoss(logit_loss="soft_entropy", lambda2=0, aux_loss="MK-MMD", multiple_lrs=d)
    flat = DistillationLoss(logit_loss="soft_entropy", lambda2=0, aux_loss="MK-MMD")
    student_logits, student_features = torch.randn(batch, d, 7).double(), torch.randn(batch, d, 4, 5).double()
    teacher_logits, teacher_features = torch.randn(batch, 7).double(), torch.randn(batch, 4, 5).double()
    lead = (batch, d) if per_student else (batch,)
    y = torch.randint(7, lead) if labels == "indices" else torch.randn(*lead, 7).double().softmax(-1)
    got = loss.terms(
        teacher_logits=teacher_logits, teacher_features=[teacher_features], student_logits=student_logits,
        student_features=[student_features], labels=y,
    )  # fmt: skip
    want = flat.terms(
        teacher_logits=teacher_logits.repeat_interleave(d, 0),
        teacher_features=[teacher_features.repeat_interleave(d, 0)],
        student_logits=student_logits.flatten(0, 1),
        student_features=[student_features.flatten(0, 1)],
        labels=y.flatten(0, 1) if per_student else y.repeat_interleave(d, 0),
    )
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_a_weight_of_zero_leaves_its_tensors_out(inputs):
    loss = DistillationLoss(logit_loss="soft_entropy", lambda2=0, alpha=0, aux_loss="l1", beta=0)
    value = loss(teacher_logits=inputs["teacher_logits"], student_logits=inputs["student_logits"], labels=None)
    assert torch.isfinite(value)
    assert list(loss.terms(**inputs)) == ["loss", "logit"]


def test_parameters_replace_weights_and_temperature_in_one_call(inputs):
    loss = DistillationLoss(logit_loss="soft_entropy", lambda2=0, tau=2, alpha=1.0)
    other = DistillationLoss(logit_loss="soft_entropy", lambda2=0, tau=5, alpha=0.25, gamma=3.0)
    got = loss(**inputs, hard_weight=0.25, logit_weight=3.0, logit_temperature=5.0)
    torch.testing.assert_close(got, other(**inputs))


def test_recipe_round_trip(inputs):
    loss = DistillationLoss(logit_loss="soft_entropy", lambda2=0, tau=2, aux_loss="l1", features_index=[0])
    text = recipes.dumps(loss.recipe())
    again = recipes.build(recipes.tomllib.loads(text))
    torch.testing.assert_close(again(**inputs), loss(**inputs))


WRONG = [
    (
        dict(logit_loss="kl"),
        "expected logit_loss to be None, 'soft_entropy' or the name of a registered loss, got 'kl'; ",
    ),
    (dict(aux_loss="mmd"), "expected aux_loss to be None or the name of a registered loss, got 'mmd'; "),
    (
        dict(aux_loss="soft_entropy"),
        "expected aux_loss to be None or the name of a registered loss, got 'soft_entropy'; ",
    ),
    (dict(aux_loss=["l1", "mmd"]), "expected aux_loss to be None or the name of a registered loss, got 'mmd'; "),
    (dict(aux_loss=[]), "expected aux_loss to be None, a name, or a list of one to three names, got []"),
    (
        dict(aux_loss=["l1", "l2", "MK-MMD", "DDL"]),
        "expected aux_loss to be None, a name, or a list of one to three names, got",
    ),
    (
        dict(logit_loss="l1"),
        "expected logit_loss to name a loss that takes student_logits, got 'l1', which takes student_features",
    ),
    (
        dict(logit_loss="RKL", mode="student_softening"),
        "expected mode to be None for logit_loss='RKL', which softens as",
    ),
    (
        dict(aux_loss="DDL", spatial_avg="mean"),
        "expected spatial_avg to be None for aux_loss='DDL', which has no such setting",
    ),
    (dict(mode="soft"), "expected mode to be one of"),
    (dict(spatial_avg="max"), "expected spatial_avg to be one of"),
    (dict(logit_loss="soft_entropy", tau=0), "expected tau to be a number greater than 0, got 0"),
    (dict(alpha=float("nan")), "expected alpha to be a number that is finite, got nan"),
    (dict(gamma="1"), "expected gamma to be a number, got '1'; pass a number"),
    (dict(logit_loss="KD", lambda1=float("inf")), "expected lambda1 to be a number that is finite, got inf"),
    (dict(tau=-1), "expected tau to be a number greater than 0, got -1"),
    (dict(logit_loss=3), "expected logit_loss to be None, a name, or a list of one to three names, got 3"),
    (dict(aux_loss="l1", features_index=-1), "expected features_index to be a list of whole numbers, got -1"),
    (dict(aux_loss="l1", features_index=[0.5]), "expected features_index to be a list of whole numbers, got [0.5]"),
    (dict(share_ignored="no"), "expected share_ignored to be one of True, False, got 'no'"),
    (dict(multiple_lrs=True), "expected multiple_lrs to be None or the number of students, got True"),
    (dict(alpha=0), "expected at least one term"),
    (dict(aux_loss="l1", features_index=[]), "expected features_index to name at least one entry"),
    (dict(multiple_lrs=0), "expected multiple_lrs to be None or the number of students, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_settings(arguments, message):
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        DistillationLoss(**arguments)


def test_wrong_calls(inputs):
    loss = DistillationLoss(logit_loss="soft_entropy", tau=2, aux_loss="l1", features_index=[1], multiple_lrs=None)
    with pytest.raises(ValueError, match="none for student_logits_teacher_features; pass each"):
        loss(**inputs)
    inputs["student_logits_teacher_features"] = inputs["student_logits"]
    with pytest.raises(TypeError, match="expected student_features to be a list"):
        loss(**{**inputs, "student_features": inputs["student_features"][0]})
    with pytest.raises(
        ValueError, match="expected teacher_features to have the entry 1 of features_index, got a list of 1"
    ):
        loss(**{**inputs, "teacher_features": inputs["teacher_features"][:1]})
    with pytest.raises(ValueError, match='expected teacher_features_0 to have length 196 along "tokens"'):
        loss(**{**inputs, "teacher_features": [inputs["teacher_features"][1], inputs["teacher_features"][0]]})
    with pytest.raises(ValueError, match="the unknown temperature"):
        loss(**inputs, temperature=3.0)
    students = DistillationLoss(multiple_lrs=2)
    with pytest.raises(ValueError, match='length 2 along "students"'):
        students(student_logits=torch.randn(4, 3, 5), labels=torch.zeros(4, dtype=torch.int64))
    assert pykd.DistillationLoss is DistillationLoss


# ---- Any registered loss ------------------------------------------------------------------------


def call_of(loss, tensors):
    """The arguments of a call, with features in lists, from those of one loss."""
    lists = {}
    for name, tensor in tensors.items():
        base = next((b for b in ("student_features", "teacher_features") if name == b or name[:-2] == b), None)
        if base is None:
            lists[name] = tensor
        else:
            lists.setdefault(base, []).append(tensor)
    return lists


def drawn(loss, seed=0):
    composition = as_composition(loss)
    specs = composition.choose({}, ())
    return composition.draw(specs, seed=seed, dtype=torch.float64)


def test_any_loss_by_its_name(loss_class):
    """As the aux loss, and as the logit loss where it takes logits: the value is its own."""
    layers = {spec.layers: 1 for name in loss_class.inputs for spec in loss_class.declared(name) if spec.layers}
    loss = loss_class(**layers)
    tensors = drawn(loss)
    aux = DistillationLoss(aux_loss=loss_class.name, alpha=0, beta=0.5, features_index=[0])
    torch.testing.assert_close(aux(**call_of(loss, tensors)), 0.5 * loss(**tensors))
    again = recipes.build(recipes.tomllib.loads(recipes.dumps(aux.recipe())))
    torch.testing.assert_close(again(**call_of(loss, tensors)), aux(**call_of(loss, tensors)))
    if "student_logits" in loss_class.inputs:
        logit = DistillationLoss(logit_loss=loss_class.name, alpha=0, gamma=2.0, lambda1=0.25, tau=1.5)
        softened = {"temperature": 1.5} if "temperature" in loss_class.scalars else {}
        want = loss_class(**softened)(**tensors)
        torch.testing.assert_close(logit(**call_of(loss, tensors)), 0.5 * want)


def test_aliases_bring_their_settings(inputs):
    loss = DistillationLoss(logit_loss="rkl", alpha=0, tau=2)
    want = SoftTarget(temperature=2.0, form="reverse_kl")(inputs["student_logits"], inputs["teacher_logits"])
    torch.testing.assert_close(loss(**inputs), want)


def test_a_list_is_weighed_by_the_lambdas(inputs):
    loss = DistillationLoss(
        logit_loss=["soft_entropy", "RKL"], aux_loss=["l1", "l2", "MK-MMD"], lambda1=0.5, lambda2=2.0, lambda3=0.0, tau=2,
        features_index=[0, 1],
    )  # fmt: skip
    got = loss.terms(**inputs)
    logits = inputs["student_logits"], inputs["teacher_logits"]
    logit = 0.5 * SoftTarget(2.0, soften_student=False)(*logits) + 2 * SoftTarget(2.0, form="reverse_kl")(*logits)
    torch.testing.assert_close(got["logit"], logit)
    pairs = list(zip(inputs["student_features"], inputs["teacher_features"], strict=True))
    torch.testing.assert_close(got["aux"], sum(0.5 * FeatureL1()(*pair) + 2 * FeatureL2()(*pair) for pair in pairs))
    assert "aux_lambda3" not in loss.scalars
    moved = loss.terms(**inputs, aux_lambda1=0.0, logit_lambda2=0.0)
    torch.testing.assert_close(moved["aux"], sum(2 * FeatureL2()(*pair) for pair in pairs))


def test_embeddings_come_by_name_or_as_features_that_are_vectors(inputs):
    loss = DistillationLoss(aux_loss=["DDL"], alpha=0, features_index=[-1])
    labels = torch.tensor([0, 0, 1, 1])
    x, y = torch.randn(2, 4, 5, dtype=torch.float64).unbind()
    want = pykd.DistributionDistillation()(x, y, labels)
    torch.testing.assert_close(loss(student_embeddings=x, teacher_embeddings=y, labels=labels), want)
    torch.testing.assert_close(loss(student_features=[x], teacher_features=[y], labels=labels), want)
    with pytest.raises(ValueError, match="got none for student_embeddings, teacher_embeddings; pass each"):
        loss(student_features=inputs["student_features"], teacher_features=inputs["teacher_features"], labels=labels)


def apart(student_features, teacher_features, reduction: str = "mean"):
    return (student_features.mean() - teacher_features.detach().mean()).square()


def test_losses_that_name_axes_differently_share_a_tensor(inputs, monkeypatch):
    given = {
        "student_features": Spec("batch places width", grad=True),
        "teacher_features": Spec("batch teacher_places teacher_width"),
    }
    made = declare(apart, inputs=given)
    monkeypatch.setitem(registry._LOSSES, name := made.name, made)
    loss = DistillationLoss(aux_loss=["l1", name], alpha=0, features_index=[0, 1])
    assert f"student_features_1_for_{name}" in loss.input_layouts
    pairs = list(zip(inputs["student_features"], inputs["teacher_features"], strict=True))
    torch.testing.assert_close(loss(**inputs), sum(FeatureL1()(*pair) + apart(*pair) for pair in pairs))
