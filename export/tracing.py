"""From a function of tensors to an ONNX model, the function's own calls of autograd included.

``make_fx`` traces the function with symbolic sizes and decomposes it to the operators that torch's exporter translates.
The exporter would trace that graph twice more, ``torch.export`` to take it in and a last time to decompose it, which is
two thirds of the whole. So :func:`direct` hands it over as a program that is decomposed already. It rests on private
interfaces of torch; where one of them is another (or the graph holds what it does not expect) :func:`retraced` goes
the ordinary way, and writes the same graph. The log ``pykd.export`` says so.
"""

import contextlib
import functools
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.export import ExportedProgram, ExportGraphSignature, ModuleCallEntry
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx.experimental.proxy_tensor import make_fx

OPSET = 18

Function = Callable[..., tuple[Tensor, ...]]

_log = logging.getLogger("pykd.export")
_aten = torch.ops.aten


def to_onnx(function: Function, arguments: Mapping[str, Tensor], outputs: Sequence[str]) -> onnx.ModelProto:
    """The ONNX model of a function, with our names, free axes, and nothing that torch left in it.

    Args:
        function: of tensors alone, and returning a tuple of them.
        arguments: an example of each, by name. Axes of one length are free of each other all the same.
        outputs: their names.
    """
    values = tuple(arguments.values())
    try:
        model = direct(function, values)
    except Exception as reason:  # whatever a private interface raises; what is wrong with the function comes again
        _log.info("torch's exporter traces twice more: %s: %s", type(reason).__name__, str(reason).partition("\n")[0])
        model = retraced(function, values)
    _clean(model)
    _name(model, list(arguments), outputs)
    return model


def retraced(function: Function, values: tuple[Tensor, ...]) -> onnx.ModelProto:
    """The model as torch's exporter makes it, by its documented interface."""
    with _quiet():
        traced = make_fx(function, tracing_mode="symbolic", decomposition_table=_decompositions())(*values)
        _tidy(traced)
        free = [dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) for value in values]
        exported = torch.export.export(traced, values, dynamic_shapes=tuple(free))
        program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False)
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def direct(function: Function, values: tuple[Tensor, ...]) -> onnx.ModelProto:
    """The same from one trace; raises where torch, or the graph, is not as expected."""
    from torch.fx.experimental import _config
    from torch.onnx._internal.exporter import _core

    with _quiet():
        with _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            traced = make_fx(function, tracing_mode="symbolic", decomposition_table=_all_decompositions())(*values)
        _tidy(traced)
        _read_lengths_from_inputs(traced)
        _check(traced)
        model: onnx.ModelProto = _core.export(
            _program(traced, values), registry=_registry(), opset_version=OPSET, verbose=False
        ).model_proto
    return model


# ---- Operators ----------------------------------------------------------------------------------


def _decompositions() -> dict[Any, Callable[..., Any]]:
    ours = {_aten._log_softmax.default: _log_softmax, _aten.log1p.default: _log1p, _aten.expm1.default: _expm1}
    return {**core_aten_decompositions(), **ours}


@functools.cache
def _registry() -> Any:
    """The operators that torch's exporter translates; it would collect them anew, for half a second, in every call."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return ONNXRegistry.from_torchlib(opset_version=OPSET)


@functools.cache
def _all_decompositions() -> dict[Any, Callable[..., Any]]:
    """Ours, and for every other operator that is not translated the one that torch's exporter would apply in the end."""
    from torch.onnx._internal.exporter import _decomp

    translated = set(_decomp.get_onnx_implemented_overloads(_registry()))
    return {**_decomp.create_onnx_friendly_decomposition_table(translated), **_decompositions()}


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """Written out: some runtimes compute ONNX's LogSoftmax as log(softmax), which is −∞ where the softmax underflows."""
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def _log1p(x: Tensor) -> Tensor:
    """ONNX has none. The logarithm of the sum, and what the sum has lost of x, which is nothing beside a large one."""
    small = x.clamp(max=1e6)
    total = 1 + small
    lost = small - (total - 1)
    return (1 + x).log() + lost / total.clamp(min=1.0)


def _expm1(x: Tensor) -> Tensor:
    """ONNX has none. eˣ − 1 = tanh(x / 2) · (eˣ + 1) keeps the digits that tanh keeps."""
    return torch.tanh(x / 2) * (x.exp() + 1)


# ---- The traced graph ---------------------------------------------------------------------------


def _tidy(traced: fx.GraphModule) -> None:
    """Drops the markers that tracing leaves and that compute nothing; keeps numbers exact."""
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target in (_aten.detach.default, _aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    _keep_numbers_exact(traced)
    traced.recompile()


def _keep_numbers_exact(traced: fx.GraphModule) -> None:
    """Numbers in a float64 graph become tensors: the exporter would write 0.3 as a float32, 1e-8 away from itself."""
    for node in list(traced.graph.nodes):
        if node.target in (_aten.full_like.default, _aten.full.default):
            _fill_exactly(traced, node)
            continue
        alone = node.target is _aten.scalar_tensor.default  # as torch.where takes a number
        if not alone and (len(node.args) != 2 or not isinstance(node.args[0], fx.Node)):
            continue
        # Beside a tensor, what counts is its type, not the node's own: a comparison with a number is no float64.
        value = (node if alone else node.args[0]).meta.get("val")
        number = node.args[-1]
        if not isinstance(value, Tensor) or value.dtype != torch.float64 or not isinstance(number, float):
            continue
        if torch.tensor(number).double() == number:
            continue
        packet = node.target.overloadpacket
        if not alone and "Tensor" not in packet.overloads():
            continue
        exact = _exact(traced, node, number)
        if alone:
            exact.meta["val"] = value
            node.replace_all_uses_with(exact)
            traced.graph.erase_node(node)
        else:
            node.args = (node.args[0], exact)
            node.target = packet.Tensor


def _exact(traced: fx.GraphModule, node: fx.Node, number: float) -> fx.Node:
    """A float64 number as a node before another one."""
    name = f"number_{node.name}"
    traced.register_buffer(name, torch.tensor(number, dtype=torch.float64))
    with traced.graph.inserting_before(node):
        return traced.graph.get_attr(name)


def _fill_exactly(traced: fx.GraphModule, node: fx.Node) -> None:
    """Makes a float64 tensor full of a number one of ones, times the number."""
    number, value = node.args[1], node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float64 or not isinstance(number, float):
        return
    if torch.tensor(number).double() == number or number != number:
        return
    node.args = (node.args[0], 1.0)
    exact = _exact(traced, node, number)
    with traced.graph.inserting_after(node):
        filled = traced.graph.call_function(_aten.mul.Tensor, (node, exact))
    filled.meta["val"] = value
    node.replace_all_uses_with(filled, delete_user_cb=lambda user: user is not filled)


def _read_lengths_from_inputs(traced: fx.GraphModule) -> None:
    """Every length is computed once, from the axes of the inputs, as torch.export does; not from a tensor on the way."""
    graph: Any = traced.graph
    for node in graph.find_nodes(op="call_function", target=_aten.sym_numel.default):
        with graph.inserting_before(node):
            node.replace_all_uses_with(_product_of_lengths(graph, node))
        graph.erase_node(node)
    inputs = graph.find_nodes(op="placeholder")
    known: dict[Any, fx.Node] = {}
    last = inputs[-1]
    for node in inputs:
        for at, length in enumerate(node.meta["val"].shape):
            if not isinstance(length, torch.SymInt):
                continue  # 1, which every trace holds to be one for good; the caller sees an axis that is not free
            expression = length.node.expr
            if not expression.is_symbol:
                raise ValueError(f"expected every axis of {node.name} to be free, got the length {expression}")
            if expression in known:
                continue
            with graph.inserting_after(last):
                known[expression] = last = graph.call_function(_aten.sym_size.int, (node, at))
            last.meta["val"] = length
    for node in list(graph.nodes):
        length = node.meta.get("val")
        if node.op == "call_function" and isinstance(length, torch.SymInt):
            first = known.setdefault(length.node.expr, node)
            if first is not node:
                node.replace_all_uses_with(first)
    graph.eliminate_dead_code()
    traced.recompile()


def _product_of_lengths(graph: Any, node: Any) -> Any:
    """What the exporter translates instead of ``sym_numel``."""
    (tensor,) = node.args
    product: Any = 1  # of a tensor without axes
    for at, length in enumerate(tensor.meta["val"].shape):
        factor = graph.call_function(_aten.sym_size.int, (tensor, at))
        factor.meta["val"] = length
        if isinstance(product, int):
            product = factor
            continue
        both = graph.call_function(operator.mul, (product, factor))
        both.meta["val"] = product.meta["val"] * length
        product = both
    return product


def _check(traced: fx.GraphModule) -> None:
    """A retrace would decompose what is not translated, and make pure what writes in place; here nothing would."""
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        known = _registry().is_registered(node.target) or getattr(node.target, "namespace", "") == "onnx_symbolic"
        schema = getattr(node.target, "_schema", None)
        if not known or (schema is not None and schema.is_mutable):
            raise ValueError(f"expected operators that torch's exporter translates as they are, got {node.target}")


class _Decomposed(ExportedProgram):
    """A program that a further trace would not change."""

    def run_decompositions(self, *arguments: Any, **options: Any) -> ExportedProgram:
        return self


def _program(traced: fx.GraphModule, values: tuple[Tensor, ...]) -> ExportedProgram:
    """The graph as torch.export would give it, its tensors made inputs as there."""
    graph: Any = traced.graph
    placeholders = graph.find_nodes(op="placeholder")
    inputs = [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in placeholders]
    last = placeholders[-1]
    constants = {}
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        constants[name] = getattr(traced, name)
        with graph.inserting_after(last):
            lifted = last = graph.placeholder(f"lifted_{node.name}")
        lifted.meta["val"] = placeholders[0].meta["val"].fake_mode.from_tensor(constants[name], static_shapes=True)
        node.replace_all_uses_with(lifted)
        graph.erase_node(node)
        inputs.append(InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(lifted.name), name))
    traced.recompile()
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in graph.output_node().args[0]
    ]
    return _Decomposed(
        root=traced,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={},
        range_constraints={},
        module_call_graph=[ModuleCallEntry(fqn="", signature=None)],
        example_inputs=(values, {}),
        constants=constants,
    )


# ---- The model ----------------------------------------------------------------------------------


def _clean(model: onnx.ModelProto) -> None:
    """Traces of the exporting machine go."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    model.doc_string = model.graph.doc_string = ""
    for item in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"


def _name(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Our names at the ends of a model; before every other an underscore, with which no name of a recipe begins.

    The exporter calls values "mul_4" or "expand", which may be somebody's term.
    """
    ends = {
        item.name: name
        for items, names in ((model.graph.input, inputs), (model.graph.output, outputs))
        for item, name in zip(items, names, strict=True)
    }
    if len(ends) != len(inputs) + len(outputs):
        raise RuntimeError("expected the exporter to give every output a value of its own, got one twice; report this")
    for node in model.graph.node:
        for field in (node.input, node.output):
            names = [ends.get(name, f"_{name}") if name else "" for name in field]
            del field[:]
            field.extend(names)
    for item in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        item.name = ends.get(item.name, f"_{item.name}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's notes about itself off the user's screen; errors still come."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
