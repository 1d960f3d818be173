"""Which layouts of the inputs of a loss go together, and what a call says that mixes others."""

import pytest
import torch

import pykd
from pykd.composition import as_composition
from pykd.definition import Case, Spec, whole
from pykd.definition.spec import forms
from tests.test_settings import declare


def specs(*axes, **fields):
    return tuple(Spec(one, **fields) for one in axes)


VECTORS, TOKENS, MAPS = "batch channels", "batch tokens channels", "batch channels height width"
RANKS = {
    "student_features": specs(VECTORS, TOKENS, MAPS, grad=True, like="teacher_features"),
    "teacher_features": specs(VECTORS, TOKENS, MAPS),
}


def together(layouts, optional=()):
    return [{name: list(axes) for name, axes in form.axes.items()} for form in forms("batch", layouts, set(optional))]


def test_inputs_agree_on_the_axes_that_both_can_have():
    assert together(RANKS) == [{name: [axes] for name in RANKS} for axes in (VECTORS, TOKENS, MAPS)]
    wider = specs("batch depth", "batch depth height width")
    assert together({"x": specs(VECTORS, MAPS), "y": wider}) == [
        {"x": [VECTORS], "y": ["batch depth"]},
        {"x": [MAPS], "y": ["batch depth height width"]},
    ]
    masks = specs("batch tokens", "batch height width")
    assert together({**RANKS, "seen": masks}, ["seen"]) == [
        {name: [axes] for name in RANKS} | {"seen": seen}
        for axes, seen in ((VECTORS, []), (TOKENS, ["batch tokens"]), (MAPS, ["batch height width"]))
    ]


def test_independent_inputs_and_indices_go_with_all():
    assert together({"x": specs("batch a", "batch"), "y": specs("batch b", "batch")}) == [
        {"x": [x], "y": [y]} for x in ("batch a", "batch") for y in ("batch b", "batch")
    ]
    labels = (Spec("batch classes"), Spec("batch", dtype="int64", index_of="classes"))
    assert together({"x": specs("batch classes"), "labels": labels}) == [
        {"x": ["batch classes"], "labels": ["batch classes", "batch"]}
    ]


def distance(student_features, teacher_features, reduction: str = "mean"):
    return (student_features - teacher_features).square().mean()


def test_a_call_that_mixes_layouts_is_an_error():
    loss = declare(distance, inputs=RANKS)()
    vectors, maps = torch.zeros(2, 3), torch.zeros(2, 3, 4, 5)
    assert loss(maps, maps) == loss(vectors, vectors) == 0
    composed = pykd.compose({"hint": loss})
    message = (
        r"expected teacher_features with axes \(batch, channels\), as student_features has \(batch, channels\), got "
        r"\(batch, channels, height, width\); pass tensors that go together"
    )
    for call in (loss, composed, as_composition(loss)):
        with pytest.raises(ValueError, match=message):
            call(student_features=vectors, teacher_features=maps)
    with pytest.raises(ValueError, match=message):
        composed.graph({"student_features": VECTORS, "teacher_features": MAPS})
    for name in RANKS:
        chosen = composed.graph({name: MAPS}).signature.inputs
        assert {spec.axes for spec in chosen.values()} == {MAPS}


def layers_of(
    student_features: list[torch.Tensor], teacher_features: list[torch.Tensor], layers: int = 2, reduction: str = "mean"
):
    total = student_features[0].sum() * 0
    for x, y in zip(student_features, teacher_features):  # noqa: B905  TorchScript knows no strict
        total = total + (x - y.detach()).square().mean()
    return total


def test_all_layers_of_a_list_have_one_form():
    inputs = {
        name: tuple(Spec(spec.axes, grad=spec.grad, like=spec.like, layers="layers") for spec in layouts)
        for name, layouts in RANKS.items()
    }
    made = declare(layers_of, inputs=inputs, layers=whole(default=2, minimum=1), cases=(Case(),))
    loss = made(layers=20)
    assert len(loss.forms()) == 3 and all(len(form.axes) == 40 for form in loss.forms())
    loss = made()
    vectors, maps = torch.zeros(2, 3), torch.zeros(2, 3, 4, 5)
    assert loss([maps, maps], [maps, maps]) == loss([vectors, vectors], [vectors, vectors]) == 0
    with pytest.raises(
        ValueError, match=r"expected student_features_1 with axes \(batch, channels_1\), as student_features_0 has"
    ):
        loss([vectors, maps], [vectors, maps])
    chosen = (
        pykd.compose({"a": loss}).graph({"teacher_features_1": "batch channels_1 height_1 width_1"}).signature.inputs
    )
    assert [len(spec.names) for spec in chosen.values()] == [4, 4, 4, 4]


def test_layouts_that_no_call_can_tell_apart_are_refused():
    inputs = {**RANKS, "teacher_features": specs(TOKENS, "batch height width")}
    with pytest.raises(
        TypeError, match="expected the layouts of ALoss's teacher_features to differ in their number of axes, or"
    ):
        declare(distance, inputs=inputs)


def test_samples_may_be_counted_by_axes_that_are_not_the_first():
    """Pixels of logits with the classes before them, beside a mask of pixels."""
    inputs = {
        "student_features": specs("batch classes", "batch classes height width", grad=True),
        "teacher_features": specs("batch classes", "batch classes height width"),
    }
    made = declare(distance, inputs=inputs, sample_axes=("batch", "batch height width"))
    assert [(form.samples, *map(list, form.axes.values())) for form in made.forms()] == [
        ("batch", ["batch classes"], ["batch classes"]),
        ("batch", ["batch classes height width"], ["batch classes height width"]),
        ("batch height width", ["batch classes height width"], ["batch classes height width"]),
    ]


def test_a_mask_is_a_weight():
    with pytest.raises(
        ValueError, match="expected the dtype of a Spec to be .*, got 'bool'; a mask is a 'weight' drawn"
    ):
        Spec("batch height width", dtype="bool")
    with pytest.raises(ValueError, match="got 'float32'; take one"):
        Spec("batch", dtype="float32")
