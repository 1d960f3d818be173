"""Scores of tables: what :func:`ray.data.Dataset.map_batches` calls in each of its workers, and others may.

Both classes are made from paths and plain values, so that a worker makes its own; a call takes a table of Arrow (or a batch) and
returns one with as many rows: the columns that say which row it is, ``status``, and the scores. A row's scores depend on nothing but
the row. torch is not imported, nor is Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pykd.scoring.formats.columns import block_of_column, storage_of
from pykd.scoring.results import columns_of
from pykd.scoring.row_scores import (
    INFINITE,
    INFINITE_SCORE,
    MISSING,
    NAN,
    OK,
    RAGGED,
    RowScores,
    check_temperature,
    number_of,
)
from pykd.scoring.sources import Block, require
from pykd.scoring.stream import compared

Array = np.ndarray[Any, Any]
Columns = str | Sequence[str]
_SCORER = "pykd.scorer"  # pykd.scoring.merge.METADATA, whose module imports onnx

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    **{f"tensor({name})": np.dtype(name) for name in ("int8", "int16", "int32", "int64")},
    **{f"tensor({name})": np.dtype(name) for name in ("uint8", "uint16", "uint32", "uint64")},
}


class _Scorer:
    """What both have in common: tables in, tables out."""

    def __init__(self, row: Columns, keep: Sequence[str]) -> None:
        require("pyarrow")
        self.row = (row,) if isinstance(row, str) else tuple(row)
        self.keep = tuple(keep)
        if not self.row:
            raise ValueError("expected a column that says which row it is, got none; pass row=, one name or several")

    def __call__(self, table: Any) -> Any:
        """The scores of the rows of a table, in their order."""
        import pyarrow as pa

        table = _combined(table)
        kept = [(name, _column(table, name)) for name in (*self.row, *self.keep)]
        columns = [*kept, *columns_of(self._records(table))]
        names = [name for name, _ in columns]
        if len(set(names)) < len(names):
            raise ValueError(
                f"expected columns to keep that differ from each other and from the scores, got {', '.join(names)}; rename them"
            )
        return pa.table([column for _, column in columns], names=names)

    def _records(self, table: Any) -> Array:
        raise NotImplementedError


class LogitScorer(_Scorer):
    """Scores rows of logits as ``pykd score`` does: the same columns, the same numbers, bit for bit.

        >>> scores = rows.map_batches(                                                           # doctest: +SKIP
        ...     LogitScorer, fn_constructor_kwargs={"losses": ("kl",), "row": "id"}, batch_format="pyarrow",
        ...     compute=ray.data.ActorPoolStrategy(size=8),
        ... )

    Args:
        losses: see :func:`pykd.scoring.stream.score_files`, as for ``temperature`` and ``classes``.
        teacher: the column of the teacher's logits: lists, fixed-size lists, or tensors of one axis.
        student: the same of the student.
        labels: the column of the right classes; None: there is none.
        row: the column, or the columns, that say which row it is; they are returned as they are.
        keep: other columns to return as they are.
        widths: how many classes the lists of the teacher and of the student have (one number for both); a row of another length is
            ``ragged``. Needed for columns of lists of any length: the most frequent one differs from worker to worker.
    """

    def __init__(
        self,
        losses: Iterable[str] = ("kl",),
        *,
        teacher: str = "teacher_logits",
        student: str = "student_logits",
        labels: str | None = None,
        row: Columns = "row",
        keep: Sequence[str] = (),
        temperature: float | None = None,
        classes: int | None = None,
        widths: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(row, keep)
        self.losses = tuple(losses)
        if temperature is not None:
            check_temperature(temperature, "temperature=")
        self.sides = {"teacher": teacher, "student": student}
        self.labels = labels
        self.temperature = temperature
        self.classes = classes
        both = (widths, widths) if widths is None or isinstance(widths, int) else widths
        self.widths = dict(zip(self.sides, both, strict=True))
        self._made: dict[tuple[int, int], RowScores] = {}
        if both[0] is not None and both[1] is not None:
            self._scores(both[0], both[1])  # what is wrong is said before there are rows

    def _records(self, table: Any) -> Array:
        blocks = {side: self._logits(side, table) for side in self.sides}
        label = None
        if self.labels is not None:
            column = _column(table, self.labels)
            label = block_of_column(column, None, f"the column {self.labels!r}")
            if label.values.dtype.kind not in "iu":
                raise ValueError(f"expected whole numbers in the column {self.labels!r}, got {column.type}; convert it")
        teacher, student = blocks["teacher"], blocks["student"]
        return self._scores(teacher.values.shape[1], student.values.shape[1])(teacher, student, label)

    def _logits(self, side: str, table: Any) -> Block:
        import pyarrow as pa

        name = self.sides[side]
        column = _column(table, name)
        storage = storage_of(column)
        if not pa.types.is_floating(getattr(storage.type, "value_type", pa.null())):
            raise ValueError(
                f"expected lists or tensors of floating-point logits in the column {name!r}, got {column.type}; name another column"
            )
        shape = _shape(column.type)
        if shape is not None and len(shape) != 1:
            raise ValueError(
                f"expected one axis of classes in the column {name!r}, got {column.type}; reshape it to rows of logits"
            )
        width = self.widths[side] if shape is None else shape[0]
        if width is None:
            raise ValueError(
                f"expected fixed-size lists or tensors in the column {name!r}, got {column.type}; pass widths=, how many classes there are"
            )
        return block_of_column(storage, width, f"the column {name!r}")

    def _scores(self, teacher: int, student: int) -> RowScores:
        if (teacher, student) not in self._made:
            classes = compared((teacher, student), self.classes)
            cut = teacher > classes, student > classes
            made = RowScores(self.losses, self.temperature, classes, self.labels is not None, cut)
            self._made[teacher, student] = made
        return self._made[teacher, student]


class ModelScorer(_Scorer):
    """Runs teacher and student on the inputs in a table, and returns what ``pykd merge``'s file does: one column per score.

    A row that has no score is null, and its ``status`` says why: ``missing`` (an input is null), ``ragged`` (an input has another
    length than the models take), ``infinite`` (an input has a finite number that the models' type does not hold), ``nan`` or
    ``infinite_score``. Lists of several lengths run in one batch per length, without padding.

    Args:
        scorer: a file of ``pykd merge``; or, in its place, the next three.
        teacher: an ONNX model.
        student: an ONNX model.
        loss: a folder that :func:`pykd.export` wrote with ``kind="score"`` or ``per_sample=True``, or its ONNX file.
        columns: input → the column that holds it; not needed where both have one name. Numbers, lists, fixed-size lists, or tensors.
        parameters: numbers of the loss, such as ``{"temperature": 2.0}``; else its defaults.
        row: the column, or the columns, that say which row it is; they are returned as they are.
        keep: other columns to return as they are.
        threads: of ONNX Runtime, in each session; one where each core has a worker.
        kernels: whether the loss runs pykd's kernels.
        connect: of the three files: see :func:`pykd.scoring.merge.merge`, as for ``share`` and ``separate``.
    """

    def __init__(
        self,
        scorer: str | Path | None = None,
        *,
        teacher: str | Path | None = None,
        student: str | Path | None = None,
        loss: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
        parameters: Mapping[str, float] | None = None,
        row: Columns = "row",
        keep: Sequence[str] = (),
        threads: int = 1,
        kernels: bool = True,
        connect: Mapping[str, str] | None = None,
        share: Mapping[str, str] | None = None,
        separate: Sequence[str] = (),
    ) -> None:
        super().__init__(row, keep)
        import onnxruntime

        from pykd.config import onnxruntime_ops_path

        def options() -> Any:
            made = onnxruntime.SessionOptions()
            made.intra_op_num_threads = threads
            made.log_severity_level = 3  # it warns of each parameter that can be set
            return made

        three = (teacher, student, loss)
        self.scores: list[str] = []
        self._run: Any
        if scorer is not None and three == (None, None, None):
            if not Path(scorer).is_file():
                raise FileNotFoundError(f"expected a scorer in {scorer}, got no such file; `pykd merge` writes one")
            chosen = options()
            if kernels:
                chosen.register_custom_ops_library(onnxruntime_ops_path())
            session = onnxruntime.InferenceSession(str(scorer), chosen, providers=["CPUExecutionProvider"])
            self._run = lambda feeds: dict(zip(self.scores, session.run(self.scores, feeds), strict=True))
            taken, numbers, given = session.get_inputs(), session.get_overridable_initializers(), session.get_outputs()
            loss_says = json.loads(session.get_modelmeta().custom_metadata_map.get(_SCORER, "{}")).get("loss", {})
        elif scorer is None and teacher is not None and student is not None and loss is not None:
            from pykd.scoring.sessions import Sessions

            sessions = Sessions(
                teacher,
                student,
                loss,
                connect=connect,
                share=share,
                separate=separate,
                kernels=kernels,
                options=options,
            )
            self._run = sessions
            taken, numbers, given = sessions.arguments()
            loss_says = sessions.described
        else:
            raise ValueError(
                "expected a scorer, or a teacher, a student and a loss, got neither the one nor the three; pass scorer=, or teacher=, "
                "student= and loss="
            )
        self.scores = [output.name for output in given if len(output.shape) == 1]
        self.parameters = _parameters(parameters or {}, {value.name: value for value in (*taken, *numbers)}, loss_says)
        self.inputs = {value.name: value for value in taken if value.name not in self.parameters}
        self.columns = {name: name for name in self.inputs} | dict(columns or {})
        if unknown := self.columns.keys() - self.inputs.keys():
            raise ValueError(
                f"expected columns for the inputs {', '.join(self.inputs)}, got one for {', '.join(sorted(unknown))}; correct columns="
            )
        for value in (*self.inputs.values(), *(output for output in given if output.name in self.scores)):
            if value.type not in _DTYPES:
                raise ValueError(
                    f"expected tensors of numbers, got {value.type} for {value.name}; export the model with others"
                )
        self._dtype = np.dtype([("status", "u1"), *((o.name, _DTYPES[o.type]) for o in given if o.name in self.scores)])

    def _records(self, table: Any) -> Array:
        read = {name: _Rows(_column(table, self.columns[name]), value) for name, value in self.inputs.items()}
        records = np.zeros(table.num_rows, self._dtype)
        status = records["status"]
        for rows in read.values():
            status[rows.too_large & (status == OK)] = INFINITE
            status[rows.ragged & (status != MISSING)] = RAGGED
            status[rows.missing] = MISSING
        lengths = np.stack([rows.lengths for rows in read.values()], axis=1)
        whole = np.flatnonzero(status == OK)
        kinds, kind = np.unique(lengths[whole], axis=0, return_inverse=True)
        for number in range(len(kinds)):
            chosen = whole[kind.reshape(-1) == number]
            feeds = {name: rows.take(chosen) for name, rows in read.items()}
            for name, values in self._run({**feeds, **self.parameters}).items():
                records[name][chosen] = values
        for name in self.scores:
            status[whole[np.isinf(records[name][whole])]] = INFINITE_SCORE
        for name in self.scores:
            status[whole[np.isnan(records[name][whole])]] = NAN
        return records


class _Rows:
    """A column as the input of a model: a tensor of each row. Its memory is Arrow's, and read alone."""

    def __init__(self, column: Any, value: Any) -> None:
        label = f"the column of {value.name}"
        self.dtype = _DTYPES[value.type]
        self.shape = _shape(column.type)  # of each row; None: a list of any length
        storage = storage_of(column)
        if self.shape == ():
            self.offsets = np.arange(len(column) + 1)
            entries = storage
        else:
            self.offsets = _offsets(storage, label)
            entries = storage.values
        self.lengths = np.diff(self.offsets)
        block = block_of_column(entries, None, label)
        self.values = block.values
        self.missing = np.asarray(storage.is_null().to_numpy(zero_copy_only=False))
        if block.missing is not None:
            self.missing = self.missing | self._any(block.missing)
        self._check(column.type, value, label)
        self.too_large = np.zeros(len(column), bool)
        if self.values.dtype.kind == self.dtype.kind == "f" and self.values.dtype.itemsize > self.dtype.itemsize:
            with np.errstate(over="ignore"):
                beyond = np.isinf(self.values.astype(self.dtype)) & np.isfinite(self.values)
            self.too_large = self._any(beyond)
        wanted, shape = value.shape[1:], self.shape
        if shape is None:
            self.ragged = self.lengths != wanted[0] if isinstance(wanted[0], int) else np.zeros(len(column), bool)
        else:
            fits = all(not isinstance(w, int) or w == length for w, length in zip(wanted, shape, strict=True))
            self.ragged = np.full(len(column), not fits)

    def _any(self, entries: Array) -> Array:
        """The rows that have one of these entries."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(entries)])
        return np.asarray(before[self.offsets[1:]] > before[self.offsets[:-1]])

    def _check(self, kind: Any, value: Any, label: str) -> None:
        axes = 1 if self.shape is None else len(self.shape)
        if axes != len(value.shape) - 1:
            raise ValueError(
                f"expected rows of {label} with the shape {value.shape[1:]}, got {kind}; pass numbers, lists or tensors of as many axes"
            )
        if not np.can_cast(self.values.dtype, self.dtype, "same_kind"):
            raise ValueError(f"expected {self.dtype} in {label}, got {kind}; convert it")

    def take(self, rows: Array) -> Array:
        """The tensors of these rows, which have one shape."""
        length = int(self.lengths[rows[0]])
        shape = (length,) if self.shape is None else self.shape
        if len(rows) == len(self.lengths):
            found = self.values[self.offsets[0] : self.offsets[-1]]
        else:
            found = self.values[self.offsets[rows][:, None] + np.arange(length)]
        cast = np.ascontiguousarray(found, self.dtype).reshape(len(rows), *shape)
        if found.dtype.kind in "iu" and not np.array_equal(cast.reshape(-1), found.reshape(-1)):
            raise ValueError(
                f"expected whole numbers that {self.dtype} holds, got {found.min()} to {found.max()}; convert them"
            )
        return cast


def _offsets(storage: Any, label: str) -> Array:
    """Where the entries of each row of lists begin, and the last ones end."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(storage.type):
        return np.asarray((storage.offset + np.arange(len(storage) + 1)) * storage.type.list_size)
    if pa.types.is_list(storage.type) or pa.types.is_large_list(storage.type):
        return np.asarray(storage.offsets, np.int64)
    raise ValueError(f"expected numbers, lists of them or tensors in {label}, got {storage.type}; convert it")


def _parameters(given: Mapping[str, float], known: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Array]:
    found = {}
    for name, number in given.items():
        value = known.get(name)
        if value is None or value.shape:
            numbers = [known_name for known_name, other in known.items() if not other.shape]
            raise ValueError(
                f"expected parameters of the loss ({', '.join(numbers) or 'none'}), got {name!r}; correct parameters="
            )
        found[name] = number_of(described, name, number, _DTYPES[value.type], "parameters=")
    return found


def _combined(table: Any) -> Any:
    """One chunk per column."""
    import pyarrow as pa

    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    if not isinstance(table, pa.Table):
        raise TypeError(f"expected a table of pyarrow, got {type(table).__name__}; pass batch_format='pyarrow'")
    return table.combine_chunks()


def _column(table: Any, name: str) -> Any:
    """One array."""
    if table.column_names.count(name) != 1:
        raise ValueError(
            f"expected one column {name!r}, got the columns {', '.join(table.column_names)}; name another, or rename it"
        )
    column = table.column(name).combine_chunks()
    return column.chunk(0) if hasattr(column, "num_chunks") else column


def _shape(kind: Any) -> tuple[int, ...] | None:
    """Of each row: of tensors (Arrow's own, and Ray's), fixed-size lists and numbers; None: the type does not tell."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(kind):
        return (kind.list_size,)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return ()
    permutation = list(getattr(kind, "permutation", None) or [])
    if permutation != sorted(permutation):
        raise ValueError(f"expected tensors whose axes lie in their order, got {kind}; store them row-major")
    shape = getattr(kind, "shape", None)
    return None if shape is None else tuple(shape)
