"""Profiles: exact or within their stated error, mergeable, the same from every kind of file."""
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from analysis_helpers import COLUMNS, TRAIN, Kept, read
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats.contingency import association, crosstab

from income_mlops.aggregates import distinct_estimate, heavy_hitters, smallest
from income_mlops.associations import associate, merge_associations
from income_mlops.batches import BATCH_ROWS, column_names, pour, rows_about
from income_mlops.columns import plain
from income_mlops.data import DataError
from income_mlops.profile import MAX_ASSOCIATED, Profile, merge, profile

numbers = st.one_of(st.none(), st.integers(-5, 5).map(float), st.floats(-1e6, 1e6), st.just(float("nan")),
                    st.just(float("inf")))
texts = st.one_of(st.none(), st.sampled_from(["a", "b", " a", "7", "", "é", "?"]), st.text(max_size=3))
rows = st.lists(st.tuples(numbers, texts, texts, numbers), min_size=1, max_size=60)


def frame(values: list[tuple]) -> pl.DataFrame:
    schema = {"x": pl.Float64, "s": pl.String, "t": pl.String, "y": pl.Float64}
    return pl.DataFrame(values, schema=schema, orient="row")


def same(p: Profile, q: Profile) -> None:
    "Equal but for the last digits of sums."
    assert p.rows == q.rows and p.names == q.names
    assert (p.row_hashes, p.row_counts, p.duplicates) == (q.row_hashes, q.row_counts, q.duplicates)
    for a, b in zip(p.columns, q.columns, strict=True):
        if a.exact:
            skip = {"values", "counts", "moments"}
            assert a.model_dump(exclude=skip) == b.model_dump(exclude=skip), a.name
            assert dict(zip(a.values, a.counts, strict=True)) == dict(zip(b.values, b.counts, strict=True))
            for x, y in ((a.mean, b.mean), (a.std, b.std)):
                assert x == y or x == pytest.approx(y, rel=1e-7, abs=1e-7)
    assert p.associations.keys() == q.associations.keys()
    for names, found in p.associations.items():
        assert found.rows == q.associations[names].rows and found.measure == q.associations[names].measure
        assert found.value == pytest.approx(q.associations[names].value, abs=1e-6), names


@settings(max_examples=40, deadline=None)
@given(rows, rows)
def test_merged_profiles_are_the_profile_of_all(a: list, b: list) -> None:
    one, other = frame(a), frame(b)
    both = profile(pl.concat([one, other]))
    merged = merge(profile(one), profile(other))
    same(both, merged)
    turned = merge(profile(other.select(reversed(other.columns))), profile(one))
    assert turned.rows == both.rows and turned.duplicates == both.duplicates
    assert sorted((c.name, c.missing) for c in turned.columns) == sorted((c.name, c.missing) for c in both.columns)


@settings(max_examples=15, deadline=None)
@given(rows, rows, rows)
def test_merging_is_associative(a: list, b: list, c: list) -> None:
    p, q, r = (profile(frame(x)) for x in (a, b, c))
    same(merge(merge(p, q), r), merge(p, merge(q, r)))


@settings(max_examples=60, deadline=None)
@given(rows)
def test_profile_against_numpy_and_polars(values: list) -> None:
    table = frame(values)
    p = profile(table)
    x = table["x"].fill_nan(None)
    finite = x.drop_nulls().filter(x.drop_nulls().is_finite()).to_numpy()
    c = p.column("x")
    assert (c.missing, c.infinite, c.present) == (x.null_count(), len(x) - x.null_count() - len(finite), len(finite))
    assert c.distinct == len(np.unique(finite + 0.0))
    if len(finite):
        assert (c.minimum, c.maximum) == (finite.min(), finite.max())
        assert c.mean == pytest.approx(finite.mean(), rel=1e-9, abs=1e-9)
        np.testing.assert_allclose(c.quantiles([0.1, 0.5, 0.9]),
                                   np.quantile(finite, [0.1, 0.5, 0.9], method="inverted_cdf"))
        edges = np.linspace(finite.min() - 1, finite.max() + 1, 6)
        np.testing.assert_allclose(c.histogram(edges), np.histogram(finite, edges)[0])
    if len(np.unique(finite)) > 1 and finite.std() > 1e-3:
        assert c.std == pytest.approx(finite.std(ddof=1), rel=1e-7)
        assert c.skewness == pytest.approx(stats.skew(finite), rel=1e-5, abs=1e-5)
        assert c.kurtosis == pytest.approx(stats.kurtosis(finite), rel=1e-5, abs=1e-5)
    s, t = p.column("s"), table["s"].drop_nulls()
    assert dict(s.top(100)) == dict(t.value_counts().iter_rows())
    assert s.padded == sum(v != v.strip() for v in t) if t.str.contains(r"^[\x20-\x7e]*$").all() else True
    assert p.duplicates == plain(table).height - plain(table).n_unique() and p.duplicates_error == 0


@settings(max_examples=40, deadline=None)
@given(rows, st.integers(0, 60))
def test_associations_against_scipy(values: list, cut: int) -> None:
    table = plain(frame(values))
    levels = {c: table[c].drop_nulls().unique().to_list() for c in ("s", "t")}
    whole = associate(table, levels).pairs()
    halves = [associate(h, {c: h[c].drop_nulls().unique().to_list() for c in levels})
              for h in (table[:cut], table[cut:])]
    merged = merge_associations(*halves).pairs() if 0 < cut < table.height else whole
    for names, a in whole.items():
        assert merged[names].value == pytest.approx(a.value, abs=1e-6), names
    pairs = table.select("x", "y").filter(pl.all_horizontal(pl.all().is_finite())).drop_nulls()
    if ("x", "y") in whole and min(pairs["x"].std(), pairs["y"].std()) > 1e-3:
        assert whole["x", "y"].value == pytest.approx(stats.pearsonr(pairs["x"], pairs["y"]).statistic, abs=1e-6)
    cats = table.select("s", "t").drop_nulls()
    if ("s", "t") in whole:
        counts = crosstab(cats["s"].to_numpy(), cats["t"].to_numpy()).count
        assert whole["s", "t"].value == pytest.approx(association(counts, method="cramer", correction=False), abs=1e-9)
    known = table.select("s", "x").filter(pl.col("x").is_finite()).drop_nulls()
    if ("s", "x") in whole and known["x"].std() > 1e-3:
        x = known["x"].to_numpy()
        between = sum(len(g) * (g["x"].mean() - x.mean()) ** 2 for g in known.partition_by("s"))
        assert whole["s", "x"].value == pytest.approx(np.sqrt(between / ((x - x.mean()) ** 2).sum()), abs=1e-6)


@pytest.fixture(scope="module")
def large() -> pl.DataFrame:
    "More rows than a batch, and columns past the bound of distinct values."
    rng = np.random.default_rng(7)
    n = BATCH_ROWS + 50_000
    return pl.DataFrame({
        "wide": rng.lognormal(3, 2, n), "id": rng.permutation(n), "name": (rng.zipf(1.3, n) % 50_000).astype(str),
        "few": rng.integers(0, 9, n), "text": rng.choice(["a", "b", "c"], n, p=[0.5, 0.3, 0.2])})


def test_sketches_are_within_their_stated_error(large: pl.DataFrame) -> None:
    whole = profile(large)
    merged = merge(merge(profile(large[:1000]), profile(large[1000:200_000])), profile(large[200_000:]))
    for p in (whole, merged):
        assert [c.name for c in p.columns if not c.exact] == ["wide", "id", "name"]
        for name in ("wide", "id"):
            c, x = p.column(name), np.sort(large[name].to_numpy().astype(float))
            assert 0 < c.rank_error < 0.005
            for q in np.linspace(0.01, 0.99, 30):
                assert abs(np.searchsorted(x, c.quantiles([q])[0], "right") / len(x) - q) <= c.rank_error + 1 / len(x)
            assert c.distinct == pytest.approx(len(np.unique(x)), rel=4 / np.sqrt(c.bound))
            assert c.mean == pytest.approx(x.mean(), rel=1e-9) and c.std == pytest.approx(x.std(ddof=1), rel=1e-9)
            assert c.kurtosis == pytest.approx(stats.kurtosis(x), rel=1e-6)
        c, true = p.column("name"), dict(large["name"].value_counts().iter_rows())
        assert c.error <= p.rows / c.bound and len(c.values) <= c.bound
        for level, n in zip(c.values, c.counts, strict=True):
            assert n <= true[level] <= n + c.error
        assert all(n <= c.error for level, n in true.items() if level not in c.values)
        assert c.distinct == pytest.approx(len(true), rel=4 / np.sqrt(c.bound))
        found = p.association("few", "text")
        assert found.value < 3 / np.sqrt(found.rows) + np.sqrt(8 / found.rows)
    for name in ("few", "text"):
        a, b = (p.column(name).model_copy(update={"moments": None}) for p in (whole, merged))
        assert a == b


def test_repeated_rows_are_estimated(large: pl.DataFrame) -> None:
    table = pl.concat([large, large[:40_000]])
    p = profile(table)
    assert abs(p.duplicates - 40_000) < 4 * p.duplicates_error < 40_000
    assert merge(profile(table[:300_000]), profile(table[300_000:])).duplicates == p.duplicates


def test_every_kind_of_file_gives_the_same_profile(tmp_path: Path) -> None:
    table = read(TRAIN)
    table.write_parquet(tmp_path / "t.parquet")
    profiles = [profile(t, COLUMNS) for t in (TRAIN, tmp_path / "t.parquet", table)]
    for p in profiles[1:]:
        for a, b in zip(profiles[0].columns, p.columns, strict=True):
            assert a == b or not a.exact
        assert (p.row_hashes, p.row_counts) == (profiles[0].row_hashes, profiles[0].row_counts)
    assert profiles[0].column("workclass").missing == 1836 and profiles[0].column("occupation").missing == 1843
    assert (profiles[0].column("age").minimum, profiles[0].column("age").maximum) == (17, 90)
    assert profiles[0].column("age").mean == pytest.approx(38.5816, abs=1e-4)  # as the data's own description says


def test_json_holds_everything() -> None:
    p = profile(TRAIN, COLUMNS)
    text = p.model_dump_json()
    assert len(text) < 500_000
    again = Profile.model_validate_json(text)
    assert again == p and again.associations == p.associations
    assert again.column("fnlwgt").quantiles([0.5]) == p.column("fnlwgt").quantiles([0.5])
    assert merge(again, p).rows == 2 * p.rows


def test_wide_tables_keep_the_columns_most_tied_to_the_target() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 500)
    noise = {f"noise{i}": rng.normal(size=500) for i in range(80)}
    useful = {f"useful{i}": target + rng.normal(size=500) for i in range(30)}
    named = COLUMNS.model_copy(update={"target": "y", "positive": "1"})
    p = profile(pl.DataFrame({**noise, **useful, "y": target.astype(str)}), named)
    assert len(p.associated) == MAX_ASSOCIATED and set(useful) | {"y"} <= set(p.associated)


def test_profiles_of_different_tables_do_not_merge() -> None:
    with pytest.raises(DataError, match="'b'"):
        merge(profile(pl.DataFrame({"a": [1]})), profile(pl.DataFrame({"a": [1], "b": [2]})))
    with pytest.raises(DataError, match="'a' holds"):
        merge(profile(pl.DataFrame({"a": [1]})), profile(pl.DataFrame({"a": ["x"]})))


def test_types_are_those_of_all_rows(tmp_path: Path) -> None:
    "Values that do not fit the first 10,000 rows widen the column."
    file = tmp_path / "late.csv"
    lines = ["i,f,b,s"] + ["1,1.5,true,x"] * 30_000 + ["2.5,word,maybe,y", "inf,,,"]
    file.write_text("\n".join(lines) + "\n")
    p = profile(file)
    assert [(c.name, c.kind) for c in p.columns] == [("i", "number"), ("f", "category"), ("b", "category"),
                                                     ("s", "category")]
    assert p.column("i").infinite == 1 and p.column("f").numeric == 30_000 and p.column("f").missing == 1
    assert p.rows == 30_002


def test_many_misfits_end(tmp_path: Path) -> None:
    file = tmp_path / "late.csv"
    n = 40
    file.write_text(",".join(f"c{i}" for i in range(n)) + "\n" + (",".join(["1"] * n) + "\n") * 12_000
                    + ",".join(["x"] * n) + "\n")
    assert {c.kind for c in profile(file).columns} == {"category"}


def test_batches_are_the_table(large: pl.DataFrame, tmp_path: Path) -> None:
    large.write_parquet(tmp_path / "t.parquet")
    large.write_csv(tmp_path / "t.csv")
    for source in (tmp_path / "t.parquet", tmp_path / "t.csv", large):
        parts = pour(source, Kept).parts
        assert len(parts) > 1 and max(b.height for b in parts) <= BATCH_ROWS
        assert pl.concat(parts)["id"].equals(large["id"])
        assert column_names(source) == large.columns and rows_about(source) == pytest.approx(large.height, rel=0.1)


def test_heavy_hitters_and_distinct_values() -> None:
    rng = np.random.default_rng(1)
    stream = [str(v) for v in rng.zipf(1.2, 20_000)]
    true = {v: stream.count(v) for v in set(stream)}
    kept, error = heavy_hitters(true, 100)
    assert error <= len(stream) / 100 and all(n <= true[v] <= n + error for v, n in kept.items())
    hashes = rng.integers(0, 2**64, 300_000, dtype=np.uint64)
    for k in (64, 4096):
        assert (smallest(hashes, k) == np.unique(hashes)[:k]).all()
        assert distinct_estimate(smallest(hashes, k), k) == pytest.approx(300_000, rel=4 / np.sqrt(k))
    few = np.repeat(np.arange(10, dtype=np.uint64), 1000)  # fewer than k, all at the low end
    assert distinct_estimate(smallest(few, 64), 64) == 10
