"""Rows of DistillKit: bytes that are made here, from the description of the format, are read as what went in."""

import json
import math
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from pykd.command_line import main
from pykd.scoring.formats.distillkit_rows import Codec, read_codec
from pykd.scoring.results import Scores
from pykd.scoring.sources import open_matrix
from pykd.scoring.statistics import summary
from pykd.scoring.stream import score_files
from pykd.scoring.teacher import write_top_k

CLASSES, KEPT = 300, 24  # 9 bits per class
LENGTHS = (5, 1, 17, 600, 3)  # of the sequences
TOKENS = sum(LENGTHS)
SETTINGS = {
    "plain": dict(exact_k=KEPT, exact_dtype="float32", residual_bins=[], delta_encoding=False),
    "halves": dict(exact_k=KEPT, exact_dtype="float16", residual_bins=[], delta_encoding=False),
    "bins": dict(
        exact_k=8,
        exact_dtype="bfloat16",
        residual_bins=[
            dict(scale_dtype="float32", element_bits=9, num_elements=7),
            dict(scale_dtype="float16", element_bits=4, num_elements=9),
        ],
        delta_encoding=False,
    ),
    "polynomial": dict(
        exact_k=4,
        exact_dtype="float32",
        polynomial_terms=[0, 1, 2, "sqrt"],
        term_dtype="float32",
        residual_bins=[dict(scale_dtype="float32", element_bits=8, num_elements=15)],  # of 20: the last have none
        delta_encoding=False,
        normalize_t=True,
    ),
    "delta": dict(
        exact_k=10,
        polynomial_terms=[0, 1, "exp"],
        normalize_t=True,
        residual_bins=[dict(scale_dtype="float64", element_bits=11, num_elements=14)],
        delta_encoding=True,
    ),
    "one bit": dict(
        exact_k=23, residual_bins=[dict(scale_dtype="float32", element_bits=1, num_elements=1)], delta_encoding=False
    ),
}
FORMS = {"float16": "<e", "float32": "<f", "float64": "<d"}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def number(value, dtype):
    """The bytes of a number, and the number that they are."""
    if dtype == "bfloat16":
        rounded = ml_dtypes.bfloat16(value)
        return rounded.tobytes(), float(rounded)
    data = struct.pack(FORMS[dtype], value)
    return data, struct.unpack(FORMS[dtype], data)[0]


def bits_of(values, width):
    """Whole numbers as a string of bits, the most significant first, filled up to whole bytes."""
    text = "".join(format(int(value), f"0{width}b") for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def encode(log_probs, settings):
    """The bytes of one token, and the log-probabilities that they stand for, a value at a time."""
    values = list(log_probs)
    if settings["delta_encoding"]:
        values = [values[0], *np.diff(values)]
    exact, exact_dtype = settings["exact_k"], settings.get("exact_dtype", "float32")
    data, meant = b"", []
    for value in values[:exact]:
        part, is_now = number(value, exact_dtype)
        data += part
        meant.append(is_now)
    rest = values[exact:]
    fit = [0.0] * len(rest)
    if terms := settings.get("polynomial_terms"):
        places = [i / (len(rest) - 1) if settings.get("normalize_t") else i for i in range(len(rest))]
        rows = [[x**t if isinstance(t, int) else getattr(math, t)(x) for t in terms] for x in places]
        coefficients = np.linalg.lstsq(np.array(rows), np.array(rest), rcond=None)[0]
        stored = []
        for coefficient in coefficients:
            part, is_now = number(coefficient, settings.get("term_dtype", "float32"))
            data += part
            stored.append(is_now)
        fit = [sum(a * b for a, b in zip(row, stored, strict=True)) for row in rows]
    residual = [0.0] * len(rest)
    at = 0
    for part in settings["residual_bins"]:
        width, count = part["element_bits"], part["num_elements"]
        left = [rest[at + i] - fit[at + i] for i in range(count)]
        half = 1 if width == 1 else 2 ** (width - 1)
        scale_bytes, scale = number(max(map(abs, left)) / half or 1.0, part["scale_dtype"])
        if width == 1:
            codes = [int(x > 0) for x in left]
            residual[at : at + count] = [(2 * c - 1) * scale for c in codes]
        else:
            codes = [min(max(round(x / scale), -half), half - 1) + half for x in left]
            residual[at : at + count] = [(c - half) * scale for c in codes]
        data += scale_bytes + bits_of(codes, width)
        at += count
    meant += [number(a + b, exact_dtype)[1] for a, b in zip(fit, residual, strict=True)]
    return data, np.cumsum(meant) if settings["delta_encoding"] else np.array(meant)


def draw():
    rng = np.random.default_rng(5)
    teacher = 2.5 * rng.normal(size=(TOKENS, CLASSES))
    np.save("student.npy", (teacher + 0.5 * rng.normal(size=teacher.shape)).astype(np.float32))
    np.save("teacher.npy", teacher)
    log_p = teacher - teacher.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    ids = np.argsort(-log_p, axis=1)[:, :KEPT]
    return ids, np.take_along_axis(log_p, ids, axis=1)


def sequences(rows, kind):
    """A column with a list per sequence."""
    ends = np.cumsum(LENGTHS)
    return pa.array([rows[end - n : end] for end, n in zip(ends, LENGTHS, strict=True)], pa.list_(pa.list_(kind)))


def write_compressed(settings, path="rows.parquet"):
    """A file of rows; gives the classes and the log-probabilities that are in it."""
    ids, log_probs = draw()
    tokens, meant = zip(*(encode(row, settings) for row in log_probs), strict=True)
    columns = {
        "input_ids": pa.array([[0] * (n + 1) for n in LENGTHS], pa.list_(pa.uint64())),
        "compressed_logprobs": sequences([list(token) for token in tokens], pa.uint8()),
        "bytepacked_indices": sequences([list(bits_of(row, 9)) for row in ids], pa.uint8()),
    }
    parquet.write_table(pa.table(columns), path, row_group_size=2)
    Path("codec.json").write_text(json.dumps({"d": CLASSES, "k": KEPT, **settings}))
    return ids, np.array(meant)


def read(start=0, rows=37):
    source = open_matrix("rows.parquet", "teacher", "codec.json")
    assert (source.rows, source.width, source.kept) == (TOKENS, CLASSES, KEPT)
    blocks = [load() for load in source.blocks(start, rows)]
    assert all(len(block.values) == rows for block in blocks[:-1])
    parts = [np.concatenate(parts) for parts in zip(*(block.top_k for block in blocks), strict=True)]
    return np.concatenate([block.values for block in blocks]), parts


@pytest.mark.parametrize("kind", SETTINGS)
def test_compressed_rows_are_what_went_in(kind):
    ids, meant = write_compressed(SETTINGS[kind])
    values, (got, log_tail, _) = read()
    np.testing.assert_array_equal(got, ids)
    rounding = {"bins": 2**-8}.get(kind, 2e-6)  # the sum of both is rounded once more, to bfloat16
    np.testing.assert_allclose(values, meant, rtol=rounding, atol=2e-6)
    mass = np.exp(values.astype(np.float64)).sum(axis=1)
    expected = np.log(1 - mass)
    np.testing.assert_allclose(np.exp(log_tail[:, 0]), np.exp(expected), atol=1e-6)
    for start, rows in ((0, TOKENS), (20, 100), (TOKENS - 1, 5)):
        np.testing.assert_array_equal(read(start, rows)[0], values[start:])


def test_scores_are_those_against_the_same_top_k():
    write_compressed(SETTINGS["plain"])
    call = [
        "score",
        "--teacher",
        "rows.parquet",
        "--distillkit",
        "codec.json",
        "--student",
        "student.npy",
        "--out",
        "s.parquet",
    ]
    assert main([*call, "--loss", "kl", "--loss", "jsd"]) == 0
    write_top_k(open_matrix("teacher.npy", "teacher"), "t.safetensors", KEPT, dtype="float32")
    score_files("t.safetensors", "student.npy", "f.parquet", ("kl", "jsd"))
    got, expected = Scores("s.parquet"), Scores("f.parquet")
    for name in ("kl_lower_bound", "jsd_lower_bound", "teacher_class", "teacher_class_rank", "teacher_confidence"):
        a, b = (np.concatenate([block[name] for block in scores.blocks(name)]) for scores in (got, expected))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert summary(got)["inputs"]["teacher"]["written"]["form"] == "DistillKit"


def test_rows_without_compression_are_read():
    ids, log_probs = draw()
    values = log_probs.astype(np.float32)
    values[3, 20:] = -np.inf  # slots that were never filled hold any class
    ids[3, 20:] = [2**40, -7, ids[3, 0], ids[3, 1]]
    columns = {"token_ids": sequences(ids.tolist(), pa.int64()), "top_values": sequences(values.tolist(), pa.float32())}
    parquet.write_table(pa.table(columns), "rows.parquet")
    Path("codec.json").write_text(json.dumps({"d": CLASSES}))
    got, (classes, log_tail, _) = read()
    np.testing.assert_array_equal(got, values)
    np.testing.assert_array_equal(classes[values > -np.inf], ids[values > -np.inf])
    np.testing.assert_allclose(np.exp(log_tail[:, 0]), 1 - np.exp(values.astype(np.float64)).sum(axis=1), atol=1e-12)
    scores = score_files("rows.parquet", "student.npy", "s.parquet", ("kl",), distillkit="codec.json")
    bound = np.concatenate([block["kl_lower_bound"] for block in scores.blocks("kl_lower_bound")])
    teacher, student = np.load("teacher.npy"), np.load("student.npy").astype(np.float64)
    p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in (teacher[3], student[3]))
    kept = ids[3, :20]
    p, q = (np.append(side[kept], 1 - side[kept].sum()) for side in (p, q))
    np.testing.assert_allclose(bound[3], (p * np.log(p / q)).sum(), rtol=1e-5)


def write_legacy(settings, values=None):
    """A file of the legacy form; gives the classes and the values that are in it, a value at a time."""
    ids, log_probs = draw()
    values = log_probs if values is None else values
    exact, bits = settings["exact_k"], 9
    rest = range(1, KEPT - exact + 1)
    sign = -1 if settings.get("invert_polynomial", True) else 1
    rows = [[float(x) ** (sign * i) for i in range(settings["polynomial_degree"] + 1)] for x in rest]
    if settings.get("with_sqrt_term"):
        rows = [[*row, math.sqrt(x)] for row, x in zip(rows, rest, strict=True)]
    words, firsts, coefficients, meant = [], [], [], []
    for classes, row in zip(ids, values, strict=True):
        words.append(
            [sum(int(c) << (bits * i) for i, c in enumerate(classes[at : at + 7])) for at in range(0, KEPT, 7)]
        )
        firsts.append([number(value, "float16")[1] for value in row[:exact]])
        fit = np.linalg.lstsq(np.array(rows), row[exact:], rcond=None)[0] if rest else []
        coefficients.append([number(value, settings.get("term_dtype", "float32"))[1] for value in fit])
        meant.append(firsts[-1] + [sum(a * b for a, b in zip(term, coefficients[-1], strict=True)) for term in rows])
    columns = {
        "packed_indices": sequences(words, pa.uint64()),
        "exact_values": sequences(firsts, pa.float32()),
        "coeffs": sequences(coefficients, pa.float32()),
    }
    parquet.write_table(pa.table(columns), "rows.parquet", row_group_size=2)
    table = {"vocab_size": CLASSES, "k": KEPT, **settings}
    Path("codec.json").write_text(json.dumps({"teacher": {"kind": "dataset", "legacy_logit_compression": table}}))
    return ids, np.array(meant)


@pytest.mark.parametrize(
    "settings",
    [
        {"exact_k": 8, "polynomial_degree": 4},
        {"exact_k": 20, "polynomial_degree": 1, "invert_polynomial": False, "with_sqrt_term": True, "term_dtype": "float16"},
        {"exact_k": KEPT, "polynomial_degree": 3},
    ],
)  # fmt: skip
def test_rows_of_the_legacy_form_are_what_went_in(settings):
    ids, meant = write_legacy(settings)
    values, (got, log_tail, _) = read()
    np.testing.assert_array_equal(got, ids)
    # Of float16 the terms are rounded, too.
    np.testing.assert_allclose(values, meant, rtol=2e-3 if "term_dtype" in settings else 1e-5, atol=1e-5)
    mass = np.exp(values.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(np.exp(log_tail[:, 0]), np.maximum(1 - mass, 0), atol=1e-6)
    np.testing.assert_array_equal(read(20, 100)[0], values[20:])


def test_legacy_rows_of_logits_and_settings_of_another_form_are_told():
    _, log_probs = draw()
    write_legacy({"exact_k": KEPT, "polynomial_degree": 0}, log_probs + 5)
    with pytest.raises(ValueError, match="the settings do not fit these rows, or they hold logits instead"):
        read()
    Path("codec.json").write_text(json.dumps({"d": CLASSES, "k": KEPT}))
    with pytest.raises(
        ValueError, match=r"settings of the legacy compression \(vocab_size, .*which has exact_values, got"
    ):
        read()
    Path("codec.json").write_text(json.dumps({"vocab_size": CLASSES, "k": KEPT, "exact_k": 30, "polynomial_degree": 0}))
    with pytest.raises(ValueError, match="expected exact_k up to k, and k up to vocab_size, got 30, 24 and 300"):
        read()


def test_settings_are_found_inside_a_configuration():
    table = {"d": 40, "k": 3, "exact_k": 3, "residual_bins": [], "error_diffusion": True}
    Path("codec.json").write_text(
        json.dumps({"model": "m", "teacher": {"kind": "dataset", "logprob_compressor": table}})
    )
    assert read_codec("codec.json") == Codec(d=40, k=3, exact_k=3, error_diffusion=True)


def test_settings_may_be_yaml():
    yaml = pytest.importorskip("yaml")
    table = {"d": 40, "k": 3, "exact_k": 3, "residual_bins": []}
    Path("codec.yaml").write_text(yaml.safe_dump(table))
    assert read_codec("codec.yaml") == Codec(d=40, k=3, exact_k=3)


def test_a_missing_reader_of_yaml_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    Path("codec.yaml").write_text("d: 4")
    with pytest.raises(
        ImportError, match="expected the package PyYAML to read codec.yaml, got none; pip install PyYAML, or write"
    ):
        read_codec("codec.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": 23, "exact_k": 23},
            r"expected 92 entries for each token .*, got 96 for token 0: the settings do not fit",
        ),
        ({"d": 200}, "expected 24 entries for each token .*, got 27 for token 0: the settings do not fit"),
        ({"d": 290}, r"expected classes from 0 to 289, each once, .* got others for token \d+"),
        ({"exact_dtype": "float17"}, "expected float16, bfloat16, float32, float64 for exact_dtype, got 'float17'"),
        ({"exact_k": 30}, "together up to k, and k up to d, got 30, 24 and 300"),
        ({"k": "24"}, "expected a whole number from 0 for k, got '24'"),
        ({"polynomial_terms": ["cube"]}, "expected whole numbers, sqrt or exp in polynomial_terms, got 'cube'"),
        ({"bits": 3}, "expected d, .* in codec.json, got bits"),
        (
            {"residual_bins": [{"element_bits": 3}]},
            r"expected the settings of DistillKit's compression in codec.json, got others",
        ),
        ({"delta_encoding": True}, None),  # larger and larger differences are log-probabilities all the same
    ],
)
def test_settings_that_do_not_fit_are_told(change, message):
    write_compressed(SETTINGS["plain"])
    Path("codec.json").write_text(json.dumps({"d": CLASSES, "k": KEPT, **SETTINGS["plain"], **change}))
    if message is None:
        read()
        return
    with pytest.raises(ValueError, match=message):
        [load() for load in open_matrix("rows.parquet", "teacher", "codec.json").blocks(0, 50)]


def test_rows_of_another_kind_are_told(capsys):
    write_compressed(SETTINGS["plain"])
    call = ["score", "--student", "student.npy", "--out", "s.parquet"]
    assert main([*call, "--teacher", "rows.parquet"]) == 2
    assert "which has rows of DistillKit, got none; pass --distillkit with them" in capsys.readouterr().err
    parquet.write_table(pa.table({"packed_indices": [1]}), "part.parquet")
    assert main([*call, "--teacher", "part.parquet", "--distillkit", "codec.json"]) == 2
    assert "got packed_indices; these are no rows of DistillKit" in capsys.readouterr().err
    Path("codec.json").write_text(json.dumps({"legacy_logit_compression": {}}))
    assert main([*call, "--teacher", "rows.parquet", "--distillkit", "codec.json"]) == 2
    assert "expected the settings of DistillKit's compression in codec.json" in capsys.readouterr().err
