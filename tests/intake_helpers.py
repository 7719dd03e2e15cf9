"""The service with its intake in a process of its own, over a project of some real rows."""

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from income_mlops import uploads
from income_mlops.access import api_key
from income_mlops.settings import Settings, load_settings

PROJECT = Path(__file__).parent.parent
LINES = (PROJECT / "data" / "adult.train.csv").read_text().splitlines()
HEADER = LINES[0]


def csv(rows: list[str]) -> bytes:
    return ("\n".join([HEADER, *rows]) + "\n").encode()


def fresh(seed: int, n: int = 300) -> bytes:
    """Rows that no other seed has: real ones with another weight."""
    rows = [LINES[1 + (seed * 37 + i) % 32_000].split(",") for i in range(n)]
    return csv([",".join([r[0], r[1], str(1_000_000 + seed), *r[3:]]) for r in rows])


def make_project(folder: Path, rows: int = 2000, state: Path | None = None, **sections: dict[str, Any]) -> Settings:
    """A project whose original data are the first real rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "origin.csv").write_bytes(csv(LINES[1:rows + 1]))
    sections["mlflow"] = {"experiment_name": "adult-income", **sections.get("mlflow", {})}
    more = "\n".join(f"[{s}]\n" + "\n".join(f"{k} = {v}" for k, v in keys.items()) for s, keys in sections.items())
    (folder / "settings.ini").write_text(f"""
[paths]
state = {state or "var"}
[dataset]
origin_path = origin.csv
[[columns]]
target = income
positive = ">50K"
ignored = fnlwgt
{more}
""")
    return load_settings(folder / "settings.ini")


CODE = """import resource, sys
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
from income_mlops.intake import part
from income_mlops.serving import serve
from income_mlops.settings import load_settings
exec(sys.argv[3])
serve(load_settings(sys.argv[1]), 0, [part])
"""


class IntakeApi:
    """The service, spoken to over HTTP; it is killed at the end if it has not been stopped."""

    def __init__(self, settings: Settings, file_limit: int = 0, fault: str = ""):  # fault: code that it runs first
        self.settings = settings
        self.log = settings.root / "api.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CODE, str(settings.root / "settings.ini"), str(file_limit), fault],
                stdout=subprocess.PIPE, stderr=log, text=True, cwd=settings.root)
        line = self.process.stdout.readline()
        assert line.startswith("API: "), self.log.read_text()
        self.url = line.removeprefix("API: ").strip()
        self.key = {"X-API-Key": api_key(settings)}
        self.http = httpx.Client(base_url=self.url, timeout=120, headers=self.key)

    def send(self, data: bytes, name: str = "new.csv", query: str = "", **options: Any) -> httpx.Response:
        return self.http.post(f"/upload_data{query}", files={"file": (name, data)}, **options)

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def clear(self) -> None:
        """Cancel every job, delete every upload."""
        for job in self.get("/jobs?limit=1000"):
            self.http.delete(f"/jobs/{job['id']}").raise_for_status()
        for upload in self.get("/uploads"):
            self.http.delete(f"/uploads/{upload['id']}").raise_for_status()

    def memory(self) -> float:
        """Megabytes in use."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))) / 1024

    def stop(self, how: int = signal.SIGTERM) -> float:
        start = time.monotonic()
        self.process.send_signal(how)
        self.process.wait(20)
        self.process.stdout.close()
        self.http.close()
        return time.monotonic() - start

    def __enter__(self) -> "IntakeApi":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)


def store(settings: Settings) -> Path:
    return settings.state / "uploads" / "adult-income"


def remains(settings: Settings) -> list[str]:
    """What is in the store beside what belongs there: uploads, records of deletions, the lock."""
    found = []
    for entry in store(settings).iterdir() if store(settings).is_dir() else []:
        if entry.name.startswith(".") and entry.name not in (".lock", ".deleted"):
            found.append(entry.name)
        elif not entry.name.startswith(".") and sorted(f.name for f in entry.iterdir()) != [
                "data.parquet", "jobs", "manifest.json"]:
            found.append(f"{entry.name}: {sorted(f.name for f in entry.iterdir())}")
    return found


def check_uploads(settings: Settings) -> set[str]:
    """Every upload is whole: its rows are those of its name. The ids."""
    import polars as pl

    from income_mlops.data import digest
    found = set()
    for upload in uploads.listed(settings):
        table = pl.read_parquet(upload.path)
        assert table.height == upload.rows and digest(table) == upload.id == upload.folder.name
        found.add(upload.id)
    return found


def check_queue(settings: Settings) -> None:
    if (file := settings.state / "jobs.db").exists():
        with sqlite3.connect(file) as c:
            assert c.execute("PRAGMA integrity_check").fetchone() == ("ok",)
