"""New data is analysed: the command, and the notebook as a run with a real kernel and a real MLflow store."""
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import polars as pl
import pytest

from income_mlops import datasets
from income_mlops.analysis import Source, full_profile
from income_mlops.data import DataError, digest, read_table
from income_mlops.pipelines import analyze
from income_mlops.profile import Profile
from income_mlops.runs import RunError
from income_mlops.settings import load_settings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    "A project folder with our data, and what was found wrong in new data."
    folder = tmp_path_factory.mktemp("project")
    (folder / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (folder / "data").symlink_to(ROOT / "data")
    table = read_table(ROOT / "data" / "adult.test.csv")
    table.with_columns(pl.col("age") * 12).write_csv(folder / "months.csv")
    known = read_table(ROOT / "data" / "adult.train.csv").head(8000)
    known.with_columns(pl.when(pl.int_range(pl.len()) % 8 > 0).then("occupation").alias("occupation")) \
        .write_parquet(folder / "gaps.parquet")
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("age,income\n")
    return folder


def command(folder, *words, **env):
    "The command as a person runs it."
    return subprocess.run([sys.executable, "-m", "income_mlops.cli", *words], cwd=folder, env={**os.environ, **env},
                          capture_output=True, text=True, timeout=120)


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("new", "code", "verdict"), [
    ("data/adult.test.csv", 0, "use as is"), ("gaps.parquet", 10, "clean first"), ("months.csv", 11, "do not retrain")])
def test_verdict_files_and_exit_code(there, new, code, verdict):
    done = command(there, "analyze", new, "--report", "out/report.html", "--json", "out/findings.json")
    assert done.returncode == code, done.stderr
    assert verdict in done.stdout.splitlines()[-1]
    result = json.loads((there / "out" / "findings.json").read_text())
    assert result["verdict"] == verdict
    for finding in result["findings"]:
        assert {"check", "column", "severity", "message", "advice", "old", "new"} <= finding.keys()
        assert finding["severity"] in ("info", "warning", "error")
    worst = {0: "info", 10: "warning", 11: "error"}[code]
    assert result["findings"][0]["severity"] == worst
    page = (there / "out" / "report.html").read_text()
    assert verdict.capitalize() in page and digest(read_table(there / new, ("?",))) in page
    assert done.stderr == "written: out/report.html\nwritten: out/findings.json\n"


def test_findings_for_programs_on_the_screen(there):
    done = command(there, "analyze", "months.csv", "--json", "-")
    assert done.returncode == 11 and done.stderr == ""
    result = json.loads(done.stdout)
    assert any(f["column"] == "age" and f["severity"] == "error" for f in result["findings"])


def test_the_reference_may_be_any_table(there):
    done = command(there, "analyze", "months.csv", "--reference", "months.csv", "--json", "-")
    assert done.returncode == 0 and json.loads(done.stdout)["verdict"] == "use as is"
    done = command(there, "analyze", "current", "--reference", "months.csv")
    assert done.returncode == 11


@pytest.mark.parametrize(("new", "says"), [
    ("nothing.csv", "no such file"), ("empty.csv", "empty"), ("header.csv", "no rows"), ("data", "folder"),
    ("", "no such file")])
def test_unusable_input_is_one_line(there, new, says):
    done = command(there, "analyze", new)
    assert done.returncode == 3 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr


def test_another_table_is_an_error_not_a_crash(there, tmp_path):
    (tmp_path / "other.csv").write_text("x,y\n1,2\n3,4\n")
    done = command(there, "analyze", str(tmp_path / "other.csv"), COLUMNS="300")
    assert done.returncode == 11 and "none of the columns" in done.stdout


def test_what_looks_like_a_terminal_sequence_is_written_out(there, tmp_path):
    table = read_table(ROOT / "data" / "adult.test.csv")
    table = table.with_columns(pl.lit("\x1b[31mred\x1b]0;x\x07").alias("workclass"))
    table.rename({"age": "[bold red]age[/]\x1b[2J"}).write_parquet(tmp_path / "odd.parquet")
    done = command(there, "analyze", str(tmp_path / "odd.parquet"), COLUMNS="300")
    assert done.returncode == 11 and "\x1b" not in done.stdout and "[bold red]age[/]" in done.stdout


def test_a_report_that_cannot_be_written_is_one_line(there):
    done = command(there, "analyze", "months.csv", "--report", "months.csv/report.html")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "months.csv" in done.stderr


# ── tables by name ────────────────────────────────────────────────────────────────────────────────────────────────────

def test_tables_by_name(there):
    settings = load_settings(there / "settings.ini")
    original = datasets.original(settings)
    more = datasets.merge(settings, read_table(there / "months.csv", ("?",)), "months.csv")
    assert Source(settings, more.id[:8]).digest == more.manifest.train_digest
    assert Source(settings, "current").digest == Source(settings, "original").digest == original.manifest.train_digest
    with pytest.raises(DataError, match="no such file"):
        Source(settings, "gaps")


# ── the notebook ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def runs(there):
    "Two executions of the notebook: official test data, and faulty data as a job."
    settings = load_settings(there / "settings.ini")
    test, months = (str(there / n) for n in ("data/adult.test.csv", "months.csv"))
    return settings, [analyze(settings, test, progress=False),
                      analyze(settings, months, "current", holdout=test, job="j1", progress=False)]


def client(settings):
    from mlflow.tracking import MlflowClient
    return MlflowClient(settings.tracking_uri, settings.tracking_uri)


def artifacts(client, run_id, path=""):
    found = set()
    for info in client.list_artifacts(run_id, path):
        found |= artifacts(client, run_id, info.path) if info.is_dir else {info.path}
    return found


@pytest.mark.slow
def test_a_run_keeps_everything(runs, tmp_path):
    settings, executions = runs
    for execution, verdict in zip(executions, ("use as is", "do not retrain"), strict=True):
        run = client(settings).get_run(execution.run_id)
        assert run.info.status == "FINISHED" and run.data.tags["verdict"] == verdict
        kept = artifacts(client(settings), execution.run_id)
        assert {"report.html", "findings.json", "profile.reference.json", "profile.new.json", "notebook/analyze.ipynb",
                "notebook/analyze.html", "plots/effects.svg", "plots/target.svg", "plots/told_apart.svg",
                "plots/correlations.old.svg", "plots/correlations.new.svg", "plots/correlations.change.svg"} <= kept
        assert sum(name.startswith("plots/columns/") for name in kept) == 15
        folder = Path(client(settings).download_artifacts(execution.run_id, "", str(tmp_path)))
        found = json.loads((folder / "findings.json").read_text())
        assert found["verdict"] == verdict
        for severity in ("error", "warning", "info"):
            n = sum(f["severity"] == severity for f in found["findings"])
            assert run.data.metrics[f"findings_{severity}"] == n
        files = [folder / f"profile.{which}.json" for which in ("reference", "new")]
        profiles = [Profile.model_validate_json(f.read_text()) for f in files]
        assert [p.rows for p in profiles] == [32561, 16281]
        for file in folder.glob("plots/**/*.svg"):
            ElementTree.parse(file)


@pytest.mark.slow
def test_the_tables_are_named_by_their_full_content(runs):
    settings, executions = runs
    run = client(settings).get_run(executions[0].run_id)
    inputs = {i.tags[0].value: i.dataset.digest for i in run.inputs.dataset_inputs}
    assert inputs == {context: digest(read_table(ROOT / "data" / f"adult.{name}.csv", ("?",)))
                      for context, name in (("new", "test"), ("reference", "train"))}
    page = Path(client(settings).download_artifacts(executions[0].run_id, "report.html")).read_text()
    assert all(value in page for value in inputs.values())


@pytest.mark.slow
def test_the_executed_notebook_tells_the_story(runs):
    settings, executions = runs
    run = client(settings).get_run(executions[1].run_id)
    assert run.data.tags["job"] == "j1" and run.data.params["reference"] == "current"
    html = executions[1].html.read_text()
    assert "do not retrain" in html and "months.csv" in html and "data:image/svg" in html
    assert "No description has been provided" not in html
    assert not re.search(r"Traceback|Warning:", html)
    assert not re.findall(r"""(?:src|href)=["']https?://[^"']+\.(?:js|css)""", html)


def test_a_table_that_is_none_makes_no_run(there):
    settings = load_settings(there / "settings.ini")
    before = (settings.state / "mlflow.db").exists()
    for wrong in ("nothing.csv", "empty.csv"):
        with pytest.raises(DataError):
            analyze(settings, str(there / wrong), progress=False)
    assert (settings.state / "mlflow.db").exists() == before


@pytest.mark.slow
def test_a_table_without_rows_ends_the_run(there):
    settings = load_settings(there / "settings.ini")
    with pytest.raises(RunError, match="no rows"):
        analyze(settings, str(there / "header.csv"), progress=False)
    last = client(settings).search_runs([client(settings).get_experiment_by_name("adult-income").experiment_id])[0]
    assert last.info.status == "FAILED"


# ── the full profile ──────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_the_full_profile_is_harmless_and_offline(there, tmp_path):
    pytest.importorskip("data_profiling")
    settings = load_settings(there / "settings.ini")
    bad, quotes = "<script>alert(1)</script>", "\" onmouseover=alert(2) x=\""
    rows = pl.DataFrame({bad: range(60), "n": [bad, quotes, "c"] * 20, "s": [f"{bad} number {i}" for i in range(60)]})
    rows.write_parquet(tmp_path / "bad.parquet")
    source = Source(settings, str(tmp_path / "bad.parquet"))
    page = full_profile(source)
    assert "‹script›alert" in page and "<script>alert" not in page and quotes not in page
    loaded = re.findall(r"""<(?:script|img|iframe|link)[^>]*?(?:src|href)=["']?(?!data:|#)([^"' >]+)""", page)
    assert loaded == [] and not re.search(r"url\(['\"]?https?:|@import", page)
    kept = settings.state / "profiles" / f"{source.digest}.html"
    assert kept.read_text(encoding="utf-8") == page == full_profile(source), "made once"
