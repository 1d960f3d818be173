"""Kernels in ONNX files: one node of the domain ``pykd`` each, whose model-local function is the plain formula.

A graph built with ``fused=True`` is traced with a stand-in node for every kernel call. Afterwards each stand-in becomes
``pykd.<kernel>_<dtype>`` (``soft_target_bfloat16``), and the formula behind it, traced by itself, the body of a
function of that name. A runtime that knows no such operator inlines the function; one that has pykd's operators
registered runs the kernel. Where one file needs the same kernel with different bodies (other attributes, other inputs given), the
names count on: ``soft_target_float32_2``.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import onnx
import onnx.inliner
import torch
from onnx import helper
from torch import Tensor

from pykd.composition import LossGraph
from pykd.export import axes
from pykd.fused import point
from pykd.fused.description import Kernel
from pykd.fused.point import Call

DOMAIN = "pykd"
VERSION = 1
SLOTS = 4  # names per kernel and dtype that the operator library registers: soft_target_float32, …_2, …_3, …_4

ToOnnx = Callable[[Callable[..., tuple[Tensor, ...]], Mapping[str, Tensor], Sequence[str]], onnx.ModelProto]


@dataclasses.dataclass
class Site:
    """One kernel call of a traced graph: the call, the weights it takes, and its formula as a model."""

    call: Call
    weights: tuple[str, ...]
    body: onnx.ModelProto | None = None

    @property
    def given(self) -> list[str]:
        """The kernel's inputs that the call has, in the kernel's order."""
        return [name for name in self.call.kernel.inputs if name in self.call.tensors or name in self.weights]

    @property
    def returned(self) -> list[str]:
        """The kernel's outputs that the call has, in the kernel's order."""
        values = {value.output for value in self.call.values}
        return [
            name for name in self.call.kernel.outputs if name in values or (self.weights and name.startswith("grad_"))
        ]

    @property
    def attributes(self) -> dict[str, Any]:
        """All of them, so that no runtime has to know a default; numbers and truth values as floats."""
        every = {**self.call.kernel.attributes, **self.call.attributes}
        return {name: value if isinstance(value, str) else float(value) for name, value in every.items()}


def value_and_gradient(
    graph: LossGraph, wanted: Sequence[str], tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], scale: Any
) -> tuple[dict[str, Tensor], list[Tensor], list[Site]]:
    """Values and gradients of a fused graph with a stand-in node for every kernel call, to be traced."""
    sites: list[Site] = []

    def run(call: Call, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        site = Site(call, tuple(weights))
        given = {**call.tensors, **weights}
        shapes = [call.kernel.shape(name, call.tensors) for name in site.returned]
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{len(sites)}",
            [given.get(name) for name in call.kernel.inputs],
            dict(site.attributes),
            dtypes=[torch.float32] * len(shapes),
            shapes=shapes,
            version=VERSION,
        )
        sites.append(site)
        return dict(zip(site.returned, outputs, strict=True))

    values, gradients = _run(graph, wanted, tensors, numbers, scale, run)
    return values, gradients, sites


def write_bodies(
    sites: Sequence[Site],
    graph: LossGraph,
    wanted: Sequence[str],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    to_onnx: ToOnnx,
) -> None:
    """Traces the formula behind every site, at the tensors that reach it for these inputs."""
    bodies: list[onnx.ModelProto] = []

    def run(call: Call, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        site = sites[len(bodies)]
        given = {**call.tensors, **weights}
        examples = {name: torch.as_tensor(given[name]).detach().clone() for name in site.given}

        def function(*arguments: Tensor) -> tuple[Tensor, ...]:
            by_name = dict(zip(site.given, arguments, strict=True))
            results = call.plain(
                {name: by_name[name] for name in call.tensors}, {name: by_name[name] for name in site.weights}
            )
            return tuple(results[name] for name in site.returned)

        bodies.append(to_onnx(function, examples, site.returned))
        return call.plain(call.tensors, weights)

    _run(graph, wanted, tensors, numbers, 1.0, run)
    for site, body in zip(sites, bodies, strict=True):
        given = {name: site.call.kernel.inputs[name].axes.split() for name in site.given if name in site.call.tensors}
        axes.check_in_graph(body, given)
        site.body = body


def _run(
    graph: LossGraph,
    wanted: Sequence[str],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    scale: Any,
    run: point.Run,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    assert graph.kernel_point is not None
    leaves = {name: t.detach().requires_grad_() if name in wanted else t for name, t in tensors.items()}
    students = [leaves[name] for name in wanted]
    return point.value_and_gradient(lambda: graph(**leaves, **numbers), graph.kernel_point, students, scale, run)


# ---- In the model -------------------------------------------------------------------------------


def is_site(node: onnx.NodeProto) -> bool:
    return bool(node.domain == DOMAIN)


def place(model: onnx.ModelProto, sites: Sequence[Site]) -> None:
    """Gives every stand-in its inputs and outputs by position: "" where the call leaves one out."""
    for node in filter(is_site, model.graph.node):
        site = sites[int(node.op_type)]
        outputs = dict(zip(site.returned, node.output, strict=True))
        _set(node.output, [outputs.get(name, "") for name in site.call.kernel.outputs])
        _trim(node)


def compared(model: onnx.ModelProto) -> list[set[str]]:
    """Sets of inputs that reach one kernel as they are; it (and its formula) compares their axes."""
    inputs = {item.name for item in model.graph.input}
    return [
        {name for name in node.input if name in inputs}
        for node in filter(is_site, model.graph.node)
        if sum(name in inputs for name in node.input) > 1
    ]


def live(nodes: Iterable[onnx.NodeProto], needed: set[str], sites: Sequence[Site]) -> list[onnx.NodeProto]:
    """The nodes that ``needed`` values come from; ``needed`` gains what they need.

    A kernel whose gradient nobody wants loses that output, and the weights that only the gradient needed.
    """
    kept = []
    for node in reversed(list(nodes)):
        if not needed & {*node.output} - {""}:  # "" is an input or output that a call leaves out
            continue
        kept.append(copy(node))
        if is_site(node):
            site = sites[int(node.op_type)]
            outputs = [name if name in needed else "" for name in node.output]
            _set(kept[-1].output, outputs)
            wants_gradient = any(
                name
                for name, output in zip(outputs, site.call.kernel.outputs, strict=False)
                if output.startswith("grad_")
            )
            if not wants_gradient:
                names = zip(node.input, site.call.kernel.inputs, strict=False)
                _set(kept[-1].input, ["" if argument in site.weights else name for name, argument in names])
            _trim(kept[-1])
        needed |= set(kept[-1].input)
    return kept[::-1]


def narrow(
    model: onnx.ModelProto, sites: Sequence[Site], widened: Mapping[str, str], rounded: Mapping[str, str]
) -> None:
    """Lets kernels read and write halves themselves where nothing but a reshape (tokens as rows) lies between them and the
    ends of the model.

    Args:
        model: takes halves; its first nodes widen them, its last round the gradients.
        sites: the kernel calls behind its stand-ins.
        widened: name of a float32 copy of an input → the input.
        rounded: name of a float32 gradient → the output it is rounded to.
    """
    uses: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    reshapes = [node for node in model.graph.node if node.op_type == "Reshape"]
    behind = {node.output[0]: node for node in reshapes if node.input[0] in widened}
    before = {n.input[0]: n for n in reshapes if n.output[0] in rounded and uses[n.input[0]] == 1}
    gone = set()
    own: dict[str, list[onnx.NodeProto]] = {}  # reshapes of halves, by the site they belong to
    for node in filter(is_site, model.graph.node):
        kernel = sites[int(node.op_type)].call.kernel
        inputs = [
            name
            for name, argument in zip(node.input, kernel.inputs.values(), strict=False)
            if name and argument.role == "tensor"
        ]
        outputs = [
            name
            for name, argument in zip(node.output, kernel.outputs.values(), strict=False)
            if name and argument.role == "tensor"
        ]
        last = {name: before[name].output[0] if name in before else name for name in outputs}
        if not all(name in widened or name in behind for name in inputs):
            continue
        if not all(name in rounded and uses[name] == 1 for name in last.values()):
            continue
        half = {name: widened[name] for name in inputs if name in widened}
        for name in sorted(set(inputs) - half.keys()):
            half[name] = f"{name}_for_{node.op_type}"
            source, shape = behind[name].input
            own.setdefault(node.op_type, []).append(helper.make_node("Reshape", [widened[source], shape], [half[name]]))
        _set(node.input, [half.get(name, name) for name in node.input])
        gone |= set(last.values())
        for name in outputs:
            if name in before:
                _set(before[name].output, [rounded[last[name]]])
        _set(node.output, [rounded[name] if name in outputs and name not in before else name for name in node.output])
    kept = []
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in gone:
            continue
        if node.op_type == "Shape":  # which need not wait for the cast
            _set(node.input, [widened.get(name, name) for name in node.input])
        kept += [*(own.get(node.op_type, ()) if is_site(node) else ()), copy(node)]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def name_nodes(model: onnx.ModelProto, sites: Sequence[Site], dtype: str) -> None:
    """Gives the stand-ins their names and the model their functions.

    Args:
        model: after everything else; its unused nodes are gone.
        sites: the kernel calls behind its stand-ins.
        dtype: of the model's floating inputs. A kernel that is not at the model's ends computes in float32.
    """
    ends = {item.name for item in (*model.graph.input, *model.graph.output)}
    ends |= {node.output[0] for node in model.graph.node if node.op_type == "Reshape" and node.input[0] in ends}
    functions: dict[str, dict[bytes, str]] = {}
    for node in filter(is_site, model.graph.node):
        site = sites[int(node.op_type)]
        kernel = site.call.kernel
        tensors = {
            name
            for name, argument in zip(node.input, kernel.inputs.values(), strict=False)
            if argument.role == "tensor"
        }
        own = dtype if tensors - {""} <= ends else "float32"
        function = _function(site, node, own)
        base = f"{kernel.name}_{own}"
        slots = functions.setdefault(base, {})
        key = function.SerializeToString(deterministic=True)
        if key not in slots:
            slots[key] = base if not slots else f"{base}_{len(slots) + 1}"
            function.name = slots[key]
            model.functions.append(function)
        node.name = f"{slots[key]}_{node.op_type}"
        node.op_type = slots[key]
    if functions and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    surplus = [(DOMAIN, name) for slots in functions.values() for name in list(slots.values())[SLOTS:]]
    if surplus:
        inlined = onnx.inliner.inline_selected_functions(model, surplus)
        model.CopyFrom(inlined)


def _function(site: Site, node: onnx.NodeProto, dtype: str) -> onnx.FunctionProto:
    """The formula as a function of the node's inputs, without a name yet."""
    assert site.body is not None
    kernel = site.call.kernel
    inputs = list(kernel.inputs)[: len(node.input)]
    outputs = list(kernel.outputs)[: len(node.output)]
    wanted = {name for name, used in zip(outputs, node.output, strict=True) if used}
    needed = set(wanted)
    nodes = live(site.body.graph.node, needed, ())
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in site.body.graph.initializer
        if tensor.name in needed
    ]
    # A function gives every output; this one is left out by the node.
    constants += [
        helper.make_node("Constant", [], [name], value=helper.make_tensor("", onnx.TensorProto.FLOAT, [], [0.0]))
        for name in outputs
        if name not in wanted
    ]
    body = [*constants, *nodes]
    if dtype != "float32":
        body = _with_casts(body, kernel, set(inputs) & needed, wanted, dtype)
    opsets = [entry for entry in site.body.opset_import if entry.domain == ""]
    function = helper.make_function(DOMAIN, "", inputs, outputs, body, opsets, attributes=list(site.attributes))
    for item in function.node:
        item.name = ""
    return function


def _with_casts(
    nodes: Sequence[onnx.NodeProto], kernel: Kernel, inputs: set[str], outputs: set[str], dtype: str
) -> list[onnx.NodeProto]:
    """A float32 body for tensors that are halves."""
    kind = getattr(onnx.TensorProto, dtype.upper())
    first = [
        helper.make_node("Cast", [name], [f"_{name}_float32"], to=onnx.TensorProto.FLOAT)
        for name, argument in kernel.inputs.items()
        if name in inputs and argument.role == "tensor"
    ]
    last = [
        helper.make_node("Cast", [f"_{name}_float32"], [name], to=kind)
        for name, argument in kernel.outputs.items()
        if name in outputs and argument.role == "tensor"
    ]
    ends = {node.input[0]: node.output[0] for node in first} | {node.output[0]: node.input[0] for node in last}
    middle = [copy(node) for node in nodes]
    for node in middle:
        _set(node.input, [ends.get(name, name) for name in node.input])
        _set(node.output, [ends.get(name, name) for name in node.output])
    return [*first, *middle, *last]


def copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copied: onnx.NodeProto = onnx.NodeProto.FromString(node.SerializeToString())
    return copied


def _set(field: Any, values: Sequence[str]) -> None:
    del field[:]
    field.extend(values)


def _trim(node: onnx.NodeProto) -> None:
    """Takes empty names off the ends."""
    for field in (node.input, node.output):
        while field and not field[-1]:
            field.pop()
