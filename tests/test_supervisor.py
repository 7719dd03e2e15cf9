"""Services that start together, are watched, and all end: with real processes and real signals."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from cli_helpers import income_mlops, register_small_model
from helpers import wait_for
from intake_helpers import check_queue, check_uploads, fresh

from income_mlops.jobs import Queue
from income_mlops.processes import Service, ServiceError, Supervisor, check_ports
from income_mlops.settings import load_settings
from income_mlops.supervisor import services

STOP = 15  # seconds in which everything must be gone


def get(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=5) as r:
        return json.load(r)


def alive(pids: list[int]) -> list[int]:
    "Those that still run; a zombie has ended."
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def ended(pids: list[int], start: float, seconds: float) -> bool:
    "Whether all end in time; the watchdog notices its supervisor's end a moment after it."
    while alive(pids) and time.monotonic() - start < seconds:
        time.sleep(0.05)
    return not alive(pids) and time.monotonic() - start < seconds


def family(pid: int) -> list[int]:
    return [p.pid for p in psutil.Process(pid).children(recursive=True)]


# ── ports ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_taken_port_is_named_with_its_setting(free_port):
    with socket.socket() as a, socket.socket() as b:
        for s in (a, b):
            s.bind(("127.0.0.1", 0))
            s.listen()
        listed = [Service(n, (), "127.0.0.1", s.getsockname()[1], f"{n}.port")
                  for n, s in (("mlflow", a), ("serving", b))]
        with pytest.raises(ServiceError) as e:
            check_ports([*listed, Service("docs", (), "127.0.0.1", free_port(), "docs.port")])
    lines = str(e.value).splitlines()
    assert len(lines) == 2 and "docs" not in str(e.value)
    for line, service in zip(lines, listed, strict=True):
        assert f"port {service.port} " in line and service.setting in line
        assert f"DYNACONF_{service.name.upper()}__PORT" in line


def test_one_port_for_two_and_a_host_that_is_not_here(free_port):
    port = free_port()
    with pytest.raises(ServiceError, match=rf"mlflow\.port and serving\.port are both {port}"):
        check_ports([Service(n, (), "127.0.0.1", port, f"{n}.port") for n in ("mlflow", "serving")])
    with pytest.raises(ServiceError, match=r"192\.0\.2\.1.*serving\.host"):
        check_ports([Service("the API", (), "192.0.2.1", port, "serving.port")])


def test_up_names_the_taken_port_and_starts_nothing(project, free_port):
    folder = project()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        done = income_mlops(folder, "up", DYNACONF_SERVING__PORT=str(port), DYNACONF_MLFLOW__PORT=str(free_port()),
                            DYNACONF_DASHBOARD__PORT=str(free_port()))
    assert done.returncode == 1 and not done.stdout
    assert f"port {port}" in done.stderr and "serving.port" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (folder / "var").exists()


# ── ends, with small services ─────────────────────────────────────────────────────────────────────────────────────────

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
print("I stay", flush=True)
time.sleep(600)
"""

DRIVER = """
import sys, time
from pathlib import Path
from income_mlops.processes import Service, Stopped, Supervisor, signals
port, logs, *programs = sys.argv[1:]
command = (sys.executable, "-m", "http.server", port, "--bind", "127.0.0.1")
files = Service("files", command, "127.0.0.1", int(port), "x.port", health="/")
supervisor = Supervisor(Path(logs))
supervisor.say = lambda text: print(text, flush=True)
with signals(supervisor), supervisor:
    try:
        supervisor.wait(supervisor.start(files.name, files.command), files)
        for n, program in enumerate(programs):
            supervisor.start(f"program {n}", [sys.executable, "-c", program], revived="# revived" in program)
        print("ready", flush=True)
        while True:
            supervisor.look()
            time.sleep(0.1)
    except Stopped:
        print("stopped", flush=True)
print("killed:", supervisor.killed)
"""


@pytest.fixture
def driven(tmp_path, free_port):
    "A function that starts a supervisor with a small web server and these programs; process and all pids below it."
    started = []

    def start(*programs: str) -> tuple[subprocess.Popen, list[int]]:
        process = subprocess.Popen([sys.executable, "-c", DRIVER, str(free_port()), str(tmp_path / "logs"), *programs],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        wait_for(lambda: len(family(process.pid)) >= 2 + len(programs) + programs.count(STUBBORN), 10, "children")
        if STUBBORN in programs:
            log = tmp_path / "logs/program-0.log"
            wait_for(lambda: log.read_text() == "I stay\n", 10, "the stubborn one")
            time.sleep(0.5)  # its child, too, ignores the signal by now
        started.append((process, family(process.pid)))
        return started[-1]
    yield start
    for process, pids in started:
        for pid in alive([process.pid, *pids]):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_stops_every_child(driven, number):
    process, pids = driven()
    start = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=STOP)
    assert process.returncode == 0 and out == "stopped\nkilled: []\n" and not err
    assert ended(pids, start, 5)


@pytest.mark.full
def test_stubborn_child_and_its_child_are_killed_in_time(driven):
    process, pids = driven(STUBBORN)
    assert len(pids) == 4, "web server, stubborn one, its child, watchdog"
    start = time.monotonic()
    process.terminate()
    time.sleep(1)
    process.send_signal(signal.SIGINT)  # an impatient person's second signal changes nothing
    out, err = process.communicate(timeout=STOP)
    assert ended(pids, start, STOP)
    assert process.returncode == 0 and out == "stopped\nkilled: ['program 0']\n" and not err


@pytest.mark.full
def test_killed_supervisor_leaves_nothing(driven):
    process, pids = driven(STUBBORN)
    process.kill()
    wait_for(lambda: not alive(pids), STOP, "children of a killed supervisor end")


def test_dead_child_is_reported_and_ends_the_rest(driven, tmp_path):
    process, pids = driven("import time; print('no more memory', flush=True); time.sleep(1); raise SystemExit(7)")
    _, err = process.communicate(timeout=STOP)
    assert process.returncode == 1 and ended(pids, time.monotonic(), 2)
    last = err[err.index("ServiceError: "):]
    assert "program 0 ended with exit code 7" in last and "no more memory" in last
    assert str(tmp_path / "logs/program-0.log") in last


def test_killed_child_is_reported_by_its_signal(driven):
    process, pids = driven("import os, time; time.sleep(1); os.kill(os.getpid(), 9)")
    assert "program 0 was killed by SIGKILL" in process.communicate(timeout=STOP)[1]
    assert ended(pids, time.monotonic(), 2)


def test_one_that_is_revived_ends_nothing_by_its_death(driven, tmp_path):
    process, pids = driven("import os, time; print('here', flush=True); time.sleep(600)  # revived")
    log = tmp_path / "logs/program-0.log"
    wait_for(lambda: log.read_text() == "here\n", 10, "it runs")
    victim, = (p for p in pids if "# revived" in " ".join(psutil.Process(p).cmdline()))
    os.kill(victim, signal.SIGKILL)
    assert process.stdout.readline().startswith("program 0 was killed by SIGKILL; log: ")
    wait_for(lambda: log.read_text() == "here\nhere\n", 10, "it runs again, and its first words are kept")
    others = [p for p in pids if p != victim]
    assert alive(others) == others, "the others were not touched"
    pids = family(process.pid)
    assert len(pids) == len(others) + 1
    start = time.monotonic()
    process.terminate()
    assert process.communicate(timeout=STOP)[0] == "stopped\nkilled: []\n" and process.returncode == 0
    assert ended(pids, start, 5)


def test_earlier_log_is_kept(tmp_path):
    for word in ("one", "two"):
        with Supervisor(tmp_path) as supervisor:
            supervisor.finish(supervisor.start("echo", [sys.executable, "-c", f"print('{word}')"], lasting=False))
    assert (tmp_path / "echo.log").read_text() == "two\n" and (tmp_path / "echo.log.1").read_text() == "one\n"


def test_failing_program_and_silent_service(tmp_path, free_port):
    program = "print('went wrong'); raise SystemExit(3)"
    with pytest.raises(ServiceError, match=r"step ended with exit code 3(.|\n)*went wrong"), Supervisor(tmp_path) as s:
        s.finish(s.start("step", [sys.executable, "-c", program], lasting=False))
    deaf = Service("deaf", (sys.executable, "-c", "import time; time.sleep(60)"), "127.0.0.1", free_port(), "x.port",
                   patience=1)
    with pytest.raises(ServiceError, match=r"deaf does not answer on .*/health after 1 s"), Supervisor(tmp_path) as s:
        s.wait(s.start(deaf.name, deaf.command), deaf)


# ── the real thing ────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A project folder with a model in its registry."
    import shutil
    root = Path(__file__).parent.parent
    folder = tmp_path_factory.mktemp("up")
    shutil.copy(root / "settings.ini", folder)
    (folder / "data").symlink_to(root / "data")
    register_small_model(folder)
    return folder


class Up:
    "`income-mlops up` in a folder, on free ports."

    def __init__(self, folder: Path, mlflow: int, serving: int, dashboard: int):
        ports = {"MLflow": mlflow, "the API": serving, "the dashboard": dashboard}
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        env = {**os.environ, "DYNACONF_MLFLOW__PORT": str(mlflow), "DYNACONF_SERVING__PORT": str(serving),
               "DYNACONF_DASHBOARD__PORT": str(dashboard)}
        self.out = folder / "up.out"
        with self.out.open("w") as out:
            self.process = subprocess.Popen([sys.executable, "-m", "income_mlops.cli", "up"], cwd=folder, env=env,
                                            stdout=out, stderr=subprocess.STDOUT)

    def ready(self, seconds: float) -> "Up":
        def runs() -> bool:
            assert self.process.poll() is None, self.out.read_text()
            return "Everything runs" in self.out.read_text()
        wait_for(runs, seconds, "up")
        self.pids = family(self.process.pid)
        return self

    def end(self) -> None:
        for pid in alive([self.process.pid, *getattr(self, "pids", [])]):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def worker_of(up: Up) -> int | None:
    for pid in family(up.process.pid):
        with suppress(psutil.Error):  # one that is just ending
            if psutil.Process(pid).cmdline()[-1:] == ["worker"]:
                return pid
    return None


def test_up_serves_a_model_and_stops_within_15_seconds(trained, free_port):
    up = Up(trained, free_port(), free_port(), free_port())
    try:
        lines = up.ready(120).out.read_text().splitlines()
        assert len(lines) == 5 and all(url in "".join(lines) for url in up.urls.values())
        assert [line[:16].strip() for line in lines[:3]] == list(up.urls)
        assert "there is one: RandomForest version 1" in lines[3] and "serves none" not in lines[3]
        with urllib.request.urlopen(up.urls["the dashboard"] + "/voila/static/voila.js") as r:
            assert r.status == 200
        with urllib.request.urlopen(up.urls["MLflow"] + "/health") as r:
            assert r.status == 200
        found = get(up.urls["MLflow"] + "/api/2.0/mlflow/registered-models/search?max_results=9")["registered_models"]
        assert [m["name"] for m in found] == ["adult-income.RandomForest"]
        assert get(up.urls["the API"] + "/health")["ready"]
        assert len(up.pids) >= 6, "watchdog, MLflow and its worker, the API, the worker, the dashboard, its kernel"
        victim = worker_of(up)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: worker_of(up) not in (None, victim), 30, "another worker comes")
        assert up.process.poll() is None and get(up.urls["the API"] + "/health")["ready"]
        assert "worker was killed by SIGKILL" in up.out.read_text()
        log = trained / "var/logs/worker.log"
        wait_for(lambda: log.read_text().count("worker of adult-income") == 2, 30, "it works")
        up.pids = family(up.process.pid)
        start = time.monotonic()
        up.process.terminate()
        assert up.process.wait(STOP) == 0
        assert ended(up.pids, start, STOP)
        assert up.out.read_text().endswith("Stopped.\n")
    finally:
        up.end()


@pytest.mark.full  # with small services the same is tested above
def test_dead_service_ends_up_with_a_report(trained, free_port):
    up = Up(trained, free_port(), free_port(), free_port())
    try:
        up.ready(120)
        api = next(p for p in up.pids if "serve" in psutil.Process(p).cmdline())
        os.kill(api, signal.SIGKILL)
        assert up.process.wait(STOP) == 1
        assert "error: the API was killed by SIGKILL" in up.out.read_text()
        assert ended(up.pids, time.monotonic(), 2)
    finally:
        up.end()


def test_end_while_starting_leaves_nothing(trained, free_port):
    up = Up(trained, free_port(), free_port(), free_port())
    try:
        wait_for(lambda: len(family(up.process.pid)) >= 2, 30, "MLflow starts")
        time.sleep(1)
        up.pids = family(up.process.pid)
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(STOP) == 0
        assert ended(up.pids, time.monotonic(), 2) and "Everything runs" not in up.out.read_text()
    finally:
        up.end()


PERSON = {"age": 52, "workclass": "Self-emp-not-inc", "education": "HS-grad", "education-num": 9,
          "marital-status": "Married-civ-spouse", "occupation": "Exec-managerial", "relationship": "Husband",
          "race": "White", "sex": "Male", "capital-gain": 0, "capital-loss": 0, "hours-per-week": 45,
          "native-country": "United-States"}


class Load:
    "People who predict and upload without a pause, until the API is gone; what it has acknowledged."

    def __init__(self, url: str, key: str, round_: int):
        self.url, self.headers, self.cut = url, {"X-API-Key": key}, 0
        self.round, self.predicted, self.acknowledged, self.wrong, self.over = round_, 0, [], [], threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(act, n)) for n, act in
                        enumerate((self.predict, self.predict, self.upload, self.upload))]
        for thread in self.threads:
            thread.start()

    def run(self, act, n: int) -> None:
        with httpx.Client(base_url=self.url, timeout=30, headers=self.headers) as http:
            i = 0
            while not self.over.is_set():
                try:
                    answer = act(http, 100_000 * self.round + 10_000 * n + i)
                except httpx.TransportError:  # refused, or cut off: not acknowledged
                    self.cut += 1
                    time.sleep(0.01)
                    continue
                i += 1
                if answer.status_code not in (200, 202, 503):  # 503: it is about to end
                    self.wrong.append((answer.status_code, answer.text[:300]))

    def predict(self, http: httpx.Client, _: int) -> httpx.Response:
        answer = http.post("/predict", json={"data": PERSON})
        self.predicted += answer.status_code == 200
        return answer

    def upload(self, http: httpx.Client, seed: int) -> httpx.Response:
        answer = http.post("/upload_data", files={"file": (f"{seed}.csv", fresh(seed, 50))})
        if answer.status_code == 202:
            told = answer.json()
            self.acknowledged.append((told["upload"], told["job_id"]))
            time.sleep(0.05)
        return answer

    def is_on(self) -> bool:
        return len(self.acknowledged) > 10 and self.predicted > 50

    def __str__(self) -> str:
        return f"load: {self.predicted} predictions, {len(self.acknowledged)} uploads, {self.cut} requests cut off"

    def end(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(60)


@pytest.mark.full
def test_stopped_and_started_under_load_loses_nothing_acknowledged(trained, free_port):
    "Twice, while a job runs: everything ends in time, and the next start has every upload and its job."
    settings = load_settings(trained / "settings.ini")
    acknowledged, took = [], []
    for round_ in range(3):
        up, load = Up(trained, free_port(), free_port(), free_port()), None
        try:
            up.ready(120)
            check_queue(settings)
            assert check_uploads(settings) >= {upload for upload, _ in acknowledged}
            jobs = {j.id: j for j in Queue(settings).list(limit=100_000)}
            lost = [(u, j) for u, j in acknowledged if j not in jobs or jobs[j].upload != u]
            assert not lost and not [j.error for j in jobs.values() if j.state == "failed"]
            url = up.urls["the API"]
            for upload, job in acknowledged[:5]:
                assert get(f"{url}/uploads/{upload}")["id"] == upload and get(f"{url}/jobs/{job}")["id"] == job
            if round_ < 2:
                load = Load(url, (settings.state / "api_key").read_text().strip(), round_)
                wait_for(lambda load=load: load.wrong or load.is_on(), 60, load)
                assert not load.wrong, load.wrong[:3]
                wait_for(lambda url=url: [j for j in get(f"{url}/jobs?state=running") if j["cell"] > 2], 60, "a job")
            up.pids = family(up.process.pid)
            start = time.monotonic()
            up.process.terminate()
            assert up.process.wait(STOP) == 0, up.out.read_text()
            assert ended(up.pids, start, STOP)
            took.append(time.monotonic() - start)
            assert up.out.read_text().endswith("\nStopped.\n"), "nobody had to be killed"
            if load:
                load.end()
                assert not load.wrong, load.wrong[:3]
                acknowledged += load.acknowledged
        finally:
            if load:
                load.end()
            up.end()
    print(f"{len(acknowledged)} uploads acknowledged; stopped in {', '.join(f'{t:.1f}' for t in took)} s")


def test_tracking_server_of_somebody_else_is_used(project):
    settings = load_settings(project(('tracking_uri = ""', "tracking_uri = http://ml.example:5000")) / "settings.ini")
    assert [s.name for s in services(settings)] == ["the API", "the dashboard"]
