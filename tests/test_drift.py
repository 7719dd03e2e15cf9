"""Distances equal scipy's; severities follow effects, not the number of rows."""
import numpy as np
import polars as pl
import pytest
from analysis_helpers import COLUMNS, SETTINGS, TRAIN, put, read
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon
from scipy.special import kolmogorov

from income_mlops.comparison import (
    chi2,
    chi2_tail,
    compare,
    jensen_shannon,
    kolmogorov_tail,
    ks,
    psi,
    total_variation,
    wasserstein,
    wilson,
)
from income_mlops.drift import drift, respelled
from income_mlops.profile import profile
from income_mlops.quality import quality
from income_mlops.relations import changed_pairs, relations
from income_mlops.settings import Drift

samples = st.lists(st.integers(-20, 20).map(float) | st.floats(-1e5, 1e5), min_size=1, max_size=50)
counts = st.lists(st.integers(0, 40), min_size=2, max_size=12)


def points(x: list[float]) -> tuple[np.ndarray, np.ndarray]:
    values, n = np.unique(np.array(x) + 0.0, return_counts=True)
    return values, n.astype(float)


@settings(max_examples=200, deadline=None)
@given(samples, samples)
def test_distances_of_numbers(x: list[float], y: list[float]) -> None:
    assert ks(points(x), points(y)) == pytest.approx(stats.ks_2samp(x, y, method="asymp").statistic, abs=1e-12)
    assert wasserstein(points(x), points(y)) == pytest.approx(stats.wasserstein_distance(x, y), rel=1e-9, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(counts, st.data())
def test_distances_of_shares(old: list[int], data: st.DataObject) -> None:
    new = data.draw(st.lists(st.integers(0, 40), min_size=len(old), max_size=len(old)))
    a, b = np.array(old, float), np.array(new, float)
    statistic, dof = chi2(a, b)
    seen = a + b > 0
    if not a.sum() or not b.sum() or seen.sum() < 2:
        assert dof == 0
        return
    true = stats.chi2_contingency(np.array([a, b])[:, seen], correction=False)
    assert (statistic, dof) == (pytest.approx(true.statistic, abs=1e-9), true.dof)
    assert chi2_tail(statistic, dof) == pytest.approx(true.pvalue, rel=1e-8, abs=1e-12)
    p, q = a / a.sum(), b / b.sum()
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2), abs=1e-7)
    assert total_variation(p, q) == pytest.approx(np.abs(p - q).sum() / 2)
    assert psi(p, q) >= 0
    if p.min() > 1e-4 and q.min() > 1e-4:
        assert psi(p, q) == pytest.approx(stats.entropy(p, q) + stats.entropy(q, p), abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 2000), st.integers(1, 400))
def test_tail_of_chi2(x: float, dof: int) -> None:
    assert chi2_tail(x, dof) == pytest.approx(stats.chi2.sf(x, dof), rel=1e-7, abs=1e-250)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.integers(1, 10_000), st.integers(1, 10_000), st.data())
def test_other_tails_and_intervals(d: float, n: int, m: int, data: st.DataObject) -> None:
    assert kolmogorov_tail(d, n, m) == pytest.approx(kolmogorov(d * np.sqrt(n * m / (n + m))), abs=1e-9)
    hits = data.draw(st.integers(0, n))
    interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((interval.low, interval.high), abs=1e-9)


@pytest.fixture(scope="module")
def train() -> pl.DataFrame:
    return read(TRAIN)


def test_sketched_columns_are_within_their_error() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=120_000), rng.normal(0.3, 1.2, size=90_000)
    d = compare(profile(pl.DataFrame({"x": x})), profile(pl.DataFrame({"x": y})))["x"]
    assert 0 < d.error < 0.01
    assert d.ks == pytest.approx(stats.ks_2samp(x, y, method="asymp").statistic, abs=d.error)
    assert d.wasserstein == pytest.approx(stats.wasserstein_distance(x, y) / x.std(), abs=0.02)


def test_a_million_rows_are_no_drift() -> None:
    "A tiny difference is significant beyond doubt and still nothing to report."
    rng = np.random.default_rng(2)
    old, new = (pl.DataFrame({"x": rng.integers(0, 100, n) + shift, "c": rng.choice(["a", "b"], n, p=[p, 1 - p])})
                for n, shift, p in ((500_000, 0, 0.5), (500_000, 1, 0.51)))
    a, b = profile(old), profile(new)
    assert all(d.p_value < 1e-10 for d in compare(a, b).values())
    assert [f.check for f in drift(a, b)] == []
    assert {f.check for f in drift(a, b, Drift(distance_warning=0.005))} == {"drift"}


def test_chance_is_no_drift(train: pl.DataFrame) -> None:
    "Small samples of the same table: no warning, whatever their size."
    old = profile(train, COLUMNS)
    for n in (5, 20, 80, 300, 1000):
        for seed in range(6):
            new = profile(train.sample(n, seed=seed), COLUMNS)
            found = [*drift(old, new), *relations(old, new)]
            assert [f.message for f in found if f.severity != "info" and f.check != "target_constant"] == [], (n, seed)


def test_thresholds_are_settings(train: pl.DataFrame) -> None:
    old = profile(train, COLUMNS)
    new = profile(put("sex", "Male", 0.5)(train), COLUMNS)
    for thresholds, severity in ((Drift(), "warning"), (Drift(distance_error=0.12), "error"),
                                 (Drift(distance_warning=0.3), None)):
        there = {(f.check, f.column): f.severity for f in drift(old, new, thresholds)}
        assert there.get(("drift", "sex")) == severity
    assert SETTINGS.drift == Drift()


def test_spellings_are_read_generously() -> None:
    a, b = (profile(pl.DataFrame({"c": values})).columns[0] for values in
            (["Self-emp", "Private", "Other"], [" private", "self emp", "Private.", "N/A", "Gig", "Other"]))
    assert respelled(a, b) == {" private": "Private", "Private.": "Private", "self emp": "Self-emp", "N/A": None}


def test_a_changed_tie_is_put_down_to_its_column(train: pl.DataFrame) -> None:
    old = profile(train, COLUMNS)
    new = profile(train.with_columns(pl.col("education").shuffle(seed=1)), COLUMNS)
    pairs = changed_pairs(old, new, Drift())
    assert len(pairs) >= 3 and all("education" in p for p in pairs)
    found = [f for f in relations(old, new) if f.check == "association_changed"]
    assert [f.column for f in found] == ["education"] and found[0].old.keys() == found[0].new.keys()


def test_ignored_columns_are_softer(train: pl.DataFrame) -> None:
    old = profile(train, COLUMNS)
    new = profile(put("fnlwgt", None)(train), COLUMNS)
    assert {(f.check, f.severity) for f in quality(old, new) if f.column == "fnlwgt"} == {("all_missing", "warning")}


def test_pictures_are_shares_and_few(train: pl.DataFrame) -> None:
    p = profile(train, COLUMNS)
    for d in compare(p, p).values():
        assert len(d.labels) == len(d.old) == len(d.new) <= 21
        assert sum(d.old) == pytest.approx(1) and sum(d.new) == pytest.approx(1)
        assert len(d.edges) == (len(d.labels) + 1 if d.kind == "number" else 0)


def test_limits_keep_all_their_digits():
    from income_mlops.drift import full, shown
    assert [full(v) for v in (1484705.0, -3.0, 0.25, 1 / 3)] == ["1484705", "-3", "0.25", "0.3333333333333333"]
    assert [shown(v) for v in (1484705.0, 1 / 3, "x")] == ["1484705", "0.333333", "x"]
