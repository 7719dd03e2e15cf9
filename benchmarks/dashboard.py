"""What a visitor of the dashboard waits for, and what one costs. Needs Chromium.

1. From the click to a page that is ready, which is when the probability of its row stands there: with a kernel that was
   kept ready, and without (`dashboard.preheated_kernels = 0`). A new browser session for every visit, so nothing is in
   its cache; a visit begins when the kernel that replaces the last one's has come to rest.
2. Memory: what a visitor's kernel has of its own (USS) and with its share of libraries (PSS), and Voila itself.

Everything is on this machine: the API with a model, Voila, and the browser, which needs a good part of the time.
"""
import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from _fitted import fit, project, register_all, requests
from serving import free_port, our_api, running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


def answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310
        return bool(answer.status == 200)
    return False


class Dashboard:
    "Voila in a process of its own."

    def __init__(self, settings: Any, api: str, kernels: int):
        self.port, self.kernels = free_port(), kernels
        self.url = f"http://127.0.0.1:{self.port}{settings.dashboard.base_url}"
        self.log = (settings.root / f"dashboard-{kernels}.log").open("w")
        self.process = psutil.Popen(
            [sys.executable, "-m", "income_mlops.cli", "dashboard"], cwd=settings.root, stdout=self.log,
            stderr=self.log, env={**os.environ, "DYNACONF_DASHBOARD__PORT": str(self.port),
                                  "DYNACONF_DASHBOARD__PREHEATED_KERNELS": str(kernels), "DYNACONF_BACKEND_URL": api})

    def processes(self) -> list[psutil.Process]:
        "The kernels."
        return [p for p in self.process.children() if "ipykernel" in " ".join(p.cmdline())]

    def rest(self) -> None:
        "Wait until it is there and its kernels do nothing any more."
        while not answers(f"{self.url}voila/static/voila.js"):
            assert self.process.poll() is None, f"the dashboard ended; see {self.log.name}"
            time.sleep(0.2)
        quiet = 0
        while quiet < 5:  # longer than Voila waits before it starts the next kernel
            before = self._used()
            time.sleep(1)
            quiet = quiet + 1 if self._used() - before < 0.1 and len(self.processes()) >= self.kernels else 0

    def _used(self) -> float:
        return sum(sum(p.cpu_times()[:2]) for p in (self.process, *self.processes()))

    def stop(self) -> None:
        for p in (*self.processes(), self.process):
            p.kill()
        self.process.wait()
        self.log.close()


@contextmanager
def dashboard(settings: Any, api: str, kernels: int) -> Any:
    made = Dashboard(settings, api, kernels)
    try:
        yield made
    finally:
        made.stop()


def visit(browser: Any, url: str) -> tuple[float, Any]:
    "Seconds until the page is ready, and the page."
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    start = time.perf_counter()
    page.goto(url)
    # looked at with every frame; `wait_for_selector` looks every half second
    page.wait_for_function("document.querySelector('[data-probability]')", timeout=120_000)
    return time.perf_counter() - start, page


def ready(browser: Any, there: Dashboard, visits: int) -> list[float]:
    "Seconds of each visit."
    found = []
    for _ in range(visits):
        there.rest()
        seconds, page = visit(browser, there.url)
        found.append(seconds)
        page.context.close()
    return found


def memory(browser: Any, there: Dashboard, visitors: int) -> list[tuple[str, float, float]]:
    "Name, MB of its own and MB with its share of what is used by several, for Voila and the mean visitor."
    there.rest()
    before = {p.pid for p in there.processes()}
    for _ in range(visitors):
        visit(browser, there.url)
        there.rest()
    # those kept ready serve the first visits; as many new ones wait afterwards
    kernels = sorted(there.processes(), key=lambda p: p.create_time())[:visitors]
    assert len(there.processes()) >= len(before) + visitors
    told = [p.memory_full_info() for p in kernels]
    own = there.process.memory_full_info()
    mb = 2**20
    return [("Voila", own.uss / mb, own.pss / mb),
            ("a visitor", statistics.mean(t.uss for t in told) / mb, statistics.mean(t.pss for t in told) / mb)]


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--visits", type=int, default=7)
    words.add_argument("--visitors", type=int, default=3, help="open at once while memory is read")
    given = words.parse_args()
    if not CHROMIUM:
        sys.exit("Chromium is not installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright
    with tempfile.TemporaryDirectory() as d, sync_playwright() as playwright:
        port = free_port()
        settings = project(Path(d) / "project")
        (settings.root / "nbs").symlink_to(Path(__file__).parent.parent / "nbs")
        dataset, fitted = fit(settings)
        register_all(settings, dataset, fitted)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        api = f"http://127.0.0.1:{port}"
        body = json.dumps({"data": requests(dataset, 1)[0]}).encode()
        with running(our_api(settings, port), port, "/predict", body):
            for kernels, name in ((1, "kept ready"), (0, "cold")):
                with dashboard(settings, api, kernels) as there:
                    before, seconds = load(), ready(browser, there, given.visits)
                    print(f"ready, {name:10}  median {statistics.median(seconds):.2f} s, "
                          f"from {min(seconds):.2f} to {max(seconds):.2f} in {given.visits} visits ({before})")
            with dashboard(settings, api, 1) as there:
                for who, uss, pss in memory(browser, there, given.visitors):
                    print(f"memory, {who:10} {uss:4.0f} MB of its own, {pss:4.0f} MB with its share of libraries")
        browser.close()


if __name__ == "__main__":
    main()
