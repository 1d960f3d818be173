"""`pykd teacher`: what is written comes back, damage is seen, and scores against it are those of the definitions."""

import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as parquet
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from pykd.command_line import main
from pykd.scoring.container import Reader
from pykd.scoring.results import Scores
from pykd.scoring.sources import open_matrix
from pykd.scoring.statistics import summary
from pykd.scoring.stream import score_files
from pykd.scoring.teacher import write_full, write_hidden, write_top_k
from pykd.scoring.whole_file import WholeFile

ROWS, CLASSES, KEPT = 230, 40, 6
LOSSES = ("kl", "reverse_kl", "symmetric_kl", "jsd", "cross_entropy")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def draw(dtype=np.float32, rows=ROWS, classes=CLASSES):
    rng = np.random.default_rng(3)
    teacher = 3 * rng.normal(size=(rows, classes))
    student = (teacher + rng.normal(size=teacher.shape)).astype(dtype)
    teacher = teacher.astype(dtype)
    np.save("teacher.npy", teacher)
    np.save("student.npy", student)
    np.save("labels.npy", (teacher + rng.gumbel(size=teacher.shape)).argmax(axis=1))
    return teacher, student


def log_sum(row):
    row = np.asarray(row, np.float64)
    return row.max() + np.log(np.exp(row - row.max()).sum()) if len(row) else -np.inf


def top_k(row, kept, temperature=1.0):
    """Classes, log-probabilities, log of the mass of the others, lse, from the definition."""
    row = row.astype(np.float64)
    order = sorted(range(len(row)), key=lambda c: (-row[c], c))
    lse = log_sum(row / temperature)
    ids = order[:kept]
    return ids, [row[c] / temperature - lse for c in ids], log_sum(row[order[kept:]] / temperature) - lse, lse


def write(out="t.safetensors", kept=KEPT, **options):
    write_top_k(open_matrix("teacher.npy", "teacher"), out, kept, **options)
    return out


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_top_of_each_row_is_written(dtype):
    teacher, _ = draw(dtype)
    teacher[0] = 0  # all equal: the lowest classes are kept
    teacher[1, [1, 3, 9, 20, 30, 31, 32]] = [12, *[9] * 5, 12]
    teacher[2, :30] = -np.inf
    teacher[3, 0] = 60  # a tail of 1e-24, which 1 − Σp would not tell
    np.save("teacher.npy", teacher)
    tensors = load_file(write(temperatures=(2.5,), dtype="float32", threads=2))  # by the library of the format
    assert {name: str(tensors[name].dtype) for name in ("ids", "logprobs", "log_tail", "lse")} == {
        "ids": "int32", "logprobs": "float32", "log_tail": "float32", "lse": "float32"
    }  # fmt: skip
    for i, row in enumerate(teacher):
        for place, temperature in enumerate((1.0, 2.5)):
            ids, log_probs, log_tail, lse = top_k(row, KEPT, temperature)
            assert tensors["ids"][i].tolist() == ids
            if temperature == 1:
                np.testing.assert_allclose(tensors["logprobs"][i], log_probs, rtol=1e-6, atol=2e-6)
            np.testing.assert_allclose(tensors["log_tail"][i, place], log_tail, rtol=1e-6, atol=2e-6)
            np.testing.assert_allclose(tensors["lse"][i, place], lse, rtol=1e-6, atol=2e-6)


def test_raw_logits_come_back_on_the_support():
    teacher, _ = draw()
    tensors = load_file(write(dtype="float32"))
    got = tensors["logprobs"] + tensors["lse"][:, :1]
    np.testing.assert_allclose(got, np.take_along_axis(teacher, tensors["ids"].astype(int), axis=1), atol=5e-6)


def test_log_probabilities_are_float16_unless_asked_otherwise():
    teacher, _ = draw()
    teacher[0, 1] = -1e6  # in no top K but one of all classes, and not to become −inf
    np.save("teacher.npy", teacher)
    stored = load_file(write(kept=CLASSES))["logprobs"]
    assert stored.dtype == np.float16
    assert stored[0, -1] == np.finfo(np.float16).min
    exact = load_file(write(kept=CLASSES, dtype="float32"))["logprobs"]
    np.testing.assert_allclose(stored[1:].astype(float), exact[1:], rtol=2**-11 + 1e-6)


def joined(row, ids, temperature):
    """Log-probabilities of some classes, and of all others together."""
    row = row.astype(np.float64) / temperature
    others = np.delete(row, ids)
    return np.append(row[ids], log_sum(others)) - log_sum(row)


def expected_loss(name, log_p, log_q):
    """Of one row, a class at a time."""
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.log((p + q) / 2)

    def divergence(a, log_a, log_b):
        return sum(x * (y - z) for x, y, z in zip(a, log_a, log_b, strict=True) if x > 0)

    return {
        "kl": divergence(p, log_p, log_q),
        "reverse_kl": divergence(q, log_q, log_p),
        "symmetric_kl": (divergence(p, log_p, log_q) + divergence(q, log_q, log_p)) / 2,
        "jsd": (divergence(p, log_p, log_m) + divergence(q, log_q, log_m)) / 2,
        "cross_entropy": -sum(x * y for x, y in zip(p, log_q, strict=True) if x > 0),
    }[name]


def column(scores, name):
    return np.concatenate([block[name] for block in scores.blocks(name)])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_losses_are_those_with_the_other_classes_joined(dtype, temperature):
    teacher, student = draw(dtype)
    write(temperatures=(2.5,), dtype="float32")
    scores = score_files(
        "t.safetensors", "student.npy", "s.parquet", LOSSES, labels="labels.npy", temperature=temperature
    )
    bounds = {name: column(scores, f"{name}_lower_bound") for name in LOSSES}
    full = score_files("teacher.npy", "student.npy", "f.parquet", LOSSES, temperature=temperature)
    for name, got in bounds.items():
        expected = []
        for t, s in zip(teacher, student, strict=True):
            ids = top_k(t, KEPT)[0]
            expected.append(expected_loss(name, joined(t, ids, temperature), joined(s, ids, temperature)))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert (got <= column(full, name) + 2e-6).all(), "a lower bound"
        assert (got < column(full, name) - 1e-3).any(), "which is not the loss itself"


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_logits_far_from_zero_have_the_losses_of_their_differences(temperature):
    teacher, student = draw()
    offset = np.float32(2**20)
    teacher, student = (
        np.round(64 * x / 8).astype(np.float32) / 8 for x in (teacher, teacher + 0.02 * (student - teacher))
    )
    bounds = []
    for add in (0, offset):
        np.save("teacher.npy", teacher + add)  # exact: all are multiples of an eighth
        np.save("student.npy", student + add)
        write(temperatures=(temperature,), dtype="float32")
        scores = score_files("t.safetensors", "student.npy", "s.parquet", LOSSES, temperature=temperature)
        bounds.append([column(scores, f"{name}_lower_bound") for name in LOSSES])
    np.testing.assert_allclose(bounds[1], bounds[0], rtol=1e-5, atol=1e-6)


def test_what_does_not_hang_on_the_other_classes_is_the_same():
    _, student = draw()
    np.save("student.npy", np.round(student))  # ties: the first one wins
    score_files(write(), "student.npy", "s.parquet", labels="labels.npy")
    score_files("teacher.npy", "student.npy", "f.parquet", labels="labels.npy")
    got, expected = Scores("s.parquet"), Scores("f.parquet")
    for name in ("teacher_class", "student_class", "teacher_class_rank", "label"):
        np.testing.assert_array_equal(column(got, name), column(expected, name))
    np.testing.assert_allclose(column(got, "student_nll"), column(expected, "student_nll"), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(column(got, "student_confidence"), column(expected, "student_confidence"), rtol=2e-6)
    np.testing.assert_allclose(column(got, "teacher_confidence"), column(expected, "teacher_confidence"), atol=6e-4)
    one, two = summary(got), summary(expected)
    for part in ("agreement", "accuracy"):
        assert one[part] == two[part]
    np.testing.assert_allclose(
        one["calibration_error"]["teacher"]["value"], two["calibration_error"]["teacher"]["value"], atol=6e-4
    )


def test_with_all_classes_kept_it_is_the_loss_itself():
    draw()
    bound = column(score_files(write(kept=CLASSES, dtype="float32"), "student.npy", "s.parquet"), "kl_lower_bound")
    np.testing.assert_allclose(bound, column(score_files("teacher.npy", "student.npy", "f.parquet"), "kl"), atol=2e-6)


def test_the_report_says_what_is_left_out_and_why(capsys):
    draw()
    write()
    call = [
        "score",
        "--teacher",
        "t.safetensors",
        "--student",
        "student.npy",
        "--labels",
        "labels.npy",
        "--out",
        "s.parquet",
    ]
    assert main([*call, "--json", "r.json", "--report", "r.html", "--fail-if", "kl_lower_bound.mean > 9"]) == 0
    report = json.loads(Path("r.json").read_text())
    left_out = {
        "kl",
        "teacher_nll",
        "label_probability_change",
        "perplexity.teacher",
        "perplexity.student_over_teacher",
    }
    assert report["left_out"].keys() == left_out
    assert report["scores"].keys() & left_out == set()
    assert list(report["perplexity"]) == ["student"]
    assert report["inputs"]["teacher"]["written"]["vocabulary"] == CLASSES
    assert (
        "left out: kl (the teacher's file has its top K alone; kl_lower_bound is not above it)"
        in capsys.readouterr().out
    )
    assert "kl_lower_bound is not above it" in Path("r.html").read_text()


def test_bad_rows_are_counted_by_kind():
    teacher, student = draw()
    teacher[0, 1], teacher[1, 2], teacher[2], teacher[3, 5], student[4, 5] = np.nan, np.inf, -np.inf, -np.inf, np.nan
    student[5, 3], student[6] = np.inf, -np.inf
    student[7, teacher[7].argmax()] = -np.inf
    np.save("teacher.npy", teacher)
    np.save("student.npy", student)
    labels = np.load("labels.npy")
    labels[8], labels[9] = CLASSES, -100
    np.save("labels.npy", labels)
    report = summary(score_files(write(), "student.npy", "s.parquet", labels="labels.npy"))
    full = summary(score_files("teacher.npy", "student.npy", "f.parquet", labels="labels.npy"))
    assert report["bad_rows"] == full["bad_rows"]
    assert report["bad_rows"]["nan"] == 2 and report["bad_rows"]["infinite"] == 4


def test_rows_that_were_ragged_or_missing_stay_so():
    rows = [[3.0, 1.0, 2.0], [1.0], None, [1.0, 2.0, 3.0]]
    parquet.write_table(pa.table({"logits": pa.array(rows, pa.list_(pa.float32()))}), "teacher.parquet")
    np.save("student.npy", np.ones((4, 3), np.float32))
    write_top_k(open_matrix("teacher.parquet", "teacher"), "t.safetensors", 2)
    bad = summary(score_files("t.safetensors", "student.npy", "s.parquet"))["bad_rows"]
    assert {kind: count for kind, count in bad.items() if count} == {"ragged": 1, "missing": 1}


def test_padding_of_the_vocabulary_is_left_out():
    teacher, student = draw()
    teacher[:, 35:] = 20
    np.save("teacher.npy", teacher)
    np.save("student.npy", student[:, :35])
    scores = score_files(write(classes=35, dtype="float32"), "student.npy", "s.parquet")
    expected = [
        expected_loss("kl", joined(t, top_k(t, KEPT)[0], 1), joined(s, top_k(t, KEPT)[0], 1))
        for t, s in zip(teacher[:, :35], student[:, :35], strict=True)
    ]
    np.testing.assert_allclose(column(scores, "kl_lower_bound"), expected, rtol=1e-5, atol=1e-6)
    facts = open_matrix("t.safetensors", "teacher").facts
    assert (facts["vocabulary"], facts["classes"]) == (CLASSES, 35)


def test_all_classes_are_written_as_log_probabilities(monkeypatch):
    monkeypatch.setattr("pykd.scoring.plain_files._BATCH_BYTES", 16 << 10)  # several record batches
    teacher, _ = draw()
    teacher += 3000  # where float16 has steps of 2
    np.save("teacher.npy", teacher)
    write_full(open_matrix("teacher.npy", "teacher"), "t.safetensors", threads=2)
    tensors = load_file("t.safetensors")
    assert {name: str(array.dtype) for name, array in tensors.items() if "." not in name} == {
        "logprobs": "float16", "lse": "float32", "kind": "uint8"
    }  # fmt: skip
    lse = np.array([log_sum(row) for row in teacher])
    np.testing.assert_allclose(tensors["lse"][:, 0], lse, rtol=1e-6)
    expected = teacher.astype(np.float64) - lse[:, None]
    np.testing.assert_allclose(tensors["logprobs"], expected, rtol=2**-11 + 1e-6, atol=1e-6)
    for out in ("t.npy", "t.arrow"):
        write_full(open_matrix("teacher.npy", "teacher"), out, threads=2)
    np.testing.assert_array_equal(np.load("t.npy"), tensors["logprobs"])
    with pa.OSFile("t.arrow") as file:
        table = pa.ipc.open_file(file).read_all()
    assert table["logprobs"].num_chunks > 1
    np.testing.assert_array_equal(np.stack(table["logprobs"].to_numpy(zero_copy_only=False)), tensors["logprobs"])
    np.testing.assert_array_equal(table["lse"], tensors["lse"][:, 0])
    facts = json.loads(table.schema.metadata[b"pykd.teacher"])
    assert (facts["form"], facts["rows"], facts["classes"]) == ("full", ROWS, CLASSES)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_scores_against_all_classes_are_those_of_the_logits(temperature):
    teacher, student = draw()
    teacher[0, 1], teacher[1, 2], teacher[2], teacher[3, 5] = np.nan, np.inf, -np.inf, -np.inf
    student[3, 5] = -np.inf
    np.save("teacher.npy", teacher)
    np.save("student.npy", student)
    expected = score_files("teacher.npy", "student.npy", "f.parquet", LOSSES, "labels.npy", temperature=temperature)
    for dtype, far in (("float32", 3e-6), ("float16", 3e-3)):
        write_full(open_matrix("teacher.npy", "teacher"), "t.safetensors", dtype=dtype)
        got = score_files(
            "t.safetensors", "student.npy", f"{dtype}.parquet", LOSSES, "labels.npy", temperature=temperature
        )
        for out in ("t.npy", "t.arrow"):
            assert main(["teacher", "--form", "full", "--teacher", "teacher.npy", "--out", out, "--dtype", dtype]) == 0
            again = score_files(out, "student.npy", f"{out}.parquet", LOSSES, "labels.npy", temperature=temperature)
            for name in ("status", *LOSSES):
                np.testing.assert_array_equal(column(again, name), column(got, name))
        assert summary(got)["bad_rows"] == summary(expected)["bad_rows"]
        for name in (*LOSSES, "teacher_nll", "teacher_confidence"):
            np.testing.assert_allclose(column(got, name), column(expected, name), rtol=far, atol=far)


def states(dtype=np.float32, bias=True, length=16):
    """Hidden states, head and bias, and the logits that they make in float64."""
    rng = np.random.default_rng(8)
    parts = [rng.normal(size=(ROWS, length)), rng.normal(size=(CLASSES, length)), rng.normal(size=CLASSES) * bias]
    hidden, head, shift = (part.astype(dtype) for part in parts)
    for name, array in (("hidden", hidden), ("head", head), ("bias", shift)):
        np.save(f"{name}.npy", array)
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T + shift.astype(np.float64)
    np.save("teacher.npy", logits)
    np.save("student.npy", (logits + rng.normal(size=logits.shape)).astype(np.float32))
    return hidden, head


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bias", [False, True])
def test_hidden_states_and_head_are_scored_as_the_logits_that_they_make(dtype, bias, monkeypatch):
    hidden, _ = states(dtype, bias)
    monkeypatch.setattr("pykd.scoring.formats.teacher_files._LOGITS_BYTES", 4 * CLASSES * 50)  # several pieces
    monkeypatch.setattr("pykd.scoring.formats.teacher_files._HEAD_ROWS", 7)
    call = ["teacher", "--teacher", "hidden.npy", "--head", "head.npy", "--form", "hidden", "--out", "t.safetensors"]
    assert main([*call, *(["--bias", "bias.npy"] if bias else [])]) == 0
    tensors = load_file("t.safetensors")
    np.testing.assert_array_equal(tensors["hidden"], hidden)
    got = score_files("t.safetensors", "student.npy", "s.parquet", LOSSES)
    expected = score_files("teacher.npy", "student.npy", "f.parquet", LOSSES)
    for name in LOSSES:
        np.testing.assert_allclose(column(got, name), column(expected, name), atol=1e-5, rtol=0)


def test_the_head_may_have_padding():
    states()
    np.save("student.npy", np.load("student.npy")[:, :33])
    source, head = open_matrix("hidden.npy", "teacher"), open_matrix("head.npy", "head")
    write_hidden(source, head, "t.safetensors", classes=33)
    read = open_matrix("t.safetensors", "teacher")
    assert (read.width, read.facts["vocabulary"]) == (33, CLASSES)
    np.testing.assert_array_equal(load_file("t.safetensors")["head"], np.load("head.npy")[:33])


@pytest.mark.parametrize(
    ("entry", "message"),
    [(None, "expected a value in every row of the bias bias.parquet, got null"), (np.nan, "expected finite numbers in the bias")],
)  # fmt: skip
def test_a_bias_has_a_number_for_every_class(entry, message, capsys):
    states()
    parquet.write_table(pa.table({"bias": pa.array([entry, -np.inf] + [0.5] * (CLASSES - 2))}), "bias.parquet")
    call = ["teacher", "--form", "hidden", "--teacher", "hidden.npy", "--head", "head.npy", "--bias", "bias.parquet"]
    assert main([*call, "--out", "t.safetensors"]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().glob("t.*"))


def test_bad_states_are_bad_rows():
    hidden, _ = states()
    hidden[3, 2] = np.nan
    hidden[4, 1] = -np.inf
    np.save("hidden.npy", hidden)
    write_hidden(open_matrix("hidden.npy", "teacher"), open_matrix("head.npy", "head"), "t.safetensors")
    assert load_file("t.safetensors")["kind"].tolist() == [0, 0, 0, 1, 2, *[0] * (len(hidden) - 5)]
    bad = summary(score_files("t.safetensors", "student.npy", "s.parquet"))["bad_rows"]
    assert bad["nan"] + bad["infinite"] == sum(bad.values()) == 2


def test_a_flipped_byte_is_seen_and_its_block_named():
    draw(rows=70_000, classes=3)  # several blocks
    path = Path(write(kept=2))
    whole = path.read_bytes()
    reader = Reader(str(path), "it")
    assert reader.block_rows < 70_000
    for name in ("ids", "logprobs", "log_tail", "kind"):
        dtype, shape = reader.tensor(name)
        row = reader.block_rows + 5
        place = reader._place[name] + row * dtype.itemsize * int(np.prod(shape[1:]))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        source = open_matrix(path, "teacher")
        loads = list(source.blocks(0, 1000))
        loads[0]()
        message = (
            rf"expected block 1 of {name} \(rows {reader.block_rows} to .*\) in the teacher .* to have its checksum"
        )
        with pytest.raises(ValueError, match=message):
            [load() for load in loads]
    place = whole.index(b"vocabulary")
    path.write_bytes(whole[:place] + b"V" + whole[place + 1 :])
    with pytest.raises(ValueError, match="expected the metadata in the teacher .* to have its checksum"):
        open_matrix(path, "teacher")
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="it is cut off; write it again"):
        open_matrix(path, "teacher")


@pytest.mark.parametrize(
    ("tensor", "key", "value"),
    [("logprobs", "shape", [2 * ROWS, KEPT // 2]), ("log_tail", "dtype", "I32"), ("ids", "shape", []), ("lse.crc32", None, None)],
)  # fmt: skip
def test_a_table_of_tensors_that_was_changed_is_seen(tensor, key, value):
    draw()
    data = Path(write()).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if key is None:
        del header[tensor]
    else:
        header[tensor][key] = value
    text = json.dumps(header).encode()
    Path("t.safetensors").write_bytes(data[:8] + text.ljust(end - 8) + data[end:])
    with pytest.raises(ValueError, match="expected the table of tensors in the teacher .* to have its checksum"):
        open_matrix("t.safetensors", "teacher")


@pytest.mark.parametrize(
    "header", ["{}", '{"__metadata__": {"pykd.teacher": 1}}', '{"__metadata__": "pykd.teacher"}', '["pykd.teacher"]']
)
def test_a_header_that_is_none_is_told(header):
    text = header if "pykd.teacher" in header else '{"pykd.teacher": 0}'
    Path("t.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    with pytest.raises(ValueError, match=r"expected .*, got .*; write it again"):
        open_matrix("t.safetensors", "teacher")


def test_short_writes_are_gone_on_with(monkeypatch):
    draw()
    whole = Path(write()).read_bytes()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: pwrite(file, data[: max(1, len(data) // 3)], place))
    assert Path(write("again.safetensors")).read_bytes() == whole


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
def test_what_cannot_be_written_is_an_error_and_nothing_is_left(monkeypatch, call):
    draw()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"expected room for the [\d,]+ bytes of t.safetensors, got 'No space left"):
        write()
    assert not list(Path().glob("t.safetensors*"))


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(monkeypatch):
    draw()
    before = Path(write()).read_bytes()
    monkeypatch.setattr("pykd.scoring.teacher.keep", None)  # fails at the first block
    with pytest.raises(TypeError):
        write(kept=3)
    assert Path("t.safetensors").read_bytes() == before
    assert [path.name for path in Path().glob("t.*")] == ["t.safetensors"]


def test_of_two_runs_that_write_one_file_the_second_is_refused():
    with WholeFile(Path("t.bin"), 6) as first:
        first.write(0, b"first ")
        with (
            pytest.raises(RuntimeError, match=r"expected to be alone with .*t.bin.writing, got another run"),
            WholeFile(Path("t.bin"), 3),
        ):
            pass
    assert Path("t.bin").read_bytes() == b"first "
    Path("t.bin.writing").write_bytes(b"of a run that was killed")
    with WholeFile(Path("t.bin"), 3) as second:
        second.write(0, b"2nd")
    assert Path("t.bin").read_bytes() == b"2nd"
    assert [path.name for path in Path().glob("t.bin*")] == ["t.bin"]


def test_a_file_that_was_done_with_meanwhile_is_not_written_over(monkeypatch):
    flock = fcntl.flock

    def late(file, how):  # the first run takes its name between the opening and the lock of the second
        monkeypatch.setattr(fcntl, "flock", flock)
        os.replace("t.bin.writing", "t.bin")
        flock(file, how)

    Path("t.bin.writing").write_bytes(b"first")
    monkeypatch.setattr(fcntl, "flock", late)
    with WholeFile(Path("t.bin"), 3):
        assert Path("t.bin").read_bytes() == b"first"


def test_a_link_leads_to_the_new_file_and_a_folder_is_refused_before_the_work():
    Path("elsewhere").mkdir()
    os.symlink("elsewhere/t.bin", "t.bin")
    with WholeFile(Path("t.bin"), 3) as file:
        assert Path("elsewhere/t.bin.writing").exists()  # on that disk
        file.write(0, b"new")
    assert Path("t.bin").is_symlink() and Path("elsewhere/t.bin").read_bytes() == b"new"
    with (
        pytest.raises(OSError, match="a regular file to replace at elsewhere, or none, got a folder"),
        WholeFile(Path("elsewhere"), 1),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "--temperature", "3"], r"has the mass of the other classes, 1, got 3; write it again with `pykd teacher --temperature 3`"),
        (["score", "--loss", "folder"], "expected losses of kl, .* with a teacher of which the top K is known, got folder"),
        (["score", "--classes", "20"], "write it again with `pykd teacher --classes 20`"),
        (["score", "--student", "t.safetensors"], "expected logits of all classes of the student, got top 6 of 40"),
        (["teacher", "--teacher", "t.safetensors", "--out", "u.safetensors"], "expected logits of all classes in .*, got top 6 of 40"),
        (["teacher", "--out", "u.npy"], r"expected --out to end in .safetensors with --form top-k, got u.npy; name it so"),
        (["teacher", "--form", "full", "--out", "u.npz"], r"expected --out to end in .safetensors or .npy or .arrow with"),
        (["teacher", "--form", "full", "--out", "u.npy", "--tokenizer", "teacher.npy"], r"expected no tokenizer for u.npy, which"),
        (["teacher", "--out", "no/u.safetensors"], "expected a folder for --out, got none at no"),
        (["teacher", "--out", "u.safetensors", "--keep", "0"], "expected from 1 to 40 classes to keep, got 0"),
        (["teacher", "--out", "u.safetensors", "--classes", "41"], "expected from 1 to 40 classes, got 41"),
        (["teacher", "--out", "u.safetensors", "--temperature", "0"], "expected a temperature above 0 .* got 0; correct --temperature"),
        (["teacher", "--out", "u.safetensors", "--temperature", "1e-40"], "expected a temperature above 0 .* got 1e-40; correct --temperature"),
        (["teacher", "--out", "u.safetensors", "--form", "hidden"], "expected --head with --form hidden, got none; add it"),
        (["teacher", "--out", "u.safetensors", "--form", "full", "--keep", "3"], "expected no --keep with --form full"),
        (["teacher", "--out", "u.safetensors", "--form", "hidden", "--teacher", "t.safetensors", "--head", "teacher.npy"], "expected all columns of the teacher t.safetensors, got top 6 of 40"),
        (["teacher", "--out", "u.safetensors", "--form", "hidden", "--head", "hole.npy"], "expected finite numbers in the head hole.npy"),
        (["teacher", "--out", "u.safetensors", "--form", "hidden", "--head", "head.npy"], "expected as many columns in the head head.npy as the states have, 40, got 16"),
        (["teacher", "--out", "u.safetensors", "--form", "hidden", "--head", "teacher.npy", "--bias", "labels.npy"], "expected floating-point numbers in the bias"),
        (["teacher", "--out", "u.safetensors", "--form", "hidden", "--head", "teacher.npy", "--dtype", "float16", "--teacher", "large.npy"], "expected numbers up to 65504 in the teacher large.npy for float16"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_said_in_three_parts(arguments, message, capsys):
    draw()
    write()
    np.save("head.npy", np.ones((CLASSES, 16), np.float32))
    np.save("large.npy", np.full((3, CLASSES), 1e6, np.float32))
    np.save("hole.npy", np.full((CLASSES, CLASSES), np.nan, np.float32))
    command, *rest = arguments
    given = (
        {"--teacher": "teacher.npy"}
        if command == "teacher"
        else {"--teacher": "t.safetensors", "--student": "student.npy", "--out": "s.parquet"}
    )
    given |= dict(zip(rest[::2], rest[1::2], strict=True))
    assert main([command, *(word for pair in given.items() for word in pair)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("u.safetensors").exists()


def test_no_base_file_is_made_of_a_top_k(capsys):
    draw()
    write()
    call = ["teacher", "--teacher", "t.safetensors", "--form", "llama", "--tokens", "labels.npy", "--context", "10"]
    assert main([*call, "--out", "base.kld"]) == 2
    assert "expected logits of all classes in the teacher t.safetensors, got top 6 of 40" in capsys.readouterr().err


def test_neither_torch_nor_the_exporter_is_imported():
    draw()
    code = (
        "import sys; from pykd.command_line import main\n"
        "assert main(['teacher', '--teacher', 'teacher.npy', '--out', 't.safetensors', '--keep', '4']) == 0\n"
        "assert main(['score', '--teacher', 't.safetensors', '--student', 'student.npy', '--out', 's.parquet']) == 0\n"
        "found = {'torch', 'onnx', 'onnxscript', 'onnxruntime', 'pykd.export', 'pykd.losses'} & sys.modules.keys()\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def commands_of_the_docs():
    text = (Path(__file__).parents[1] / "docs" / "scoring.md").read_text(encoding="utf-8")
    section = text.partition("## Teacher outputs on disk")[2].partition("\n## ")[0]
    found = re.findall(r"^    (pykd .*?)(?:  +#.*)?$", section, re.MULTILINE)
    return found + re.findall(r"^    (pykd teacher --form llama .*)$", text, re.MULTILINE)


def test_the_commands_of_the_docs_run(capsys):
    draw(rows=255, classes=130)  # one chunk of a base file
    np.save("tokens.npy", np.arange(512) % 130)
    Path("tokenizer.json").write_text("{}")
    rows = pa.array([[[0, 1]] * 255], pa.list_(pa.list_(pa.int64())))
    values = pa.array([[[-0.5, -1.5]] * 255], pa.list_(pa.list_(pa.float32())))
    parquet.write_table(pa.table({"token_ids": rows, "top_values": values}), "rows.parquet")
    Path("codec.json").write_text('{"d": 130}')
    np.save("hidden.npy", np.ones((255, 16), np.float16))
    np.save("head.npy", np.ones((130, 16), np.float16))
    np.save("pixels.npy", np.ones((255, 16), np.float32))
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
        for name, width in (("pixels", 16), ("logits", 130))
    ]
    head = numpy_helper.from_array(np.ones((16, 130), np.float32), "head")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["pixels", "head"], ["logits"])], "model", info[:1], info[1:], [head]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    Path("teacher.onnx").write_bytes(model.SerializeToString())
    found = commands_of_the_docs()
    assert len(found) > 4
    for command in found:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
