"""What a prediction over HTTP costs, side by side with what else people would do. Needs `wrk`.

1. One row a request, one worker, 16 connections: our `/predict` with each family; a FastAPI endpoint that validates the
   same body with pydantic and returns a constant (no model at all); `mlflow models serve` of the same models.
2. 1,000 rows a request, 4 connections: rows per second of our `/predict` and of the pipeline called in this process.
3. From the start of the process to the first prediction, and the memory of one worker.
4. 200 changes of the served model while 16 connections predict: every answer is one of the two models' own.

All of a part take turns, several times; medians and ratios of medians are shown.
"""
import argparse
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from _fitted import fit, project, register_all, requests

from income_mlops.processing import to_frame

FAMILIES = ("XGBoost", "RandomForest")


Server = subprocess.Popen[bytes]


# ── servers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def constant_endpoint(schema_file: str, port: int) -> None:
    "FastAPI with pydantic and a constant answer, on uvicorn with uvloop and httptools, without an access log."
    import uvicorn
    from fastapi import FastAPI
    from pydantic import ConfigDict, Field, create_model

    from income_mlops.data import Schema
    schema = Schema.model_validate_json(Path(schema_file).read_text())
    fields: Any = {f"f{i}": ((float if c.kind == "number" else str) | None, Field(alias=c.name))
                   for i, c in enumerate(schema.features)}
    row: Any = create_model("Row", __config__=ConfigDict(extra="forbid"), **fields)
    body: Any = create_model("Body", data=(row, ...))
    app = FastAPI()

    async def predict(request: Any) -> dict[str, Any]:
        return {"prediction": "<=50K", "probability": 0.1, "model_name": "constant", "model_version": 1}
    predict.__annotations__["request"] = body
    app.post("/predict")(predict)
    uvicorn.run(app, port=port, access_log=False, log_level="error")


def free_port() -> int:
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def post(port: int, path: str, body: bytes, key: str = "") -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body,
                                     {"Content-Type": "application/json", "X-API-Key": key})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            return reply.status, reply.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()
    except OSError:
        return 0, b""


@contextmanager
def running(command: list[str], port: int, path: str, body: bytes, **env: str) -> Iterator[tuple[Server, float]]:
    "A server of its own, from its first good answer on; and the seconds until then."
    log = tempfile.TemporaryFile()  # noqa: SIM115
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **env}, start_new_session=True)
    try:
        while post(port, path, body)[0] != 200:
            if process.poll() is not None or time.perf_counter() - start > 120:
                log.seek(0)
                raise SystemExit(f"{' '.join(command)} does not answer:\n{log.read().decode()[-2000:]}")
            time.sleep(0.005)
        yield process, time.perf_counter() - start
    finally:
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(process.pid, 15)
        process.wait(20)


def our_api(settings: Any, port: int) -> list[str]:
    code = "import sys; from income_mlops.serving import serve; from income_mlops.settings import load_settings; " \
           f"serve(load_settings(sys.argv[1]), {port})"
    return [sys.executable, "-c", code, str(settings.root / "settings.ini")]


# ── measures ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def wrk(port: int, path: str, body: bytes, seconds: float, folder: Path) -> dict[str, float]:
    "Requests per second, p50 and p99 in milliseconds. An answer that is not 2xx ends the benchmark."
    (folder / "post.lua").write_text(f"wrk.method = 'POST'\nwrk.body = [==[{body.decode()}]==]\n"
                                     "wrk.headers['Content-Type'] = 'application/json'\n")
    said = subprocess.run(["wrk", "-t1", "-c16", f"-d{seconds:g}s", "--latency", "-s", str(folder / "post.lua"),
                           f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said:
        raise SystemExit(f"not every answer was good:\n{said}")

    def ms(percent: str) -> float:
        value, unit = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s)", said).groups()  # type: ignore[union-attr]
        return float(value) * {"us": 0.001, "ms": 1, "s": 1000}[unit]
    return {"rps": float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1]), "p50": ms("50"), "p99": ms("99")}  # type: ignore[index]


def rows_per_second(port: int, bodies: list[bytes], seconds: float, connections: int = 4) -> float:
    "Rows per second with 1,000 rows a request."
    done, end = [0] * connections, time.perf_counter() + seconds

    def client(i: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.perf_counter() < end:
            connection.request("POST", "/predict", bodies[(done[i] + i) % len(bodies)])
            reply = connection.getresponse()
            reply.read()
            if reply.status != 200:
                raise SystemExit(f"a batch was answered with {reply.status}")
            done[i] += 1
    start = time.perf_counter()
    threads = [threading.Thread(target=client, args=(i,)) for i in range(connections)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return sum(done) * 1000 / (time.perf_counter() - start)


def memory(process: Server) -> float:
    "MB that a server and its children hold."
    import psutil
    parent = psutil.Process(process.pid)
    return sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]) / 2**20


def processor_seconds(process: Server) -> float:
    "That a server has used so far."
    import psutil
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def median(values: list[float]) -> float:
    return statistics.median(values)


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def single_rows(ports: dict[str, tuple[int, str, bytes]], rounds: int, seconds: float, folder: Path) -> None:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
    for _ in range(rounds):
        for name, (port, path, body) in ports.items():
            found[name].append(wrk(port, path, body, seconds, folder))
    middle = {n: {k: median([f[k] for f in v]) for k in v[0]} for n, v in found.items()}
    base = middle["FastAPI + pydantic, constant"]["rps"]
    print(f"\n1. One row a request, one worker, wrk -c16, median of {rounds} × {seconds:g} s")
    print(f"{'':36}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'× constant':>12}{'× mlflow':>10}")
    for name, m in middle.items():
        other = middle.get(f"mlflow models serve {name.split()[-1]}") if name.startswith("/") else None
        times = f"{m['rps'] / other['rps']:10.1f}" if other else ""
        print(f"{name:36}{m['rps']:12,.0f}{m['p50']:9.2f}{m['p99']:9.2f}{m['rps'] / base:12.2f}{times}")


def show_memory(processes: dict[str, Server]) -> None:
    "After the same load: one worker each."
    used = {name: memory(process) for name, process in processes.items()}
    print("\nMemory of one worker after that, MB:")
    for name, mb in used.items():
        other = used.get(f"mlflow models serve {name.split()[-1]}") if name.startswith("/") else None
        print(f"{name:36}{mb:8.0f}" + (f"   {other / mb:.1f} × less than mlflow models serve" if other else ""))


def batches(ports: dict[str, int], servers: dict[str, Server], pipelines: dict[str, Any], dataset: Any, rounds: int,
            seconds: float) -> None:
    rows = requests(dataset, 8000)
    bodies = [json.dumps({"data": rows[i:i + 1000]}).encode() for i in range(0, 8000, 1000)]
    frame = to_frame(dataset.holdout, dataset.schema)
    print(f"\n2. Rows per second, 1,000 rows a request, 4 connections, one worker, median of {rounds} rounds, against "
          f"the pipeline\n   as registered (n_jobs = {pipelines[FAMILIES[1]][-1].n_jobs}) and called with frames of "
          "1,000 rows; in brackets processor time, ms for 1,000 rows")
    print(f"{'':16}{'over HTTP':>22}{'pipeline in process':>22}{'ratio':>8}{'by processor time':>20}")
    for family, port in ports.items():
        ours, theirs, own, their = [], [], [], []
        for r in range(rounds):
            before = processor_seconds(servers[family])
            start = time.perf_counter()
            ours.append(rows_per_second(port, bodies, seconds))
            rows_done = ours[-1] * (time.perf_counter() - start)
            own.append(1e6 * (processor_seconds(servers[family]) - before) / rows_done)
            start, used, n = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - start < seconds:
                at = 1000 * ((n + r) % 8)
                pipelines[family].predict_proba(frame.iloc[at:at + 1000])
                n += 1
            theirs.append(n * 1000 / (time.perf_counter() - start))
            their.append(1e3 * (time.process_time() - used) / n)
        print(f"{family:16}{f'{median(ours):,.0f} ({median(own):.1f})':>22}"
              f"{f'{median(theirs):,.0f} ({median(their):.1f})':>22}{median(ours) / median(theirs):8.2f}"
              f"{median(their) / median(own):20.2f}", flush=True)


def starts(settings: dict[str, Any], body: bytes, rounds: int) -> None:
    print(f"\n3. From the start of the process to the first prediction, median of {rounds}, model in the state folder")
    for family, s in settings.items():
        times = []
        for _ in range(rounds):
            port = free_port()
            with running(our_api(s, port), port, "/predict", body) as (process, seconds):
                times.append(seconds)
                used = memory(process)
        print(f"{family:16}{median(times):8.2f} s   {used:6.0f} MB at the first prediction")


def swaps(settings: Any, port: int, key: str, dataset: Any, pipelines: dict[str, Any], times: int) -> None:
    "Change the served model while 16 connections predict."
    rows = requests(dataset, 200)
    frame = to_frame(dataset.holdout, dataset.schema).head(200)
    prefix = settings.mlflow.experiment_name
    expected = {f"{prefix}.{f}": p.predict_proba(frame)[:, 1].tolist() for f, p in pipelines.items()}
    bodies = [json.dumps({"data": row}).encode() for row in rows]
    stop, seen, wrong = threading.Event(), dict.fromkeys(expected, 0), []

    def client(i: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while not stop.is_set():
            i = (i + 1) % 200
            connection.request("POST", "/predict", bodies[i])
            reply = connection.getresponse()
            answer = json.loads(reply.read())
            if reply.status != 200 or abs(answer["probability"] - expected[answer["model_name"]][i]) > 1e-6:
                wrong.append((reply.status, answer))
                return
            seen[answer["model_name"]] += 1
    threads = [threading.Thread(target=client, args=(12 * i,)) for i in range(16)]
    for t in threads:
        t.start()
    start = time.perf_counter()
    for n in range(times):
        status, said = post(port, "/set_model", json.dumps({"alias": "newest", "model": FAMILIES[n % 2]}).encode(), key)
        if status != 200:
            wrong.append((status, said))
    took = time.perf_counter() - start
    stop.set()
    for t in threads:
        t.join()
    print(f"\n4. {times} changes of the served model in {took:.0f} s while 16 connections predict: "
          f"{sum(seen.values()):,} answers ({', '.join(f'{v:,} {k}' for k, v in seen.items())}), {len(wrong)} wrong")
    if wrong or not all(seen.values()):
        raise SystemExit(str(wrong[:3]))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--seconds", type=float, default=5, help="of each measurement")
    words.add_argument("--quick", action="store_true", help="without `mlflow models serve`")
    words.add_argument("--constant", nargs=2, metavar=("SCHEMA", "PORT"), help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.constant:
        return constant_endpoint(given.constant[0], int(given.constant[1]))
    if not shutil.which("wrk"):
        raise SystemExit("this needs wrk, an HTTP load generator: install the package of that name")
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        settings = project(folder / "project")
        measure(folder, settings, given)


def measure(folder: Path, settings: Any, given: Any) -> None:
    dataset, pipelines = fit(settings)
    versions = register_all(settings, dataset, pipelines)
    row = requests(dataset, 1)[0]
    one, theirs = json.dumps({"data": row}).encode(), json.dumps({"dataframe_records": [row]}).encode()
    (folder / "schema.json").write_text(dataset.schema.model_dump_json())
    # one project per family, so that both are served at once; their registry is a copy
    projects = {f: project(folder / f, follow_alias="false") for f in FAMILIES}
    with ExitStack() as stack:
        ports: dict[str, tuple[int, str, bytes]] = {}
        processes: dict[str, Any] = {}

        def serve(name: str, command: list[str], port: int, path: str, body: bytes, **env: str) -> None:
            processes[name], _ = stack.enter_context(running(command, port, path, body, **env))
            ports[name] = port, path, body
        keys = {}
        for family, s in projects.items():
            s.state.mkdir(parents=True)
            shutil.copy(settings.state / "mlflow.db", s.state)
            port = free_port()
            serve(f"/predict {family}", our_api(s, port), port, "/predict", one)
            keys[family] = (s.state / "api_key").read_text().strip()
            asked = json.dumps({"alias": "newest", "model": family}).encode()
            status, said = post(port, "/set_model", asked, keys[family])
            if status != 200 or json.loads(said)["engine"] != "onnx":
                raise SystemExit(f"{family} is not served: {said.decode()}")
        port = free_port()
        constant = [sys.executable, __file__, "--constant", str(folder / "schema.json"), str(port)]
        serve("FastAPI + pydantic, constant", constant, port, "/predict", one)
        for family, v in versions.items() if not given.quick else ():
            port = free_port()
            command = [str(Path(sys.executable).parent / "mlflow"), "models", "serve", "--workers", "1",
                       "-p", str(port), "-m", f"models:/{v.name}/{v.version}", "--env-manager", "local"]
            serve(f"mlflow models serve {family}", command, port, "/invocations", theirs,
                  MLFLOW_TRACKING_URI=settings.tracking_uri)
        single_rows(ports, given.rounds, given.seconds, folder)
        show_memory(processes)
        batches({f: ports[f"/predict {f}"][0] for f in FAMILIES}, {f: processes[f"/predict {f}"] for f in FAMILIES},
                pipelines, dataset, given.rounds, given.seconds)
        swaps(settings, ports["/predict XGBoost"][0], keys["XGBoost"], dataset, pipelines, 200)
    starts(projects, one, 5)


if __name__ == "__main__":
    main()
