"""Requests at a constant rate, whatever the server does: an open loop, as users are.

A closed loop, which sends the next request when the last one is answered, stops sending just when the server is slow
and never sees what users would have waited for. Here every request has its moment, and its latency counts from that
moment, also where it could be sent only later. One thread sends, one receives, on as many connections as it takes.
"""
import http.client
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Window:
    "What came of the requests of some seconds."
    latencies: list[float] = field(default_factory=list)
    "Seconds from the moment a request was due to its whole answer, in no order."
    late: list[float] = field(default_factory=list)
    "Seconds by which requests were sent later than due: the generator's own share."
    failed: list[str] = field(default_factory=list)

    def quantile(self, q: float, values: Sequence[float] | None = None) -> float:
        "In milliseconds."
        ordered = sorted(self.latencies if values is None else values)
        return 1000 * ordered[min(int(q * len(ordered)), len(ordered) - 1)]


class _Connection:
    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due, self.read = 0.0, b""

    def answer(self) -> bytes | None:
        "The status and body read so far, if that is a whole answer."
        head, gap, body = self.read.partition(b"\r\n\r\n")
        if not gap:
            return None
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
        return head[9:12] + body if len(body) >= length else None


def steady(
    port: int,
    bodies: Sequence[bytes],  # JSON, sent in turn
    rate: float,  # requests a second
    seconds: float,
    path: str = "/predict",
    patience: float = 10,  # seconds that the last answers may take
) -> Window:
    "Send at a constant rate and wait for every answer."
    made = [b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (path.encode(), len(b)) + b for b in bodies]
    window, total = Window(), int(rate * seconds)
    free: deque[_Connection] = deque(_Connection(port) for _ in range(8))
    busy: dict[int, _Connection] = {}
    poll, sending = select.epoll(), threading.Event()

    def receive() -> None:
        while not sending.is_set() or busy:
            for number, _ in poll.poll(0.05):
                now, connection = time.perf_counter(), busy.get(number)
                data = connection.socket.recv(65536) if connection else b""
                if not connection:
                    continue
                connection.read += data
                if not data:
                    window.failed.append("the connection was closed")
                elif (whole := connection.answer()) is None:
                    continue
                elif whole[:3] != b"200":
                    window.failed.append(whole.decode()[:200])
                else:
                    window.latencies.append(now - connection.due)
                del busy[number]
                poll.unregister(number)
                if data:
                    connection.read = b""
                    free.append(connection)
            if sending.is_set() and time.perf_counter() > end + patience:
                window.failed += ["no answer"] * len(busy)
                busy.clear()

    start = time.perf_counter() + 0.05
    end = start + total / rate
    receiver = threading.Thread(target=receive)
    receiver.start()
    for i in range(total):
        due = start + i / rate
        if (pause := due - time.perf_counter()) > 0:
            time.sleep(pause)
        try:
            connection = free.popleft() if free else _Connection(port)
            connection.due = due
            busy[connection.socket.fileno()] = connection
            poll.register(connection.socket.fileno(), select.EPOLLIN)
            window.late.append(time.perf_counter() - due)
            connection.socket.sendall(made[i % len(made)])
        except OSError as e:
            window.failed.append(str(e))
    sending.set()
    receiver.join()
    poll.close()
    for connection in free:
        connection.socket.close()
    return window


def scheduling(pid: int | None = None) -> str:
    "The scheduling class and nice value of a process, in words."
    names = {os.SCHED_OTHER: "SCHED_OTHER", os.SCHED_BATCH: "SCHED_BATCH", os.SCHED_IDLE: "SCHED_IDLE"}
    return f"{names.get(os.sched_getscheduler(pid or 0), '?')}, nice {os.getpriority(os.PRIO_PROCESS, pid or 0)}"


def is_ready(port: int) -> bool:
    "Whether the API has a model."
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
