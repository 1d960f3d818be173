"""A model repository of NVIDIA's Triton Inference Server: the scorer as one model, or as an ensemble of teacher, student and loss.

Its files are ONNX and plain text; Triton's backend for ONNX Runtime opens them, and pykd's operators, as a session of one's own would.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, numpy_helper

from pykd import config, files, integrity
from pykd._version import __version__
from pykd.scoring import merge as merging
from pykd.scoring.merge import ROLES
from pykd.scoring.row_scores import number_of

# Triton's names of types, by ONNX Runtime's: what its backend takes (onnxruntime_utils.cc).
TYPES = {
    "bool": "BOOL", "string": "STRING", "float16": "FP16", "float": "FP32", "double": "FP64", "bfloat16": "BF16",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def write_repository(
    out: str | Path,
    scorer: str | Path | None = None,
    *,
    teacher: str | Path | None = None,
    student: str | Path | None = None,
    loss: str | Path | None = None,
    connect: Mapping[str, str] | None = None,
    share: Mapping[str, str] | None = None,
    separate: Iterable[str] = (),
    name: str = "scorer",
    max_batch: int = 64,
    served_at: str = "/models",
    operators: str | None = None,
    kernels: bool = True,
    fixed: Mapping[str, float] | None = None,
) -> Path:
    """Writes a folder that ``tritonserver --model-repository`` serves.

    The server may put the rows of several requests into one batch: each row has scores of its own, and depends on no other.

    Args:
        out: the folder; it must not be there yet, or be empty.
        scorer: a file of ``pykd merge``, which is served as one model; or, in its place, the next three, which are served as an
            ensemble of three models. Those may have different operator versions and devices.
        teacher: an ONNX model.
        student: an ONNX model.
        loss: a folder that :func:`pykd.export` wrote with ``kind="score"`` or ``per_sample=True``, or its ONNX file.
        connect: of the three: see :func:`pykd.scoring.merge.merge`, as for ``share`` and ``separate``.
        share: inputs of other names that are one.
        separate: inputs of one name that are two.
        name: of the model; those of an ensemble are ``<name>_teacher``, ``<name>_student``, ``<name>_loss`` and ``<name>``.
        max_batch: the most rows of a batch.
        served_at: where the server will see the folder: an absolute path, since the system's loader opens the operators by it.
        operators: where libpykd lies on the server, as an absolute path. None: it is copied into the folder.
        kernels: whether the loss runs pykd's kernels, which needs libpykd; without, it runs the formula.
        fixed: numbers of the loss to write into the file, such as ``{"temperature": 2.0}``. The others keep their defaults: a request
            cannot set any.

    Returns:
        ``out``. It holds a ``README.md`` that says how to start the server, and what a request holds.

    Raises:
        ValueError: where Triton would not load the models, or not batch them; the message says why.
    """
    out = Path(out)
    _check(out, name, max_batch, served_at, operators)
    three = (teacher, student, loss)
    parts: merging.Parts | None = None
    if scorer is None and teacher is not None and student is not None and loss is not None:
        parts = merging.read(teacher, student, loss)
    elif scorer is None or three != (None, None, None):
        raise ValueError(
            "expected a scorer, or a teacher, a student and a loss, got neither the one nor the three; pass scorer=, or teacher=, "
            "student= and loss="
        )
    target = Path(os.path.realpath(out)) if out.is_symlink() else out  # a link goes on leading where it leads
    beside = files.beside(target)
    try:
        beside.mkdir()
    except FileExistsError as error:
        raise files.already_there(beside) from error
    writer = _Writer(beside, max_batch, served_at, operators, kernels)
    try:
        if parts is None:
            assert scorer is not None
            _write_one(writer, Path(scorer), name, fixed or {})
        else:
            _write_ensemble(writer, parts, dict(connect or {}), dict(share or {}), set(separate), name, fixed or {})
        os.replace(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return out


def _check(out: Path, name: str, max_batch: int, served_at: str, operators: str | None) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(
            f"expected no folder at {out}, or an empty one, got one with files; remove it, or pass another"
        )
    if not out.resolve().parent.is_dir():
        raise FileNotFoundError(f"expected a folder for {out}, got none at {out.parent}; make it")
    if not NAME.fullmatch(name):
        raise ValueError(f"expected a name of letters, digits, '_', '-' and '.', got {name!r}; pass another")
    if max_batch < 1:
        raise ValueError(f"expected batches of at least one row, got max_batch {max_batch}; pass another")
    for what, path in (("served_at", served_at), ("operators", operators)):
        if path is not None and not path.startswith("/"):
            raise ValueError(
                f"expected an absolute path on the server for {what}, got {path!r}: the loader would look for another in the server's "
                "working directory; write it from / on"
            )


# ---- Models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model, as the server sees it."""

    name: str
    type: str  # TYPE_FP32, …
    dims: tuple[int, ...]  # without the batch; −1: any length

    def entry(self, reshaped: bool = True) -> dict[str, Any]:
        """Of the configuration. A tensor needs dims, so a number per row has one that the model does not see."""
        found: dict[str, Any] = {"name": self.name, "data_type": _Word(self.type), "dims": list(self.dims or (1,))}
        if reshaped and not self.dims:
            found["reshape"] = {"shape": []}
        return found


class _Writer:
    """The folder while it is made."""

    def __init__(self, folder: Path, max_batch: int, served_at: str, operators: str | None, kernels: bool) -> None:
        self.folder = folder
        self.max_batch = max_batch
        self.served_at = served_at.rstrip("/")
        self.operators = operators
        self.kernels = kernels
        self.models: list[str] = []

    def model(
        self, name: str, proto: ModelProto, weights: Path, what: str, outputs: Sequence[str] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Writes a model; returns its inputs and those of its outputs that are served.

        Args:
            name: of the model.
            proto: without the weights that lie beside its file.
            weights: the folder in which those lie.
            what: it is, for messages.
            outputs: that are served; None: all.
        """
        version = self.folder / name / "1"
        version.mkdir(parents=True)
        with files.writing(version / "model.onnx") as file:
            file.write(integrity.resealed_onnx(proto))
        for location in merging.weight_locations(proto.graph):
            place = version / location
            if not place.resolve().is_relative_to(version.resolve()):
                raise ValueError(
                    f"expected weights beside {what}, got {location!r}; put the file there, and write the model again"
                )
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(weights / location, place)
        library = self._library(name) if _has_kernels(proto) and self.kernels else None
        inputs, served = _signature(version / "model.onnx", what, library is not None, outputs)
        described: dict[str, Any] = {"name": name, "backend": "onnxruntime", "max_batch_size": self.max_batch}
        described |= {"input": [tensor.entry() for tensor in inputs.values()]}
        described |= {"output": [tensor.entry() for tensor in served.values()], "dynamic_batching": {}}
        if library is not None:
            described |= {"instance_group": [{"kind": _Word("KIND_CPU")}]}  # the operators are for the CPU
            described |= {"model_operations": {"op_library_filename": library}}
        self.configuration(name, described)
        return inputs, served

    def configuration(self, name: str, described: Mapping[str, Any]) -> None:
        lines = [f"# Written by pykd {__version__}.", *_lines(described)]
        (self.folder / name / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.models.append(name)

    def readme(self, name: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """What whoever finds the folder wants to know."""
        rows, request = [], []
        for kind, tensors in (("input", inputs), ("output", outputs)):
            for tensor in tensors.values():
                lengths = ["any" if length < 0 else str(length) for length in tensor.dims or (1,)]
                rows.append(
                    f"| {kind} | `{tensor.name}` | {tensor.type.removeprefix('TYPE_')} | batch × {' × '.join(lengths)} |"
                )
        for tensor in inputs.values():
            kind = tensor.type.removeprefix("TYPE_").replace("STRING", "BYTES")
            shape = [1, *(max(length, 1) for length in tensor.dims or (1,))]
            request.append({"name": tensor.name, "shape": shape, "datatype": kind, "data": ["…"]})
        libraries = sorted(path.relative_to(self.folder) for path in self.folder.glob("*/libpykd.so.*"))
        if libraries:
            library = (
                f"The server opens `{self.served_at}/{libraries[0]}`: where the folder is seen elsewhere, correct `op_library_filename`. The library "
                "needs the glibc of the system that it was built on, or a newer one."
            )
        elif self.operators is not None and self.kernels:
            library = f"pykd's operators must lie there in the container: `{self.operators}`."
        else:
            library = "No operators of pykd's are needed."
        text = _README.format(
            name=name, version=__version__, served_at=self.served_at, library=library, rows="\n".join(rows), max_batch=self.max_batch,
            kind="one model" if len(self.models) == 1 else f"an ensemble of {len(self.models) - 1} models",
            request=json.dumps({"inputs": request}, ensure_ascii=False),
        )  # fmt: skip
        (self.folder / "README.md").write_text(text, encoding="utf-8")

    def _library(self, name: str) -> str:
        """The path of libpykd on the server; copied, with the library that it needs, where none was named."""
        if self.operators is not None:
            return self.operators
        library = config.library()
        for path in (library, *sorted(library.parent.glob("libhwy.so.*"))):
            shutil.copyfile(path, self.folder / name / path.name)
        return f"{self.served_at}/{name}/{library.name}"


def _has_kernels(proto: ModelProto) -> bool:
    return any(node.domain == "pykd" for node in proto.graph.node)


def _signature(
    path: Path, what: str, kernels: bool, outputs: Sequence[str] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, and outputs that are served, as ONNX Runtime, and so Triton, reads them, or why that would not serve."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if kernels:
        options.register_custom_ops_library(config.onnxruntime_ops_path())
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for value in session.get_outputs():
        if not value.type.startswith("tensor("):
            raise ValueError(
                f"expected a model whose outputs are tensors, as Triton's backend does, got {value.type} of {value.name} of {what}; export it "
                "without that output"
            )
    inputs = {value.name: _tensor(value, "input", what) for value in session.get_inputs()}
    given = [value for value in session.get_outputs() if outputs is None or value.name in outputs]
    return inputs, {value.name: _tensor(value, "output", what) for value in given}


def _tensor(value: Any, kind: str, what: str) -> Tensor:
    """What the server may put together with that of other requests, along the first axis."""
    shape = [length if isinstance(length, int) else -1 for length in value.shape]
    place = f"the {kind} {value.name} of {what}"
    if not shape:
        remedy = (
            f"write a value into the file (--fix {value.name}=…)" if kind == "input" else "leave it out of the scorer"
        )
        raise ValueError(f"expected an axis of rows in {place}, got a single number; {remedy}")
    if shape[0] != -1:
        raise ValueError(
            f"expected any number of rows in {place}, got the shape {value.shape}; export the model with a dynamic first axis"
        )
    found = re.fullmatch(r"tensor\((\w+)\)", value.type)
    if found is None or found[1] not in TYPES:
        raise ValueError(f"expected a type that Triton has as {place}, got {value.type}; export it with another")
    return Tensor(value.name, f"TYPE_{TYPES[found[1]]}", tuple(shape[1:]))


def _fix(model: ModelProto, fixed: Mapping[str, float], described: Mapping[str, Any]) -> None:
    """Writes numbers into a model that were inputs of it, with a default or without."""
    graph = model.graph
    numbers = {value.name: value for value in graph.input if not value.type.tensor_type.shape.dim}
    for name, number in fixed.items():
        if name not in numbers:
            raise ValueError(
                f"expected a number of the loss ({', '.join(numbers) or 'it has none'}), got {name!r}; correct --fix"
            )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(numbers[name].type.tensor_type.elem_type)
        kept = [tensor for tensor in graph.initializer if tensor.name != name]
        del graph.initializer[:]
        graph.initializer.extend(
            [*kept, numpy_helper.from_array(number_of(described, name, number, dtype, "--fix"), name)]
        )
        graph.input.remove(numbers[name])


def _write_one(writer: _Writer, scorer: Path, name: str, fixed: Mapping[str, float]) -> None:
    """A merged file as one model."""
    proto = merging.load(scorer, "the scorer")
    if not merging.is_scorer(proto):
        raise ValueError(
            f"expected a file that `pykd merge` wrote, got {scorer}; merge a teacher, a student and a loss, or pass the three"
        )
    described = merging.described(proto)
    _check_samples(described["loss"], described["connections"])
    _fix(proto, fixed, described["loss"])
    inputs, outputs = writer.model(name, proto, scorer.parent, "the scorer")
    writer.readme(name, inputs, outputs)


def _check_samples(loss: Mapping[str, Any], connected: Iterable[str]) -> None:
    """Refuses what would be wrong in a batch of several requests, as ``kind="score"`` of the export does."""
    for term in loss["terms"]:
        if not term["per_sample"]:
            why = term.get("couples_batch", "compares the samples of a batch with each other")
            raise ValueError(
                f"expected a loss whose samples do not depend on each other, got the term {term['name']}, which {why}: the server puts samples of "
                "strangers into one batch; leave the term out"
            )
    for value in loss["inputs"]:
        if value["name"] not in set(connected) and value["axes"][:1] != ["batch"]:
            raise ValueError(
                f"expected inputs with the samples along their first axis, got {value['name']} {value['axes']}, which the samples of a batch "
                "share: the server would put together those of strangers; export the loss without it"
            )


def _write_ensemble(
    writer: _Writer,
    parts: merging.Parts,
    connect: dict[str, str],
    share: dict[str, str],
    separate: set[str],
    name: str,
    fixed: Mapping[str, float],
) -> None:
    """Three models, and the one that a request names, which is nothing but what goes where."""
    connected = merging.connections(parts, connect)
    _check_samples(parts.described, connected)
    fed = merging.inputs_of_models(parts, share, separate)
    for loss_input, place in connected.items():
        if merging.is_widened(parts, loss_input, place):
            raise ValueError(
                f"expected {':'.join(place)} to hold what {loss_input} of the loss does, got a half: an ensemble converts nothing; export the "
                "loss with its dtype, or merge the three, which widens halves"
            )
    inputs: dict[str, Tensor] = {}
    steps = []
    for role in ROLES:
        model = parts.models[role]
        outputs = [output for owner, output in connected.values() if owner == role]
        taken, _ = writer.model(f"{name}_{role}", model.proto, model.path.parent, f"the {role}", outputs)
        mapped = {key: fed[role, key] for key in taken}
        for key, tensor in taken.items():
            inputs[mapped[key]] = _both(inputs.get(mapped[key]), tensor, mapped[key])
        steps.append(_step(f"{name}_{role}", mapped, {output: f"{role}/{output}" for output in outputs}))
    loss = merging.judging(merging.scores_alone(parts.loss, [value.name for value in parts.scores]), parts)
    _fix(loss, fixed, parts.described)
    taken, scores = writer.model(f"{name}_loss", loss, parts.loss_file.parent, "the loss")
    mapped = {key: "/".join(connected[key]) if key in connected else key for key in taken}
    inputs |= {key: tensor for key, tensor in taken.items() if key not in connected}
    if taken_twice := inputs.keys() & {"/".join(place) for place in connected.values()}:
        raise ValueError(
            f"expected inputs of other names than {', '.join(sorted(taken_twice))}, which an output has; rename that input"
        )
    steps.append(_step(f"{name}_loss", mapped, {score: score for score in scores}))
    described: dict[str, Any] = {"name": name, "platform": "ensemble", "max_batch_size": writer.max_batch}
    described |= {"input": [tensor.entry(reshaped=False) for tensor in inputs.values()]}
    described |= {"output": [tensor.entry(reshaped=False) for tensor in scores.values()]}
    described |= {"ensemble_scheduling": {"step": steps}}
    version = writer.folder / name / "1"
    version.mkdir(parents=True)
    (version / "ensemble").write_text(
        "An ensemble has no file; the server wants a version, and copies lose empty folders.\n"
    )
    writer.configuration(name, described)
    writer.readme(name, inputs, scores)


def _both(known: Tensor | None, other: Tensor, name: str) -> Tensor:
    """The input that two models share: what either of them knows of its lengths."""
    dims = tuple(max(pair) for pair in zip(known.dims, other.dims, strict=True)) if known else other.dims
    return Tensor(name, other.type, dims)


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
    def entries(pairs: Mapping[str, str]) -> list[dict[str, Any]]:
        return [{"key": of_model, "value": of_ensemble} for of_model, of_ensemble in pairs.items()]

    return {"model_name": model, "model_version": -1, "input_map": entries(inputs), "output_map": entries(outputs)}


# ---- Text ----------------------------------------------------------------------------------------


class _Word(str):
    """A name of an enumeration, which is written without quotes."""


def _lines(message: Mapping[str, Any], indent: str = "") -> list[str]:
    """A message of Protocol Buffers in its text format."""
    found = []
    for key, value in message.items():
        if isinstance(value, list) and all(isinstance(item, int) for item in value):
            found.append(f"{indent}{key}: [{', '.join(map(str, value))}]")
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                found += [f"{indent}{key} {{", *_lines(item, indent + "  "), f"{indent}}}"]
            else:
                quoted = isinstance(item, str) and not isinstance(item, _Word)
                found.append(f"{indent}{key}: {json.dumps(item, ensure_ascii=False) if quoted else item}")
    return found


_README = """# {name}

A model repository for NVIDIA's Triton Inference Server, written by pykd {version}: {kind}.

    docker run --rm -p 8000:8000 -p 8001:8001 -v "$PWD:{served_at}:ro" nvcr.io/nvidia/tritonserver:YY.MM-py3 \\
        tritonserver --model-repository={served_at} --disable-auto-complete-config

in this folder, with a release (YY.MM) whose backend for ONNX Runtime is 1.21 or newer. {library}

| {name} | tensor | type | shape |
|---|---|---|---|
{rows}

"batch" is at most {max_batch} rows of one request; the server may put rows of several requests into one batch. The loss of a row depends on
the row alone, so that this changes no score of models that treat each row by itself, but for the last bits. Numbers of the loss, such as
temperatures, are in the files: no request can set them.

    curl -s localhost:8000/v2/models/{name}/infer -d '{request}'
"""
