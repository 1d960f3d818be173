"""pykd.load and pykd.runtime.Loss: numbers, errors, tensors of every kind, on artefacts made by hand."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pykd import runtime

AXES = ["batch", "classes"]


def metadata(kind: str) -> dict[str, Any]:
    """loss = weight · mean((student − teacher)²), and "error" without the weight."""
    float_ = "float" if kind == "torchscript" else "float32"
    outputs = [{"name": name, "axes": [], "dtype": float_} for name in ("loss", "error")]
    parameters: list[dict[str, Any]] = [{"name": "weight", "default": 1.5, "minimum": 0.0}]
    if kind != "value":
        gradient = {"name": "grad_student", "axes": AXES, "dtype": float_, "gradient_of": "student"}
        outputs.append(gradient)
        parameters.append({"name": "grad_scale", "default": 1.0})
    return {
        "format": "pykd",
        "format_version": 1,
        "kind": kind,
        "name": "squares",
        "terms": [],
        "inputs": [
            {"name": "student", "axes": AXES, "dtype": float_, "gradient": True},
            {"name": "teacher", "axes": AXES, "dtype": float_, "gradient": False},
            {
                "name": "labels",
                "axes": ["batch"],
                "dtype": "int64",
                "gradient": False,
                "index_of": "classes",
                "ignore_index": -100,
            },
        ],
        "parameters": parameters,
        "outputs": outputs,
    }


def onnx_artefact(kind: str) -> bytes:
    import onnx

    make, float_ = onnx.helper, onnx.TensorProto.FLOAT
    node, tensor = make.make_node, make.make_tensor_value_info
    nodes = [
        node("Sub", ["student", "teacher"], ["d"]),
        node("Mul", ["d", "d"], ["dd"]),
        node("ReduceMean", ["dd"], ["error"], keepdims=0),
        node("Mul", ["error", "weight"], ["loss"]),
    ]
    inputs = [tensor("student", float_, AXES), tensor("teacher", float_, AXES)]
    inputs += [tensor("labels", onnx.TensorProto.INT64, AXES[:1]), tensor("weight", float_, [])]
    outputs = [tensor("loss", float_, []), tensor("error", float_, [])]
    constants = [make.make_tensor("weight", float_, [], [1.5])]
    if kind == "gradient":
        nodes += [
            node("Size", ["d"], ["size"]),
            node("Cast", ["size"], ["count"], to=float_),
            node("Div", ["two", "count"], ["factor"]),
            node("Mul", ["factor", "weight"], ["weighted"]),
            node("Mul", ["weighted", "grad_scale"], ["scaled"]),
            node("Mul", ["d", "scaled"], ["grad_student"]),
        ]
        inputs.append(tensor("grad_scale", float_, []))
        outputs.append(tensor("grad_student", float_, AXES))
        constants += [make.make_tensor(name, float_, [], [value]) for name, value in (("grad_scale", 1), ("two", 2))]
    graph = make.make_graph(nodes, "squares", inputs, outputs, constants)
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    make.set_model_props(model, {"pykd": json.dumps(metadata(kind))})
    data: bytes = model.SerializeToString()
    return data + b"\x72\x16\x0a\x0apykd.crc32\x12\x08%08x" % zlib.crc32(data)


def torchscript_artefact(path: Path) -> None:
    import torch

    module = torch.jit.ScriptModule()
    module.define("""
        def forward(self, student: Tensor, teacher: Tensor, labels: Tensor, weight: float) -> Dict[str, Tensor]:
            s = student
            t = teacher.detach()
            if s.dtype != 7:
                s = s.to(6)
                t = t.to(6)
            error = ((s - t) ** 2).mean()
            return {"loss": error * weight, "error": error}
    """)
    torch.jit.save(module, str(path), _extra_files={"pykd.json": json.dumps(metadata("torchscript"))})
    data = path.read_bytes()
    data = data[:-2] + (19).to_bytes(2, "little")  # the archive's comment is 19 bytes long
    path.write_bytes(data + b"pykd.crc32=%08x" % zlib.crc32(data))


def write_manifest(path: Path) -> None:
    """The manifest of the files that are there."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.glob("loss.*")
    }
    (path / "manifest.json").write_text(json.dumps({"format": "pykd", "format_version": 1, "files": files}))


@pytest.fixture(scope="module", params=["onnxruntime", "torchscript"])
def loss(request: pytest.FixtureRequest, folder: Path) -> runtime.Loss:
    return runtime.load(folder, request.param, threads=1)


def tensors(batch: int = 3, classes: int = 4, dtype: Any = np.float32) -> dict[str, Any]:
    random = np.random.default_rng([batch, classes])
    student, teacher = random.normal(size=(2, batch, classes)).astype(dtype)
    return {"student": student, "teacher": teacher, "labels": random.integers(0, classes, batch)}


def truth(inputs: dict[str, Any], weight: float = 1.5) -> tuple[float, np.ndarray]:
    difference = np.asarray(inputs["student"], np.float64) - np.asarray(inputs["teacher"], np.float64)
    return weight * (difference**2).mean(), 2 * weight * difference / difference.size


def test_numbers_in_every_call_whatever_the_shapes(loss: runtime.Loss) -> None:
    for call, shape in enumerate([(4, 10), (1, 1), (7, 3), (4, 10), (33, 5), (2, 100)]):
        inputs, weight = tensors(*shape), 0.5 + call
        result = loss.value_and_gradient(**inputs, weight=weight, grad_scale=4.0)
        value, gradient = truth(inputs, weight)
        assert set(result) == {"loss", "error", "grad_student"}
        assert (result["loss"].shape, result["loss"].dtype) == ((), np.float32)
        np.testing.assert_allclose(result["loss"], value, rtol=1e-6)
        np.testing.assert_allclose(result["grad_student"], 4 * gradient, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(loss.value(**inputs)["loss"], truth(inputs)[0], rtol=1e-6)


def test_float64_bfloat16_and_float16_by_torchscript(folder: Path) -> None:
    loss = runtime.load(folder / "loss.pt")
    inputs = tensors(dtype=np.float64)
    result = loss.value_and_gradient(**inputs)
    assert result["loss"].dtype == np.float64
    np.testing.assert_allclose(result["grad_student"], truth(inputs)[1], rtol=1e-13)
    dtypes = [(np.float16, 1e-3)]
    try:
        import ml_dtypes

        dtypes.append((ml_dtypes.bfloat16, 8e-3))
    except ImportError:
        pass
    for dtype, tolerance in dtypes:
        inputs = tensors(dtype=dtype)
        result = loss.value_and_gradient(**inputs)
        assert (result["grad_student"].dtype, result["loss"].dtype) == (dtype, np.float32)
        gradient = result["grad_student"].astype(np.float64)
        np.testing.assert_allclose(gradient, truth(inputs)[1], rtol=tolerance)


def test_torch_in_torch_out(loss: runtime.Loss) -> None:
    import torch

    inputs = tensors()
    student = torch.tensor(inputs["student"], requires_grad=True)
    result = loss.value_and_gradient(
        student=student, teacher=torch.tensor(inputs["teacher"]), labels=torch.tensor(inputs["labels"])
    )
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in result.values())
    student.backward(result["grad_student"])
    np.testing.assert_allclose(student.grad.numpy(), truth(inputs)[1], rtol=1e-5, atol=1e-7)


class Old:
    """A library that speaks DLPack without versions."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self) -> Any:
        return self.array.__dlpack__()


def test_any_dlpack_object(loss: runtime.Loss) -> None:
    inputs = tensors()
    result = loss.value_and_gradient(**{name: Old(array) for name, array in inputs.items()})
    np.testing.assert_allclose(result["grad_student"], truth(inputs)[1], rtol=1e-5, atol=1e-7)


def test_torch_tensors_whose_memory_is_not_their_values(loss: runtime.Loss) -> None:
    import torch

    inputs = {name: torch.tensor(array) for name, array in tensors().items()}
    expected = loss.value(**inputs)["loss"]

    class Marked(torch.Tensor):
        """A subclass goes through ``__dlpack__``."""

    for form in (torch.nn.Parameter, lambda student: student.as_subclass(Marked)):
        torch.testing.assert_close(loss.value(**{**inputs, "student": form(inputs["student"])})["loss"], expected)
    for form in (torch._neg_view, lambda student: torch._neg_view(student).as_subclass(Marked)):
        with pytest.raises(TypeError, match="student, got a lazily negated one; call .resolve_neg"):
            loss.value(**{**inputs, "student": form(inputs["student"])})
    for form, text in ((torch.Tensor.to_sparse, "sparse|strided"), (lambda student: student.to("meta"), "meta")):
        with pytest.raises(TypeError, match=f"student whose memory can be shared, got Tensor .*({text})"):
            loss.value(**{**inputs, "student": form(inputs["student"])})
    leaf = inputs["student"].clone().requires_grad_()
    with pytest.raises(TypeError, match="teacher .*require gradient"):  # below load(), where nothing detaches it
        loss._core.run({**inputs, "teacher": leaf}, {}, {"loss": torch.zeros(())})


def test_read_only_inputs_are_fine_and_outputs_are_not(loss: runtime.Loss) -> None:
    inputs = tensors()
    for array in inputs.values():
        array.flags.writeable = False
    np.testing.assert_allclose(loss.value(**inputs)["loss"], truth(inputs)[0], rtol=1e-6)
    output = np.zeros((), np.float32)
    loss._core.run(inputs, {}, {"loss": output})
    np.testing.assert_allclose(output, truth(inputs)[0], rtol=1e-6)
    output.flags.writeable = False
    with pytest.raises(ValueError, match="expected memory to write to for loss, got a read-only tensor; copy it"):
        loss._core.run(inputs, {}, {"loss": output})


def test_memory_is_given_back(loss: runtime.Loss) -> None:
    inputs = tensors()
    before = [sys.getrefcount(array) for array in inputs.values()]
    for _ in range(5):
        loss.value_and_gradient(**inputs)
        with pytest.raises(ValueError, match="batch"):
            loss.value(**{**inputs, "labels": inputs["labels"][:1]})
        with pytest.raises(TypeError):
            loss.value(**{**inputs, "labels": inputs["labels"].astype(np.int32)})
    assert [sys.getrefcount(array) for array in inputs.values()] == before


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_large_results_are_their_owners_until_nobody_has_them(loss: runtime.Loss, library: str) -> None:
    def run(seed: float) -> Any:
        inputs = tensors(300, 512)  # a gradient of 600 KiB: kept memory
        inputs["student"] += np.float32(seed)
        expected = truth(inputs)[1]
        if library == "torch":
            import torch

            inputs = {name: torch.tensor(array) for name, array in inputs.items()}
        gradient = loss.value_and_gradient(**inputs)["grad_student"]
        np.testing.assert_allclose(np.asarray(gradient), expected, rtol=1e-5, atol=1e-8)
        return gradient

    def address(array: Any) -> int:
        return array.data_ptr() if library == "torch" else array.ctypes.data

    first, second = run(1.0), run(2.0)
    assert address(first) != address(second)
    assert address(first) % 64 == 0
    kept, part = np.asarray(first).copy(), first[7:9, 3:]  # a part of it is a holder, too
    first += 1  # it is the user's to write to
    del first
    third = run(3.0)
    assert len({address(second), address(third), address(part) - (7 * 512 + 3) * 4}) == 3
    np.testing.assert_array_equal(np.asarray(part), kept[7:9, 3:] + 1)
    before = address(third)
    del third
    assert address(run(4.0)) == before


GOOD = tensors()
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("not contiguous", {"student": np.asfortranarray(GOOD["student"])}, ValueError, "student .*contiguous.*; copy"),
    ("labels of int32", {"labels": GOOD["labels"].astype(np.int32)}, TypeError, "int64 for labels, got int32; cast"),
    ("complex", {"student": GOOD["student"].astype(np.complex64)}, TypeError, "student, got complex64; cast"),
    ("mixed dtypes", {"teacher": GOOD["teacher"].astype(np.float64)}, TypeError, "teacher .*float64.*;"),
    ("objects", {"student": GOOD["student"].astype(object)}, TypeError, "student .*numpy.ndarray.*; make it"),
    ("a list", {"student": [[1.0]]}, TypeError, "tensor for student .*, got list; make it one"),
    ("missing", {"labels": None}, ValueError, "labels.*;"),
    ("misspelt", {"labels": None, "label": GOOD["labels"]}, ValueError, 'got "label"; did you mean "labels"'),
    ("lengths differ", {"teacher": GOOD["teacher"][:2]}, ValueError, 'teacher .*"batch".*, got .*;'),
    ("rank", {"student": GOOD["student"][0]}, ValueError, r"student .*\(batch, classes\), got rank 1.*;"),
    ("empty", {name: array[:0] for name, array in GOOD.items()}, ValueError, "at least 1.*, got .*;"),
    ("label too large", {"labels": np.array([0, 4, 1])}, ValueError, "labels from 0 to 3.*, got 4 at position .*;"),
    ("parameter too small", {"weight": -1.0}, ValueError, "weight .*, got -1; "),
    ("parameter is NaN", {"weight": float("nan")}, ValueError, "weight, got nan; "),
    ("parameter is no number", {"weight": "x"}, TypeError, "number for the parameter weight, got str; pass a float"),
    ("unknown parameter", {"weigth": 1.0}, ValueError, r"got weigth; did you mean weight\?"),
    ("a number for a tensor", {"labels": 1}, ValueError, "tensor for the input labels, got a number; pass"),
]


@pytest.mark.parametrize(("change", "error", "text"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_calls(loss: runtime.Loss, change: dict[str, Any], error: type[Exception], text: str) -> None:
    inputs = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(error, match=f"expected .*{text}"):
        loss.value_and_gradient(**inputs)


def test_bad_loads(folder: Path, tmp_path: Path) -> None:
    def fails(error: type[Exception], text: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=f"expected .*{text}"):
            runtime.load(*arguments, **options)

    fails(FileNotFoundError, "nowhere.*;", tmp_path / "nowhere")
    fails(FileNotFoundError, ";", tmp_path)
    fails(ValueError, 'got "tensorrt";', folder, "tensorrt")
    fails(ValueError, 'got "tpu";', folder, device="tpu")
    fails(ValueError, ";", b"not an artefact")
    fails(ValueError, ";", (folder / "loss.pt").read_bytes()[:-1])
    damaged = bytearray((folder / "loss.grad.onnx").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    fails(ValueError, ";", damaged)
    fails(RuntimeError, "missing.so.*;", folder, "onnxruntime", onnxruntime_library=tmp_path / "missing.so")


def test_a_library_that_is_named_is_used_or_is_an_error(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """TorchScript, which would do, is not taken instead; and a name that fails leaves the next load as it was."""
    with pytest.raises(RuntimeError, match=r"missing\.so"):
        runtime.load(folder, onnxruntime_library=tmp_path / "missing.so")
    with pytest.raises(FileNotFoundError, match="TorchScript alone"):
        runtime.load(folder / "loss.pt", onnxruntime_library=tmp_path / "missing.so")
    with monkeypatch.context() as patched:
        patched.setenv("PYKD_ONNXRUNTIME_LIBRARY", str(tmp_path / "missing.so"))
        with pytest.raises(RuntimeError, match=r"missing\.so"):
            runtime.load(folder)
    assert runtime.load(folder).engine == "onnxruntime"
    assert runtime.load(folder).passed_over == ""


def test_cuda_is_an_error_where_there_is_none(folder: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(RuntimeError, match=r"expected .*cuda:0, got LibTorch .*; .*cpu"):
        runtime.load(folder, "torchscript", "cuda")
    with pytest.raises(RuntimeError, match=r"expected .*; "):
        runtime.load(folder, "onnxruntime", "cuda")


def test_the_value_alone_has_no_gradient(folder: Path) -> None:
    loss = runtime.load(folder / "loss.onnx")
    np.testing.assert_allclose(loss.value(**GOOD)["loss"], truth(GOOD)[0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected an artefact with gradients, got .*; load loss\.grad\.onnx"):
        loss.value_and_gradient(**GOOD)


def test_what_a_loss_says_of_itself(loss: runtime.Loss) -> None:
    assert loss.metadata["name"] == "squares"
    assert f"{loss.engine} {loss.engine_version} on cpu" in repr(loss)
    assert [info.name for info in loss.signature.inputs] == ["student", "teacher", "labels"]
    assert loss.signature.inputs[1].axes == ("batch", "classes")
    assert [info.gradient for info in loss.signature.inputs] == [True, False, False]
    assert loss.signature.parameters[0] == runtime.ParameterInfo("weight", 1.5, 0.0, False, None)
    lines = repr(loss.signature).splitlines()
    assert lines[0].startswith("input      student       (batch, classes)  ")
    assert any(line.split() == ["parameter", "weight", "1.5", ">=", "0"] for line in lines)
    with pytest.raises(AttributeError):
        loss.engine = "other"  # type: ignore[misc]


def test_many_threads_share_one_loss(loss: runtime.Loss) -> None:
    def work(seed: int) -> bool:
        inputs = tensors(1 + seed % 5, 1 + seed % 7)
        result = loss.value_and_gradient(**inputs, weight=1.0 + seed)
        value, gradient = truth(inputs, 1.0 + seed)
        return np.allclose(result["loss"], value, rtol=1e-5) and np.allclose(
            result["grad_student"], gradient, rtol=1e-4, atol=1e-5
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))


def test_onnx_runs_without_torch(folder: Path) -> None:
    """In a process of its own, in which torch cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = None; import numpy as np, pykd\n"
        f"loss = pykd.load({str(folder)!r}, 'onnxruntime')\n"
        "a = np.ones((2, 3), np.float32)\n"
        "print(loss.value_and_gradient(student=a, teacher=0 * a, labels=np.array([0, 1]))['loss'])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1.5", done.stderr


# ---- Streams, with stand-ins for torch.cuda and the extension ------------------------------------------


@pytest.mark.parametrize(("given", "handle"), [(None, 0), (0, 1), (1, 1), (4096, 4096)])
def test_the_default_stream_is_named_to_the_engine(
    monkeypatch: pytest.MonkeyPatch, folder: Path, given: int | None, handle: int
) -> None:
    seen = []

    def open_loss(*arguments: Any) -> Any:
        seen.append(arguments[8])
        raise RuntimeError("enough")

    monkeypatch.setattr(runtime._core, "load", open_loss)
    with pytest.raises(RuntimeError, match="enough"):
        runtime.load(folder, "onnxruntime", "cuda", cuda_stream=given)
    assert seen == [handle]


class StandInStream:
    def __init__(self, handle: int, log: list[str]) -> None:
        self.cuda_stream, self.log = handle, log

    def wait_stream(self, other: StandInStream) -> None:
        self.log.append(f"{self.cuda_stream} waits for {other.cuda_stream}")

    def synchronize(self) -> None:
        self.log.append(f"the host waits for {self.cuda_stream}")


@pytest.mark.parametrize(
    ("given", "current", "order"),
    [
        (None, 0, ["the host waits for 0", "work"]),
        (None, 32, ["the host waits for 32", "work"]),
        (0, 0, ["work"]),
        (1, 0, ["work"]),
        (0, 32, ["0 waits for 32", "work", "32 waits for 0"]),
        (64, 32, ["64 waits for 32", "work", "32 waits for 64"]),
        (64, 0, ["64 waits for 0", "work", "0 waits for 64"]),
        (32, 32, ["work"]),
    ],
)
def test_calls_are_put_in_order_with_torch(
    monkeypatch: pytest.MonkeyPatch, folder: Path, given: int | None, current: int, order: list[str]
) -> None:
    log: list[str] = []

    def external(handle: int, device: Any) -> StandInStream:
        assert handle != 0, "torch.cuda.ExternalStream(0) is a new stream"
        return StandInStream(handle, log)

    class Core:
        metadata, inputs, parameters, outputs, engine = "{}", (), (), (), "onnxruntime"

        def run_into_new(self, *_: Any) -> dict[str, Any]:
            log.append("work")
            return {}

    cuda = SimpleNamespace(
        current_stream=lambda device: StandInStream(current, log),
        default_stream=lambda device: StandInStream(0, log),
        ExternalStream=external,
    )
    monkeypatch.setattr(runtime._core, "load", lambda *_: Core())
    loss = runtime.load(folder, "onnxruntime", "cuda", cuda_stream=given)
    loss._run_torch(SimpleNamespace(cuda=cuda), SimpleNamespace(type="cuda"), {}, {}, ())
    assert log == order
