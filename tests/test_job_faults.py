"""Faults in the middle of jobs, with real workers, kernels, trainings and stores."""
import os
import random
import re
import signal
import time
from collections import Counter

import polars as pl
import psutil
import pytest
from intake_helpers import check_queue
from job_helpers import (
    Worker,
    all_runs,
    assert_clean,
    full,
    kernels,
    new_project,
    rows,
    small_disk,
    upload,
    wait_for,
    wait_until_over,
    workers,
)
from serving_helpers import MlflowServer

from income_mlops import datasets, registry
from income_mlops.data import digest
from income_mlops.jobs import Queue
from income_mlops.replays import replay

KILLS = int(os.environ.get("JOB_KILLS", "20"))  # more, for a night
pytestmark = [pytest.mark.full, pytest.mark.timeout(1800 + 60 * KILLS)]


def wait_for_a_point(queue, worker, seed):
    "Wait for a random point of the worker's job: soon, or some seconds into a later step. The job, if it still has it."
    def present():
        return next((j for j in queue.list("running") if worker.has(j)), None)
    step, delay = seed.choice(("", "", "analyze against current", "train", "train")), seed.uniform(0, 6)
    cell = seed.choice((0, 0, seed.randrange(18)))
    while (at := present()) and not (at.step.startswith(step) and at.cell >= cell):
        time.sleep(0.1)
    time.sleep(delay if at else 0)
    return present()


def test_workers_killed_at_random_points(tmp_path):
    """Two workers, two families; the worker that has a job is killed, again and again. Uploads follow one another until
    it is enough. A run that was made up of several attempts is replayed: no number differs."""
    seed = random.Random(int(os.environ.get("JOB_SEED", "1")))
    settings = new_project(tmp_path / "project", models="XGBoost, RandomForest", trials=2)
    queue, table, jobs, killed, hit = Queue(settings), rows(), [], [], {}
    with workers(settings, 2) as running:
        while len(killed) < KILLS or not all(queue.get(j.id).is_over for j in jobs):
            open_jobs = [j for j in queue.list(limit=1000) if not j.is_over]
            if len(open_jobs) < 2 and len(killed) < KILLS:
                part = table.slice(2000 + 200 * len(jobs), 200)
                jobs.append(queue.add("retrain", "me", upload=upload(settings, part, f"{len(jobs)}.csv")))
            busy = next((w for w in running for j in open_jobs if w.has(j)), None)
            if busy is None or len(killed) >= KILLS:
                time.sleep(0.1)
                continue
            if (at := wait_for_a_point(queue, busy, seed)) is None:
                continue
            busy.stop(signal.SIGKILL)
            killed.append(f"{at.step} {at.cell}")
            if at.step == "train":
                hit[at.id] = hit.get(at.id, False) or at.heading == "Study"
            running.remove(busy)
            running.append(Worker(settings))
        done = wait_until_over(settings, queue.list(limit=1000), 600)
        for worker in running:
            assert worker.stop() < 15 and worker.process.returncode == 0
    print(f"{len(killed)} kills in {len(done)} jobs, at: {', '.join(killed)}")
    assert all(j.state == "succeeded" for j in done), [(j.id, j.state, j.error) for j in done]
    assert sum(j.losses for j in done) == len(killed) >= KILLS
    assert {k.split(" ")[0] for k in killed} >= {"analyze", "train"}, "analyses and trainings were hit"
    assert_clean(settings)
    trained = [j for j in reversed(done) if j.kind == "retrain"]
    assert [j.id for j in trained] == [j.id for j in jobs] and all(j.result["models"] for j in trained)
    ends = [j.ended for j in trained]
    assert ends == sorted(ends)
    assert {v.dataset for v in registry.versions(settings)} >= {j.result["dataset"] for j in trained}
    made = Counter(v.family for v in registry.versions(settings))
    assert made == dict.fromkeys(("XGBoost", "RandomForest"), len({j.result["dataset"] for j in trained})), made
    assert not [p for p in (settings.state / "datasets").rglob("*") if p.name.startswith((".new-", ".current-"))]
    interrupted = queue.get(max(hit, key=lambda id: hit[id]))
    again = replay(settings, interrupted.result["steps"]["train"]["run_id"], progress=False)
    assert again.same and again.metrics > 50, again


def test_mlflow_away_in_mid_job(tmp_path, free_port):
    "The server is killed while a training talks to it, and comes back: the job is repeated and succeeds."
    port = free_port()
    server = MlflowServer(tmp_path / "mlflow", port)
    settings = new_project(tmp_path / "project", tracking_uri=f"http://127.0.0.1:{port}")
    queue = Queue(settings)
    try:
        server.wait()
        with workers(settings, 1, MLFLOW_HTTP_REQUEST_MAX_RETRIES="2") as running:
            job = wait_for(queue.list, 120, "the first training is asked for")[0]
            wait_for(lambda: queue.get(job.id).heading == "Study", 200, "it is in the study")
            server.stop()
            back = wait_for(lambda: (j := queue.get(job.id)).state == "queued" and j, 200, "the job is put back")
            assert back.losses == 1 and back.error and back.due > back.created
            time.sleep(5)
            assert queue.get(job.id).state == "queued", "nothing is taken while MLflow is away"
            server = MlflowServer(tmp_path / "mlflow", port)
            server.wait()
            done, = wait_until_over(settings, [job], 300)
            assert done.state == "succeeded" and done.attempts == 2, done
            assert running[0].stop() < 15
        assert_clean(settings)
        assert "FINISHED" in {r.info.status for r in all_runs(settings)} != {"FINISHED"}
    finally:
        server.stop()


def test_a_full_disk_in_mid_job_is_said_and_nothing_is_corrupt(tmp_path):
    "In an analysis, then in a training: the worker lives, says why, and goes on when there is room again."
    with small_disk(tmp_path / "disk", 100) as disk:
        if disk is None and os.environ.get("CI") != "true":
            pytest.skip("no file system may be mounted here")
        if disk is None:
            return
        settings = new_project(tmp_path / "project", state=disk / "state", lease=5)
        queue, log = Queue(settings), settings.root / "worker.log"
        with workers(settings) as running:
            first = wait_for(queue.list, 180, "the first training is asked for")[0]
            first, = wait_until_over(settings, [first], 400)
            assert first.state == "succeeded", first
            for n, (step, cell) in enumerate((("analyze against current", 2), ("train", 8))):
                said = len(log.read_text())
                job = queue.add("retrain", "me", upload=upload(settings, rows().slice(2000 + 200 * n, 200), f"{n}.csv"))
                wait_for(lambda job=job, step=step, cell=cell: (at := queue.get(job.id)).step == step
                         and at.cell >= cell, 300, step)
                with full(disk):
                    wait_for(lambda said=said: re.search("disk is full|No space left", log.read_text()[said:]), 120)
                    time.sleep(8)
                    assert running[0].process.poll() is None
                    check_queue(settings)
                done, = wait_until_over(settings, [job], 400)
                assert done.state == "succeeded" and done.result["models"], done
                assert done.losses and {c.state for c in done.log} >= {"interrupted", "succeeded"}, done.log
            assert running[0].stop() < 15 and running[0].process.returncode == 0
        assert_clean(settings)
        check_queue(settings)
        for version in datasets.versions(settings):
            found = version.manifest.train_digest, version.manifest.holdout_digest
            assert found == (digest(version.train), digest(version.holdout))
        queue.store.engine.dispose()


def test_time_limit(tmp_path):
    settings = new_project(tmp_path / "project", timeout=8)
    with workers(settings):
        done, = wait_until_over(settings, wait_for(Queue(settings).list, 120, "the first training"), 120)
    assert done.state == "failed" and done.attempts == 1 and "jobs.timeout" in done.error and not kernels(settings)
    assert not [r for r in all_runs(settings) if r.info.status == "RUNNING"]


def test_a_worker_that_slept_through_its_lease_does_no_harm(tmp_path):
    "A stopped process (SIGSTOP) loses its job to another worker; when it goes on, it leaves it alone."
    settings = new_project(tmp_path / "project", lease=3)
    queue = Queue(settings)
    with workers(settings, 2) as running:
        job = wait_for(queue.list, 120, "the first training is asked for")[0]
        wait_for(lambda: queue.get(job.id).cell > 3, 120, "it runs")
        sleeper, = (w for w in running if w.has(queue.get(job.id)))
        os.kill(sleeper.pid, signal.SIGSTOP)
        wait_for(lambda: queue.get(job.id).attempts == 2, 60, "the other takes over")
        time.sleep(2)
        os.kill(sleeper.pid, signal.SIGCONT)
        done = wait_until_over(settings, queue.list(), 300)
        assert [j.state for j in done] == ["succeeded"] and done[0].attempts == 2
        assert sleeper.stop() < 15
    assert_clean(settings)


def test_no_retraining_of_what_is_wrong_or_was_there(tmp_path):
    "An upload that was deleted fails at once; rows that were there already train nothing; who insists gets bad ones."
    settings = new_project(tmp_path / "project")
    queue = Queue(settings)
    with workers(settings):
        first = wait_for(queue.list, 120, "the first training is asked for")[0]
        gone = queue.add("retrain", "me", upload="0" * 32)
        same = queue.add("retrain", "me", upload=upload(settings, rows().head(300), "same.csv"))
        done = wait_until_over(settings, [first, gone, same], 400)
    table = rows().slice(2000, 150).with_columns(pl.col("age") * 100, pl.lit(">50K").alias("income"))
    bad = queue.add("retrain", "me", upload=upload(settings, table, "bad.csv"))
    with workers(settings, DYNACONF_RETRAINING__ON_ERROR="continue"):
        forced, = wait_until_over(settings, [bad], 400)
    assert forced.state == "succeeded" and forced.result["verdict"] == "do not retrain", forced
    assert forced.result["models"] == [{"family": "RandomForest", "version": 2}] and len(forced.result["steps"]) == 4
    assert done[1].state == "failed" and done[1].attempts == 1 and "does not exist" in done[1].error
    assert done[2].state == "succeeded", done[2].error
    assert not done[2].result["models"] and len(registry.versions(settings)) == 2, "the first one and the forced one"


def test_a_job_gives_way_and_ends_when_it_is_cancelled(tmp_path):
    "Every thread of its kernel is of the idle class, and it is told how many threads it may use."
    settings = new_project(tmp_path / "project", scheduling="idle", threads=1)
    queue = Queue(settings)
    job = queue.add("train", "me")
    with workers(settings):
        first = wait_for(lambda: [j for j in queue.list() if j.parameters.get("first")], 180, "the worker starts")[0]
        queue.cancel(first.id, "me")  # that would be in a hurry
        wait_for(lambda: queue.get(job.id).cell > 3, 300, "its kernel works")
        for pid in kernels(settings):
            tasks = [int(t) for t in os.listdir(f"/proc/{pid}/task")]
            assert {os.sched_getscheduler(t) for t in tasks} == {os.SCHED_IDLE}
            assert psutil.Process(pid).environ()["DYNACONF_OPTIMIZATION__THREADS"] == "1"
        queue.cancel(job.id, "me")
        done, = wait_until_over(settings, [job], 60)
        assert done.state == "cancelled" and not kernels(settings)
    assert_clean(settings)
