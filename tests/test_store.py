"""MLflow's SQLite file is there as a whole or not at all."""
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from gateway_helpers import Program
from intake_helpers import make_project

from income_mlops.store import file_of

ASK = """from income_mlops.settings import load_settings
from income_mlops.tracking import connect
print([e.name for e in connect(load_settings("settings.ini")).search_experiments()])
"""


def asker(folder: Path) -> subprocess.Popen[str]:
    """A program that asks MLflow for its experiments, over what it may have to make first."""
    return subprocess.Popen([sys.executable, "-c", ASK], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def holds_it_whole(program: subprocess.Popen[str]) -> None:
    said, _ = program.communicate(timeout=120)
    assert program.returncode == 0 and said.splitlines()[-1] == "['Default']", said


def tables(file: Path) -> int:
    """How many it has; none if it is not there."""
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as c:
            return int(c.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


@pytest.mark.full
def test_a_server_that_is_killed_while_it_makes_it_and_then_several_at_once(tmp_path, free_port):
    port = free_port()
    file = file_of(make_project(tmp_path, rows=10, mlflow={"port": port}))
    half = file.with_name(f".{file.name}.new")

    servers: list[Program] = []

    def start() -> Program:
        servers.append(Program("mlflow", [sys.executable, "-m", "income_mlops.mlserver"], tmp_path))
        return servers[-1]
    try:
        first = start()
        while tables(half) < 20:  # of more than sixty
            assert first.process.poll() is None and not file.exists(), first.log.read_text()
            time.sleep(0.002)
        first.stop(signal.SIGKILL)
        assert half.exists() and not file.exists(), "it was not killed in the middle"

        second = start()
        for other in [asker(tmp_path), asker(tmp_path)]:
            holds_it_whole(other)
        second.wait(f"http://127.0.0.1:{port}/health")
        found = httpx.post(f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search", json={"max_results": 9})
        assert [e["name"] for e in found.json()["experiments"]] == ["Default"]
        assert not half.exists()
    finally:
        for server in servers:
            server.stop()
