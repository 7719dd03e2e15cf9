"""Uploads while processes are killed, the disk is full and the service is busy: all or nothing."""

import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise

import httpx
import polars as pl
import pytest
from helpers import wait_for
from intake_helpers import (
    LINES,
    IntakeApi,
    check_queue,
    check_uploads,
    csv,
    fresh,
    make_project,
    remains,
)
from job_helpers import assert_clean, assert_no_noise, fill, new_project, postgres, wait_until_over, workers
from job_helpers import rows as all_rows
from job_helpers import small_disk as file_system

from income_mlops import datasets, registry, uploads
from income_mlops.data import DataError, conform
from income_mlops.jobs import Queue
from income_mlops.retraining import upload_of


def send_some(api, numbers, answers, query=""):
    """Send these uploads at the same time; each answer that comes is noted."""
    def send(n):
        with suppress(httpx.HTTPError):  # nobody was told anything
            answers.append(httpx.post(f"{api.url}/upload_data{query}", files={"file": fresh(n)}, headers=api.key,
                                      timeout=60))
    threads = [threading.Thread(target=send, args=(n,)) for n in numbers]
    for thread in threads:
        thread.start()
    return threads


def kill_and_look(settings, kills, seed):
    """Kill the service at random moments of uploads; after each restart, look at what is there.

    How many uploads were acknowledged and how many were not.
    """
    rng, acknowledged, lost = random.Random(seed), {}, 0
    for turn in range(kills + 1):
        with IntakeApi(settings) as api:
            wait_for(lambda: not remains(settings), 30)  # what the one before has left is cleared away
            here, jobs = {u["id"]: u["jobs"] for u in api.get("/uploads")}, api.get("/jobs?limit=1000")
            assert check_uploads(settings) == set(here)
            check_queue(settings)
            for upload, job in acknowledged.items():
                assert here.get(upload) == [job], "what was acknowledged is there, with its job"
            # an answer may have been lost on its way: then both are there; else neither is
            assert sorted(j["upload"] for j in jobs) == sorted(here), "no upload without a job, nor a job without"
            if turn == kills:
                break
            first = api.send(fresh(100 * turn))  # from here on a helper is at hand
            answers = [first]
            threads = send_some(api, range(100 * turn + 1, 100 * turn + 5), answers)
            time.sleep(rng.uniform(0, 1))
            api.stop(signal.SIGKILL)
            for thread in threads:
                thread.join()
            assert [a.status_code for a in answers] == [202] * len(answers)
            acknowledged |= {a.json()["upload"]: a.json()["job_id"] for a in answers}
            lost += 5 - len(answers)
    return len(acknowledged), lost


DIES = """
import os, signal
from income_mlops.jobs import Queue
add = Queue.add
def dying(*a, **k):
    add(*a, **k)
    os.kill(os.getpid(), signal.SIGKILL)
Queue.add = dying
"""


def test_a_job_whose_upload_nobody_was_told_of_finds_it(tmp_path):
    """The service is killed between the job and its answer; a worker is there at once."""
    settings = make_project(tmp_path, rows=500)
    with IntakeApi(settings, fault=DIES) as api, pytest.raises(httpx.HTTPError):
        api.send(fresh(1))
    job, = Queue(settings).list()
    assert not uploads.listed(settings)
    with pytest.raises(DataError):  # another job, say of an upload deleted since, proves nothing
        upload_of(settings, job.upload, "0" * 12)
    file, name = upload_of(settings, job.upload, job.id)
    assert file.is_file() and name == "new.csv" and check_uploads(settings) == {job.upload}
    with IntakeApi(settings) as api:
        wait_for(lambda: not remains(settings), 30)
        same = api.send(fresh(1))
        assert same.status_code == 200 and same.json()["job_id"] == job.id


FAILS = """
import sqlalchemy as sa
from income_mlops.jobstore import Records
insert, find, failures = Records.insert, Records.find, []
def failing(self, values):
    insert(self, values)
    failures.append(1)
    raise sa.exc.OperationalError("COMMIT", {{}}, Exception("the connection is gone"))
def away(self, *a, **k):
    if len(failures) == {after} and failures.append(1) is None:
        raise sa.exc.OperationalError("SELECT", {{}}, Exception("no connection"))
    return find(self, *a, **k)
Records.insert, Records.find = failing, away
"""


def test_a_database_that_fails_after_it_has_done_it(tmp_path):
    """A job that is there has its upload, whatever the database could say of it."""
    settings = make_project(tmp_path, rows=500)
    with IntakeApi(settings, fault=FAILS.format(after=-1)) as api:
        told = api.send(fresh(1))
        assert told.status_code == 202, told.text
        job, = Queue(settings).list()
        assert (job.id, job.upload) == (told.json()["job_id"], told.json()["upload"])
        assert check_uploads(settings) == {job.upload}
    with IntakeApi(settings, fault=FAILS.format(after=1)) as api:  # nor can it be asked
        told = api.send(fresh(2))
        assert told.status_code == 503 and "nothing was stored" not in told.json()["detail"], told.text
        assert told.headers["Retry-After"] and len(Queue(settings).list()) == 2 and len(uploads.listed(settings)) == 1
        again = api.send(fresh(2))
        assert again.status_code == 202 and again.json()["job_id"] == Queue(settings).list()[0].id
        assert len(Queue(settings).list()) == len(check_uploads(settings)) == 2 and not remains(settings)


def test_killed_at_random_moments_of_uploads(tmp_path):
    kept, lost = kill_and_look(make_project(tmp_path, rows=500), 3, 1)
    assert kept and lost, (kept, lost)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_killed_twenty_times_at_random_moments_of_uploads(tmp_path):
    kept, lost = kill_and_look(make_project(tmp_path, rows=500), 22, 2)
    print(f"{kept} acknowledged, {lost} cut off")
    assert kept > 22 and lost > 20, "some came through, some did not"


SLOW = """
import random, time
from income_mlops.jobs import Queue
add = Queue.add
def slow(*a, **k):  # so that kills come between the job and the upload
    job = add(*a, **k)
    time.sleep(random.uniform(0, 1))
    return job
Queue.add = slow
"""


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_killed_at_random_moments_beside_a_worker(tmp_path):
    """A real worker takes the jobs at once; none of them fails for want of its upload."""
    settings, rng, acknowledged, cut = new_project(tmp_path), random.Random(3), {}, 0
    with workers(settings) as running:
        first = wait_for(lambda: Queue(settings).list(), 120)
        wait_until_over(settings, first, 400)
        with IntakeApi(settings, fault=SLOW) as api:
            began, answers = time.monotonic(), []
            for thread in send_some(api, (1000, 1001), answers, "?retrain=false"):
                thread.join()
            usual = time.monotonic() - began
            acknowledged |= {a.json()["job_id"]: a.json()["upload"] for a in answers}
        for turn in range(8):
            with IntakeApi(settings, fault=SLOW) as api:
                answers = []
                threads = send_some(api, (10 * turn, 10 * turn + 1), answers, "?retrain=false" if turn else "")
                time.sleep(rng.uniform(0.5, 2.5) * usual)
                api.stop(signal.SIGKILL)
                for thread in threads:
                    thread.join()
                acknowledged |= {a.json()["job_id"]: a.json()["upload"] for a in answers}
                cut += 2 - len(answers)
        done = wait_until_over(settings, Queue(settings).list(limit=1000), 1000)
        assert running[0].stop() < 15
    with IntakeApi(settings):
        wait_for(lambda: not remains(settings), 30)
    print(f"{len(acknowledged)} acknowledged, {cut} cut off, {len(done)} jobs")
    assert cut and len(done) > 3
    assert all(j.state == "succeeded" for j in done), [(j.id, j.error) for j in done if j.state != "succeeded"]
    there = {j.id: j.upload for j in done if j.upload}
    assert acknowledged.items() <= there.items() and check_uploads(settings) == set(there.values())
    assert len(there) == len(set(there.values())), "one job each"


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_two_workers_and_ten_simultaneous_uploads(tmp_path):
    """On PostgreSQL: no loss, no double training, order kept; what one analysis rejects is in nobody's data."""
    with postgres(tmp_path / "server") as url:
        ten_uploads(new_project(tmp_path / "project", storage=url))


def ten_uploads(settings):
    queue, table, bad = Queue(settings), all_rows(), 4
    parts = [table.slice(2000 + 150 * n, 150) for n in range(10)]
    parts[bad] = parts[bad].with_columns(pl.col("age") * 100, pl.col("hours-per-week") * 1000,
                                         pl.lit(">50K").alias("income"))
    with workers(settings, 2) as running, IntakeApi(settings) as api:
        first, = wait_until_over(settings, wait_for(queue.list, 120), 400)
        together = threading.Barrier(10)

        def send(n):
            data = parts[n].write_csv().encode()
            together.wait()
            return httpx.post(f"{api.url}/upload_data", files={"file": (f"{n}.csv", data)}, headers=api.key,
                              timeout=300)
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(send, range(10)))
        assert [a.status_code for a in answers] == [202] * 10
        ids = [a.json()["job_id"] for a in answers]
        wait_for(lambda: all(queue.get(i).is_over for i in ids), 2400)
        done = [queue.get(i) for i in ids]
        assert len(queue.list(limit=1000)) == 11 and len(api.get("/uploads")) == len(set(ids)) == 10, "no loss"
        for worker in running:
            assert worker.stop() < 15
    assert all(j.state == "succeeded" and j.attempts == 1 for j in done), [(j.id, j.error) for j in done]
    assert first.state == "succeeded" and first.result["models"]
    queued = sorted(done, key=lambda j: j.created)
    assert [j.id for j in queued] == [j.id for j in sorted(done, key=lambda j: j.ended)], "the order is kept"
    spans = [(j.started, j.ended) for j in (first, *queued)]
    assert all(before[1] <= after[0] for before, after in pairwise(spans)), "one at a time"

    assert done[bad].result["verdict"] == "do not retrain" and not done[bad].result["models"]
    assert "merge" not in done[bad].result["steps"] and "nothing trained" in done[bad].result["outcome"]
    good = [j for j in queued if j.id != done[bad].id]
    assert all(j.result["models"] for j in good) and len(registry.versions(settings)) == 10, "no double training"
    kept = {d.id: d for d in datasets.versions(settings)}
    chain = [first.result["dataset"], *(j.result["dataset"] for j in good)]
    assert [kept[v].manifest.parent for v in chain[1:]] == chain[:-1], "each builds on the one before"
    for version in kept.values():
        for side in (version.train, version.holdout):
            assert side["age"].max() < 100, "no row of the rejected upload"
    last = datasets.current(settings)
    features = [c.name for c in last.schema.features]
    both = pl.concat([last.train, last.holdout]).select(features)
    for part in (p for n, p in enumerate(parts) if n != bad):
        assert conform(part, last.schema).select(features).join(both, on=features, how="anti",
                                                                nulls_equal=True).is_empty(), "every row is there"
    assert_clean(settings)
    assert_no_noise(settings, [j for j in good if j.result["models"]][:2])
    queue.store.engine.dispose()


@pytest.mark.full
def test_helpers_end_with_their_service(tmp_path):
    """Also one in the middle of its work, also when the service is killed."""
    import psutil
    settings = make_project(tmp_path, rows=500, serving={"max_upload_mb": 50})
    for how in (signal.SIGKILL, signal.SIGTERM):
        with IntakeApi(settings) as api:
            threads = send_some(api, range(2), [])
            wait_for(lambda api=api: psutil.Process(api.process.pid).children(), 30)
            helpers = psutil.Process(api.process.pid).children()
            assert api.stop(how) < 10
            wait_for(lambda helpers=helpers: not any(h.is_running() and h.status() != "zombie" for h in helpers), 30)
            for thread in threads:
                thread.join()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, or nothing where none may be mounted."""
    with file_system(tmp_path / "disk", 8) as disk:
        yield disk


def test_a_full_disk_is_said_and_nothing_is_corrupt(tmp_path, small_disk):
    if small_disk is None:  # with CI=true, a failure
        pytest.skip("no file system may be mounted here")
    settings = make_project(tmp_path / "project", rows=500, state=small_disk / "state", serving={"max_upload_mb": 50})
    large, told = csv(LINES[1:20_001]), []  # 2.1 MB, and 0.2 MB as Parquet
    with IntakeApi(settings) as api:
        kept = api.send(fresh(0)).json()["upload"]
        for free in (0, 4096, 50_000, 1_000_000, 2_200_000, 2_250_000, 2_300_000, 2_400_000, 2_600_000, 4_000_000):
            fill(small_disk, free)
            jobs = len(Queue(settings).list(limit=1000))
            answer = api.send(large)
            told.append(answer.status_code)
            wait_for(lambda: not remains(settings), 30)
            if answer.status_code == 507:
                assert "no space left" in answer.json()["detail"]
                assert check_uploads(settings) == {kept} and len(Queue(settings).list(limit=1000)) == jobs
            else:
                assert answer.status_code == 202, answer.text
                upload = answer.json()["upload"]
                assert check_uploads(settings) == {kept, upload}
                (small_disk / "filler").unlink()
                assert api.http.delete(f"/jobs/{answer.json()['job_id']}").status_code == 200
                assert api.http.delete(f"/uploads/{upload}").status_code == 200
            check_queue(settings)
        print(told)
        assert told[:4] == [507] * 4 and told[-1] == 202
        fill(small_disk, 0)
        assert api.http.get("/health").status_code == 200 and len(api.get("/uploads")) == 1
        (small_disk / "filler").unlink()
        assert api.send(fresh(1)).status_code == 202, "and it goes on when there is space again"
    assert len(check_uploads(settings)) == 2


@pytest.mark.full
def test_a_limit_of_size_is_said_like_a_full_disk(tmp_path):
    settings = make_project(tmp_path, rows=500, serving={"max_upload_mb": 50})
    with IntakeApi(settings, file_limit=1_000_000) as api:
        answer = api.send(csv(LINES[1:20_001]))
        assert answer.status_code == 507 and "no space left" in answer.json()["detail"]
        assert not remains(settings) and not check_uploads(settings) and not Queue(settings).list()
        assert api.send(fresh(1)).status_code == 202


def latencies(url, row, seconds, rate):
    """Seconds to answer predictions that are asked for at a constant rate, counted from when they were due."""
    found, start = [], time.perf_counter()
    with httpx.Client(base_url=url, timeout=30) as http, ThreadPoolExecutor(8) as pool:
        def ask(i):
            due = start + i / rate
            time.sleep(max(0, due - time.perf_counter()))
            assert http.post("/predict", json={"data": row}).status_code == 200
            return time.perf_counter() - due
        found = sorted(pool.map(ask, range(int(seconds * rate))))
    return found[len(found) // 2], found[int(len(found) * 0.99)]


@pytest.mark.full
def test_predictions_go_on_while_a_large_upload_is_looked_through(tmp_path):
    from serving_helpers import Rows, train
    settings = make_project(tmp_path, serving={"max_upload_mb": 120, "allow_pipeline": "true", "follow_every": 0.5})
    settings.state.mkdir()
    rows = Rows(settings, 1500)
    train(settings, rows, {"XGBoost": 0.3}, tmp_path / "artifacts")
    file = tmp_path / "large.csv"
    with file.open("wb") as f:
        f.write(csv(LINES[1:]))
        for _ in range(27):
            f.write(csv(LINES[1:]).partition(b"\n")[2])
    assert 95e6 < file.stat().st_size < 105e6
    code = "import httpx, sys; print(httpx.post(sys.argv[1], files={'file': open(sys.argv[2], 'rb')}, timeout=600, " \
           "headers={'X-API-Key': sys.argv[3]}).text)"
    with IntakeApi(settings) as api:
        wait_for(lambda: api.get("/health")["ready"], 60)
        latencies(api.url, rows.requests[0], 1, 20)
        idle = latencies(api.url, rows.requests[0], 4, 20)
        memory = api.memory()
        sender = subprocess.Popen(["nice", sys.executable, "-c", code, f"{api.url}/upload_data", file,
                                   api.key["X-API-Key"]], stdout=subprocess.PIPE, text=True)
        busy = []
        while sender.poll() is None:
            busy.append(latencies(api.url, rows.requests[0], 1, 20))
        assert len(busy) >= 3, "it was looked through meanwhile"
        told = sender.communicate(timeout=300)[0]
        print(f"median and p99: idle {idle}, meanwhile {busy}; memory {memory:.0f} MB, after {api.memory():.0f} MB")
        assert '"rows":911708' in told.replace(" ", ""), told
        assert api.memory() < memory + 60, "what is looked through is in another process"
