"""Rows that a model makes: an ONNX file, run over rows of files by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pykd.scoring.formats.source import Block, Source, exact, first_line, in_turn, require
from pykd.scoring.sources import open_array

_FLOATS = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}
_TYPES: dict[str, Any] = {
    **_FLOATS,
    **{
        f"tensor({name})": np.dtype(name)
        for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    },
}

Array = np.ndarray[Any, Any]
Where = str | os.PathLike[str]


def open_model(model: Where, inputs: Mapping[str, Where], output: str | None = None, batch: int = 32) -> Source:
    """The rows of an output of a model, of which a batch at a time is made.

    Args:
        model: an ONNX file.
        inputs: for each input of the model a file (:func:`pykd.scoring.sources.open_array`), whose first axis is that of the samples.
        output: the name of the output, (samples, …, classes); axes between are rows as well. None: the one that there is.
        batch: samples of a run; where the model has a number of its own, that many.
    """
    require("onnxruntime")
    runner = _Model(model, output)
    sources = runner.open(inputs)
    samples = next(iter(sources.values())).rows
    for name, source in sources.items():
        if source.rows != samples:
            raise ValueError(
                f"expected as many samples in {source.name} as in the other inputs, {samples}, got {source.rows} for {name}; pass files of the same samples"
            )
    count = runner.batch or batch
    if count < 1:
        raise ValueError(f"expected batches of at least 1 sample, got {count}; correct --batch")

    def batches(start: int) -> Iterator[Array]:
        loads = zip(*(source.blocks(start, count) for source in sources.values()), strict=True)
        for loaded in loads:
            feeds = {
                name: load().values.reshape(-1, *(source.shape or ())[1:])
                for (name, source), load in zip(sources.items(), loaded, strict=True)
            }
            yield runner.run(feeds, count)

    first = next(batches(0))
    inner = int(np.prod(first.shape[1:-1]))
    width = first.shape[-1]

    def chunks(start: int) -> Iterator[Block]:
        begin = start // inner // count * count
        skip = start - begin * inner
        for values in batches(begin):
            if values.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"expected outputs of one shape from {runner.label}, {first.shape[1:]}, got {values.shape[1:]}; pad the samples to one length"
                )
            yield Block(values.reshape(-1, width)[skip:])
            skip = 0

    blocks = in_turn(lambda start, rows: exact(chunks(start), rows))
    return Source(runner.label, samples * inner, width, first.dtype, first.dtype.name, blocks, True)


class _Model:
    def __init__(self, path: Where, output: str | None) -> None:
        import onnxruntime

        if not os.path.isfile(path):
            raise FileNotFoundError(f"expected a model at {path}, got no file there; check the path")
        try:
            self.session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own have no class in common
            raise ValueError(
                f"expected a model that ONNX Runtime loads at {path}, got {first_line(error)}; check it"
            ) from error
        floats = [value.name for value in self.session.get_outputs() if value.type in _FLOATS]
        if output is None and len(floats) == 1:
            output = floats[0]
        if output is None or output not in floats:
            raise ValueError(
                f"expected one output of floating-point numbers of {path}, got {output or len(floats)} (there: {', '.join(floats) or 'none'}); name one with --output"
            )
        self.output = output
        self.label = f"the output {output} of {os.fspath(path)}"
        self.types: dict[str, Any] = {}  # of the inputs
        firsts = {value.shape[0] for value in self.session.get_inputs() if value.shape}
        fixed = {length for length in firsts if isinstance(length, int)}
        self.batch = fixed.pop() if len(fixed) == 1 else None

    def open(self, inputs: Mapping[str, Where]) -> dict[str, Source]:
        """The files of the inputs, seen to be what the model takes."""
        taken = {value.name: value for value in self.session.get_inputs()}
        if inputs.keys() != taken.keys():
            raise ValueError(
                f"expected files for the inputs {', '.join(taken)}, got {', '.join(inputs) or 'none'}; pass --input NAME=FILE for each"
            )
        sources = {}
        for name, where in inputs.items():
            source = open_array(where, f"input {name}", len(taken[name].shape))
            wanted = _TYPES.get(taken[name].type)
            if wanted is None or not np.can_cast(source.dtype, wanted, "safe"):
                raise ValueError(
                    f"expected {taken[name].type} for the input {name}, got {source.stored} in {source.name}; convert it"
                )
            sources[name] = source
            self.types[name] = wanted
        return sources

    def run(self, feeds: dict[str, Array], count: int) -> Array:
        """The output for these samples; where the model wants more, the last one is repeated."""
        rows = len(next(iter(feeds.values())))
        pad = count - rows if self.batch else 0
        whole = {
            name: np.ascontiguousarray(
                np.concatenate([array, np.repeat(array[-1:], pad, axis=0)]) if pad else array, self.types[name]
            )
            for name, array in feeds.items()
        }
        try:
            (result,) = self.session.run([self.output], whole)
        except Exception as error:  # as above
            raise ValueError(
                f"expected {self.label} for these inputs, got {first_line(error)}; check their shapes"
            ) from error
        if result.ndim < 2 or len(result) != rows + pad:
            raise ValueError(
                f"expected {self.label} to be (samples, …, classes), got {result.shape} for {rows + pad} samples; name another with --output"
            )
        return np.asarray(result[:rows])
