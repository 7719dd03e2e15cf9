"""The command: what it says, what it writes, and one clear line for everything that is wrong."""
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from cli_helpers import ROOT, income_mlops, register_small_model
from click.testing import CliRunner

from income_mlops.cli import main


def run(*words: str):
    "The command in this process."
    return CliRunner().invoke(main, list(words))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A project folder with a registered model; its settings, schema and pipeline."
    project = tmp_path_factory.mktemp("trained")
    shutil.copy(ROOT / "settings.ini", project)
    (project / "data").symlink_to(ROOT / "data")
    return project, *register_small_model(project)


@pytest.fixture
def there(trained, monkeypatch):
    "In that project folder."
    monkeypatch.chdir(trained[0])
    return trained


# ── what a newcomer sees ──────────────────────────────────────────────────────────────────────────────────────────────

COMMANDS = ["up", "serve", "train", "analyze", "models", "promote", "predict", "settings", "diff", "replay"]


def test_help_lists_every_command():
    done = run("--help")
    assert done.exit_code == 0
    assert all(f"\n  {name} " in done.output for name in COMMANDS)
    assert "…" not in done.output and "..." not in done.output.replace("[ARGS]...", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command):
    done = run(command, "--help")
    assert done.exit_code == 0 and done.output.startswith(f"Usage: main {command}")


def test_help_is_fast():
    "Nothing heavy is imported before it is needed. The median of five, this machine may be busy."
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "income_mlops.cli", "--help"], check=True, capture_output=True)
        return time.perf_counter() - start
    bare = statistics.median(_time([sys.executable, "-c", "import click"]) for _ in range(3))
    assert statistics.median(once() for _ in range(5)) < max(0.5, 4 * bare)
    code = ("import sys, income_mlops.cli; "
            "print(sorted({'mlflow', 'pandas', 'polars', 'sklearn', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def _time(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def test_installed_command_and_module_are_the_same(project):
    words = ["settings", "--json"]
    program = Path(sys.executable).parent / "income-mlops"
    installed = subprocess.run([program, *words], cwd=project(), capture_output=True)
    assert installed.returncode == 0
    assert json.loads(installed.stdout) == json.loads(income_mlops(project(), *words).stdout)


@pytest.mark.parametrize(("words", "named"), [
    (["nope"], "nope"), (["promote", "XGBoost"], "VERSION"), (["train", "--trials", "0"], "--trials"),
    (["train", "--trials", "many"], "--trials"), (["train", "--timeout", "-1"], "--timeout"),
    (["train", "--seed", "-1"], "--seed"), (["train", "--models", " , "], "--models"),
    (["serve", "--port", "0"], "--port"), (["--settings", "nowhere.ini", "settings"], "nowhere.ini"),
    (["predict"], "FILE"), (["settings", "--xml"], "--xml"),
])
def test_wrong_usage_is_one_line(words, named):
    done = run(*words)
    assert done.exit_code == 2
    assert named in done.stderr and len(done.stderr.splitlines()) == 1 and "--help" in done.stderr


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_settings_show_value_and_origin(project, monkeypatch):
    monkeypatch.chdir(project())
    monkeypatch.setenv("DYNACONF_SERVING__PORT", "9000")
    monkeypatch.setenv("DYNACONF_SERVING__API_KEY", "open-sesame")
    rows = {r["key"]: r for r in json.loads(run("settings", "--json").stdout)}
    assert rows["serving.port"] == {"key": "serving.port", "value": 9000, "origin": "DYNACONF_SERVING__PORT"}
    assert rows["dataset.columns.target"]["origin"] == "settings.ini"
    assert rows["mlflow.port"]["origin"] == "default"
    shown = run("settings").stdout
    assert "open-sesame" not in shown and len(shown.splitlines()) == len(rows)


def test_settings_file_is_found_from_below_and_by_name(project, monkeypatch):
    folder = project(("experiment_name = adult-income", "experiment_name = other"))
    (folder / "deep/er").mkdir(parents=True)
    monkeypatch.chdir(folder / "deep/er")
    assert "other" in run("settings").stdout
    monkeypatch.chdir("/")
    monkeypatch.setenv("INCOME_MLOPS_SETTINGS", "")  # what the option sets is undone after the test
    assert "other" in run("--settings", str(folder / "settings.ini"), "settings").stdout


BAD_SETTINGS = [  # environment, or replacements in the file; what the line must name
    ({"DYNACONF_SERVING__PORT": "high"}, "serving.port"),
    ({"DYNACONF_SERVING__PORT": "70000"}, "serving.port"),
    ({"DYNACONF_MLFLOW__PORT": "0"}, "mlflow.port"),
    ({"DYNACONF_SERVING__THRESHOLD": "1.5"}, "serving.threshold"),
    ({"DYNACONF_SERVING__ALIAS": "'to users'"}, "serving.alias"),
    ({"DYNACONF_SERVING__FOLLOW_ALIAS": "perhaps"}, "serving.follow_alias"),
    ({"DYNACONF_SERVING__MAX_UPLOAD_MB": "-1"}, "serving.max_upload_mb"),
    ({"DYNACONF_OPTIMIZATION__N_TRIALS": "0"}, "optimization.n_trials"),
    ({"DYNACONF_OPTIMIZATION__N_TRIALS": "2.5"}, "optimization.n_trials"),
    ({"DYNACONF_OPTIMIZATION__N_TRAILS": "3"}, "optimization.n_trails"),
    ({"DYNACONF_OPTIMIZATION__N_FOLDS": "1"}, "optimization.n_folds"),
    ({"DYNACONF_OPTIMIZATION__SEED": "-1"}, "optimization.seed"),
    ({"DYNACONF_OPTIMIZATION__TIMEOUT": "-5"}, "optimization.timeout"),
    ({"DYNACONF_RUNS__HEARTBEAT": "0"}, "runs.heartbeat"),
    ({"DYNACONF_PREPARATION__RARE_SHARE": "0.9"}, "preparation.rare_share"),
    ({"DYNACONF_DATASET__HOLDOUT_SHARE": "1"}, "dataset.holdout_share"),
    ({"DYNACONF_SERVER__PORT": "80"}, "server"),
    ([("models = XGBoost, RandomForest", "models = ''")], "models"),
    ([("target = income", "target = ''")], "dataset.columns.target"),
    ([("positive = \">50K\"\n", "")], "dataset.columns.positive"),
    ([("origin_path = data/adult.train.csv\n", "")], "dataset.origin_path"),
    ([("[[columns]]", "[[columns")], "settings.ini"),
    ([("ignored = fnlwgt", "ignored = fnlwgt\n; a comment")], "settings.ini"),
    ([("experiment_name = adult-income", "experiment_name = ''")], "mlflow.experiment_name"),
]


@pytest.mark.parametrize(("wrong", "named"), BAD_SETTINGS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_setting_is_one_line_that_names_it(wrong, named, project, monkeypatch):
    monkeypatch.chdir(project(*(wrong if isinstance(wrong, list) else [])))
    for name, value in wrong.items() if isinstance(wrong, dict) else ():
        monkeypatch.setenv(name, value)
    done = run("settings")
    assert done.exit_code == 1
    assert named in done.stderr and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert not done.stdout


def test_all_wrong_settings_at_once(project, monkeypatch):
    monkeypatch.chdir(project(("target = income", "target = ''")))
    monkeypatch.setenv("DYNACONF_SERVING__PORT", "high")
    done = run("models")
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 2
    assert "dataset.columns.target" in done.stderr and "serving.port" in done.stderr


def test_debug_shows_the_traceback(project):
    done = income_mlops(project(), "--debug", "settings", DYNACONF_SERVING__PORT="high")
    assert done.returncode == 1 and "Traceback" in done.stderr and "serving.port" in done.stderr


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_no_model_is_said(project, monkeypatch):
    monkeypatch.chdir(project())
    assert "no model yet" in run("models").stdout
    assert json.loads(run("models", "--json").stdout) == []
    done = run("predict", "data/adult.test.csv")
    assert done.exit_code == 1 and "no model" in done.stderr and len(done.stderr.splitlines()) == 1


def test_models_and_promote(there):
    versions = json.loads(run("models", "--json").stdout)
    assert [(v["family"], v["version"], v["aliases"]) for v in versions] == [("RandomForest", 1, ["newest"])]
    header, row = run("models").stdout.splitlines()
    assert "hold-out AUC" in header and "0.8900" in row and "newest" in row
    done = run("promote", "RandomForest", "1", "--alias", "staging")
    assert done.exit_code == 0 and "newest, staging" in done.stdout
    for words, named in [(("Forest", "1"), "Forest"), (("RandomForest", "7"), "7"),
                         (("RandomForest", "1", "--alias", "v1"), "v1")]:
        done = run("promote", *words)
        assert done.exit_code == 1 and named in done.stderr and len(done.stderr.splitlines()) == 1


# ── predict ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def expected(schema, pipeline) -> list[float]:
    "The hold-out's probabilities, asked of scikit-learn with a table made by pandas alone."
    import pandas as pd
    table = pd.read_csv(ROOT / "data/adult.test.csv", na_values=list(schema.missing), keep_default_na=False)
    table = table[schema.names()].astype(dict.fromkeys(schema.names("number"), "float64"))
    for name in schema.names("category"):
        table[name] = table[name].astype("object").where(table[name].notna(), None)
    return pipeline.predict_proba(table)[:, 1].tolist()


def test_predict_every_row_in_order(there, tmp_path):
    _, _, schema, pipeline = there
    wanted = expected(schema, pipeline)
    done = run("predict", "data/adult.test.csv", "--chunk-rows", "5000")
    assert done.exit_code == 0, done.stderr
    found = pl.read_csv(done.stdout.encode())
    assert found.columns == ["prediction", "probability"] and found.height == 16281
    assert max(abs(a - b) for a, b in zip(found["probability"], wanted, strict=True)) < 1e-12
    assert found["prediction"].to_list() == [schema.classes[p >= 0.5] for p in wanted]

    pl.read_csv("data/adult.test.csv", null_values=["?"]).write_parquet(tmp_path / "holdout.parquet")
    done = run("predict", str(tmp_path / "holdout.parquet"), "--out", str(tmp_path / "p.parquet"))
    assert done.exit_code == 0 and "16,281 rows" in done.stderr
    assert pl.read_parquet(tmp_path / "p.parquet").equals(found)


def test_kept_columns_are_as_they_were(there, tmp_path):
    text = (ROOT / "data/adult.test.csv").read_text().splitlines()[:501]
    (tmp_path / "some.csv").write_text("\n".join(text) + "\n")
    assert run("predict", str(tmp_path / "some.csv"), "--keep", "--out", str(tmp_path / "out.csv")).exit_code == 0
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert [line.rsplit(",", 2)[0] for line in lines] == text
    assert lines[0].endswith(",prediction,probability")


def test_threshold_is_the_setting(there, monkeypatch):
    monkeypatch.setenv("DYNACONF_SERVING__THRESHOLD", "0")
    assert set(pl.read_csv(run("predict", "data/adult.test.csv").stdout.encode())["prediction"]) == {">50K"}


def test_reader_that_has_enough_gets_no_traceback(there):
    program = f"{sys.executable} -m income_mlops.cli predict data/adult.test.csv | head -1"
    done = subprocess.run(["bash", "-c", program], cwd=there[0], capture_output=True, text=True)
    assert done.stdout == "prediction,probability\n" and "Traceback" not in done.stderr


HEADER, ROW, *_ = (ROOT / "data/adult.test.csv").read_text().splitlines()
OTHER = ROW.split(",", 1)[1]

BAD_FILES = [  # content; what the line must name
    (b"", ["empty"]),
    (b"   \n", ["empty"]),
    (HEADER.encode() + b"\n", ["no rows"]),
    (f"{HEADER}\n{ROW},more\n".encode(), ["line 2", "16 fields"]),
    (f"{HEADER}\n{ROW}\n\n{OTHER}\n".encode(), ["line 4", "14 fields"]),
    (f"{HEADER}\n{ROW}\nold,{OTHER}\n".encode(), ["'age'", "line 3", "'old'"]),
    (f"{HEADER}\n{ROW}\ninf,{OTHER}\n".encode(), ["'age'", "line 3", "finite"]),
    (f"{HEADER.replace('age,', 'years,', 1)}\n{ROW}\n".encode(), ["'age'"]),
    (f"{HEADER.replace('workclass', 'age', 1)}\n{ROW}\n".encode(), ["'age'", "twice"]),
    (f"{HEADER.replace('workclass', '', 1)}\n{ROW}\n".encode(), ["column 2", "no name"]),
    (f"{HEADER}\n{ROW}\n".replace(",", ";").encode(), ["semicolons"]),
    (f"{HEADER}\n{ROW}\n".replace(",", "\t").encode(), ["tabs"]),
    (f"{HEADER}\n{ROW}\n{ROW.replace('Private', 'Privé')}\n".encode("latin-1") + b"\xe9", ["UTF-8", "line"]),
    (f"{HEADER}\n{ROW}\n".encode("utf-16"), ["UTF-16"]),
    (f'{HEADER}\n"{ROW}\n'.encode(), ["line"]),
    (b"\x1f\x8b\x08\x00", ["gzip"]),
    (b"PK\x03\x04abc", ["zip"]),
    (b"PAR1 and then something else", ["Parquet"]),
    (b"\x00\x01\x02\x03", ["binary"]),
]


@pytest.mark.parametrize(("content", "named"), BAD_FILES, ids=lambda v: "-".join(v) if isinstance(v, list) else "")
def test_bad_file_is_one_line_that_names_it(content, named, there, tmp_path):
    (tmp_path / "bad.csv").write_bytes(content)
    done = run("predict", str(tmp_path / "bad.csv"), "--out", str(tmp_path / "out.csv"))
    assert done.exit_code == 3, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert all(n in done.stderr for n in ["bad.csv", *named]), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bad.csv"], "half an output was left"


def test_bad_paths(there, tmp_path):
    for words, named in [(["nowhere.csv"], "nowhere.csv"), (["data"], "folder"),
                         (["data/adult.test.csv", "--out", str(tmp_path)], "folder"),
                         (["data/adult.test.csv", "--out", str(tmp_path / "no/where.csv")], "no folder")]:
        done = run("predict", *words)
        assert done.exit_code == 3 and named in done.stderr and len(done.stderr.splitlines()) == 1


def test_parquet_with_a_wrong_column(there, tmp_path):
    table = pl.read_csv("data/adult.test.csv").head(3)
    table.with_columns(age=pl.Series(["30", "40", "old"])).write_parquet(tmp_path / "t.parquet")
    done = run("predict", str(tmp_path / "t.parquet"))
    assert done.exit_code == 3 and "t.parquet" in done.stderr and "'age'" in done.stderr and "row 3" in done.stderr
    table.with_columns(prediction=pl.lit("x")).write_csv(tmp_path / "t.csv")
    done = run("predict", str(tmp_path / "t.csv"), "--keep")
    assert done.exit_code == 3 and "'prediction'" in done.stderr


def test_failed_prediction_keeps_the_old_output(there, tmp_path):
    (tmp_path / "out.csv").write_text("yesterday's\n")
    (tmp_path / "bad.csv").write_text(f"{HEADER}\n" + f"{ROW}\n" * 50 + "1,2\n")
    done = run("predict", str(tmp_path / "bad.csv"), "--out", str(tmp_path / "out.csv"), "--chunk-rows", "10")
    assert done.exit_code == 3 and "line 52" in done.stderr
    assert (tmp_path / "out.csv").read_text() == "yesterday's\n" and len(list(tmp_path.iterdir())) == 2
