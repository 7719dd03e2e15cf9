"""Uploads while processes are killed, the disk is full and the service is busy: all or nothing."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from intake_helpers import (
    LINES,
    IntakeApi,
    check_queue,
    check_uploads,
    csv,
    fresh,
    make_project,
    remains,
    wait_until,
)

from income_mlops.jobs import Queue


def send_some(api, numbers, answers):
    """Send these uploads at the same time; each answer that comes is noted."""
    def send(n):
        with suppress(httpx.HTTPError):  # nobody was told anything
            answers.append(httpx.post(f"{api.url}/upload_data", files={"file": fresh(n)}, headers=api.key, timeout=60))
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
            wait_until(lambda: not remains(settings))  # what the one before has left is cleared away
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


def test_killed_at_random_moments_of_uploads(tmp_path):
    kept, lost = kill_and_look(make_project(tmp_path, rows=500), 3, 1)
    assert kept and lost, (kept, lost)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_killed_twenty_times_at_random_moments_of_uploads(tmp_path):
    kept, lost = kill_and_look(make_project(tmp_path, rows=500), 22, 2)
    print(f"{kept} acknowledged, {lost} cut off")
    assert kept > 22 and lost > 20, "some came through, some did not"


@pytest.mark.full
def test_helpers_end_with_their_service(tmp_path):
    """Also one in the middle of its work, also when the service is killed."""
    import psutil
    settings = make_project(tmp_path, rows=500, serving={"max_upload_mb": 50})
    for how in (signal.SIGKILL, signal.SIGTERM):
        with IntakeApi(settings) as api:
            threads = send_some(api, range(2), [])
            wait_until(lambda api=api: psutil.Process(api.process.pid).children())
            helpers = psutil.Process(api.process.pid).children()
            assert api.stop(how) < 10
            wait_until(lambda helpers=helpers: not any(h.is_running() and h.status() != "zombie" for h in helpers))
            for thread in threads:
                thread.join()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, or nothing where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    options = f"size=8m,uid={os.geteuid()}"
    mounted = not subprocess.run([*sudo, "mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False,
                                 capture_output=True).returncode
    yield folder if mounted else None
    if mounted:
        subprocess.run([*sudo, "umount", "-l", folder], check=True)


def fill(folder, free):
    """Leave only so many bytes free."""
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    stat = os.statvfs(folder)
    with filler.open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, max(1, stat.f_bavail * stat.f_frsize - free))


def test_a_full_disk_is_said_and_nothing_is_corrupt(tmp_path, small_disk):
    if small_disk is None and os.environ.get("CI") != "true":  # there, the next test has to do
        pytest.skip("no file system may be mounted here")
    if small_disk is None:
        return
    settings = make_project(tmp_path / "project", rows=500, state=small_disk / "state", serving={"max_upload_mb": 50})
    large, told = csv(LINES[1:20_001]), []  # 2.1 MB, and 0.2 MB as Parquet
    with IntakeApi(settings) as api:
        kept = api.send(fresh(0)).json()["upload"]
        for free in (0, 4096, 50_000, 1_000_000, 2_200_000, 2_250_000, 2_300_000, 2_400_000, 2_600_000, 4_000_000):
            fill(small_disk, free)
            jobs = len(Queue(settings).list(limit=1000))
            answer = api.send(large)
            told.append(answer.status_code)
            wait_until(lambda: not remains(settings))
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
        wait_until(lambda: api.get("/health")["ready"], 60)
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
