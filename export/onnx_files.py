"""The ONNX files: value, value with gradient, and scores, from one trace.

The gradient is traced first and the trace is exported (tracing.py); a module that calls autograd inside ``forward``
does not survive ``torch.export``. The value file is the same graph with the gradients taken out, so both files give the same value to the last bit; a file of scores is it without what is no score. Files for
float16 and bfloat16 are the float32 graph with a cast at each end, which is what a loss does with halves; kernels take
and give halves themselves (kernel_nodes.py). Files for float64 have no kernels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import torch
from torch import Tensor

from pykd import integrity
from pykd.composition import Composition, LossGraph
from pykd.export import axes, kernel_nodes, metadata, tracing
from pykd.export.kernel_nodes import Site

_ONNX_TYPES = {
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float32": onnx.TensorProto.FLOAT,
    "float64": onnx.TensorProto.DOUBLE,
}


def build(
    composition: Composition,
    graph: LossGraph,
    fused: LossGraph,
    dtype: str,
    kernels: str = "auto",
    parameters_as: str = "overridable",
    kinds: Sequence[str] = ("value", "gradient"),
) -> dict[str, onnx.ModelProto]:
    """The models of the files by their kind, still without metadata.

    Args:
        composition: what the graph is one form of.
        graph: built with ``check=False``.
        fused: the same with ``fused=True``.
        dtype: the floating type of the inputs.
        kernels: whether there are nodes for kernels: ``"auto"``, ``"on"`` or ``"off"``.
        parameters_as: ``"overridable"``, ``"fixed"`` or ``"inputs"``.
        kinds: out of ``"value"``, ``"gradient"`` and ``"score"``, of which the last needs a graph with values per sample.
    """
    compute = "float64" if dtype == "float64" else "float32"
    has_kernel = fused.kernel_point is not None and compute == "float32"
    if kernels == "on" and not has_kernel:
        raise ValueError(
            f"expected a loss with a kernel for {dtype}, as kernels='on' asks for, got one without; pass 'auto' or 'off'"
        )
    model, sites = _traced(composition, fused if has_kernel and kernels != "off" else graph, compute)
    _cast_ends(model, graph, sites, dtype)
    names = {name: spec.names for name, spec in graph.signature.inputs.items()}
    gradients = [*(f"grad_{name}" for name in metadata.gradient_inputs(graph)), metadata.GRAD_SCALE]
    scalars = [name for name, of in graph.signature.outputs.items() if not of]
    left_out = {"gradient": [], "value": gradients, "score": [*gradients, *scalars]}
    models = {}
    for kind in kinds:
        part = models[kind] = onnx.ModelProto()
        part.CopyFrom(model)
        _remove(part, left_out[kind], sites)
        kernel_nodes.name_nodes(part, sites, dtype)
        axes.check_in_graph(part, names, kernel_nodes.compared(part), metadata.least_lengths(composition, graph))
        _hold_parameters(part, [*graph.signature.parameters, metadata.GRAD_SCALE], parameters_as)
    return models


def write(model: onnx.ModelProto, described: dict[str, Any], path: Path) -> None:
    """Writes a model of :func:`build` with its metadata and checksum."""
    _describe(model, described)
    path.write_bytes(integrity.seal_onnx(model.SerializeToString(deterministic=True)))


def value_and_gradient(
    graph: LossGraph, names: Sequence[str], numbers: Sequence[str], sites: list[Site]
) -> Callable[..., tuple[Tensor, ...]]:
    """A function of tensors alone: inputs, parameters and the gradient's scale in; values and gradients out.

    Called, it leaves the kernel calls of a fused graph in ``sites``.
    """
    wanted = metadata.gradient_inputs(graph)

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        tensors = dict(zip(names, arguments[: len(names)], strict=True))
        parameters = dict(zip(numbers, arguments[len(names) : -1], strict=True))
        scale = arguments[-1]
        if graph.kernel_point is not None:
            outputs, gradients, sites[:] = kernel_nodes.value_and_gradient(graph, wanted, tensors, parameters, scale)
            return (*outputs.values(), *gradients)
        with torch.enable_grad():
            for name in wanted:
                tensors[name] = tensors[name].detach().requires_grad_()
            outputs = graph(**tensors, **parameters)
            gradients = list(torch.autograd.grad(outputs["loss"] * scale, [tensors[name] for name in wanted]))
        return (*(output.detach() for output in outputs.values()), *gradients)

    return function


# A graph's model by compute type: tracing takes seconds, and half the types share one trace.
_traces: WeakKeyDictionary[LossGraph, dict[str, tuple[onnx.ModelProto, list[Site]]]] = WeakKeyDictionary()


def _traced(composition: Composition, graph: LossGraph, dtype: str) -> tuple[onnx.ModelProto, list[Site]]:
    """The ONNX model of value and gradient, computed (and given and returned) in ``dtype``, and its kernel calls."""
    models = _traces.setdefault(graph, {})
    if dtype not in models:
        models[dtype] = _export(composition, graph, dtype)
    model, sites = models[dtype]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy, sites


def _cast_ends(model: onnx.ModelProto, graph: LossGraph, sites: Sequence[Site], dtype: str) -> None:
    """Makes a float32 model take and give halves: inputs are widened first, gradients rounded last."""
    if dtype in ("float32", "float64"):
        return
    ends = {name for name, spec in graph.signature.inputs.items() if spec.dtype == "float"}
    gradients = {f"grad_{name}" for name in metadata.gradient_inputs(graph)}
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name in ends or name in gradients:
                    names[i] = f"_{name}_float32"
    first = [
        onnx.helper.make_node("Cast", [name], [f"_{name}_float32"], f"widen_{name}", to=onnx.TensorProto.FLOAT)
        for name in graph.signature.inputs
        if name in ends
    ]
    last = [
        onnx.helper.make_node("Cast", [f"_{name}_float32"], [name], f"round_{name}", to=_ONNX_TYPES[dtype])
        for name in sorted(gradients)
    ]
    nodes = [*first, *map(kernel_nodes.copy, model.graph.node), *last]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for item in (*model.graph.input, *model.graph.output):
        if item.name in ends or item.name in gradients:
            item.type.tensor_type.elem_type = _ONNX_TYPES[dtype]
    widened, rounded = ({f"_{name}_float32": name for name in names} for names in (ends, gradients))
    kernel_nodes.narrow(model, sites, widened, rounded)


def _export(composition: Composition, graph: LossGraph, dtype: str) -> tuple[onnx.ModelProto, list[Site]]:
    """Traces and exports a graph, with its parameters as initialisers and the formulas of its kernel calls."""
    signature = graph.signature
    compute_dtype = getattr(torch, dtype)
    examples = composition.draw(signature.inputs, dtype=compute_dtype)
    numbers = {name: parameter.default for name, parameter in signature.parameters.items()} | {metadata.GRAD_SCALE: 1.0}
    scalars = {name: torch.tensor(value, dtype=compute_dtype) for name, value in numbers.items()}
    gradients = metadata.gradient_inputs(graph)
    sites: list[Site] = []
    function = value_and_gradient(graph, list(examples), list(signature.parameters), sites)
    outputs = [*signature.outputs, *(f"grad_{name}" for name in gradients)]
    model = tracing.to_onnx(function, {**examples, **scalars}, outputs)
    kernel_nodes.place(model, sites)
    if dtype == "float64":
        _part_transposes(model)
    if sites:
        parameters = {name: scalars[name] for name in signature.parameters}
        kernel_nodes.write_bodies(sites, graph, gradients, examples, parameters, tracing.to_onnx)
    for name, value in numbers.items():
        kind = onnx.TensorProto.DOUBLE if compute_dtype == torch.float64 else onnx.TensorProto.FLOAT
        model.graph.initializer.append(onnx.helper.make_tensor(name, kind, [], [value]))
    return model, sites


def _part_transposes(model: onnx.ModelProto) -> None:
    """Puts a Reshape that changes nothing between each Transpose and the MatMul that reads it.

    ONNX Runtime 1.21 to 1.24 make one operator of such a pair, for float64, too, where it has no kernel for it: the file
    did not load. A Reshape moves no memory, and no optimiser takes it away.
    """
    transposes = {node.output[0]: node for node in model.graph.node if node.op_type == "Transpose"}
    nodes = []
    for node in model.graph.node:
        node = kernel_nodes.copy(node)
        for i, name in enumerate(node.input):
            if node.op_type == "MatMul" and name in transposes:
                rank = len(transposes[name].attribute[0].ints)
                same = onnx.numpy_helper.from_array(np.zeros(rank, np.int64), f"_{node.name}_same_{i}")
                model.graph.initializer.append(same)
                node.input[i] = f"_{node.name}_transposed_{i}"
                nodes.append(onnx.helper.make_node("Reshape", [name, same.name], [node.input[i]]))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _remove(model: onnx.ModelProto, without: Sequence[str], sites: Sequence[Site]) -> None:
    """Takes inputs and outputs out of a model, and everything that only they needed."""
    graph = model.graph
    _keep(graph.output, lambda output: output.name not in without)
    needed = {output.name for output in graph.output}
    kept = kernel_nodes.live(graph.node, needed, sites)
    del graph.node[:]
    graph.node.extend(kept)
    _keep(graph.input, lambda item: item.name not in without)
    _keep(graph.initializer, lambda item: item.name in needed or item.name in {i.name for i in graph.input})


def _hold_parameters(model: onnx.ModelProto, names: Sequence[str], form: str) -> None:
    """Parameters are inputs with an initialiser; fixed, they are no inputs, and as inputs they have no initialiser."""
    if form == "fixed":
        _keep(model.graph.input, lambda item: item.name not in names)
    elif form == "inputs":
        _keep(model.graph.initializer, lambda item: item.name not in names)


def _keep(field: Any, condition: Any) -> None:
    kept = [type(item).FromString(item.SerializeToString()) for item in field if condition(item)]
    del field[:]
    field.extend(kept)


def _describe(model: onnx.ModelProto, described: dict[str, Any]) -> None:
    """Names the axes and writes the metadata; a mistake of the exporter ends here."""
    model.producer_name, model.producer_version = "pykd", described["versions"]["pykd"]
    model.graph.name = described["name"]
    types = {**_ONNX_TYPES, "int64": onnx.TensorProto.INT64}
    compute = "float64" if any(entry["dtype"] == "float64" for entry in described["inputs"]) else "float32"
    numbers = [{"name": entry["name"], "axes": [], "dtype": compute} for entry in described["parameters"]]
    if described.get("parameters_as") == "fixed":
        numbers = []
    for wanted, found in (
        ([*described["inputs"], *numbers], model.graph.input),
        (described["outputs"], model.graph.output),
    ):
        if [entry["name"] for entry in wanted] != [item.name for item in found]:
            raise RuntimeError(
                f"expected the exporter to keep {[e['name'] for e in wanted]}, got {[i.name for i in found]}; please report this"
            )
        for entry, item in zip(wanted, found, strict=True):
            tensor = item.type.tensor_type
            dims = tensor.shape.dim
            frozen = [d.dim_value for d in dims if d.HasField("dim_value")]
            if tensor.elem_type != types[entry["dtype"]] or len(dims) != len(entry["axes"]) or frozen:
                raise RuntimeError(
                    f"expected the exporter to keep {entry['name']} as {entry['dtype']} with free axes {entry['axes']}, "
                    f"got {onnx.helper.printable_value_info(item)}; please report this"
                )
            for dim, axis in zip(dims, entry["axes"], strict=True):
                dim.dim_param = axis
    onnx.helper.set_model_props(model, {metadata.KEY: metadata.dumps(described)})
    onnx.checker.check_model(model, full_check=True)
