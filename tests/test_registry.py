import threading

import pytest
from serving_helpers import Rows, copy_store, make_settings, train

from income_mlops import promotion, registry
from income_mlops.registry import NoModel, RegistryError, Unknown, Unreachable


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Two trainings: XGBoost and RandomForest, then XGBoost again (better)."""
    settings = make_settings(tmp_path_factory.mktemp("registry"))
    settings.state.mkdir()
    rows = Rows(settings, 1000)
    train(settings, rows, {"XGBoost": 0.30, "RandomForest": 0.31}, settings.root / "artifacts")
    train(settings, rows, {"XGBoost": 0.29}, dataset="d2")
    return settings


@pytest.fixture
def settings(template, tmp_path):
    return copy_store(template, tmp_path / "project")


def client(settings):
    from mlflow import MlflowClient
    return MlflowClient(settings.tracking_uri)


def by_name(settings):
    return {(v.family, v.version): v for v in registry.versions(settings)}


def test_versions_tell_family_metrics_dataset_and_training(settings):
    found = by_name(settings)
    assert set(found) == {("XGBoost", 1), ("XGBoost", 2), ("RandomForest", 1)}
    latest = registry.versions(settings)[0]
    assert (latest.family, latest.version, latest.dataset) == ("XGBoost", 2, "d2")
    assert latest.aliases == ("newest",) and latest.score == 0.29 and found["XGBoost", 1].aliases == ()
    assert found["XGBoost", 1].training == found["RandomForest", 1].training != latest.training
    run = client(settings).get_run(latest.run_id)
    assert latest.metrics == run.data.metrics and run.data.tags["mlflow.parentRunId"] == latest.training


def test_another_experiment_is_not_seen(settings):
    other = settings.model_copy(update={"mlflow": settings.mlflow.model_copy(update={"experiment_name": "adult"})})
    assert registry.versions(other) == []
    with pytest.raises(NoModel, match="'adult'"):
        promotion.choose(other)


def test_names_that_mlflow_refuses_are_mended(settings):
    other = settings.model_copy(update={"mlflow": settings.mlflow.model_copy(update={"experiment_name": "a/b:c"})})
    assert registry.registered_name(other, "my.package:Model") == "a-b-c.Model"


def test_registering_twice_and_after_an_interruption(settings):
    v = by_name(settings)["XGBoost", 2]
    uri = f"runs:/{v.run_id}/model"
    client(settings).delete_registered_model_alias(v.name, "newest")  # interrupted before the alias
    again = registry.register(settings, v.run_id, uri, "XGBoost", "d2")
    assert again == v
    assert len(registry.versions(settings)) == 3


def test_repeating_an_old_registration_does_not_move_newest(settings):
    v = by_name(settings)["XGBoost", 1]
    uri = f"runs:/{v.run_id}/model"
    assert registry.register(settings, v.run_id, uri, "XGBoost", "d1").aliases == ()
    assert by_name(settings)["XGBoost", 2].aliases == ("newest",)


@pytest.mark.parametrize("form", ["models", "runs"])
def test_two_at_the_same_moment_make_one_version(settings, form):
    v = by_name(settings)["RandomForest", 1]
    logged = client(settings).get_run(v.run_id).outputs.model_outputs[0].model_id
    uri = f"models:/{logged}" if form == "models" else f"runs:/{v.run_id}/model"
    client(settings).delete_registered_model(v.name)
    start, made = threading.Barrier(4), []

    def one():
        start.wait()
        made.append(registry.register(settings, v.run_id, uri, "RandomForest", "d1", job="j", tags={"k": "v"}))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    left = [x for x in registry.versions(settings) if x.family == "RandomForest"]
    assert len(left) == 1 and len(made) == 4 and {m.version for m in made} == {left[0].version}
    assert left[0].aliases == ("newest",)
    assert left[0].tags == {"k": "v", "family": "RandomForest", "dataset": "d1", "job": "j"}


def test_a_job_repeated_after_its_training_broke_off_leaves_versions_of_one_training(settings):
    """Killed between the registrations of two families, or before the notebook was kept: the siblings stay together."""
    c = client(settings)
    runs = {(v.family, v.training): v for v in registry.versions(settings)}
    broken = next(v.training for (family, _), v in runs.items() if family == "RandomForest")
    for v in runs.values():
        c.delete_model_version(v.name, str(v.version))
    c.set_terminated(broken, "FAILED")
    old = {family: v for (family, training), v in runs.items() if training == broken}

    def attempt(family, run_id):
        return registry.register(settings, run_id, f"runs:/{run_id}/model", family, "d1", job="j")
    first = attempt("XGBoost", old["XGBoost"].run_id)  # killed before the forest's
    again = next(v for (_, training), v in runs.items() if training != broken)
    second = attempt("XGBoost", again.run_id)
    third = registry.register(settings, old["RandomForest"].run_id, f"runs:/{old['RandomForest'].run_id}/model",
                              "RandomForest", "d1", job="another")
    assert second.version > first.version and second.training == again.training
    assert [v.version for v in registry.versions(settings) if v.family == "XGBoost"] == [second.version]
    assert attempt("XGBoost", again.run_id) == second, "safe to repeat"
    assert third in registry.versions(settings), "what another job has made stays"


def test_a_run_without_a_model_cannot_be_registered(settings):
    v = by_name(settings)["XGBoost", 1]
    with pytest.raises(Unknown, match="no model 'other'"):
        registry.register(settings, v.training, f"runs:/{v.training}/other", "XGBoost", "d1")


def test_unset_alias_means_the_first_training_pinned(settings):
    choice = promotion.choose(settings)
    assert choice.pinned and (choice.version.family, choice.version.version) == ("XGBoost", 1), "0.30 < 0.31"
    assert choice.others == ()


def test_the_best_of_several_bearers_is_chosen_and_the_others_named(settings):
    promotion.promote(settings, "RandomForest", 1, "production")
    assert promotion.choose(settings).version.family == "RandomForest"
    client(settings).set_registered_model_alias("adult-income.XGBoost", "PRODUCTION", "2")
    choice = promotion.choose(settings)
    assert (choice.version.family, choice.version.version) == ("XGBoost", 2) and not choice.pinned
    assert choice.others == ("adult-income.RandomForest version 1",)
    for family in ("randomforest", "ADULT-INCOME.RandomForest"):
        assert promotion.choose(settings, "Production", family).version.family == "RandomForest"


def test_the_exact_spelling_of_an_alias_wins(settings):
    c = client(settings)
    c.set_registered_model_alias("adult-income.XGBoost", "Production", "2")
    c.set_registered_model_alias("adult-income.XGBoost", "production", "1")
    assert promotion.choose(settings).version.version == 1
    promotion.promote(settings, "XGBoost", 2, "production")
    assert registry.aliases(settings)["adult-income.XGBoost"] == {"newest": 2, "production": 2}


def test_promote_and_revert_leave_a_trace(settings):
    first = promotion.promote(settings, "xgboost", 1, "Staging", by="ann")
    assert first.aliases == ("staging",) and first.tags["staging.by"] == "ann" and first.tags["staging.at"]
    promotion.promote(settings, "XGBoost", "NEWEST", "staging", by="bob")
    now = promotion.choose(settings, "staging").version
    assert (now.version, now.tags["staging.by"], now.tags["staging.replaced"]) == (2, "bob", "1")
    back = promotion.revert(settings, "staging", by="eve")
    assert (back.version, back.tags["staging.by"]) == (1, "eve")
    with pytest.raises(RegistryError, match="nothing to go back to"):
        promotion.revert(settings, "staging")
    promotion.withdraw(settings, "XGBoost", "STAGING")
    with pytest.raises(Unknown, match="known aliases: newest"):
        promotion.choose(settings, "staging")


@pytest.mark.parametrize(("family", "version", "alias", "words"), [
    ("Forest", 1, "production", "known models: RandomForest, XGBoost"),
    ("XGBoost", 9, "production", "no version '9'; it has 1, 2, newest"),
    ("XGBoost", "best", "production", "no version 'best'"),
    ("XGBoost", "-1", "production", "no version '-1'"),
    *[("XGBoost", 1, bad, "cannot be an alias") for bad in ("", "latest", "Latest", "v1", "V12", "a b", "a/b", "a.b")],
    ("XGBoost", 1, "newest", "set by training"),
])
def test_wrong_promotions_say_what_is_known(settings, family, version, alias, words):
    with pytest.raises(RegistryError, match=words) as e:
        promotion.promote(settings, family, version, alias)
    assert "\n" not in str(e.value)


def test_download_and_unpickle_give_the_same_probabilities(template, settings, tmp_path):
    v = by_name(settings)["XGBoost", 2]
    folder = registry.download(settings, v, tmp_path / "x")
    rows = Rows(settings, 1000)
    assert (folder / "schema.json").read_text() == rows.schema.model_dump_json()
    pipeline = registry.load_pipeline(registry.download_model(settings, v, tmp_path / "x"))
    assert (pipeline.predict_proba(rows.frame) == rows.fit(0.29).predict_proba(rows.frame)).all()


def test_looking_into_an_empty_place_creates_nothing(tmp_path):
    settings = make_settings(tmp_path)
    assert registry.versions(settings) == []
    with pytest.raises(NoModel):
        promotion.choose(settings)
    assert not settings.state.exists()


def test_an_absent_server_is_one_line_and_soon(tmp_path, monkeypatch):
    for name, value in (("TIMEOUT", "2"), ("MAX_RETRIES", "0")):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    settings = make_settings(tmp_path, "http://127.0.0.1:9")
    with pytest.raises(Unreachable) as e:
        promotion.choose(settings)
    assert "\n" not in str(e.value) and str(e.value).startswith("MLflow: ")


def test_a_database_of_another_kind_is_reported(tmp_path):
    settings = make_settings(tmp_path)
    settings.state.mkdir()
    (settings.state / "mlflow.db").write_text("not a database, but long enough to look like a file" * 100)
    with pytest.raises(Unreachable) as e:
        registry.versions(settings)
    assert "\n" not in str(e.value)
