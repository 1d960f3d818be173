"""Export: a loss becomes TorchScript and ONNX files that describe and verify themselves."""

import hashlib
import inspect
import json
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pykd.export.verification import Report, verify

__all__ = ["FILES", "Report", "export", "verify"]

FILES = {"torchscript": "loss.pt", "value": "loss.onnx", "gradient": "loss.grad.onnx"}
SCORE_FILES = {"score": "score.onnx"}
MANIFEST = "manifest.json"
DTYPES = ("float32", "float16", "bfloat16", "float64")
KERNELS = ("auto", "on", "off")
PARAMETERS = ("overridable", "fixed", "inputs")
KINDS = ("loss", "score")


def export(
    loss: Any,
    directory: str | Path,
    *,
    layouts: Mapping[str, str] | None = None,
    optional_inputs: Iterable[str] = (),
    per_sample: bool = False,
    dtype: str = "float32",
    kernels: str = "auto",
    parameters: str = "overridable",
    kind: str = "loss",
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes ``loss.pt``, ``loss.onnx``, ``loss.grad.onnx`` and ``manifest.json``, and verifies them.

    With ``kind="score"``: ``score.onnx`` and ``manifest.json``, which give one number per sample and nothing else.

    A folder that is there is replaced in one step, once the new files have been verified; other files in it stay.

    One set of files serves every batch size, number of classes, tokens and channels, 1 included;
    temperatures and weights can be replaced in every call. docs/artefacts.md describes the files.

    Args:
        loss: a registered loss, a :class:`pykd.DistillationLoss` or what :func:`pykd.compose` made.
        directory: where to write; made if it does not exist.
        layouts: input name → axes where an input may take several forms; ``{"labels": "batch"}``
            takes class indices (int64) instead of probabilities ``"batch classes"``, ``{"labels": "batch tokens"}`` one per
            token, with logits ``"batch tokens classes"``. Layouts that are not given follow from those that are.
        optional_inputs: optional inputs that the files take, such as ``["sample_weight"]``.
        per_sample: whether to add ``loss_per_sample`` and one vector for every term that splits over samples.
        dtype: floating type of the ONNX files: ``"float32"``, ``"float16"``, ``"bfloat16"`` or ``"float64"``. The
            TorchScript file takes any of them.
        kernels: whether the ONNX files have a node of the domain ``pykd`` for each fused kernel, with the formula as its
            function. ``"auto"``: where there is a kernel. ``"on"``: the same, and a ValueError where there is none.
            ``"off"``: standard operators alone, for runtimes that do not know functions inside a file.
        parameters: how temperatures and weights are held in the ONNX files. ``"overridable"``: initialisers that are
            inputs, too, so that every call may set them, or leave them out. ``"inputs"``: plain inputs without a
            default, for runtimes that cannot override initialisers. ``"fixed"``: constants; no call can set them, in
            the TorchScript file neither. :func:`pykd.load` knows all three.
        kind: ``"loss"``, or ``"score"`` for one ONNX file that scores samples: ``loss_per_sample`` (and for several terms
            ``<term>_per_sample``), no scalar and no gradient. Every input and output has the samples along its first axis, and
            the score of a sample is the same whatever lies beside it, so that a serving system may put samples of several
            requests into one call. ``per_sample`` is implied.
        progress: called with a line per step; by default the lines go to stderr. Pass ``lambda line: None`` for silence.

    Returns:
        The directory.

    Raises:
        ValueError: for an unknown layout, input, dtype, form or kind, for ``kernels="on"`` where there is no kernel, and for
            ``kind="score"`` where the samples of a batch depend on each other or share an input.
        RuntimeError: where a written file disagrees with the float64 reference.
        OSError: where the folder cannot be written.
    """
    from pykd.composition import as_composition
    from pykd.export import folder, metadata, onnx_files, torchscript, tracing

    say = progress or (lambda line: print(line, file=sys.stderr, flush=True))
    for name, given, known in (
        ("dtype", dtype, DTYPES),
        ("kernels", kernels, KERNELS),
        ("parameters", parameters, PARAMETERS),
        ("kind", kind, KINDS),
    ):
        if given not in known:
            raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {given!r}; pass one of these")
    composition = as_composition(loss)
    if kind == "score":
        _check_splits(composition)
        per_sample = True
    graph = composition.graph(layouts, optional_inputs, per_sample, check=True)
    plain = composition.graph(layouts, optional_inputs, per_sample, check=False)
    fused = composition.graph(layouts, optional_inputs, per_sample, check=False, fused=True)
    if kind == "score":
        _check_rows(graph)
    files = SCORE_FILES if kind == "score" else FILES
    described = {
        each: metadata.of_graph(composition, graph, each, dtype, tracing.OPSET, parameters)
        if each != "torchscript"
        else metadata.of_graph(composition, graph, each, "float", None, parameters)
        for each in files
    }
    names = [*FILES.values(), *SCORE_FILES.values(), MANIFEST]
    with folder.replacing(directory, names) as made:
        step = _Step(say)
        models = onnx_files.build(
            composition, plain, fused, dtype, kernels, parameters, [k for k in files if k != "torchscript"]
        )
        export_id = _export_id(described, models)
        for each, entry in described.items():
            entry["export_id"] = export_id
            if each in models:
                onnx_files.write(models[each], entry, made / files[each])
        step(f"wrote {' and '.join(files[each] for each in models)} ({dtype})")
        if "torchscript" in files:
            torchscript.write(graph, described["torchscript"], made / files["torchscript"])
            step(f"wrote {files['torchscript']}")
        manifest = {**described[list(models)[-1]], "files": {name: _describe(made / name) for name in files.values()}}
        if kind == "loss":
            del manifest["kind"]
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        report = verify(made, engines=("python",), quick=True, trust=True)
        if not report.ok:
            raise RuntimeError(f"expected the written files to agree with float64, got\n{report}\nplease report this")
        step(f"verified against float64 at {report.sizes} sizes: {report.summary()}")
    return Path(directory)


def _check_splits(composition: Any) -> None:
    """Refuses what compares the samples of a batch with each other: no sample of it has a score of its own."""
    if coupled := [
        f"{term.name}, which {term.couples_batch}" for term in composition.named_terms if term.couples_batch
    ]:
        raise ValueError(
            f"expected terms that have a score for every sample by itself for kind='score', got {'; '.join(coupled)}; "
            "export it as a loss (kind='loss'), or score by the other terms alone"
        )


def _check_rows(graph: Any) -> None:
    """Refuses inputs that all samples share, which a server cannot put together out of several requests."""
    shared = {name: spec.names for name, spec in graph.signature.inputs.items() if spec.names[0] != "batch"}
    for name, axes in shared.items():
        raise ValueError(
            f"expected inputs with the samples along their first axis for kind='score', got {name} ({', '.join(axes)}), which all "
            "samples share; leave it out where it is optional, or export a loss (kind='loss', per_sample=True)"
        )


def _export_id(described: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    """What every file of an export says, and no other: the same where the files are the same."""
    digest = hashlib.sha256(json.dumps(described).encode())
    for model in models.values():
        digest.update(model.SerializeToString(deterministic=True))
    return digest.hexdigest()[:32]


def _describe(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class _Step:
    """Says what was done and how long it took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        now = time.perf_counter()
        self.say(f"pykd export: {text} ({now - self.start:.1f} s)")
        self.start = now


class _Callable(types.ModuleType):
    """``pykd.export`` is this package and the function at once, whichever of its modules was imported first.

    Type checkers read in ``pykd/__init__.py`` that it is the function, and find the package under ``from pykd.export``.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Path:
        return export(*arguments, **options)


__signature__ = inspect.signature(export)  # what help() and editors show of a call
sys.modules[__name__].__class__ = _Callable
