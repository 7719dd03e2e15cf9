"""A small project with real rows, uploads, workers in processes of their own, and a real PostgreSQL."""
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from helpers import wait_for

from income_mlops import diffs, registry, uploads
from income_mlops.data import read_table
from income_mlops.jobs import Job, Queue
from income_mlops.settings import Settings, load_settings
from income_mlops.tracking import connect, experiment_id

DATA = Path(__file__).parent.parent / "data"
POSTGRES = max(Path("/usr/lib/postgresql").glob("[0-9]*/bin"), key=lambda p: int(p.parent.name), default=Path("/none"))
INI = """
models = {models}
[dataset]
origin_path = train.csv
holdout_path = test.csv
[[columns]]
target = income
positive = ">50K"
ignored = fnlwgt
missing = "?"
[optimization]
n_trials = {trials}
initial_n_trials = {trials}
n_folds = 2
[mlflow]
tracking_uri = "{tracking_uri}"
experiment_name = adult-income
[paths]
state = {state}
[runs]
heartbeat = 1
end_timeout = 10
[jobs]
storage = "{storage}"
{jobs}
"""


def rows():
    "All real training rows."
    return read_table(DATA / "adult.train.csv", ("?",))


def new_project(folder: Path, tracking_uri: str = "", storage: str = "", models: str = "RandomForest", trials: int = 1,
                state: Path | str = "var", **jobs: object) -> Settings:
    "A project with the first 1,500 rows to train on."
    folder.mkdir(parents=True, exist_ok=True)
    rows().head(1500).write_csv(folder / "train.csv")
    read_table(DATA / "adult.test.csv", ("?",)).head(500).write_csv(folder / "test.csv")
    jobs = {"lease": 10, "backoff": 1, "attempts": 1000, "scheduling": "normal", **jobs}
    lines = "\n".join(f"{k} = {v}" for k, v in jobs.items())
    (folder / "settings.ini").write_text(INI.format(tracking_uri=tracking_uri, storage=storage, jobs=lines,
                                                            models=models, trials=trials, state=state))
    return load_settings(folder / "settings.ini")


def upload(settings: Settings, table, name: str) -> str:
    "Keep a table as an upload, as the service does; its id."
    file = settings.root / name
    table.write_csv(file)
    return uploads.receive(settings, file, name, "a test")[0].id


class Worker:
    "`income-mlops worker` in a process of its own."

    def __init__(self, settings: Settings, **env: str):
        self.file = settings.root / "worker.log"
        with self.file.open("a") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "income_mlops.cli", "worker"], cwd=settings.root,
                                            stdout=log, stderr=log, env={**os.environ, **env})
        self.pid = self.process.pid

    def has(self, job: Job) -> bool:
        return job.state == "running" and (job.worker or "").split(" ")[-2:-1] == [str(self.pid)]

    def stop(self, how: int = signal.SIGTERM, seconds: float = 20) -> float:
        "Seconds it took to end."
        start = time.monotonic()
        with suppress(ProcessLookupError):
            self.process.send_signal(how)
        self.process.wait(seconds)
        return time.monotonic() - start


@contextmanager
def workers(settings: Settings, n: int = 1, **env: str):
    "Some workers, which are ended afterwards; those that the block adds to the list, too."
    running = [Worker(settings, **env) for _ in range(n)]
    try:
        yield running
    finally:
        for worker in running:
            if worker.process.poll() is None:
                worker.stop(signal.SIGKILL)


def kernels(settings: Settings) -> list[int]:
    "Living processes of kernels of this project."
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            env = process.environ()
            if "MLFLOW_RUN_ID" in env and env.get("INCOME_MLOPS_SETTINGS") == str(settings.root / "settings.ini"):
                found.append(process.pid)
    return found


def all_runs(settings: Settings):
    client = connect(settings)
    return client.search_runs([experiment_id(client, settings)], max_results=5000)


def assert_clean(settings: Settings) -> None:
    """No kernel, no running run, one model version per family and dataset, everything ended once; versions that were
    made together are of one training, which went well to its end."""
    wait_for(lambda: not kernels(settings), 10, "kernels end")
    assert [r.info.run_id for r in all_runs(settings) if r.info.status == "RUNNING"] == []
    versions, status = registry.versions(settings), {r.info.run_id: r.info.status for r in all_runs(settings)}
    made = Counter((v.family, v.dataset) for v in versions)
    assert set(made.values()) <= {1}, made
    assert {status[v.training] for v in versions} <= {"FINISHED"}
    assert len({(v.dataset, v.training) for v in versions}) == len({v.dataset for v in versions}), "siblings"
    for job in Queue(settings).list(limit=1000):
        ends = [c.state for c in job.log if c.state in ("succeeded", "failed", "cancelled")]
        assert ends == [job.state] and job.is_over, job
        steps = Counter(r.data.tags.get("step") for r in all_runs(settings)
                        if r.data.tags.get("job") == job.id and r.info.status == "FINISHED")
        assert set(steps.values()) <= {1}, "a finished step was repeated"
        if job.state == "succeeded":
            assert set(steps) == {s for s in job.result["steps"] if s != "merge"}, (job, steps)


def wait_until_over(settings: Settings, jobs: list[Job], seconds: float) -> list[Job]:
    queue = Queue(settings)
    wait_for(lambda: all(queue.get(j.id).is_over for j in jobs), seconds,
             f"jobs end; log: {(settings.root / 'worker.log').read_text()[-3000:]}")
    return [queue.get(j.id) for j in jobs]


@contextmanager
def small_disk(folder: Path, megabytes: int):
    "A file system of this size, or nothing where none may be mounted."
    folder.mkdir()
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    words = [*sudo, "mount", "-t", "tmpfs", "-o", f"size={megabytes}m,uid={os.geteuid()}", "tmpfs", folder]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run([*sudo, "umount", "-l", folder], check=True)


def fill(disk: Path, free: int = 0) -> Path:
    "Leave only so many bytes free; the file that takes the rest."
    filler = disk / "filler"
    filler.unlink(missing_ok=True)

    def take() -> bool:
        "Whether the rest was still there when it was taken: others write, too."
        stat = os.statvfs(disk)
        with filler.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, stat.f_bavail * stat.f_frsize - free))
            except OSError as e:
                if e.errno != errno.ENOSPC:
                    raise
                return False
        return True
    wait_for(take, 10, "the disk is filled")
    return filler


@contextmanager
def full(disk: Path):
    "Meanwhile there is no room left."
    filler = fill(disk)
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def postgres(folder: Path):
    "A real server on a socket in the folder; its address for SQLAlchemy."
    if not (POSTGRES / "initdb").exists():
        pytest.skip("PostgreSQL is not installed")
    folder.mkdir(parents=True)
    words = []
    if os.getuid() == 0:  # it refuses to run as root
        words = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        for parent in (folder, *folder.parents):
            if not os.stat(parent).st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
        import shutil
        shutil.chown(folder, "postgres", "postgres")
    data = folder / "data"
    subprocess.run([*words, POSTGRES / "initdb", "-D", data, "-U", "queue", "--auth=trust", "--no-sync", "-E", "UTF8"],
                   check=True, capture_output=True, cwd="/")
    with (folder.parent / "postgres.log").open("ab") as log:
        server = subprocess.Popen([*words, POSTGRES / "postgres", "-D", data, "-k", folder, "-h", ""], stdout=log,
                                  stderr=log, cwd="/")
    try:
        ask = [POSTGRES / "pg_isready", "-h", folder]
        wait_for(lambda: subprocess.run(ask, capture_output=True).returncode == 0, 30)
        yield f"postgresql://queue@/postgres?host={folder}"
    finally:
        server.send_signal(signal.SIGINT)  # fast shutdown
        server.wait(30)


def assert_no_noise(settings, jobs):
    "What differs between two retrainings is their data and what came of it; nothing tells who asked, where and when."
    trainings = [j.result["steps"]["train"]["run_id"] for j in jobs]
    found = diffs.diff_runs(settings, *trainings)
    assert {"version", "training digest"} <= {v.name for v in found.data} and found.metrics
    assert not found.settings and not found.environment
    assert not {v.name for v in found.parameters} & {"job", "dataset"}
    assert {c.heading for c in found.cells} <= {"Data", "Study", "Evaluation", "Fairness", "Verdict"}
    assert not any(c.source for c in found.cells)
    text = diffs.as_text(found).split("\n", 2)[2]  # the two runs are named once, at the top
    for job, run_id in zip(jobs, trainings, strict=True):
        assert not [w for w in (job.id, job.upload, run_id, job.by, str(settings.root)) if w in text]
    assert not re.search(r"\d\d:\d\d|/tmp|0x[0-9a-f]{6}|seconds|papermill", text)
