"""Ignored class indices in compositions: which terms leave the sample out, in every form."""

import pytest
import torch

import pykd
from pykd import FeatureL2, HardTarget, Part, SoftTarget, compose
from pykd.composition import Composition, recipe

KEPT = [0, 2, 3]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    features = {f"{who}_features": torch.randn(5, 3, 6, generator=generator).double() for who in ("student", "teacher")}
    labels = torch.tensor([0, -100, 2, 3, -100])
    return {"student_logits": student, "teacher_logits": teacher, "labels": labels, **features}


def three_terms(**settings):
    return compose({"hard": HardTarget(), "soft": (SoftTarget(), 0.5), "aux": (FeatureL2(), 2.0)}, **settings)


def kept(tensors):
    return {name: tensor[KEPT] for name, tensor in tensors.items()}


def test_padding_is_left_out_of_every_term_by_itself(tensors):
    loss = three_terms()
    got, want = loss(**tensors), loss(**kept(tensors))
    assert got.keys() == want.keys() == {"loss", "hard", "soft", "aux"}
    for name in want:
        torch.testing.assert_close(got[name], want[name])
        reference = loss.reference(**{n: t.numpy() for n, t in tensors.items()})[name]
        torch.testing.assert_close(got[name].item(), float(reference), rtol=1e-12, atol=1e-12)


def test_samples_without_a_label_teach_where_that_is_wanted(tensors):
    loss = three_terms(share_ignored=False)
    got = loss(**tensors)
    torch.testing.assert_close(got["soft"], SoftTarget()(tensors["student_logits"], tensors["teacher_logits"]))
    torch.testing.assert_close(got["hard"], three_terms()(**kept(tensors))["hard"])
    reference = loss.reference(**{n: t.numpy() for n, t in tensors.items()})
    torch.testing.assert_close(got["loss"].item(), float(reference["loss"]), rtol=1e-12, atol=1e-12)
    assert recipe.build(loss.recipe()).share_ignored is False
    assert "share_ignored" not in three_terms().recipe()
    single = pykd.DistillationLoss(logit_loss="soft_entropy", lambda2=0, share_ignored=False)
    assert recipe.build(single.recipe()).share_ignored is False


def test_distillation_loss_leaves_padding_out(tensors):
    loss = pykd.DistillationLoss(logit_loss="soft_entropy", lambda2=0, aux_loss="l1")

    def call(given):
        given = dict(given)
        lists = {f"{who}_features": [given.pop(f"{who}_features")] for who in ("student", "teacher")}
        return loss.terms(**given, **lists)

    got, want = call(tensors), call(kept(tensors))
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("carrying", [False, True], ids=["shared labels", "labels per student"])
def test_several_students(carrying):
    loss = pykd.DistillationLoss(logit_loss="soft_entropy", lambda2=0, multiple_lrs=2)
    student, teacher, labels = torch.randn(5, 2, 4), torch.randn(5, 4), torch.tensor([0, -100, 2, 3, -100])
    given = labels.unsqueeze(1).expand(5, 2).contiguous() if carrying else labels
    want = loss.terms(student_logits=student[KEPT], teacher_logits=teacher[KEPT], labels=given[KEPT])
    for padding in (0.0, float("nan"), float("inf"), float("-inf")):
        for kernels in ("off", "on"):
            leaf, constant = student.clone(), teacher.clone()
            leaf[[1, 4]] = constant[[1, 4]] = padding
            leaf.requires_grad_()
            got = loss.terms(student_logits=leaf, teacher_logits=constant, labels=given, kernels=kernels)
            for name in want:
                torch.testing.assert_close(got[name], want[name])
            got["loss"].backward()
            assert (leaf.grad[[1, 4]] == 0).all() and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("mask", [torch.bool, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_mask_and_ignored_labels_together(tensors, dtype, mask):
    loss = three_terms()
    given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    got = loss(**given, sample_weight=torch.tensor([1, 1, 0, 1, 0]).to(mask))
    want = loss(**{name: tensor[[0, 3]] for name, tensor in given.items()})
    for name in want:
        torch.testing.assert_close(got[name], want[name])
        assert got[name].dtype == torch.float32


def test_padding_that_holds_nan_reaches_no_term_and_no_gradient(tensors):
    loss = three_terms()

    def run(given):
        given = {name: t.clone().requires_grad_(name.startswith("student_")) for name, t in given.items()}
        loss(**given)["loss"].backward()
        return {name: given[name].grad for name in given if name.startswith("student_")}

    want = run(kept(tensors))
    for value in (float("nan"), float("inf"), float("-inf")):
        poisoned = {name: t.clone() for name, t in tensors.items()}
        for name in poisoned:
            if name != "labels":
                poisoned[name][[1, 4]] = value
        for name, gradient in run(poisoned).items():
            torch.testing.assert_close(gradient[KEPT], want[name])
            assert (gradient[[1, 4]] == 0).all()


def test_graphs_kernels_and_torchscript_agree(tensors):
    loss = three_terms()
    single = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    want = loss(**single)
    graph = loss.graph({"labels": "batch"}, per_sample=True)
    for got in (graph(**single), torch.jit.script(graph)(**single), loss(**single, kernels="on")):
        for name in want:
            torch.testing.assert_close(got[name], want[name])
    assert (graph(**single)["loss_per_sample"][[1, 4]] == 0).all()
    reference = loss.reference(per_sample=True, **{n: t.numpy() for n, t in tensors.items()})
    torch.testing.assert_close(graph(**tensors)["loss_per_sample"], torch.tensor(reference["loss_per_sample"]))


def test_two_labels_leave_out_what_both_ignore():
    """Two tasks, one of which may have no label: each hard term goes by its own, the soft one by both."""
    loss = compose(
        {
            "a": [Part(HardTarget(), inputs={"labels": "labels_a"})],
            "b": [Part(HardTarget(), inputs={"labels": "labels_b"})],
            "soft": SoftTarget(),
        }
    )
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    a, b = torch.tensor([0, -100, 1, -100]), torch.tensor([-100, 2, 1, -100])
    got = loss(student_logits=student, teacher_logits=teacher, labels_a=a, labels_b=b)
    torch.testing.assert_close(got["a"], torch.nn.functional.cross_entropy(student, a))
    torch.testing.assert_close(got["b"], torch.nn.functional.cross_entropy(student, b))
    torch.testing.assert_close(got["soft"], SoftTarget()(student[:3], teacher[:3]))


def test_one_input_of_labels_has_one_ignored_index():
    with pytest.raises(ValueError, match="expected one ignore_index for the input 'labels', got -100 and 255"):
        compose({"a": HardTarget(), "b": HardTarget(ignore_index=255)})


def test_nothing_kept_is_zero(tensors):
    values = three_terms()(**{**tensors, "labels": torch.full((5,), -100)})
    assert all(value == 0 for value in values.values())


def test_terms_without_a_value_per_sample_see_every_sample(tensors):
    loss = compose({"hard": HardTarget(), "mmd": pykd.MKMMD()})
    named = {name: tensors[name] for name in tensors if name != "teacher_logits"}
    want = pykd.MKMMD()(tensors["student_features"], tensors["teacher_features"])
    torch.testing.assert_close(loss(**named)["mmd"], want)
    assert isinstance(loss, Composition)


@pytest.mark.slow
def test_exported_files(tensors, tmp_path):
    loss = three_terms()
    folder = pykd.export(loss, tmp_path, layouts={"labels": "batch"}, per_sample=True, progress=lambda line: None)
    single = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    for engine, kernels in (("onnxruntime", "on"), ("onnxruntime", "off"), ("torchscript", "auto")):
        ran = pykd.load(folder, engine=engine, kernels=kernels)
        want = ran.value_and_gradient(**kept(single))
        poisoned = {name: t.clone() for name, t in single.items()}
        for name in poisoned:
            if name != "labels":
                poisoned[name][[1, 4]] = float("nan")
        got = ran.value_and_gradient(**poisoned)
        for name, value in want.items():
            torch.testing.assert_close(got[name][KEPT] if got[name].dim() else got[name], value)
            assert got[name].dim() == 0 or (got[name][[1, 4]] == 0).all()
        torch.testing.assert_close(want["loss"], loss(**kept(single))["loss"])
