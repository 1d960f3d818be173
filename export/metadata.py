"""The metadata that every artefact carries; docs/artefacts.md describes each field."""

import json
import platform
from importlib import metadata as packages
from typing import Any

import torch

from pykd._version import __version__
from pykd.composition import Composition, LossGraph
from pykd.definition import Scalar

FORMAT_VERSION = 2  # the newest; a file has the oldest version that says what it needs
KEY = "pykd"  # of ONNX metadata_props
EXTRA_FILE = "pykd.json"  # of TorchScript files
GRAD_SCALE = "grad_scale"


def gradient_inputs(graph: LossGraph) -> list[str]:
    """The inputs that receive a gradient."""
    return [name for name, spec in graph.signature.inputs.items() if spec.grad]


def least_lengths(composition: Composition, graph: LossGraph) -> dict[str, int]:
    """The axes of the inputs that need more than one entry, and how many."""
    axes = {axis for spec in graph.signature.inputs.values() for axis in spec.names}
    return {axis: least for axis, least in sorted(composition.least_lengths.items()) if axis in axes and least > 1}


def of_graph(
    composition: Composition,
    graph: LossGraph,
    kind: str,
    dtype: str,
    opset: int | None,
    parameters_as: str = "overridable",
) -> dict[str, Any]:
    """The metadata of one file.

    Args:
        composition: what the graph was made of.
        graph: the graph.
        kind: ``"value"``, ``"gradient"``, ``"torchscript"`` or ``"score"``.
        dtype: the floating type of the file, ``"float"`` for TorchScript.
        opset: of ONNX files.
        parameters_as: ``"overridable"``, ``"fixed"`` or ``"inputs"``.
    """
    value_dtype = {"float": "float", "float64": "float64"}.get(dtype, "float32")
    inputs = []
    for name, spec in graph.signature.inputs.items():
        entry: dict[str, Any] = {
            "name": name,
            "axes": list(spec.names),
            "dtype": {"float": dtype, "weight": "float32"}.get(spec.dtype, spec.dtype),
            "gradient": spec.grad,
        }
        if spec.dtype == "weight":
            entry["role"] = "weight"
        if spec.index_of:
            entry["index_of"] = spec.index_of
            if name in graph.signature.ignore_indices:
                entry["ignore_index"] = graph.signature.ignore_indices[name]
        inputs.append(entry)
    outputs = [
        {"name": name, "axes": list(axes), "dtype": value_dtype}
        for name, axes in graph.signature.outputs.items()
        if axes or kind != "score"
    ]
    parameters = []
    for name, parameter in graph.signature.parameters.items():
        parameters.append(_parameter(name, parameter.default, parameter.scalar))
    if kind in ("gradient", "torchscript"):
        outputs += [
            {"name": f"grad_{entry['name']}", "axes": entry["axes"], "dtype": dtype, "gradient_of": entry["name"]}
            for entry in inputs
            if entry["gradient"]
        ]
        parameters.append(_parameter(GRAD_SCALE, 1.0, Scalar()))
    least = least_lengths(composition, graph)
    return {
        "format": "pykd",
        "format_version": 1 if parameters_as == "overridable" else 2,
        "kind": kind,
        "name": "_".join(term.name for term in composition.named_terms),
        "recipe": composition.recipe(),
        "terms": [_term(composition, term) for term in composition.named_terms],
        "inputs": inputs,
        **({"least_lengths": least} if least else {}),
        "parameters": parameters,
        **({"parameters_as": parameters_as} if parameters_as != "overridable" else {}),
        "outputs": outputs,
        **({"opset": opset} if opset is not None else {}),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of what makes the files."""
    found = {"pykd": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("onnx", "onnxscript"):
        found[name] = packages.version(name)
    return found


def dumps(metadata: dict[str, Any]) -> str:
    """The metadata as it stands in a file."""
    return json.dumps(metadata, ensure_ascii=False, allow_nan=False)


def _parameter(name: str, default: float, scalar: Scalar) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "default": default}
    if scalar.minimum != float("-inf"):
        entry |= {"minimum": scalar.minimum, "minimum_exclusive": scalar.exclusive}
    if scalar.maximum != float("inf"):
        entry["maximum"] = scalar.maximum
    return entry


def _term(composition: Composition, term: Any) -> dict[str, Any]:
    losses = sorted({part.loss.name for part in term.parts})
    entry: dict[str, Any] = {"name": term.name, "losses": losses, "per_sample": not term.couples_batch}
    if term.couples_batch:
        entry["couples_batch"] = term.couples_batch
    if not composition.single:
        entry["weight"] = f"{term.name}_weight"
    return entry
