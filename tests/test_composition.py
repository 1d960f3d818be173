"""compose(), loss graphs, recipes, and the messages of wrong input in Python."""

import pytest
import torch

import pykd
from pykd import MKMMD, FeatureL1, HardTarget, Part, SoftTarget, compose
from pykd.command_line import main
from pykd.composition import recipe as recipes


@pytest.fixture
def loss():
    return compose({"hard": (HardTarget(), 1.0), "soft": (SoftTarget(temperature=2.0), 0.5)})


@pytest.fixture
def tensors():
    return {
        "student_logits": torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
        "teacher_logits": torch.tensor([[1.0, 0.0, 1.0], [0.5, 2.0, 0.0]]),
        "labels": torch.tensor([0, 1]),
    }


def test_loss_is_the_weighted_sum_of_its_terms(loss, tensors):
    values = loss(**tensors)
    assert list(values) == ["loss", "hard", "soft"]
    torch.testing.assert_close(values["loss"], values["hard"] + 0.5 * values["soft"])
    other = loss(**tensors, soft_weight=2.0, soft_temperature=8.0)
    torch.testing.assert_close(other["soft"], SoftTarget(8.0)(tensors["student_logits"], tensors["teacher_logits"]))
    torch.testing.assert_close(other["loss"], other["hard"] + 2.0 * other["soft"])


def test_terms_and_inputs_can_be_renamed(tensors):
    second = Part(SoftTarget(temperature=4.0), 0.25, "small", inputs={"student_logits": "student_logits_small"})
    loss = compose({"soft": ([Part(SoftTarget(temperature=4.0)), second], 2.0)})
    small = tensors["student_logits"].flip(0)
    got = loss(
        student_logits=tensors["student_logits"], teacher_logits=tensors["teacher_logits"], student_logits_small=small
    )
    one = SoftTarget(4.0)(tensors["student_logits"], tensors["teacher_logits"])
    two = SoftTarget(4.0)(small, tensors["teacher_logits"])
    torch.testing.assert_close(got["loss"], 2.0 * (one + 0.25 * two))
    again = recipes.build(recipes.tomllib.loads(recipes.dumps(loss.recipe())))
    assert again.recipe() == loss.recipe()


def test_parts_have_weights_that_stay(tensors):
    """Without a weight_name a factor is part of the loss: no parameter, and not lost."""
    logits = {name: tensors[name] for name in ("student_logits", "teacher_logits")}
    one, two = SoftTarget(4.0), SoftTarget(4.0, form="kl")
    loss = compose({"soft": ([Part(one, 0.5), Part(two, 3.0), Part(two)], 2.0)})
    assert list(loss.scalars) == ["soft_weight", "soft_temperature"]
    want = 2.0 * (0.5 * one(**logits) + 4.0 * two(**logits))
    arrays = {name: tensor.numpy() for name, tensor in logits.items()}
    for got in (loss(**logits), loss.graph()(**logits), loss.reference(**arrays)):
        torch.testing.assert_close(torch.as_tensor(got["loss"], dtype=torch.float32), want)
    samples = loss.graph(per_sample=True)(**logits)["loss_per_sample"]
    torch.testing.assert_close(samples.mean(), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["call", "graph"])
def test_gradients_of_terms_are_added_before_they_are_rounded(form, dtype):
    """Two terms that nearly cancel: rounded one by one, they would leave few right digits of their sum."""
    loss = compose({"warm": (SoftTarget(4.2), 1.0), "cool": (SoftTarget(4.0), -1.0)})
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, generator=generator).to(dtype) for _ in range(2))
    run = loss if form == "call" else loss.graph()
    given, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    run(student_logits=given, teacher_logits=teacher)["loss"].backward()
    run(student_logits=exact, teacher_logits=teacher.double())["loss"].backward()
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("first", ["teacher", "student"])
def test_an_input_of_two_losses_receives_a_gradient_where_one_of_them_gives_it(tensors, first):
    """The middle of a chain: the student of one loss and the teacher of another."""
    names = {"student_logits": "middle", "teacher_logits": "large"}
    terms = {
        "student": [Part(SoftTarget(), inputs=names)],
        "teacher": [Part(SoftTarget(), inputs={"student_logits": "small", "teacher_logits": "middle"})],
    }
    loss = compose(terms if first == "student" else dict(reversed(terms.items())))
    assert {name for name, spec in loss.graph().signature.inputs.items() if spec.grad} == {"middle", "small"}
    middle, large = tensors["student_logits"].clone().requires_grad_(), tensors["teacher_logits"]
    loss(middle=middle, large=large, small=large.flip(0))["loss"].backward()
    alone = tensors["student_logits"].clone().requires_grad_()
    SoftTarget()(alone, large).backward()
    torch.testing.assert_close(middle.grad, alone.grad)


def test_recipes_of_every_form(loss):
    for given in (loss, SoftTarget(temperature=3.0, form="kl"), compose({"aux": MKMMD(spatial_avg="mean")})):
        composition = pykd.composition.as_composition(given)
        table = recipes.tomllib.loads(recipes.dumps(composition.recipe()))
        again = recipes.build(table)
        assert again.recipe() == composition.recipe()
        assert list(again.scalars) == list(composition.scalars)


WRONG_RECIPES = [
    ({}, "exactly one of 'loss', 'terms' and 'distillation_loss', got none of them"),
    ({"loss": "soft_targte"}, "expected the name of a loss .*, got 'soft_targte'"),
    ({"loss": "soft_target", "setting": {}}, "to have only loss, settings, export, got setting"),
    ({"loss": "soft_target", "settings": {"tau": 3}}, "expected the settings of soft_target, got .*tau"),
    ({"terms": {"a": {"parts": [{"weight": 1.0}]}}}, "expected 'loss' in a part of a term, got none"),
    ({"distillation_loss": {"temperature": 3}}, "expected the arguments of pykd.DistillationLoss, got .*temperature"),
]


@pytest.mark.parametrize(("table", "message"), WRONG_RECIPES, ids=lambda value: str(value)[:40])
def test_wrong_recipes(table, message):
    with pytest.raises(ValueError, match=message):
        recipes.build(table)


def test_graph_checks_its_inputs_in_torchscript_too(loss, tensors):
    module = torch.jit.script(loss.graph({"labels": "batch"}))
    wrong = {**tensors, "teacher_logits": torch.zeros(2, 4)}
    with pytest.raises(
        Exception, match='expected teacher_logits to have length 3 along "classes", as student_logits has, got 4'
    ):
        module(**wrong)
    with pytest.raises(Exception, match=r"expected labels with axes \(batch\), got shape \[2, 1\]"):
        module(**{**tensors, "labels": tensors["labels"].unsqueeze(1)})


def test_wrong_terms_and_numbers():
    for terms, message in (
        ([SoftTarget()], "expected the terms by their names, got list; pass "),
        ({"a": (SoftTarget(), "x")}, "expected a_weight to be a number, got 'x'; pass a number"),
        ({"a": (SoftTarget(), 1.0, 2.0)}, "expected the term 'a' to be a loss or a list of Part, got tuple; pass "),
    ):
        with pytest.raises(TypeError, match=message):
            compose(terms)
    logits = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match="and the numbers soft_weight, soft_temperature, got the unknown temperature; pass"
    ):
        compose({"soft": SoftTarget()})(student_logits=logits, teacher_logits=logits, temperature=2.0)


WRONG_TENSORS = [
    (dict(labels=None), ValueError, "none for labels; pass each of them by its name"),
    (dict(teacher_logit=torch.zeros(2, 3)), ValueError, "the unknown teacher_logit"),
    (
        dict(student_logits=torch.zeros(3)),
        ValueError,
        r"expected student_logits as float with axes \(batch, classes\) or .*, got .*\[3\]",
    ),
    (dict(teacher_logits=torch.zeros(2, 4)), ValueError, 'expected teacher_logits to have length 3 along "classes"'),
    (dict(teacher_logits=torch.zeros(1, 3)), ValueError, 'expected teacher_logits to have length 2 along "batch"'),
    (
        dict(teacher_logits=torch.zeros(2, 3).double()),
        TypeError,
        "to be torch.float32, as student_logits is, got torch.float64",
    ),
    (
        dict(teacher_logits=torch.zeros(2, 3, dtype=torch.int32)),
        TypeError,
        "expected teacher_logits as float .* got torch.int32",
    ),
    (
        dict(labels=torch.zeros(2, dtype=torch.int32)),
        TypeError,
        "expected labels as float .* or int64 .*, got torch.int32",
    ),
    (
        dict(labels=torch.tensor([0, 3])),
        ValueError,
        'expected labels to hold indices along "classes" from 0 to 2 or -100',
    ),
    (dict(labels=torch.tensor([0, -1])), ValueError, "got -1; correct the data"),
    (
        dict(teacher_logits=torch.zeros(2, 3, device="meta")),
        TypeError,
        "expected teacher_logits on cpu, where student_logits is, got meta",
    ),
    (dict(teacher_logits=[[0.0, 1.0, 2.0]]), TypeError, "expected teacher_logits to be a torch.Tensor, got list"),
    (dict(soft_temperature=0.0), ValueError, "expected soft_temperature to be a number greater than 0, got 0"),
    (dict(soft_weight=float("inf")), ValueError, "expected soft_weight to be a number that is finite, got inf"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_TENSORS, ids=lambda value: str(value)[:50])
def test_wrong_tensors(loss, tensors, change, error, message):
    call = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        loss(**call)


def test_empty_batch(loss, tensors):
    empty = {name: tensor[:0] for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match='at least one entry along "batch", got shape .*; leave empty batches out'):
        loss(**empty)


def test_a_bare_loss_checks_as_well():
    with pytest.raises(ValueError, match='expected teacher_logits to have length 3 along "classes"'):
        SoftTarget()(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="got 7; correct"):
        HardTarget()(torch.zeros(2, 3), torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="expected temperature to be a number greater than 0, got -1"):
        SoftTarget()(torch.zeros(2, 3), torch.zeros(2, 3), temperature=-1.0)


def test_a_label_out_of_range_that_nobody_checks_is_nan_not_class_zero():
    loss = compose({"hard": HardTarget()}).graph({"labels": "batch"}, check=False)
    student = torch.zeros(2, 3, requires_grad=True)
    for label in (3, -1):
        assert torch.isnan(loss(student_logits=student, labels=torch.tensor([0, label]))["loss"])


WRONG_COMPOSITIONS = [
    ({}, ValueError, "expected at least one term"),
    ({"loss": HardTarget()}, ValueError, "got 'loss'; choose another"),
    ({"a b": HardTarget()}, ValueError, "got 'a b'; choose another"),
    ({"hard": HardTarget(reduction="none")}, ValueError, "got reduction='none'"),
    ({"hard": 3}, TypeError, "expected the term 'hard' to be a loss or a list of Part, got int"),
    ({"hard": (HardTarget(), float("nan"))}, ValueError, "expected hard_weight to be a number that is finite"),
]


@pytest.mark.parametrize("flag", ["no", None, 2])
def test_share_ignored_is_a_flag(flag):
    with pytest.raises(ValueError, match=f"expected share_ignored to be True or False, got {flag!r}; pass one"):
        compose({"hard": HardTarget()}, share_ignored=flag)


@pytest.mark.parametrize(("terms", "error", "message"), WRONG_COMPOSITIONS, ids=lambda value: str(value)[:40])
def test_wrong_compositions(terms, error, message):
    with pytest.raises(error, match=message):
        compose(terms)


def test_a_parameter_of_two_parts_has_one_default():
    other = Part(SoftTarget(3.0), inputs={"student_logits": "other_logits"})
    with pytest.raises(ValueError, match="expected one default for the parameter 'soft_temperature', got 2 and 3"):
        compose({"soft": [Part(SoftTarget(2.0)), other]})


def test_inputs_of_one_name_must_agree():
    aux = Part(FeatureL1(), inputs={"teacher_features": "teacher_logits"})
    with pytest.raises(ValueError, match="expected every use of the input 'teacher_logits' to agree on its axes"):
        compose({"soft": SoftTarget(), "aux": [aux]})


def test_reference_is_written_for_people(loss, tensors):
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    values = loss.reference(**arrays, parameters={"soft_weight": 0.0})
    assert values["loss"] == pytest.approx(values["hard"])


def test_cross_entropy_oracle():
    student, labels = torch.randn(9, 5), torch.randint(5, (9,))
    labels[::3] = -100
    torch.testing.assert_close(HardTarget()(student, labels), torch.nn.functional.cross_entropy(student, labels))


def test_kl_oracle():
    student, teacher = torch.randn(9, 5), torch.randn(9, 5)
    log_q, log_p = (torch.log_softmax(x / 4.0, -1) for x in (student, teacher))
    want = 16.0 * torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(SoftTarget(4.0, form="kl", tau_squared=True)(student, teacher), want)


def test_command_line(tmp_path, capsys):
    assert main(["list"]) == 0
    assert "soft_target" in capsys.readouterr().out
    assert main(["show", "mk_mmd"]) == 0
    assert "bandwidth" in capsys.readouterr().out
    assert main(["env"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["show", "nothing"]) == 2
    assert "expected the name of a loss" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err
    (tmp_path / "bad.toml").write_text("[terms")
    assert main(["export", "--recipe", str(tmp_path / "bad.toml"), "--out", str(tmp_path)]) == 2
    assert "to be TOML" in capsys.readouterr().err
