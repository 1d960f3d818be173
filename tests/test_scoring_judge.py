"""Every number of the JSON files of `pykd score` and `--compare`, against one judge that knows the logits alone.

The judge is NumPy and SciPy in float64, written from docs/scoring.md and not from the code. It builds the whole file, and the two are
compared leaf by leaf: a number that the judge does not know is a failure, and so is one that is missing.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

from pykd.command_line import main

ROWS, CLASSES, TEACHER_CLASSES, TEMPERATURE, SEED = 900, 12, 14, 1.5, 5
SHARES = {"p0.1": 0.001, "p1": 0.01, "p5": 0.05, "p10": 0.1, "p25": 0.25, "p50": 0.5,
          "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}  # fmt: skip
BAD = {"nan": [10, 11], "infinite": [12, 13, 14], "infinite_score": [15], "label_out_of_range": [16, 17], "ignored": [18],
       "ragged": [], "missing": []}  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Data:
    """Files of a teacher, two students, labels and groups; and, of the rows that count, what the judge says of each."""

    def __init__(self, labelled=True, grouped=True):
        rng = np.random.default_rng(12)
        teacher = 2 * rng.normal(size=(ROWS, TEACHER_CLASSES))
        group = np.sort(rng.integers(0, 45, size=ROWS))
        moved = rng.normal(size=(45, CLASSES))[group]  # what the rows of a group have in common
        noise = rng.normal(size=(ROWS, CLASSES)) * rng.exponential(size=(ROWS, 1))
        labels = (teacher[:, :CLASSES] + rng.gumbel(size=noise.shape)).argmax(axis=1)
        students = [teacher[:, :CLASSES] + size * (noise + 0.5 * moved) for size in (1.0, 1.15)]
        students[1] += 0.1 * rng.normal(size=noise.shape)
        for student in students:
            student[11, 0], student[13, 1], student[14] = np.nan, np.inf, -np.inf
            student[15, teacher[15, :CLASSES].argmax()] = -np.inf
        teacher[10, 3], teacher[12, 2] = np.nan, np.inf
        labels[16], labels[17], labels[18] = CLASSES, -1, -100
        self.teacher = teacher.astype(np.float32)
        self.students = [student.astype(np.float32) for student in students]
        self.labels, self.labelled, self.grouped = labels, labelled, grouped
        np.save("teacher.npy", self.teacher)
        np.save("labels.npy", labels)
        np.save("group.npy", np.array([f"document {g}" for g in group]))
        for name, student in zip("ab", self.students, strict=True):
            np.save(f"{name}.npy", student)
        self.bad = dict(BAD) if labelled else dict(BAD) | {"label_out_of_range": [], "ignored": []}
        self.kept = np.setdiff1d(np.arange(ROWS), [row for rows in self.bad.values() for row in rows])
        units = group if grouped else np.arange(ROWS)
        self.unit = np.unique(units[self.kept], return_inverse=True)[1]

    def score(self, name):
        call = ["score", "--teacher", "teacher.npy", "--student", f"{name}.npy", "--out", f"{name}.parquet"]
        call += ["--json", f"{name}.json", "--seed", str(SEED), "--loss", "kl", "--loss", "jsd"]
        call += ["--classes", str(CLASSES), "--temperature", str(TEMPERATURE)]
        call += ["--labels", "labels.npy"] if self.labelled else []
        call += ["--group", "group.npy"] if self.grouped else []
        assert main(call) == 0
        return json.loads(Path(f"{name}.json").read_text())

    def rows(self, number):
        """By name, what is said of each row that counts."""
        whole = self.teacher[self.kept].astype(np.float64)
        teacher, student = whole[:, :CLASSES], self.students[number][self.kept].astype(np.float64)
        p, q = (special.softmax(x / TEMPERATURE, axis=1) for x in (teacher, student))
        middle = (p + q) / 2
        found = {"kl": special.rel_entr(p, q).sum(axis=1)}
        found["jsd"] = (special.rel_entr(p, middle) + special.rel_entr(q, middle)).sum(axis=1) / 2
        found["teacher_class"], found["student_class"] = teacher.argmax(axis=1), student.argmax(axis=1)
        best = np.take_along_axis(student, found["teacher_class"][:, None], axis=1)
        found["teacher_class_rank"] = 1 + (student > best).sum(axis=1)
        p, q = special.softmax(teacher, axis=1), special.softmax(student, axis=1)
        found["teacher_confidence"], found["student_confidence"] = p.max(axis=1), q.max(axis=1)
        if self.labelled:
            found["label"] = self.labels[self.kept]
            own = [np.take_along_axis(x, found["label"][:, None], axis=1)[:, 0] for x in (p, q)]
            found["teacher_nll"], found["student_nll"] = -np.log(own[0]), -np.log(own[1])
            found["label_probability_change"] = own[1] - own[0]
        found["teacher_mass_cut"] = special.softmax(whole, axis=1)[:, CLASSES:].sum(axis=1)
        return found


# ---- Intervals -----------------------------------------------------------------------------------


class Judge:
    """95 % intervals of rows that come in units: groups, or rows by themselves."""

    def __init__(self, unit, grouped):
        self.grouped, self.units = grouped, int(unit.max()) + 1
        self.member = (np.arange(self.units)[:, None] == unit).astype(float)  # (units, rows)

    def sums(self, values):
        return self.member @ values

    def t(self, units):
        return stats.t.ppf(0.975, units - 1)

    def variance_of_mean(self, values, among):
        """Of Σ values / Σ among, linearised, between units that have any."""
        total, count = self.sums(values), self.sums(among)
        units = (count > 0).sum()
        rest = total - total.sum() / count.sum() * count
        return (rest**2).sum() * units / (units - 1) / count.sum() ** 2, units

    def mean(self, values, among=None):
        among = np.ones(len(values)) if among is None else among
        if (self.sums(among) > 0).sum() < 2:
            return None
        variance, units = self.variance_of_mean(values * among, among)
        middle, half = (values * among).sum() / among.sum(), self.t(units) * math.sqrt(variance)
        return [middle - half, middle + half]

    def worth(self, share, hits, among):
        """Independent rows of which the share has the same variance, and standard errors to an end."""
        if not self.grouped:
            return among.sum(), stats.norm.ppf(0.975)
        variance, units = self.variance_of_mean(hits * among, among)
        total, count = self.sums(hits * among), self.sums(among)
        rest = (total - total.sum() / count.sum() * count)[count > 0]
        # A variance is told by n − 1 squares where they are those of a normal; by fewer where a few of them are large.
        spread = (rest**4).mean() - (rest**2).mean() ** 2
        freedom = 2 * (rest**2).mean() ** 2 * units / spread if spread > 0 else math.inf
        errors = stats.t.ppf(0.975, max(1, math.floor(min(freedom, units - 1))))
        return min(share * (1 - share) / variance if variance > 0 else units, among.sum()), errors

    def wilson(self, share, hits, among):
        count, errors = self.worth(share, hits, among)
        centre = (share + errors**2 / 2 / count) / (1 + errors**2 / count)
        half = errors * math.sqrt(share * (1 - share) / count + (errors / 2 / count) ** 2) / (1 + errors**2 / count)
        return max(centre - half, 0.0), min(centre + half, 1.0)

    def share(self, hits, among=None):
        among = np.ones(len(hits)) if among is None else among
        if (self.sums(among) > 0).sum() < 2:
            return None
        return list(self.wilson((hits * among).sum() / among.sum(), hits, among))

    def places(self, values, share):
        """Of the sorted rows, those that enclose the quantile."""
        rows = len(values)
        worth, errors = self.worth(share, values <= np.quantile(values, share), np.ones(rows))
        spread = math.sqrt(
            worth * share * (1 - share)
        )  # of the binomial count, whose skewness is (1 − 2 share) / spread
        ends = [sign * errors * spread + (errors**2 - 1) * (1 - 2 * share) / 6 for sign in (-1, 1)]
        low = math.floor((share + min(ends[0], 0) / worth) * rows) - 1
        high = math.ceil((share + max(ends[1], 0) / worth) * rows)
        return (
            low if low >= 0 and worth * share >= 3 else None,
            high if high < rows and worth * (1 - share) >= 3 else None,
        )

    def quantile(self, values, share):
        places = self.places(values, share)
        return None if places == (None, None) else [None if p is None else np.sort(values)[p] for p in places]

    def quantile_difference(self, first, second, share):
        """Of the quantiles of two scores of the same rows."""
        ends = [self.places(values, share) for values in (first, second)]
        if any(end is None for pair in ends for end in pair):
            return None
        ranks = np.unique(np.linspace(min(e[0] for e in ends), max(e[1] for e in ends), 33).round().astype(int))
        rows, ones = len(first), np.ones(len(first))
        quantile = [np.quantile(values, share) for values in (first, second)]
        near = np.stack([np.sort(values)[ranks] for values in (first, second)])
        reach = (ranks[-1] - ranks[0]) / 2  # in rows
        x = (ranks - share * (rows - 1)) / reach
        t = self.t(self.units)

        def coefficient(values, degree, power):  # of the polynomial of least squares
            return np.polyfit(x, values, degree)[degree - power]

        # What is below the second quantile and not the first, row by row, at each of the places.
        apart = np.stack([(second <= near[1, i]) * 1.0 - (first <= near[0, i]) for i in range(len(ranks))])
        swapped = coefficient([self.variance_of_mean(move, ones)[0] for move in apart], 1, 0)
        step = t * math.sqrt(max(swapped, 0)) * rows / reach / 2
        if any(len(set(side)) <= len(ranks) / 2 for side in near):
            reached = [
                near[1, j] - near[0, i]
                for i in range(len(ranks))
                for j in range(len(ranks))
                if abs(x[i] - x[j]) <= 2 * step + x[1] - x[0]
            ]
            reached.append(quantile[1] - quantile[0])
            return [min(reached), max(reached)]
        slope = [
            (1 - min(step, 1)) * coefficient(side, 1, 1) + min(step, 1) * (side[-1] - side[0]) / 2 for side in near
        ]
        bent = [coefficient(side, 2, 2) * max(min(step, 1), 0.3) for side in near]
        falling, rising = ([max(s + sign * b, 0) for s, b in zip(slope, bent, strict=True)] for sign in (-1, 1))
        swaps = {"down": step * (falling[1] + rising[0]), "up": step * (rising[1] + falling[0])}

        below = [(values <= q) * 1.0 for values, q in zip((first, second), quantile, strict=True)]
        alone = np.mean([self.variance_of_mean(each, ones)[0] for each in below])
        joint = min(self.variance_of_mean((below[0] + below[1]) / 2, ones)[0] / alone, 1) if alone else 1
        per_share = np.mean(slope) / reach * rows

        def part(degree, factor, times):  # of the way of the difference, and its square without noise
            value = factor * coefficient(near[1] - near[0], degree, degree)
            noise = self.variance_of_mean(factor * coefficient(apart, degree, degree), ones)[0]
            return value, value**2 - times * per_share**2 * noise

        tilt, squared = part(1, math.sqrt(joint), 1)
        along = math.copysign(math.sqrt(max(squared, 0)), tilt)
        curve, bow = part(2, joint, 4)
        turn = math.copysign(math.sqrt(max(bow, 0)), curve)
        ways = [turn - along, turn + along]  # what the difference comes to at either end
        course = {"down": -min(0, *ways), "up": max(0, *ways)}
        rest = near[1] - near[0] - np.polyval(np.polyfit(x, near[1] - near[0], 2), x)
        scatter = t**2 * (rest @ rest) / max(len(ranks) - 3, 1)
        down, up = (
            math.sqrt(max(course[side] ** 2 + swaps[side] ** 2 + min(squared, 0), scatter)) for side in ("down", "up")
        )
        return [quantile[1] - quantile[0] - down, quantile[1] - quantile[0] + up]

    def draws(self, batches):
        """Groups drawn with replacement, by the generator that the seed stands for."""
        generator = np.random.Generator(np.random.PCG64(SEED))
        return generator.multinomial(batches, np.full(batches, 1 / batches), size=1000)


# ---- The report ----------------------------------------------------------------------------------


def expected_report(data, number, name):
    rows, judge = data.rows(number), Judge(data.unit, data.grouped)
    count = len(data.kept)
    report = {
        "rows": ROWS,
        "counted": count,
        "bad_rows": {kind: len(places) for kind, places in data.bad.items()},
        "inputs": inputs(data, name),
        "losses": ["kl", "jsd"],
        "classes_compared": CLASSES,
        "temperature": TEMPERATURE,
        "left_out": {},  # of a teacher that was stored in part
        "seed": SEED,
        "independent": "groups" if data.grouped else "rows",
    }
    scores = [n for n in rows if rows[n].dtype.kind == "f"]
    report["scores"] = {n: expected_score(rows[n], judge) for n in scores}
    agreed = rows["teacher_class_rank"] == 1
    report["agreement"] = {f"top{k}": share_of(rows["teacher_class_rank"] <= k, judge) for k in (1, 5)}
    if data.labelled:
        report |= with_labels(data, rows, judge)
    bins = np.minimum((rows["teacher_confidence"] * 10).astype(int), 9)
    report["confidence_bins"] = [
        {
            "from": pytest.approx(b / 10),
            "to": pytest.approx((b + 1) / 10),
            "share": (bins == b).sum() / count,
            **part_of(bins == b, rows["kl"], agreed, judge),
        }
        for b in range(10)
    ]
    by = "label" if data.labelled else "teacher_class"
    order = sorted(set(rows[by].tolist()), key=lambda c: -rows["kl"][rows[by] == c].sum())
    report["by_class"] = {
        "by": by,
        "present": len(order),
        "classes": [{"class": c, **part_of(rows[by] == c, rows["kl"], agreed, judge)} for c in order],
    }
    report["course"] = course(data, rows["kl"])
    report["histogram"] = histogram(rows["kl"])
    worst = sorted(range(count), key=lambda i: -rows["kl"][i])[:100]
    report["worst_rows"] = [{"row": int(data.kept[i]), **{n: rows[n][i] for n in rows}} for i in worst]
    return report


def inputs(data, name):
    def entry(path, classes, dtype):
        return {"path": path, "rows": ROWS, "classes": classes, "dtype": dtype}

    found = {"teacher": entry("teacher.npy", TEACHER_CLASSES, "float32")}
    found["student"] = entry(f"{name}.npy", CLASSES, "float32")
    if data.labelled:
        found["labels"] = entry("labels.npy", None, "int64")
    if data.grouped:
        found["group"] = entry("group.npy", None, str(np.load("group.npy").dtype.name))
    return found


def expected_score(values, judge):
    return {
        "count": len(values),
        "mean": values.mean(),
        "interval": judge.mean(values),
        "root_mean_square": np.sqrt((values**2).mean()),
        "minimum": values.min(),
        "maximum": values.max(),
        "quantiles": {name: np.quantile(values, share) for name, share in SHARES.items()},
        "quantile_intervals": {name: judge.quantile(values, share) for name, share in SHARES.items()},
    }


def share_of(hits, judge):
    return {"value": hits.mean(), "interval": judge.share(hits), "count": len(hits)}


def part_of(inside, kl, agreed, judge):
    if not inside.any():
        return {"count": 0, "mean": None, "interval": None, "agreement": None, "agreement_interval": None}
    return {
        "count": inside.sum(),
        "mean": kl[inside].mean(),
        "interval": judge.mean(kl, inside),
        "agreement": agreed[inside].mean(),
        "agreement_interval": judge.share(agreed, inside),
    }


def with_labels(data, rows, judge):
    right = {side: rows[f"{side}_class"] == rows["label"] for side in ("teacher", "student")}
    nll = {side: rows[f"{side}_nll"] for side in right}
    nll["student_over_teacher"] = nll["student"] - nll["teacher"]
    return {
        "accuracy": {side: share_of(hit, judge) for side, hit in right.items()},
        "perplexity": {
            side: {"value": np.exp(v.mean()), "interval": np.exp(judge.mean(v)).tolist(), "count": len(v)}
            for side, v in nll.items()
        },
        "calibration_error": calibration(data, rows, right, judge),
    }


def calibration(data, rows, right, judge):
    """Of 15 bins: the bootstrap's percentile interval and the basic one, both covered."""
    # Units are those of the file, with those of which no row counts.
    units = np.unique(np.load("group.npy"))[:, None] if data.grouped else np.arange(ROWS)[:, None]
    own = (np.load("group.npy") if data.grouped else np.arange(ROWS))[data.kept]
    member = units == own  # (units, rows)
    draws = judge.draws(len(units)) @ member.astype(int)  # how often each row is drawn
    value, repeats, noise = {}, {}, {}
    for side, hit in right.items():
        confidence = rows[f"{side}_confidence"]
        bins = np.minimum((confidence * 15).astype(int), 14)
        gaps = np.stack([(bins == b) * (confidence - hit) for b in range(15)], axis=1)  # (rows, bins)
        value[side] = np.abs(gaps.sum(axis=0)).sum() / len(hit)
        drawn = draws @ gaps
        repeats[side] = np.abs(drawn).sum(axis=1) / draws.sum(axis=1)
        noise[side] = np.abs(drawn - gaps.sum(axis=0)).sum(axis=1) / draws.sum(axis=1)
    value["student_minus_teacher"] = value["student"] - value["teacher"]
    repeats["student_minus_teacher"] = repeats["student"] - repeats["teacher"]
    found = {}
    for side, v in value.items():
        low, high = np.quantile(repeats[side], [0.025, 0.975])
        low, high = min(low, 2 * v - high), max(high, 2 * v - low)
        if side in noise:
            low = 0.0 if v <= np.quantile(noise[side], 0.95) else max(low, 0.0)
        found[side] = {"value": v, "interval": [low, high], "count": len(data.kept)}
    return found


def course(data, kl):
    found = []
    for i in range(48):
        first, end = i * ROWS // 48, (i + 1) * ROWS // 48
        inside = kl[(data.kept >= first) & (data.kept < end)]
        middle = np.quantile(inside, [0.5, 0.9, 0.99]) if len(inside) else [None] * 3
        found.append(
            {
                "first_row": first,
                "last_row": end - 1,
                "count": len(inside),
                "mean": inside.mean() if len(inside) else None,
                **dict(zip(("p50", "p90", "p99"), middle, strict=True)),
            }
        )
    return found


def histogram(kl):
    """60 bins; the lowest and highest take what lies beyond."""
    low, high = np.quantile(kl, 0.001), kl.max()
    assert high > 100 * low, "of two decades and more, which is drawn on a logarithmic axis"
    edges = np.exp(np.linspace(np.log(max(low, high * 1e-8)), np.log(high), 61))
    counts = np.histogram(np.clip(kl, edges[0], edges[-1]), edges)[0]
    return {"score": "kl", "logarithmic": True, "edges": edges.tolist(), "counts": counts.tolist()}


# ---- The comparison ------------------------------------------------------------------------------


def expected_comparison(data):
    first, second = data.rows(0), data.rows(1)
    judge = Judge(data.unit, data.grouped)
    scores = [n for n in first if first[n].dtype.kind == "f"]
    report = {
        "first": "a.parquet",
        "second": "b.parquet",
        "rows": ROWS,
        "paired": len(data.kept),
        "independent": "groups" if data.grouped else "rows",
        "same_teacher": True,
        "settings_that_differ": [],
        "losses": ["kl", "jsd"],
        "seed": SEED,
        "scores": {n: difference(first[n], second[n], judge) for n in scores},
        "shares": {},
    }
    for n in scores:
        report["scores"][n]["quantiles"] = {
            name: {
                "first": np.quantile(first[n], share),
                "second": np.quantile(second[n], share),
                "difference": np.quantile(second[n], share) - np.quantile(first[n], share),
                "interval": judge.quantile_difference(first[n], second[n], share),
            }
            for name, share in SHARES.items()
        }
    hits = {"agreement": [rows["teacher_class_rank"] == 1 for rows in (first, second)]}
    if data.labelled:
        hits["accuracy"] = [rows["student_class"] == rows["label"] for rows in (first, second)]
    for name, (before, after) in hits.items():
        entry = difference(before.astype(float), after.astype(float), judge)
        entry |= {"gained": (after & ~before).sum(), "lost": (before & ~after).sum()}
        if not data.grouped:
            changed = int(entry["gained"] + entry["lost"])
            entry["p_value"] = stats.binomtest(int(entry["gained"]), changed).pvalue if changed else 1.0
        report["shares"][name] = entry
    return report


def difference(first, second, judge):
    moved = second - first
    variance, units = judge.variance_of_mean(moved, np.ones(len(moved)))
    error, spread = math.sqrt(variance), moved.std(ddof=1)
    nothing = not moved.any()
    return {
        "first": first.mean(),
        "second": second.mean(),
        "difference": moved.mean(),
        "interval": judge.mean(moved),
        "standard_deviations": None if nothing else moved.mean() / spread,
        "p_value": 1.0 if nothing else 2 * stats.t.sf(abs(moved.mean()) / error, units - 1),
        "smallest_seen": (judge.t(units) + stats.norm.ppf(0.8)) * error,
        "count": len(moved),
    }


# ---- Leaf by leaf --------------------------------------------------------------------------------


def check(got, expected, place="", relative=2e-4, absolute=2e-6):
    """The same keys, the same lengths, the same words; numbers of float32 logits within rounding."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), f"{place}: {got.keys() ^ expected.keys()}"
        for key in expected:
            check(got[key], expected[key], f"{place}.{key}", relative, absolute)
    elif isinstance(expected, list):
        assert len(got) == len(expected), f"{place}: {len(got)} for {len(expected)}"
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            check(one, other, f"{place}[{i}]", relative, absolute)
    elif isinstance(expected, float | np.floating):
        assert got is not None and abs(got - expected) <= relative * abs(expected) + absolute, (place, got, expected)
    else:
        assert got == expected, (place, got, expected)


@pytest.mark.parametrize(("labelled", "grouped"), [(True, True), (True, False), (False, True)])
def test_every_number_of_the_report_is_the_judges(labelled, grouped):
    data = Data(labelled, grouped)
    check(data.score("a"), expected_report(data, 0, "a"))


@pytest.mark.parametrize(("labelled", "grouped"), [(True, True), (False, False)])
def test_every_number_of_a_comparison_is_the_judges(labelled, grouped):
    data = Data(labelled, grouped)
    data.score("a"), data.score("b")
    assert main(["score", "--compare", "a.parquet", "b.parquet", "--json", "c.json", "--seed", str(SEED)]) == 0
    check(json.loads(Path("c.json").read_text()), expected_comparison(data), relative=2e-3)


def test_the_judge_sees_what_is_missing_and_what_is_off():
    for wrong in (
        {"a": [1.0, 2]},
        {"a": [1.0, 2, 3], "b": 1},
        {"a": [1.001, 2, 3]},
        {"a": [None, 2, 3]},
        {"a": [1.0, 2, 4]},
    ):
        with pytest.raises(AssertionError):
            check(wrong, {"a": [1.0, 2, 3]})
