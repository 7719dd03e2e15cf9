"""Faults put into real data, one at a time: each is found where it is, and nothing else is called an error."""
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from analysis_helpers import COLUMNS, SETTINGS, TEST, TRAIN, put, read, resample, swap

from income_mlops.checks import CAPACITY, Rows, check_rows
from income_mlops.columns import plain
from income_mlops.data import DataError
from income_mlops.domain import auc, tell_apart
from income_mlops.profile import Profile, profile
from income_mlops.verdict import Analysis, analyze

Fault = Callable[[pl.DataFrame], pl.DataFrame]
FLIP = pl.when(pl.col("income") == ">50K").then(pl.lit("<=50K")).otherwise(pl.lit(">50K"))


@pytest.fixture(scope="module")
def train() -> pl.DataFrame:
    return read(TRAIN)


@pytest.fixture(scope="module")
def upload() -> pl.DataFrame:
    "New rows: half of the official test data. The other half is the hold-out."
    return read(TEST)[8000:]


@pytest.fixture(scope="module")
def holdout() -> pl.DataFrame:
    return read(TEST)[:8000]


def test_official_data_is_fit_for_use() -> None:
    "Old = train, new = test, which is the hold-out."
    found = analyze(TEST, TRAIN, SETTINGS, holdout=TEST)
    assert found.verdict == "use as is" and found.counts()["error"] == found.counts()["warning"] == 0
    leak = [f for f in found.findings if f.check == "holdout_leak"]
    assert [f.severity for f in leak] == ["info"] and "hold-out itself" in leak[0].message
    assert found.domain is not None and found.domain.low < 0.5 < found.domain.high
    assert found.new.rows == 16281 and found.reference.rows == 32561


def test_upload_without_fault(upload: pl.DataFrame, holdout: pl.DataFrame) -> None:
    assert analyze(upload, TRAIN, SETTINGS, holdout=holdout).verdict == "use as is"


def test_data_against_itself() -> None:
    "As in the first training: the current data is the original."
    found = analyze(TRAIN, TRAIN, SETTINGS, holdout=TEST)
    assert found.verdict == "use as is"
    assert all(d.effect <= d.error for d in found.drift.values())


def test_grown_data_against_its_origin(train: pl.DataFrame, upload: pl.DataFrame) -> None:
    "The current data after an upload was merged holds all of the original, which is no fault."
    assert analyze(pl.concat([train, upload]), TRAIN, SETTINGS, holdout=TEST).counts()["error"] == 1  # leaked
    assert analyze(pl.concat([train, upload]), TRAIN, SETTINGS).verdict == "use as is"


BLANK = ("workclass", "sex", "race")
W, E, NOTE = "warning", "error", "info"

# What is done to the upload; what must be found. Errors not named here fail the case.
FAULTS: dict[str, tuple[Fault, dict[tuple[str, str | None], str]]] = {
    "column dropped": (lambda t: t.drop("age"), {("column_removed", "age"): E}),
    "ignored column dropped": (lambda t: t.drop("fnlwgt"), {("column_removed", "fnlwgt"): W}),
    "target dropped": (lambda t: t.drop("income"), {("target_absent", "income"): E}),
    "column added": (lambda t: t.with_columns(pl.lit(1).alias("version")), {("column_added", "version"): W}),
    "column renamed": (lambda t: t.rename({"age": "Age"}), {("column_removed", "age"): E, ("column_added", "Age"): W}),
    "columns in another order": (lambda t: t.select(reversed(t.columns)), {("column_order", None): NOTE}),
    "categories swapped": (swap("race", "sex"), {("swapped", "race"): E, ("swapped", "sex"): E}),
    "numbers swapped": (swap("education-num", "hours-per-week"),
                        {("swapped", "education-num"): E, ("swapped", "hours-per-week"): E}),
    "number and category swapped": (swap("age", "workclass"), {("swapped", "age"): E, ("swapped", "workclass"): E}),
    "hours in minutes": (put("hours-per-week", pl.col("hours-per-week") * 60), {("scale", "hours-per-week"): E}),
    "age in months": (put("age", pl.col("age") * 12), {("scale", "age"): E}),
    "new workclass": (put("workclass", "Gig", 0.03), {("categories_added", "workclass"): W}),
    "workclass recoded": (put("workclass", pl.format("W{}", pl.col("workclass").str.len_chars())),
                          {("categories_added", "workclass"): E, ("drift", "workclass"): E}),
    "labels flipped": (put("income", FLIP, 0.2), {("conflicting_labels", None): W, ("target_drift", "income"): W}),
    "all labels flipped": (put("income", FLIP), {("target_drift", "income"): E, ("conflicting_labels", None): W}),
    "blocks duplicated": (lambda t: pl.concat([t, t[1000:2500]]), {("duplicates", None): W}),
    "women over-sampled": (resample(pl.col("sex") == "Female", 0.6), {("drift", "sex"): W}),
    "relationship shuffled": (lambda t: t.with_columns(pl.col("relationship").shuffle(seed=1)),
                              {("association_changed", "relationship"): W, ("domain_classifier", None): W}),
    "age shuffled": (lambda t: t.with_columns(pl.col("age").shuffle(seed=1)), {("association_changed", "age"): W}),
    "dots behind labels": (put("income", pl.format("{}.", "income")), {("encoding", "income"): E}),
    "blanks before everything": (lambda t: t.with_columns(pl.format(" {}", c).alias(c) for c in BLANK),
                                 {("encoding", c): E for c in BLANK}),
    "blanks before some": (put("workclass", pl.format(" {}", "workclass"), 0.05), {("encoding", "workclass"): W}),
    "another case": (put("sex", pl.col("sex").str.to_lowercase(), 0.1), {("encoding", "sex"): W}),
    "N/A for missing": (put("occupation", "N/A", 0.04), {("missing_marker", "occupation"): W}),
    "words among numbers": (put("age", "forty", 0.02), {("type_changed", "age"): E}),
    "fractions": (put("age", pl.col("age") + 0.5, 0.5), {("type_changed", "age"): NOTE}),
    "codes for categories": (lambda t: t.with_columns(pl.col("sex").replace_strict({"Male": 1, "Female": 0})),
                             {("type_changed", "sex"): E}),
    "constant category": (put("sex", "Male"), {("constant", "sex"): W, ("drift", "sex"): W}),
    "constant number": (put("hours-per-week", 40), {("constant", "hours-per-week"): W}),
    "values go missing": (put("occupation", None, 0.3), {("missing", "occupation"): W}),
    "most values missing": (put("age", None, 0.8), {("missing", "age"): E}),
    "all values missing": (put("age", None), {("all_missing", "age"): E}),
    "infinities": (put("capital-gain", float("inf"), 0.01), {("infinite", "capital-gain"): E}),
    "labels missing": (put("income", None, 0.1), {("target_missing", "income"): E}),
    "a third label": (put("income", "unclear", 0.01), {("categories_added", "income"): E}),
    "one label": (lambda t: t.filter(pl.col("income") == "<=50K"), {("target_constant", "income"): E}),
    "ages of 999": (put("age", 999, 0.02), {("range", "age"): W, ("outliers", "age"): W}),
    "negative ages": (put("age", -1, 0.2), {("range", "age"): E}),
    "a group left out": (lambda t: t.filter(pl.col("marital-status") != "Divorced"),
                         {("categories_removed", "marital-status"): W, ("drift", "marital-status"): W}),
    "the target told": (put("occupation", pl.when(pl.col("income") == ">50K").then(pl.lit("Sales"))
                            .otherwise(pl.lit("Craft-repair"))),
                            {("target_leak", "occupation"): W, ("drift", "occupation"): E}),
    "half of the positives gone": (resample(pl.col("income") == ">50K", 0.13), {("target_drift", "income"): W}),
    "older people": (resample(pl.col("age") > 50, 0.5), {("drift", "age"): W}),
    "another table": (lambda t: t.rename({c: f"x{i}" for i, c in enumerate(t.columns)}),
                      {("no_common_column", None): E}),
}


def matched(found: Analysis, expected: dict[tuple[str, str | None], str]) -> None:
    "Every expected finding is there in its severity; no other is an error."
    there = {(f.check, f.column): f.severity for f in found.findings}
    for key, severity in expected.items():
        assert there.get(key) == severity, (key, {k: v for k, v in there.items() if v != "info"})
    assert {k for k, v in there.items() if v == "error"} == {k for k, v in expected.items() if v == "error"}
    worst = set(expected.values())
    if "error" in worst:
        assert found.verdict == "do not retrain"
    elif "warning" in worst:
        assert found.verdict == "clean first"
    for f in found.findings:
        assert f.message and f.advice and "\n" not in f.message


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, upload: pl.DataFrame, holdout: pl.DataFrame) -> None:
    fault, expected = FAULTS[name]
    matched(analyze(fault(upload), TRAIN, SETTINGS, holdout=holdout), expected)


def test_holdout_rows_copied_in(upload: pl.DataFrame, holdout: pl.DataFrame) -> None:
    found = analyze(pl.concat([upload, holdout[100:140]]), TRAIN, SETTINGS, holdout=holdout)
    matched(found, {("holdout_leak", None): E})


def test_holdout_rows_without_their_ignored_column(upload: pl.DataFrame, holdout: pl.DataFrame) -> None:
    "A survey weight left out does not hide the leak."
    table = pl.concat([upload, holdout]).drop("fnlwgt")
    matched(analyze(table, TRAIN, SETTINGS, holdout=holdout),
            {("holdout_leak", None): E, ("column_removed", "fnlwgt"): W})


def test_training_rows_are_at_most_a_warning(train: pl.DataFrame, upload: pl.DataFrame, holdout: pl.DataFrame) -> None:
    found = analyze(pl.concat([upload, train[:4000]]), TRAIN, SETTINGS, holdout=holdout)
    matched(found, {("seen_in_reference", None): W})


def test_the_code_cleans(upload: pl.DataFrame, holdout: pl.DataFrame) -> None:
    "The line that a finding gives does what it says."
    for name in ("hours in minutes", "categories swapped", "dots behind labels", "blanks before some", "another case",
                 "N/A for missing", "blocks duplicated", "column added", "columns in another order"):
        table = FAULTS[name][0](upload)
        found = analyze(table, TRAIN, SETTINGS, holdout=holdout)
        scope = {"table": table, "pl": pl}
        for f in found.findings:
            if f.severity != "info" or f.check == "column_order":
                for line in {f.code} - {""}:
                    if f.check != "swapped" or f.column == "race":
                        exec(line, scope)
        assert analyze(scope["table"], TRAIN, SETTINGS, holdout=holdout).verdict == "use as is", name


def test_a_profile_is_reference_enough(upload: pl.DataFrame) -> None:
    "What is kept with a model suffices for all but the checks of rows."
    stored = Profile.model_validate_json(profile(TRAIN, COLUMNS).model_dump_json())
    found = analyze(put("age", pl.col("age") * 12)(upload), stored, SETTINGS)
    assert ("scale", "age") in {(f.check, f.column) for f in found.findings} and found.domain is None


BAD = {
    "no table": (b"\x89PNG\r\n\x1a\n" + bytes(100), "image"),
    "empty": (b"", "empty"),
    "header only": (b"age,sex,income\n", "no rows"),
    "mixed encodings": (("age,sex,income\n" + "1,café,x\n" * 5).encode() + "2,café,y\n".encode("latin-1"), "line 7"),
    "ragged": (b"age,sex,income\n1,a,b\n1,a,b,c\n", "line 3"),
    "a column twice": (b"age,age\n1,2\n", "twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_input_is_one_line(name, tmp_path) -> None:
    data, says = BAD[name]
    file = tmp_path / "new.csv"
    file.write_bytes(data)
    with pytest.raises(DataError, match=says) as e:
        analyze(file, TRAIN, SETTINGS)
    assert "\n" not in str(e.value) and "new.csv" in str(e.value)


def test_missing_file_and_folder(tmp_path) -> None:
    for path, says in ((tmp_path / "none.csv", "no such file"), (tmp_path, "folder")):
        with pytest.raises(DataError, match=says):
            analyze(path, TRAIN, SETTINGS)


def test_nested_parquet(tmp_path) -> None:
    pl.DataFrame({"age": [[1, 2], [3]]}).write_parquet(tmp_path / "new.parquet")
    with pytest.raises(DataError, match="nested"):
        analyze(tmp_path / "new.parquet", TRAIN, SETTINGS)
    with pytest.raises(DataError, match="nested"):
        analyze(pl.DataFrame({"age": [[1, 2], [3]]}), TRAIN, SETTINGS)


def test_strange_types(upload: pl.DataFrame, tmp_path) -> None:
    "Dates, truth values, decimals, categoricals, bytes, durations: findings, no crash; CSV and Parquet alike."
    dates = pl.date_range(pl.date(2020, 1, 1), pl.date(2020, 1, 1) + pl.duration(days=upload.height - 1), eager=False)
    table = upload.with_columns(
        dates.alias("day"), (pl.col("age") > 40).alias("older"), pl.col("age").cast(pl.Decimal(10, 2)).alias("exactly"),
        pl.col("sex").cast(pl.Categorical), pl.lit(b"\xff").alias("bytes"), pl.duration(days="age").alias("span"),
        pl.lit(None).alias("nothing"))
    table.write_parquet(tmp_path / "new.parquet")
    found = analyze(tmp_path / "new.parquet", TRAIN, SETTINGS)
    assert {f.check for f in found.findings if f.severity != "info"} == {"column_added"}
    again = analyze(table, table, SETTINGS)
    assert again.verdict == "use as is"
    dtypes = {c.name: c.dtype for c in found.new.columns}
    assert [dtypes[c] for c in ("day", "older", "exactly", "nothing")] == ["date", "boolean", "integer", "empty"]
    table.select("day", "older").write_csv(tmp_path / "new.csv")
    text = {c.name: c.dtype for c in profile(tmp_path / "new.csv").columns}
    assert text == {"day": "date", "older": "boolean"}


def test_ten_thousand_columns() -> None:
    rng = np.random.default_rng(0)
    table = pl.DataFrame({f"c{i}": rng.normal(size=60) for i in range(10_000)})
    found = analyze(table, TRAIN, SETTINGS)
    assert [f.check for f in found.findings] == ["no_common_column"]
    some = table[:, :1000]
    same = analyze(some, some, SETTINGS)
    assert same.verdict == "use as is" and len(same.new.associated) == 50


def test_tiny_tables(upload: pl.DataFrame) -> None:
    "Few rows: no difference is significant, nothing divides by zero."
    for n in (1, 2, 10, 60):
        errors = [f.check for f in analyze(upload[:n], TRAIN, SETTINGS).findings if f.severity == "error"]
        assert errors == ["target_constant"] * (upload[:n]["income"].n_unique() == 1)


def test_progress_goes_forward_to_the_end() -> None:
    told: list[tuple[str, float]] = []
    analyze(TEST, TRAIN, SETTINGS, progress=lambda stage, share: told.append((stage, share)))
    shares = [s for _, s in told]
    assert shares == sorted(shares) and shares[-1] == 1.0 and {"reference", "new data"} <= {s for s, _ in told}


def test_row_checks_of_a_sample_say_the_same(train: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    "Past its capacity a table keeps the same cases as the other, so shares stay what they are."
    import income_mlops.checks as checks
    frame = plain(train.drop("fnlwgt"), COLUMNS.missing)
    features = [c for c in frame.columns if c != "income"]

    def findings(capacity: int) -> dict[str, float]:
        monkeypatch.setattr(checks, "CAPACITY", capacity)
        labels: dict[str, int] = {}
        tables = []
        for part in (frame[:20_000], frame[12_000:]):
            tables.append(Rows(frame.columns, features, "income", labels))
            for batch in part.iter_slices(3000):
                tables[-1].add(batch)
        return {f.check: f.new for f in check_rows(*tables)}

    full, sampled = findings(CAPACITY), findings(6000)
    assert full["seen_in_reference"] >= 8000 / 20_561
    for check, share in full.items():
        assert sampled[check] == pytest.approx(share, abs=0.04), check


def test_domain_classifier_is_as_good_as_a_library(upload: pl.DataFrame, train: pl.DataFrame) -> None:
    "Against scikit-learn's boosted trees on the same task."
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import cross_val_predict
    from sklearn.preprocessing import OrdinalEncoder
    names = [c for c in train.columns if c not in COLUMNS.ignored]
    old = plain(train, COLUMNS.missing).sample(4000, seed=3)
    new = plain(upload, COLUMNS.missing).sample(4000, seed=4).with_columns(pl.col("relationship").shuffle(seed=1))
    ours = tell_apart(old, new, names)
    both = pl.concat([old, new]).select(names).to_pandas()
    texts = [c for c in names if old[c].dtype == pl.String]
    both[texts] = OrdinalEncoder(encoded_missing_value=-1).fit_transform(both[texts])
    y = np.repeat([0, 1], 4000)
    model = HistGradientBoostingClassifier(max_iter=60, categorical_features=texts)
    score = cross_val_predict(model, both, y, cv=2, method="predict_proba")[:, 1]
    assert ours is not None and ours.auc > auc(y.astype(float), score) - 0.05
    assert ours.columns[0][0] in ("relationship", "sex", "marital-status")


def test_auc_is_that_of_a_library() -> None:
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    for _ in range(20):
        y, score = rng.integers(0, 2, 200).astype(float), rng.integers(0, 30, 200).astype(float)
        assert auc(y, score) == pytest.approx(roc_auc_score(y, score))
