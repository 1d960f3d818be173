"""One ONNX file that scores: teacher, student and loss together; the models' inputs in, one score per sample out.

Nothing of the models is converted. Their names get a prefix, their weights stay the bytes that they are, and the loss, which is
small, is written at their version of the operators.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    external_data_helper,
    numpy_helper,
)

from pykd import files, integrity
from pykd._version import __version__

ROLES = ("teacher", "student")
METADATA = "pykd.scorer"
FORMAT_VERSION = 1
LEAST_OPSET = 13
INLINE_LIMIT = 1_800_000_000  # bytes in one file; protobuf ends at 2 GiB
PAGE = 4096
CHUNK = 1 << 24
REDUCTIONS = frozenset(
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)


def merge(
    teacher: str | Path,
    student: str | Path,
    loss: str | Path,
    out: str | Path,
    *,
    connect: Mapping[str, str] | None = None,
    share: Mapping[str, str] | None = None,
    separate: Iterable[str] = (),
    keep: Iterable[str] = (),
) -> Path:
    """Writes a file that takes what the models take and returns the loss per sample.

    Args:
        teacher: an ONNX model.
        student: an ONNX model of the same operator version (opset).
        loss: a folder that :func:`pykd.export` wrote with ``kind="score"`` or ``per_sample=True``, or its ONNX file.
        out: where to write. Weights that lie outside of the models' files, or are too large for one file, go to
            ``<out>.<digits>.data`` beside it, the digits being the start of their SHA-256.
        connect: ``"student:<output>"`` or ``"teacher:<output>"`` → the input of the loss that it is; not needed where a
            model has one output and the loss one input of its name (``student_…``, ``teacher_…``).
        share: inputs of other names that are one: ``"student:<input>"`` → ``"teacher:<input>"``.
        separate: names that both models have and that are two inputs, ``teacher/<name>`` and ``student/<name>``. Without a word
            they are one.
        keep: outputs of the models, ``"student:<output>"``, to return as well.

    Returns:
        ``out``. Inputs of the file: those of the models by their names, inputs of the loss that no model gives (labels, weights), and
        the loss's parameters with their defaults. Outputs: ``loss_per_sample`` and one vector per term.

    Raises:
        ValueError: where the parts do not fit together; the message says what to write.
    """
    parts = read(teacher, student, loss)
    _check_versions(parts)
    _check_out(Path(out), parts)
    connected = connections(parts, dict(connect or {}))
    inputs = inputs_of_models(parts, dict(share or {}), set(separate))
    model = _assemble(parts, connected, inputs, list(keep))
    _write(model, Path(out))
    return Path(out)


@dataclass
class _Model:
    """One of the two models, without the weights that lie elsewhere."""

    role: str
    path: Path

    def __post_init__(self) -> None:
        self.proto = load(self.path, f"the {self.role}")
        given = {tensor.name for tensor in self.graph.initializer}
        # Of old files, which list their weights among the inputs.
        self.inputs = {value.name: value for value in self.graph.input if value.name not in given}
        self.outputs = {value.name: value for value in self.graph.output}

    @property
    def graph(self) -> GraphProto:
        return self.proto.graph


@dataclass
class Parts:
    models: dict[str, _Model]
    loss: ModelProto
    loss_file: Path

    def __post_init__(self) -> None:
        self.described = json.loads(_metadata(self.loss, "pykd") or "{}")
        if not self.described:
            raise ValueError(
                "expected the loss to be a file that pykd.export wrote, got one without its metadata; pass the folder of an export"
            )
        numbers = {parameter["name"] for parameter in self.described.get("parameters", ())}
        self.loss_inputs = {value.name: value for value in self.loss.graph.input if value.name not in numbers}
        self.parameters = [value.name for value in self.loss.graph.input if value.name in numbers]
        self.scores = [value for value in self.loss.graph.output if value.type.tensor_type.shape.dim]
        if not self.scores:
            raise ValueError(
                "expected a loss with a value per sample, got one without; export it with kind='score' "
                "(a loss that compares the samples of a batch with each other has none, and cannot score single ones)"
            )


# ---- What is given -------------------------------------------------------------------------------


def load(path: Path, what: str) -> ModelProto:
    """A model without the weights that lie beside it."""
    if not path.is_file():
        raise FileNotFoundError(f"expected {what} in {path}, got no such file; pass the path of an ONNX model")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own; whatever it is, the file is none
        raise ValueError(
            f"expected {what} to be an ONNX model, got {path}, which cannot be read ({error}); pass the path of one"
        ) from error


def read(teacher: str | Path, student: str | Path, loss: str | Path) -> Parts:
    """The three files, without weights that lie elsewhere."""
    models = {role: _Model(role, Path(path)) for role, path in zip(ROLES, (teacher, student), strict=True)}
    return Parts(models, load(loss_path(Path(loss)), "the loss"), loss_path(Path(loss)))


def loss_path(loss: Path) -> Path:
    """The file of a loss that may be given as its folder."""
    scores = loss / "score.onnx"
    return scores if scores.exists() else loss / "loss.onnx" if loss.is_dir() else loss


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def is_scorer(model: ModelProto) -> bool:
    """Whether :func:`merge` wrote it."""
    return bool(_metadata(model, METADATA))


def described(scorer: ModelProto) -> dict[str, Any]:
    """What a merged file says of itself."""
    found: dict[str, Any] = files.parse_json(_metadata(scorer, METADATA).encode(), "what the scorer says of itself")
    return found


def check_file(scorer: str | Path) -> list[Path]:
    """Compares a merged file with its checksum, and the weights beside it with the start of their SHA-256 in their names.

    Whoever loads it compares their lengths alone, since they may be many gigabytes.

    Returns:
        The files of weights, all of them as they were written.

    Raises:
        ValueError: it is no merged file, or something of it is not as :func:`merge` wrote it.
    """
    path = Path(scorer)
    proto = load(path, "the scorer")
    if not is_scorer(proto):
        raise ValueError(f"expected a file that `pykd merge` wrote, got {path}; pass one, or the folder of an export")
    integrity.check(path.read_bytes(), str(path))
    found = []
    for name in sorted(weight_locations(proto.graph)):
        file = path.parent / name
        digits = re.fullmatch(r"[^/]*\.([0-9a-f]{16})\.data", name, re.DOTALL)
        if digits is None or not file.is_file():
            raise ValueError(
                f"expected weights in a file beside {path} that has the start of its SHA-256 in its name, got {name!r}; merge again"
            )
        if (got := _digest(file)[:16]) != digits[1]:
            raise ValueError(
                f"expected weights whose SHA-256 begins with {digits[1]} in {file}, got {got}; copy them again"
            )
        found.append(file)
    return found


def _shown(name: str) -> str:
    """The name of a file, which may hold any bytes, as text that JSON has."""
    return name.encode(errors="backslashreplace").decode()


def _metadata(model: ModelProto, key: str) -> str:
    return next((entry.value for entry in model.metadata_props if entry.key == key), "")


def _versions(model: ModelProto | FunctionProto) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}


def _check_versions(parts: Parts) -> None:
    teacher, student = (_versions(parts.models[role].proto) for role in ROLES)
    for domain in sorted(teacher.keys() & student.keys()):
        if teacher[domain] != student[domain]:
            name = domain or "ai.onnx"
            raise ValueError(
                f"expected models of one version of the operators {name!r}, got {teacher[domain]} of the teacher and {student[domain]} of the "
                "student; export them at one opset, or score with three sessions (pykd.scoring.sessions.Sessions), which needs no merging"
            )
    wanted = (teacher | student).get("", 0)
    if wanted and wanted < LEAST_OPSET:
        raise ValueError(
            f"expected models at opset {LEAST_OPSET} or later, got {wanted}; export them again, or score with three sessions "
            "(pykd.scoring.sessions.Sessions)"
        )


# ---- What goes where -----------------------------------------------------------------------------


def _place(text: str, parts: Parts, kind: str) -> tuple[str, str]:
    """Role and name out of ``"student:logits"``."""
    role, _, name = text.partition(":")
    known = {r: list(getattr(model, f"{kind}s")) for r, model in parts.models.items()}
    if role not in ROLES or name not in known[role]:
        every = ", ".join(f"{r}:{n}" for r in ROLES for n in known[r])
        raise ValueError(f"expected an {kind} of a model ({every}), got {text!r}; pass one of these")
    return role, name


def connections(parts: Parts, wanted: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Input of the loss → role and output of the model that gives it."""
    found: dict[str, tuple[str, str]] = {}
    for source, name in wanted.items():
        place = _place(source, parts, "output")
        if name not in parts.loss_inputs:
            raise ValueError(
                f"expected an input of the loss ({', '.join(parts.loss_inputs)}), got {name!r} for {source}; pass one of these"
            )
        if name in found:
            raise ValueError(
                f"expected one output for {name}, got {':'.join(found[name])} and {source}; connect one of them"
            )
        found[name] = place
    for role in ROLES:
        outputs = list(parts.models[role].outputs)
        used = {output for r, output in found.values() if r == role}
        ours = [name for name in parts.loss_inputs if name.startswith(f"{role}_")]
        free = [name for name in ours if name not in found]
        if len(ours) == len(free) == 1 and len(outputs) == 1 and not used:
            found[free[0]] = (role, outputs[0])
        elif free:
            choices = " or ".join(f"--connect {role}:{output}={free[0]}" for output in outputs)
            raise ValueError(
                f"expected every tensor of the {role} to come from its model, got nothing for {', '.join(free)}; write {choices}"
            )
        elif not ours:
            raise ValueError(
                f"expected a loss that takes something of the {role}, got the inputs {', '.join(parts.loss_inputs)}; pass another loss"
            )
    _check_shapes(parts, found)
    return {name: found[name] for name in parts.loss_inputs if name in found}


def _shape(value: Any) -> list[int | str] | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim]


def _check_shapes(parts: Parts, connected: Mapping[str, tuple[str, str]]) -> dict[str, int]:
    """The lengths that the models fix, by the axes of the loss."""
    lengths: dict[str, tuple[int, str]] = {}
    for name, (role, output) in connected.items():
        value, wanted = parts.models[role].outputs[output], parts.loss_inputs[name]
        _check_types(f"{role}:{output}", value, name, wanted)
        shape, axes = _shape(value), _shape(wanted)
        if shape is None or axes is None:
            continue
        if len(shape) != len(axes):
            raise ValueError(
                f"expected {role}:{output} to have the axes {axes} of {name}, got the shape {shape}; connect another output, or export "
                "the loss with other layouts"
            )
        for axis, length in zip(axes, shape, strict=True):
            if isinstance(axis, str) and isinstance(length, int):
                known = lengths.setdefault(axis, (length, f"{role}:{output}"))
                if known[0] != length:
                    raise ValueError(
                        f"expected one length of the axis {axis!r}, got {known[0]} of {known[1]} and {length} of {role}:{output}; "
                        "cut one of them to what the other has"
                    )
    return {axis: length for axis, (length, _) in lengths.items() if length > 0}


_WIDENED = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _check_types(place: str, value: Any, name: str, wanted: Any) -> None:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        got = "no type" if kind is None else kind.removesuffix("_type").replace("_", " ")
        raise ValueError(f"expected {place} to be a tensor, as {name} is, got {got}; connect another output")
    got, expected = value.type.tensor_type.elem_type, wanted.type.tensor_type.elem_type
    if got != expected and not (got in _WIDENED and expected == TensorProto.FLOAT):
        raise ValueError(
            f"expected {place} to hold {_type(expected)} as {name} does, got {_type(got)}; export the loss with dtype={_type(got)!r}"
        )


def is_widened(parts: Parts, name: str, place: tuple[str, str]) -> bool:
    """Whether an output of a model is of another type than the input of the loss that it becomes."""
    role, output = place
    types = parts.models[role].outputs[output].type.tensor_type, parts.loss_inputs[name].type.tensor_type
    return bool(types[0].elem_type != types[1].elem_type)


def _type(number: int) -> str:
    name = str(TensorProto.DataType.Name(number)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def inputs_of_models(parts: Parts, share: dict[str, str], separate: set[str]) -> dict[tuple[str, str], str]:
    """Role and input of a model → the name it is fed by."""
    teacher, student = (parts.models[role] for role in ROLES)
    names = {(model.role, name): name for model in (teacher, student) for name in model.inputs}
    both = teacher.inputs.keys() & student.inputs.keys()
    if unknown := separate - both:
        raise ValueError(
            f"expected the names of inputs that both models have ({', '.join(sorted(both)) or 'none'}), got {', '.join(sorted(unknown))}; "
            "correct the names"
        )
    for name in separate:
        for role in ROLES:
            names[role, name] = f"{role}/{name}"
    for first, second in share.items():
        places = {place[0]: place for place in (_place(first, parts, "input"), _place(second, parts, "input"))}
        if len(places) < 2:
            raise ValueError(
                f"expected an input of the student and one of the teacher, got {first} and {second}; correct one"
            )
        names[places["student"]] = names[places["teacher"]]
    for role, name in names:
        fed = names[role, name]
        twins = [(r, n) for (r, n), other in names.items() if other == fed and r != role]
        for r, n in twins:
            first, second = parts.models[role].inputs[name], parts.models[r].inputs[n]
            if not _alike(first, second):
                raise ValueError(
                    f"expected {role}:{name} and {r}:{n} to be one input, got {_described(first)} and {_described(second)}; write "
                    f"--separate {name} to feed them apart"
                )
        if fed in {value.name for value in (*parts.loss.graph.input, *parts.loss.graph.output)}:
            raise ValueError(
                f"expected names of inputs that the loss does not have, got {fed!r} in the {role} and in the loss; rename that of the model"
            )
    return names


def _alike(first: Any, second: Any) -> bool:
    """Whether two inputs may be one: same type, and shapes that do not contradict each other."""
    if first.type.tensor_type.elem_type != second.type.tensor_type.elem_type:
        return False
    shapes = _shape(first), _shape(second)
    if None in shapes:
        return True
    one, other = shapes
    assert one is not None and other is not None
    return len(one) == len(other) and all(
        a == b or isinstance(a, str) or isinstance(b, str) for a, b in zip(one, other, strict=True)
    )


def _described(value: Any) -> str:
    return f"{_type(value.type.tensor_type.elem_type)} {_shape(value)}"


# ---- The merged graph ----------------------------------------------------------------------------


def _assemble(
    parts: Parts,
    connected: Mapping[str, tuple[str, str]],
    inputs: Mapping[tuple[str, str], str],
    keep: Sequence[str],
) -> ModelProto:
    merged = ModelProto()
    merged.producer_name, merged.producer_version = "pykd", __version__
    merged.ir_version = max(model.ir_version for model in (*(m.proto for m in parts.models.values()), parts.loss))
    merged.graph.name = "scorer"
    versions: dict[str, int] = {}
    functions: dict[tuple[str, str, str], FunctionProto] = {}
    kept = [_place(place, parts, "output") for place in keep]
    renamed_outputs: dict[tuple[str, str], str] = {}
    for role in ROLES:
        model = parts.models[role]
        versions |= _versions(model.proto)
        own = ModelProto()
        own.CopyFrom(model.proto)
        _rename_functions(own, functions, role)

        def name_of(name: str, role: str = role, model: _Model = model) -> str:
            return inputs[role, name] if name in model.inputs else f"{role}/{name}"

        _point_outside(own.graph, model.path)
        _rename(own.graph, name_of)
        merged.graph.node.extend(own.graph.node)
        merged.graph.initializer.extend(own.graph.initializer)
        merged.graph.sparse_initializer.extend(own.graph.sparse_initializer)
        merged.graph.value_info.extend(own.graph.value_info)
        merged.graph.quantization_annotation.extend(own.graph.quantization_annotation)
        fed = {value.name for value in merged.graph.input}
        weights = {tensor.name for tensor in own.graph.initializer}
        merged.graph.input.extend(v for v in own.graph.input if v.name not in fed and v.name not in weights)
        for before, after in zip(model.graph.output, own.graph.output, strict=True):
            renamed_outputs[role, before.name] = after.name
            if (role, before.name) in kept:
                merged.graph.output.append(after)
    # An input that a model returns as it is keeps its name, and is fed under it.
    loss = _at_opset(parts, versions.get("", _versions(parts.loss)[""]))
    versions |= {domain: version for domain, version in _versions(loss).items() if domain not in versions}
    given = {name: (renamed_outputs[place], is_widened(parts, name, place)) for name, place in connected.items()}
    _add_loss(merged, loss, parts, given, functions)
    _check_names(merged.graph)
    merged.functions.extend(functions.values())
    merged.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in versions.items())
    described = {
        "format_version": FORMAT_VERSION,
        "loss": parts.described,
        "connections": {name: ":".join(place) for name, place in connected.items()},
        "lengths": _check_shapes(parts, connected),
        "models": {role: {"file": _shown(m.path.name), "sha256": _digest(m.path)} for role, m in parts.models.items()},
        "outputs": [value.name for value in merged.graph.output],
        "pykd": __version__,
    }
    merged.metadata_props.add(key=METADATA, value=json.dumps(described, sort_keys=True))
    return merged


def _check_names(graph: GraphProto) -> None:
    """A prefix may make a name that an input of a model has already."""
    weights = [tensor.name for tensor in graph.initializer] + [
        tensor.values.name for tensor in graph.sparse_initializer
    ]
    inputs = [value.name for value in graph.input if value.name not in weights]
    counts = Counter([*inputs, *weights, *(name for node in graph.node for name in node.output if name)])
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"expected models without inputs named as their tensors are in the merged file, got {', '.join(twice[:5])}; rename the input, or "
            "score with three sessions (pykd.scoring.sessions.Sessions)"
        )


def _add_loss(
    merged: ModelProto,
    loss: ModelProto,
    parts: Parts,
    given: Mapping[str, tuple[str, bool]],
    functions: dict[tuple[str, str, str], FunctionProto],
) -> None:
    """The part of the loss that its values per sample need; its functions keep their names, by which kernels are found."""
    own = {value.name for value in (*loss.graph.input, *loss.graph.output)}
    source = {name: f"loss/{name}" if widened else place for name, (place, widened) in given.items()}
    for name, (place, widened) in given.items():
        if widened:
            wanted = parts.loss_inputs[name].type.tensor_type.elem_type
            cast = onnx.helper.make_node("Cast", [place], [source[name]], name=f"loss/{name}_widened", to=wanted)
            merged.graph.node.append(cast)

    def name_of(name: str) -> str:
        return source.get(name) or (name if name in own else f"loss/{name}")

    part = judging(scores_alone(loss, [value.name for value in parts.scores]), parts)
    _rename(part.graph, name_of)
    merged.graph.node.extend(part.graph.node)
    merged.graph.initializer.extend(part.graph.initializer)
    merged.graph.input.extend(value for value in part.graph.input if value.name not in source.values())
    merged.graph.output.extend(part.graph.output)
    for function in part.functions:
        functions[function.domain, function.name, function.overload] = function


def scores_alone(loss: ModelProto, scores: Sequence[str]) -> ModelProto:
    """A loss that returns these outputs alone: what they do not need is left out, and so is what the file says of itself."""
    part = ModelProto()
    part.CopyFrom(loss)
    del part.metadata_props[:]
    graph, nodes = part.graph, _needed(loss.graph.node, scores)
    read = {name for node in nodes for name in _reads(node)} | set(scores)
    used = {(node.domain, node.op_type) for node in nodes}
    for field, kept in (
        (graph.node, nodes),
        (graph.initializer, [tensor for tensor in loss.graph.initializer if tensor.name in read]),
        (graph.input, [value for value in loss.graph.input if value.name in read]),
        (graph.output, [value for value in loss.graph.output if value.name in scores]),
        (part.functions, [function for function in loss.functions if (function.domain, function.name) in used]),
    ):
        del field[:]
        field.extend(kept)
    return part


def judging(part: ModelProto, parts: Parts) -> ModelProto:
    """A loss whose scores are NaN for the rows that `pykd score` calls infinite: +∞ in a tensor, or nothing but −∞.

    A loss may have a finite score of such a row, as a hinge has, and whoever gets the score alone could not tell.
    """
    judged = ModelProto()
    judged.CopyFrom(part)
    graph, opset = judged.graph, _versions(part)[""]
    taken = {value.name for value in graph.input}
    of_rows = [
        value["name"]
        for value in parts.described["inputs"]
        if value["name"] in taken and "float" in value["dtype"] and value["axes"][:1] == ["batch"]
    ]
    if not of_rows:
        return judged

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        graph.node.append(onnx.helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    if opset >= 18:
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "judged/axis"))
    infinite = []
    for name in of_rows:
        # As float32, where an operator has no half: whatever is infinite stays so.
        rows = add("Cast", [name], f"judged/{name}/wide", to=TensorProto.FLOAT) if _is_half(parts, name) else name
        if len(_shape(parts.loss_inputs[name]) or ()) > 1:
            flat = add("Flatten", [rows], f"judged/{name}/flat", axis=1)
            axes: dict[str, Any] = {"keepdims": 0} | ({} if opset >= 18 else {"axes": [1]})
            places = [flat, "judged/axis"] if opset >= 18 else [flat]
            rows = add("ReduceMax", places, f"judged/{name}/largest", **axes)
        infinite.append(add("IsInf", [rows], f"judged/{name}/infinite"))
    bad = infinite[0]
    for place, other in enumerate(infinite[1:]):
        bad = add("Or", [bad, other], f"judged/bad/{place}")
    finite = {value.name: f"judged/{value.name}" for value in graph.output}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [finite.get(name, name) for name in names]
    for value in graph.output:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        graph.initializer.append(numpy_helper.from_array(np.array(np.nan, dtype), f"{finite[value.name]}/nan"))
        add("Where", [bad, f"{finite[value.name]}/nan", finite[value.name]], value.name)
    return judged


def _is_half(parts: Parts, name: str) -> bool:
    return parts.loss_inputs[name].type.tensor_type.elem_type in _WIDENED


def _rename(graph: GraphProto, name_of: Callable[[str], str]) -> None:
    """Every name of a graph and the graphs inside it."""
    for node in graph.node:
        node.name = name_of(node.name) if node.name else ""
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = name_of(name) if name else ""
        for attribute in node.attribute:
            for inner in _graphs(attribute):
                _rename(inner, name_of)
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        for value in values:
            value.name = name_of(value.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = name_of(sparse.values.name)
    for annotation in graph.quantization_annotation:
        annotation.tensor_name = name_of(annotation.tensor_name)
        for entry in annotation.quant_parameter_tensor_names:
            entry.value = name_of(entry.value)


def _graphs(attribute: AttributeProto) -> Iterator[GraphProto]:
    if attribute.type == AttributeProto.GRAPH:
        yield attribute.g
    yield from attribute.graphs


def _reads(node: NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for graph in _graphs(attribute):
            for inner in graph.node:
                yield from _reads(inner)


def _needed(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """The nodes, in order, on which these outputs depend."""
    wanted = set(outputs)
    found = []
    for node in reversed(nodes):
        if wanted & {*node.output} - {""}:  # "" is an input or output that is left out
            found.append(node)
            wanted |= set(_reads(node))
    return found[::-1]


def _rename_functions(model: ModelProto, known: dict[tuple[str, str, str], FunctionProto], role: str) -> None:
    """Adds a model's functions to the known ones; one that is another under the same name gets the role in front, and so do those
    that call it."""
    own = {(function.domain, function.name, function.overload): function for function in model.functions}
    both = own.keys() & known.keys()
    differ = {
        key
        for key in both
        if own[key].SerializeToString(deterministic=True) != known[key].SerializeToString(deterministic=True)
    }
    while callers := {key for key in both - differ if differ & _calls(own[key].node)}:
        differ |= callers
    renamed = {key: f"{role}_{key[1]}" for key in differ}
    if taken := {name for (domain, _, overload), name in renamed.items() if (domain, name, overload) in own | known}:
        raise ValueError(
            f"expected no functions of the names {', '.join(sorted(taken))} in the models, got some; rename them, or score with three "
            "sessions (pykd.scoring.sessions.Sessions)"
        )

    def call_by_new_name(nodes: Iterable[NodeProto]) -> None:
        for node in nodes:
            node.op_type = renamed.get((node.domain, node.op_type, node.overload), node.op_type)
            for attribute in node.attribute:
                for graph in _graphs(attribute):
                    call_by_new_name(graph.node)

    call_by_new_name(model.graph.node)
    for key, function in own.items():
        call_by_new_name(function.node)
        function.name = renamed.get(key, function.name)
        known[function.domain, function.name, function.overload] = function


def _calls(nodes: Iterable[NodeProto]) -> set[tuple[str, str, str]]:
    """What these nodes and those of the graphs inside them call."""
    found = set()
    for node in nodes:
        found.add((node.domain, node.op_type, node.overload))
        for attribute in node.attribute:
            for graph in _graphs(attribute):
                found |= _calls(graph.node)
    return found


# ---- The loss at another opset -------------------------------------------------------------------


def _at_opset(parts: Parts, wanted: int) -> ModelProto:
    """The loss with the operators of another version, which compute the same; a ValueError where one is not the same."""
    loss = parts.loss
    had = _versions(loss)[""]
    if had == wanted:
        return loss
    changed = ModelProto()
    changed.CopyFrom(loss)
    for holder in (changed, *changed.functions):
        for entry in holder.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = wanted
    constants = {tensor.name: tensor for tensor in changed.graph.initializer}
    for nodes in (changed.graph.node, *(function.node for function in changed.functions)):
        _axes_as(nodes, wanted, constants)
    try:
        onnx.checker.check_model(changed, full_check=True)
        _check_numbers(loss, changed, parts)
    except Exception as error:  # of several kinds
        raise ValueError(
            f"expected a loss that can be written at opset {wanted} of the models, got one that cannot ({error}); export the models at opset "
            f"{had}, or score with three sessions (pykd.scoring.sessions.Sessions)"
        ) from error
    return changed


def _check_numbers(loss: ModelProto, changed: ModelProto, parts: Parts) -> None:
    """Runs the loss as it was and as it is to be; a ValueError where they differ by a bit."""
    import onnxruntime

    random = np.random.default_rng(0)
    lengths: dict[str, int] = {}
    tensors = {}
    for described in parts.described["inputs"]:
        shape = [lengths.setdefault(axis, 3 + len(lengths)) for axis in described["axes"]]
        dtype = described["dtype"]
        if dtype == "bfloat16":
            raise ValueError(
                f"expected a loss of another type than bfloat16, which NumPy has not, to write it at another opset than {_versions(loss)['']}; "
                "export it as float32"
            )
        if dtype == "int64":
            tensors[described["name"]] = np.zeros(shape, np.int64)
        else:
            tensors[described["name"]] = random.standard_normal(shape).astype(dtype)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    scores = [value.name for value in parts.scores]
    found = [
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
            scores, tensors
        )
        for model in (loss, changed)
    ]
    for name, before, after in zip(scores, *found, strict=True):
        if not np.array_equal(before, after, equal_nan=True):
            raise ValueError(f"expected the same {name} at another opset, got other numbers")


def _axes_as(nodes: Sequence[NodeProto], wanted: int, constants: Mapping[str, TensorProto]) -> None:
    """Axes of reductions as the attribute that they were before opset 18."""
    if wanted >= 18:
        return
    known = dict(constants)
    for node in nodes:
        if node.op_type == "Constant":
            known[node.output[0]] = node.attribute[0].t
        if node.op_type not in REDUCTIONS:
            continue
        kept = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
        if len(node.input) > 1 and node.input[1]:
            if node.input[1] not in known:
                raise ValueError(
                    f"expected reductions over fixed axes in a loss that is written at opset {wanted}, got others; export the models at opset 18"
                )
            axes = numpy_helper.to_array(known[node.input[1]]).tolist()
            kept.append(onnx.helper.make_attribute("axes", axes))
        del node.attribute[:]
        node.attribute.extend(kept)
        del node.input[1:]


# ---- Files ---------------------------------------------------------------------------------------


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
            for inner in _graphs(attribute):
                yield from _tensors(inner)


def _check_out(out: Path, parts: Parts) -> None:
    """Nothing that is read is written over: neither the parts, nor the files of their weights."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"expected a folder for the scorer, got none at {out.parent}; make it")
    files.check_place(out)
    read = {parts.loss_file.resolve()}
    for model in parts.models.values():
        read |= {model.path.resolve(), *_weight_files(model.graph, model.path.parent)}
    for path in (out, *_own_weights(out)):
        if path.resolve() in read:
            raise ValueError(
                f"expected another file than the models, the loss and their weights for the scorer, got {out}, which replaces {path}; pass "
                "another name"
            )


def weight_locations(graph: GraphProto) -> set[str]:
    """The files of weights that lie beside a model, as it names them."""
    return {
        entry.value
        for tensor in _tensors(graph)
        if external_data_helper.uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _weight_files(graph: GraphProto, folder: Path) -> set[Path]:
    """Where the weights lie that lie beside a model."""
    return {(folder / location).resolve() for location in weight_locations(graph)}


def _own_weights(out: Path) -> set[Path]:
    """The files beside a scorer with its weights, which are of no use without it."""
    try:
        old = onnx.load(str(out), load_external_data=False)
    except Exception:  # of protobuf, or none there: no scorer
        return set()
    if not is_scorer(old):
        return set()
    ours = re.compile(re.escape(out.name) + r"(\.[0-9a-f]{16})?\.data")
    folder = out.parent.resolve()
    return {path for path in _weight_files(old.graph, folder) if path.parent == folder and ours.fullmatch(path.name)}


def _write(model: ModelProto, out: Path) -> None:
    """The file, and the one beside it with the weights that do not lie in it.

    That one is named by its contents, so that it never takes the place of other weights: until the scorer itself is replaced,
    in one step, the old scorer and its weights lie there, and then the new ones.
    """
    before = _own_weights(out)
    data: Path | None = None
    try:
        with files.replacing(out, alone=True) as file:
            data = _move_weights(model, out)
            serialised = model.SerializeToString(deterministic=True)
            file.write(serialised)
            file.write(integrity.onnx_seal(serialised))
    except BaseException:
        if data is not None and data not in before:
            data.unlink(missing_ok=True)
        raise
    for path in before - {data}:
        path.unlink(missing_ok=True)


def _move_weights(model: ModelProto, out: Path) -> Path | None:
    """Weights outside of the models' files, and large ones where one file would not hold them, to a file beside ``out``; None: there are none."""
    large = model.ByteSize() > INLINE_LIMIT
    moved = [
        tensor
        for tensor in _tensors(model.graph)
        if external_data_helper.uses_external_data(tensor) or (large and len(tensor.raw_data) >= PAGE)
    ]
    if not moved:
        return None
    if "\\" in out.name or not out.name.isprintable():
        raise ValueError(
            f"expected a printable name without \\ for a scorer with weights beside it, got {out.name!r}; pass another"
        )
    beside = out.with_name(out.name + ".data.writing")
    with files.writing(beside, alone=True) as file:
        digest, places = _write_weights(moved, file)
    data = out.parent.resolve() / f"{out.name}.{digest[:16]}.data"
    try:
        os.replace(beside, data)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    for tensor, place in zip(moved, places, strict=True):
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", data.name), *zip(("offset", "length"), place, strict=True)):
            tensor.external_data.add(key=key, value=str(value))
    return data


def _write_weights(tensors: Iterable[TensorProto], file: IO[bytes]) -> tuple[str, list[tuple[int, int]]]:
    """SHA-256 of what was written, and offset and length of each."""
    digest = hashlib.sha256()
    places = []
    position = 0

    def write(data: bytes) -> None:
        nonlocal position
        digest.update(data)
        file.write(data)
        position += len(data)

    for tensor in tensors:
        write(b"\0" * (-position % PAGE))
        start = position
        for chunk in _outside(tensor) if external_data_helper.uses_external_data(tensor) else (tensor.raw_data,):
            write(chunk)
        places.append((start, position - start))
    return digest.hexdigest(), places


def _outside(tensor: TensorProto) -> Iterator[bytes]:
    """The bytes of a weight that lies beside its model."""
    info = external_data_helper.ExternalDataInfo(tensor)
    start = info.offset or 0
    with open(info.location, "rb") as file:
        file.seek(start)
        left = info.length if info.length is not None else os.path.getsize(info.location) - start
        while left > 0:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise ValueError(
                    f"expected {left} bytes more of the weight {tensor.name} in {info.location}, got the end of the file; copy it again"
                )
            yield chunk
            left -= len(chunk)


def _point_outside(graph: GraphProto, model: Path) -> None:
    """Weights that lie beside a model get the whole path of their file.

    A cache may have links in place of the model and its weights, to files that lie beside each other.
    """
    folder = model.parent
    allowed = folder.resolve(), model.resolve().parent
    for tensor in _tensors(graph):
        if external_data_helper.uses_external_data(tensor):
            (location,) = [entry for entry in tensor.external_data if entry.key == "location"]
            path = (folder / location.value).resolve()
            if not any(path.is_relative_to(each) for each in allowed) or not path.is_file():
                raise ValueError(
                    f"expected the weight {tensor.name} in a file beside its model, got {location.value!r} in {folder}; put the file there"
                )
            try:
                location.value = str(path)
            except ValueError as error:
                raise ValueError(
                    f"expected the weight {tensor.name} at a path of UTF-8, got {str(path)!r}; move the files"
                ) from error
