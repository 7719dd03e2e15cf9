"""A backup of a running system makes a system that predicts the same."""

import json
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest
from serving_helpers import Api, Rows, make_settings, train

from income_mlops import backups


def command(settings, *words, code=0):
    done = subprocess.run([sys.executable, "-m", "income_mlops.cli", "--settings",
                           str(settings.root / "settings.ini"), *words], capture_output=True, text=True,
                          cwd=settings.root)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A system that served and wrote while it was saved: settings, backup, rows and what it predicted for them."
    import mlflow
    folder = tmp_path_factory.mktemp("backup")
    settings = make_settings(folder / "one")
    rows = Rows(settings)
    train(settings, rows, {"XGBoost": 0.5}, artifacts=settings.state / "artifacts")
    over, written = threading.Event(), []

    def write():
        client = mlflow.MlflowClient(settings.tracking_uri)
        run = client.create_run("1")
        while not over.is_set():
            client.log_metric(run.info.run_id, "n", len(written), step=len(written))
            written.append(len(written))
    with Api(settings) as api:
        api_ready(api)
        before = api.predict(rows.requests[:200]).json()
        writer = threading.Thread(target=write)
        writer.start()
        try:
            said = command(settings, "backup", str(folder / "saved"))
        finally:
            over.set()
            writer.join()
        assert api.predict(rows.requests[:200]).json() == before
    assert "files" in said and len(written) > 3, "somebody wrote meanwhile"
    return settings, folder / "saved", rows, before


def api_ready(api):
    from serving_helpers import wait_for
    wait_for(lambda: api.http.get("/ready").status_code == 200, 60, "a model is served")


def test_restored_system_predicts_the_same(saved, tmp_path):
    settings, folder, rows, before = saved
    settings.state.rename(settings.state.with_name("gone"))  # nothing may be read from the old place
    try:
        restored = make_settings(tmp_path / "two")
        assert "restored" in command(restored, "restore", str(folder))
        assert (restored.state / "api_key").stat().st_mode & 0o777 == 0o600
        with Api(restored) as api:
            api_ready(api)
            assert api.predict(rows.requests[:200]).json() == before
            assert api.get("/models")[0]["version"] == 1
    finally:
        settings.state.with_name("gone").rename(settings.state)


def test_saved_databases_are_whole(saved):
    _, folder, *_ = saved
    manifest = json.loads((folder / "backup.json").read_text())
    assert "mlflow.db" in manifest["databases"]
    for name in manifest["databases"]:
        with closing(sqlite3.connect(folder / name)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_every_damage_is_found_before_anything_is_written(saved, tmp_path):
    _, folder, *_ = saved
    restored = make_settings(tmp_path / "three")
    manifest = backups.check(folder)
    victim = folder / max(manifest["files"], key=lambda n: manifest["files"][n]["size"])
    content = victim.read_bytes()
    try:
        for damaged in (content[:-1], bytes([content[0] ^ 1]) + content[1:], None):
            if damaged is None:
                victim.unlink()
            else:
                victim.write_bytes(damaged)
            said = command(restored, "restore", str(folder), code=1)
            assert victim.name in said and len(said.splitlines()) == 1 and not restored.state.exists()
    finally:
        victim.write_bytes(content)


def test_state_that_is_there_is_not_overwritten(saved):
    settings, folder, *_ = saved
    before = sorted(settings.state.rglob("*"))
    assert "not empty" in command(settings, "restore", str(folder), code=1)
    assert sorted(settings.state.rglob("*")) == before
