"""Base files of llama.cpp: their rows and labels, and the print-out of the tool that they come from."""

import ctypes
import ctypes.util
import math
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from pykd.command_line import main
from pykd.scoring.results import Scores
from pykd.scoring.sources import open_column, open_matrix
from pykd.scoring.statistics import summary
from pykd.scoring.stream import score_files

CONTEXT, CLASSES, CHUNKS = 32, 51, 9  # an odd number of classes has padding
ROWS = CHUNKS * (CONTEXT - 1 - CONTEXT // 2)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_base(path, logits, tokens, nats=16):
    """As the tool does, one row and one class at a time."""
    chunks, context = tokens.shape
    data = b"_logits_" + struct.pack("<iii", context, logits.shape[1], chunks) + tokens.astype("<i4").tobytes()
    for row in logits.astype(np.float64):
        largest = max(row)
        least = max(min(row), largest - nats)
        log_sum = math.log(sum(math.exp(x - largest) for x in row))
        scale = (largest - least) / 65535
        codes = [round((x - least) / scale) if x > least and scale else 0 for x in row]
        codes += [0xABCD] * (len(row) % 2)  # unset in the tool
        data += struct.pack("<ff", scale, least - largest - log_sum) + struct.pack(f"<{len(codes)}H", *codes)
    Path(path).write_bytes(data)


def draw(nats=16, spread=4.0):
    rng = np.random.default_rng(6)
    teacher = spread * rng.normal(size=(ROWS, CLASSES))
    student = (teacher + 0.3 * rng.normal(size=teacher.shape)).astype(np.float32)
    tokens = rng.integers(0, CLASSES, size=(CHUNKS, CONTEXT))
    tokens[:, CONTEXT // 2 + 1 :] = (teacher + rng.gumbel(size=teacher.shape)).argmax(axis=1).reshape(CHUNKS, -1)
    write_base("teacher.kld", teacher, tokens, nats)
    np.save("student.npy", student)
    return teacher, student, tokens


def log_softmax(rows):
    rows = rows - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("nats", [16, 24])
def test_rows_and_labels_of_a_base_file(nats):
    teacher, _, tokens = draw(nats)
    source = open_matrix("teacher.kld", "teacher")
    assert (source.rows, source.width, source.stored) == (ROWS, CLASSES, "16-bit codes")
    got = np.concatenate([load().values for load in source.blocks(0, 7)])
    log_p = log_softmax(teacher)
    clamped = np.maximum(log_p, log_p.max(axis=1, keepdims=True) - nats)
    np.testing.assert_allclose(got, clamped, atol=nats / 65535)
    assert (log_p < clamped - 1).any(), "nothing is clamped"
    labels = open_column("teacher.kld", "labels")
    expected = [tokens[c, CONTEXT // 2 + 1 + i] for c in range(CHUNKS) for i in range(ROWS // CHUNKS)]
    assert np.concatenate([load().values for load in labels.blocks(0, 50)]).tolist() == expected


def test_a_base_file_is_scored_with_its_labels():
    teacher, student, tokens = draw(nats=40)
    scores = score_files("teacher.kld", "student.npy", "scores.parquet")
    table = {name: np.concatenate([b[name] for b in scores.blocks(name)]) for name in ("kl", "label", "teacher_nll")}
    log_p, log_q = log_softmax(teacher), log_softmax(student.astype(np.float64))
    labels = tokens[:, CONTEXT // 2 + 1 :].reshape(-1)
    np.testing.assert_array_equal(table["label"], labels)
    np.testing.assert_allclose(table["teacher_nll"], -log_p[np.arange(ROWS), labels], atol=2e-3)
    np.testing.assert_allclose(table["kl"], (np.exp(log_p) * (log_p - log_q)).sum(axis=1), atol=2e-4)


@pytest.mark.parametrize("temperature", [None, 2.5])
def test_two_base_files_have_the_scores_of_the_numbers_in_them(temperature):
    """Bit for bit, though their codes are never written out as numbers."""
    teacher, _, tokens = draw()
    student = teacher + np.random.default_rng(7).normal(size=teacher.shape)
    teacher[3], student[3] = 0, 0  # codes without a scale
    student[4] = np.round(student[4])  # ties
    for name, logits in (("teacher", teacher), ("student", student)):
        write_base(f"{name}.kld", logits, tokens)
        data = bytearray(Path(f"{name}.kld").read_bytes())
        row = 20 + 4 * tokens.size + 5 * 2 * (CLASSES + 5)
        data[row : row + 4] = struct.pack("<f", math.nan)  # a damaged scale
        Path(f"{name}.kld").write_bytes(data)
        rows = [load().values for load in open_matrix(f"{name}.kld", name).blocks(0, 50)]
        np.save(f"{name}.npy", np.concatenate(rows))
    losses = ("kl", "jsd", "reverse_kl")
    tables = []
    for ending, labels in (("kld", None), ("npy", "teacher.kld")):
        files = (f"teacher.{ending}", f"student.{ending}", f"{ending}.parquet")
        scores = score_files(*files, losses, labels=labels, group="teacher.kld#chunk", temperature=temperature)
        tables.append({n: np.concatenate([b[n] for b in scores.blocks(n, bad=True)]) for n in scores.names})
    assert np.flatnonzero(tables[0]["status"]).tolist() == [5] and tables[0]["teacher_class_rank"].max() > 1
    for name, got in tables[0].items():
        np.testing.assert_array_equal(got, tables[1][name], err_msg=name)


def test_rows_of_a_chunk_are_one_group():
    draw()
    scores = score_files("teacher.kld", "student.npy", "scores.parquet")
    group = np.concatenate([block["group"] for block in scores.blocks("group")])
    assert group.tolist() == [chunk for chunk in range(CHUNKS) for _ in range(ROWS // CHUNKS)]
    assert summary(scores)["independent"] == "groups"
    np.save("group.npy", np.arange(ROWS))
    scores = score_files("teacher.kld", "student.npy", "scores.parquet", group="group.npy")
    assert np.concatenate([block["group"] for block in scores.blocks("group")]).tolist() == list(range(ROWS))
    with pytest.raises(ValueError, match="expected no name, or chunk, for the group teacher.kld#token"):
        open_column("teacher.kld#token", "group")


def expected_print_out(teacher, student, labels):
    """One row at a time from the decoded codes, in double; what the tool computes in float32 differs in the last digit."""
    n = len(labels)
    nll_q, nll_p, kl, change, same = [], [], [], [], 0
    for p, s, label in zip(teacher.astype(np.float64), student.astype(np.float64), labels, strict=True):
        normaliser = max(s) + math.log(sum(math.exp(x - max(s)) for x in s))
        nll_q.append(normaliser - s[label])
        nll_p.append(-p[label])
        kl.append(sum(math.exp(a) * (a - b + normaliser) for a, b in zip(p, s, strict=True) if a > -16))
        change.append(math.exp(-nll_q[-1]) - math.exp(-nll_p[-1]))
        same += np.argmax(p) == np.argmax(s)

    def error(values):
        return np.std(values) / math.sqrt(n - 1)

    q, p = np.mean(nll_q), np.mean(nll_p)
    covariance = (np.mean(np.multiply(nll_q, nll_p)) - q * p) / (n - 1)
    ratio_error = math.sqrt(error(nll_q) ** 2 + error(nll_p) ** 2 - 2 * covariance)
    ppl_q, ppl_p = math.exp(q), math.exp(p)
    error_q, error_p = ppl_q * error(nll_q), ppl_p * error(nll_p)
    difference_error = math.sqrt(error_q**2 + error_p**2 - 2 * ppl_q * ppl_p * covariance)
    squares = np.square(change)
    root = math.sqrt(np.mean(squares))
    top = same / n
    numbers = [ppl_q, error_q, ppl_p, error_p, 100 * covariance / (error(nll_q) * error(nll_p)), q - p, ratio_error,
               math.exp(q - p), math.exp(q - p) * ratio_error, ppl_q - ppl_p, difference_error]  # fmt: skip
    numbers += [np.mean(kl), error(kl), max(kl)]
    numbers += [np.quantile(kl, x) for x in (0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001)] + [min(kl)]
    percent = [np.mean(change), error(change), max(change)]
    percent += [np.quantile(change, x) for x in (0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001)]
    percent += [min(change), root, 0.5 / root * error(squares), top, math.sqrt(top * (1 - top) / (n - 1))]
    return numbers + [100 * x for x in percent]


SHAPE = """\
====== Perplexity statistics ======
Mean PPL(Q)                   : #### ± ####
Mean PPL(base)                : #### ± ####
Cor(ln(PPL(Q)), ln(PPL(base))): ##%
Mean ln(PPL(Q)/PPL(base))     : #### ± ####
Mean PPL(Q)/PPL(base)         : #### ± ####
Mean PPL(Q)-PPL(base)         : #### ± ####

====== KL divergence statistics ======
Mean    KLD: #### ± ####
Maximum KLD: ####
99.9%   KLD: ####
99.0%   KLD: ####
95.0%   KLD: ####
90.0%   KLD: ####
Median  KLD: ####
10.0%   KLD: ####
 5.0%   KLD: ####
 1.0%   KLD: ####
 0.1%   KLD: ####
Minimum KLD: ####

====== Token probability statistics ======
Mean    Δp: ## ± # %
Maximum Δp: ##%
99.9%   Δp: ##%
99.0%   Δp: ##%
95.0%   Δp: ##%
90.0%   Δp: ##%
75.0%   Δp: ##%
Median  Δp: ##%
25.0%   Δp: ##%
10.0%   Δp: ##%
 5.0%   Δp: ##%
 1.0%   Δp: ##%
 0.1%   Δp: ##%
Minimum Δp: ##%
RMS Δp    : ## ± # %
Same top p: ## ± # %
"""
# Widths and digits of the tool's formats.
FIELDS = {"####": r" *(-?\d+\.\d{6})", "##": r" *(-?\d+\.\d{2,3})", "#": r" *(\d+\.\d{3})"}


def numbers_of(text):
    pattern = re.escape(SHAPE).replace(r"\#", "#")
    for field, form in FIELDS.items():
        pattern = re.sub(rf"(?<!#){field}(?!#)", form.replace("\\", r"\\"), pattern)
    match = re.fullmatch(pattern, text)
    assert match, text
    return match.groups()


def test_the_print_out_is_the_tools(capsys):
    logits, student, tokens = draw(spread=6.0)
    student[0, logits[0].argmin()] = -np.inf  # where the base file is clamped, which is left out
    np.save("student.npy", student)
    teacher = next(open_matrix("teacher.kld", "teacher").blocks(0, ROWS))().values
    expected = expected_print_out(teacher, student, tokens[:, CONTEXT // 2 + 1 :].reshape(-1))
    assert main(["score", "--teacher", "teacher.kld", "--student", "student.npy", "--format", "llama"]) == 0
    printed = capsys.readouterr().out
    got = numbers_of(printed)
    assert len(got) == len(expected)
    for text, value in zip(got, expected, strict=True):
        unit = 10.0 ** -len(text.partition(".")[2])
        assert float(text) == pytest.approx(value, abs=1.01 * unit + 2e-7 * abs(value)), (text, value)
    lines = printed.splitlines()
    assert re.fullmatch(r"Mean PPL\(Q\)                   : .{10} ± .{10}", lines[1])
    assert all(len(line) == 23 for line in lines if re.match(r"[ \d]+\.\d%   KLD", line))
    assert all(re.fullmatch(r".{12}( {0,2}-?\d|-?\d\d+)\.\d{3}%", line) for line in lines if "%   Δp" in line)


def test_two_base_files_are_compared_without_a_model(capsys):
    _, student, tokens = draw()
    write_base("student.kld", student, tokens)
    assert (
        main(
            ["score", "--teacher", "teacher.kld", "--student", "student.kld", "--out", "s.parquet", "--format", "llama"]
        )
        == 0
    )
    assert len(numbers_of(capsys.readouterr().out)) == 43
    assert Scores("s.parquet").rows == ROWS
    write_base("student.kld", student, (tokens + 1) % CLASSES)
    assert main(["score", "--teacher", "teacher.kld", "--student", "student.kld", "--format", "llama"]) == 2
    assert "expected two base files of the same text and context" in capsys.readouterr().err


@pytest.mark.parametrize("length", [10, 19, 100, -1, -1000, 1])
def test_a_base_file_of_another_size_is_seen_when_it_is_opened(length):
    draw()
    data = Path("teacher.kld").read_bytes()
    Path("teacher.kld").write_bytes(data[:length] if length != 1 else data + b"\0")
    with pytest.raises(
        ValueError, match="bytes in the teacher teacher.kld .*cut off|in the head of the teacher teacher.kld"
    ):
        open_matrix("teacher.kld", "teacher")


def test_what_the_print_out_cannot_say_is_refused(capsys):
    _, student, _ = draw()
    call = ["score", "--teacher", "teacher.kld", "--student", "student.npy", "--format", "llama"]
    for more, message in (
        (["--temperature", "2"], "expected no --temperature with --format llama"),
        (["--json", "o.json"], "expected --out FILE with --report, --json and --fail-if"),
    ):
        assert main([*call, *more]) == 2
        assert message in capsys.readouterr().err
    np.save("student.npy", student[:, :-1])
    assert main(call) == 2
    assert "expected 51 classes of the student, got 50" in capsys.readouterr().err
    np.save("student.npy", student)
    assert main(["teacher", "--teacher", "student.npy", "--keep", str(CLASSES), "--out", "top.safetensors"]) == 0
    for side, message in (
        ("teacher", "expected a base file of llama.cpp as the teacher with --format llama, got top.safetensors"),
        ("student", f"expected logits of all classes of the student, got top {CLASSES} of {CLASSES}"),
    ):  # the classes of a top K are in another order
        assert main([*call, f"--{side}", "top.safetensors"]) == 2
        assert message in capsys.readouterr().err


def words_of_the_tool(row):
    """A row as the tool writes it, in its float32 arithmetic, a class at a time with the exponential of the C library."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.expf.restype, libm.expf.argtypes = ctypes.c_float, [ctypes.c_float]
    f = np.float32
    largest = max(row)
    least = max(min(row), f(largest - f(16)))
    total = 0.0
    for x in row:
        total += libm.expf(float(f(x - largest)))
    log_sum = f(math.log(total))
    scale = f(f(largest - least) / f(65535))
    codes = [0] * len(row)
    if scale:
        inverse = f(f(1) / scale)
        for i, x in enumerate(row):
            if x > least:
                (bits,) = struct.unpack("<i", struct.pack("<f", f(f(inverse * f(x - least)) + f(12582912))))
                codes[i] = (bits & 0x007FFFFF) - 0x00400000
    return scale, f(f(least - largest) - log_sum), codes


def draw_logits(spread=6.0):
    rng = np.random.default_rng(12)
    logits = (spread * rng.normal(size=(CHUNKS * CONTEXT, CLASSES))).astype(np.float32)
    logits[[CONTEXT // 2, CONTEXT // 2 + 1]] = [[2.5], [-7]]  # every class the same
    logits[CONTEXT // 2 + 2, 7] = -np.float32(1e30)
    tokens = rng.integers(0, CLASSES, size=(CHUNKS, CONTEXT))
    np.save("all.npy", logits)
    scored = logits.reshape(CHUNKS, CONTEXT, CLASSES)[:, CONTEXT // 2 : -1].reshape(-1, CLASSES)
    np.save("scored.npy", scored)
    np.save("tokens.npy", tokens)
    return scored, tokens


WRITE = ["teacher", "--form", "llama", "--tokens", "tokens.npy", "--context", str(CONTEXT), "--out", "base.kld"]


@pytest.mark.parametrize("given", ["all", "scored"])
def test_a_base_file_is_written_as_the_tool_does(given, monkeypatch):
    monkeypatch.setattr("pykd.scoring.llama._BLOCK_BYTES", 4 * CLASSES * 5)  # many blocks
    scored, tokens = draw_logits()
    assert main([*WRITE, "--teacher", f"{given}.npy"]) == 0
    data = Path("base.kld").read_bytes()
    assert data[:20] == b"_logits_" + struct.pack("<iii", CONTEXT, CLASSES, CHUNKS)
    assert data[20 : 20 + 4 * tokens.size] == tokens.astype("<i4").tobytes()
    words = 2 * ((CLASSES + 1) // 2) + 4
    assert len(data) == 20 + 4 * tokens.size + 2 * ROWS * words
    rows = np.frombuffer(data, "<u2", offset=20 + 4 * tokens.size).reshape(ROWS, words)
    for row, logits in zip(rows, scored, strict=True):
        scale, least, codes = words_of_the_tool(logits)
        got = row[:4].view("<f4")
        assert got[0] == scale
        assert row[4 : 4 + CLASSES].tolist() == codes
        np.testing.assert_array_max_ulp(got[1], least, 1)  # of exponentials by NumPy
    source, labels = open_matrix("base.kld", "teacher"), open_column("base.kld", "labels")
    got = np.concatenate([load().values for load in source.blocks(0, 7)])
    log_p = log_softmax(scored.astype(np.float64))
    np.testing.assert_allclose(
        got, np.maximum(log_p, log_p.max(axis=1, keepdims=True) - 16), atol=16 / 65535 / 2 + 4e-6
    )
    read = np.concatenate([load().values for load in labels.blocks(0, 50)])
    np.testing.assert_array_equal(read, tokens[:, CONTEXT // 2 + 1 :].reshape(-1))


def test_a_base_file_of_float64_has_the_differences_of_its_logits():
    scored, _ = draw_logits()
    rows = []
    for offset in (0.0, 2.0**40):  # float32 would take all of the second for one number
        np.save("scored.npy", scored.astype(np.float64) + offset)
        assert main([*WRITE, "--teacher", "scored.npy"]) == 0
        (load,) = open_matrix("base.kld", "teacher").blocks(0, ROWS)
        rows.append(load().values)
    np.testing.assert_allclose(rows[1], rows[0], atol=2 * 16 / 65535)


def test_a_base_file_of_the_student_itself_shows_the_noise_of_its_codes_alone(capsys):
    draw_logits(spread=3.0)
    assert main([*WRITE, "--teacher", "scored.npy"]) == 0
    assert main(["score", "--teacher", "base.kld", "--student", "scored.npy", "--format", "llama"]) == 0
    mean = float(re.search(r"Mean +KLD: +(\S+)", capsys.readouterr().out)[1])
    assert abs(mean) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "31"], "expected whole chunks of at least 3 tokens in the tokens tokens.npy, got 288 tokens in chunks of 31"),
        (["--tokens", "large.npy"], "expected tokens from 0 to 50 in the tokens large.npy, got 51 to 51"),
        (["--teacher", "few.npy"], "expected logits of 288 tokens, or of the 135 that are scored, in the teacher few.npy, got 9 rows"),
        (["--teacher", "bad.npy"], "expected finite logits in the teacher bad.npy, got others in row 17"),
        (["--dtype", "float16"], "expected no --classes, --dtype and --tokenizer with --form llama"),
        (["--classes", "0"], "expected no --classes, --dtype and --tokenizer with --form llama"),
        (["--tokens", "null.parquet"], "expected a value in every row of the tokens null.parquet, got null"),
        (["--tokens", "none.npy"], "in the tokens none.npy, got 0 tokens in chunks of 32"),
    ],
)  # fmt: skip
def test_what_no_base_file_can_hold_is_refused(arguments, message, capsys):
    scored, tokens = draw_logits()
    np.save("large.npy", np.full(tokens.shape, CLASSES))
    np.save("none.npy", tokens[:0].reshape(-1))
    some = pa.array(tokens.reshape(-1), mask=np.arange(tokens.size) == 40)
    parquet.write_table(pa.table({"token": some}), "null.parquet")
    np.save("few.npy", scored[:9])
    scored[17, 3] = -np.inf
    np.save("bad.npy", scored)
    assert main([*WRITE, "--teacher", "scored.npy", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().glob("base.kld*"))
