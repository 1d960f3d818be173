"""`pykd score --compare`: paired differences, against SciPy."""

import json
from dataclasses import dataclass
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
    for option, value in (("teacher", "t.npy"), ("temperature", "2"), ("classes", "3"), ("format", "llama")):
        assert main(["score", "--compare", "a.parquet", "b.parquet", f"--{option}", value]) == 2
        assert f"expected no --{option} with --compare" in capsys.readouterr().err


def test_settings_that_differ_are_said(capsys):
    """A difference of temperatures, labels or classes looks like one of students."""
    first, _ = two_students()
    np.save("others.npy", np.load("labels.npy")[::-1])

    def differing(**settings):
        arguments = {
            "teacher": "teacher.npy",
            "student": "a.npy",
            "out": "c.parquet",
            "labels": "labels.npy",
        } | settings
        report = compare(first, score_files(**arguments, say=lambda text: None))
        assert report["same_teacher"]
        return report["settings_that_differ"]

    assert differing() == differing(temperature=1.0) == differing(labels=None) == []
    assert differing(losses=("jsd", "kl")) == []
    assert differing(temperature=2.0, labels="others.npy") == ["labels", "temperature"]
    assert differing(classes=CLASSES - 1) == ["classes"]
    assert main(["score", "--compare", "a.parquet", "c.parquet"]) == 0
    assert "scored with different settings (classes)" in capsys.readouterr().out
    np.save("bad.npy", np.full((ROWS, CLASSES), np.nan))
    score_files("teacher.npy", "bad.npy", "bad.parquet")
    assert main(["score", "--compare", "a.parquet", "bad.parquet", "--fail-if", "kl.difference > 0"]) == 2
    assert f"expected rows that count for --fail-if kl.difference, got none of {ROWS}" in capsys.readouterr().err


class Drawn:
    """Scores in memory, as far as compare() looks at them."""

    def __init__(self, group, kl):
        self.path, self.rows, self.has_group = Path("drawn"), len(kl), True
        self.names = ["row", "status", "kl", "teacher_class_rank", "group"]
        settings = {"files": {"teacher": None}}
        self.facts = {"losses": ["kl"], "settings": settings, "temperature": None, "classes": CLASSES}
        self.columns = {
            "row": np.arange(self.rows),
            "status": np.zeros(self.rows, np.uint8),
            "kl": kl.astype(np.float32),
            "teacher_class_rank": np.where(kl < LIMIT, 1, 2),
            "group": group,
        }

    def blocks(self, *names, bad=False):
        for first in range(0, self.rows, 1000):
            yield {name: self.columns[name][first : first + 1000] for name in {"row", "status", *names}}


LIMIT = 1.5  # below which both have the same best class
QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


@dataclass
class Students:
    """Two students whose scores are log-normal, in groups of uneven sizes whose rows share most of their variance."""

    noise: float  # in logarithms: the second drifts by so much, by groups and by rows
    groups: int = 150
    largest: int = 30  # rows of a group are fewer
    scale: float = 1.0  # of the logarithms: of 3, one row in a hundred is 90 times the median
    course: float = 0.0  # by so much the logarithms of the second spread more, without any noise
    step: float = 0.0  # scores are whole steps

    def draw(self, rng):
        sizes = rng.integers(1, self.largest, size=self.groups)
        group = np.repeat(np.arange(self.groups), sizes)
        own = rng.normal(size=(2, len(group)))
        level, drift = rng.normal(size=(2, self.groups))[:, group]
        first = self.scale * (0.5 * level + 0.4 * own[0])
        second = (1 + self.course) * first + self.course + self.noise * (0.5 + 0.7 * drift + 0.7 * own[1])
        return (group, *map(self._stepped, (np.exp(first), np.exp(second))))

    def _stepped(self, scores):
        return np.floor(scores / self.step) * self.step if self.step else scores

    def truths(self):
        """Differences by name."""
        spreads = 0.41 * self.scale**2, 0.41 * self.scale**2 * (1 + self.course) ** 2 + 0.98 * self.noise**2
        centres = 0.0, 0.5 * self.noise + self.course
        sides = list(zip(centres, np.sqrt(spreads), strict=True))
        found = {}
        if not self.step:
            found["mean"] = np.diff([np.exp(m + s * s / 2) for m, s in sides])[0]
            found["agreement"] = np.diff([stats.norm.cdf((np.log(LIMIT) - m) / s) for m, s in sides])[0]
        for share in QUANTILES:
            at = [np.exp(m + stats.norm.ppf(share / 100) * s) for m, s in sides]
            found[f"p{share}"] = np.diff([self._stepped(value) for value in at])[0]
        return found


def coverage(students, repeats, seed):
    """How often each interval that is told holds the truth, and of how many samples it is told."""
    rng = np.random.default_rng(seed)
    truth = students.truths()
    inside, told = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for _ in range(repeats):
        group, first, second = students.draw(rng)
        report = compare(Drawn(group, first), Drawn(group, second))
        ends = {"mean": report["scores"]["kl"]["interval"], "agreement": report["shares"]["agreement"]["interval"]}
        ends |= {name: entry["interval"] for name, entry in report["scores"]["kl"]["quantiles"].items()}
        for name, value in truth.items():
            if ends[name] is not None:
                inside[name] += ends[name][0] <= value <= ends[name][1]
                told[name] += 1
    return {name: count / told[name] for name, count in inside.items() if told[name] > 0.5 * repeats}


SAMPLES = {  # of the students, and what their intervals hold of the truth
    "nearly the same": Students(noise=0.03),
    "far apart": Students(noise=1.0),
    "heavy tails": Students(noise=0.1, scale=3.0),
    "one a function of the other": Students(noise=0.0, course=0.1),
    "few groups": Students(noise=0.1, groups=20),
    "rows that are independent": Students(noise=0.3, groups=300, largest=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLES)
def test_intervals_of_differences_of_quantiles_cover_the_truth_whatever_the_students(kind):
    """Of 200 samples: 93 to 97 % and what chance makes of it. (Means of heavy tails are covered less often by Student's t.)"""
    found = {name: inside for name, inside in coverage(SAMPLES[kind], repeats=200, seed=7).items() if name[0] == "p"}
    assert min(found.values()) >= 0.9 and max(found.values()) <= 0.995, found
    assert 0.93 <= np.mean(list(found.values())) <= 0.97, found


def test_intervals_of_differences_cover_the_truth_of_scores_with_ties():
    """In at least 93 %: a quantile that jumps has no interval of less."""
    for step in (0.25, 1.0):
        assert min(coverage(Students(noise=0.1, step=step), repeats=40, seed=7).values()) >= 0.93


def test_intervals_of_differences_cover_the_truth_on_grouped_rows():
    """Of 100 samples, within four standard errors; below is what many more give."""
    found = coverage(Students(noise=0.1), repeats=100, seed=1)
    assert len(found) == 11 and min(found.values()) >= 0.86, found
    assert 0.93 <= np.mean(list(found.values())) <= 0.975, found
