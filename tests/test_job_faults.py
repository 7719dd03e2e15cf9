"""Faults in the middle of jobs, with real workers, kernels, trainings and stores."""
import os
import random
import signal
import time

import pytest
from job_helpers import (
    Worker,
    all_runs,
    assert_clean,
    kernels,
    new_project,
    rows,
    upload,
    wait_for,
    wait_until_over,
    workers,
)
from serving_helpers import MlflowServer

from income_mlops import registry
from income_mlops.jobs import Queue

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
    "Two workers; the one that has a job is killed, again and again. Uploads follow one another until it is enough."
    seed = random.Random(int(os.environ.get("JOB_SEED", "1")))
    settings = new_project(tmp_path / "project")
    queue, table, jobs, killed = Queue(settings), rows(), [], []
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
    assert not [p for p in (settings.state / "datasets").rglob(".new-*") if time.time() - p.stat().st_mtime > 3600]


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
    "An upload that was deleted fails at once; rows that were there already train nothing."
    settings = new_project(tmp_path / "project")
    queue = Queue(settings)
    with workers(settings):
        first = wait_for(queue.list, 120, "the first training is asked for")[0]
        gone = queue.add("retrain", "me", upload="0" * 32)
        same = queue.add("retrain", "me", upload=upload(settings, rows().head(300), "same.csv"))
        done = wait_until_over(settings, [first, gone, same], 400)
    assert done[1].state == "failed" and done[1].attempts == 1 and "does not exist" in done[1].error
    assert done[2].state == "succeeded", done[2].error
    assert not done[2].result["models"] and len(registry.versions(settings)) == 1
