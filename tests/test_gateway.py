"""One port for everything: the shipped nginx configuration before the real services, seen with a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from gateway_helpers import (
    CHROMIUM,
    PATH,
    ROOT,
    START,
    WITHOUT_NGINX,
    Gateway,
    Page,
    Program,
    System,
    browser,
    free_port,
    small_project,
    status,
    wait_for,
)

pytestmark = pytest.mark.skipif(WITHOUT_NGINX or not CHROMIUM, reason="nginx and chromium are needed (apt-get install)")
PERSON = {"age": 52, "workclass": "Self-emp-not-inc", "education": "HS-grad", "education-num": 9,
          "marital-status": "Married-civ-spouse", "occupation": "Exec-managerial", "relationship": "Husband",
          "race": "White", "sex": "Male", "capital-gain": 0, "capital-loss": 0, "hours-per-week": 45,
          "native-country": "United-States"}
MIB = 2**20


@pytest.fixture(scope="module")
def book():
    "Three pages of the book, where a server that is nobody in particular may read them."
    folder = Path(tempfile.mkdtemp(prefix="book"))
    folder.chmod(0o755)
    (folder / "toc.yml").write_text("format: jb-book\nroot: book/howto/docker\nchapters:\n"
                                    "- file: book/howto/backup\n- file: book/howto/postgresql\n")
    done = subprocess.run(["jupyter-book", "build", ".", "--config", "book/_config.yml", "--toc", folder / "toc.yml",
                           "--path-output", folder, "--all", "--quiet"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder / "_build/html"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def system(tmp_path_factory, book):
    "Everything, with a model that was trained through the gateway."
    system = System(tmp_path_factory.mktemp("gateway"), book=book)
    try:
        system.command("train", "--trials", "1", "--models", "XGBoost")
        wait_for(lambda: httpx.get(f"{system.url}/api/ready").status_code == 200, 30, "a model is served")
        yield system
    finally:
        system.stop()


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:
        yield chromium


@pytest.fixture
def visit(system, chromium):
    "A function that opens a page of the system; at the end nothing may have gone wrong in it."
    pages = []

    def open_page(path: str, **context) -> Page:
        pages.append(Page(chromium, system.url, **context))
        pages[-1].page.goto(system.url + path)
        return pages[-1]
    yield open_page
    for p in pages:
        p.context.close()
        assert not p.problems


# ── the doors ─────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_landing_page_shows_the_doors_and_their_health(visit, scheme):
    opened = visit("/", color_scheme=scheme)
    page = opened.page
    doors = page.locator(".door")
    assert doors.count() == 4
    page.wait_for_function("() => [...document.querySelectorAll('.state')].every(s => s.textContent !== '…')")
    states = dict(zip(doors.locator("h2").all_inner_texts(), doors.locator(".state").all_inner_texts(), strict=True))
    assert states["API"] == "serves adult-income.XGBoost, version 1" and states["MLflow"] == "running"
    assert states["Dashboard"] == "running" and states["Book"] == "running"
    assert page.locator("#summary").inner_text() == "All services are running."
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 300) == (scheme == "dark")


def test_the_book_opens_and_its_links_stay_behind_the_door(visit):
    page = visit("/").page
    page.locator(".door[href='docs/']").click()
    page.wait_for_url("**/docs/book/howto/docker.html")
    assert page.locator("h1").first.inner_text().startswith("Run in Docker")
    page.locator("article").get_by_role("link", name="Back it up").click()
    page.wait_for_url("**/docs/book/howto/backup.html")
    assert page.locator("h1").first.inner_text().startswith("Back up and restore")
    styled = page.evaluate("getComputedStyle(document.querySelector('article h1')).fontFamily")
    assert "sans" in styled, "with its style sheets"


def test_swagger_executes_a_prediction(visit):
    page = visit("/api/").page
    page.locator("#operations-predictions-predict .opblock-summary-control").click()
    page.get_by_role("button", name="Try it out").click()
    page.locator("#operations-predictions-predict textarea").fill(json.dumps({"data": PERSON}))
    with page.expect_response("**/api/predict") as answer:
        page.get_by_role("button", name="Execute").click()
    told = answer.value.json()
    assert answer.value.status == 200 and told["prediction"] in ("<=50K", ">50K") and 0 < told["probability"] < 1
    shown = page.locator("#operations-predictions-predict .live-responses-table .highlight-code").first
    assert "adult-income.XGBoost" in shown.inner_text()


def test_mlflow_shows_experiment_run_notebook_and_report(visit):
    opened = visit("/mlflow/#/experiments")
    page = opened.page
    link = page.get_by_role("link", name="adult-income").first
    link.wait_for()
    page.goto(page.url.partition("#")[0] + link.get_attribute("href") + "/runs")
    page.get_by_role("link", name="train 20").first.click()
    page.wait_for_url(re.compile("/runs/[0-9a-f]{32}"))
    page.goto(page.url.partition("?")[0] + "/artifacts")
    page.get_by_text("report.html", exact=True).first.click()
    report = page.frame_locator("iframe").first
    report.locator("h1").first.wait_for()
    assert report.locator("svg").count() > 3
    page.get_by_text("notebook", exact=True).first.click()
    page.get_by_text("train.html", exact=False).first.click()
    executed = page.frame_locator("iframe").first
    executed.locator(".jp-OutputArea-output").first.wait_for()
    assert "trials" in executed.locator("body").inner_text()
    # without authentication MLflow knows no users, on a port of its own as well
    assert all("users/current" in p or "404" in p for p in opened.problems)
    opened.problems.clear()


def test_dashboard_reacts_over_its_websocket(visit):
    opened = visit("/health", viewport={"width": 1280, "height": 1800})
    page, sockets = opened.page, []
    page.on("websocket", lambda s: sockets.append(s.url))
    page.goto(page.url.replace("/health", "/frontend/"))
    page.get_by_text("probability of").first.wait_for(timeout=60_000)
    before = page.locator("body").inner_text()
    page.get_by_role("button", name="A random real row").click()
    page.wait_for_function("before => document.body.innerText !== before", arg=before, timeout=20_000)
    assert sockets and all(re.match(r"ws://127\.0\.0\.1:\d+/frontend/api/kernels/", s) for s in sockets)


def test_mlflow_client_reads_and_writes_through_the_prefix(system, tmp_path):
    "In a process of its own, as a user on another machine has it."
    code = """
import sys, mlflow
from mlflow import MlflowClient
uri, folder = sys.argv[1:]
mlflow.set_tracking_uri(uri)
client = MlflowClient()
version = client.get_model_version_by_alias("adult-income.XGBoost", "newest")
files = {f.path for f in client.list_artifacts(version.run_id)}
assert "serving" in files, files
local = client.download_artifacts(version.run_id, "serving/schema.json", folder)
assert '"income"' in open(local).read()
experiment = client.create_experiment("written through the gateway")
assert client.get_experiment(experiment).artifact_location.startswith("mlflow-artifacts:/")
with mlflow.start_run(experiment_id=experiment) as run:
    mlflow.log_metric("answer", 42.0)
    mlflow.log_text("hello " * 500_000, "note.txt")  # 3 MB
assert client.get_run(run.info.run_id).data.metrics == {"answer": 42.0}
assert len(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/note.txt")) == 3_000_000
"""
    done = subprocess.run([os.sys.executable, "-c", code, f"{system.url}/mlflow", str(tmp_path)], capture_output=True,
                          text=True, env={**os.environ, "NO_PROXY": "127.0.0.1"})
    assert done.returncode == 0, done.stderr[-3000:]


def test_addresses_keep_their_prefix(system):
    for path, to in [("/api", "/api/"), ("/api/", "/api/docs"), ("/frontend", "/frontend/"), ("/mlflow", "/mlflow/"),
                     ("/docs", "/docs/")]:
        answer = httpx.get(system.url + path)
        assert answer.is_redirect and answer.headers["Location"] == to, path
    assert httpx.get(f"{system.url}/api/openapi.json").json()["servers"] == [{"url": "/api"}]
    assert httpx.get(f"{system.url}/nowhere").status_code == 404


# ── uploads ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def upload(url: str, key: str, size: int) -> httpx.Response:
    "A file of that many bytes: real rows, again and again, and blank lines that fill it up."
    header, *rows = (ROOT / "data" / "adult.train.csv").read_bytes().splitlines(keepends=True)
    block = b"".join(rows)
    content = header + block * ((size - len(header)) // len(block))
    content += b"\n" * (size - len(content))
    return httpx.post(f"{url}/api/upload_data", params={"retrain": "false"}, files={"file": ("new.csv", content)},
                      headers={"X-API-Key": key}, timeout=300)


@pytest.mark.timeout(300)
def test_upload_of_just_under_the_limit_passes_and_one_over_is_told(system):
    limit = 100 * MIB
    answer = upload(system.url, system.key, limit - 1000)
    assert answer.status_code == 202, answer.text
    assert answer.json()["rows"] + answer.json()["duplicates"] > 700_000
    for over in (1000, 2 * MIB):  # the service tells the first, which is in the form's own bytes; nginx the second
        answer = upload(system.url, system.key, limit + over)
        assert answer.status_code == 413 and "serving.max_upload_mb" in answer.json()["detail"], answer.text


def test_request_that_is_too_large_is_told(system):
    answer = httpx.post(f"{system.url}/api/predict", content=b" " * (17 * MIB))
    assert answer.status_code == 413 and "serving.max_request_mb" in answer.json()["detail"]


def test_upload_without_a_key_is_refused_as_the_service_words_it(system):
    answer = upload(system.url, "wrong", 20 * MIB)
    assert answer.status_code == 401 and "X-API-Key" in answer.json()["detail"]


# ── what every answer says ────────────────────────────────────────────────────────────────────────────────────────────

def test_headers_are_said_once_and_the_request_id_goes_through(system):
    for path in ("/", "/api/health", "/mlflow/", "/frontend/voila/static/voila.js", "/nowhere", "/docs/"):
        answer = httpx.get(system.url + path, headers={"X-Request-ID": "from-me.1"})
        assert answer.headers.get_list("X-Content-Type-Options") == ["nosniff"], path
        assert answer.headers.get_list("X-Frame-Options") == ["SAMEORIGIN"], path
        assert answer.headers.get_list("X-Request-ID") == ["from-me.1"], path
        assert "default-src" in answer.headers["Content-Security-Policy"], path
        assert "Strict-Transport-Security" not in answer.headers and "Server" in answer.headers
        assert answer.headers["Server"] == "nginx" or "nginx/" not in answer.headers["Server"]
    bad = httpx.get(f"{system.url}/health", headers={"X-Request-ID": 'a"b c'})
    assert re.fullmatch("[0-9a-f]{32}", bad.headers["X-Request-ID"])
    told = wait_for(lambda: [x for x in system.gateway.lines() if x["id"] == "from-me.1"], 5, "the access log")
    assert {"path": "/api/health", "status": 200, "method": "GET", "client": "127.0.0.1"}.items() <= next(
        x for x in told if x["path"] == "/api/health").items()


def test_text_is_compressed(system):
    answer = httpx.get(f"{system.url}/api/openapi.json", headers={"Accept-Encoding": "gzip"})
    assert answer.headers["Content-Encoding"] == "gzip" and "Accept-Encoding" in answer.headers["Vary"]
    assert answer.json()["openapi"].startswith("3.")


def test_other_names_and_other_pages_are_refused(system):
    assert httpx.get(f"{system.url}/api/health", headers={"Host": "evil.example"}).status_code == 421
    foreign = {"Origin": "http://evil.example"}
    answer = httpx.post(f"{system.url}/api/predict", json={"data": PERSON}, headers=foreign)
    assert answer.status_code == 403
    experiment = {"name": "from elsewhere"}
    url = f"{system.url}/mlflow/api/2.0/mlflow/experiments/create"
    assert httpx.post(url, json=experiment, headers=foreign).status_code == 403
    own = httpx.post(url, json=experiment, headers={"Origin": system.url})
    assert own.status_code == 200, own.text


def test_latency_that_the_gateway_adds_is_small(system):
    "A prediction by the gateway against one by the service, over a kept connection; medians of many."
    def median(url: str) -> float:
        with httpx.Client() as client:
            times = []
            for _ in range(100):
                start = time.perf_counter()
                assert client.post(url, json={"data": PERSON}).status_code == 200
                times.append(time.perf_counter() - start)
        return sorted(times)[50]
    direct = median(f"http://127.0.0.1:{system.env['DYNACONF_SERVING__PORT']}/predict")
    assert median(f"{system.url}/api/predict") < direct + 0.01


# ── MLflow alone, and with names and passwords ────────────────────────────────────────────────────────────────────────

def test_mlflow_ends_by_itself(tmp_path):
    "Within the time that Compose gives it; also while somebody is connected."
    port = free_port()
    project = small_project(tmp_path / "project", 10)
    program = Program("mlflow", [sys.executable, "-m", "income_mlops.mlserver"], project,
                      DYNACONF_MLFLOW__PORT=str(port))
    try:
        program.wait(f"http://127.0.0.1:{port}/health", 180)
        with httpx.Client() as client:
            assert client.get(f"http://127.0.0.1:{port}/health").status_code == 200
            assert program.stop() < 15
        wait_for(lambda: status(f"http://127.0.0.1:{port}/health") == 0, 5, "nobody listens any more")
    finally:
        program.stop(signal.SIGKILL)


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_mlflow_with_names_and_passwords(tmp_path):
    "Through the gateway: pages, a client, a worker that trains; and a password that is changed where it is kept."
    first, second = "the first words", "the second words"
    words = {"MLFLOW_AUTH_ADMIN_USERNAME": "me", "MLFLOW_AUTH_ADMIN_PASSWORD": first,
             "MLFLOW_FLASK_SERVER_SECRET_KEY": second, "MLFLOW_TRACKING_USERNAME": "me",
             "MLFLOW_TRACKING_PASSWORD": first}
    system = System(tmp_path, DYNACONF_MLFLOW__AUTHENTICATION="true", DYNACONF_MODELS="XGBoost",
                    DYNACONF_OPTIMIZATION__INITIAL_N_TRIALS="1", DYNACONF_JOBS__SCHEDULING="normal", **words)
    found = f"{system.url}/mlflow/api/2.0/mlflow/experiments/get-by-name?experiment_name=adult-income"

    def asked(password: str | None) -> int:
        return httpx.get(found, auth=("me", password) if password else None, timeout=30).status_code
    try:
        system.start("worker", ["-m", "income_mlops.cli", "worker"])
        wait_for(lambda: httpx.get(f"{system.url}/api/ready").status_code == 200, 900, "a first model is served")
        assert [asked(None), asked("other words"), asked(first)] == [401, 401, 200]
        assert httpx.get(f"{system.url}/mlflow/").status_code == 401
        assert "XGBoost" in system.command("models")
        system.mlflow.stop(seconds=30)
        system.env["MLFLOW_AUTH_ADMIN_PASSWORD"] = second
        system.start("mlflow", ["-m", "income_mlops.mlserver"], DYNACONF_MLFLOW__TRACKING_URI="").wait(
            f"{system.url}/mlflow/health", 180)
        assert [asked(first), asked(second)] == [401, 200]
    finally:
        system.stop()


# ── nginx alone ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def gateway(tmp_path):
    "A function that starts a gateway with nobody behind it."
    started = []

    def start(**env) -> Gateway:
        started.append(Gateway(tmp_path, f"gateway{len(started)}", **env))
        return started[-1]
    yield start
    for g in started:
        g.stop()


def many(url: str, n: int, headers=lambda i: {}) -> list[httpx.Response]:
    with httpx.Client() as client, ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda i: client.get(url, headers=headers(i)), range(n)))


def test_rate_limit_counts_real_clients(gateway):
    "Not behind a proxy, nobody's claim to be somebody else counts; behind one, its clients are told apart."
    claims = {"headers": lambda i: {"X-Forwarded-For": f"203.0.113.{i}"}}
    alone = gateway(RATE=1, BURST=5)
    answers = many(alone.url + "/api/health", 40, **claims)
    limited = [a for a in answers if a.status_code == 429]
    assert len(answers) - len(limited) in range(5, 10)
    assert limited[0].json()["detail"].startswith("more than 1 requests a second")
    assert limited[0].headers["Retry-After"] == "1" and limited[0].headers["Content-Type"] == "application/json"
    assert limited[0].headers["X-Content-Type-Options"] == "nosniff"
    behind = gateway(RATE=1, BURST=5, TRUSTED_PROXIES="10.0.0.0/8,127.0.0.1")
    assert not [a for a in many(behind.url + "/api/health", 40, **claims) if a.status_code == 429]
    assert [a for a in many(behind.url + "/api/health", 40, lambda i: {"X-Forwarded-For": f"{i}.1.1.1, 203.0.113.9:51"})
            if a.status_code == 429], "what the client itself wrote in front of the proxy's word does not count"
    assert {x["client"] for x in behind.lines()} >= {"203.0.113.9", "203.0.113.39"}


def test_transport_is_believed_from_a_proxy_only(gateway):
    https = {"X-Forwarded-Proto": "https"}
    assert "Strict-Transport-Security" not in httpx.get(gateway().url, headers=https).headers
    behind = gateway(TRUSTED_PROXIES="127.0.0.0/8")
    assert "Strict-Transport-Security" in httpx.get(behind.url, headers=https).headers
    assert "Strict-Transport-Security" not in httpx.get(behind.url).headers


def test_service_that_is_away_is_told_in_its_language(gateway):
    g = gateway()
    answer = httpx.get(f"{g.url}/api/health")
    assert answer.status_code == 502 and answer.json()["detail"] and answer.headers["Retry-After"] == "5"
    page = httpx.get(f"{g.url}/mlflow/")
    assert page.status_code == 502 and "tries again by itself" in page.text and page.headers["Content-Type"] == \
        "text/html; charset=utf-8"


def test_name_that_nobody_knows_yet_is_no_reason_not_to_start(gateway):
    g = gateway(API="backend.invalid:8080")
    assert httpx.get(f"{g.url}/api/health").status_code == 502


def test_address_is_kept_while_its_name_is_not_found(gateway, tmp_path):
    "A look-up that fails takes no door away; one that gives another address moves it."
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Hello(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    getent, known, asked = tmp_path / "bin" / "getent", tmp_path / "known", tmp_path / "asked"
    getent.parent.mkdir()
    getent.write_text(f"#!/bin/sh\necho >>{asked}\ncat {known}\n")
    getent.chmod(0o755)
    known.write_text("127.0.0.1 STREAM backend\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        g = gateway(API=f"backend:{server.server_port}", PATH=f"{getent.parent}:{PATH}")
        assert httpx.get(f"{g.url}/api/health").status_code == 200
        for addresses, code in (("", 200), ("127.0.0.9 STREAM backend\n", 502), ("", 502),
                                ("127.0.0.1 STREAM backend\n", 200)):
            known.write_text(addresses)
            seen = asked.stat().st_size
            wait_for(lambda seen=seen: asked.stat().st_size >= seen + 2, 20, "the name is looked up twice")
            wait_for(lambda code=code: httpx.get(f"{g.url}/api/health").status_code == code, 10, (addresses, code))
        server.shutdown()


def kept_in_files(gateway) -> int:
    "Bytes that nginx has put aside, in files that may have no name any more."
    files = {}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):
            for number in folder.iterdir():
                if os.readlink(number).startswith(f"{gateway.run}/") and number.stat().st_size:
                    files[number.stat().st_ino] = number.stat().st_size
    return sum(files.values())


def test_nothing_on_its_way_is_kept_in_files(gateway):
    "Not a request whose service does not read it yet, nor an answer that its client reads slowly: /tmp is memory."
    with socket.create_server(("127.0.0.1", 0)) as service:
        service.settimeout(10)
        port = service.getsockname()[1]
        g = gateway(API=f"127.0.0.1:{port}", FRONTEND=f"127.0.0.1:{port}", MLFLOW=f"127.0.0.1:{port}")
        for path, size in (("/api/predict", 15 * MIB), ("/mlflow/artifact", 100 * MIB), ("/frontend/x", MIB)):
            with socket.create_connection(("127.0.0.1", g.port)) as client:
                client.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n".encode())
                client.settimeout(1)
                with suppress(TimeoutError):
                    client.sendall(b" " * (size - 1))
                asked, _ = service.accept()
                with asked, suppress(TimeoutError):
                    assert kept_in_files(g) == 0, path
                    asked.recv(100_000)
                    asked.settimeout(1)
                    asked.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (50 * MIB) + b" " * (50 * MIB))
                assert kept_in_files(g) == 0, path
        answer = httpx.post(f"{g.url}/frontend/upload", content=b" " * (2 * MIB))
        assert answer.status_code == 413, "files for the dashboard come by its websocket"


def test_answers_say_which_commit_the_gateway_is_of(gateway):
    assert httpx.get(gateway(REVISION="0" * 40).url).headers["X-Revision"] == "0" * 40
    assert "X-Revision" not in httpx.get(gateway().url).headers


def test_names_of_the_system_are_configured(gateway):
    g = gateway(PUBLIC_HOSTS="ml.example,*.ml.example")
    for host, code in [("ml.example", 200), ("a.ml.example:8080", 200), ("127.0.0.1", 421), ("ml.example.evil", 421)]:
        assert httpx.get(f"{g.url}/", headers={"Host": host}).status_code == code, host
    assert httpx.get(f"{gateway(PUBLIC_HOSTS='*').url}/", headers={"Host": "any"}).status_code == 200


def test_slow_service_is_given_up_with_json(gateway, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        g = gateway(API=f"127.0.0.1:{silent.getsockname()[1]}", API_SECONDS=1)
        answer = httpx.get(f"{g.url}/api/health", timeout=20)
    assert answer.status_code == 504 and answer.json()["detail"] == "the API did not answer in time"


@pytest.mark.parametrize(("name", "value"), [("RATE", "many"), ("API", "a;b"), ("PUBLIC_HOSTS", "$host"),
                                             ("RUN", "a\nb"), ("PUBLIC_HOSTS", "income.example:8443")])
def test_wrong_value_is_named(name, value, tmp_path):
    done = subprocess.run([START, "--check"], env={"PATH": PATH, "RUN": str(tmp_path), name: value}, text=True,
                          capture_output=True)
    assert done.returncode == 1 and name in done.stderr and len(done.stderr.strip().splitlines()) <= 2


@pytest.mark.full
def test_stops_in_order_while_a_request_is_unfinished(gateway):
    g = gateway()
    with socket.create_connection(("127.0.0.1", g.port)) as idle:
        idle.sendall(b"GET /fr")
        assert g.stop(signal.SIGQUIT) < 13
    assert g.process.returncode == 0


def test_shipped_files_are_complete():
    assert {p.name for p in (ROOT / "docker/nginx/site").iterdir()} == {"index.html", "waiting.html", "page.css",
                                                                        "page.js", "icon.svg"}
    for page in (ROOT / "docker/nginx/site").glob("*"):
        assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", page.read_text().replace("// ", "")), page
    assert Path(START).stat().st_mode & 0o111
