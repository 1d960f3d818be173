"""`pykd score --compare`: paired differences, against SciPy."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pykd.command_line import main
from pykd.scoring.compare import compare, mcnemar, numbers_of_comparison
from pykd.scoring.stream import score_files

ROWS, CLASSES = 400, 6


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def two_students(group=None, bad=()):
    """Scores of two students of one teacher; the second is a little worse."""
    rng = np.random.default_rng(2)
    teacher = 2 * rng.normal(size=(ROWS, CLASSES))
    noise = rng.normal(size=teacher.shape)
    labels = (teacher + rng.gumbel(size=teacher.shape)).argmax(axis=1)
    np.save("teacher.npy", teacher)
    np.save("labels.npy", labels)
    if group is not None:
        np.save("group.npy", group)
    scores = []
    for name, scale in (("a", 0.5), ("b", 0.6)):
        student = teacher + scale * noise + 0.2 * rng.normal(size=teacher.shape)
        student[list(bad)] = np.nan if name == "b" else 0
        np.save(f"{name}.npy", student)
        scores.append(
            score_files("teacher.npy", f"{name}.npy", f"{name}.parquet", ("kl",), "labels.npy",
                        None if group is None else "group.npy")
        )  # fmt: skip
    return scores


def column(scores, name, kept=slice(None)):
    return np.concatenate([block[name] for block in scores.blocks(name, bad=True)])[kept]


@pytest.mark.parametrize("bad", [(), (3, 50)])
def test_differences_are_scipys(bad):
    a, b = two_students(bad=bad)
    report = compare(a, b)
    kept = np.setdiff1d(np.arange(ROWS), bad)
    assert (report["rows"], report["paired"], report["same_teacher"]) == (ROWS, len(kept), True)
    for name in ("kl", "student_nll", "label_probability_change"):
        first, second = (column(scores, name, kept).astype(float) for scores in (a, b))
        expected = stats.ttest_rel(second, first)
        entry = report["scores"][name]
        assert entry["first"] == pytest.approx(first.mean())
        assert entry["difference"] == pytest.approx((second - first).mean(), rel=1e-9)
        np.testing.assert_allclose(entry["interval"], expected.confidence_interval(0.95), rtol=1e-6)
        assert entry["p_value"] == pytest.approx(expected.pvalue, rel=1e-5, abs=1e-12)
        assert entry["standard_deviations"] == pytest.approx((second - first).mean() / (second - first).std(ddof=1))
        error = stats.sem(second - first)
        seen = (stats.t.ppf(0.975, len(kept) - 1) + stats.norm.ppf(0.8)) * error
        assert entry["smallest_seen"] == pytest.approx(seen, rel=1e-6)
    assert report["scores"]["teacher_nll"]["difference"] == 0
    labels = np.load("labels.npy")[kept]
    right = [column(scores, "student_class", kept) == labels for scores in (a, b)]
    entry = report["shares"]["accuracy"]
    assert entry["gained"] == (right[1] & ~right[0]).sum() and entry["lost"] == (right[0] & ~right[1]).sum()
    assert entry["difference"] == pytest.approx(right[1].mean() - right[0].mean())
    assert entry["p_value"] == pytest.approx(stats.binomtest(entry["gained"], entry["gained"] + entry["lost"]).pvalue)
    same = [column(s, "teacher_class", kept) == column(s, "student_class", kept) for s in (a, b)]
    assert report["shares"]["agreement"]["second"] == pytest.approx(same[1].mean())


def test_groups_are_what_is_independent():
    group = np.repeat(np.arange(20), ROWS // 20)
    a, b = two_students(group)
    entry = compare(a, b)["scores"]["kl"]
    difference = (column(b, "kl").astype(float) - column(a, "kl")).reshape(20, -1).mean(axis=1)
    expected = stats.ttest_1samp(difference, 0)
    np.testing.assert_allclose(entry["interval"], expected.confidence_interval(0.95), rtol=1e-6)
    assert entry["p_value"] == pytest.approx(expected.pvalue, rel=1e-5)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 12), (50, 50), (900, 1000), (60_000, 61_000)])
def test_mcnemar_is_scipys(gained, lost):
    expected = 1.0 if gained + lost == 0 else stats.binomtest(gained, gained + lost).pvalue
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=2e-2)


def test_the_command(capsys):
    a, b = two_students()
    assert (
        main(["score", "--compare", "a.parquet", "b.parquet", "--json", "c.json", "--fail-if", "kl.difference.low > 0"])
        == 1
    )
    printed = capsys.readouterr().out
    assert "400 of 400 rows count in both" in printed and "FAILED: kl.difference.low > 0" in printed
    assert json.loads(Path("c.json").read_text()) == compare(a, b)
    assert (
        main(
            [
                "score",
                "--compare",
                "a.parquet",
                "a.parquet",
                "--fail-if",
                "kl.difference > 0",
                "--fail-if",
                "kl.p_value < 1",
            ]
        )
        == 0
    )
    assert numbers_of_comparison(compare(a, a))["accuracy.gained"] == 0


def test_what_does_not_go_together_is_refused(capsys):
    two_students()
    np.save("teacher.npy", np.load("teacher.npy")[:10])
    np.save("a.npy", np.load("a.npy")[:10])
    score_files("teacher.npy", "a.npy", "short.parquet")
    assert main(["score", "--compare", "a.parquet", "short.parquet"]) == 2
    assert "expected scores of the same rows, got 400 in a.parquet and 10 in short.parquet" in capsys.readouterr().err
    assert main(["score", "--compare", "a.parquet", "nowhere.parquet"]) == 2
    assert "expected scores at nowhere.parquet, got no file there" in capsys.readouterr().err
    assert main(["score", "--compare", "a.parquet", "b.parquet", "--teacher", "t.npy"]) == 2
    assert "expected no --teacher with --compare" in capsys.readouterr().err
