"""A project folder like ours with its own state, and the command line in it."""
import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from helpers import ROOT, free_port


def set_up(folder):
    "Our settings and data, in a folder of their own."
    (folder / "data").mkdir()
    for name in ("adult.train.csv", "adult.test.csv"):
        os.link(ROOT / "data" / name, folder / "data" / name) if _same_device(folder) else \
            shutil.copy(ROOT / "data" / name, folder / "data" / name)
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


def small(root):
    "Use the first 3,000 rows: for what does not depend on how many there are."
    for name in ("adult.train.csv", "adult.test.csv"):
        lines = (root / "data" / name).read_text().splitlines(keepends=True)[:3001]
        (root / "data" / name).unlink()
        (root / "data" / name).write_text("".join(lines))
    return root


def _same_device(folder):
    return folder.stat().st_dev == (ROOT / "data").stat().st_dev


def command(root, *words, env=None, code=0):
    "Run the command line in a project; its output."
    done = subprocess.run([sys.executable, "-m", "income_mlops.cli", *words], cwd=root, capture_output=True, text=True,
                          env={**os.environ, **(env or {})})
    assert done.returncode == code, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def children_of(pid):
    "Command lines of all descendants of a process, by process id."
    found, parents = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                line = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # ended meanwhile
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1]), line
    def below(parent):
        for child, (of, line) in parents.items():
            if of == parent and child not in found:
                found[child] = line
                below(child)
    below(pid)
    return found


@contextlib.contextmanager
def running(root, words, health, seconds=180):
    "A service in a process of its own, once its health page answers; ended afterwards."
    with (root / "service.log").open("a") as log:
        process = subprocess.Popen([sys.executable, "-m", *words], cwd=root, stdout=log, stderr=log,
                                   env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    try:
        deadline = time.monotonic() + seconds
        while not answers(health):
            assert process.poll() is None and time.monotonic() < deadline, (root / "service.log").read_text()[-3000:]
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url):
    "Whether the page is there (not 503)."
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def mlflow_server(root):
    "A real MLflow server for the project, which its settings name."
    port = free_port()
    settings = (root / "settings.ini").read_text()
    assert settings.count('tracking_uri = ""') == 1
    (root / "settings.ini").write_text(settings.replace('tracking_uri = ""', f"tracking_uri = http://127.0.0.1:{port}"))
    words = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{root}/server.db",
             "--artifacts-destination", f"{root}/server-artifacts"]
    with running(root, words, f"http://127.0.0.1:{port}/health"):
        yield
