"""Writes merged scorers for the C++ tests: ``python -m tests.make_merged build/merged``.

Each lies in a folder of its own with ``calls.json``: what its inputs hold, and what three sessions of ONNX Runtime return for
them, by the portable operators. Beside the scorers lies the loss that is in them.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import pykd
from pykd.scoring.merge import merge
from pykd.scoring.sessions import Sessions

CLASSES, WIDTH, ROWS, WORDS = 5, 7, 6, 11
Array = np.ndarray[Any, Any]


def classifier(path: Path, seed: int, pixels: str = "float32", rows: int | str | None = "n") -> Path:
    """A linear classifier of pixels of that type."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["numbers", "weights"], ["logits"]),
    ]
    weights = numpy_helper.from_array(_weights(seed, WIDTH), "weights")
    given = helper.np_dtype_to_tensor_dtype(np.dtype(pixels))
    return _save(path, nodes, {"pixels": (given, [rows, WIDTH])}, [weights], rows)


def of_tokens(path: Path, seed: int) -> Path:
    """A classifier of sentences of any length: the mean of the embeddings that a mask of int32 keeps."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["vectors"]),
        helper.make_node("Cast", ["mask"], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept", "last"], ["column"]),
        helper.make_node("Mul", ["vectors", "column"], ["products"]),
        helper.make_node("ReduceMean", ["products", "middle"], ["logits"], keepdims=0),
    ]
    weights = [numpy_helper.from_array(_weights(seed, WORDS), "table")]
    weights += [numpy_helper.from_array(np.array([axis]), name) for name, axis in (("last", 2), ("middle", 1))]
    inputs = {"ids": (TensorProto.INT64, ["n", "words"]), "mask": (TensorProto.INT32, ["n", "words"])}
    return _save(path, nodes, inputs, weights, "n")


def linear(path: Path, seed: int) -> Path:
    """What scikit-learn's converters write."""
    coefficients = _weights(seed, WIDTH).T.ravel().tolist()
    targets = {"intercepts": [0.0] * CLASSES, "coefficients": coefficients, "targets": CLASSES}
    node = helper.make_node("LinearRegressor", ["pixels"], ["logits"], domain="ai.onnx.ml", **targets)
    return _save(path, [node], {"pixels": (TensorProto.FLOAT, [None, WIDTH])}, [], None, ("ai.onnx.ml", 3))


def _weights(seed: int, inputs: int) -> Array:
    return np.random.default_rng(seed).standard_normal((inputs, CLASSES)).astype(np.float32)


def _save(
    path: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    weights: list[Any],
    rows: Any,
    opset: tuple[str, int] | None = None,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info(name, *described) for name, described in inputs.items()],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [rows, CLASSES])],
        weights,
    )
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(*opset)] if opset else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def write(root: Path) -> None:
    """Makes the folder anew."""
    from onnxruntime.quantization import quantize_dynamic

    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    soft = pykd.SoftTarget(temperature=2.0, form="kl", tau_squared=True)
    both = pykd.compose({"hard": (pykd.HardTarget(), 1.0), "soft": (soft, 0.5)})
    pykd.export(soft, root / "soft", kind="score", progress=lambda line: None)
    pykd.export(both, root / "both", kind="score", layouts={"labels": "batch"}, progress=lambda line: None)

    random = np.random.default_rng(3)
    pixels = {"pixels": random.standard_normal((ROWS, WIDTH)).astype(np.float32)}
    labels = {"labels": np.array([0, 4, -100, 2, 1, 1])}
    models = root / "models"
    models.mkdir()
    teacher, student = (classifier(models / f"{name}.onnx", seed) for seed, name in enumerate(("teacher", "student")))
    quantize_dynamic(student, models / "int8.onnx")
    onnx.save(onnx.load(teacher), models / "large.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    _case(root, "plain", teacher, student, "soft", pixels)
    _case(root, "labels", teacher, student, "both", pixels | labels)
    _case(root, "int8", teacher, models / "int8.onnx", "soft", pixels)
    _case(root, "outside", models / "large.onnx", student, "soft", pixels, keep=["student:logits"])
    _case(root, "ml", linear(models / "ml.onnx", 2), student, "soft", pixels)
    bytes_ = {"pixels": random.integers(0, 255, (ROWS, WIDTH)).astype(np.uint8)}
    images = [classifier(models / f"{name}.uint8.onnx", seed, "uint8", ROWS) for seed, name in enumerate(("t", "s"))]
    _case(root, "uint8", *images, "soft", bytes_)
    words = {"ids": random.integers(0, WORDS, (ROWS, 4)), "mask": random.integers(0, 2, (ROWS, 4)).astype(np.int32)}
    _case(root, "tokens", *(of_tokens(models / f"{name}.tokens.onnx", n) for n, name in enumerate("ts")), "soft", words)


def _case(root: Path, name: str, teacher: Path, student: Path, loss: str, feeds: dict[str, Array], **more: Any) -> None:
    folder = root / name
    folder.mkdir()
    merge(teacher, student, root / loss, folder / "scorer.onnx", **more)
    outputs = Sessions(teacher, student, root / loss, kernels=False, options=_quiet)(feeds)
    logits = {}
    for role, path in (("teacher", teacher), ("student", student)):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        logits[f"{role}_logits"] = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[
            0
        ]
    calls = {"loss": loss, "inputs": _arrays(feeds), "outputs": _arrays(outputs), "logits": _arrays(logits)}
    (folder / "calls.json").write_text(json.dumps(calls))


def _quiet() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each parameter that can be set
    return options


def _arrays(tensors: dict[str, Array]) -> dict[str, Any]:
    """Their bytes as numbers, so that nothing is rounded."""
    return {
        name: {"dtype": str(array.dtype), "shape": array.shape, "bytes": list(array.tobytes())}
        for name, array in tensors.items()
    }


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "build/merged"))
