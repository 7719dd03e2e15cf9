"""What holds for every test: a clean environment, no network, and in CI no skipping."""
import ipaddress
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest

ROOT = Path(__file__).parent.parent

# Settings of the person's shell must not change what is tested.
for name in [n for n in os.environ if n.startswith(("DYNACONF_", "INCOME_MLOPS_", "MLFLOW_"))]:
    del os.environ[name]
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "YDATA_PROFILING_NO_ANALYTICS": "true",
               "GIT_PYTHON_REFRESH": "quiet", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MPLBACKEND": "agg"}


def _only_this_machine(event: str, args: tuple[Any, ...]) -> None:
    "An audit hook: a test that reaches for the network fails, whichever library tries."
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = str(args[1][0]).split("%")[0]
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise ConnectionRefusedError(f"tests do not use the network, but something connects to {args[1]}")


sys.addaudithook(_only_this_machine)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    "With CI=true everything a test needs must be there: a skip is a failure."
    outcome = yield
    report = outcome.get_result()
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"skipped, which CI does not allow: {reason}"


@pytest.fixture
def free_port() -> Callable[[], int]:
    "A function that finds a port nobody listens on."
    return helpers.free_port


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., Path]:
    "A function that makes a project folder: our settings.ini, links to our data, its own state folder."
    def make(*replacements: tuple[str, str]) -> Path:
        folder = tmp_path / "project"
        folder.mkdir(exist_ok=True)
        text = (ROOT / "settings.ini").read_text()
        for old, new in replacements:
            assert old in text, f"settings.ini has no {old!r}"
            text = text.replace(old, new, 1)
        (folder / "settings.ini").write_text(text)
        if not (folder / "data").exists():
            (folder / "data").symlink_to(ROOT / "data")
        return folder
    return make
