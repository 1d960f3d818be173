"""Rows come out of every kind of file as they were put in, in blocks, from any row on; what is wrong is said."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as parquet
import pytest
from safetensors.numpy import save_file

from pykd.scoring.formats import source
from pykd.scoring.formats.source import Memory
from pykd.scoring.sources import open_column, open_matrix

ROWS, CLASSES = 103, 7
DTYPES = ("float16", "float32", "float64")


def logits(dtype):
    return np.random.default_rng(1).normal(size=(ROWS, CLASSES)).astype(dtype)


def lists(array, kind):
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
    if kind == "tensor":
        return pa.FixedShapeTensorArray.from_numpy_ndarray(array)
    offsets = np.arange(len(array) + 1) * array.shape[1]
    if kind == "view":
        sizes = np.full(len(array), array.shape[1], np.int32)
        backwards = pa.array(array[::-1].reshape(-1))
        return pa.ListViewArray.from_arrays(offsets[:-1][::-1].astype(np.int32), sizes, backwards)
    if kind == "list":
        return pa.ListArray.from_arrays(offsets.astype(np.int32), pa.array(array.reshape(-1)))
    return pa.LargeListArray.from_arrays(offsets, pa.array(array.reshape(-1)))


def write_npy(path, array):
    np.save(path, array)
    return path


def write_npz(path, array):
    np.savez(path, other=np.arange(3), logits=array)
    return f"{path}#logits"


def write_compressed_npz(path, array):
    np.savez_compressed(path, array)
    return path


def write_safetensors(path, array):
    save_file({"other": np.arange(3), "logits": array}, path)
    return f"{path}#logits"


def write_big_endian(path, array):
    np.save(path, array.astype(array.dtype.newbyteorder(">")))
    return path


def parquet_of(kind):
    def write(path, array):
        table = pa.table({"id": np.arange(len(array)), "logits": lists(array, kind)})
        parquet.write_table(table, path, row_group_size=40)
        return path

    return write


def write_flat_parquet(path, array):
    columns = {f"logit_{i}": array[:, i] for i in range(array.shape[1])}
    parquet.write_table(pa.table({"id": np.arange(len(array)), **columns}), path, row_group_size=40)
    return f"{path}#logit_*"


def arrow_of(kind):
    def write(path, array):
        table = pa.table({"logits": lists(array, kind)})
        with ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=40)
        return path

    return write


WRITERS = {
    "npy": (".npy", write_npy),
    "npy-big-endian": (".npy", write_big_endian),
    "npz": (".npz", write_npz),
    "npz-compressed": (".npz", write_compressed_npz),
    "safetensors": (".safetensors", write_safetensors),
    "parquet-list": (".parquet", parquet_of("list")),
    "parquet-large-list": (".parquet", parquet_of("large")),
    "parquet-fixed": (".parquet", parquet_of("fixed")),
    "parquet-flat": (".parquet", write_flat_parquet),
    "arrow-list": (".arrow", arrow_of("list")),
    "arrow-fixed": (".arrow", arrow_of("fixed")),
    "arrow-view": (".arrow", arrow_of("view")),
    "arrow-tensor": (".arrow", arrow_of("tensor")),
    "parquet-tensor": (".parquet", parquet_of("tensor")),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WRITERS)
def test_rows_come_out_as_they_were_put_in(kind, dtype, tmp_path):
    ending, write = WRITERS[kind]
    array = logits(dtype)
    source = open_matrix(write(tmp_path / f"rows{ending}", array), "teacher")
    assert (source.rows, source.width, source.dtype) == (ROWS, CLASSES, np.dtype(dtype))
    for start, rows in ((0, 10), (0, ROWS), (37, 16), (40, 40), (102, 5), (ROWS, 4)):
        blocks = [load().values for load in source.blocks(start, rows)]
        assert all(len(block) == rows for block in blocks[:-1])
        got = np.concatenate([np.empty((0, CLASSES), dtype), *blocks])
        np.testing.assert_array_equal(got, array[start:])
        assert all(block.dtype == np.dtype(dtype) for block in blocks)


def test_bfloat16_is_read_as_the_same_float32(tmp_path):
    array = logits("float32").astype(ml_dtypes.bfloat16)
    save_file({"logits": array}, tmp_path / "rows.safetensors")
    source = open_matrix(tmp_path / "rows.safetensors", "teacher")
    np.testing.assert_array_equal(next(source.blocks(0, ROWS))().values, array.astype(np.float32))


def test_axes_before_the_last_are_rows(tmp_path):
    array = logits("float32")[:102].reshape(2, 51, CLASSES)
    np.save(tmp_path / "rows.npy", array)
    source = open_matrix(tmp_path / "rows.npy", "teacher")
    np.testing.assert_array_equal(next(source.blocks(0, 200))().values, array.reshape(-1, CLASSES))


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint16"])
def test_columns_of_whole_numbers(dtype, tmp_path):
    values = np.arange(20).astype(dtype)
    np.save(tmp_path / "labels.npy", values.reshape(4, 5))
    parquet.write_table(pa.table({"label": values, "other": values}), tmp_path / "labels.parquet")
    for where in (tmp_path / "labels.npy", f"{tmp_path}/labels.parquet#label"):
        source = open_column(where, "labels")
        np.testing.assert_array_equal(np.concatenate([load().values for load in source.blocks(3, 7)]), values[3:])


def test_groups_may_be_text(tmp_path):
    names = np.array(["b", "a", "a", "ü"])
    np.save(tmp_path / "group.npy", names)
    parquet.write_table(pa.table({"document": names.tolist()}), tmp_path / "group.parquet")
    for name in ("group.npy", "group.parquet"):
        source = open_column(tmp_path / name, "group", "iuU")
        assert next(source.blocks(0, 9))().values.tolist() == names.tolist()


def test_ragged_and_missing_rows_are_marked(tmp_path):
    rows = [[1.0, 2.0], [3.0], None, [4.0, 5.0], [6.0, 7.0, 8.0], [9.0, None]]
    parquet.write_table(pa.table({"logits": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "rows.parquet")
    source = open_matrix(tmp_path / "rows.parquet", "teacher")
    block = next(source.blocks(0, 10))()
    assert source.width == 2
    assert block.ragged.tolist() == [False, True, False, False, True, False]
    assert block.missing.tolist() == [False, False, True, False, False, False]
    np.testing.assert_array_equal(block.values[[0, 3]], [[1, 2], [4, 5]])
    np.testing.assert_array_equal(block.values[5], [9, np.nan])


def test_ragged_and_missing_rows_of_views_are_marked(tmp_path):
    rows = pa.array([[1.0, 2.0], [3.0], None, [4.0, 5.0]], pa.list_view(pa.float32()))
    table = pa.table({"logits": rows})
    with ipc.new_file(tmp_path / "rows.arrow", table.schema) as file:
        file.write_table(table)
    block = next(open_matrix(tmp_path / "rows.arrow", "teacher").blocks(1, 10))()
    assert (block.ragged.tolist(), block.missing.tolist()) == ([True, False, False], [False, True, False])
    np.testing.assert_array_equal(block.values[2], [4, 5])


def test_tensors_of_several_axes_are_refused_where_they_are_the_logits(tmp_path):
    array = logits("float32")
    images = lists(array.reshape(ROWS, 1, CLASSES), "tensor")
    parquet.write_table(pa.table({"image": images, "logits": lists(array, "list")}), tmp_path / "rows.parquet")
    source = open_matrix(tmp_path / "rows.parquet", "teacher")
    np.testing.assert_array_equal(next(source.blocks(0, ROWS))().values, array)
    parquet.write_table(pa.table({"logits": images}), tmp_path / "alone.parquet")
    for where in (tmp_path / "alone.parquet", f"{tmp_path}/rows.parquet#image"):
        with pytest.raises(ValueError, match=rf"got tensors of the axes \(1, {CLASSES}\); write .* as .npy"):
            open_matrix(where, "teacher")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_name_may_hold_any_bytes(kind, tmp_path):
    ending, write = WRITERS[kind]
    written, sign, name = str(write(tmp_path / f"rows{ending}", logits("float32"))).partition("#")
    odd = os.fsdecode(os.fsencode(written) + b"\xff" + ending.encode())
    os.rename(written, odd)
    assert next(open_matrix(f"{odd}{sign}{name}", "teacher").blocks(0, ROWS))().values.shape == (ROWS, CLASSES)


def broken(tmp_path, case):
    """A path, and what the message says of it."""
    path = tmp_path / case
    array = logits("float32")
    if case == "cut.npy":
        np.save(path, array)
        path.write_bytes(path.read_bytes()[:-3])
        return path, r"expected 3012 bytes .*, got 3009: it is cut off"
    if case == "cut.npz":
        np.savez(path, array)
        path.write_bytes(path.read_bytes()[:-30])
        return path, "it is cut off"
    if case == "cut.safetensors":
        save_file({"logits": array}, path)
        path.write_bytes(path.read_bytes()[:-3])
        return path, "it is cut off"
    if case == "cut.parquet":
        parquet.write_table(pa.table({"logits": lists(array, "list")}), path)
        path.write_bytes(path.read_bytes()[:-3])
        return path, "to be a whole Parquet file"
    if case == "cut.arrow":
        arrow_of("list")(path, array)
        path.write_bytes(path.read_bytes()[:-3])
        return path, "to be a whole Arrow file"
    if case == "mixed.parquet":
        parquet.write_table(pa.table({"a": array[:, 0], "b": array[:, 1].astype(np.float64)}), path)
        return path, r"expected one type for all columns of .*, got double \(b\), float \(a\)"
    if case == "no_such_column.parquet":
        parquet.write_table(pa.table({"logits": lists(array, "list")}), path)
        return f"{path}#scores", r"got no column 'scores' \(there: logits\); write it after the path, as in .*#logits"
    if case == "two_arrays.npz":
        np.savez(path, teacher=array, student=array)
        return path, r"expected one array of .*, got 2 \(there: teacher, student\)"
    if case == "column_major.npy":
        np.save(path, np.asfortranarray(array))
        return path, "in row-major order, got column-major"
    if case == "whole_numbers.npy":
        np.save(path, array.astype(int))
        return path, "expected floating-point logits .*, got int64"
    if case == "negative.npy":
        np.save(path, array)
        path.write_bytes(path.read_bytes().replace(b"(103, 7)", b"(-10, 7)"))
        return path, r"expected lengths from 0 in .*, got \(-10, 7\)"
    if case == "one_axis.npy":
        np.save(path, array[:, 0])
        return path, r"shape \(rows, classes\), got \(103,\)"
    if case == "objects.npy":
        np.save(path, np.array([[None]], object), allow_pickle=True)
        return path, "expected numbers in .*, got object"
    if case == "text.npy":
        path.write_text("1 2 3 4 5 6 7 8\n")
        return path, "got a file that begins with b'1 2 3 4 '"
    if case == "no_rows.npy":
        np.save(path, array[:0])
        return path, "expected at least one row and one class .*, got 0 rows of 7; pass another file"
    if case == "longdouble.npy":
        np.save(path, array.astype(np.longdouble))
        return path, "expected numbers in .*, got float(96|128); convert them to float16, float32, float64"
    if case == "one_name.parquet":
        parquet.write_table(pa.table([lists(array, "list")] * 2, names=["a", "a"]), path)
        return f"{path}#a", "expected one column 'a' in .*, got several of this name; rename them"
    if case == "places.safetensors":
        header = b'{"x": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0.0, 8.0]}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        return path, "expected a tensor of F16, F32"
    if case == "header.safetensors":
        path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
        return path, "whose header does not fit"
    assert case == "folder"
    path.mkdir()
    return path, "in a regular file"


@pytest.mark.parametrize(
    "case",
    ["cut.npy", "cut.npz", "cut.safetensors", "cut.parquet", "cut.arrow", "mixed.parquet", "no_such_column.parquet",
     "two_arrays.npz", "column_major.npy", "whole_numbers.npy", "negative.npy", "one_axis.npy", "objects.npy", "text.npy", "no_rows.npy",
     "longdouble.npy", "one_name.parquet", "places.safetensors", "header.safetensors", "folder"],
)  # fmt: skip
def test_what_is_wrong_is_seen_when_the_file_is_opened(case, tmp_path):
    where, message = broken(tmp_path, case)
    with pytest.raises(ValueError, match=message):
        open_matrix(where, "teacher")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the teacher at .*nowhere.npy, got no file"):
        open_matrix(tmp_path / "nowhere.npy", "teacher")


def test_blocks_are_whole_parts_of_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_MOST_ROWS", 27)
    opened = []
    for rows in (40, 60, 7):
        table = pa.table({"logits": lists(logits("float32"), "list")})
        parquet.write_table(table, tmp_path / f"{rows}.parquet", row_group_size=rows)
        opened.append(open_matrix(tmp_path / f"{rows}.parquet", "teacher"))
    np.save(tmp_path / "logits.npy", logits("float32"))
    flat = open_matrix(tmp_path / "logits.npy", "student")
    assert source.block_rows(flat) == 27
    assert source.block_rows(opened[0], flat) == 20 == source.block_rows(*opened[:2])
    assert source.block_rows(opened[2], flat) == 27, "groups that are smaller than half a block"


def test_damage_inside_a_row_group_names_it(tmp_path):
    path = tmp_path / "rows.parquet"
    array = np.random.default_rng(0).normal(size=(4000, CLASSES)).astype(np.float32)
    parquet.write_table(pa.table({"logits": lists(array, "list")}), path, row_group_size=2000, compression="zstd")
    data = bytearray(path.read_bytes())
    middle = len(data) * 3 // 4
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(data)
    source = open_matrix(path, "teacher")
    with pytest.raises(ValueError, match="in row group 1; write it again"):
        list(source.blocks(0, 100))


def test_lists_of_a_damaged_arrow_file_are_not_followed(tmp_path):
    """Their offsets may lead out of the file, and out of memory."""
    path = tmp_path / "rows.arrow"
    array = logits("float32")
    table = pa.table({"logits": lists(array, "list")})
    with ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    offsets = np.arange(0, array.size + 1, CLASSES, dtype=np.int32).tobytes()
    data = path.read_bytes()
    assert data.count(offsets) == 1
    for wrong in (-(2**30), 2**30):
        moved = np.frombuffer(offsets, np.int32).copy()
        moved[50] = wrong
        path.write_bytes(data.replace(offsets, moved.tobytes()))
        with pytest.raises(ValueError, match="expected the teacher .* to be whole, got .* in record batch 0; write it"):
            open_matrix(path, "teacher")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    np.save(tmp_path / "rows.npy", logits("float32"))
    source = open_matrix(tmp_path / "rows.npy", "teacher")
    loads = list(source.blocks(0, 50))
    (tmp_path / "rows.npy").write_bytes((tmp_path / "rows.npy").read_bytes()[:2000])
    loads[0]()
    with pytest.raises(ValueError, match="got its end at row 66"):
        loads[1]()


READ = """
import resource, sys
from pykd.scoring.sources import open_matrix
source = open_matrix(sys.argv[1], "teacher")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(len(load().values) for load in source.blocks(0, 500))
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["npy", "npz-compressed", "safetensors", "parquet-list", "parquet-fixed", "arrow-list"]
)
def test_memory_does_not_grow_with_the_file(kind, tmp_path):
    """200 MB of logits, in one row group or array, are read within 100 MB."""
    ending, write = WRITERS[kind]
    array = np.random.default_rng(0).integers(0, 9, size=(50_000, 1000)).astype(np.float32)
    if kind == "npz-compressed":
        array[:] = 1  # which is compressed fast
    if kind.startswith("parquet"):
        where = tmp_path / "rows.parquet"
        parquet.write_table(pa.table({"logits": lists(array, kind.removeprefix("parquet-"))}), where)
    elif kind.startswith("arrow"):
        where = tmp_path / "rows.arrow"
        table = pa.table({"logits": lists(array, "fixed")})
        with ipc.new_file(where, table.schema) as file:
            file.write_table(table)
    else:
        where = write(tmp_path / f"rows{ending}", array)
    done = subprocess.run([sys.executable, "-c", READ, str(where)], capture_output=True, text=True, check=True)
    rows, megabytes = map(int, done.stdout.split())
    assert rows == len(array)
    assert megabytes < 100, f"{megabytes} MB"


@pytest.mark.parametrize("length", ["1e400", "NaN", "null", "[2]"])
def test_a_length_that_is_no_number_is_told(tmp_path, length):
    header = f'{{"x": {{"dtype": "F32", "shape": [1, {length}], "data_offsets": [0, 8]}}}}'.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"expected a tensor of F16, .* convert it"):
        open_matrix(path, "teacher")


def test_memory_is_written_again_when_nobody_holds_it():
    memory, dtype = Memory(), np.dtype(np.float32)
    first = memory.empty((4, 3), dtype)
    address = first.ctypes.data
    assert first.shape == (4, 3) and first.dtype == dtype
    row = first[2]  # a view holds it, too
    row[:] = 7
    del first
    second = memory.empty((4, 3), dtype)
    second[:] = 1
    assert second.ctypes.data != address and (row == 7).all()
    del row
    assert memory.empty((2, 5), np.dtype(np.int16)).ctypes.data == address
    assert memory.empty((3,), dtype).ctypes.data == address


def test_blocks_that_are_kept_keep_their_rows(tmp_path):
    """Whoever holds a block holds its memory: the next one is read beside it."""
    rows = np.arange(60, dtype=np.float32).reshape(20, 3)
    np.save(tmp_path / "rows.npy", rows)
    held = [load().values for load in open_matrix(tmp_path / "rows.npy", "teacher").blocks(0, 4)]
    np.testing.assert_array_equal(np.concatenate(held), rows)
