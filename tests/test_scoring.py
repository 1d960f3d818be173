"""`pykd score`: every number of the report against plain NumPy, bad rows, and runs that are cut off."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import pykd
from pykd import kernels
from pykd.command_line import main
from pykd.scoring import intervals
from pykd.scoring.conditions import Condition, numbers_of
from pykd.scoring.results import Journal, Scores
from pykd.scoring.row_scores import STATUSES
from pykd.scoring.statistics import SHARES, quantile_name, summary
from pykd.scoring.stream import score_files

ROWS, CLASSES = 700, 12
LOSSES = ("kl", "reverse_kl", "symmetric_kl", "jsd", "cross_entropy")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def draw(rows=ROWS, classes=CLASSES, dtype=np.float32, seed=0):
    """Teacher, student and labels that have something to do with each other; saved as well."""
    rng = np.random.default_rng(seed)
    teacher = 2 * rng.normal(size=(rows, classes))
    student = teacher + rng.normal(size=(rows, classes)) * rng.exponential(size=(rows, 1))
    labels = (teacher + rng.gumbel(size=teacher.shape)).argmax(axis=1)
    teacher, student = teacher.astype(dtype), student.astype(dtype)
    save(teacher, student, labels)
    return teacher, student, labels


def save(teacher, student, labels=None):
    np.save("teacher.npy", teacher)
    np.save("student.npy", student)
    if labels is not None:
        np.save("labels.npy", labels)


def log_softmax(row):
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def divergence(log_a, log_b):
    return sum(np.exp(a) * (a - b) for a, b in zip(log_a, log_b, strict=True) if np.exp(a) > 0)


def expected_loss(name, teacher, student, temperature=1.0):
    """One row, from the definition."""
    log_p = log_softmax(teacher.astype(np.float64) / temperature)
    log_q = log_softmax(student.astype(np.float64) / temperature)
    log_m = np.logaddexp(log_p, log_q) - np.log(2)
    return {
        "kl": lambda: divergence(log_p, log_q),
        "reverse_kl": lambda: divergence(log_q, log_p),
        "symmetric_kl": lambda: (divergence(log_p, log_q) + divergence(log_q, log_p)) / 2,
        "jsd": lambda: (divergence(log_p, log_m) + divergence(log_q, log_m)) / 2,
        "cross_entropy": lambda: -sum(np.exp(a) * b for a, b in zip(log_p, log_q, strict=True) if np.exp(a) > 0),
    }[name]()


def expected_rows(teacher, student, labels):
    """What is said of each row, one at a time."""
    table = {}
    for t, s, label in zip(teacher, student, labels, strict=True):
        log_p, log_q = log_softmax(t.astype(np.float64)), log_softmax(s.astype(np.float64))
        order = sorted(range(len(s)), key=lambda c, s=s: (-s[c], c))
        row = {
            "teacher_class": int(np.argmax(t)),
            "student_class": int(np.argmax(s)),
            "teacher_class_rank": order.index(int(np.argmax(t))) + 1,
            "teacher_confidence": np.exp(log_p).max(),
            "student_confidence": np.exp(log_q).max(),
            "label": int(label),
            "teacher_nll": -log_p[label],
            "student_nll": -log_q[label],
            "label_probability_change": np.exp(log_q[label]) - np.exp(log_p[label]),
        }
        for name, value in row.items():
            table.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in table.items()}


def column(scores, name):
    return np.concatenate([block[name] for block in scores.blocks(name)])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rows_are_scored_as_the_definitions_say(dtype):
    teacher, student, labels = draw(dtype=dtype)
    teacher[3, :5] = student[3, :5] = -np.inf  # masked classes
    student[4] = teacher[4]
    teacher[5], student[5] = 0, 0  # ties: the first one wins
    teacher[6, [2, 7]] = student[6, [1, 7, 2]] = 30
    labels[3] = 9
    save(teacher, student, labels)
    scores = score_files("teacher.npy", "student.npy", "scores.parquet", LOSSES, labels="labels.npy", temperature=1.5)
    for name in LOSSES:
        expected = [expected_loss(name, t, s, 1.5) for t, s in zip(teacher, student, strict=True)]
        np.testing.assert_allclose(column(scores, name), expected, rtol=3e-5, atol=3e-7)
    for name, expected in expected_rows(teacher, student, labels).items():
        got = column(scores, name)
        if expected.dtype.kind == "i":
            np.testing.assert_array_equal(got, expected)
        else:
            np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-6)
    np.testing.assert_array_equal(column(scores, "row"), np.arange(ROWS))


@pytest.mark.parametrize("target", kernels.simd_targets())
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_said_of_a_row_on_every_instruction_set(target, dtype):
    """Of few classes, and of blocks of them in which the largest logit rises; each output alone as all together."""
    kernels.use_simd(target)
    try:
        for classes in (1, 19, 2500):
            teacher, student, labels = draw(9, classes, dtype)
            teacher[1], student[2] = np.sort(teacher[1]), np.sort(student[2])
            student[3], labels[4] = np.round(student[3]), classes
            inputs = {"teacher": teacher, "student": student, "labels": labels}
            for temperature in (1.0, 1.5):
                asked = {name: np.empty(9, np.float32) for name in ("soft", "teacher_class_nll", "student_class_nll")}
                asked |= {name: np.empty(9, np.float32) for name in ("teacher_nll", "student_nll")}
                asked |= {n: np.empty(9, np.int64) for n in ("teacher_class", "student_class", "teacher_class_rank")}
                call = ("row_scores", inputs | {"temperature": temperature}, {"form": "kl"})
                kernels.run(*call, asked)
                for name, together in asked.items():
                    alone = np.empty_like(together)
                    kernels.run(*call, {name: alone}, threads=3)
                    np.testing.assert_array_equal(alone, together, err_msg=name)
                losses = [expected_loss("kl", t, s, temperature) for t, s in zip(teacher, student, strict=True)]
                np.testing.assert_allclose(asked["soft"], losses, rtol=3e-5, atol=1e-6)
                assert np.isnan([asked["teacher_nll"][4], asked["student_nll"][4]]).all()
                rows = expected_rows(teacher, student, np.minimum(labels, classes - 1))
                for side in ("teacher", "student"):
                    rows[f"{side}_class_nll"] = -np.log(rows[f"{side}_confidence"])
                for name in asked.keys() & rows.keys():
                    known = np.arange(9) != (4 if name in ("teacher_nll", "student_nll") else -1)
                    np.testing.assert_allclose(asked[name][known], rows[name][known], rtol=1e-5, atol=1e-6)
    finally:
        kernels.use_simd(None)


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ({"form": "kl"}, np.float32, "soft needs temperature"),
        ({"temperature": 0.0}, np.float32, "temperature must be a finite number"),
        ({"temperature": 1.0, "classes": 5}, np.float32, "classes is how many are compared"),
        ({"temperature": 1.0, "codes": 1, "classes": 3}, np.float32, "codes are 16-bit words"),
        ({"temperature": 1.0, "codes": 1, "classes": 1}, np.uint16, "classes is how many are compared"),
        ({"temperature": 1.0, "codes": 1}, np.uint16, "classes is how many are compared"),
        ({"temperature": 1.0, "codes": 2}, np.float32, "codes is 0 or 1"),
    ],
)
def test_row_scores_of_what_does_not_go_together_are_refused(settings, dtype, message):
    logits = np.zeros((2, 4), dtype)
    inputs = dict.fromkeys(("teacher", "student"), (logits,) if dtype == np.uint16 else logits)
    inputs |= {"temperature": settings["temperature"]} if "temperature" in settings else {}
    attributes = {name: value for name, value in settings.items() if name != "temperature"}
    with pytest.raises(ValueError, match=message):
        kernels.run("row_scores", inputs, attributes, {"soft": np.empty(2, np.float32)})


def test_what_is_cut_off_of_large_float64_logits_is_reported():
    teacher, student, _ = draw(dtype=np.float64)
    save(teacher + 1e4, student[:, :9] - 1e4)
    scores = score_files("teacher.npy", "student.npy", "scores.parquet", classes=9)
    expected = [np.exp(log_softmax(t)[9:]).sum() for t in teacher]
    np.testing.assert_allclose(column(scores, "teacher_mass_cut"), expected, rtol=1e-5)


def test_a_wide_and_a_narrow_type_go_together():
    teacher, student, _ = draw()
    np.save("student.npy", student.astype(np.float16))
    scores = score_files("teacher.npy", "student.npy", "scores.parquet")
    expected = [expected_loss("kl", t, s) for t, s in zip(teacher, student.astype(np.float16), strict=True)]
    np.testing.assert_allclose(column(scores, "kl"), expected, rtol=3e-5, atol=3e-7)


def test_large_float64_logits_keep_their_differences():
    """They are taken relative to the largest before they become float32."""
    teacher, student, _ = draw(dtype=np.float64)
    save(teacher + 1e8, student - 1e8)
    scores = score_files("teacher.npy", "student.npy", "scores.parquet")
    expected = [expected_loss("kl", t, s) for t, s in zip(teacher + 1e8, student - 1e8, strict=True)]
    np.testing.assert_allclose(column(scores, "kl"), expected, rtol=3e-5, atol=3e-7)


def exported(tmp_path, **settings):
    loss = pykd.SoftTarget(form="kl", temperature=2.0, tau_squared=True)
    return str(pykd.export(loss, tmp_path / "kd", progress=lambda line: None, **settings))


@pytest.mark.slow
def test_an_exported_loss_scores_rows(tmp_path):
    path = exported(tmp_path, kind="score")
    teacher, student, _ = draw()
    scores = score_files("teacher.npy", "student.npy", "scores.parquet", ("kl", path))
    name = scores.facts["losses"][1]
    expected = [4 * expected_loss("kl", t, s, 2.0) for t, s in zip(teacher, student, strict=True)]
    np.testing.assert_allclose(column(scores, name), expected, rtol=3e-5, atol=3e-6)
    twice = str(pykd.export(pykd.SoftTarget(), tmp_path / "again", progress=lambda line: None, per_sample=True))
    with pytest.raises(ValueError, match=f"expected losses of different names, got {name} again"):
        score_files("teacher.npy", "student.npy", "scores.parquet", (path, twice))


@pytest.mark.slow
def test_an_exported_loss_without_values_per_sample_is_refused(tmp_path):
    path = exported(tmp_path)
    draw()
    with pytest.raises(ValueError, match="expected an exported loss with values per sample, got .* without"):
        score_files("teacher.npy", "student.npy", "scores.parquet", (path,))


# ---- Bad rows -----------------------------------------------------------------------------------


def with_bad_rows():
    """A few of each kind; their places, and what they are."""
    teacher, student, labels = draw()
    teacher[10, 3] = np.nan
    student[11, 0] = np.nan
    teacher[12, 2] = np.inf
    student[13, 1] = np.inf
    student[14] = -np.inf
    student[15, teacher[15].argmax()] = -np.inf
    labels[16], labels[17], labels[18] = CLASSES, -1, -100
    save(teacher, student, labels)
    kinds = dict.fromkeys((10, 11), "nan") | dict.fromkeys((12, 13, 14), "infinite") | {15: "infinite_score"}
    kinds |= {16: "label_out_of_range", 17: "label_out_of_range", 18: "ignored"}
    return teacher, student, labels, kinds


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bad_rows_are_counted_by_kind_and_kept_out(dtype):
    teacher, student, labels, kinds = with_bad_rows()
    save(teacher.astype(dtype), student.astype(dtype), labels)
    scores = score_files("teacher.npy", "student.npy", "scores.parquet", LOSSES[:1], labels="labels.npy")
    table = parquet.read_table("scores.parquet").to_pydict()
    assert table["row"] == list(range(ROWS))
    assert {row: kind for row, kind in enumerate(table["status"]) if kind != "ok"} == kinds
    assert [row for row, value in enumerate(table["kl"]) if value is None] == sorted(kinds)
    assert table["label"] == labels.tolist()
    report = summary(scores)
    assert {kind: count for kind, count in report["bad_rows"].items() if count} == {
        "nan": 2, "infinite": 3, "infinite_score": 1, "label_out_of_range": 2, "ignored": 1
    }  # fmt: skip
    good = [row for row in range(ROWS) if row not in kinds]
    expected = np.mean([expected_loss("kl", teacher[row].astype(dtype), student[row].astype(dtype)) for row in good])
    assert report["scores"]["kl"]["mean"] == pytest.approx(expected, rel=1e-5)
    assert report["scores"]["kl"]["count"] == len(good) == report["counted"]


def test_ragged_rows_are_bad_rows():
    import pyarrow as pa

    teacher, student, _ = draw(rows=5)
    rows = [*map(list, teacher)]
    rows[1], rows[3] = rows[1][:-1], None
    parquet.write_table(pa.table({"logits": pa.array(rows, pa.list_(pa.float32()))}), "teacher.parquet")
    score_files("teacher.parquet", "student.npy", "scores.parquet")
    assert parquet.read_table("scores.parquet").to_pydict()["status"] == ["ok", "ragged", "ok", "missing", "ok"]
    np.save("student.npy", student[:4])
    with pytest.raises(ValueError, match="as many rows in the student student.npy as the teacher has, 5, got 4"):
        score_files("teacher.parquet", "student.npy", "scores.parquet")


def test_a_file_of_bad_rows_alone_has_a_report():
    teacher, student, _ = draw(rows=4)
    save(teacher * np.nan, student)
    assert (
        main(
            ["score", "--teacher", "teacher.npy", "--student", "student.npy", "--out", "o.parquet", "--json", "o.json"]
        )
        == 0
    )
    report = json.loads(Path("o.json").read_text())
    assert report["bad_rows"]["nan"] == 4 and report["scores"]["kl"]["mean"] is None


# ---- Classes --------------------------------------------------------------------------------------


def test_unequal_classes_name_the_option_and_what_is_cut_is_reported(capsys):
    teacher, student, _ = draw(classes=15)
    save(teacher, student[:, :CLASSES])
    call = ["score", "--teacher", "teacher.npy", "--student", "student.npy", "--out", "scores.parquet"]
    assert main(call) == 2
    assert "got 12; pass --classes 12 to compare the first 12" in capsys.readouterr().err
    assert main([*call, "--classes", "12", "--json", "o.json"]) == 0
    report = json.loads(Path("o.json").read_text())
    mass = [np.exp(log_softmax(t.astype(np.float64)))[CLASSES:].sum() for t in teacher]
    assert report["scores"]["teacher_mass_cut"]["mean"] == pytest.approx(np.mean(mass), rel=1e-6)
    assert report["scores"]["teacher_mass_cut"]["maximum"] == pytest.approx(np.max(mass), rel=1e-6)
    assert "student_mass_cut" not in report["scores"]
    expected = [expected_loss("kl", t[:CLASSES], s[:CLASSES]) for t, s in zip(teacher, student, strict=True)]
    assert report["scores"]["kl"]["mean"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert main([*call, "--classes", "13"]) == 2
    assert "expected from 1 to 12 classes, got 13" in capsys.readouterr().err


# ---- The report -----------------------------------------------------------------------------------


def report_of(rows=ROWS, group=None, **settings):
    teacher, student, labels = draw(rows=rows)
    if group is not None:
        np.save("group.npy", group)
    scores = score_files(
        "teacher.npy", "student.npy", "scores.parquet", ("kl", "jsd"), "labels.npy",
        None if group is None else "group.npy", **settings,
    )  # fmt: skip
    return scores, summary(scores, seed=3), expected_rows(teacher, student, labels)


@pytest.mark.parametrize("grouped", [False, True])
def test_every_number_of_the_report_is_numpys(grouped):
    group = np.random.default_rng(9).integers(0, 60, size=ROWS) if grouped else None
    scores, report, rows = report_of(group=group)
    kl = column(scores, "kl").astype(np.float64)
    names, batch = np.unique(group if grouped else np.arange(ROWS), return_inverse=True)
    counts = np.bincount(batch).astype(float)
    assert report["rows"] == report["counted"] == ROWS and not any(report["bad_rows"].values())

    for name in ("kl", "jsd", "teacher_nll", "student_nll", "label_probability_change", "teacher_confidence"):
        values, score = column(scores, name).astype(np.float64), report["scores"][name]
        assert score["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert (score["minimum"], score["maximum"]) == (values.min(), values.max())
        assert score["root_mean_square"] == pytest.approx(np.sqrt((values**2).mean()))
        np.testing.assert_allclose(list(score["quantiles"].values()), np.quantile(values, SHARES), rtol=1e-12)
        sums = np.bincount(batch, values)
        np.testing.assert_allclose(score["interval"], intervals.mean_interval(sums, counts), rtol=1e-9)
        for share in SHARES:
            below = np.bincount(batch, values <= np.quantile(values, share))
            places = intervals.quantile_places(share, below, counts, grouped)
            expected = None if places == (None, None) else [None if p is None else np.sort(values)[p] for p in places]
            assert score["quantile_intervals"][quantile_name(share)] == expected

    def share(hit):
        hits = np.bincount(batch, hit)
        return {
            "value": pytest.approx(hit.mean()),
            "interval": pytest.approx(intervals.share_interval(hits, counts, grouped), rel=1e-9),
            "count": ROWS,
        }

    assert report["agreement"]["top1"] == share(rows["teacher_class"] == rows["student_class"])
    assert report["agreement"]["top5"] == share(rows["teacher_class_rank"] <= 5)
    for side in ("teacher", "student"):
        assert report["accuracy"][side] == share(rows[f"{side}_class"] == rows["label"])
        perplexity = report["perplexity"][side]
        assert perplexity["value"] == pytest.approx(np.exp(rows[f"{side}_nll"].mean()), rel=1e-6)
        low, high = intervals.mean_interval(np.bincount(batch, rows[f"{side}_nll"]), counts)
        np.testing.assert_allclose(perplexity["interval"], [np.exp(low), np.exp(high)], rtol=1e-5)
    ratio = np.exp((rows["student_nll"] - rows["teacher_nll"]).mean())
    assert report["perplexity"]["student_over_teacher"]["value"] == pytest.approx(ratio, rel=1e-5)

    errors = {}
    for side in ("teacher", "student"):
        confidence, right = rows[f"{side}_confidence"], rows[f"{side}_class"] == rows["label"]
        bins = np.minimum((confidence * 15).astype(int), 14)
        parts = [bins == b for b in range(15)]
        errors[side] = sum(abs(confidence[p].mean() - right[p].mean()) * p.mean() for p in parts if p.any())
        entry = report["calibration_error"][side]
        assert entry["value"] == pytest.approx(errors[side], rel=1e-5)
        assert entry["interval"][0] < entry["interval"][1]
    gap = report["calibration_error"]["student_minus_teacher"]["value"]
    assert gap == pytest.approx(errors["student"] - errors["teacher"], rel=1e-4)

    for i, entry in enumerate(report["confidence_bins"]):
        inside = np.minimum((rows["teacher_confidence"] * 10).astype(int), 9) == i
        assert entry["count"] == inside.sum() and entry["share"] == pytest.approx(inside.mean())
        if inside.any():
            assert entry["mean"] == pytest.approx(kl[inside].mean())
            agreed = (rows["teacher_class_rank"] == 1)[inside]
            assert entry["agreement"] == pytest.approx(agreed.mean())

    assert report["by_class"]["by"] == "label"
    listed = report["by_class"]["classes"]
    assert {entry["class"] for entry in listed} == set(rows["label"])
    contributions = [kl[rows["label"] == entry["class"]].sum() for entry in listed]
    assert contributions == sorted(contributions, reverse=True)
    for entry in listed:
        inside = rows["label"] == entry["class"]
        assert (entry["count"], entry["mean"]) == (inside.sum(), pytest.approx(kl[inside].mean()))
        expected = intervals.mean_interval(
            np.bincount(batch, kl * inside, len(names)), np.bincount(batch, inside, len(names))
        )
        np.testing.assert_allclose(entry["interval"], expected, rtol=1e-9)

    assert [entry["row"] for entry in report["worst_rows"]] == np.argsort(-kl, kind="stable")[:100].tolist()
    assert report["worst_rows"][0]["kl"] == kl.max()

    assert sum(entry["count"] for entry in report["course"]) == ROWS
    for entry in report["course"]:
        part = kl[entry["first_row"] : entry["last_row"] + 1]
        np.testing.assert_allclose([entry["mean"], entry["p50"], entry["p99"]],
                                   [part.mean(), *np.quantile(part, (0.5, 0.99))])  # fmt: skip
    histogram = report["histogram"]
    assert sum(histogram["counts"]) == ROWS
    edges = np.array(histogram["edges"])
    inner = np.histogram(kl, edges[1:-1])[0]
    np.testing.assert_array_equal(histogram["counts"][1:-1], inner)


def test_worst_rows_of_equal_scores_are_the_first_in_the_file():
    teacher, _, _ = draw(rows=300)
    save(teacher, teacher)
    report = summary(score_files("teacher.npy", "student.npy", "scores.parquet"), worst=7)
    assert [entry["row"] for entry in report["worst_rows"]] == list(range(7))


def test_the_same_numbers_for_every_number_of_threads():
    group = np.array([f"document {i // 7}" for i in range(5000)])
    reports = []
    for threads in (1, 2, 5):
        Path("scores.parquet").unlink(missing_ok=True)
        reports.append(json.dumps(report_of(5000, group, threads=threads)[1]))
    assert reports[0] == reports[1] == reports[2]


def test_many_groups_fall_into_batches():
    """The interval of 3,000 groups by 1,024 batches is about as wide as by the groups themselves."""
    group = np.arange(6000) // 2
    scores, report, _ = report_of(6000, group)
    values = column(scores, "kl").astype(np.float64)
    low, high = intervals.mean_interval(np.bincount(group, values), np.bincount(group).astype(float))
    got = report["scores"]["kl"]["interval"]
    assert (got[1] - got[0]) / (high - low) == pytest.approx(1, abs=0.15)
    assert report["independent"] == "groups"


def test_large_files_are_read_anew_in_each_pass(monkeypatch):
    _, kept, _ = report_of()
    monkeypatch.setattr("pykd.scoring.statistics._KEPT_ROWS", 0)
    assert json.dumps(summary(Scores("scores.parquet"), seed=3)) == json.dumps(kept)


# ---- Conditions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [("kl.p99 > 0", 1), ("kl.p99>1e9", 0), ("agreement.top1 < 0.1", 0), ("agreement.top1.high <= 1", 1),
     ("bad_rows > 0", 0), ("bad_rows.nan >= 0", 1), ("kl.p99.9 < .5e3", 1), ("rows < 701", 1)],
)  # fmt: skip
def test_a_condition_sets_the_exit_code(text, code, capsys):
    draw()
    call = ["score", "--teacher", "teacher.npy", "--student", "student.npy", "--out", "scores.parquet"]
    assert main([*call, "--fail-if", text]) == code
    assert ("FAILED" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize("name", ["row", "group", "teacher_nll"])
def test_a_loss_named_as_another_column_is_refused(name, capsys):
    draw()
    term = pykd.SoftTarget(form="kl")
    pykd.export(pykd.compose({name: (term, 1.0)}), "loss", per_sample=True, progress=lambda line: None)
    np.save("labels.npy", np.zeros(700, np.int64))
    call = ["score", "--teacher", "teacher.npy", "--student", "student.npy", "--labels", "labels.npy"]
    assert main([*call, "--out", "scores.parquet", "--loss", "loss"]) == 2
    assert (
        f"expected losses whose names differ from each other and from the other columns, got {name}"
        in capsys.readouterr().err
    )


def test_a_comparison_does_not_write_over_what_it_compares(capsys):
    draw()
    assert main(["score", "--teacher", "teacher.npy", "--student", "student.npy", "--out", "scores.parquet"]) == 0
    before = Path("scores.parquet").read_bytes()
    assert main(["score", "--compare", "scores.parquet", "scores.parquet", "--json", "scores.parquet"]) == 2
    assert "expected another file for --json" in capsys.readouterr().err
    assert Path("scores.parquet").read_bytes() == before


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_a_folder_that_is_not_there_is_seen_before_anything_runs(option, capsys):
    draw()
    call = ["score", "--teacher", "teacher.npy", "--student", "student.npy", "--out", "scores.parquet"]
    assert main([*call, option, "nowhere/file"]) == 2
    assert f"expected a folder for {option}, got none at nowhere; make it" in capsys.readouterr().err
    assert not Path("scores.parquet").exists()


@pytest.mark.parametrize("text", ["kl.p99 > 1e999", "kl.p99 < -1e400"])
def test_a_limit_that_nothing_passes_is_no_condition(text):
    with pytest.raises(ValueError, match="expected a limit that a float64 can hold"):
        Condition.of(text)


def test_a_perplexity_beyond_float64_is_said_to_be_so(capsys):
    logits = np.zeros((40, 3), np.float32)
    np.save("teacher.npy", logits)
    logits[:, 0] = 5000
    np.save("student.npy", logits)
    np.save("labels.npy", np.ones(40, np.int64))
    call = ["score", "--teacher", "teacher.npy", "--student", "student.npy", "--labels", "labels.npy"]
    call += ["--out", "o.parquet", "--json", "o.json", "--report", "o.html"]
    assert main(call) == 0
    assert "above 1e308" in capsys.readouterr().out and "above 1e308" in Path("o.html").read_text()
    report = json.loads(Path("o.json").read_text())["perplexity"]
    assert report["student"]["value"] is None and report["student"]["interval"] == [None, None]
    assert report["teacher"]["value"] == pytest.approx(3)
    assert main([*call, "--fail-if", "perplexity.student > 10"]) == 2  # never: passed
    assert "float64 cannot hold it" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["kl.p99", "kl.p99 > x", "__import__('os') > 0", "kl.p99 > 0.1; 1", "kl.p99 == 1", ""])
def test_what_is_no_condition_is_seen_before_anything_runs(text, capsys):
    assert main(["score", "--teacher", "none", "--student", "none", "--out", "o", "--fail-if", text]) == 2
    assert "expected a condition such as 'kl.p99 > 0.1'" in capsys.readouterr().err


def test_a_condition_on_what_is_not_there_is_an_error():
    _, report, _ = report_of()
    numbers = numbers_of(report)
    with pytest.raises(ValueError, match=r"got 'kl.p98'; such as kl\.p"):
        Condition.of("kl.p98 > 1").holds(numbers)
    with pytest.raises(ValueError, match=r"expected kl.p99.9.high to have a value .*: too few rows tell it"):
        Condition.of("kl.p99.9.high > 1").holds(numbers)


def test_a_row_without_a_group_is_said_before_the_work(capsys):
    draw()
    groups = pa.array([None if row == 680 else f"document {row // 10}" for row in range(700)])
    parquet.write_table(pa.table({"group": groups}), "group.parquet")
    call = ["score", "--teacher", "teacher.npy", "--student", "student.npy", "--out", "scores.parquet"]
    assert main([*call, "--group", "group.parquet"]) == 2
    assert "expected a group for every row, got null in row 680" in capsys.readouterr().err
    assert not Path("scores.parquet.partial").exists()


def test_the_file_of_scores_may_have_a_name_of_any_bytes():
    draw()
    out = os.fsdecode(b"scores-\xff.parquet")
    for _ in range(2):
        scores = score_files("teacher.npy", "student.npy", out, say=lambda text: None)
    assert summary(scores)["rows"] == 700 and not Path(f"{out}.partial").exists()


def test_a_condition_where_no_row_counts_is_an_error(capsys):
    draw()
    np.save("student.npy", np.full_like(np.load("student.npy"), np.nan))
    call = ["score", "--teacher", "teacher.npy", "--student", "student.npy", "--out", "scores.parquet"]
    for name in ("kl.p99", "agreement.top1"):
        assert main([*call, "--fail-if", f"{name} > 0.1"]) == 2
        assert f"expected rows that count for --fail-if {name}, got none of 700" in capsys.readouterr().err


# ---- Exactly once -----------------------------------------------------------------------------------


def begun(rows=3000):
    """The whole file of scores, and the journal of the same work before its end."""
    draw(rows=rows, classes=200)
    whole = score_files("teacher.npy", "student.npy", "whole.parquet")
    settings = whole.facts["settings"]
    records = np.zeros(rows, [tuple(field) for field in settings["columns"]])
    for name in records.dtype.names:
        records[name] = column(whole, name)
    with Journal(Path("scores.parquet"), settings, records.dtype) as journal:
        for first in range(0, rows, 250):
            journal.append(records[first : first + 250])
    return parquet.read_table("whole.parquet"), Path("scores.parquet.partial")


def test_a_run_cut_off_at_any_byte_is_taken_up():
    whole, partial = begun()
    journal = partial.read_bytes()
    places = random.Random(1).sample(range(len(journal)), 20)
    for place in [*places, 0, 5, len(journal) - 1, len(journal)]:
        partial.write_bytes(journal[:place])
        scores = score_files("teacher.npy", "student.npy", "scores.parquet")
        assert parquet.read_table("scores.parquet").equals(whole), place
        assert not partial.exists()
        scores.path.unlink()


def test_a_record_that_was_damaged_is_scored_again():
    whole, partial = begun()
    journal = bytearray(partial.read_bytes())
    journal[len(journal) // 2] ^= 1
    partial.write_bytes(journal)
    score_files("teacher.npy", "student.npy", "scores.parquet")
    assert parquet.read_table("scores.parquet").equals(whole)


def test_what_was_written_is_not_scored_again(monkeypatch):
    whole, _ = begun()
    monkeypatch.setattr("pykd.scoring.row_scores.RowScores.__call__", None)
    said = []
    score_files("teacher.npy", "student.npy", "scores.parquet", say=said.append)
    assert said == ["scores.parquet.partial has 3,000 rows of 3,000: going on from there"]
    score_files("teacher.npy", "student.npy", "scores.parquet", say=said.append)
    assert said[1:] == ["scores.parquet holds the scores of these files already"]
    assert parquet.read_table("scores.parquet").equals(whole)


def test_other_work_begins_anew():
    begun()
    said = []
    score_files("teacher.npy", "student.npy", "scores.parquet", temperature=2.0, say=said.append)
    assert said == ["scores.parquet.partial was of other files or settings: begun anew"]
    os.utime("teacher.npy", ns=(0, 0))  # a file that has changed
    assert score_files("teacher.npy", "student.npy", "scores.parquet", temperature=2.0, say=said.append).rows == 3000
    assert len(said) == 1


@pytest.mark.slow
def test_a_killed_run_is_taken_up():
    """At twenty random moments, with SIGKILL."""
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(60_000, 300)).astype(np.float32)
    save(teacher, teacher + rng.normal(size=teacher.shape).astype(np.float32))
    call = [sys.executable, "-m", "pykd", "score", "--teacher", "teacher.npy", "--student", "student.npy", "--out"]
    began = time.monotonic()
    subprocess.run([*call, "whole.parquet"], check=True, capture_output=True)
    lasts = time.monotonic() - began
    whole = parquet.read_table("whole.parquet")
    moments = random.Random(2)
    for _ in range(20):
        run = subprocess.Popen([*call, "scores.parquet"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0, lasts))
        run.send_signal(signal.SIGKILL)
        run.wait()
        if Path("scores.parquet").exists():  # whole, or not there
            assert parquet.read_table("scores.parquet").equals(whole)
            Path("scores.parquet").unlink()
    subprocess.run([*call, "scores.parquet"], check=True, capture_output=True)
    assert parquet.read_table("scores.parquet").equals(whole)
    assert not list(Path().glob("scores.parquet.*"))


def test_two_runs_do_not_write_one_file():
    begun()
    with (
        Journal(Path("scores.parquet"), {}, np.dtype("u1")),
        pytest.raises(RuntimeError, match="expected to be alone with scores.parquet.partial"),
    ):
        score_files("teacher.npy", "student.npy", "scores.parquet")


def test_short_writes_are_gone_on_with(monkeypatch):
    whole, partial = begun()
    partial.unlink()
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: max(1, len(data) // 3)]))
    score_files("teacher.npy", "student.npy", "scores.parquet")
    assert parquet.read_table("scores.parquet").equals(whole)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_an_error_and_what_was_written_is_kept(small_disk, capsys):
    draw(rows=20_000)
    call = [
        "score",
        "--teacher",
        "teacher.npy",
        "--student",
        "student.npy",
        "--out",
        str(small_disk / "scores.parquet"),
    ]
    assert main(call) == 2
    assert "got a full disk; make room, and run the same command again" in capsys.readouterr().err
    assert [path.name for path in small_disk.iterdir()] == ["scores.parquet.partial"]
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert main(call) == 0
    score_files("teacher.npy", "student.npy", "whole.parquet")
    assert parquet.read_table(small_disk / "scores.parquet").equals(parquet.read_table("whole.parquet"))


def test_a_disk_that_is_full_at_the_end_is_an_error(small_disk, capsys):
    draw(rows=4_000)
    call = [
        "score",
        "--teacher",
        "teacher.npy",
        "--student",
        "student.npy",
        "--out",
        str(small_disk / "scores.parquet"),
    ]
    assert main(call) == 2  # the journal has room, the Parquet file beside it has none
    assert "scores.parquet, got a full disk" in capsys.readouterr().err
    assert [path.name for path in small_disk.iterdir()] == ["scores.parquet.partial"]


# ---- The command ------------------------------------------------------------------------------------


def test_torch_is_not_imported():
    draw()
    program = (
        "import sys; from pykd.command_line import main\n"
        "code = main(sys.argv[1:])\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'scipy', 'sklearn'} & sys.modules.keys(), 'a heavy import'\n"
        "sys.exit(code)"
    )
    call = ["score", "--teacher", "teacher.npy", "--student", "student.npy", "--out", "o.parquet", "--json", "o.json"]
    subprocess.run([sys.executable, "-c", program, *call], check=True)
    assert json.loads(Path("o.json").read_text())["scores"]["kl"]["count"] == ROWS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "o.parquet", "--teacher", "teacher.npy"], "expected --student FILE, got none"),
        (["--loss", "hinge"], "expected a loss of kl, reverse_kl, .* got 'hinge'; correct --loss"),
        (["--loss", "kl", "--loss", "kl"], "expected losses that differ, got kl, kl"),
        *(
            (["--temperature", number], rf"expected a temperature above 0 .* got {number}; correct --temperature")
            for number in ("0", "nan", "inf", "1e-40")
        ),
        (["--labels", "teacher.npy"], "expected whole numbers in the labels teacher.npy, got float32"),
        (["--out", "teacher.npy"], "expected another file for --out than for what is read"),
        (
            ["--report", "labels.npy", "--labels", "labels.npy"],
            "expected another file for --report than for what is read",
        ),
        (["--json", "o.parquet"], "expected another file for --json than for what is read or written besides"),
        (["--out", "other.npy"], "expected no file at other.npy, or scores to write over, got another file"),
        (["--out", "no/such/folder.parquet"], "expected a folder for --out, got none at no/such; make it"),
        (["--out", "."], r"expected a file for --out, got the folder \.; name a file in it"),
        (["--json", "."], r"expected a file for --json, got the folder \."),
        (["--json", "o.parquet.partial"], "expected another file for --json than for what is read or written besides"),
        (
            ["--json", "o.json", "--report", "o.json.writing"],
            "expected another file for --json than for what is read",
        ),
        (["--out", "labels"], "expected no file at labels.partial, or rows of an earlier run, got another file"),
        (["--seed", "9" * 20], r"expected --seed from 0 to 2\^63 - 1, got 9{20}; correct it"),
        (["--threads", "-1"], "expected --threads from 0, got -1; correct it"),
    ],
)
def test_wrong_arguments_are_said_in_three_parts(arguments, message, capsys):
    import re

    draw()
    np.save("other.npy", np.arange(3))
    Path("labels.partial").write_bytes(b"of somebody else")
    files = [] if "--teacher" in arguments else ["--teacher", "teacher.npy", "--student", "student.npy"]
    out = [] if "--out" in arguments else ["--out", "o.parquet"]
    assert main(["score", *files, *out, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert Path("labels.partial").read_bytes() == b"of somebody else"


def test_names_of_files_may_hold_any_bytes(capsys):
    draw()
    name = os.fsdecode(b"teacher-\xff<b>.npy")
    os.rename("teacher.npy", name)
    call = ["score", "--teacher", name, "--student", "student.npy", "--out", "o.parquet"]
    assert main([*call, "--json", "o.json", "--report", "o.html"]) == 0
    assert json.loads(Path("o.json").read_text())["inputs"]["teacher"]["path"] == name
    page = Path("o.html").read_text(encoding="utf-8")
    assert "teacher-\\udcff&lt;b&gt;.npy" in page and "<b>.npy" not in page


def test_what_is_bad_beyond_the_classes_that_are_compared_has_its_kind():
    """As in the padding of a vocabulary, of which the probability is a score."""
    teacher, *_ = draw()
    width = teacher.shape[1]
    teacher[[0, 1, 2], -1] = np.nan, np.inf, -np.inf
    np.save("teacher.npy", teacher)
    scores = score_files("teacher.npy", "student.npy", "o.parquet", classes=width - 1)
    status = np.concatenate([block["status"] for block in scores.blocks(bad=True)])
    assert [STATUSES[code] for code in status[:4]] == ["nan", "infinite", "ok", "ok"]


@pytest.mark.parametrize("package", ["pyarrow", "matplotlib", "jinja2"])
def test_a_missing_package_is_said_before_anything_is_scored(package, monkeypatch, capsys):
    draw()
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("pykd.scoring.row_scores.RowScores.__call__", None)
    call = ["score", "--teacher", "teacher.npy", "--student", "student.npy", "--out", "o.parquet", "--report", "r.html"]
    assert main(call) == 2
    assert f"expected the package {package} for scoring, got none; pip install 'pykd[score]'" in capsys.readouterr().err


def test_a_bar_shows_the_way_on_a_terminal(monkeypatch, capsys):
    draw()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["score", "--teacher", "teacher.npy", "--student", "student.npy", "--out", "o.parquet"]) == 0
    assert "700" in capsys.readouterr().err


def test_scores_that_say_nothing_of_themselves_are_refused():
    draw()
    score_files("teacher.npy", "student.npy", "scores.parquet")
    table = parquet.read_table("scores.parquet")
    for text, message in ((b"{}", "got others; score again"), (b"{", "to be JSON"), (None, "got another Parquet file")):
        parquet.write_table(
            table.replace_schema_metadata(None if text is None else {b"pykd.scores": text}), "s.parquet"
        )
        with pytest.raises(ValueError, match=message):
            Scores("s.parquet")
    as_text = table.set_column(1, "status", table["status"].cast("string"))
    for changed, name in (
        (table.drop_columns("kl"), "kl"),
        (table.drop_columns("status"), "status"),
        (as_text, "status"),
    ):
        parquet.write_table(changed, "s.parquet")
        with pytest.raises(
            ValueError, match=rf"the columns that `pykd score` writes in s.parquet, got others \({name}\)"
        ):
            Scores("s.parquet")


def test_rows_that_were_changed_are_told_in_one_line(capsys):
    draw()
    scores = score_files("teacher.npy", "student.npy", "scores.parquet")
    table = parquet.read_table("scores.parquet")
    kinds = pa.array(["gone", *STATUSES[1:]])
    codes = table["status"].combine_chunks().indices
    cases = {
        "status": pa.DictionaryArray.from_arrays(codes, kinds),
        "kl": [float("nan")],
        "teacher_class": [-1],
        "student_class": [scores.facts["classes"]],
        "teacher_class_rank": [0],
        "teacher_confidence": [None],
        "row": [1],
    }
    for name, changed in cases.items():
        place, column = table.schema.get_field_index(name), table[name]
        if isinstance(changed, list):
            changed = pa.array([*changed, *column.to_pylist()[1:]], column.type)
        parquet.write_table(table.set_column(place, name, changed), "s.parquet")
        with pytest.raises(ValueError, match=rf"expected .* as {name} in s.parquet, .* got others between rows 0 and"):
            summary(Scores("s.parquet"))
    assert main(["score", "--compare", "scores.parquet", "s.parquet"]) == 2
    assert "expected the rows from 0 on as row in s.parquet" in capsys.readouterr().err


def test_the_kinds_of_rows_are_in_the_report_by_name():
    _, report, _ = report_of(rows=10)
    assert list(report["bad_rows"]) == list(STATUSES[1:])
