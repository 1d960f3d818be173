"""What Python can do to a call that reads its objects in C++: every answer is a number or an exception."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pykd import _core, kernels, runtime
from tests import dlpack
from tests.test_runtime import tensors, truth

GOOD = tensors()


@pytest.fixture(scope="module")
def loss(folder: Path) -> runtime.Loss:
    return runtime.load(folder, "onnxruntime", threads=1)


def fresh(name: str) -> str:
    """A str that nobody else holds."""
    return "".join(list(name))


def churn() -> None:
    """Frees what can be freed, and writes over it."""
    gc.collect()
    _ = [fresh(f"filling {i}") for i in range(2000)]


# ---- Objects of the module -----------------------------------------------------------------------


def test_no_object_comes_without_its_contents(loss: runtime.Loss) -> None:
    core, memory = loss._core, _core.allocate(64)
    for made in (core, memory):
        cls = type(made)
        with pytest.raises(TypeError):
            cls()
        for make in (cls.__new__, object.__new__, super(cls, made).__new__):
            with pytest.raises(TypeError):
                make(cls)
        with pytest.raises(TypeError):
            type("Derived", (cls,), {})
        with pytest.raises(TypeError):
            made.__init__()
        for send in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                send(made)
        for name, attribute in list(vars(cls).items()):
            with pytest.raises((TypeError, AttributeError)):
                setattr(cls, name, attribute)
    with pytest.raises(TypeError):
        memory.__class__ = type(core)


def test_no_method_takes_another_object_for_its_own() -> None:
    for name, attribute in vars(_core.Loss).items():
        if name.startswith("_"):
            continue
        for other in (None, 1, _core.allocate(64)):
            with pytest.raises(TypeError):
                attribute.fget(other) if isinstance(attribute, property) else attribute(other, {}, {}, {})


# ---- Arguments that change while they are read ---------------------------------------------------


class Number:
    def __init__(self, value: float, effect: Callable[[], Any]) -> None:
        self.value, self.effect = value, effect

    def __float__(self) -> float:
        self.effect()
        churn()
        return self.value


class Tensor:
    def __init__(self, array: np.ndarray, effect: Callable[[], Any]) -> None:
        self.array, self.effect = array, effect

    def __dlpack__(self, **keywords: Any) -> Any:
        capsule = self.array.__dlpack__()
        self.effect()
        churn()
        return capsule


def kernel_call(attributes: dict[str, Any]) -> np.ndarray:
    student, teacher = np.array([[1, 2, 3], [3, 2, 1]], np.float32), np.array([[0, 2, 4], [4, 2, 0]], np.float32)
    value = np.empty(2, np.float32)
    kernels.run(
        "soft_target", {"student": student, "teacher": teacher, "temperature": 2.0}, attributes, {"soft": value}
    )
    return value


def test_attributes_that_change_while_they_are_read() -> None:
    expected = kernel_call({"form": "jsd", "beta": 0.25})
    attributes: dict[str, Any] = {fresh("beta"): None, fresh("form"): fresh("jsd"), fresh("soften_student"): 1.0}
    attributes["beta"] = Number(0.25, attributes.clear)
    np.testing.assert_array_equal(kernel_call(attributes), expected)


def test_parameters_that_change_while_they_are_read(loss: runtime.Loss) -> None:
    parameters: dict[str, Any] = {fresh("weight"): None, fresh("grad_scale"): Number(2.0, lambda: None)}
    parameters["weight"] = Number(3.0, parameters.clear)
    output = np.zeros((), np.float32)
    loss._core.run(GOOD, parameters, {"loss": output})
    np.testing.assert_allclose(output, truth(GOOD, 3.0)[0], rtol=1e-6)


def test_tensors_that_change_while_they_are_read(loss: runtime.Loss) -> None:
    for victim in ("inputs", "outputs"):
        dicts: dict[str, dict[str, Any]] = {"inputs": {}, "outputs": {fresh("loss"): np.zeros((), np.float32)}}
        for name, array in GOOD.items():
            dicts["inputs"][fresh(name)] = Tensor(array.copy(), dicts[victim].clear)
        output = dicts["outputs"]["loss"]
        if victim == "outputs":  # they are read after the inputs: nothing is left of them
            with pytest.raises(ValueError, match="at least one output"):
                loss._core.run(dicts["inputs"], {}, dicts["outputs"])
            continue
        loss._core.run(dicts["inputs"], {}, dicts["outputs"])
        np.testing.assert_allclose(output, truth(GOOD)[0], rtol=1e-6)


def test_a_call_inside_a_call(loss: runtime.Loss) -> None:
    def inner() -> None:
        np.testing.assert_allclose(loss.value(**GOOD, weight=2.0)["loss"], truth(GOOD, 2.0)[0], rtol=1e-6)

    outer = {name: Tensor(array, inner) for name, array in GOOD.items()}
    np.testing.assert_allclose(loss.value(**outer)["loss"], truth(GOOD)[0], rtol=1e-6)


# ---- DLPack --------------------------------------------------------------------------------------


class Made:
    """A float32 tensor [3, 4] of zeros in DLPack, some of whose fields are others."""

    def __init__(self, **fields: Any) -> None:
        self.memory = np.zeros(64, np.uint8)
        self.lengths = (ctypes.c_int64 * 2)(*fields.pop("lengths", (3, 4)))
        self.steps = (ctypes.c_int64 * 2)(*fields.pop("steps", (4, 1)))
        defaults: dict[str, Any] = dict(device_type=1, rank=2, code=2, bits=32, lanes=1, byte_offset=0)
        defaults |= dict(data=self.memory.ctypes.data, shape=ctypes.addressof(self.lengths))
        self.managed = dlpack.Managed(dlpack.Tensor(**(defaults | fields)))

    def __dlpack__(self) -> Any:
        return dlpack.capsule_of(self.managed, b"dltensor")


def test_a_made_tensor_that_is_good(loss: runtime.Loss) -> None:
    inputs = {**GOOD, "teacher": Made()}
    expected = truth({**GOOD, "teacher": np.zeros((3, 4))})[0]
    np.testing.assert_allclose(loss.value(**inputs)["loss"], expected, rtol=1e-6)


BAD_FIELDS: list[dict[str, Any]] = [
    dict(rank=-1),
    dict(rank=-(2**31)),
    dict(rank=2**31 - 1),
    dict(rank=1),
    dict(lengths=(-3, 4)),
    dict(lengths=(0, 4)),
    dict(lengths=(2**62, 2**62)),
    dict(lengths=(-(2**63), -(2**63))),
    dict(shape=None),
    dict(data=None),
    dict(byte_offset=1),
    dict(byte_offset=2),
    dict(device_type=0),
    dict(device_type=-1),
    dict(device_type=2),
    dict(code=200),
    dict(bits=31),
    dict(lanes=4),
    dict(lanes=0),
]


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=str)
def test_tensors_whose_description_is_wrong(loss: runtime.Loss, fields: dict[str, Any]) -> None:
    if fields == dict(rank=2**31 - 1):  # its first eight lengths are printed: they are there
        fields = {**fields, "shape": ctypes.addressof(room := (ctypes.c_int64 * 8)())}
        del room
    with pytest.raises((ValueError, TypeError), match=r"expected .*teacher.*, got .*; "):
        loss.value(**{**GOOD, "teacher": Made(**fields)})
    temperature = np.float32(1)
    with pytest.raises((ValueError, TypeError), match=r"expected .*(teacher|student).*, got .*; "):
        kernels.run(
            "soft_target",
            {"student": np.zeros((3, 4), np.float32), "teacher": Made(**fields), "temperature": temperature},
            {},
            {"soft": np.zeros(3, np.float32)},
        )


def test_strides_and_shapes_that_are_not_where_they_should_be(loss: runtime.Loss) -> None:
    odd = Made()
    odd.managed.tensor.shape = ctypes.addressof(odd.lengths) + 4
    with pytest.raises(ValueError, match="teacher with its shape and strides at addresses that 8 divides, got"):
        loss.value(**{**GOOD, "teacher": odd})
    transposed = Made(steps=(1, 3))
    transposed.managed.tensor.strides = ctypes.addressof(transposed.steps)
    with pytest.raises(ValueError, match="teacher contiguous in memory"):
        loss.value(**{**GOOD, "teacher": transposed})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_memory_that_is_not_aligned(loss: runtime.Loss, dtype: Any) -> None:
    name = "labels" if dtype == np.int64 else "student"
    array = GOOD[name].astype(dtype)
    odd = np.frombuffer(bytearray(b"\0" + array.tobytes()), dtype, offset=1).reshape(array.shape)
    assert not odd.flags.aligned
    error = TypeError if dtype in (np.float16, np.float64) else ValueError  # this loss is of float32
    with pytest.raises(error, match=f"{name} "):
        loss.value(**{**GOOD, name: odd})
    if dtype == np.float64:
        return
    size = array.itemsize
    given = {"student": np.zeros((3, 4), np.float32), "labels": GOOD["labels"]} | {name: odd}
    with pytest.raises(ValueError, match=f"{name} at an address that {size} divides.*, got an address 1 beyond"):
        kernels.run("soft_target", given, {}, {"hard": np.zeros(3, np.float32)})
    out = np.frombuffer(bytearray(13), np.float32, offset=1)
    given[name] = array
    with pytest.raises(ValueError, match="hard at an address that 4 divides"):
        kernels.run("soft_target", given, {}, {"hard": out})


def test_memory_that_is_not_aligned_is_copied_for_a_kernel_in_torch() -> None:
    torch = pytest.importorskip("torch")
    from pykd import functional

    odd = torch.frombuffer(bytearray(1 + 4 * 12), dtype=torch.float32, offset=1).view(3, 4)
    odd[1, 2] = 3.0
    negated = torch.complex(torch.zeros(3, 4), -odd.clone()).conj().imag
    assert negated.is_neg()
    good = torch.zeros(3, 4, requires_grad=True)
    want = functional.soft_target(good, odd.clone(), kernels="off")
    for teacher in (odd, negated):
        torch.testing.assert_close(functional.soft_target(good, teacher, kernels="on"), want)


class Answers:
    """An object whose ``__dlpack__`` gives what it is told."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __dlpack__(self, **keywords: Any) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class Unprintable(ValueError):
    def __str__(self) -> str:
        raise KeyError("no text")


def test_answers_that_are_no_tensor(loss: runtime.Loss) -> None:
    used = GOOD["teacher"].__dlpack__()
    np.from_dlpack(AnswersOnTheCpu(used))
    for answer in (None, 1, "dltensor", used, dlpack.capsule_of(1, b"other"), dlpack.capsule_of(1, b"used_dltensor")):
        with pytest.raises(TypeError, match="teacher"):
            loss.value(**{**GOOD, "teacher": Answers(answer)})
    for error in (ValueError("\ud800"), Unprintable(), BufferError(), RuntimeError("x"), TypeError("y")):
        with pytest.raises(TypeError, match="teacher whose memory can be shared"):
            loss.value(**{**GOOD, "teacher": Answers(error)})
    for error in (KeyboardInterrupt(), MemoryError(), ZeroDivisionError()):
        with pytest.raises(type(error)):
            loss.value(**{**GOOD, "teacher": Answers(error)})


class AnswersOnTheCpu(Answers):
    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def test_a_capsule_counts_once(loss: runtime.Loss) -> None:
    once = Answers(GOOD["teacher"].__dlpack__())
    np.testing.assert_allclose(loss.value(**{**GOOD, "teacher": once})["loss"], truth(GOOD)[0], rtol=1e-6)
    with pytest.raises(TypeError, match="expected a fresh DLPack capsule from __dlpack__ of teacher"):
        loss.value(**{**GOOD, "teacher": once})


def test_an_exchange_table_without_functions(loss: runtime.Loss) -> None:
    empty = dlpack.Exchange(major=1)
    strange = dlpack.Exchange(major=7)
    strange.older = ctypes.addressof(strange)  # without end
    newer = dlpack.Exchange(major=2, older=ctypes.addressof(empty))
    for table in (empty, strange, newer):
        capsule = dlpack.capsule_of(table, b"dlpack_exchange_api")
        cls = type("Exchanging", (Answers,), {"__dlpack_c_exchange_api__": capsule})
        given = cls(GOOD["teacher"].__dlpack__())
        np.testing.assert_allclose(loss.value(**{**GOOD, "teacher": given})["loss"], truth(GOOD)[0], rtol=1e-6)


def test_a_function_that_makes_no_memory(loss: runtime.Loss) -> None:
    def fails(*arguments: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loss._core.run_into_new(GOOD, {}, ("loss",), fails)
    for made in (None, (), (None,), 1.0, np.zeros(3, np.float32), np.zeros((), np.float64)):
        with pytest.raises((TypeError, ValueError), match="loss"):
            loss._core.run_into_new(GOOD, {}, ("loss",), lambda *_, made=made: made)


# ---- Text and numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["weight\0x", "\0", "weigh\ud800", "\udcff"])
def test_names_that_are_no_text_for_c(loss: runtime.Loss, folder: Path, text: str) -> None:
    expected = pytest.raises(ValueError, match="expected .* without NUL.*, got ")
    array = np.zeros((), np.float32)
    with expected:
        loss._core.run(GOOD, {text: 1.0}, {"loss": array})
    with expected:
        loss._core.run({**GOOD, text: array}, {}, {"loss": array})
    with expected:
        loss._core.run(GOOD, {}, {text: array})
    with expected:
        loss._core.output_shape(GOOD, text)
    with expected:
        kernel_call({text: 1.0})
    with expected:
        kernel_call({"form": text})
    with expected:
        kernels.run(text, {}, {}, {})
    with expected:
        kernels.use_simd(text)
    for option in ("engine", "device", "kernels"):
        with expected:
            runtime.load(folder, **{option: text})


def test_paths_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    for option in ({}, {"onnxruntime_library": f"{folder}\0x"}):
        with pytest.raises(ValueError, match="without NUL, got "):
            runtime.load(folder if option else f"{folder}\0x", **option)
    import shutil

    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xff")
    with pytest.raises(FileNotFoundError, match=r"expected .*caf\\xe9 \\xff.*;"):
        runtime.load(odd)
    with pytest.raises(RuntimeError, match=r"caf\\xe9 \\xff/lib.so"):
        runtime.load(folder, "onnxruntime", onnxruntime_library=odd + "/lib.so")
    shutil.copytree(folder, odd)
    for path in (odd, Path(odd)):
        np.testing.assert_allclose(runtime.load(path).value(**GOOD)["loss"], truth(GOOD)[0], rtol=1e-6)


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception]]] = [
    (dict(engine=b"onnxruntime"), TypeError),
    (dict(engine=1), TypeError),
    (dict(device=b"cpu"), TypeError),
    (dict(kernels=True), TypeError),
    (dict(threads=-1), ValueError),
    (dict(threads=1025), ValueError),
    (dict(threads=100000), ValueError),
    (dict(threads=2**31), ValueError),
    (dict(threads=2**70), ValueError),
    (dict(threads=1.5), TypeError),
    (dict(threads="2"), TypeError),
    (dict(cuda_stream=-1), ValueError),
    (dict(cuda_stream=2**64), ValueError),
    (dict(cuda_stream="x"), TypeError),
    (dict(check_integrity="no"), TypeError),
    (dict(trust="no"), TypeError),
    (dict(trust=1), TypeError),
]


def test_verify_takes_no_text_for_trust(folder: Path) -> None:
    import pykd

    with pytest.raises(TypeError, match="expected trust to be True or False, got 'no'; pass one of these"):
        pykd.verify(folder, trust="no")  # type: ignore[arg-type]


@pytest.mark.parametrize(("options", "error"), BAD_OPTIONS, ids=str)
def test_load_options_that_are_wrong(folder: Path, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"expected .*, got .*; "):
        runtime.load(folder, **options)


BAD_NUMBERS: list[tuple[Any, type[Exception]]] = [
    ("2", TypeError),
    (b"2", TypeError),
    (1j, TypeError),
    (10**400, ValueError),
    (float("inf"), ValueError),
    (1e300, ValueError),
    (1e-40, ValueError),
    (1e-300, ValueError),
]


@pytest.mark.parametrize(("number", "error"), BAD_NUMBERS, ids=lambda value: repr(value)[:20])
def test_numbers_that_are_none(loss: runtime.Loss, number: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"expected a .*number.* the parameter weight, got .*; "):
        loss.value(**GOOD, weight=number)


def odd_tensors() -> dict[str, Callable[[Any], Any]]:
    """Tensors of torch that are no plain memory of numbers, from one that is."""
    import torch

    return {
        "sparse": lambda x: x.to_sparse(),
        "compressed": lambda x: x.reshape(x.shape[0], -1).to_sparse_csr(),
        "nested": lambda x: torch.nested.nested_tensor(list(x)),
        "jagged": lambda x: torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged),
        "mkldnn": lambda x: x.float().to_mkldnn(),
        "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
        "complex": lambda x: x.to(torch.complex64),
        "meta": lambda x: x.to("meta"),
        "a list": lambda x: x.tolist(),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", odd_tensors())
def test_tensors_that_are_no_plain_memory(kind: str, tmp_path_factory: Any) -> None:
    """Whoever is called, it is our message, and it names the argument."""
    import torch

    import pykd

    folder = tmp_path_factory.getbasetemp() / "soft"
    if not folder.exists():
        pykd.export(pykd.SoftTarget(), folder, progress=lambda line: None)
    loaded = runtime.load(folder, "onnxruntime", threads=1)
    soft, composition = pykd.SoftTarget(), pykd.compose({"soft": (pykd.SoftTarget(), 1.0)})
    mask = {"sample_weight": torch.ones(4)}

    def by_kernel(student_logits: Any, teacher_logits: Any) -> None:
        inputs = {"student_logits": student_logits, "teacher_logits": teacher_logits, "temperature": 2.0}
        named = {name.removesuffix("_logits"): value for name, value in inputs.items()}
        kernels.run("soft_target", named, {}, {"soft": torch.empty(4)})

    calls: dict[str, Callable[..., Any]] = {
        "loss": soft,
        "weighted": lambda **given: soft(**{**mask, **given}),
        "composition": composition,
        "formula": lambda **given: soft(**given, kernels="off"),
        "function": lambda **given: pykd.functional.soft_target(**given, kernels="on"),
        "file": loaded.value,
        "kernel": by_kernel,
    }
    good = {"student_logits": torch.randn(4, 5), "teacher_logits": torch.randn(4, 5)}
    make = odd_tensors()[kind]
    for called, call in calls.items():
        call(**good)  # what is known of such calls is kept
        for name in (*good, *(mask if called == "weighted" else ())):
            with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
                call(**{**good, name: make({**good, **mask}[name])})
            message = str(caught.value)
            asked = name.removesuffix("_logits") if called == "kernel" else name
            other = {"meta": "teacher_logits"}.get(kind, asked)  # the devices of two are compared
            assert message.startswith("expected ") and ", got " in message and "; " in message, (called, message)
            if called == "function" and 'for kernels="on"' in message:
                continue  # functions check what goes to a kernel, and this does not
            assert asked in message or other in message, (called, message)


def test_a_tensor_as_a_setting() -> None:
    import torch

    import pykd

    assert pykd.SoftTarget(temperature=torch.tensor(3.0)).temperature == 3.0
    learned = torch.tensor(3.0, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"expected temperature .* requires a gradient.*; pass it in each call, as temp"
    ):
        pykd.SoftTarget(temperature=learned)
    with pytest.raises(ValueError, match="expected beta to be a number, got a tensor that requires a gradient"):
        pykd.SoftTarget(form="jsd", beta=torch.tensor(0.5, requires_grad=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pykd.SoftTarget()(*torch.randn(2, 3, 4), temperature=learned).backward()
    assert learned.grad is not None and learned.grad != 0
    for wrong in (torch.ones(2), None, [2.0], torch.ones((), device="meta")):
        with pytest.raises(TypeError, match="expected temperature to be a number, got .*; pass a number"):
            pykd.SoftTarget(temperature=wrong)


@pytest.mark.parametrize("number", [1e-40, 1e-300, 1e300, float("nan")])
def test_temperatures_that_float32_does_not_hold(number: float) -> None:
    import torch

    import pykd

    with pytest.raises(ValueError, match="temperature"):
        pykd.SoftTarget(temperature=number)
    student, teacher = torch.randn(2, 3, 4)
    composition = pykd.compose({"soft": (pykd.SoftTarget(), 1.0)})
    with pytest.raises(ValueError, match="temperature") as told:
        composition(student_logits=student, teacher_logits=teacher, soft_temperature=number)
    if number < 1:
        assert "expected soft_temperature to be a magnitude from 1.17549e-38 to" in str(told.value)
        with pytest.raises(ValueError, match="expected soft_weight to be 0 or a magnitude from 1.17549e-38 to"):
            composition(student_logits=student, teacher_logits=teacher, soft_weight=number)
    if number <= 1e300:
        with pytest.raises(ValueError, match="correct it: temperature must be"), np.errstate(over="ignore"):
            kernels.run(
                "soft_target",
                {"student": student, "teacher": teacher, "temperature": number},
                {},
                {"soft": np.zeros(3, np.float32)},
            )


def test_messages_in_another_locale(folder: Path, tmp_path: Path) -> None:
    """Numbers are written with a point, whatever LC_NUMERIC says."""
    import shutil
    import subprocess
    import sys

    if shutil.which("localedef") is None:
        pytest.skip("no localedef to make a locale with")
    made = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8")], capture_output=True, check=False
    )
    if not (tmp_path / "de_DE.UTF-8").exists():
        pytest.skip(f"localedef has no de_DE here: {made.stderr!r}")
    code = """
import locale, sys, numpy as np, pykd
from pykd import kernels
locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
assert locale.localeconv()["decimal_point"] == ","
loss = pykd.load(sys.argv[1], sys.argv[2])
a = np.ones((2, 3), np.float32)
print(loss.value(student=a, teacher=0 * a, labels=np.array([0, 1]), weight=1.25)["loss"], loss.metadata["parameters"][0])
try:
    loss.value(student=a, teacher=a, labels=np.array([0, 1]), weight=-1.5)
except ValueError as error:
    print(error)
print(kernels.descriptions()["soft_target"]["attributes"][2]["default"])
"""
    for engine in ("onnxruntime", "torchscript"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), engine],
            env={**os.environ, "LOCPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        first, second, third = done.stdout.splitlines()
        assert first.startswith("1.25 ") and "'default': 1.5" in first, done
        assert "got -1.5;" in second and third == "0.5"
