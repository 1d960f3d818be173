"""Teacher outputs of all classes in files that other programs write and read as well: ``.npy``, and Arrow IPC.

They have no checksums, and of the rows that were bad in the source only the numbers tell, as NaN or ∞.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pykd._version import __version__
from pykd.scoring.container import FORMAT, METADATA, Shapes, Writer
from pykd.scoring.formats.source import require
from pykd.scoring.whole_file import WholeFile

_BATCH_BYTES = 8 << 20  # of a record batch, about

Array = np.ndarray[Any, Any]


class NpyWriter(WholeFile):
    """Writes ``logprobs``, one array; what else is known of the rows has no place there.

    Args:
        path: of the file.
        facts: not written.
        tensors: type and shape of each, the rows first.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], tensors: Shapes) -> None:
        dtype, shape = tensors["logprobs"]
        header = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, described)
        self._head = header.getvalue()
        self._at = 0
        super().__init__(path, len(self._head) + dtype.itemsize * shape[0] * shape[1])

    def append(self, **rows: Array) -> None:
        """The next rows."""
        for data in ([] if self._at else [self._head]) + [np.ascontiguousarray(rows["logprobs"]).tobytes()]:
            self.write(self._at, data)
            self._at += len(data)


class ArrowWriter(WholeFile):
    """Writes a column of fixed-size lists, and one for each number of a row; the metadata are those of the container.

    Args:
        path: of the file.
        facts: what the metadata of the schema say, under the container's name for them; JSON.
        tensors: type and shape of each, the rows first.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], tensors: Shapes) -> None:
        require("pyarrow")
        import pyarrow as pa
        import pyarrow.ipc as ipc

        self._pa, self._ipc = pa, ipc
        self._rows = next(iter(tensors.values()))[1][0]
        self._tensors = tensors
        row_bytes = sum(dtype.itemsize * int(np.prod(shape[1:])) for dtype, shape in tensors.values())
        self._batch_rows = max(_BATCH_BYTES // row_bytes, 1)
        nothing = {name: np.zeros((0, *shape[1:]), dtype) for name, (dtype, shape) in tensors.items()}
        text = json.dumps({"format": FORMAT, "pykd": __version__, **facts})
        self._schema = self._batch(nothing).schema.with_metadata({METADATA: text})
        counted = pa.MockOutputStream()
        batch = {name: np.zeros((self._batch_rows, *shape[1:]), dtype) for name, (dtype, shape) in tensors.items()}
        with ipc.new_file(counted, self._schema) as writer:
            for first in range(0, self._rows, self._batch_rows):
                rows = min(self._batch_rows, self._rows - first)
                writer.write_batch(self._batch({name: array[:rows] for name, array in batch.items()}))
        self._waiting: list[dict[str, Array]] = []
        super().__init__(path, counted.size())

    def _batch(self, rows: Mapping[str, Array]) -> Any:
        columns = {}
        for name, array in rows.items():
            flat = self._pa.array(np.ascontiguousarray(array).reshape(-1))
            single = int(np.prod(array.shape[1:])) == 1
            columns[name] = flat if single else self._pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
        return self._pa.record_batch(columns)

    def __enter__(self) -> ArrowWriter:
        super().__enter__()
        try:
            self._sink = _Sink(self)
            self._writer = self._ipc.new_file(self._pa.PythonFile(self._sink, "w"), self._schema)
        except BaseException as error:
            super().__exit__(type(error), error, None)
            raise
        return self

    def append(self, **rows: Array) -> None:
        """The next rows."""
        self._waiting.append(rows)
        held = sum(len(part["kind"]) for part in self._waiting)
        while held >= self._batch_rows:
            self._flush(self._batch_rows)
            held -= self._batch_rows

    def _flush(self, count: int) -> None:
        joined = {name: np.concatenate([part[name] for part in self._waiting]) for name in self._tensors}
        self._writer.write_batch(
            self._batch({name: array[:count] for name, array in joined.items()}).cast(self._schema)
        )
        rest = {name: array[count:] for name, array in joined.items()}
        self._waiting = [rest] if len(rest["kind"]) else []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self._sink.close()  # pyarrow may write its end later, when nobody holds the writer
        else:
            try:
                if self._waiting:
                    self._flush(self._batch_rows)
                self._writer.close()
                if self._sink.at != self._size:
                    raise RuntimeError(f"expected {self._size} bytes for {self.path}, got {self._sink.at}; report this")
            except BaseException as failure:
                self._sink.close()
                super().__exit__(type(failure), failure, None)
                raise
        super().__exit__(kind, error, at)


class _Sink(io.RawIOBase):
    """What pyarrow writes to: the file, from its front to its end."""

    def __init__(self, file: WholeFile) -> None:
        super().__init__()
        self._file = file
        self.at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def write(self, data: Any) -> int:
        self._checkClosed()
        view = memoryview(data).cast("B")
        self._file.write(self.at, view)
        self.at += len(view)
        return len(view)


WRITERS: dict[str, Any] = {".safetensors": Writer, ".npy": NpyWriter, ".arrow": ArrowWriter}  # by the file's ending
