"""The real services on loopback, each under its prefix, behind a real nginx with the configuration that is shipped."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from helpers import wait_for
from training_helpers import free_port

ROOT = Path(__file__).parent.parent
START = ROOT / "docker" / "nginx" / "start"
PATH = os.environ["PATH"] + os.pathsep + "/usr/sbin"
WITHOUT_NGINX = shutil.which("nginx", path=PATH) is None
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


def status(url: str) -> int:
    "The status of a page; 0 while nobody answers."
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as e:
        return e.code
    except OSError:
        return 0


class Program:
    "A program that runs until it is stopped; what it says is in a file."

    def __init__(self, name: str, command: list[str], folder: Path, **env: str):
        self.name, self.log = name, folder / f"{name}.log"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                            env={**os.environ, **env}, start_new_session=True)

    def wait(self, url: str, seconds: float = 120) -> None:
        def up() -> bool:
            assert self.process.poll() is None, f"{self.name} ended: {self.log.read_text()[-2000:]}"
            return status(url) == 200
        wait_for(up, seconds, f"{self.name}, {self.log.read_text()[-2000:]}")

    def stop(self, how: int = signal.SIGTERM, seconds: float = 15) -> float:
        "Seconds it took to end."
        start = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # kernels and the like
        return time.monotonic() - start


class Gateway(Program):
    "nginx as `docker/nginx/start` starts it."

    def __init__(self, folder: Path, name: str = "gateway", **env: object):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.run = Path(tempfile.mkdtemp(prefix="gateway"))
        self.run.chmod(0o711)  # started by root, it works as nobody, who keeps large answers there
        away = {n: f"127.0.0.1:{free_port()}" for n in ("API", "FRONTEND", "MLFLOW", "DOCS")}
        super().__init__(name, [str(START)], folder, **{
            **away, "LISTEN": f"127.0.0.1:{self.port}", "RUN": str(self.run), "WORKERS": "1",
            **{k: str(v) for k, v in env.items()}})
        self.wait(self.url + "/health", 10)

    def lines(self) -> list[dict]:
        "The access log."
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def stop(self, how: int = signal.SIGQUIT, seconds: float = 15) -> float:
        took = super().stop(how, seconds)
        shutil.rmtree(self.run, ignore_errors=True)
        return took


def book_server(folder: Path, book: Path, port: int) -> Program:
    "nginx as the image of the book starts it; only where it listens and where its files are is of this machine."
    conf, text = folder / "book.conf", (ROOT / "docker/docs/nginx.conf").read_text()
    for there, here in (("/tmp/", f"{folder}/book-"), ("listen 8000 ", f"listen 127.0.0.1:{port} "),
                        ("root /site;", f"root {book};")):
        assert there in text
        text = text.replace(there, here)
    conf.write_text(text)
    return Program("book", ["nginx", "-e", "stderr", "-c", str(conf)], folder, PATH=PATH)


def small_project(folder: Path, rows: int = 3000) -> Path:
    "Our settings, and the first rows of our data: trained in seconds."
    (folder / "data").mkdir(parents=True)
    for name in ("adult.train.csv", "adult.test.csv"):
        with (ROOT / "data" / name).open() as f:
            (folder / "data" / name).write_text("".join(line for line, _ in zip(f, range(rows + 1), strict=False)))
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


class System:
    "MLflow, the API, the dashboard and the book, each on a port of its own, and the gateway before them."

    def __init__(self, folder: Path, book: Path | None = None, store: str = "", **env: str):
        "`store`: MLflow's database; `env`: for every service beside what they all need."
        self.folder = small_project(folder / "project")
        ports = {name: free_port() for name in ("MLFLOW", "API", "FRONTEND", "DOCS")}
        self.gateway = Gateway(self.folder, **{name: f"127.0.0.1:{port}" for name, port in ports.items()},
                               RATE=1000, BURST=1000, PAGE_BURST=100)
        self.url = self.gateway.url
        self.env = {
            "DYNACONF_MLFLOW__STATIC_PREFIX": "/mlflow", "DYNACONF_MLFLOW__SERVE_ARTIFACTS": "true",
            "DYNACONF_MLFLOW__PORT": str(ports["MLFLOW"]), "DYNACONF_SERVING__PORT": str(ports["API"]),
            "DYNACONF_SERVING__ROOT_PATH": "/api", "DYNACONF_DASHBOARD__PORT": str(ports["FRONTEND"]),
            "DYNACONF_DASHBOARD__BASE_URL": "/frontend/", "DYNACONF_DASHBOARD__MLFLOW_URL": f"{self.url}/mlflow",
            "DYNACONF_BACKEND_URL": f"{self.url}/api", "DYNACONF_SERVING__FOLLOW_EVERY": "0.3",
            # everybody but the server itself finds it through the gateway
            "DYNACONF_MLFLOW__TRACKING_URI": f"{self.url}/mlflow", "NO_PROXY": "127.0.0.1,localhost", **env}
        self.programs = [self.gateway]
        self.mlflow = self.start("mlflow", ["-m", "income_mlops.mlserver"], DYNACONF_MLFLOW__TRACKING_URI=store)
        self.api = self.start("api", ["-m", "income_mlops.cli", "serve", "--no-worker"])
        if book:
            self.programs.append(book_server(self.folder, book, ports["DOCS"]))
        self.dashboard = self.start("dashboard", [
            "-c", "from income_mlops.dashboard import serve; from income_mlops.settings import load_settings; "
                  "serve(load_settings())"])
        self.mlflow.wait(f"{self.url}/mlflow/health", 180)
        self.api.wait(f"{self.url}/api/health")

    def start(self, name: str, words: list[str], **env: str) -> Program:
        self.programs.append(Program(name, [sys.executable, *words], self.folder, **{**self.env, **env}))
        return self.programs[-1]

    def command(self, *words: str) -> str:
        "The command line, as a user of this system."
        done = subprocess.run([sys.executable, "-m", "income_mlops.cli", *words], cwd=self.folder, capture_output=True,
                              text=True, env={**os.environ, **self.env})
        assert done.returncode == 0, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @property
    def key(self) -> str:
        return (self.folder / "var" / "api_key").read_text().strip()

    def stop(self) -> None:
        for program in reversed(self.programs):
            program.stop(seconds=30)


@contextlib.contextmanager
def browser(*names: str) -> Iterator:
    "Chromium, for which the world ends at this machine, which goes by `names`, too."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--host-resolver-rules=" + "".join(f"MAP {n} 127.0.0.1, " for n in names)
            + "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"])
        try:
            yield chromium
        finally:
            chromium.close()


class Page:
    "A page of a browser, with every complaint it has: errors of scripts, failed requests, requests to elsewhere."

    def __init__(self, chromium, home: str, **context: object):
        self.context = chromium.new_context(**context)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda e: self.problems.append(f"script: {e}"))
        self.page.on("console", self._said)
        self.page.on("requestfailed", self._failed)
        self.page.on("response", lambda r: r.status >= 400 and self.problems.append(f"{r.status} {r.url}"))
        here = (home, home.replace("http", "ws"), "data:", "blob:", "about:")
        self.page.on("request", lambda r: r.url.startswith(here) or self.problems.append(f"elsewhere: {r.url}"))

    def _said(self, message) -> None:
        # Resize Observer (CSSWG), 3.4.6: what did not fit into this frame is delivered in the next; nothing is lost
        if message.type == "error" and "ResizeObserver loop completed" not in message.text:
            self.problems.append(f"console: {message.text}")

    def _failed(self, request) -> None:
        if "ERR_ABORTED" not in str(request.failure):  # the page was left
            self.problems.append(f"failed: {request.url} {request.failure}")
