"""The queue between real processes, on SQLite and PostgreSQL; a job from its upload to its end."""
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from job_helpers import (
    Worker,
    all_runs,
    assert_clean,
    kernels,
    new_project,
    postgres,
    rows,
    upload,
    wait_for,
    wait_until_over,
    workers,
)

from income_mlops import datasets, registry
from income_mlops.jobs import Queue, WorkerQueue, worker_name

# A worker of which the work is a nap, so that many jobs pass in a second.
NAPS = """
import random, sys, time
from income_mlops.jobs import WorkerQueue, worker_name
from income_mlops.settings import load_settings
queue = WorkerQueue(load_settings(sys.argv[1]), worker_name())
while True:
    job = queue.claim()
    if job is None:
        time.sleep(0.02)
        continue
    for _ in range(3):
        time.sleep(random.uniform(0, 0.03))
        if queue.beat(job, progress={"cell": 1}) != "go on":
            break
    else:
        queue.finish(job, "succeeded", result={"by": queue.worker})
"""


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def queue(request, tmp_path_factory):
    "A queue in either database."
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sqlite":
        yield Queue(new_project(folder / "project"))
        return
    with postgres(folder / "server") as url:
        queue = Queue(new_project(folder / "project", storage=url))
        yield queue
        queue.store.engine.dispose()


def nap_worker(queue):
    return subprocess.Popen([sys.executable, "-c", NAPS, str(queue.settings.root / "settings.ini")])


def test_killed_workers_lose_nothing_and_do_nothing_twice(queue):
    "Fifteen jobs, three workers, each of which is killed once: each job succeeds once, in order."
    seed = random.Random(4)
    jobs = [queue.add("analyze" if n % 3 == 2 else "retrain", "a test", upload=f"{n:032x}") for n in range(15)]
    running, kills = [nap_worker(queue) for _ in range(3)], 0
    try:
        until = time.monotonic() + 180
        while (counts := queue.counts())["succeeded"] < 15:
            assert time.monotonic() < until, counts
            time.sleep(seed.uniform(0, 0.1))
            if kills < 3 and counts["succeeded"] >= 3 * (kills + 1):
                victim = running.pop(0)
                victim.kill()
                victim.wait()
                running.append(nap_worker(queue))
                kills += 1
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert kills == 3
    done = [queue.get(j.id) for j in jobs]
    assert all([c.state for c in j.log].count("succeeded") == 1 for j in done)
    assert all(j.attempts == 1 + [c.state for c in j.log].count("interrupted") for j in done)
    ends = [j.ended for j in done if j.kind == "retrain"]
    assert ends == sorted(ends), "trainings keep their order"
    spans = [(j.log[-2].at, j.ended) for j in done if j.kind == "retrain"]
    assert all(a[1] <= b[0] for a, b in pairwise(spans)), "never two at a time"


def test_everybody_asks_for_the_first_training_and_one_is_queued(queue):
    code = ("import sys; from income_mlops.jobs import Queue; from income_mlops.settings import load_settings; "
            "print(Queue(load_settings(sys.argv[1])).add_first('me') is not None)")
    words = [sys.executable, "-c", code, str(queue.settings.root / "settings.ini")]
    asking = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sorted(p.communicate()[0].strip() for p in asking) == ["False", "False", "False", "True"]
    queue.cancel(queue.list("queued")[0].id, "me")


def test_a_job_that_is_cancelled_meanwhile_is_not_put_back(queue):
    "By a worker that could not hear of it, because it was about to stop or MLflow was away."
    mine = WorkerQueue(queue.settings, worker_name())
    for put_back in mine.release, mine.retry:
        queue.add("analyze", "me", upload="0" * 32)
        job = mine.claim()
        queue.cancel(job.id, "me")
        assert put_back(job, "it is to end")
        over = queue.get(job.id)
        assert over.state == "cancelled" and over.ended and over.cancelled_by == "me" and mine.claim() is None
        assert [c.state for c in over.log][-2:] == ["interrupted", "cancelled"]
    mine.store.engine.dispose()


REFUSE = """CREATE TRIGGER refuse BEFORE UPDATE OF state ON jobs WHEN old.state = 'running'
            BEGIN SELECT RAISE(ABORT, 'the queue is closed'); END"""


def test_a_queue_that_cannot_be_written_at_the_end_of_a_job_costs_no_worker(tmp_path):
    "The end is told again, and counts once; when the lease is over first, the job is taken again, by the same worker."
    settings = new_project(tmp_path, lease=3)
    queue = Queue(settings)
    job = queue.add("retrain", "me", upload="0" * 32)  # fails at once: there is no such upload

    def execute(statement: str) -> None:
        with sqlite3.connect(queue.file, timeout=30) as c:
            c.execute(statement)

    def log() -> str:
        return (settings.root / "worker.log").read_text()
    execute(REFUSE)
    with workers(settings) as running:
        first = wait_for(lambda: [j for j in queue.list() if j.parameters.get("first")], 180, "the worker starts")[0]
        queue.cancel(first.id, "me")
        wait_for(lambda: log().count("its end could not be told, again") > 1, 120, "it is told again")
        assert queue.get(job.id).state == "running"
        execute("DROP TRIGGER refuse")
        done, = wait_until_over(settings, [job], 120)
        assert done.state == "failed" and "does not exist" in done.error and done.attempts == 1
        assert [c.state for c in done.log] == ["queued", "running", "failed"]

        execute(REFUSE)
        late = queue.add("retrain", "me", upload="1" * 32)
        wait_for(lambda: "it will be taken again" in log(), 120, "the lease is over")
        execute("DROP TRIGGER refuse")
        done, = wait_until_over(settings, [late], 120)
        assert done.state == "failed" and "does not exist" in done.error and done.attempts == 2
        assert [c.state for c in done.log] == ["queued", "running", "interrupted", "queued", "running", "failed"]
        assert running[0].stop() < 15 and running[0].process.returncode == 0


def test_a_worker_that_still_looks_around_ends_at_once(tmp_path):
    "Whatever it waits for, such as an MLflow that takes a call and says nothing."
    with socket.create_server(("127.0.0.1", 0)) as mute:
        settings = new_project(tmp_path, f"http://127.0.0.1:{mute.getsockname()[1]}")
        with workers(settings) as (worker,):
            mute.settimeout(60)
            call, _ = mute.accept()
            with call:
                assert worker.stop() < 2 and worker.process.returncode == 0
            said = worker.file.read_text()
            assert "worker stopped by SIGTERM" in said and "waiting" not in said, "the call was waited for"


def test_a_worker_whose_service_is_gone_before_it_has_started_ends(tmp_path):
    settings = new_project(tmp_path)
    code = ("import os, subprocess, sys; print(subprocess.Popen([sys.executable, '-m', 'income_mlops.cli', 'worker', "
            "'--parent', str(os.getpid())], stdout=open('worker.log', 'w'), stderr=subprocess.STDOUT).pid)")
    pid = int(subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True).stdout)
    try:
        wait_for(lambda: not psutil.pid_exists(pid), 180, "the worker ends")
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert "worker stopped by the end of the service it belongs to" in (tmp_path / "worker.log").read_text()
    assert not Queue(settings).list(), "it has done nothing"


HALF = """
import sys, time
from income_mlops import datasets
from income_mlops.disk import scratch
from income_mlops.settings import load_settings
with scratch(datasets._store(load_settings(sys.argv[1]))) as folder:
    (folder / "train.parquet").write_text("half")
    print(folder.name, flush=True)
    time.sleep(600)
"""


def test_a_half_written_version_is_cleared_as_soon_as_its_writer_is_gone(tmp_path):
    settings = new_project(tmp_path)
    writers = [subprocess.Popen([sys.executable, "-c", HALF, str(settings.file)], stdout=subprocess.PIPE, text=True)
               for _ in range(2)]
    dead, alive = (w.stdout.readline().strip() for w in writers)
    try:
        writers[0].kill()
        writers[0].wait()
        with workers(settings):
            job = wait_for(Queue(settings).list, 180, "the worker has cleared up and asks for the first training")[0]
            Queue(settings).cancel(job.id, "me")
            left = {p.name for p in (settings.state / "datasets" / "adult-income").glob(".new-*")}
            assert alive in left and dead not in left
    finally:
        for w in writers:
            w.kill()
            w.communicate()


def test_the_file_is_synced_at_each_commit(tmp_path):
    queue = Queue(new_project(tmp_path))
    assert queue.counts()["queued"] == 0 and not queue.file.exists(), "looking makes nothing"
    queue.add("train", "me")
    with queue.store.engine.connect() as c:
        assert c.exec_driver_sql("PRAGMA synchronous").scalar() == 2, "FULL"
        assert c.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    with sqlite3.connect(queue.file) as other:
        assert other.execute("SELECT count(*) FROM jobs").fetchone() == (1,)


def test_a_service_does_not_import_sqlalchemy(tmp_path):
    code = ("import sys; from income_mlops.jobs import Queue; from income_mlops.outlook import Outlook; "
            "from income_mlops.settings import load_settings; Outlook(load_settings(sys.argv[1])); "
            "print([m for m in ('sqlalchemy', 'mlflow', 'nbformat', 'polars') if m in sys.modules])")
    settings = new_project(tmp_path)
    done = subprocess.run([sys.executable, "-c", code, str(settings.root / "settings.ini")], capture_output=True,
                          text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.full
def test_a_job_survives_the_end_and_the_death_of_its_worker(tmp_path):
    "First training, cancelled; a retraining whose workers are stopped, then killed, and which succeeds all the same."
    settings = new_project(tmp_path / "project")
    queue = Queue(settings)
    with workers(settings) as running:
        first = wait_for(queue.list, 120, "the first training is asked for")[0]
        assert first.parameters == {"first": True} and first.by == "worker"
        wait_for(lambda: queue.get(first.id).run_id, 120, "it runs")
        wait_for(lambda: kernels(settings), 60, "its kernel starts")
        assert queue.cancel(first.id, "me").state == "running"
        first, = wait_until_over(settings, [first], 30)
        assert first.state == "cancelled" and first.cancelled_by == "me" and first.log[-1].state == "cancelled"
        assert not kernels(settings)

        table = rows().slice(2000, 300)
        job = queue.add("retrain", "me", upload=upload(settings, table, "new.csv"))
        wait_for(lambda: queue.get(job.id).cell > 2, 120, "the analysis runs")
        assert running[0].stop() < 15 and running[0].process.returncode == 0
        stopped = queue.get(job.id)
        assert stopped.state == "queued" and stopped.losses == 0 and not kernels(settings)
        assert [c.state for c in stopped.log] == ["queued", "running", "interrupted", "queued"]
        assert "SIGTERM" in stopped.log[2].note

        running.append(Worker(settings))
        wait_for(lambda: queue.get(job.id).step == "train" and queue.get(job.id).cell > 5, 300, "the training runs")
        seen = queue.get(job.id)
        assert seen.heading and seen.cells > seen.cell and seen.elapsed > 5 and running[1].has(seen)
        assert json.loads(Path(seen.notebook).read_text())["cells"], "half executed"
        running[1].stop(signal.SIGKILL)
        running.append(Worker(settings))
        done = wait_until_over(settings, queue.list(), 300)[1]
        assert done.state == "succeeded" and done.attempts == 3 and done.losses == 1, done
        running[2].stop()
    version, = registry.versions(settings)
    current = datasets.current(settings)
    assert done.result["dataset"] == version.dataset == current.id and current.manifest.source.endswith("(new.csv)")
    assert done.result["models"] == [{"family": "RandomForest", "version": 1}]
    assert done.result["steps"]["merge"]["new_rows"] == current.manifest.rows + current.manifest.holdout_rows - 2000
    assert {r.data.tags["step"] for r in all_runs(settings) if "step" in r.data.tags} == {
        "analyze against original", "analyze against current", "train"}
    assert_clean(settings)


@pytest.mark.full
def test_a_lone_serve_brings_a_worker_that_does_not_outlive_it(tmp_path, free_port):
    settings = new_project(tmp_path / "project")
    log = (tmp_path / "serve.log").open("w")
    service = subprocess.Popen([sys.executable, "-m", "income_mlops.cli", "serve", "--port", str(free_port())],
                               cwd=settings.root, stdout=log, stderr=log)
    try:
        job = wait_for(lambda: Queue(settings).list("running"), 90, "the first training")[0]
        pid = int(job.worker.split()[-2])
        service.kill()
        service.wait()

        def gone() -> bool:
            with suppress(ProcessLookupError):
                os.kill(pid, 0)
                return False
            return not kernels(settings)
        wait_for(gone, 20, "its worker and the kernel end")
        assert Queue(settings).get(job.id).state == "queued"
    finally:
        service.kill()
        service.wait()
        log.close()
