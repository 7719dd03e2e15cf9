"""What a prediction over HTTP costs, side by side with what else people would do. Needs `wrk`.

1. One row a request, one worker, 16 connections: our `/predict` with each family; a FastAPI endpoint that validates the
   same body with pydantic and returns a constant (no model at all); `mlflow models serve` of the same models.
2. 1,000 rows a request, 4 connections: rows per second of our `/predict` and of the pipeline called in this process.
3. From the start of the process to the first prediction, and the memory of one worker.
4. 200 changes of the served model among three, two of them versions of one family, while 16 connections predict, some
   of them 100 rows at a time: every answer is exactly what the version that it names gives, with its label.

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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from _fitted import fit, project, register_all, requests

from income_mlops import promotion
from income_mlops.models import ModelFactory, XGBoost
from income_mlops.predictor import Predictor
from income_mlops.processing import to_frame, to_labels
from income_mlops.registry import Version, download

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
    "As a person starts it, but for the worker, which is another process."
    return [sys.executable, "-m", "income_mlops.cli", "--settings", str(settings.root / "settings.ini"),
            "serve", "--no-worker", "--port", str(port)]


# ── measures ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def wrk(port: int, path: str, body: bytes, seconds: float, folder: Path) -> dict[str, float]:
    "Requests per second, p50 and p99 in milliseconds. An answer that is not 2xx, or none, ends the benchmark."
    (folder / "post.lua").write_text(f"wrk.method = 'POST'\nwrk.body = [==[{body.decode()}]==]\n"
                                     "wrk.headers['Content-Type'] = 'application/json'\n")
    said = subprocess.run(["wrk", "-t1", "-c16", f"-d{seconds:g}s", "--latency", "-s", str(folder / "post.lua"),
                           f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
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
                raise RuntimeError(f"a batch was answered with {reply.status}")
            done[i] += 1
    start = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        for ended in [pool.submit(client, i) for i in range(connections)]:
            ended.result()  # what went wrong in a thread ends the benchmark
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
    registered = ", ".join(f"{f} {p[-1].n_jobs}" for f, p in pipelines.items())
    print(f"\n2. Rows per second, 1,000 rows a request, 4 connections, one worker, median of {rounds} rounds, against "
          f"the pipeline\n   called with frames of 1,000 rows, as registered (n_jobs: {registered}) and with n_jobs=-1;"
          "\n   in brackets processor time, ms for 1,000 rows, which the last column compares")
    print(f"{'':16}{'over HTTP':>22}{'pipeline in process':>22}{'ratio':>8}{'n_jobs=-1':>12}{'ratio':>8}"
          f"{'by processor time':>20}")
    for family, port in ports.items():
        ours, theirs, own, their, wide = [], [], [], [], []
        jobs = pipelines[family][-1].n_jobs
        for r in range(rounds):
            before = processor_seconds(servers[family])
            start = time.perf_counter()
            ours.append(rows_per_second(port, bodies, seconds))
            rows_done = ours[-1] * (time.perf_counter() - start)
            own.append(1e6 * (processor_seconds(servers[family]) - before) / rows_done)
            rate, each = pipeline_rate(pipelines[family], frame, r, seconds)
            theirs.append(rate)
            their.append(each)
            pipelines[family][-1].set_params(n_jobs=-1)
            wide.append(pipeline_rate(pipelines[family], frame, r, seconds)[0])
            pipelines[family][-1].set_params(n_jobs=jobs)
        print(f"{family:16}{f'{median(ours):,.0f} ({median(own):.1f})':>22}"
              f"{f'{median(theirs):,.0f} ({median(their):.1f})':>22}{median(ours) / median(theirs):8.2f}"
              f"{median(wide):12,.0f}{median(ours) / median(wide):8.2f}{median(their) / median(own):20.2f}", flush=True)


def pipeline_rate(pipeline: Any, frame: Any, first: int, seconds: float) -> tuple[float, float]:
    "Rows per second in this process, and milliseconds of processor time for 1,000."
    start, used, n = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        at = 1000 * ((n + first) % 8)
        pipeline.predict_proba(frame.iloc[at:at + 1000])
        n += 1
    return n * 1000 / (time.perf_counter() - start), 1e3 * (time.process_time() - used) / n


def starts(settings: dict[str, Any], body: bytes, rounds: int) -> None:
    print(f"\n3. From the start of `income-mlops serve` to the first prediction, median of {rounds}, model in the "
          "state folder")
    for family, s in settings.items():
        times = []
        for _ in range(rounds):
            port = free_port()
            with running(our_api(s, port), port, "/predict", body) as (process, seconds):
                times.append(seconds)
                used = memory(process)
        print(f"{family:16}{median(times):8.2f} s   {used:6.0f} MB at the first prediction")


def swaps(settings: Any, port: int, key: str, dataset: Any, models: dict[tuple[str, str], Version],
          times: int) -> None:
    "Change the served model, given as alias and family, while 16 connections predict."
    rows = requests(dataset, 200)
    expected: dict[tuple[str, int], list[float]] = {}
    for v in models.values():
        with tempfile.TemporaryDirectory() as d:
            download(settings, v, Path(d))
            expected[v.name, v.version] = Predictor.load(Path(d) / "serving" / "predictor").predict_rows(rows).tolist()
    negative, positive = dataset.schema.classes
    stop, wrong = threading.Event(), []  # type: ignore[var-annotated]
    seen, done = Counter[tuple[str, int]](), [0] * 16

    def check(status: int, answer: Any, asked: slice) -> None:
        "Equal to the last bit, and every part of it of one model."
        which = answer["model_name"], answer["model_version"]
        labels, p = ((answer[k] if isinstance(answer[k], list) else [answer[k]]) for k in ("prediction", "probability"))
        if status != 200 or p != expected[which][asked] or labels != [positive if v >= 0.5 else negative for v in p]:
            wrong.append((status, answer))
        seen[which] += 1

    def client(n: int) -> None:
        connection, i = http.client.HTTPConnection("127.0.0.1", port, timeout=60), 12 * n
        many = n % 4 == 0
        try:
            while not stop.is_set():
                i = (i + 1) % (100 if many else 200)
                asked = slice(i, i + 100) if many else slice(i, i + 1)
                connection.request("POST", "/predict", json.dumps({"data": rows[asked] if many else rows[i]}))
                reply = connection.getresponse()
                check(reply.status, json.loads(reply.read()), asked)
                done[n] += 1
        except Exception as e:  # a connection that broke, an answer that is none: all of it is wrong
            wrong.append((f"client {n}", repr(e)))
    threads = [threading.Thread(target=client, args=(n,)) for n in range(16)]
    for t in threads:
        t.start()
    start, asked = time.perf_counter(), [*models]
    for n in range(times):
        alias, family = asked[n % len(asked)]
        status, said = post(port, "/set_model", json.dumps({"alias": alias, "model": family}).encode(), key)
        told = json.loads(said or b"{}")
        if status != 200 or told["model_version"] != models[alias, family].version:
            wrong.append((status, said))
    took = time.perf_counter() - start
    stop.set()
    for t in threads:
        t.join()
    shown = ", ".join(f"{n:,} {name} {version}" for (name, version), n in sorted(seen.items()))
    print(f"\n4. {times} changes of the served model in {took:.0f} s while 16 connections predict: {sum(done):,} "
          f"answers ({shown}; at least {min(done):,} on each connection), {len(wrong)} wrong")
    if wrong or {*seen} != {*expected} or not all(done):
        raise SystemExit(f"wrong: {wrong[:3]}, answers of each connection: {done}")


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
    X, y = to_frame(dataset.train, dataset.schema).head(3000), to_labels(dataset.train, dataset.schema)[:3000]
    small = ModelFactory(settings, dataset.schema).make("XGBoost").fit(X, y, XGBoost.default, 50)
    first = register_all(settings, dataset, {"XGBoost": small})["XGBoost"]
    promotion.promote(settings, "XGBoost", first.version, "small")
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
        three = {("newest", "XGBoost"): versions["XGBoost"], ("small", "XGBoost"): first,
                 ("newest", "RandomForest"): versions["RandomForest"]}
        swaps(settings, ports["/predict XGBoost"][0], keys["XGBoost"], dataset, three, 200)
    starts(projects, one, 5)


if __name__ == "__main__":
    main()
