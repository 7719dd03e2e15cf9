"""The queue between real processes, on SQLite and PostgreSQL; a job from its upload to its end."""
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

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
from income_mlops.jobs import Queue

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
