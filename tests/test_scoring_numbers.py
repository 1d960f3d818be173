"""Quantiles and intervals of scores, against NumPy, SciPy and simulation."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from pykd.scoring import intervals
from pykd.scoring.quantiles import order_statistics, quantiles


def stream_of(values, rows=997):
    return lambda: (values[first : first + rows] for first in range(0, len(values), rows))


VALUES = {
    "normal": lambda rng: rng.normal(size=5000),
    "equal": lambda rng: np.full(5000, -0.25),
    "ties": lambda rng: rng.integers(-3, 3, size=5000),
    "wide": lambda rng: rng.normal(size=5000) * 10.0 ** rng.integers(-40, 38, size=5000),
    "close": lambda rng: 1 + rng.integers(0, 300, size=5000) * 2.0**-23,
    "two": lambda rng: np.array([2.0, -1.0]),
    "one": lambda rng: np.array([0.0]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_order_statistics_are_those_of_a_sort(kind):
    values = VALUES[kind](np.random.default_rng(3)).astype(np.float32)
    ranks = np.unique(np.linspace(0, len(values) - 1, 200).astype(int))
    np.testing.assert_array_equal(order_statistics(stream_of(values), ranks), np.sort(values)[ranks])


@pytest.mark.parametrize("kind", VALUES)
def test_quantiles_are_numpys(kind):
    values = VALUES[kind](np.random.default_rng(4)).astype(np.float32)
    shares = (0.0, 0.001, 0.1, 0.5, 0.77, 0.999, 1.0)
    expected = np.quantile(values.astype(np.float64), shares)
    np.testing.assert_allclose(quantiles(stream_of(values), len(values), shares), expected, rtol=1e-14)


def test_a_place_beyond_the_values_is_an_error():
    with pytest.raises(ValueError, match="expected places from 0 to 2, got 0 to 3"):
        order_statistics(stream_of(np.arange(3, dtype=np.float32)), [0, 3])


def test_quantiles_of_any_number_of_values_fit_in_16_mib():
    """The values are drawn anew in each pass: what is held is the method's own."""
    shares = [0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999]
    count, block = 4_000_000, 50_000

    def stream():
        return (np.random.default_rng(i).normal(size=block).astype(np.float32) for i in range(count // block))

    tracemalloc.start()
    quantiles(stream, count, shares)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20, f"{peak >> 20} MiB"


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 1023, 9999])
def test_students_t_is_scipys(freedom):
    assert intervals.student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_students_t_without_end_is_the_normal():
    assert intervals.student_t(np.inf) == pytest.approx(stats.norm.ppf(0.975), rel=1e-12)


@pytest.mark.parametrize(("hits", "rows"), [(0, 50), (3, 50), (25, 50), (50, 50), (499, 1000)])
def test_the_interval_of_a_share_is_wilsons(hits, rows):
    hit = np.arange(rows) < hits
    expected = stats.binomtest(hits, rows).proportion_ci(method="wilson")
    got = intervals.share_interval(hit.astype(float), np.ones(rows), grouped=False)
    np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("rows", range(1, 60))
def test_an_interval_holds_the_share_itself(rows):
    for hits in (0, rows // 2, rows):
        hit = (np.arange(rows) < hits).astype(float)
        low, high = intervals.share_interval(hit, np.ones(rows), grouped=False) or (0, 1)
        assert 0 <= low <= hit.mean() <= high <= 1


def test_the_interval_of_a_mean_of_rows_is_students():
    values = np.random.default_rng(0).normal(size=40)
    expected = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    np.testing.assert_allclose(intervals.mean_interval(values, np.ones(40)), expected, rtol=1e-9)


def test_groups_of_the_same_size_count_as_one_row_each():
    """Rows that are equal within a group tell nothing more than the groups' means."""
    means = np.random.default_rng(1).normal(size=30)
    expected = stats.t.interval(0.95, 29, means.mean(), stats.sem(means))
    np.testing.assert_allclose(intervals.mean_interval(means * 7, np.full(30, 7.0)), expected, rtol=1e-9)


def test_batches_are_the_groups_or_their_hash():
    few = intervals.Batches(5000, np.array([3, 9, 11]), 0)
    assert few.of(np.arange(4), np.array([9, 3, 11, 9])).tolist() == [1, 0, 2, 1]
    names = np.array([f"document {i}" for i in range(3000)], object)
    for groups in (np.arange(3000) * 1000, names, None):
        many = intervals.Batches(3000, None, 0)
        batch = many.of(np.arange(3000), groups)
        assert many.count == 1024 and batch.min() >= 0 and batch.max() < 1024
        assert np.bincount(batch, minlength=1024).max() < 15
        other = intervals.Batches(3000, None, 1).of(np.arange(3000), groups)
        assert (other != batch).mean() > 0.9  # another seed
    twice = many.of(np.arange(4), np.array(["a", "b", "a", "b"], object))
    assert twice[0] == twice[2] != twice[1] == twice[3]


def grouped_rows(rng, groups):
    """Groups of uneven sizes whose rows share most of their variance; skewed as divergences are."""
    sizes = rng.integers(1, 30, size=groups)
    group = np.repeat(np.arange(groups), sizes)
    level = rng.normal(size=groups)[group]
    return group, np.exp(0.5 * level + 0.4 * rng.normal(size=len(group)))


@pytest.mark.parametrize("what", ["mean", "p50", "p90", "p99", "share"])
def test_intervals_cover_the_truth_on_grouped_rows(what):
    """In 93 to 97 % of 3,000 samples; intervals that take rows for independent would in about 60 %."""
    rng = np.random.default_rng(5)
    scale = np.sqrt(0.5**2 + 0.4**2)
    truth = {
        "mean": np.exp(scale**2 / 2),
        "p50": 1.0,
        "p90": np.exp(scale * stats.norm.ppf(0.9)),
        "p99": np.exp(scale * stats.norm.ppf(0.99)),
        "share": stats.norm.cdf(-np.log(2) / scale),
    }[what]
    groups, repeats, inside = 150, 3000, 0
    for _ in range(repeats):
        group, values = grouped_rows(rng, groups)
        counts = np.bincount(group).astype(float)
        if what == "mean":
            low, high = intervals.mean_interval(np.bincount(group, values), counts)
        elif what == "share":
            low, high = intervals.share_interval(np.bincount(group, values > 2), counts, grouped=True)
        else:
            share = float(what[1:]) / 100
            below = np.bincount(group, values <= np.quantile(values, share))
            places = intervals.quantile_places(share, below, counts, grouped=True)
            # An open end lies beyond every row.
            ordered = np.sort(values)
            low, high = (
                default if place is None else ordered[place]
                for place, default in zip(places, (-np.inf, np.inf), strict=True)
            )
        inside += low <= truth <= high
    assert 0.93 <= inside / repeats <= 0.97, inside / repeats


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "error"), [(150, 0.0), (150, 0.03), (150, 0.1), (800, 0.2)])
def test_intervals_of_calibration_errors_cover_the_truth(groups, error):
    """Errors of the size of their noise included, where percentile and basic interval alone miss it in up to all samples."""
    rng = np.random.default_rng(8)
    weights = intervals.bootstrap_weights(groups, seed=0, repeats=400)
    bins = 15

    def draw(groups):
        group = np.repeat(np.arange(groups), rng.integers(1, 30, size=groups))
        confidence = 1 / (1 + np.exp(-0.8 - 0.8 * rng.normal(size=groups)[group] - rng.normal(size=len(group))))
        right = np.clip(confidence - error * np.sin(3 * confidence), 0, 1)
        place = np.minimum((confidence * bins).astype(int), bins - 1) * groups + group
        return group, confidence, right, place

    gaps, rows = np.zeros(bins), 0
    for _ in range(30):
        group, confidence, right, place = draw(3000)
        gaps += np.bincount(place, confidence - right, bins * 3000).reshape(bins, -1).sum(axis=1)
        rows += len(group)
    truth = np.abs(gaps).sum() / rows
    inside, repeats = 0, 1000
    for _ in range(repeats):
        group, confidence, right, place = draw(groups)
        alike = np.sqrt(0.3) * rng.normal(size=groups)[group] + np.sqrt(0.7) * rng.normal(size=len(group))
        hit = stats.norm.cdf(alike) < right
        gaps = np.bincount(place, confidence - hit, bins * groups).reshape(bins, -1)
        counts = np.bincount(group, minlength=groups).astype(float)
        low, high = intervals.calibration_interval(*intervals.calibration_errors(gaps, counts, weights))
        inside += low <= truth <= high
    assert 0.93 <= inside / repeats <= 0.98, inside / repeats


def test_an_end_that_no_row_can_tell_is_left_open():
    counts = np.ones(1000)
    low, high = intervals.quantile_places(0.999, counts, counts, grouped=False)
    assert low is not None and high is None
    assert intervals.quantile_places(0.5, counts[:1], counts[:1], grouped=False) == (None, None)
    assert intervals.mean_interval(np.ones(1), np.ones(1)) is None
