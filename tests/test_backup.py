"""A backup of a running system makes a system that predicts the same."""

import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from intake_helpers import fresh
from serving_helpers import Api, Rows, make_settings, train, wait_for

from income_mlops import backups, intake, uploads
from income_mlops.disk import locked
from income_mlops.jobs import Queue


def command(settings, *words, code=0):
    done = subprocess.run([sys.executable, "-m", "income_mlops.cli", "--settings",
                           str(settings.root / "settings.ini"), *words], capture_output=True, text=True,
                          cwd=settings.root)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A system that served, wrote and took files while it was saved: settings, backup, rows, its predictions.

    Its folder has a blank and a sign that addresses write as another.
    """
    import mlflow
    folder = tmp_path_factory.mktemp("backup")
    settings = make_settings(folder / "the one, ä")
    rows = Rows(settings)
    train(settings, rows, {"XGBoost": 0.5}, artifacts=settings.state / "artifacts")
    over, written, sent, queue = threading.Event(), [], [], Queue(settings)

    def write():
        client = mlflow.MlflowClient(settings.tracking_uri)
        run = client.create_run("1")
        while not over.is_set():
            client.log_metric(run.info.run_id, "n", len(written), step=len(written))
            written.append(len(written))

    def send():
        "Files for analysis, one after another."
        while not over.is_set():
            with uploads.desk(settings) as desk:
                file = desk / "sent"
                file.write_bytes(fresh(len(sent)))
                uploads.prepare(settings, file, f"{len(sent)}.csv", "a test", desk)
                sent.append(intake.deposit(settings, queue, desk, "a test", retrain=False).upload.id)
    with Api(settings) as api:
        api_ready(api)
        before = api.predict(rows.requests[:200]).json()
        writers = [threading.Thread(target=act) for act in (write, send)]
        for writer in writers:
            writer.start()
        try:
            wait_for(lambda: written and sent, 60, "a first file and a first entry")
            said = command(settings, "backup", str(folder / "saved"))
        finally:
            over.set()
            for writer in writers:
                writer.join()
        assert api.predict(rows.requests[:200]).json() == before
    assert "files" in said and len(written) > 3 and len(sent) > 1, "somebody wrote meanwhile"
    return settings, folder / "saved", rows, before


def api_ready(api):
    wait_for(lambda: api.http.get("/ready").status_code == 200, 60, "a model is served")


def test_restored_system_predicts_the_same(saved, tmp_path):
    settings, folder, rows, before = saved
    settings.state.rename(settings.state.with_name("gone"))  # nothing may be read from the old place
    try:
        restored = make_settings(tmp_path / "two, %")
        assert "restored" in command(restored, "restore", str(folder))
        assert (restored.state / "api_key").stat().st_mode & 0o777 == 0o600
        shutil.rmtree(restored.state / "served")  # the model comes from MLflow's files, where they are now
        with Api(restored) as api:
            api_ready(api)
            assert api.predict(rows.requests[:200]).json() == before
            assert api.get("/models")[0]["version"] == 1
    finally:
        settings.state.with_name("gone").rename(settings.state)


def test_each_upload_that_was_saved_has_its_job_and_each_job_its_upload(saved, tmp_path):
    _, folder, *_ = saved
    restored = make_settings(tmp_path / "four")
    command(restored, "restore", str(folder))
    kept, jobs = {u.id for u in uploads.listed(restored)}, {j.upload for j in Queue(restored).list(limit=10_000)}
    assert kept == jobs and kept
    assert not list((restored.state / "uploads").rglob(".new-*")), "what was on its way is nothing to be kept"


def test_upload_between_the_queue_and_the_files_waits(tmp_path, monkeypatch):
    "Of an upload that comes at the worst moment, either all is saved or nothing."
    settings = make_settings(tmp_path / "one")
    store = uploads._store(settings)
    with locked(store), closing(sqlite3.connect(settings.state / "jobs.db")) as queue:
        queue.execute("CREATE TABLE jobs (upload TEXT)")
    copy, sender = backups._copy_database, []

    def publish():
        with locked(store), closing(sqlite3.connect(settings.state / "jobs.db")) as queue, queue:
            (store / "new").mkdir()
            (store / "new/manifest.json").write_text("{}")
            queue.execute("INSERT INTO jobs VALUES ('new')")

    def slow(source, target):
        copy(source, target)
        sender.append(threading.Thread(target=publish))
        sender[0].start()
        sender[0].join(0.5)
    monkeypatch.setattr(backups, "_copy_database", slow)
    made = backups.backup(settings, tmp_path / "saved")
    sender[0].join()
    with closing(sqlite3.connect(tmp_path / "saved/jobs.db")) as queue:
        jobs = queue.execute("SELECT * FROM jobs").fetchall()
    assert not jobs and [n for n in made["files"] if n.startswith("uploads")] == [] and (store / "new").is_dir()


def test_file_that_comes_in_all_the_time_holds_up_no_backup(tmp_path):
    "Nor does a study's journal, of which whole lines are kept; what fails leaves the place free."
    settings = make_settings(tmp_path / "one")
    store = settings.state / "uploads" / "adult-income" / ".new-1"
    store.mkdir(parents=True)
    (settings.state / "artifacts/1").mkdir(parents=True)
    (settings.state / "artifacts/1/model.part").write_text("an artifact may be called so")
    over = threading.Event()

    def send():
        with (store / "sent").open("w") as file, (settings.state / "studies.journal").open("w") as journal:
            while not over.is_set():
                for f, text in ((file, "x" * 1000), (journal, '{"trial": 1}\n{"tri'), (journal, 'al": 2}\n')):
                    f.write(text)
                    f.flush()
                    time.sleep(0.001)
    writer = threading.Thread(target=send)
    writer.start()
    try:
        wait_for((settings.state / "studies.journal").exists)
        made = backups.backup(settings, tmp_path / "saved")
    finally:
        over.set()
        writer.join()
    assert set(made["files"]) == {"studies.journal", "artifacts/1/model.part"}
    assert all(json.loads(line) for line in (tmp_path / "saved/studies.journal").read_text().splitlines())


def test_backup_that_fails_leaves_the_place_free(tmp_path, monkeypatch):
    settings = make_settings(tmp_path / "one")
    (settings.state / "artifacts").mkdir(parents=True)
    files = backups._files

    def more(folder):
        (settings.state / "artifacts" / f"{time.monotonic()}.txt").write_text("new at each look")
        return files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(backups, "_PATIENCE", 0.5)
        patch.setattr(backups, "_PAUSE", 0.1)
        patch.setattr(backups, "_files", more)
        with pytest.raises(backups.BackupError, match="changes faster"):
            backups.backup(settings, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert backups.backup(settings, tmp_path / "saved")["files"]


def test_database_that_appears_meanwhile_is_copied_as_one(tmp_path, monkeypatch):
    settings = make_settings(tmp_path / "one 1%20#?")
    settings.state.mkdir(parents=True)
    (settings.state / "new.db").touch()  # SQLite's file before its first page
    look = backups._copy_uploads

    def late(*words):
        with closing(sqlite3.connect(settings.state / "new.db")) as db:
            db.execute("CREATE TABLE t (n INTEGER)")
        with closing(sqlite3.connect(settings.state / "newer.db")) as db:
            db.execute("CREATE TABLE t (n INTEGER)")
        return look(*words)
    monkeypatch.setattr(backups, "_copy_uploads", late)
    made = backups.backup(settings, tmp_path / "saved")
    assert made["databases"] == ["new.db", "newer.db"] and set(made["files"]) == {"new.db", "newer.db"}


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
