"""Whether users notice a retraining: the latency of `/predict` while one runs, side by side with an idle machine.

The API is asked 200 times a second in an open loop (see `_load.py`): a request's latency counts from the moment it was
due. Five windows while nothing else runs; five from the moment on when rows are uploaded, while the worker starts and
analyses them; five while it tunes and trains all families on them; then five idle ones again. Shown is the 99th
percentile of each window and their medians; the bar is 1.5 × idle or idle + 5 ms, whichever is more, and no failed
request. How many cores the retraining really used during its windows is shown, too: one that waits disturbs nobody.

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
from pathlib import Path
from typing import Any

import httpx
import psutil
from _fitted import ROOT, fit, project, register_all, requests
from _load import Window, is_ready, scheduling, steady
from serving import free_port, running

from income_mlops.access import api_key

RATE = 200
# ── the retraining ────────────────────────────────────────────────────────────────────────────────────────────────────

class Retraining:
    "A worker, and uploads of real rows that it retrains on: a new one whenever the last is done."

    def __init__(self, settings: Any, port: int, how: str):
        self.settings, self.port, self.uploads, self.job = settings, port, 0, ""
        self.log = (settings.root / "worker.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "income_mlops.cli", "worker"], cwd=settings.root, stdout=self.log, stderr=self.log,
            env={**os.environ, "DYNACONF_JOBS__SCHEDULING": how}, start_new_session=True)

    def ask(self, method: str, path: str, **more: Any) -> Any:
        answer = httpx.request(method, f"http://127.0.0.1:{self.port}{path}", timeout=60,
                               headers={"X-API-Key": api_key(self.settings)}, **more)
        if answer.is_error:
            raise SystemExit(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.json()

    def keep_going(self) -> dict[str, Any]:
        "The job as it stands; asks for another when it is over."
        if self.process.poll() is not None:
            raise SystemExit(f"the worker ended:\n{(self.settings.root / 'worker.log').read_text()[-2000:]}")
        job = self.ask("GET", f"/jobs/{self.job}") if self.job else {"state": "succeeded"}
        if job["state"] in ("failed", "cancelled"):
            raise SystemExit(f"the job {job['state']}: {job['error']}")
        if job["state"] == "succeeded":
            self.uploads += 1
            self.job = self.ask("POST", "/upload_data", files={"file": ("more.csv", self.rows())})["job_id"]
        return job

    def rows(self) -> bytes:
        "Real ones under another weight, so that they are new."
        lines = (ROOT / "data" / "adult.train.csv").read_text().splitlines()
        start = 1 + 1000 * self.uploads
        rows = [line.split(",") for line in lines[start:start + 1000]]
        return "\n".join([lines[0], *(",".join([r[0], r[1], str(2_000_000 + self.uploads), *r[3:]]) for r in rows)]
                         ).encode()

    def seconds(self) -> float:
        "Of processor time that the worker and its children have used."
        return sum(sum(p.cpu_times()[:2]) for p in self.processes())

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [p for p in [parent, *parent.children(recursive=True)] if p.is_running()]

    def classes(self) -> list[str]:
        "Of all threads of the worker and its children."
        return sorted({scheduling(t.id) for p in self.processes() for t in p.threads()})

    def wait_for_study(self) -> None:
        end = time.monotonic() + 600
        while (job := self.keep_going()).get("heading") != "Study" or job["step"] != "train":
            if time.monotonic() > end:
                raise SystemExit(f"the retraining does not begin: {job}")
            time.sleep(0.2)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, 9)
                self.process.wait()
        self.log.close()


# ── the measurement ───────────────────────────────────────────────────────────────────────────────────────────────────

def windows(port: int, bodies: list[bytes], n: int, seconds: float,
            job: Retraining | None = None) -> tuple[list[Window], float]:
    "Some windows, and the cores that the retraining used meanwhile."
    found, used = [], []
    for _ in range(n):
        if job:
            job.keep_going()
        before, start = job.seconds() if job else 0.0, time.monotonic()
        found.append(steady(port, bodies, RATE, seconds))
        if job:  # a kernel that ended meanwhile takes its share with it
            used.append(max(job.seconds() - before, 0) / (time.monotonic() - start))
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
    words.add_argument("--how", choices=("idle", "batch", "normal"), nargs="+", default=["idle"],
                       help="jobs.scheduling of the worker")
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as d:
        measure(Path(d), given)


def measure(folder: Path, given: Any) -> None:
    settings = project(folder / "project")
    dataset, pipelines = fit(settings)
    register_all(settings, dataset, pipelines)
    bodies = [json.dumps({"data": row}).encode() for row in requests(dataset, 1000)]
    port = free_port()
    api_command = [sys.executable, "-m", "income_mlops.cli", "--settings", str(settings.root / "settings.ini"),
                   "serve", "--no-worker", "--port", str(port)]
    with running(api_command, port, "/predict", bodies[0]) as (api, _):
        while not is_ready(port):
            time.sleep(0.1)
        time.sleep(10)  # until it has asked MLflow for the first time
        steady(port, bodies, RATE, 3)  # warm
        print(f"\n{RATE} requests/s, open loop, {given.windows} windows of {given.seconds:g} s, {os.cpu_count()} cores,"
              f" milliseconds; generator: {scheduling()}; API: {scheduling(api.pid)}")
        print(f"{'':22}{'p50':>8}{'p99':>9}   p99 of each window{'':{max(0, 8 * given.windows - 19)}}{'sent late':>12}"
              f"{'failed':>8}{'cores':>8}")
        idle, failed = [], list[Any]()
        found, _ = windows(port, bodies, given.windows, given.seconds)
        idle.append(show("idle", found, 0))
        failed += [f for w in found for f in w.failed]
        busy = {}
        for how in given.how:
            job = Retraining(settings, port, how)
            try:
                for part, begin in ("analysis", job.keep_going), ("training", job.wait_for_study):
                    begin()
                    found, cores = windows(port, bodies, given.windows, given.seconds, job)
                    busy[f"{part}, {how}"] = show(f"{part}, {how}", found, cores)
                    failed += [f for w in found for f in w.failed]
                    print(f"{'':22}its threads: {'; '.join(job.classes())}")
            finally:
                job.stop()
        found, _ = windows(port, bodies, given.windows, given.seconds)
        idle.append(show("idle again", found, 0))
        failed += [f for w in found for f in w.failed]
        calm = statistics.median(idle)
        missed = []
        for how, p99 in busy.items():
            bar = max(1.5 * calm, calm + 5)
            print(f"{how}: p99 {p99 / calm:.2f} × idle, {p99 - calm:+.2f} ms; the bar is {bar:.2f} ms: "
                  f"{'holds' if p99 <= bar else 'does not hold'}")
            missed += [how] if p99 > bar else []
        if failed:
            raise SystemExit(f"{len(failed)} requests failed: {failed[:5]}")
        if missed:
            raise SystemExit(f"the bar does not hold: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
