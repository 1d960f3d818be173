"""Forward-mode AD and the transforms of torch.func: through the formulas they are right, through a kernel an error."""

import pytest
import torch
from torch.autograd import forward_ad

import pykd
from pykd import torch_kernels

STUDENT = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
TEACHER = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.full((4,), 0.25)
NAMES = "student teacher temperature soft_weight"


def operator(student):
    return torch.ops.pykd.loss("soft_target", [student, TEACHER, torch.tensor(2.0), WEIGHT], NAMES, "form=kl")


def fused_loss(student):
    tensors = dict(zip(NAMES.split(), (student, TEACHER, torch.tensor(2.0), WEIGHT), strict=True))
    return torch_kernels.fused_loss("soft_target", tensors, {"form": "kl"})


def fused(student):
    return pykd.functional.soft_target(student, TEACHER, temperature=2.0, form="kl", kernels="on")


def composition(student):
    graph = pykd.compose({"soft": (pykd.SoftTarget(temperature=2.0, form="kl"), 1.0)})
    return graph(student_logits=student, teacher_logits=TEACHER, kernels="on")["loss"]


def formula(student):
    return pykd.functional.soft_target(student, TEACHER, temperature=2.0, form="kl", kernels="off")


def dual(loss, requires_grad):
    with forward_ad.dual_level():
        return loss(forward_ad.make_dual(STUDENT.clone().requires_grad_(requires_grad), torch.ones_like(STUDENT)))


def call_without_gradients(student):
    return torch.ops.pykd.kernel("soft_target", [student, TEACHER, torch.tensor(2.0)], NAMES[:27], "form=kl", "soft")[0]


def without_grad_mode(loss):
    def call(student):
        with torch.no_grad():
            return loss(student)

    return call


FORWARD = {
    "jvp": lambda loss: torch.func.jvp(loss, (STUDENT,), (torch.ones_like(STUDENT),)),
    "jvp of rows": lambda loss: torch.func.jvp(lambda s: loss(s * 2), (STUDENT,), (torch.ones_like(STUDENT),)),
    "jvp without grad mode": lambda loss: torch.func.jvp(
        without_grad_mode(loss), (STUDENT,), (torch.ones_like(STUDENT),)
    ),
    "jacfwd": lambda loss: torch.func.jacfwd(loss)(STUDENT),
    "hessian": lambda loss: torch.func.hessian(loss)(STUDENT),
    "linearize": lambda loss: torch.func.linearize(loss, STUDENT)[1](torch.ones_like(STUDENT)),
    "dual": lambda loss: dual(loss, False),
    "dual that requires a gradient": lambda loss: dual(loss, True),
    "vmap": lambda loss: torch.vmap(loss)(STUDENT.expand(3, 4, 5)),
}
BACKWARD = {
    "grad": lambda loss: torch.func.grad(loss)(STUDENT),
    "vjp": lambda loss: torch.func.vjp(loss, STUDENT)[1](torch.tensor(1.0))[0],
    "jacrev": lambda loss: torch.func.jacrev(loss)(STUDENT),
}
OURS = r"^expected .*(kernel|batch of them|takes? the formula)"


@pytest.fixture(scope="module", autouse=True)
def loaded():
    torch_kernels.load()


@pytest.mark.parametrize("loss", [operator, fused_loss, fused, composition, call_without_gradients])
@pytest.mark.parametrize("transform", FORWARD)
def test_a_kernel_has_no_forward_mode_and_says_so(loss, transform):
    with pytest.raises((RuntimeError, ValueError), match=OURS) as caught:
        FORWARD[transform](loss)
    assert "Batching rule" not in str(caught.value) and "report" not in str(caught.value)


@pytest.mark.parametrize("loss", [fused_loss, fused, composition])
@pytest.mark.parametrize("transform", BACKWARD)
def test_what_python_fuses_is_for_backward_alone_and_says_so(loss, transform):
    with pytest.raises(RuntimeError, match=OURS):
        BACKWARD[transform](loss)


@pytest.mark.parametrize("transform", ["grad", "vjp"])
def test_the_operator_goes_through_the_backward_transforms(transform):
    torch.testing.assert_close(BACKWARD[transform](operator), BACKWARD[transform](formula))


def test_functional_call_is_no_transform():
    loss = pykd.SoftTarget(temperature=2.0, form="kl")
    got = torch.func.functional_call(loss, {}, (STUDENT, TEACHER))
    torch.testing.assert_close(got, formula(STUDENT))
    layer = torch.nn.Linear(5, 5)
    weights = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    value = fused(torch.func.functional_call(layer, weights, STUDENT))
    want = formula(torch.func.functional_call(layer, weights, STUDENT))
    for got, wanted in zip(*(torch.autograd.grad(v, list(weights.values())) for v in (value, want)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_a_teachers_tangent_is_a_constants():
    """As in the formula, which detaches it."""
    for loss in (
        lambda t: torch.ops.pykd.loss("soft_target", [STUDENT, t, torch.tensor(2.0), WEIGHT], NAMES, "form=kl"),
        lambda t: pykd.functional.soft_target(STUDENT, t, temperature=2.0, form="kl"),
    ):
        with forward_ad.dual_level():
            value = loss(forward_ad.make_dual(TEACHER, torch.ones_like(TEACHER)))
            tangent = forward_ad.unpack_dual(value).tangent
            assert tangent is None or not tangent.any()
        torch.testing.assert_close(value, formula(STUDENT))


def test_every_formula_has_forward_mode(loss_subject):
    tensors = loss_subject.draw(seed=3)
    students = [name for name, spec in loss_subject.graph().signature.inputs.items() if spec.grad]
    given = {name: t.clone().requires_grad_(name in students) for name, t in tensors.items()}
    gradients = torch.autograd.grad(loss_subject.graph()(**given)["loss"], [given[name] for name in students])
    directions = [torch.randn_like(tensors[name]) for name in students]
    want = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    def loss(*moved):
        return loss_subject.graph()(**{**tensors, **dict(zip(students, moved, strict=True))})["loss"]

    _, tangent = torch.func.jvp(loss, tuple(tensors[name] for name in students), tuple(directions))
    torch.testing.assert_close(tangent, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"teacher": torch.empty(4, 6)}, 'teacher as long as student along "classes"'),
        ({"teacher": torch.empty(3, 5)}, 'teacher as long as student along "batch"'),
        ({"teacher": torch.empty(4)}, r"teacher with the axes \(batch, classes\), got rank 1"),
        ({"soft_weight": torch.empty(5)}, 'soft_weight as long as student along "batch"'),
        ({"soft_weight": torch.empty(4, dtype=torch.float64)}, "soft_weight of dtype Float, got Double"),
        ({"temperature": torch.empty(1)}, "temperature with the axes"),
        ({"teacher": torch.empty(4, 5, dtype=torch.float16)}, "teacher of dtype Float, got Half"),
    ],
)
def test_tensors_without_data_are_checked_as_others_are(wrong, message):
    right = dict(zip(NAMES.split(), (STUDENT, TEACHER, torch.tensor(2.0), WEIGHT), strict=True))
    tensors = {name: tensor.to("meta") for name, tensor in {**right, **wrong}.items()}
    for call in (
        lambda: torch_kernels.fused_call("soft_target", tensors, {}, ["soft"]),
        lambda: torch.ops.pykd.loss("soft_target", list(tensors.values()), " ".join(tensors), ""),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_names_are_checked_without_data():
    with pytest.raises(RuntimeError, match='"studnt"'):
        torch_kernels.fused_call("soft_target", {"studnt": torch.empty(2, 3, device="meta")}, {}, ["soft"])
