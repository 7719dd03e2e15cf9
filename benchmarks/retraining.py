"""Whether users notice a retraining: the latency of `/predict` while one runs, side by side with an idle machine.

The API is asked 200 times a second in an open loop (see `_load.py`): a request's latency counts from the moment it was
due. Five windows while nothing else runs, five while a real retraining does (a process of its own that trains all
families on this machine), then five idle ones again. Shown is the 99th percentile of each window and their medians;
the bar is 1.5 × idle or idle + 5 ms, whichever is more, and no failed request. How many cores the retraining really
used during its windows is shown, too: one that waits disturbs nobody.

Load generator, API and retraining share the machine's cores; their scheduling classes are printed. `--how` sets that
of the retraining, to compare.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from _fitted import fit, project, register_all, requests
from _load import Window, is_ready, scheduling, steady
from serving import free_port, our_api, running

RATE = 200
LOW = "os.setpriority(os.PRIO_PROCESS, 0, 19)"
BEFORE = {"idle": f"{LOW}; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))",
          "batch": f"{LOW}; os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
          "nice": LOW, "normal": "os.setpriority(os.PRIO_PROCESS, 0, 0)"}
"What the retraining does to itself before it starts, in its own process: its kernel inherits it."


# ── the retraining ────────────────────────────────────────────────────────────────────────────────────────────────────

class Retraining:
    "A real training that starts anew whenever it ends, until it is stopped."

    def __init__(self, settings: Any, how: str, environment: dict[str, str]):
        self.settings, self.how, self.environment = settings, how, environment
        self.log = (settings.root / "retraining.log").open("w")
        self.started = 0
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.started += 1
        code = f"import os; {BEFORE[self.how]}; from income_mlops.cli import main; main(['train'])"
        return subprocess.Popen([sys.executable, "-c", code], cwd=self.settings.root, stdout=self.log, stderr=self.log,
                                env={**os.environ, **self.environment}, start_new_session=True)

    def keep_going(self) -> None:
        if (code := self.process.poll()) is not None:
            if code:
                said = (self.settings.root / "retraining.log").read_text()
                raise SystemExit(f"the retraining failed:\n{said[-2000:]}")
            self.process = self.start()

    def seconds(self) -> float:
        "Of processor time that it and its children have used."
        used = 0.0
        for p in [(parent := psutil.Process(self.process.pid)), *parent.children(recursive=True)]:
            try:
                times = p.cpu_times()
            except psutil.NoSuchProcess:
                continue
            used += times.user + times.system
        return used

    def classes(self) -> list[str]:
        "Of it and its children."
        parent = psutil.Process(self.process.pid)
        return sorted({scheduling(p.pid) for p in [parent, *parent.children(recursive=True)]})

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 2)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, 9)
                self.process.wait()
        self.log.close()


@contextmanager
def retraining(settings: Any, how: str, environment: dict[str, str]) -> Iterator[Retraining]:
    "One that has begun to train, until the end of the block."
    job = Retraining(settings, how, environment)
    try:
        end = time.monotonic() + 180
        # imports and the kernel's start are over when a study has begun
        while not list(settings.state.rglob("studies.journal")):
            job.keep_going()
            if time.monotonic() > end:
                raise SystemExit("the retraining does not begin")
            time.sleep(0.2)
        yield job
    finally:
        job.stop()


# ── the measurement ───────────────────────────────────────────────────────────────────────────────────────────────────

def windows(port: int, bodies: list[bytes], n: int, seconds: float,
            job: Retraining | None) -> tuple[list[Window], float]:
    "Some windows, and the cores that the retraining used meanwhile."
    found, used = [], []
    for _ in range(n):
        if job:
            job.keep_going()
        pid, before = (job.process.pid, job.seconds()) if job else (0, 0.0)
        found.append(steady(port, bodies, RATE, seconds))
        if job and job.process.poll() is None and pid == job.process.pid:
            used.append((job.seconds() - before) / seconds)
    return found, statistics.median(used) if used else 0.0


def show(name: str, found: list[Window], cores: float) -> float:
    p99s = [w.quantile(0.99) for w in found]
    middle = statistics.median(p99s)
    print(f"{name:22}{statistics.median(w.quantile(0.5) for w in found):8.2f}{middle:9.2f}"
          f"   {' '.join(f'{p:7.2f}' for p in p99s)}"
          f"{statistics.median(w.quantile(0.99, w.late) for w in found):12.2f}{sum(len(w.failed) for w in found):8}"
          f"{cores:8.2f}", flush=True)
    return middle


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--windows", type=int, default=5)
    words.add_argument("--seconds", type=float, default=8, help="of each window")
    words.add_argument("--how", choices=BEFORE, nargs="+", default=["idle"], help="scheduling of the retraining")
    words.add_argument("--environment", nargs="*", default=[], metavar="NAME=VALUE", help="of the retraining")
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as d:
        measure(Path(d), given)


def measure(folder: Path, given: Any) -> None:
    settings = project(folder / "project")
    dataset, pipelines = fit(settings)
    register_all(settings, dataset, pipelines)
    bodies = [json.dumps({"data": row}).encode() for row in requests(dataset, 1000)]
    port = free_port()
    with running(our_api(settings, port), port, "/predict", bodies[0]) as (api, _):
        while not is_ready(port):
            time.sleep(0.1)
        time.sleep(10)  # until it has asked MLflow for the first time
        steady(port, bodies, RATE, 3)  # warm
        print(f"\n{RATE} requests/s, open loop, {given.windows} windows of {given.seconds:g} s, {os.cpu_count()} cores,"
              f" milliseconds; generator: {scheduling()}; API: {scheduling(api.pid)}")
        print(f"{'':22}{'p50':>8}{'p99':>9}   p99 of each window{'':{max(0, 8 * given.windows - 19)}}{'sent late':>12}"
              f"{'failed':>8}{'cores':>8}")
        idle, failed = [], 0
        found, _ = windows(port, bodies, given.windows, given.seconds, None)
        idle.append(show("idle", found, 0))
        failed += sum(len(w.failed) for w in found)
        busy = {}
        for how in given.how:
            for old in settings.state.rglob("studies.journal*"):
                old.unlink()
            with retraining(settings, how, dict(e.split("=", 1) for e in given.environment)) as job:
                classes = job.classes()
                found, cores = windows(port, bodies, given.windows, given.seconds, job)
            busy[how] = show(f"retraining, {how}", found, cores)
            failed += sum(len(w.failed) for w in found)
            print(f"{'':22}its processes: {'; '.join(classes)}")
        found, _ = windows(port, bodies, given.windows, given.seconds, None)
        idle.append(show("idle again", found, 0))
        failed += sum(len(w.failed) for w in found)
        calm = statistics.median(idle)
        for how, p99 in busy.items():
            bar = max(1.5 * calm, calm + 5)
            print(f"retraining, {how}: p99 {p99 / calm:.2f} × idle, {p99 - calm:+.2f} ms; the bar is {bar:.2f} ms: "
                  f"{'holds' if p99 <= bar else 'does not hold'}")
        if failed:
            raise SystemExit(f"{failed} requests failed: {[w.failed[:3] for w in found if w.failed]}")


if __name__ == "__main__":
    main()
