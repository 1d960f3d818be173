"""Scores of tables: those of one machine, whatever the tables are cut into."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as parquet
import pytest
from onnx import TensorProto, helper, numpy_helper

from pykd.scoring import tables
from pykd.scoring.formats.columns import block_of_column
from pykd.scoring.merge import merge
from pykd.scoring.sessions import Sessions
from pykd.scoring.stream import score_files
from pykd.scoring.tables import LogitScorer, ModelScorer

ROWS, WIDTH, CLASSES = 57, 6, 5


def logits(dtype=np.float32):
    """A table of logits with rows that do not count, and the files of the same rows."""
    rng = np.random.default_rng(1)
    teacher = rng.normal(size=(ROWS, CLASSES)).astype(dtype)
    student = (teacher + rng.normal(size=teacher.shape)).astype(dtype)
    student[3, 1], teacher[20, 2], student[40] = np.nan, np.inf, -np.inf
    labels = rng.integers(0, CLASSES, ROWS)
    labels[[5, 6]] = -100, CLASSES
    np.save("teacher.npy", teacher)
    np.save("student.npy", student)
    np.save("labels.npy", labels)
    kind = pa.list_(pa.from_numpy_dtype(teacher.dtype), CLASSES)
    sides = {f"{name}_logits": pa.FixedSizeListArray.from_arrays(values.reshape(-1), type=kind)
             for name, values in (("teacher", teacher), ("student", student))}  # fmt: skip
    return pa.table({"row": pa.array(range(ROWS)), **sides, "labels": labels})


def in_pieces(scorer, table, size):
    """As several workers would see it, the last piece first; the rows in order again."""
    pieces = [scorer(table.slice(first, size)) for first in range(0, len(table), size)]
    return pa.concat_tables(pieces[::-1], promote_options="default").combine_chunks().sort_by("row")


def same(got, want):
    """Equal to the bit, and of equal types."""
    assert got.schema.equals(want.schema.remove_metadata())
    assert got.unify_dictionaries().equals(want.unify_dictionaries().replace_schema_metadata(None))


def alike(got, want):
    """Equal but for the last bits, which models let depend on how many rows there are."""
    scores = [got.column_names.index(name) for name in got.column_names if name.endswith("_per_sample")]
    for place in scores:
        np.testing.assert_allclose(*(table.column(place).to_numpy() for table in (got, want)), rtol=1e-6)
    same(*(table.drop_columns([table.column_names[place] for place in scores]) for table in (got, want)))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 7, ROWS])
def test_logits_score_as_files_of_them_do(dtype, size):
    table = logits(dtype)
    losses = ("kl", "jsd")
    score_files("teacher.npy", "student.npy", "o.parquet", losses, labels="labels.npy", temperature=2.0, classes=4)
    want = parquet.read_table("o.parquet")
    assert set(want["status"].to_pylist()) == {"ok", "nan", "infinite", "ignored", "label_out_of_range"}
    same(in_pieces(LogitScorer(losses, labels="labels", temperature=2.0, classes=4), table, size), want)


def test_tensors_in_another_order_of_axes_are_refused():
    kind = pa.fixed_shape_tensor(pa.float32(), (2, 3), permutation=[1, 0])
    with pytest.raises(ValueError, match=r"expected tensors whose axes lie in their order, got .*permutation=\[1,0\]"):
        tables._shape(kind)
    assert tables._shape(pa.fixed_shape_tensor(pa.float32(), (2, 3), permutation=[0, 1])) == (2, 3)


def test_a_table_without_rows_has_no_scores():
    table, score = logits(), LogitScorer(labels="labels")
    for none in (table.slice(3, 0), table.slice(0, 0).combine_chunks()):
        same(score(none), score(table).slice(0, 0))


def test_inputs_are_read_where_they_lie_and_never_written():
    """In a file that is mapped to be read: to write there would end the process."""
    with ipc.new_file("rows.arrow", logits().schema) as file:
        file.write_table(logits())
    with pa.memory_map("rows.arrow") as memory:
        mapped = ipc.open_file(memory).read_all()
        same(LogitScorer(labels="labels")(mapped), LogitScorer(labels="labels")(logits()))
        column = mapped["teacher_logits"].combine_chunks()
        block = block_of_column(column, CLASSES, "it")
        assert np.shares_memory(block.values, np.frombuffer(column.values.buffers()[1], np.float32))
        assert not block.values.flags.writeable


def test_lists_and_tensors_are_rows_of_logits():
    table = logits()
    want = LogitScorer()(table)
    side = {name: table[f"{name}_logits"].combine_chunks() for name in ("teacher", "student")}
    flat = {name: np.asarray(column.values) for name, column in side.items()}
    tensors = {
        name: pa.FixedShapeTensorArray.from_numpy_ndarray(values.reshape(-1, CLASSES)) for name, values in flat.items()
    }
    same(
        LogitScorer(teacher="t", student="s")(
            pa.table({"row": table["row"], "t": tensors["teacher"], "s": tensors["student"]})
        ),
        want,
    )
    lists = {name: column.cast(pa.list_(pa.float32())) for name, column in side.items()}
    table = pa.table({"row": table["row"], "teacher_logits": lists["teacher"], "student_logits": lists["student"]})
    same(in_pieces(LogitScorer(widths=CLASSES), table, 4), want)
    with pytest.raises(ValueError, match=r"got list<.*>; pass widths="):
        LogitScorer()(table)
    short = pa.array([[1.0] * CLASSES, [1.0, 2.0], None, [1.0] * CLASSES], pa.list_(pa.float32()))
    rows = pa.array(["a", "b", "c", "d"])
    got = LogitScorer(widths=(CLASSES, CLASSES))(
        pa.table({"row": rows, "teacher_logits": short, "student_logits": short})
    )
    assert got.select(["row", "status", "kl"]).to_pydict() == {
        "row": ["a", "b", "c", "d"], "status": ["ok", "ragged", "missing", "ok"], "kl": [0.0, None, None, 0.0],
    }  # fmt: skip


def test_rows_are_told_by_the_columns_that_are_named():
    table = logits().append_column("file", pa.array(["f"] * ROWS)).append_column("note", pa.array(range(ROWS)))
    got = LogitScorer(row=("file", "row"), keep=["note"])(table)
    assert got.column_names[:4] == ["file", "row", "note", "status"]
    with pytest.raises(ValueError, match="got the columns row, teacher_logits"):
        LogitScorer(row="id")(table)
    with pytest.raises(ValueError, match="differ from each other and from the scores, got row, kl, status"):
        LogitScorer(keep=["kl"])(table.append_column("kl", pa.array(range(ROWS))))
    with pytest.raises(TypeError, match="batch_format='pyarrow'"):
        LogitScorer()({"row": np.arange(3)})
    with pytest.raises(
        ValueError, match="expected lists or tensors of floating-point logits in the column 'row', got int64"
    ):
        LogitScorer(teacher="row")(table)


# ---- Models -----------------------------------------------------------------------------------------


def model(path, seed, length=WIDTH):
    """Logits out of the squares' sum times weights of a row, and a number of the row's own."""
    rng = np.random.default_rng(seed)
    nodes = [
        helper.make_node("ReduceSumSquare", ["pixels"], ["sum"], axes=[1], keepdims=1),
        helper.make_node("Unsqueeze", ["shift", "one"], ["shifts"]),
        helper.make_node("Add", ["sum", "shifts"], ["moved"]),
        helper.make_node("Mul", ["moved", "weights"], ["logits"]),
    ]
    weights = numpy_helper.from_array(rng.normal(size=(1, CLASSES)).astype(np.float32), "weights")
    graph = helper.make_graph(
        nodes, "model",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", length]),
         helper.make_tensor_value_info("shift", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])],
        [weights, numpy_helper.from_array(np.array([1]), "one")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def loss(per_sample):
    return per_sample("soft")


def inputs(**more):
    rng = np.random.default_rng(4)
    pixels = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    shift = rng.normal(size=ROWS).astype(np.float32)
    columns = {
        "row": pa.array(range(ROWS)),
        "pixels": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels),
        "shift": shift,
    }
    return pa.table(columns | more), pixels, shift


def test_models_score_as_one_file_and_as_three(loss):
    teacher, student = model("teacher.onnx", 0), model("student.onnx", 1)
    table, pixels, shift = inputs()
    want = Sessions(teacher, student, loss)({"pixels": pixels, "shift": shift})["loss_per_sample"]
    merge(teacher, student, loss, "scorer.onnx")
    for arguments in ({"scorer": "scorer.onnx"}, {"teacher": teacher, "student": student, "loss": loss}):
        for kernels in (True, False):
            scorer = ModelScorer(**arguments, kernels=kernels)
            whole = scorer(table)
            assert whole.column_names == ["row", "status", "loss_per_sample"]
            np.testing.assert_allclose(whole["loss_per_sample"].to_numpy(), want, rtol=1e-6)
            for size in (1, 7):
                alike(in_pieces(scorer, table, size), whole)
        warmer = ModelScorer(**arguments, parameters={"temperature": 4.0})(table)["loss_per_sample"].to_numpy()
        feeds = {"pixels": pixels, "shift": shift, "temperature": np.array(4.0, np.float32)}
        np.testing.assert_allclose(warmer, Sessions(teacher, student, loss)(feeds)["loss_per_sample"], rtol=1e-6)


def test_rows_that_cannot_be_scored_say_why(loss):
    merge(model("teacher.onnx", 0), model("student.onnx", 1), loss, "scorer.onnx")
    table, _, shift = inputs()
    shift = [*shift.tolist()[:-4], 1e300, None, float("nan"), float("inf")]  # of which float32 does not hold the first
    scorer = ModelScorer("scorer.onnx", columns={"pixels": "image"}, keep=["shift"])
    table = table.set_column(2, "shift", pa.array(shift, pa.float64())).rename_columns(["row", "image", "shift"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = scorer(table)
    assert got["status"].to_pylist() == ["ok"] * (ROWS - 4) + ["infinite", "missing", "nan", "nan"]
    assert got["loss_per_sample"].null_count == 4
    lists = table["image"].combine_chunks().storage.cast(pa.list_(pa.float32())).to_pylist()
    lists[0], lists[1], lists[2] = [1.0], None, [None] * WIDTH
    again = scorer(table.set_column(1, "image", pa.array(lists, pa.list_(pa.float32()))))
    assert again["status"].to_pylist()[:4] == ["ragged", "missing", "missing", "ok"]
    alike(*(table.slice(3).drop_columns("shift") for table in (again, got)))  # it holds NaN
    short = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((ROWS, WIDTH - 1), np.float32))
    assert set(scorer(table.set_column(1, "image", short))["status"].to_pylist()) == {"ragged", "missing"}
    assert scorer(table.slice(0, 0)).num_rows == 0


def test_lists_of_several_lengths_run_without_padding(loss):
    merge(model("teacher.onnx", 0, "long"), model("student.onnx", 1, "long"), loss, "scorer.onnx")
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=length).astype(np.float32) for length in (3, 1, 4, 1, 3, 9)]
    table = pa.table({"row": range(6), "pixels": rows, "shift": np.zeros(6, np.float32)})
    session = onnxruntime.InferenceSession("scorer.onnx")
    want = [session.run(None, {"pixels": row[None], "shift": np.zeros(1, np.float32)})[0][0] for row in rows]
    np.testing.assert_allclose(ModelScorer("scorer.onnx")(table)["loss_per_sample"].to_numpy(), want, rtol=1e-6)
    alike(in_pieces(ModelScorer("scorer.onnx"), table, 2), ModelScorer("scorer.onnx")(table))


def test_what_does_not_fit_is_said(loss):
    merge(model("teacher.onnx", 0), model("student.onnx", 1), loss, "scorer.onnx")
    table, _, shift = inputs()
    three = {"scorer": None, "teacher": "teacher.onnx", "student": "student.onnx", "loss": loss}

    def fails(error, match, table=table, **arguments):
        with pytest.raises(error, match=match):
            ModelScorer(**{"scorer": "scorer.onnx"} | arguments)(table)

    fails(ValueError, "got neither the one nor the three", teacher="teacher.onnx")
    fails(ValueError, "got neither the one nor the three", scorer=None, teacher="teacher.onnx")
    fails(FileNotFoundError, "`pykd merge` writes one", scorer="none.onnx")
    fails(ValueError, "inputs pixels, shift, got one for image", columns={"image": "pixels"})
    fails(ValueError, r"parameters of the loss \(temperature\), got 'tau'", parameters={"tau": 1.0})
    for number, got in ((0.0, "0"), (-2.0, "-2"), (1e-50, "1e-50, which is 0 in float32")):
        refused = f"expected temperature above 0, got {got}; correct parameters="
        fails(ValueError, refused, parameters={"temperature": number})
        fails(ValueError, refused, **three, parameters={"temperature": number})
    fails(ValueError, r"a finite number for temperature, got 1e\+50 \(float32: inf\)", parameters={"temperature": 1e50})
    with pytest.raises(ValueError, match="expected a temperature above 0 .* got 1e-40; correct temperature="):
        LogitScorer(temperature=1e-40)
    fails(
        ValueError,
        "expected numbers, lists of them or tensors in the column of shift, got string",
        table.set_column(2, "shift", pa.array(["a"] * ROWS)),
    )
    fails(
        ValueError,
        r"rows of the column of pixels with the shape \[6\], got float",
        table.set_column(1, "pixels", pa.array(shift)),
    )
    fails(ValueError, "a column that says which row it is, got none", row=())


def test_a_worker_imports_neither_torch_nor_onnx():
    parquet.write_table(logits(), "rows.parquet")
    program = (
        "import sys, pyarrow.parquet as parquet; from pykd.scoring.tables import LogitScorer\n"
        "assert LogitScorer()(parquet.read_table('rows.parquet', memory_map=True)).num_rows\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'ray'} & sys.modules.keys(), 'a heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def example():
    """The program of docs/scoring.md, the rows that it reads, and the scores that it should write."""
    text = (Path(__file__).parents[1] / "docs" / "scoring.md").read_text(encoding="utf-8")
    table = logits().rename_columns(["row", "teacher_logits", "student_logits", "label"])
    table = table.append_column("file", pa.array(["a"] * ROWS))
    parquet.write_table(table, "rows.parquet", row_group_size=10)
    want = LogitScorer(("kl", "jsd"), labels="label", row=("file", "row"))(table)
    return text.split("<!-- pykd:ray -->\n```python\n")[1].split("```")[0], want


def test_the_example_of_the_docs_runs(monkeypatch):
    """With a stand-in for Ray, which cuts tables up and makes the scorer from its arguments."""

    class DataSet:
        def __init__(self, parts):
            self.parts = parts

        def map_batches(self, kind, *, fn_constructor_kwargs, batch_format, batch_size, compute):
            assert batch_format == "pyarrow" and batch_size > 0 and compute == 2
            scorer = kind(**fn_constructor_kwargs)
            return DataSet([scorer(part) for part in self.parts])

        def write_parquet(self, folder):
            os.mkdir(folder)
            for place, part in enumerate(self.parts):
                parquet.write_table(part, f"{folder}/{place}.parquet")

    def read_parquet(path):
        file = parquet.ParquetFile(path)
        return DataSet([file.read_row_group(group) for group in range(file.num_row_groups)])

    data = SimpleNamespace(read_parquet=read_parquet, ActorPoolStrategy=lambda size: size)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(data=data))
    program, want = example()
    exec(program, {})
    same(parquet.read_table("scores").combine_chunks().sort_by("row"), want)


# ---- Ray --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_scores_every_row_once_though_a_worker_is_killed():
    """`pip install 'pykd[ray]'` brings Ray; with 325 MB and a minute to start it is too much for the test environment."""
    ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'pykd[ray]'")
    rows = 40 * ROWS
    table = pa.concat_tables([logits()] * 40).set_column(0, "row", pa.array(range(rows))).combine_chunks()
    want = LogitScorer(("kl", "jsd"), labels="labels")(table)

    class Mortal(LogitScorer):
        """The first worker that has scored dies of it."""

        def __call__(self, batch):
            import signal

            scores = super().__call__(batch)
            try:
                os.close(os.open(self.killed, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return scores.append_column("torch", pa.array(["torch" in sys.modules] * len(scores)))
            return os.kill(os.getpid(), signal.SIGKILL)

    killed = os.path.abspath("killed")
    Mortal.killed = killed
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=100 << 20)
    try:
        scored = ray.data.from_arrow([table.slice(i, rows // 10) for i in range(0, rows, rows // 10)]).map_batches(
            Mortal,
            fn_constructor_kwargs={"losses": ("kl", "jsd"), "labels": "labels"},
            batch_format="pyarrow",
            batch_size=97,
            compute=ray.data.ActorPoolStrategy(size=2),
        )
        parts = [ray.get(part) for part in scored.to_arrow_refs()]
        program, documented = example()
        exec(program, {})
    finally:
        ray.shutdown()
    assert os.path.exists(killed)
    got = pa.concat_tables(parts, promote_options="default").combine_chunks().sort_by("row")
    assert not any(got["torch"].to_pylist())
    same(got.drop_columns("torch"), want)
    same(parquet.read_table("scores").combine_chunks().sort_by("row"), documented)
