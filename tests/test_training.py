"""A training from the command line to the registry, on all real rows, with real kernels and a real MLflow store."""
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest
from training_helpers import children_of, command, free_port, mlflow_server, running, set_up, small

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A project with one short training of both families, kept by a real MLflow server."
    root = set_up(tmp_path_factory.mktemp("trained"))
    with mlflow_server(root):
        command(root, "train", "--trials", "1")
        yield root


def client(root):
    from mlflow.tracking import MlflowClient

    from income_mlops.settings import load_settings
    uri = load_settings(root / "settings.ini").tracking_uri
    return MlflowClient(uri, uri)


def runs_of(root):
    c = client(root)
    return c.search_runs([c.get_experiment_by_name("adult-income").experiment_id])


def artifacts(root, run_id, path=""):
    found = set()
    for info in client(root).list_artifacts(run_id, path):
        found |= artifacts(root, run_id, info.path) if info.is_dir else {info.path}
    return found


def test_one_run_with_a_nested_run_per_family(trained):
    runs = runs_of(trained)
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    nested = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(parents) == 1 and {r.data.tags["family"] for r in nested} == {"XGBoost", "RandomForest"}
    assert {r.info.status for r in runs} == {"FINISHED"}
    parent = parents[0]
    assert {r.data.tags["mlflow.parentRunId"] for r in nested} == {parent.info.run_id}
    assert parent.data.params["trials"] == "1" and parent.data.tags["verdict"] == "first model"
    kept = artifacts(trained, parent.info.run_id)
    assert {"notebook/train.ipynb", "notebook/train.html", "data/train.parquet", "plots/data.png"} <= kept


def test_a_training_holds_the_analysis_of_its_data(trained):
    from income_mlops.profile import Profile
    runs = runs_of(trained)
    parent = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    assert parent.data.tags["data_verdict"] == "use as is" and parent.data.metrics["findings_error"] == 0
    assert {"report.html", "findings.json", "profile.reference.json", "profile.new.json",
            "plots/effects.svg"} <= artifacts(trained, parent.info.run_id)
    for nested in (r for r in runs if "mlflow.parentRunId" in r.data.tags):
        file = client(trained).download_artifacts(nested.info.run_id, "serving/profile.json")
        assert Profile.model_validate_json(Path(file).read_text()).rows == 32_561



def test_the_data_is_named_by_its_full_content(trained):
    import polars as pl

    from income_mlops.data import digest
    parent = next(r for r in runs_of(trained) if "mlflow.parentRunId" not in r.data.tags)
    c = client(trained)
    local = c.download_artifacts(parent.info.run_id, "data/train.parquet")
    table = pl.read_parquet(local)
    assert table.height == 32_561
    assert parent.inputs.dataset_inputs[0].dataset.digest == digest(table)


def test_the_metrics_are_those_of_the_logged_model(trained):
    "Recomputed with scikit-learn from the registered pipeline and the official test file."
    import mlflow
    import pandas as pd
    from sklearn import metrics
    test = pd.read_csv(trained / "data" / "adult.test.csv", na_values="?")
    y = (test["income"] == ">50K").astype(int)
    c = client(trained)
    mlflow.set_tracking_uri(c.tracking_uri)
    for family in ("XGBoost", "RandomForest"):
        version = c.get_model_version_by_alias(f"adult-income.{family}", "newest")
        assert version.version == "1" or version.version == 1
        pipeline = mlflow.sklearn.load_model(f"models:/adult-income.{family}@newest")
        p = pipeline.predict_proba(test)[:, 1].astype(float)
        logged = c.get_run(version.run_id).data.metrics
        assert logged["holdout_roc_auc"] == pytest.approx(metrics.roc_auc_score(y, p), abs=1e-9)
        assert logged["holdout_log_loss"] == pytest.approx(metrics.log_loss(y, p), abs=1e-6)
        assert logged["holdout_brier"] == pytest.approx(((p - y) ** 2).mean(), abs=1e-9)
        assert logged["holdout_tp"] == ((p >= 0.5) & (y == 1)).sum()


def test_the_second_training_meets_the_first_as_champion(trained):
    command(trained, "train", "--trials", "1", "--models", "XGBoost")
    parent = next(r for r in runs_of(trained) if "mlflow.parentRunId" not in r.data.tags)
    comparison = json.loads(Path(client(trained).download_artifacts(parent.info.run_id, "comparison.json")).read_text())
    assert comparison["champion"].startswith("XGBoost version 1")
    # the same seed and budget give the same model
    assert comparison["verdict"] == "no clear difference" and comparison["log_loss"]["difference"] == 0


def test_api_file_and_pipeline_agree_on_the_whole_holdout(trained):
    "16,281 rows three ways: the same probability to 1e-6, the same class."
    import mlflow
    import numpy as np
    import pandas as pd
    test = pd.read_csv(trained / "data" / "adult.test.csv", na_values="?")
    mlflow.set_tracking_uri(client(trained).tracking_uri)
    pipeline = mlflow.sklearn.load_model("models:/adult-income.XGBoost@newest")
    expected = pipeline.predict_proba(test)[:, 1].astype(float)
    command(trained, "predict", "data/adult.test.csv", "--out", "predicted.csv")
    from_file = pd.read_csv(trained / "predicted.csv")
    rows = json.loads(test.drop(columns=["income", "fnlwgt"]).to_json(orient="records"))
    port = free_port()
    api = f"http://127.0.0.1:{port}"
    answers = []
    with running(trained, ["income_mlops.cli", "serve", "--port", str(port)], f"{api}/ready"):
        for start in range(0, len(rows), 1000):
            body = json.dumps({"data": rows[start:start + 1000]}).encode()
            request = urllib.request.Request(f"{api}/predict", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as response:
                answers.append(json.load(response))
    from_api = np.concatenate([a["probability"] for a in answers])
    assert len(from_api) == len(from_file) == len(expected) == 16_281
    assert np.abs(from_api - expected).max() <= 1e-6 and np.abs(from_file["probability"] - expected).max() <= 1e-6
    classes = np.where(expected >= 0.5, ">50K", "<=50K")
    assert (np.concatenate([a["prediction"] for a in answers]) == classes).all()
    assert (from_file["prediction"] == classes).all()


@pytest.mark.full
def test_two_trainings_give_identical_metrics(tmp_path):
    root = small(set_up(tmp_path))
    for threads in ("1", "2"):
        command(root, "train", "--trials", "3", env={"DYNACONF_OPTIMIZATION__THREADS": threads})
    # all but the one that is a time
    first, second = ({r.data.tags["family"]: {k: v for k, v in r.data.metrics.items() if k != "predictor_row_us"}
                      for r in runs_of(root) if r.data.tags.get("mlflow.parentRunId") == p.info.run_id}
                     for p in runs_of(root) if "mlflow.parentRunId" not in p.data.tags)
    assert {"cv_log_loss", "holdout_log_loss", "predictor_max_abs_difference"} <= set(first["XGBoost"])
    assert first == second and set(first) == {"XGBoost", "RandomForest"}


@pytest.mark.full
def test_a_family_of_ones_own(tmp_path):
    "The README's ten lines, as they stand there."
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = next(b for b in readme.split("```python\n")[1:] if "class Logistic" in b).split("```")[0]
    root = small(set_up(tmp_path))
    (root / "mymodels.py").write_text(textwrap.dedent(code))
    settings = (root / "settings.ini").read_text()
    assert "models = XGBoost, RandomForest, mymodels:Logistic" in readme
    (root / "settings.ini").write_text(settings.replace("models = XGBoost, RandomForest", "models = mymodels:Logistic"))
    command(root, "train", "--trials", "2")
    version = client(root).get_model_version_by_alias("adult-income.Logistic", "newest")
    assert client(root).get_run(version.run_id).data.metrics["holdout_roc_auc"] > 0.85


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.full
def test_a_killed_kernel_fails_the_run_and_the_next_training_resumes(tmp_path):
    root = small(set_up(tmp_path))
    journal = root / "var" / "studies" / "studies.journal"
    args = [sys.executable, "-m", "income_mlops.cli", "train", "--trials", "16", "--models", "RandomForest"]
    process = subprocess.Popen(args, cwd=root, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count('"op_code":6') > 4):
        assert process.poll() is None and time.monotonic() < deadline, "the study did not start"
        time.sleep(0.1)
    kernel = next(p for p, line in children_of(process.pid).items() if "ipykernel_launcher" in line)
    os.kill(kernel, signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1 and time.monotonic() - killed < 60, err
    assert {r.info.status for r in runs_of(root)} == {"FAILED"}
    before = finished_trials(journal)
    assert 0 < before < 16
    command(root, "train", "--trials", "16", "--models", "RandomForest")
    assert finished_trials(journal) == 16, "the study went on where it stopped"


def finished_trials(journal):
    import optuna
    from optuna.storages.journal import JournalFileBackend
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    return sum(t.state.name in ("COMPLETE", "PRUNED") for t in study.trials)


def test_no_run_is_left_running(trained):
    with sqlite3.connect(trained / "server.db") as db:
        assert db.execute("select count(*) from runs where status = 'RUNNING'").fetchone() == (0,)
