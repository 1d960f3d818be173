"""Logits per token, (batch, tokens, classes): every token is a sample, whatever form the loss is in."""

import itertools

import numpy as np
import pytest
import torch

import pykd
from pykd import FeatureL2, HardTarget, SoftTarget, compose
from pykd.composition import as_composition
from pykd.definition import REDUCTIONS, registry

registry.load_all()
PER_TOKEN = [cls for cls in registry.registered().values() if "batch tokens" in cls.sample_axes]


def cases():
    """Losses whose inputs per token are those per sample with one axis more."""
    for cls in PER_TOKEN:
        for case, reduction in itertools.product(cls.cases, REDUCTIONS):
            layouts = {
                name: " ".join(axes.replace("batch tokens", "batch").split()) for name, axes in case.layouts.items()
            }
            if any("tokens" in spec.names for name in cls.inputs for spec in cls.declared(name)):
                continue  # features have tokens anyway; below
            yield cls(**{**case.settings, "reduction": reduction}), layouts, case.optional


def flat(tensors, specs):
    return {name: t.flatten(0, 1) if specs[name].names[:2] == ("batch", "tokens") else t for name, t in tensors.items()}


def draw(loss, layouts, optional, dtype=torch.float64):
    composition = as_composition(loss.with_settings(reduction="mean"))
    student = next(name for name in loss.inputs if loss.declared(name)[0].grad)
    layouts = {student: loss.declared(student)[0].axes, **layouts}
    layouts = {name: axes.replace("batch", "batch tokens") for name, axes in layouts.items()}
    specs = composition.choose(layouts, optional)
    return composition.draw(specs, {"batch": 4, "tokens": 5}, seed=1, dtype=dtype), specs


def run(function, tensors, specs):
    given = {name: t.clone().requires_grad_(specs[name].grad) for name, t in tensors.items()}
    value = function(**given)
    (value * torch.linspace(1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)).sum().backward()
    return value.detach(), {name: t.grad for name, t in given.items() if t.requires_grad}


@pytest.mark.parametrize("form", ["class", "function", "script", "kernel"])
@pytest.mark.parametrize(("loss", "layouts", "optional"), cases(), ids=str)
def test_a_token_is_a_sample(loss, layouts, optional, form):
    tensors, specs = draw(loss, layouts, optional, torch.float32 if form == "kernel" else torch.float64)
    function = getattr(pykd.functional, loss.name)
    forms = {
        "class": loss,
        "function": lambda **given: function(**given, **loss.settings()),
        "script": torch.jit.script(loss),
        "kernel": lambda **given: function(**given, **loss.settings(), kernels="on"),
    }
    if form == "kernel" and not loss.covered_by_kernel(specs):
        pytest.skip("the formula alone")
    value, gradients = run(forms[form], tensors, specs)
    want, want_gradients = run(loss, flat(tensors, specs), specs)
    assert value.shape == ((4, 5) if loss.reduction == "none" else ())
    torch.testing.assert_close(value.reshape(want.shape), want, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.flatten(0, 1), want_gradients[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("loss", "layouts", "optional"), cases(), ids=str)
def test_the_reference_takes_tokens(loss, layouts, optional):
    tensors, _ = draw(loss, layouts, optional)
    want = loss.reference(**{n: t.numpy() for n, t in tensors.items()})
    np.testing.assert_allclose(loss(**tensors).numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("indices", [False, True])
def test_the_numbers_of_torch(indices, tokens, weighted, smoothing, reduction):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4) if tokens else (7,)
    student = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, shape, generator=generator)
    labels.view(-1)[::3] = -100
    if not indices:
        labels = torch.softmax(torch.randn(*shape, 5, generator=generator, dtype=torch.float64), -1)
    weight = torch.rand(5, generator=generator, dtype=torch.float64) if weighted else None
    got = HardTarget(label_smoothing=smoothing, reduction=reduction)(student, labels, class_weight=weight)
    classes_second = (student.movedim(-1, 1), labels if indices else labels.movedim(-1, 1))
    want = torch.nn.functional.cross_entropy(
        *classes_second, weight=weight, label_smoothing=smoothing, reduction=reduction
    )
    torch.testing.assert_close(got, want)
    reference = HardTarget(label_smoothing=smoothing, reduction=reduction).reference(
        student.numpy(), labels.numpy(), class_weight=None if weight is None else weight.numpy()
    )
    np.testing.assert_allclose(got.numpy(), reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_class_weights_through_the_kernel(dtype):
    student, labels = torch.randn(3, 4, 6).to(dtype), torch.randint(6, (3, 4))
    labels[0] = -100
    weight = torch.rand(6)
    for reduction in REDUCTIONS:
        results = []
        for kernels in ("off", "on"):
            leaf = student.clone().requires_grad_()
            value = pykd.functional.hard_target(leaf, labels, class_weight=weight, reduction=reduction, kernels=kernels)
            value.sum().backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            results[1][1], results[0][1], rtol=2e-2, atol=1e-3 if dtype != torch.float32 else 1e-6
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_label_out_of_range_is_nan_whatever_the_weights_of_the_classes(smoothing):
    """Where nobody checks: in a graph, as in a compiled or exported one."""
    loss = compose({"hard": HardTarget(label_smoothing=smoothing)})
    graph = loss.graph({"labels": "batch"}, ["class_weight"], check=False)
    weight = torch.tensor([0.0, 1.0, 2.0])
    for label in (3, -1):
        values = graph(student_logits=torch.zeros(2, 3), labels=torch.tensor([1, label]), class_weight=weight)
        assert torch.isnan(values["loss"])
    ignored = graph(student_logits=torch.zeros(2, 3), labels=torch.tensor([1, -100]), class_weight=weight)
    assert torch.isfinite(ignored["loss"])


def language_model(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "student_logits": torch.randn(3, 4, 6, generator=generator, dtype=torch.float64).to(dtype),
        "teacher_logits": torch.randn(3, 4, 6, generator=generator, dtype=torch.float64).to(dtype),
        "labels": torch.randint(6, (3, 4), generator=generator),
        "student_features": torch.randn(3, 4, 8, generator=generator, dtype=torch.float64).to(dtype),
        "teacher_features": torch.randn(3, 4, 8, generator=generator, dtype=torch.float64).to(dtype),
    }
    tensors["labels"][0, 2:] = -100
    tensors["labels"][2, 1:] = -100
    return tensors


def three_terms(**settings):
    return compose({"hard": HardTarget(), "soft": (SoftTarget(), 0.5), "hidden": (FeatureL2(), 2.0)}, **settings)


@pytest.mark.parametrize("kernels", ["off", "on"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_padding_of_a_language_model(dtype, kernels):
    """The obvious call: logits per token, labels with −100, hidden states, and what padding holds is NaN."""
    loss, tensors = three_terms(), language_model(dtype)
    kept = tensors["labels"] != -100
    rows = {name: tensor[kept] for name, tensor in tensors.items()}
    for name in ("student_features", "teacher_features"):
        rows[name] = rows[name].unsqueeze(1)
    want = loss(**rows)
    for name, tensor in tensors.items():
        if name != "labels":
            tensor[~kept] = float("nan")
    given = {name: t.clone().requires_grad_(name.startswith("student_")) for name, t in tensors.items()}
    got = loss(**given, kernels=kernels)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
    got["loss"].backward()
    for name in ("student_logits", "student_features"):
        assert (given[name].grad[~kept] == 0).all() and given[name].grad[kept].isfinite().all()
        assert given[name].grad[kept].any()


def test_every_output_matches_the_reference_and_the_graph():
    loss, tensors = three_terms(), language_model()
    graph = loss.graph({"labels": "batch tokens"}, per_sample=True)
    assert graph.signature.inputs["student_logits"].axes == "batch tokens classes"
    assert graph.signature.outputs["loss_per_sample"] == ("batch", "tokens")
    got = graph(**tensors)
    want = loss.reference(per_sample=True, **{n: t.numpy() for n, t in tensors.items()})
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name].numpy(), want[name], rtol=1e-12, atol=1e-12, err_msg=name)
    for name, value in torch.jit.script(graph)(**tensors).items():
        torch.testing.assert_close(value, got[name])


def test_a_mask_per_token():
    loss, tensors = compose({"soft": SoftTarget(), "hidden": FeatureL2()}), language_model()
    kept = tensors.pop("labels") != -100
    got = loss(**tensors, sample_weight=kept)
    torch.testing.assert_close(
        got["soft"], SoftTarget()(tensors["student_logits"][kept], tensors["teacher_logits"][kept])
    )
    torch.testing.assert_close(
        got["hidden"],
        FeatureL2()(tensors["student_features"][kept].unsqueeze(1), tensors["teacher_features"][kept].unsqueeze(1)),
    )


def test_distillation_loss_takes_tokens():
    tensors = language_model()
    loss = pykd.DistillationLoss(logit_loss="soft_entropy", lambda2=0, aux_loss="l2")
    lists = {f"{who}_features": [tensors.pop(f"{who}_features")] for who in ("student", "teacher")}
    got = loss.terms(**tensors, **lists)
    kept = tensors["labels"] != -100
    want = loss.terms(
        **{name: t[kept] for name, t in tensors.items()},
        **{name: [feature[kept].unsqueeze(1) for feature in features] for name, features in lists.items()},
    )
    for name in want:
        torch.testing.assert_close(got[name], want[name])


WRONG = [
    (
        dict(labels=torch.zeros(3, dtype=torch.int64)),
        r"expected labels with axes .*\(batch, tokens\).*as student_logits has",
    ),
    (dict(teacher_logits=torch.zeros(3, 6).double()), r"expected teacher_logits with axes \(batch, tokens, classes\)"),
    (dict(labels=torch.zeros(3, 5, dtype=torch.int64)), 'expected labels to have length 4 along "tokens"'),
    (dict(labels=torch.full((3, 4), 6)), 'expected labels to hold indices along "classes" from 0 to 5'),
    (dict(student_features=torch.zeros(3, 5, 8).double()), 'to have length 4 along "tokens"'),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_does_not_go_together(change, message):
    with pytest.raises(ValueError, match=message):
        three_terms()(**{**language_model(), **change})


def test_a_bare_loss_says_what_does_not_go_together():
    with pytest.raises(ValueError, match=r"expected sample_weight with axes \(batch, tokens\), as student_logits has"):
        SoftTarget()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), sample_weight=torch.ones(2))
    with pytest.raises(ValueError, match="expected spatial_avg to be None where every token has a weight"):
        FeatureL2(spatial_avg="mean")(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), sample_weight=torch.ones(2, 3))


def test_features_that_cannot_leave_tokens_out_say_so():
    several = pykd.DistillationLoss(aux_loss="l2", features_index=[0, 1])
    with pytest.raises(ValueError, match="expected feature_l2 to have samples along .batch, tokens., as labels has"):
        several.graph({"labels": "batch tokens"})
    whole = pykd.DistillationLoss(aux_loss="l2", features_index=[0, 1], share_ignored=False)
    with pytest.raises(ValueError, match="values over the same samples, got hard over batch tokens; aux over batch"):
        whole.graph({"labels": "batch tokens"}, per_sample=True)
    assert "loss" in whole.graph({"labels": "batch tokens"}).signature.outputs


def test_layouts_follow_from_each_other():
    loss = three_terms()
    for given in ({"labels": "batch tokens"}, {"student_logits": "batch tokens classes", "labels": "batch tokens"}):
        specs = loss.choose(given, ["sample_weight"])
        assert specs["teacher_logits"].axes == "batch tokens classes"
        assert specs["sample_weight"].axes == "batch tokens"
    probabilities = loss.choose({"teacher_logits": "batch tokens classes"}, [])
    assert probabilities["labels"].axes == "batch tokens classes"
    with pytest.raises(ValueError, match="expected labels with axes"):
        loss.choose({"student_logits": "batch classes", "labels": "batch tokens"}, [])


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_label_smoothing_has_a_range(value):
    with pytest.raises(ValueError, match="expected label_smoothing to be a number from 0 to 1"):
        HardTarget(label_smoothing=value)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_files(tmp_path, dtype):
    loss = three_terms()
    folder = pykd.export(
        loss, tmp_path, layouts={"labels": "batch tokens"}, per_sample=True, dtype=dtype, progress=lambda line: None
    )
    # Logits go to the kernel as they are, without a float32 copy of them.
    assert f"soft_target_{dtype}" in pykd.load(folder, engine="onnxruntime", kernels="on").kernels_in_use
    for sizes in ((3, 4), (1, 1), (2, 7)):
        tensors = language_model(getattr(torch, dtype))
        tensors = {
            name: t.repeat(1, 2, *[1] * (t.dim() - 2))[: sizes[0], : sizes[1]].contiguous()
            for name, t in tensors.items()
        }
        kept = tensors["labels"] != -100
        for name in tensors:
            if name != "labels":
                tensors[name][~kept] = float("nan")
        given = {name: t.clone().requires_grad_(name.startswith("student_")) for name, t in tensors.items()}
        want = loss(**given)
        want["loss"].backward()
        for engine, kernels in (("onnxruntime", "on"), ("onnxruntime", "off"), ("torchscript", "auto")):
            got = pykd.load(folder, engine=engine, kernels=kernels).value_and_gradient(**tensors)
            assert got["soft_per_sample"].shape == sizes
            for name in want:
                torch.testing.assert_close(got[name], want[name].detach(), rtol=1e-5, atol=1e-6)
            for name in ("student_logits", "student_features"):
                limit = (1e-6 if dtype == "float32" else 2**-8) * max(float(given[name].grad.abs().max()), 1e-2)
                assert (got[f"grad_{name}"].float() - given[name].grad.float()).abs().max() <= limit
                assert (got[f"grad_{name}"][~kept] == 0).all()
