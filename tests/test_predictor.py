"""The compiled form answers like the pipeline it was made from, or is not stored."""
import json
import subprocess
import sys
import tempfile
import threading
import time
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import ExtraTreesClassifier, GradientBoostingClassifier, RandomForestClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OrdinalEncoder, StandardScaler
from xgboost import XGBClassifier

from income_mlops.batch import predictions, table_model
from income_mlops.compiling import STRANGER, Compiled, compile_pipeline
from income_mlops.contributions import FILE, Explainer
from income_mlops.data import Schema, conform, learn_schema, read_table
from income_mlops.datasets import original
from income_mlops.gate import TOLERANCE, edge_rows, gate, store_compiled
from income_mlops.models import ModelFactory, RandomForest, XGBoost
from income_mlops.predictor import Category, OutOfRange, Predictor, PredictorError
from income_mlops.processing import CustomProcessor, customprocessor, ordinal_preprocessor, to_frame, to_labels
from income_mlops.requests import RequestModel
from income_mlops.served import PipelineEngine
from income_mlops.settings import Columns, Preparation, load_settings
from income_mlops.trees import NotCompilable, just_below, lay_out, read_booster, read_forest, rounded_down
from income_mlops.unrolling import store_contributions

HEAVY = {"pandas", "sklearn", "scipy", "xgboost", "mlflow", "joblib", "cloudpickle", "pickle5", "onnx"}
Case = tuple[Pipeline, Compiled, Any, Schema]


@pytest.fixture(scope="module")
def adult() -> tuple[Any, Any, Any, Schema, pl.DataFrame]:
    dataset = original(load_settings())
    X, y = to_frame(dataset.train, dataset.schema), to_labels(dataset.train, dataset.schema)
    return X, y, to_frame(dataset.holdout, dataset.schema), dataset.schema, dataset.holdout


@pytest.fixture(scope="module", params=["XGBoost", "RandomForest"])
def case(request: pytest.FixtureRequest, adult: Any) -> Case:
    "Each family as it is trained, a little smaller."
    X, y, X_test, schema, _ = adult
    default = {"XGBoost": XGBoost, "RandomForest": RandomForest}[request.param].default
    smaller = {"max_depth": 11} if request.param == "RandomForest" else {}
    pipeline = ModelFactory(load_settings(), schema).make(request.param).fit(X, y, {**default, **smaller}, 120)
    return pipeline, compile_pipeline(pipeline, schema), X_test, schema


@pytest.fixture(scope="module")
def predictor(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("predictor")
    case[1].save(folder)
    return Predictor.load(folder)


def compiled_predictor(compiled: Compiled) -> Predictor:
    with tempfile.TemporaryDirectory() as d:
        compiled.save(Path(d))
        return Predictor.load(d)


def columns_of(frame: Any) -> dict[str, list[Any]]:
    return {str(c): frame[c].tolist() for c in frame}


def fitted(classifier: Any, X: Any, y: Any, schema: Schema, missing: float = np.nan, **kw: Any) -> Pipeline:
    steps = [("customprocessor", customprocessor(schema, Preparation(**kw))),
             ("preprocessor", ordinal_preprocessor(missing)), ("classifier", classifier)]
    return Pipeline(steps).fit(X, y)


# ── equality ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_gate_opens_for_both_families(case: Case) -> None:
    report = gate(*case, seed=1)
    assert report.passed, report.reason
    assert report.rows == 16_281 + 10_000 and report.classes_equal
    assert report.max_abs_difference < 3e-7


def test_a_forest_is_equal_to_the_last_bit(adult: Any) -> None:
    X, y, X_test, schema, _ = adult
    pipeline = fitted(RandomForestClassifier(25, min_samples_leaf=3, random_state=1), X, y, schema, -1)
    report = gate(pipeline, compile_pipeline(pipeline, schema), X_test, schema)
    assert report.passed and report.max_abs_difference == 0


def test_sums_of_a_booster_are_equal_to_the_last_bit(case: Case) -> None:
    pipeline, compiled, X_test, _ = case
    if not isinstance(pipeline[-1], XGBClassifier):
        return  # the forest is compared as a whole
    margin = pipeline[-1].predict(pipeline[:-1].transform(X_test), output_margin=True)
    import onnx
    from onnx import helper
    model = onnx.load_from_string(compiled.model)
    model.graph.output.append(helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, ["n", 1]))
    from income_mlops.predictor import open_session
    session = open_session(model.SerializeToString())
    rows: list[Any] = []

    class Spy:
        def run(self, names: Any, feed: dict[str, Any]) -> Any:
            rows.append(session.run(["sum"], feed)[0])
            return session.run(names, feed)
    Predictor(compiled.form, Spy()).predict(columns_of(X_test.head(200)))
    assert (rows[0].ravel() == margin[:200]).all()


@pytest.mark.parametrize("value", [2**24 + 1, 2**53 + 1, 10**18 + 7, -0.0, 0.1, 1e-46, 3.4e38, None, float("nan")])
def test_unusual_numbers(case: Case, predictor: Predictor, value: Any) -> None:
    pipeline, compiled, X_test, _ = case
    for name in compiled.form.numbers:
        rows = X_test.head(5).to_dict("records")
        rows = [{**row, name: value} for row in rows]
        expected = pipeline.predict_proba(pd.DataFrame(rows))[:, 1]
        assert np.abs(predictor.predict_rows(rows) - expected).max() < TOLERANCE
        assert np.abs(predictor.predict_rows(rows[:1]) - expected[:1]).max() < TOLERANCE


@pytest.mark.parametrize("value", [None, float("nan"), "?", "", " ", "Atlantis", "(rare)", "nan", 3, True, STRANGER])
def test_unusual_categories(case: Case, predictor: Predictor, value: Any) -> None:
    pipeline, compiled, X_test, _ = case
    for category in compiled.form.categories:
        rows = [{**row, category.name: value} for row in X_test.head(5).to_dict("records")]
        expected = pipeline.predict_proba(pd.DataFrame(rows))[:, 1]
        assert np.abs(predictor.predict_rows(rows) - expected).max() < TOLERANCE
        assert np.abs(predictor.predict_rows(rows[:1]) - expected[:1]).max() < TOLERANCE


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e39, 10**39, 10**400],
                         ids=["inf", "-inf", "1e39", "10**39", "10**400"])
def test_what_32_bits_cannot_hold_is_refused_or_answered_as_by_the_pipeline(
        case: Case, predictor: Predictor, value: Any) -> None:
    pipeline, compiled, X_test, _ = case
    name = compiled.form.numbers[0]
    rows = [{**row, name: value} for row in X_test.head(2).to_dict("records")]
    try:
        with np.errstate(over="ignore"):
            expected = pipeline.predict_proba(pd.DataFrame(rows))[:, 1]
    except (ValueError, OverflowError, TypeError):
        for part in (rows, rows[:1]):
            with pytest.raises((OutOfRange, OverflowError), match=name if value != 10**400 else "too large"):
                predictor.predict_rows(part)
    else:
        for part in (rows, rows[:1]):
            assert np.abs(predictor.predict_rows(part) - expected[:len(part)]).max() < TOLERANCE


def test_a_number_too_large_is_said_with_its_row_by_every_engine(case: Case, predictor: Predictor, adult: Any) -> None:
    pipeline, compiled, _, schema = case
    if not compiled.form.finite:
        return  # takes it for infinite
    name = compiled.form.numbers[1]
    table = conform(adult[4], schema).head(400)
    large = pl.when(pl.int_range(pl.len()).is_in([7, 301])).then(1e39).otherwise(name).alias(name)
    columns = table.with_columns(large).select(schema.names()).to_dict(as_series=False)
    some = {k: v[:9] for k, v in columns.items()}  # few rows are not sorted
    for ask in (lambda: predictor.predict(columns), lambda: predictor.predict(some),
                lambda: predictor.predict_table(table.with_columns(large), 3),
                lambda: PipelineEngine(pipeline, schema).predict(columns)):
        with pytest.raises(OutOfRange, match=f"^{name}: 1e\\+39 is larger") as caught:
            ask()
        assert (caught.value.column, caught.value.row) == (name, 7)


def test_texts_that_are_numbers(case: Case, predictor: Predictor) -> None:
    pipeline, compiled, X_test, _ = case
    rows = [{**row, compiled.form.numbers[0]: "39"} for row in X_test.head(2).to_dict("records")]
    expected = pipeline.predict_proba(pd.DataFrame(rows))[:, 1]
    assert np.abs(predictor.predict_rows(rows) - expected).max() < TOLERANCE
    with pytest.raises(ValueError, match="thirty"):
        predictor.predict_rows([{**rows[0], compiled.form.numbers[0]: "thirty"}])


def test_all_ways_of_asking_agree(case: Case, predictor: Predictor, adult: Any) -> None:
    pipeline, _, X_test, schema = case
    expected = pipeline.predict_proba(X_test)[:, 1]
    columns = columns_of(X_test)
    whole = predictor.predict(columns)
    assert whole.dtype == np.float64 and whole.shape == (16_281,)
    assert np.abs(whole - expected).max() < TOLERANCE
    table = conform(adult[4], schema)
    for threads in (1, 3):
        assert (predictor.predict_table(table, threads) == whole).all()
    for n in (0, 1, 2, 255, 256, 257, 8193):
        part = {name: values[:n] for name, values in columns.items()}
        assert (predictor.predict(part) == whole[:n]).all()
        assert (predictor.predict_table(table.head(n)) == whole[:n]).all()
    arrays = {name: np.array(values[:500]) for name, values in columns.items()}
    assert (predictor.predict(arrays) == whole[:500]).all(), "arrays are as good as lists"
    with pytest.raises(KeyError, match="age"):
        predictor.predict_rows([{k: v for k, v in zip(columns, (c[0] for c in columns.values()), strict=True)
                                 if k != "age"}])


def test_threads_do_not_disturb_each_other(case: Case, predictor: Predictor) -> None:
    columns = columns_of(case[2].head(400))
    rows = [{k: v[i] for k, v in columns.items()} for i in range(400)]
    expected = predictor.predict(columns)
    wrong: list[int] = []

    def ask(start: int) -> None:
        wrong.extend(i for i in range(start, 400, 4) if predictor.predict_rows([rows[i]])[0] != expected[i])
        if (predictor.predict(columns) != expected).any():
            wrong.append(-1)
    threads = [threading.Thread(target=ask, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_unknown_categories_are_counted(case: Case, predictor: Predictor) -> None:
    columns = columns_of(case[2].head(4))
    assert predictor.unknown(columns) == {}
    columns["native-country"] = ["Atlantis", "Holand-Netherlands", None, "?"]
    assert predictor.unknown(columns) == {"native-country": 1}, "a rare level was seen in training"


# ── other tables ──────────────────────────────────────────────────────────────────────────────────────────────────────

def made_table(kind: str, n: int = 1500) -> tuple[pl.DataFrame, Schema]:
    "Tables unlike Adult: names, texts, missing numbers, many levels, one kind of column only."
    rng = np.random.default_rng(7)
    numbers = {f"x {i}": rng.normal(size=n) * 10.0**i for i in range(4)}
    numbers["gaps"] = np.where(rng.random(n) < 0.3, np.nan, rng.normal(size=n))
    texts = {"colour": rng.choice(["", "rot", "grün", "(rare)", "a,b", 'q"'], n).tolist(),
             "many": [f"level {i}" for i in rng.integers(0, 300, n)],
             "gappy": [None if r < 0.2 else "n/a" if r < 0.4 else f"g{int(r * 10)}" for r in rng.random(n)]}
    data: dict[str, Any] = {**({} if kind == "categories" else numbers), **({} if kind == "numbers" else texts)}
    signal = np.nan_to_num(numbers["gaps"]) + numbers["x 0"] + np.array([len(t) for t in texts["many"]]) % 3
    if kind != "numbers":
        signal = signal + 2 * np.array([t in ("rot", "(rare)") for t in texts["colour"]])
    data["answer"] = np.where(signal + rng.normal(size=n) > 1, "yes", "no").tolist()
    table = pl.DataFrame(data, strict=False).with_columns(pl.selectors.float().fill_nan(None))
    schema = learn_schema(table, Columns(target="answer", positive="yes", missing=("n/a",)))
    return conform(table, schema), schema


def test_a_row_means_the_same_at_every_door(tmp_path: Path) -> None:
    "Truth values, whole numbers that are levels and empty texts: one file, trained on and predicted."
    rng = np.random.default_rng(1)
    n = 600
    flag, code = rng.random(n) < 0.5, rng.choice(["1", "2", "3", "x"], n)
    gap = rng.choice(["", "left", "right"], n)
    yes = flag ^ np.isin(code, ["1", "x"]) ^ (gap == "") ^ (rng.random(n) < 0.1)
    written = pl.DataFrame({"flag": [str(f) for f in flag], "code": code, "gap": gap,
                            "y": np.where(yes, "yes", "no")})
    written.write_csv(tmp_path / "t.csv")
    columns = Columns(target="y", positive="yes")
    schema = learn_schema(read_table(tmp_path / "t.csv"), columns)
    table = conform(read_table(tmp_path / "t.csv"), schema)
    pipeline = fitted(RandomForestClassifier(15, random_state=0), to_frame(table, schema), to_labels(table, schema),
                      schema, -1.0)
    expected = pipeline.predict_proba(to_frame(table, schema))[:, 1]
    assert np.ptp(expected) > 0.5 and pipeline[0].levels_["flag"] == ["false", "true"]
    compile_pipeline(pipeline, schema).save(tmp_path)
    predictor = Predictor.load(tmp_path)
    as_they_are = written.with_columns(pl.Series("flag", flag))
    as_they_are.write_parquet(tmp_path / "t.parquet")
    numbered = as_they_are.filter(pl.col("code") != "x").with_columns(pl.col("code").cast(pl.Float64))
    numbered.write_parquet(tmp_path / "numbered.parquet")  # as pandas writes whole numbers with gaps
    for file, wanted in (("t.csv", expected), ("t.parquet", expected), ("numbered.parquet", expected[code != "x"])):
        parts = list(predictions(tmp_path / file, table_model(predictor, schema), schema))
        assert np.abs(pl.concat(parts)["probability"].to_numpy() - wanted).max() < TOLERANCE, file
    request = RequestModel(schema)
    for frame in (written, as_they_are):
        body = json.dumps({"data": frame.drop("y").to_dicts()}).encode()
        values, _ = request.decode(body)
        assert request.unknown(values) == {}
        assert np.abs(predictor.predict(values) - expected).max() < TOLERANCE
    assert learn_schema(read_table(tmp_path / "t.parquet"), columns) == schema


CLASSIFIERS = {
    "forest": (lambda kinds: RandomForestClassifier(20, random_state=0), -1.0),
    "extra trees": (lambda kinds: ExtraTreesClassifier(20, max_depth=9, random_state=0), -1.0),
    "bootstrapped gaps": (lambda kinds: RandomForestClassifier(5, max_depth=3, random_state=0), np.nan),
    "one against the rest": (lambda kinds: XGBClassifier(n_estimators=30, feature_types=kinds, max_cat_to_onehot=1000,
                                                         enable_categorical=True), np.nan),
    "sets of levels": (lambda kinds: XGBClassifier(n_estimators=30, feature_types=kinds, max_cat_to_onehot=1,
                                                   enable_categorical=True), np.nan),
    "codes as numbers": (lambda kinds: XGBClassifier(n_estimators=30), -1.0),
    "stumps": (lambda kinds: XGBClassifier(n_estimators=30, gamma=50), np.nan),
    "stopped early": (lambda kinds: XGBClassifier(n_estimators=200, early_stopping_rounds=3), np.nan),
    "parallel trees": (lambda kinds: XGBClassifier(n_estimators=5, num_parallel_tree=4, subsample=0.5), np.nan),
}


@pytest.mark.parametrize("kind", ["both", "numbers", "categories"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_other_tables_and_other_trees(kind: str, name: str) -> None:
    table, schema = made_table(kind)
    X, y = to_frame(table, schema), to_labels(table, schema)
    make, missing = CLASSIFIERS[name]
    prepared = customprocessor(schema, Preparation(rare_share=0.002)).fit(X)
    shown = prepared.transform(X)
    kinds = ["q" if c in schema.names("number") else "c" for c in shown]
    kinds.sort(key="qc".index)  # the preprocessor puts numbers first
    pre = ordinal_preprocessor(missing).fit(shown)
    classifier = make(kinds)
    codes = np.asarray(pre.transform(shown), dtype=np.float32)
    more = {"eval_set": [(codes[1000:], y[1000:])], "verbose": False} if name == "stopped early" else {}
    classifier.fit(codes[:1000] if more else codes, y[:1000] if more else y, **more)
    pipeline = Pipeline([("customprocessor", prepared), ("preprocessor", pre), ("classifier", classifier)])
    report = gate(pipeline, compile_pipeline(pipeline, schema), X, schema, rows=3000)
    assert report.passed, report.reason


def test_thresholds_keep_every_answer() -> None:
    rng = np.random.default_rng(3)
    t = np.concatenate([rng.normal(size=500) * 10.0 ** rng.integers(-46, 39, 500), [0.0, -0.0, 0.1, 2.0**24 + 1]])
    with np.errstate(over="ignore"):
        f = t.astype(np.float32)
    for x in (f, np.nextafter(f, np.float32(np.inf)), np.nextafter(f, np.float32(-np.inf)), -f):
        assert ((x.astype(np.float64) <= t) == (x <= rounded_down(t))).all()
        assert ((x < f) == (x <= just_below(f))).all()
        assert ((x <= f) == ~(-x <= just_below(-f))).all(), "asked the other way round"


def test_the_frequent_child_stands_second(case: Case) -> None:
    classifier = case[0][-1]
    ensemble = read_booster(classifier.get_booster()) if isinstance(classifier, XGBClassifier) else \
        read_forest(classifier)
    for tree in lay_out(ensemble)[0]:
        inner = ~tree.leaf
        assert (tree.weight[tree.left[inner]] <= tree.weight[tree.right[inner]]).all()


# ── the gate ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def with_category(compiled: Compiled, name: str, **update: Any) -> Compiled:
    categories = tuple(c.model_copy(update=update) if c.name == name else c for c in compiled.form.categories)
    return replace(compiled, form=compiled.form.model_copy(update={"categories": categories}))


def test_a_broken_encoder_fails_the_gate(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, compiled, X_test, schema = case
    category: Category = next(c for c in compiled.form.categories if c.name == "marital-status")
    a, b, *rest = category.levels
    broken = with_category(compiled, category.name, levels=(b, a, *rest))
    report = gate(pipeline, broken, X_test, schema, rows=2000)
    assert not report.passed and report.max_abs_difference > 0.05 and not report.classes_equal
    assert report.reason and "the hold-out, as columns" in report.reason
    monkeypatch.setattr("income_mlops.gate.compile_pipeline", lambda *_: broken)
    stored = store_compiled(pipeline, schema, X_test, tmp_path / "predictor")
    assert stored.reason and [*stored.metrics] == ["predictor_max_abs_difference"]
    assert [f.name for f in (tmp_path / "predictor").iterdir()] == ["reason.json"]


def test_the_gate_decides_with_the_threshold_of_the_service(case: Case) -> None:
    "A probability at the threshold is the positive class; one that is a trifle less is not."
    pipeline, compiled, X_test, _ = case
    expected = pipeline.predict_proba(X_test)[:, 1].astype(np.float64)
    predictor = compiled_predictor(compiled)
    less = np.flatnonzero(predictor.predict(columns_of(X_test)) < expected)
    assert gate(*case, rows=200, threshold=0.3).passed
    if isinstance(pipeline[-1], XGBClassifier):
        report = gate(*case, rows=200, threshold=float(expected[less[0]]))
        assert not report.classes_equal and report.reason and "decisions in" in report.reason


def test_whatever_goes_wrong_in_compiling_is_the_reason(case: Case, tmp_path: Path, caplog: Any,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, _, X_test, schema = case

    class Own(type(pipeline[-1])):  # type: ignore[misc]
        def predict_proba(self, X: Any) -> Any:
            raise KeyError("own column")
    own = Pipeline([*pipeline.steps[:-1], ("classifier", copy(pipeline[-1]))])
    own[-1].__class__ = Own
    for error in (None, PredictorError("no model"), ValueError("two\nlines")):
        def fails(*_: Any, error: Any = error) -> Any:
            raise error
        if error:
            monkeypatch.setattr("income_mlops.gate.compile_pipeline", fails)
        else:
            monkeypatch.setattr("income_mlops.gate.compile_pipeline", lambda *_: case[1])
        caplog.clear()
        stored = store_compiled(own, schema, X_test.head(50), tmp_path)
        said = {None: "KeyError: 'own column'"}.get(error) or f"{type(error).__name__}: {str(error).splitlines()[0]}"
        assert stored.reason == f"compiling failed: {said}"
        assert json.loads((tmp_path / "reason.json").read_text()) == {"reason": stored.reason}
        assert "Traceback" in caplog.text


def test_what_no_real_row_shows_fails_the_gate(case: Case) -> None:
    "Strangers, missing markers and infinite numbers: only the rows at the edges have them."
    pipeline, compiled, X_test, schema = case
    category = next(c for c in compiled.form.categories if c.name == "marital-status")
    like_first = tuple(c if c.members is None else c.model_copy(update={"members": tuple(
        {*c.members} - {len(category.levels)} | ({len(category.levels)} if 0 in c.members else set()))})
        for c in category.columns)
    stranger = with_category(compiled, category.name, other=category.codes[0], columns=like_first)
    reason = gate(pipeline, stranger, X_test.head(3000), schema, rows=2000).reason
    assert reason and "rows at the edges" in reason
    unmarked = replace(compiled, form=compiled.form.model_copy(update={"missing": ()}))
    reason = gate(pipeline, unmarked, X_test.head(3000), schema, rows=2000).reason
    assert reason and "rows at the edges" in reason
    other = replace(compiled, form=compiled.form.model_copy(update={"finite": not compiled.form.finite}))
    reason = gate(pipeline, other, X_test.head(3000), schema, rows=2000).reason
    assert reason and "inf" in reason


def test_edge_rows_are_seeded_and_hit_thresholds(case: Case) -> None:
    _, compiled, X_test, schema = case
    first, again = (edge_rows(compiled, X_test, schema, 2000, seed=5) for _ in range(2))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(edge_rows(compiled, X_test, schema, 2000, seed=6))
    assert set(first["age"]) & {float(np.float32(t)) for t in compiled.thresholds["age"]}
    assert first["sex"].isna().any() and STRANGER in set(first["sex"])


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────

class OwnProcessor(CustomProcessor):
    pass


def test_what_is_not_known_is_not_compiled(adult: Any, tmp_path: Path) -> None:
    X, y, X_test, schema, _ = adult
    X, y = X.head(1500), y[:1500]
    custom, pre = customprocessor(schema, Preparation()), ordinal_preprocessor(-1)
    forest = RandomForestClassifier(3, random_state=0)
    own = OwnProcessor(**custom.get_params())
    scaled = ColumnTransformer([("n", StandardScaler(), ["age"]), ("c", OrdinalEncoder(), ["sex"])])
    for steps, word in [((custom, pre, GradientBoostingClassifier(n_estimators=3)), "GradientBoosting"),
                        ((own, pre, forest), "OwnProcessor"), ((custom, scaled, forest), "StandardScaler"),
                        ((custom, pre, XGBClassifier(n_estimators=3, booster="dart")), "dart"),
                        ((custom, pre, XGBClassifier(n_estimators=3, objective="binary:hinge")), "hinge")]:
        pipeline = Pipeline(list(zip("abc", steps, strict=True))).fit(X, y)
        with pytest.raises(NotCompilable, match=word) as caught:
            compile_pipeline(pipeline, schema)
        assert "\n" not in str(caught.value)
    texts = Pipeline([("a", custom), ("b", pre), ("c", forest)]).fit(X, np.where(y, "yes", "no"))
    with pytest.raises(NotCompilable, match="classes"):
        compile_pipeline(texts, schema)
    stored = store_compiled(texts, schema, X_test, tmp_path)
    assert json.loads((tmp_path / "reason.json").read_text()) == {"reason": stored.reason}


def test_files_that_are_not_whole(case: Case, tmp_path: Path) -> None:
    case[1].save(tmp_path)
    good = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    form = json.loads(good["predictor.json"])
    for name, content, word in [("predictor.json", b"{}", "Field required"),
                                ("predictor.json", b"\xff", "predictor.json"),
                                ("predictor.json", json.dumps({**form, "version": 99}).encode(), "version"),
                                ("predictor.json", json.dumps({**form, "more": 1}).encode(), "more"),
                                ("model.onnx", good["model.onnx"][:-100], "model.onnx"),
                                ("model.onnx", None, "model.onnx")]:
        for file, old in good.items():
            (tmp_path / file).write_bytes(old)
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(PredictorError, match=word) as caught:
            Predictor.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_contributions_of_another_model_or_damaged_are_refused(case: Case, tmp_path: Path) -> None:
    case[1].save(tmp_path)
    whole = dict(np.load(store_contributions(case[0], tmp_path)))
    about = json.loads(str(whole["about"]))
    row = case[2].head(1).to_dict("records")[0]
    first = Explainer.load(tmp_path).explain(row)
    without = {k: v for k, v in about.items() if k not in ("model", "sha256")}
    np.savez(tmp_path / FILE, **{**whole, "about": np.array(json.dumps({**without, "version": 1}))})
    assert Explainer.load(tmp_path).explain(row) == first, "as it was written before there were hashes"
    for changed, word in [({"version": 99}, "version 99"), ({"format": "x"}, "'x'"), ({"model": "0"}, "another model"),
                          ({"sha256": "0"}, "damaged")]:
        np.savez(tmp_path / FILE, **{**whole, "about": np.array(json.dumps({**about, **changed}))})
        with pytest.raises(PredictorError, match=word):
            Explainer.load(tmp_path)
    np.savez(tmp_path / FILE, **{**whole, "value_0": whole["value_0"] * 2})
    with pytest.raises(PredictorError, match="damaged"):
        Explainer.load(tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-50])
    with pytest.raises(PredictorError, match="damaged"):
        Explainer.load(tmp_path)


def test_a_model_file_elsewhere_is_not_read(case: Case, tmp_path: Path) -> None:
    "`predictor.json` comes from the registry: it may not name a file outside its folder."
    case[1].save(tmp_path / "in")
    (tmp_path / "out.onnx").write_bytes(case[1].model)
    form = case[1].form.model_copy(update={"model": "../out.onnx"})
    (tmp_path / "in" / "predictor.json").write_text(form.model_dump_json())
    with pytest.raises(PredictorError, match=r"out\.onnx"):
        Predictor.load(tmp_path / "in")


# ── loading ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_loading_needs_no_training_library_and_no_pickle(case: Case, tmp_path: Path) -> None:
    pipeline, compiled, X_test, _ = case
    compiled.save(tmp_path)
    row = {k: None if v != v else v for k, v in X_test.head(1).to_dict("records")[0].items()}
    code = f"""
import sys
def watch(event, args):
    if event == "pickle.find_class":
        raise SystemExit("something was unpickled")
sys.addaudithook(watch)
for name in {sorted(HEAVY)!r}:
    sys.modules[name] = None  # importing it fails
from income_mlops.predictor import Predictor
print(repr(float(Predictor.load({str(tmp_path)!r}).predict_rows([{row!r}])[0])))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - pipeline.predict_proba(X_test.head(1))[0, 1]) < TOLERANCE


def test_a_stored_form_is_described(case: Case, tmp_path: Path) -> None:
    pipeline, _, X_test, schema = case
    stored = store_compiled(pipeline, schema, X_test, tmp_path)
    assert stored.reason is None and set(stored.metrics) == {
        "predictor_max_abs_difference", "predictor_row_us", "predictor_bytes"}
    assert stored.metrics["predictor_row_us"] < 2000
    assert stored.metrics["predictor_bytes"] == sum(f.stat().st_size for f in tmp_path.iterdir())
    form = json.loads((tmp_path / "predictor.json").read_text())
    assert form["format"] == "income_mlops.predictor" and form["version"] == 1
    assert form["classes"] == list(schema.classes) and type(pipeline[-1]).__name__ in form["made_from"]


def test_one_row_costs_a_small_part_of_the_pipeline(case: Case, predictor: Predictor) -> None:
    "Side by side in one process; measured 0.03 ms against several."
    pipeline, _, X_test, _ = case
    row = X_test.head(1)
    columns = columns_of(row)

    def quickest(call: Any) -> float:
        times = []
        for _ in range(15):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)
    assert quickest(lambda: predictor.predict(columns)) * 20 < quickest(lambda: pipeline.predict_proba(row))
