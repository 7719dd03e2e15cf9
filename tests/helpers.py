"""What tests of every area need: a free port, and to wait for something without waiting for ever."""
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    "A port of this machine that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float = 60, what: str = "") -> Any:
    "The first true answer of `condition`, asked again and again; a service that is not there yet is no answer."
    end = time.monotonic() + seconds
    while True:
        try:
            if answer := condition():
                return answer
        except httpx.TransportError:
            pass
        assert time.monotonic() < end, f"waited {seconds} s for {what or condition}"
        time.sleep(0.05)
