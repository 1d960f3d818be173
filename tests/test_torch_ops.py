"""The fused kernels as torch operators: eager, scripted, exported, compiled; and pykd.torch_kernels on top of them.

The judge is the formula in float64 with PyTorch's autograd. C++ without Python is in ``cpp/tests/torch_ops_test.cpp``.
"""

import io
import json
import sys

import pytest
import torch
import torch._inductor.config
from torch import Tensor

import pykd
from pykd import config, torch_kernels
from pykd.fused import torch_operators
from pykd.torch_kernels import fused_call, fused_loss

NAMES = "student teacher temperature soft_weight"
SHAPES = [(4, 10), (1, 1), (7, 3), (4, 10), (33, 65), (2, 3000)]


@pytest.fixture(scope="module", autouse=True)
def loaded():
    torch_kernels.load()


def operator(student: Tensor, teacher: Tensor, temperature: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.pykd.loss("soft_target", [student, teacher, temperature, weight], NAMES, "form=kl")


class Module(torch.nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.pykd.loss(
            "soft_target",
            [student, teacher, temperature, weight],
            "student teacher temperature soft_weight",
            "form=kl",
        )


class Rows(torch.nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor) -> list[Tensor]:
        return torch.ops.pykd.kernel(
            "soft_target", [student, teacher, temperature], "student teacher temperature", "form=kl", "soft"
        )


def scripted(*tensors):
    return SCRIPTED(*tensors)


def saved(*tensors):
    return SAVED(*tensors)


def function(student, teacher, temperature, weight):
    return fused_loss("soft_target", inputs_of(student, teacher, temperature, weight), {"form": "kl"})


def inputs_of(*tensors):
    return dict(zip(NAMES.split(), tensors, strict=True))


@pytest.fixture(scope="module", autouse=True)
def modules(loaded):
    global SCRIPTED, SAVED
    SCRIPTED = torch.jit.script(Module())
    file = io.BytesIO()
    torch.jit.save(SCRIPTED, file)
    file.seek(0)
    SAVED = torch.jit.load(file)


WAYS = pytest.mark.parametrize("loss", [operator, scripted, saved, function], ids=lambda way: way.__name__)


def draw(batch=5, classes=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch * 1000 + classes)
    student = (3 * torch.randn(batch, classes, generator=generator)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(batch, classes, generator=generator)).to(dtype)
    return student, teacher, torch.tensor(2.0), torch.rand(batch, generator=generator)


def formula(student, teacher, temperature, weight):
    """Σ weight · KL(teacher ‖ student)."""
    student, teacher, temperature = student.double(), teacher.double(), temperature.double()
    log_p, log_q = (teacher / temperature).log_softmax(1), (student / temperature).log_softmax(1)
    rows = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(1)
    return (weight.double() * rows).sum()


def truth(student, *others, upstream=1.0):
    """Value, and gradient of upstream · value."""
    student = student.detach().double().requires_grad_()
    value = formula(student, *others)
    return value.item(), torch.autograd.grad(value * upstream, student)[0]


def close(got, want, atol=1e-6):
    torch.testing.assert_close(got.double(), want.double(), rtol=2e-6, atol=atol)


@WAYS
def test_gradients_match_the_formula_in_every_call_whatever_the_shapes(loss):
    for number, shape in enumerate(SHAPES):
        tensors = draw(*shape)
        upstream = 0.3 + 1.7 * number
        value = loss(*tensors)
        assert value.dtype == torch.float32 and value.shape == ()
        (upstream * value).backward()
        want, gradient = truth(*tensors, upstream=upstream)
        assert value.item() == pytest.approx(want, rel=2e-6, abs=1e-6)
        close(tensors[0].grad, gradient, atol=2e-6)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(loss, dtype):
    tensors = draw(16, 64, dtype)
    value = loss(*tensors)
    assert value.dtype == torch.float32
    (value * 3).backward()
    assert tensors[0].grad.dtype == dtype
    value_truth, gradient = truth(*tensors, upstream=3)
    assert value.item() == pytest.approx(value_truth, rel=1e-5)
    close(tensors[0].grad, gradient, atol=1.5 * torch.finfo(dtype).eps * gradient.abs().max().item())


@WAYS
def test_masked_logits_poison_neither_value_nor_gradient(loss):
    student, teacher, temperature, weight = draw(3, 4)
    with torch.no_grad():
        student[:, 2] = -torch.inf
    teacher[:, 2] = -torch.inf
    value = loss(student, teacher, temperature, weight)
    (2 * value).backward()
    kept = [0, 1, 3]
    want, gradient = truth(student[:, kept], teacher[:, kept], temperature, weight, upstream=2)
    assert value.item() == pytest.approx(want, rel=1e-5)
    close(student.grad[:, kept], gradient)
    assert student.grad[:, 2].eq(0).all()


@WAYS
def test_an_infinite_loss_still_has_the_kernels_gradient(loss):
    """The teacher believes in a class that the student excludes: the value is infinite, the gradient p_s − p_t."""
    student = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    value = loss(student, torch.zeros(1, 3), torch.tensor(1.0), torch.ones(1))
    assert value.item() == torch.inf
    value.backward()
    close(student.grad, torch.tensor([[1 / 6, -1 / 3, 1 / 6]]))


@WAYS
def test_rows_of_weight_zero_count_as_zero_whatever_they_hold(loss):
    student, teacher, temperature, weight = draw(3, 4)
    with torch.no_grad():
        student[1] = torch.nan
    weight[1] = 0
    value = loss(student, teacher, temperature, weight)
    value.backward()
    kept = [0, 2]
    want, gradient = truth(student[kept], teacher[kept], temperature, weight[kept])
    assert value.item() == pytest.approx(want, rel=1e-5)
    close(student.grad[kept], gradient)
    assert student.grad[1].eq(0).all()


@WAYS
def test_gradients_flow_on_through_the_student_and_nowhere_else(loss):
    _, teacher, temperature, weight = draw(5, 3)
    layer, features = torch.randn(6, 3, requires_grad=True), torch.randn(5, 6)
    teacher.requires_grad_()
    weight.requires_grad_()
    loss(features @ layer, teacher, temperature, weight).backward()
    _, gradient = truth((features @ layer).detach(), teacher.detach(), temperature, weight.detach())
    close(layer.grad, features.T.double() @ gradient, atol=1e-5)
    assert teacher.grad is None and weight.grad is None
    assert not loss((features @ layer).detach(), teacher, temperature, weight).requires_grad


@WAYS
def test_without_grad_mode_there_is_the_value_alone(loss):
    tensors = draw()
    want, _ = truth(*tensors)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = loss(*tensors)
            assert not value.requires_grad
            assert value.item() == pytest.approx(want, rel=1e-5)


@WAYS
def test_backward_twice_adds_up(loss):
    tensors = draw()
    value = loss(*tensors)
    value.backward(retain_graph=True)
    value.backward()
    close(tensors[0].grad, truth(*tensors, upstream=2)[1])
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@WAYS
def test_writing_to_a_gradient_does_not_reach_the_next_backward(loss):
    """What backward() gave out belongs to whoever got it."""
    tensors = draw()
    value = loss(*tensors)
    for keep in (True, True, False):
        (gradient,) = torch.autograd.grad(value, tensors[0], retain_graph=keep)
        close(gradient, truth(*tensors)[1])
        gradient.fill_(100)


@WAYS
def test_differentiating_twice_is_an_error_and_not_half_an_answer(loss):
    tensors = draw()

    def penalty():
        total = loss(*tensors) + tensors[0].pow(3).sum()
        (gradient,) = torch.autograd.grad(total, tensors[0], create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match=r"first derivatives only|'_cdist_backward\S*' is not implemented"):
        penalty()


@WAYS
def test_many_gradients_at_once(loss):
    """torch.autograd.grad(is_grads_batched=True): the upstream gradient is a batch of numbers."""
    tensors = draw()
    upstream = torch.tensor([1.0, -2.0, 0.5])
    (gradients,) = torch.autograd.grad(loss(*tensors), tensors[0], upstream, is_grads_batched=True)
    for number, gradient in zip(upstream, gradients, strict=True):
        close(gradient, truth(*tensors, upstream=number.item())[1])


def test_the_last_backward_hands_on_the_kernels_own_memory(monkeypatch):
    """No pass over the gradient where the upstream one is 1, and no copy in any case."""
    for upstream in (1.0, 3.0):
        tensors = draw(64, 128)
        handed = []
        original = torch_operators.scaled

        def spy(saved, factor, handed=handed, original=original):
            handed.append(saved.data_ptr())
            return original(saved, factor)

        monkeypatch.setattr(torch_operators, "scaled", spy)
        (function(*tensors) * upstream).backward()
        monkeypatch.setattr(torch_operators, "scaled", original)
        assert handed == [tensors[0].grad.data_ptr()]
        close(tensors[0].grad, truth(*tensors, upstream=upstream)[1])


@WAYS
def test_autocast_changes_nothing(loss):
    tensors = draw(16, 64)
    (want,) = torch.autograd.grad(loss(*tensors) * 3, tensors[0])
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*tensors)
    (value * 3).backward()
    assert torch.equal(tensors[0].grad, want)


def test_func_grad():
    tensors = draw()
    gradient = torch.func.grad(lambda student: operator(student, *tensors[1:]))(tensors[0].detach())
    close(gradient, truth(*tensors)[1])


# ---- pykd::kernel, which has no gradient -------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [False, True])
def test_an_input_that_requires_a_gradient_is_an_error(hidden):
    """Autograd would say that the result has a gradient, and then leave it out with a warning."""
    student, teacher, temperature, weight = draw()
    student = student * 2 if hidden else student
    inputs = {"student": student, "teacher": teacher, "temperature": temperature}
    with pytest.raises(RuntimeError, match="require no gradient, for none flows through it, got student that does"):
        fused_call("soft_target", inputs, {"form": "kl"}, ["soft"])
    with pytest.raises(RuntimeError, match="pykd::value_and_gradient that require no gradient"):
        torch.ops.pykd.value_and_gradient("soft_target", [student, teacher, temperature, weight], NAMES, "", "student")
    with torch.no_grad():
        assert not fused_call("soft_target", inputs, {"form": "kl"}, ["soft"])["soft"].requires_grad


def test_fused_call_returns_what_was_asked_for():
    student, *others = draw()
    inputs = inputs_of(student.detach(), *others)
    results = fused_call("soft_target", inputs, {"form": "kl"}, ["grad_student", "soft"])
    assert list(results) == ["grad_student", "soft"]
    value, gradient = truth(student, *others)
    close(results["grad_student"], gradient)
    assert (results["soft"] * others[2]).sum().item() == pytest.approx(value, rel=1e-5)


def test_attributes_are_numbers_or_words():
    student, teacher, temperature, _ = draw()
    inputs = {"student": student.detach(), "teacher": teacher, "temperature": temperature}
    rows = fused_call("soft_target", inputs, {"form": "jsd", "beta": 0.2}, ["soft"])["soft"]
    p, q = (teacher.double() / 2).softmax(1), (student.detach().double() / 2).softmax(1)
    mean = 0.2 * p + 0.8 * q
    close(rows, 0.2 * (p * (p / mean).log()).sum(1) + 0.8 * (q * (q / mean).log()).sum(1))


def test_hard_and_soft_in_one_pass():
    student, teacher, temperature, weight = draw(4, 6)
    labels, hard_weight = torch.tensor([0, 5, 2, 2]), torch.rand(4)
    inputs = inputs_of(student, teacher, temperature, weight) | {"labels": labels, "hard_weight": hard_weight}
    (fused_loss("soft_target", inputs, {"form": "kl"}) * 0.5).backward()
    exact = student.detach().double().requires_grad_()
    hard = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    total = formula(exact, teacher, temperature, weight) + (hard * hard_weight.double()).sum()
    close(student.grad, torch.autograd.grad(total * 0.5, exact)[0])


def test_every_kernel_can_be_a_loss():
    """What pykd::loss needs to know follows from names: it must be there."""
    for kernel in json.loads(torch.ops.pykd.kernels()):
        inputs = {argument["name"] for argument in kernel["inputs"]}
        outputs = [argument["name"] for argument in kernel["outputs"]]
        assert any(("weight" if name == "value" else f"{name}_weight") in inputs for name in outputs), kernel
        assert {name.removeprefix("grad_") for name in outputs if name.startswith("grad_")} & inputs, kernel


@pytest.mark.parametrize(
    ("inputs", "attributes", "outputs", "message"),
    [
        ({"studnt": torch.zeros(2, 3)}, {}, ["soft"], 'got "studnt"; did you mean "student"'),
        ({"student": torch.zeros(2, 3)}, {}, ["sof"], 'got "sof"'),
        ({"teacher": torch.zeros(2, 3)}, {}, ["soft"], "expected student for the kernel soft_target, got none"),
        ({}, {}, ["soft"], "expected student for the kernel soft_target, got none"),
        ({"student": torch.zeros(3)}, {}, ["soft"], "axes (batch, classes), got rank 1"),
        ({"student": torch.zeros(0, 3)}, {}, ["soft"], 'at least 1 along "batch"'),
        ({"student": torch.zeros(2, 3, dtype=torch.int32)}, {}, ["soft"], "got Int; cast it"),
        ({"student": torch.zeros(2, 3).to_sparse()}, {}, ["soft"], "call .to_dense()"),
        ({"student": torch.zeros(2, 3)}, {"form": "kkl"}, ["soft"], 'got "kkl"'),
        ({"student": torch.zeros(2, 3)}, {"frm": "kl"}, ["soft"], 'got "frm"'),
    ],
)
def test_errors_are_the_librarys_own(inputs, attributes, outputs, message):
    with pytest.raises(RuntimeError) as caught:
        fused_call("soft_target", inputs, attributes, outputs)
    assert message in str(caught.value)
    assert str(caught.value).startswith("expected ") and "pykd::_kernel" not in str(caught.value)


def test_other_errors_say_what_to_do():
    student = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match='expected a kernel among .*soft_target.*, got "soft_targe"'):
        fused_loss("soft_targe", {"student": student.requires_grad_()})
    with pytest.raises(RuntimeError, match="soft_weight, hard_weight"):
        fused_loss("soft_target", {"student": student})
    with pytest.raises(RuntimeError, match="one name for each"):
        torch.ops.pykd.loss("soft_target", [student], "student teacher", "")
    with pytest.raises(RuntimeError, match="name=value"):
        torch.ops.pykd.loss("soft_target", [student, torch.ones(2)], "student soft_weight", "kl")
    transposed = torch.zeros(3, 2).T
    with pytest.raises(RuntimeError, match="contiguous"):
        fused_call("soft_target", {"student": transposed, "labels": torch.zeros(2, dtype=torch.int64)}, {}, ["hard"])


def test_a_pykd_without_the_operators_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "libdir", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="PYKD_TORCH=OFF"):
        pykd.torch_ops_path()
    (tmp_path / "libpykd_torch_ops.so").write_bytes(b"nothing that can be loaded")
    with pytest.raises(RuntimeError, match=r"expected a libpykd_torch_ops.so that torch .* can open"):
        torch_kernels.load.__wrapped__()


# ---- Tensors without data: torch.export, torch.compile -----------------------------------------------------------


def test_meta_tensors_get_shapes():
    student = torch.empty(4, 6, dtype=torch.bfloat16, device="meta")
    results = fused_call("soft_target", {"student": student}, {}, ["soft", "grad_student"])
    assert results["soft"].shape == (4,) and results["soft"].dtype == torch.float32
    assert results["grad_student"].shape == (4, 6) and results["grad_student"].dtype == torch.bfloat16
    assert all(tensor.is_meta for tensor in results.values())
    transposed = torch.empty(6, 4, device="meta").T
    assert fused_call("soft_target", {"student": transposed}, {}, ["grad_student"])["grad_student"].is_contiguous()
    with pytest.raises(RuntimeError, match="batch"):
        fused_call("soft_target", {"student": torch.empty(4, device="meta")}, {}, ["soft"])


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_programs_run_the_kernel(dynamic):
    batch, classes = torch.export.Dim("batch"), torch.export.Dim("classes")
    axes = {0: batch, 1: classes}
    student, *others = draw()
    example = (student.detach(), *others)
    loss = torch.export.export(Module(), example, dynamic_shapes=(axes, axes, None, {0: batch}) if dynamic else None)
    rows = torch.export.export(Rows(), example[:3], dynamic_shapes=(axes, axes, None) if dynamic else None)
    for shape in [(5, 7), (3, 11)] if dynamic else [(5, 7)]:
        tensors = draw(*shape)
        value, _ = truth(*tensors)
        for program in (loss, loss.run_decompositions()):
            result = program.module()(tensors[0].detach(), *tensors[1:])
            assert result.item() == pytest.approx(value, rel=1e-5)
        (soft,) = rows.module()(tensors[0].detach(), *tensors[1:3])
        assert (soft * tensors[3]).sum().item() == pytest.approx(value, rel=1e-5)


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="torch.compile is not there yet")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", [Module(), function], ids=["operator", "function"])
def test_compiled_code_trains(backend, loss):
    torch._dynamo.reset()
    # What inductor keeps on disk may come from another build of the operators.
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
        for shape in SHAPES:
            if shape == (1, 1):
                continue  # lengths of 1 are compiled for themselves
            tensors = draw(*shape)
            value = compiled(*tensors)
            (3 * value).backward()
            want, gradient = truth(*tensors, upstream=3)
            assert value.item() == pytest.approx(want, rel=1e-5)
            close(tensors[0].grad, gradient, atol=5e-6)
