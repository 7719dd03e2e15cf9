"Executions with real kernels and real MLflow stores, and every way in which they can end."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from helpers import free_port, wait_for

from income_mlops.parameters import ParameterError
from income_mlops.runs import RunError, RunStopped, RunTimeout, RunUnrecorded, execute, reconcile
from income_mlops.settings import load_settings
from income_mlops.tracking import connect, experiment_id, started

NOTEBOOKS = Path(__file__).parent / "notebooks"
INI = """
[dataset]
origin_path = a.csv
[[columns]]
target = y
positive = 1
[runs]
heartbeat = 0.5
timeout = 600
end_timeout = 20
[mlflow]
experiment_name = behaviour
tracking_uri = "{uri}"
"""
RUNNER = """
import sys
from income_mlops.runs import RunError, execute
from income_mlops.settings import load_settings
settings = load_settings(sys.argv[1])
for folder in sys.argv[3:]:
    try:
        execute(sys.argv[2], {"folder": folder, "action": "sleep"}, settings, progress=False)
    except RunError as e:
        print(type(e).__name__, e.run_id, e.status, e.reason, flush=True)
"""


class Server:
    "A real `mlflow server`."

    def __init__(self, folder):
        self.folder, self.process = folder, None
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port),
                   "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
                   "--artifacts-destination", f"{self.folder}/artifacts"]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=self.folder,
                                            start_new_session=True)

    def send(self, signum):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)


def new_project(folder, uri=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.ini").write_text(INI.format(uri=uri))
    for file in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy(file, folder)
    return load_settings(folder / "settings.ini")


def with_runs(settings, **changes):
    return settings.model_copy(update={"runs": settings.runs.model_copy(update=changes)})


def kernel_of(folder):
    return json.loads(wait_for(lambda: (folder / "kernel.json").is_file() and (folder / "kernel.json").read_text()))


def gone(pid):
    return started(pid) is None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.send(signal.SIGKILL)
    server.process.wait()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "Settings of a project with MLflow in SQLite, no server."
    return new_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def client(project):
    return connect(project)


@pytest.fixture(scope="module")
def remote(tmp_path_factory, server):
    "Settings of a project whose MLflow is a server."
    settings = new_project(tmp_path_factory.mktemp("remote"), server.uri)

    def answers():
        with suppress(Exception):
            return connect(settings)
    wait_for(answers, 120, "mlflow server")
    return settings


@pytest.fixture(scope="module", autouse=True)
def runner(project, client, server, tmp_path_factory):
    "A runner in a process of its own, which executes one sleeping notebook after another; it starts meanwhile."
    experiment_id(client, project)
    folders = [tmp_path_factory.mktemp("runner") for _ in range(3)]
    command = [sys.executable, "-c", RUNNER, str(project.root / "settings.ini"), "behave.ipynb", *map(str, folders)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield process, folders
    process.kill()
    process.communicate()


def with_child(client, settings, seen):
    "An `on_start` that adds a nested run, as the notebook would, and leaves it running."
    def on_start(run_id):
        child = client.create_run(experiment_id(client, settings), tags={"mlflow.parentRunId": run_id})
        inner = client.create_run(experiment_id(client, settings), tags={"mlflow.parentRunId": child.info.run_id})
        seen.update(run_id=run_id, children=[child.info.run_id, inner.info.run_id])
    return on_start


def assert_ended(client, run_id, status, children=()):
    "The terminal status, the artifacts and the end of the nested runs."
    run = client.get_run(run_id)
    assert run.info.status == status and run.info.end_time
    assert {a.path for a in client.list_artifacts(run_id, "notebook")} == {
        "notebook/behave.ipynb", "notebook/behave.html"}
    assert [client.get_run(c).info.status for c in children] == [status] * len(children)
    return run


def artifact(client, run_id, suffix, folder):
    return Path(client.download_artifacts(run_id, f"notebook/behave.{suffix}", str(folder))).read_text()


def test_a_kernel_reads_the_very_file_that_its_settings_came_from(project, tmp_path):
    other = project.root / "other.ini"
    other.write_text((project.root / "settings.ini").read_text() + "[optimization]\nseed = 77\n")
    execute("behave.ipynb", {"folder": str(tmp_path)}, load_settings(other), progress=False)
    env = kernel_of(tmp_path)["env"]
    assert env["INCOME_MLOPS_SETTINGS"] == str(other) and env["PYTHONHASHSEED"] == "77"


@pytest.mark.parametrize("store", ["project", "remote"])
def test_success(store, request, tmp_path, monkeypatch):
    settings = request.getfixturevalue(store)
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    for key, value in {"JUPYTER_PATH": str(tmp_path), "MPLBACKEND": "agg", "MLFLOW_RUN_ID": "wrong"}.items():
        monkeypatch.setenv(key, value)
    before, handlers, seen = dict(os.environ), [signal.getsignal(s) for s in (2, 15)], []
    done = execute("behave.ipynb", {"folder": str(tmp_path), "action": "log", "count": 3, "words": ["a", 'b"\n']},
                   settings, run_name="a name", tags={"job": "j1"}, on_progress=seen.append)
    changed = {k for k, v in os.environ.items() if before.get(k) != v and not k.startswith("KMP_")}
    assert not changed, "KMP_: scikit-learn sets it when mlflow imports it"
    assert [signal.getsignal(s) for s in (2, 15)] == handlers

    client = connect(settings)
    run = assert_ended(client, done.run_id, done.status)
    assert run.info.status == "FINISHED" and run.info.run_name == "a name"
    assert run.data.params == {"folder": str(tmp_path), "action": "log", "seconds": "0.0", "count": "3",
                               "words": "['a', 'b\"\\n']", "ratio": "0.5", "limit": "60 * 60"}
    assert run.data.tags["notebook"] == "behave.ipynb" and run.data.tags["job"] == "j1"
    assert run.data.tags["cell"] == "9/9 · Closing" and "failed_cell" not in run.data.tags
    part, = client.search_runs([done.experiment_id], f"tags.`mlflow.parentRunId` = '{done.run_id}'")
    assert part.data.metrics == {"ratio": 0.5} and part.info.status == "FINISHED"

    kernel = kernel_of(tmp_path)
    assert kernel["executable"] == sys.executable and kernel["cwd"] == str(settings.root)
    assert kernel["values"] == [3, ["a", 'b"\n'], 0.5, 3600] and kernel["parent"] == os.getpid()
    assert kernel["env"]["MLFLOW_TRACKING_URI"] == settings.tracking_uri
    assert kernel["env"]["INCOME_MLOPS_SETTINGS"] == str(settings.root / "settings.ini")
    assert gone(kernel["pid"])
    assert [p.cell for p in seen] == sorted(p.cell for p in seen) and str(seen[-1]).endswith(("Acting", "Closing"))

    html = artifact(client, done.run_id, "html", tmp_path)
    assert "data:image/png;base64" in html, "plots are inline whatever MPLBACKEND says"
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]+", html)
    assert not re.findall(r"(?:import|@import|url\()\s*[\"']https?://[^\"']+", html)
    assert json.loads(artifact(client, done.run_id, "ipynb", tmp_path))["cells"][-1]["outputs"]


@pytest.mark.parametrize("store", ["project", "remote"])
def test_failing_cell(store, request, tmp_path):
    settings = request.getfixturevalue(store)
    client, seen = connect(settings), {}
    with pytest.raises(RunError, match="ValueError: a bad value") as e:
        execute("behave.ipynb", {"folder": str(tmp_path), "action": "fail"}, settings,
                on_start=with_child(client, settings, seen))
    assert (e.value.run_id, e.value.ename, e.value.evalue, e.value.heading) == (
        seen["run_id"], "ValueError", "a bad value", "Acting")
    assert type(e.value) is RunError and e.value.cell == 7
    run = assert_ended(client, e.value.run_id, "FAILED", seen["children"])
    assert run.data.tags["failed_cell"] == "7/9 · Acting" and run.data.tags["error"] == "ValueError: a bad value"
    assert "a bad value" in artifact(client, e.value.run_id, "html", tmp_path)
    assert not nbformat.read(e.value.notebook, 4).cells[-1].outputs
    assert gone(kernel_of(tmp_path)["pid"])


@pytest.mark.parametrize("action, most", [("sleep", 4), ("deaf", 8)])
def test_timeout(project, client, tmp_path, action, most):
    seen, began = {}, time.monotonic()
    with pytest.raises(RunTimeout, match="longer than 4 s") as e:
        execute("behave.ipynb", {"folder": str(tmp_path), "action": action}, with_runs(project, timeout=4),
                on_start=with_child(client, project, seen))
    assert time.monotonic() - began < 4 + most
    run = assert_ended(client, e.value.run_id, "FAILED", seen["children"])
    assert run.data.tags["timeout"] == "timeout" and run.data.tags["failed_cell"] == "7/9 · Acting"
    assert gone(kernel_of(tmp_path)["pid"])
    if action == "sleep":
        assert gone(int((tmp_path / "child").read_text())), "what the kernel started goes with it"
        assert "KeyboardInterrupt" in artifact(client, e.value.run_id, "html", tmp_path), "shows where it was"


@pytest.mark.parametrize("start, limit, kind, words", [
    ("import time; time.sleep(600)", 2, RunTimeout, "did not start within 2 s"),
    ("raise SystemExit('no kernel today')", 60, RunError, "no kernel today")])
def test_kernel_that_does_not_start(project, client, tmp_path, start, limit, kind, words):
    note = f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    (tmp_path / "sitecustomize.py").write_text(note + start)
    began = time.monotonic()
    with pytest.raises(kind, match=words) as e:
        execute("behave.ipynb", {"folder": str(tmp_path)}, with_runs(project, start_timeout=limit),
                env={"PYTHONPATH": str(tmp_path)})
    assert time.monotonic() - began < 20 and e.value.cell == 0
    run = assert_ended(client, e.value.run_id, "FAILED")
    assert run.data.tags["failed_cell"] == "0/0" and words in run.data.tags["error"]
    assert gone(int((tmp_path / "pid").read_text()))
    assert all(c.metadata.papermill.status == "pending" for c in nbformat.read(e.value.notebook, 4).cells)


def test_killed_kernel_and_the_notebook_half_executed(project, client, tmp_path):
    seen, beats = {}, []

    def meanwhile():
        pid = kernel_of(tmp_path)["pid"]
        wait_for((tmp_path / "child").is_file)
        tags = client.get_run(seen["run_id"]).data.tags
        output = Path(tags["output"])
        text = wait_for(lambda: "acting" in output.read_text().replace('print(\\"acting', "") and output.read_text())
        seen["half"] = nbformat.reads(text, 4)
        wait_for(lambda: "Acting" in client.get_run(seen["run_id"]).data.tags["cell"])
        while len(set(beats)) < 3:
            beats.append(client.get_run(seen["run_id"]).data.tags["heartbeat"])
            time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        seen["killed"] = time.monotonic()

    thread = threading.Thread(target=meanwhile)
    with pytest.raises(RunError, match=r"signal 9 \(SIGKILL\)") as e:
        on_start = with_child(client, project, seen)
        execute("behave.ipynb", {"folder": str(tmp_path), "action": "sleep"}, project,
                on_start=lambda run_id: (on_start(run_id), thread.start()))
    took = time.monotonic() - seen["killed"]
    thread.join()
    assert took < 10, took
    assert e.value.ename == "KernelDied" and e.value.heading == "Acting"
    run = assert_ended(client, e.value.run_id, "FAILED", seen["children"])
    assert run.data.tags["failed_cell"] == "7/9 · Acting" and "SIGKILL" in run.data.tags["error"]
    assert gone(int((tmp_path / "child").read_text()))
    states = [c.metadata.papermill.status for c in seen["half"].cells]
    assert states == ["completed"] * 6 + ["running"] + ["pending"] * 2
    assert seen["half"].cells[6].outputs[0].text == "acting\n"


def test_kernel_that_exits(project, client, tmp_path):
    with pytest.raises(RunError, match="exit status 3") as e:
        execute("behave.ipynb", {"folder": str(tmp_path), "action": "exit"}, project)
    assert_ended(client, e.value.run_id, "FAILED")


def test_cancel_outside_the_main_thread(project, client, tmp_path):
    cancel, seen = threading.Event(), {}

    def work():
        try:
            execute("behave.ipynb", {"folder": str(tmp_path), "action": "sleep"}, project, cancel=cancel,
                    on_start=with_child(client, project, seen))
        except RunError as e:
            seen["error"] = e

    thread = threading.Thread(target=work)
    thread.start()
    wait_for((tmp_path / "child").is_file)
    assert reconcile(with_runs(project, heartbeat=1e-3)) == [], "a living runner's run is left alone"
    cancel.set()
    thread.join(20)
    assert isinstance(seen["error"], RunStopped) and seen["error"].reason == "cancel"
    assert_ended(client, seen["run_id"], "KILLED", seen["children"])
    assert gone(kernel_of(tmp_path)["pid"])


def test_a_handler_of_the_caller_hears_the_signal(project, client, tmp_path):
    heard = []
    old = signal.signal(signal.SIGTERM, lambda *_: heard.append("caller"))
    try:
        thread = threading.Thread(target=lambda: (wait_for((tmp_path / "child").is_file),
                                                  os.kill(os.getpid(), signal.SIGTERM)))
        thread.start()
        with pytest.raises(RunStopped) as e:
            execute("behave.ipynb", {"folder": str(tmp_path), "action": "sleep"}, project)
        thread.join()
        assert heard == ["caller"] and e.value.reason == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["caller"] * 2, "its handler is back"
    finally:
        signal.signal(signal.SIGTERM, old)
    assert_ended(client, e.value.run_id, "KILLED")


def test_signals_to_the_runner(runner, client):
    process, folders = runner
    for signum, folder in zip((signal.SIGINT, signal.SIGTERM), folders, strict=False):
        kernel = kernel_of(folder)
        child = int(wait_for(lambda f=folder: (f / "child").is_file() and (f / "child").read_text()))
        began = time.monotonic()
        process.send_signal(signum)
        kind, run_id, status, reason = process.stdout.readline().split()
        assert time.monotonic() - began < 15
        assert (kind, status, reason) == ("RunStopped", "KILLED", signum.name)
        run = assert_ended(client, run_id, "KILLED")
        assert run.data.tags["error"] == f"stopped: {signum.name}" and run.data.tags["failed_cell"] == "7/9 · Acting"
        assert gone(kernel["pid"]) and gone(child)


def test_killed_runner(runner, project, client):
    "Continues where the test of signals ended."
    process, folders = runner
    folder = folders[2]
    kernel = kernel_of(folder)
    wait_for((folder / "child").is_file)
    run, = (r for r in client.search_runs([experiment_id(client, project)], "attributes.status = 'RUNNING'")
            if r.data.params.get("folder") == str(folder))
    child = client.create_run(run.info.experiment_id, tags={"mlflow.parentRunId": run.info.run_id})
    wait_for(lambda: "Acting" in client.get_run(run.info.run_id).data.tags["cell"])
    process.kill()
    process.wait()
    wait_for(lambda: gone(kernel["pid"]), 10, "the kernel ends by itself")
    assert reconcile(project) == [run.info.run_id]
    ended = assert_ended(client, run.info.run_id, "FAILED", [child.info.run_id])
    assert ended.data.tags["failed_cell"].endswith("Acting") and ended.data.tags["error"] == "the runner died"
    assert reconcile(project) == []
    os.kill(int((folder / "child").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("age, stale", [(30, False), (3600, True)])
def test_a_runner_elsewhere_is_judged_by_its_silence(project, client, age, stale):
    from datetime import UTC, datetime, timedelta
    beat = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
    run = client.create_run(experiment_id(client, project), tags={
        "runner": "elsewhere pid:[1] 1 1", "heartbeat": beat, "cell": "1/2", "notebook": "x.ipynb"})
    try:
        assert (run.info.run_id in reconcile(project)) is stale
        assert client.get_run(run.info.run_id).info.status == ("FAILED" if stale else "RUNNING")
    finally:
        client.set_terminated(run.info.run_id, "FAILED")


@pytest.mark.parametrize("notebook, parameters, words", [
    ("behave.ipynb", {"folder": ".", "cuont": 1}, "did you mean 'count'"),
    ("behave.ipynb", {"folder": ".", "zzz": 1}, "'zzz'"),
    ("required.ipynb", {"share": 1}, "'folder' has no default"),
    ("behave.ipynb", {"folder": None}, "'folder' must be str"),
    ("behave.ipynb", {"folder": ".", "count": "3"}, r"'count' must be int \| None"),
    ("behave.ipynb", {"folder": ".", "count": 3.0}, "'count'"),
    ("behave.ipynb", {"folder": ".", "count": True}, "'count'"),
    ("behave.ipynb", {"folder": ".", "seconds": "1"}, "'seconds' must be float"),
    ("behave.ipynb", {"folder": ".", "words": "a"}, r"'words' must be list\[str\]"),
    ("behave.ipynb", {"folder": ".", "words": ["a", 1]}, "'words'"),
    ("behave.ipynb", {"folder": ".", "ratio": "half"}, "'ratio' must be float"),
    ("behave.ipynb", {"folder": ".", "limit": Path(".")}, "'limit' must be a plain value"),
    ("plain.ipynb", {}, "no cell is tagged `parameters`"),
    ("nowhere.ipynb", {}, "no such notebook"),
    (".", {}, "is a folder"),
    ("settings.ini", {}, "not a notebook"),
])
def test_refused_before_anything_starts(project, client, notebook, parameters, words):
    runs = len(client.search_runs([experiment_id(client, project)]))
    with pytest.raises(ParameterError, match=words) as e:
        execute(notebook, parameters, project)
    assert "\n" not in str(e.value)
    assert len(client.search_runs([experiment_id(client, project)])) == runs


def test_server_goes_away_and_comes_back(remote, server, tmp_path):
    "In the middle of a run; the end is told once it is back."
    done = {}

    def meanwhile():
        kernel_of(tmp_path)
        server.send(signal.SIGSTOP)
        wait_for(lambda: "output" in done and "closed" in done["output"].read_text().split('"outputs"')[-1])
        time.sleep(5)
        server.send(signal.SIGCONT)

    def on_start(run_id):
        done["output"] = Path(connect(remote).get_run(run_id).data.tags["output"])
        thread.start()

    thread = threading.Thread(target=meanwhile)
    run = execute("behave.ipynb", {"folder": str(tmp_path), "seconds": 1.0}, remote, on_start=on_start)
    thread.join()
    assert_ended(connect(remote), run.run_id, "FINISHED")


def test_server_goes_away_for_good(remote, server, tmp_path):
    began = {}

    def on_start(run_id):
        server.send(signal.SIGKILL)
        began["time"] = time.monotonic()

    with pytest.raises(RunUnrecorded, match="does not answer") as e:
        execute("behave.ipynb", {"folder": str(tmp_path)}, with_runs(remote, end_timeout=2), on_start=on_start)
    assert time.monotonic() - began["time"] < 30
    assert nbformat.read(e.value.notebook, 4).cells[-1].outputs, "the executed notebook is kept"
    assert str(e.value.notebook) in str(e.value)
