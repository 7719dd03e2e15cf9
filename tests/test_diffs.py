"""Real trainings compared and executed again: what differs is said, noise is not, and numbers come out equal."""
import json
import re
import shutil
from pathlib import Path

import nbformat
import polars as pl
import pytest
from click.testing import CliRunner
from training_helpers import set_up, small

from income_mlops import diffs, pipelines, registry, runs
from income_mlops.cli import main
from income_mlops.kept import KeptError, find, read
from income_mlops.settings import load_settings
from income_mlops.tracking import connect, experiment_id

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return load_settings(small(set_up(tmp_path_factory.mktemp("diffs"))) / "settings.ini")


@pytest.fixture(scope="module")
def trainings(settings):
    "A first training, and one with another budget and seed."
    return [pipelines.train(settings, ["XGBoost"], progress=False, **options).run_id
            for options in ({"trials": 1}, {"trials": 2, "seed": 1})]


@pytest.fixture
def cli(settings, monkeypatch):
    "Run a command in the project; its exit code and what it printed."
    monkeypatch.setenv("INCOME_MLOPS_SETTINGS", str(settings.file))

    def run(*words):
        result = CliRunner().invoke(main, [str(w) for w in words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result
    return run


def artifact(settings, run_id, name, folder):
    return Path(connect(settings).download_artifacts(run_id, name, str(folder)))


def names(settings, run_id):
    return {f.path for f in connect(settings).list_artifacts(run_id)}


def test_a_retraining_keeps_its_difference_from_the_champion(settings, trainings, tmp_path):
    first, second = trainings
    wanted = {"diff.html", "diff.txt", "diff.json"}
    assert not wanted & names(settings, first) and wanted <= names(settings, second)
    assert connect(settings).get_run(second).data.tags["compared_with"] == first
    found = json.loads(artifact(settings, second, "diff.json", tmp_path).read_text())
    parameters = {v["name"]: (v["old"], v["new"]) for v in found["parameters"]}
    assert parameters["trials"] == ("1", "2") and parameters["seed"] == ("None", "1")
    assert parameters["XGBoost n_trials"] == ("1", "2")
    metrics = {v["name"]: (v["old"], v["new"]) for v in found["metrics"]}
    client = connect(settings)
    for name, (old, new) in metrics.items():
        if not name.startswith("XGBoost ") and "[" not in name:
            assert (old, new) == tuple(client.get_run(r).data.metrics.get(name) for r in trainings)
    losses = {"best_log_loss", "XGBoost cv_log_loss", "XGBoost holdout_log_loss", "XGBoost trial_log_loss[1]"}
    assert losses <= set(metrics)
    assert not [n for n in metrics if re.search("seconds|_us", n)], "timings are no result"
    assert found["data"] == found["environment"] == found["settings"] == [], "neither of these was changed"
    headings = [c["heading"] for c in found["cells"]]
    assert set(headings) == {"Study", "Evaluation", "Fairness", "Verdict"}
    assert not any(c["source"] for c in found["cells"])
    text = artifact(settings, second, "diff.txt", tmp_path).read_text()
    assert "XGBoost trial 2/2" in text and "'champion': 'XGBoost version 1'" in text


def test_a_difference_that_a_crash_prevented_is_made_up_for(settings, trainings, tmp_path):
    "As the next attempt of a job does that was killed between its training and the difference."
    client, second = connect(settings), trainings[1]
    before = artifact(settings, second, "diff.txt", tmp_path).read_text()
    for name in ("diff.html", "diff.txt", "diff.json"):
        (Path(client.get_run(second).info.artifact_uri.removeprefix("file://")) / name).unlink()
    client.delete_tag(second, "compared_with")
    assert "diff.txt" not in names(settings, second)
    pipelines.keep_diff(settings, second)
    assert artifact(settings, second, "diff.txt", tmp_path).read_text() == before
    assert client.get_run(second).data.tags["compared_with"] == trainings[0]


def test_a_difference_holds_no_noise(settings, trainings, tmp_path):
    text = artifact(settings, trainings[1], "diff.txt", tmp_path).read_text()
    text = text.split("\n", 2)[2]  # the two runs are named once, at the top
    assert not re.search(r"\b(?=\d*[a-f])[0-9a-f]{16,}\b|\d\d:\d\d|/tmp|0x[0-9a-f]{6}|base64|Figure|papermill", text)
    page = artifact(settings, trainings[1], "diff.html", tmp_path).read_text()
    assert "<script" not in page and "<img" not in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!data:|#)[^"'\s>]""", page) and "url(" not in page
    assert "XGBoost trial 2/2" in page and len(page) < 100_000


def test_a_replay_gives_every_number_again(settings, trainings, cli, tmp_path):
    journal = settings.state / "studies" / "studies.journal"
    versions, studies = len(registry.versions(settings)), journal.read_bytes()
    result = cli("replay", trainings[1], "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["same"] and told["settings_kept"] and told["metrics"] > 35
    kept = [connect(settings).get_run(r) for r in (trainings[1], told["replay_id"])]
    assert kept[0].data.metrics.keys() == kept[1].data.metrics.keys()
    assert kept[1].data.tags["replay_of"] == trainings[1] and kept[1].info.status == "FINISHED"
    assert len(registry.versions(settings)) == versions, "a replay registers nothing"
    assert journal.read_bytes() == studies

    # two executions of the same: nothing differs, in the terminal, as JSON and on the page
    page = tmp_path / "sub" / "same.html"
    result = cli("diff", trainings[1], told["replay_id"], "--html", page)
    assert (result.exit_code, result.stdout) == (0, "no difference\n") and "No difference" in page.read_text()


STORY = """
import mlflow
from income_mlops import datasets, training
from income_mlops.settings import load_settings
settings = load_settings()
version = datasets.load(settings, dataset)
with mlflow.start_run():
    mlflow.log_dict(version.manifest.model_dump(), "data/manifest.json")
    mlflow.log_input(training.dataset_input(version, "rows"), context="training")
    positive = (version.train[version.schema.target] == version.schema.positive).sum()
    mlflow.log_metrics({"positive": int(positive), "fit_seconds": 1.5})
"""


@pytest.mark.full
def test_what_was_altered_since_is_what_a_replay_shows(settings, trainings, cli, tmp_path):
    "First the rows of the dataset version, then the kept notebook; each time the metric that it changes."
    version = read(settings, trainings[0]).data["version"]
    cells = [nbformat.v4.new_code_cell('dataset: str = ""', metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(STORY)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "story.ipynb")
    done = runs.execute(tmp_path / "story.ipynb", {"dataset": version}, settings, run_name="story", progress=False)
    (tmp_path / "story.ipynb").unlink()
    positive = int(connect(settings).get_run(done.run_id).data.metrics["positive"])

    folder, = (settings.state / "datasets").glob(f"*/{version}")
    rows, aside = folder / "train.parquet", tmp_path / "aside"
    shutil.copy(rows, aside)
    table = pl.read_parquet(rows)
    columns = settings.dataset.columns
    gone = (table.head(200)[columns.target] == columns.positive).sum()
    table.slice(200).write_parquet(rows)
    try:
        result = cli("replay", "story", "--json")
    finally:
        shutil.move(aside, rows)
    told = json.loads(result.stdout)
    assert result.exit_code == 1 and not told["same"] and told["metrics"] == 1
    assert told["differences"] == [{"name": "positive", "old": positive, "new": positive - gone}]
    (digest,) = told["data"]
    assert digest["name"] == "training digest" and digest["old"] == read(settings, done.run_id).data["training digest"]

    stored = artifact(settings, done.run_id, "notebook/story.ipynb", tmp_path)
    connect(settings).log_text(done.run_id, stored.read_text().replace("int(positive)", "5"), "notebook/story.ipynb")
    result = cli("replay", done.run_id[:10])
    assert result.exit_code == 1
    assert re.search(rf"^positive +{positive} +5 *$", result.stdout, re.M) and "1 of 1 metrics differ" in result.stdout


def test_a_run_is_found_in_every_way_a_person_names_it(settings, trainings):
    first, second = trainings
    client = connect(settings)
    nested, = client.search_runs([client.get_run(first).info.experiment_id], f"tags.`mlflow.parentRunId` = '{first}'")
    for text in (first, first[:8], client.get_run(first).info.run_name, nested.info.run_id, "XGBoost@1",
                 "xgboost@1", "adult-income.XGBoost@1"):
        assert find(settings, text).info.run_id == first, text
    assert find(settings, "XGBoost@newest").info.run_id == second


def test_what_cannot_be_answered_is_one_line_and_no_answer(settings, trainings, cli):
    client = connect(settings)
    bare = client.create_run(experiment_id(client, settings), run_name="bare").info.run_id
    client.set_terminated(bare)
    version = read(settings, trainings[0]).data["version"]
    folder, = (settings.state / "datasets").glob(f"*/{version}")
    for words, said in ((("diff", "nothing", trainings[0]), "no run 'nothing' in experiment 'adult-income'"),
                        (("replay", "XGBoost@production"), "has no version 'production'; it has 1, 2"),
                        (("diff", trainings[0], bare), "holds no executed notebook"),
                        (("replay", "bare"), "holds no executed notebook"),
                        (("replay", trainings[0]), f"dataset version '{version}' does not exist")):
        gone = said.startswith("dataset")
        if gone:
            folder.rename(folder.parent / ".gone")
        try:
            result = cli(*words)
        finally:
            if gone:
                (folder.parent / ".gone").rename(folder)
        assert result.exit_code == 3 and result.stdout == ""
        assert result.stderr.startswith("error: ") and said in result.stderr and result.stderr.count("\n") == 1


def test_a_difference_that_cannot_be_kept_costs_no_training(settings, trainings, caplog):
    client = connect(settings)
    empty = client.create_run(experiment_id(client, settings)).info.run_id
    client.set_terminated(empty)
    with pytest.raises(KeptError):
        diffs.log_diff(settings, trainings[1], empty)
    client.set_tag(empty, "champion_run", trainings[0])
    pipelines.keep_diff(settings, empty)
    assert "holds no executed notebook" in caplog.text and empty in caplog.text
    assert "holds no executed notebook" in client.get_run(empty).data.tags["diff_error"]
