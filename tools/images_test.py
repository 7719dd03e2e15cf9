"""Builds the five images from their Dockerfiles with podman, runs each alone, and both Compose files with them.

    make images-test

Asks no registry for anything it can make: if docker.io cannot be reached, the base images are made from Debian's
packages, PostgreSQL's too. Needs root, podman and what CONTRIBUTING.md lists. What a machine lacks for containers at
all is said in a line that begins with SKIPPED, and is a failure only with CI_IMAGES=required; everything after that is
one. If all has passed, `docker/images-tested.json` says so: see tools/images_stamp.py.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import images_stamp  # noqa: E402
from gateway_helpers import CHROMIUM, Page, browser  # noqa: E402
from helpers import free_port, wait_for  # noqa: E402
from intake_helpers import LINES, csv  # noqa: E402

PROGRAMS = ("podman", "runc", "mmdebstrap", "iptables", "catatonit")
DEBIAN, PYTHON, POSTGRES = (f"docker.io/library/{n}" for n in (
    "debian:bookworm-slim", "python:3.11-slim-bookworm", "postgres:17-bookworm"))
IMAGES = {"nginx-custom": "nginx", "backend": "backend", "mlflow": "mlflow", "frontend": "frontend", "docs": "docs"}
# Alone: its port, and a page that it answers with.
ALONE = {"nginx-custom": (80, "/"), "backend": (8080, "/openapi.json"), "docs": (8000, "/"), "frontend": (8501, "/"),
         "mlflow": (5000, "/api/2.0/mlflow/experiments/get?experiment_id=0")}
PUBLIC = "income.example"  # a name as in service: no container is called by it from inside
CA = Path(os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt")
CONTAINERS = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=8192:8192"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""
AS_PYTHON = f"""
FROM {DEBIAN}
RUN rm -f /usr/lib/python3*/EXTERNALLY-MANAGED && ln -s python3 /usr/bin/python
"""
# What the Compose files use of the official image.
AS_POSTGRES = f"""
FROM {DEBIAN}
RUN apt-get update -q && apt-get install -q -y --no-install-recommends postgresql && rm -rf /var/lib/postgresql/*/main
RUN install -d -o postgres -g postgres -m 700 /var/lib/postgresql/data && ln -s /usr/lib/postgresql/*/bin /opt/postgres
COPY start /start
ENV PATH=/opt/postgres:$PATH PGDATA=/var/lib/postgresql/data
USER postgres
VOLUME /var/lib/postgresql/data
STOPSIGNAL SIGINT
CMD ["sh", "/start"]
"""
START_POSTGRES = """
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    echo "$POSTGRES_PASSWORD" >/tmp/password
    initdb --username="$POSTGRES_USER" --pwfile=/tmp/password --auth-local=trust --auth-host=scram-sha-256 -E UTF8
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
    pg_ctl -w -o "-c listen_addresses=''" start
    createdb -U "$POSTGRES_USER" "$POSTGRES_DB"
    for file in /docker-entrypoint-initdb.d/*.sql; do
        psql -v ON_ERROR_STOP=1 -U "$POSTGRES_USER" -d "$POSTGRES_DB" -f "$file"
    done
    pg_ctl -w stop
fi
exec postgres -c listen_addresses='*'
"""
# A training of a minute: how good the model gets is not the question here.
SHORT = {"DYNACONF_MODELS": "XGBoost", "DYNACONF_OPTIMIZATION__N_TRIALS": "1", "DYNACONF_JOBS__SCHEDULING": "normal",
         "DYNACONF_OPTIMIZATION__INITIAL_N_TRIALS": "1"}
PERSON = {"age": 52, "workclass": "Self-emp-not-inc", "education": "HS-grad", "education-num": 9,
          "marital-status": "Married-civ-spouse", "occupation": "Exec-managerial", "relationship": "Husband",
          "race": "White", "sex": "Male", "capital-gain": 0, "capital-loss": 0, "hours-per-week": 45,
          "native-country": "United-States"}
BEGIN = time.monotonic()
PATIENCE = 1200  # seconds, with what hangs; a busy machine takes its time


class Lacking(Exception):
    "What this machine cannot do, whatever we do."


def say(text: str) -> None:
    print(f"{time.monotonic() - BEGIN:6.0f} s  {text}", flush=True)


class Podman:
    "podman with a storage, networks and settings of its own."

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.env = folder, dict(os.environ)
        for name, text in (("CONTAINERS_CONF", CONTAINERS), ("CONTAINERS_STORAGE_CONF", STORAGE)):
            file = folder / f"{name.lower()}.toml"
            file.write_text(text.format(folder=folder))
            self.env[name] = str(file)

    def try_(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["podman", *map(str, words)], env=self.env, capture_output=True, text=True, **options)

    def __call__(self, *words: object, **options: Any) -> str:
        done = self.try_(*words, **options)
        if done.returncode:
            raise RuntimeError(f"podman {' '.join(map(str, words))}: {(done.stdout + done.stderr)[-6000:]}")
        return done.stdout.strip()

    def build(self, image: str, folder: Path, *words: object) -> None:
        self("build", "--isolation", "chroot", "--pull=never", "--format", "docker", "--network", "host",
             "-t", image, *words, folder)

    def pull(self, image: str) -> bool:
        "Whether a registry gave it; one that never answers did not."
        try:
            return self.try_("pull", "-q", image, timeout=600).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def clear(self) -> None:
        "Ends what an earlier or this run has started; images stay."
        for _ in range(5):  # one that another one needs goes after that one
            if self.try_("rm", "-f", "-a", "-t", "0").returncode == 0:
                break
        self.try_("volume", "rm", "-a", "-f")
        self.try_("network", "prune", "-f")


# ── what the machine must be able to do ───────────────────────────────────────────────────────────────────────────────

def base_images(podman: Podman) -> None:
    "From the registry; if it cannot be reached, from Debian's packages."
    wanted = (DEBIAN, PYTHON, POSTGRES)
    made = podman.folder / "base"  # how they were made
    if made.exists() and all(podman.try_("image", "exists", name).returncode == 0 for name in wanted):
        return
    if all(podman.pull(name) for name in wanted):
        made.write_text("from docker.io")
        return say("base images: from the registry")
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        done = subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3,python3-venv,python3-pip,ca-certificates",
             "bookworm", folder / "base.tar", "http://deb.debian.org/debian"], capture_output=True, text=True)
        if done.returncode:
            raise Lacking(f"neither docker.io nor Debian's packages can be reached: {done.stderr[-500:]}")
        podman("import", folder / "base.tar", DEBIAN)
        for image, text in ((PYTHON, AS_PYTHON), (POSTGRES, AS_POSTGRES)):
            (folder / "Dockerfile").write_text(text)
            (folder / "start").write_text(START_POSTGRES)
            podman.build(image, folder)
    made.write_text("made of Debian's packages")
    say("base images: made from Debian's packages, as docker.io cannot be reached")


def check_machine(podman: Podman) -> None:
    "A container of nothing of ours: limited, read-only, found by name on a network, and from here."
    port, code = free_port(), "import urllib.request as u; u.urlopen('http://there:8000')"
    alone = ("--read-only", "--tmpfs=/tmp", "--cap-drop", "ALL", "--memory", "256m", "--init")
    try:
        podman("network", "create", "probe")
        podman("run", "-d", "--name", "there", "--network", "probe", "-p", f"127.0.0.1:{port}:8000", *alone,
               "--restart", "always", PYTHON, "python", "-m", "http.server", "8000")
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/", trust_env=False), 120, "a published port")
        podman("run", "--rm", "--network", "probe", *alone, PYTHON, "python", "-c", code)
    except (RuntimeError, AssertionError) as e:
        raise Lacking(f"podman cannot run containers here: {e}") from None
    finally:
        podman.clear()


def prepare(folder: Path) -> Podman:
    if os.geteuid() != 0:
        raise Lacking("podman's networks and mounts need root")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [p for p in PROGRAMS if not shutil.which(p, path=path)]:
        raise Lacking(f"not installed: {', '.join(missing)}")
    if not CHROMIUM:
        raise Lacking("not installed: chromium")
    os.environ["PATH"] = path
    podman = Podman(folder)
    probed = podman.try_("info")
    if probed.returncode:
        raise Lacking(f"podman does not start here: {probed.stderr[-500:]}")
    podman.clear()
    base_images(podman)
    check_machine(podman)
    return podman


# ── building ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def build(podman: Podman, name: str) -> int:
    "Its size in MB."
    start = time.monotonic()
    index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"
    mounted = ("-v", f"{CA}:{CA}:ro", "--build-arg", f"CA_FILE={CA}") if CA.exists() else ()
    podman.build(f"localhost/{name}:dev", ROOT, "--build-arg", f"INDEX_URL={index}", *mounted,
                 "-f", ROOT / "docker" / IMAGES[name] / "Dockerfile")
    size = int(podman("image", "inspect", "--format", "{{.Size}}", f"localhost/{name}:dev"))
    base = int(podman("image", "inspect", "--format", "{{.Size}}", DEBIAN))
    say(f"built {name:13} {size / 1e6:5.0f} MB, {(size - base) / 1e6:4.0f} of them not Debian's; "
        f"{time.monotonic() - start:.0f} s")
    return round(size / 1e6)


def alone(podman: Podman, name: str) -> None:
    "As with `docker run -p`: healthy by its own check, answers from here, ends by itself within 15 s."
    port, page = ALONE[name]
    url, start = f"http://127.0.0.1:{free_port()}", time.monotonic()
    try:
        # as Docker has it without being asked
        podman("run", "-d", "--name", "alone", "--sysctl", "net.ipv4.ip_unprivileged_port_start=0",
               "-p", f"{url.removeprefix('http://')}:{port}", f"localhost/{name}:dev")
        try:
            wait_for(lambda: podman.try_("healthcheck", "run", "alone").returncode == 0, PATIENCE, f"{name} is healthy")
            took = time.monotonic() - start
            answer = httpx.get(url + page, timeout=120, trust_env=False)
            assert answer.status_code == 200 and answer.content, (name, answer.status_code, answer.text[:500])
        except (AssertionError, httpx.HTTPError) as e:
            said = podman.try_("logs", "--tail", "60", "alone")
            raise RuntimeError(f"{name} alone: {e}\n{said.stdout}{said.stderr}") from None
        start = time.monotonic()
        podman("stop", "-t", "15", "alone")
        code = podman("inspect", "--format", "{{.State.ExitCode}}", "alone")
        say(f"{name} alone: healthy after {took:.0f} s, stopped in {time.monotonic() - start:.0f} s (exit {code})")
        assert time.monotonic() - start < 15 and code != "137", (name, code)
    finally:
        podman.clear()


# ── running ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def megabytes(text: str) -> float:
    "Of a size as podman writes it."
    number, unit = re.fullmatch(r"([\d.]+)\s*([kMG]?)i?B", text.strip()).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1e-6, "k": 1e-3, "M": 1, "G": 1e3}[unit]


class Stack:
    "What a Compose file describes, as podman-compose starts it."

    def __init__(self, podman: Podman, file: str, services: str, profile: str = "", **env: str):
        self.podman, self.file, self.services, self.env = podman, file, services.split(), env
        addition = podman.folder / "short.yaml"
        addition.write_text(json.dumps({"services": {n: {"environment": SHORT} for n in ("backend", "worker")}}))
        self.words = [os.environ.get("PODMAN_COMPOSE") or "podman-compose", "-p", "images",
                      *(("--profile", profile) if profile else ()),
                      "--env-file", "/dev/null", "-f", file, "-f", str(addition)]

    def compose(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        own = {k: v for k, v in self.podman.env.items() if not k.startswith(("DYNACONF_", "MLFLOW_", "INCOME_"))}
        return subprocess.run([*" ".join(self.words).split(), *words], cwd=ROOT, env={**own, **self.env, **env},
                              capture_output=True, text=True)

    def container(self, service: str) -> str:
        return f"images_{service}_1"

    def told(self, service: str, what: str) -> str:
        return self.podman("inspect", "--format", "{{" + what + "}}", self.container(service))

    def log(self, service: str) -> str:
        done = self.podman.try_("logs", "--tail", "40", self.container(service))
        return f"\n── {service}\n{done.stdout}{done.stderr}"

    def healthy(self, service: str) -> bool:
        "By the health check of its image; the worker has none."
        if service == "worker":
            return self.told(service, ".State.Running") == "true"
        return self.podman.try_("healthcheck", "run", self.container(service)).returncode == 0

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        try:
            return wait_for(condition, seconds, what)
        except AssertionError as e:
            raise RuntimeError(f"{e}{''.join(map(self.log, self.services))}") from None

    def up(self) -> None:
        start = time.monotonic()
        done = self.compose("up", "-d", "--no-build")
        assert done.returncode == 0, done.stdout + done.stderr
        taken = {}
        for service in self.services:
            self.wait(lambda s=service: self.healthy(s), PATIENCE, f"{service} is healthy")
            taken[service] = time.monotonic() - start
        say(f"{self.file}: all healthy; " + ", ".join(f"{s} {t:.0f} s" for s, t in taken.items()))

    def check_rights(self) -> None:
        "As the file says: read-only, without rights, not root, limited."
        for s in set(self.services) - {"postgres"}:
            code = ("p={l.split(':')[0]: l.split()[1:] for l in open('/proc/self/status')}; "
                    "print(p['Uid'][0], p['CapEff'][0], p['NoNewPrivs'][0])")
            words = ["python", "-c", code] if s in ("mlflow", "backend", "worker", "frontend") else [
                "bash", "-c", "set -- $(grep -E '^(Uid|CapEff|NoNewPrivs)' /proc/self/status); echo $2 $7 $9"]
            uid, rights, no_new = self.podman("exec", self.container(s), *words).split()
            assert uid != "0" and int(rights, 16) == 0 and no_new == "1", (s, uid, rights, no_new)
            assert self.podman.try_("exec", self.container(s), "touch", "/here").returncode, f"{s} writes its root"
            assert int(self.told(s, ".HostConfig.Memory")) > 0, s

    def memory(self) -> dict[str, dict[str, Any]]:
        "Of each service: its image, what it uses, and what it may use, in MB."
        said: dict[str, dict[str, Any]] = {}
        for service in sorted(self.services):
            used = json.loads(self.podman("stats", "--no-stream", "--format", "json", self.container(service)))[0]
            said[service] = {"image": self.told(service, ".ImageName").rsplit("/", 1)[-1].split(":")[0],
                             "used": round(megabytes(used["mem_usage"].split("/")[0])),
                             "limit": round(int(self.told(service, ".HostConfig.Memory")) / 1e6)}
        told = ", ".join(f"{s} {m['used']} of {m['limit']} MB" for s, m in said.items())
        say(f"{self.file}: memory {told}")
        return said

    def kill(self, service: str, recovered: Callable[[], Any]) -> None:
        "Its first process ends without a word, as for want of memory; the restart policy brings it back."
        begun = self.told(service, ".State.StartedAt")
        os.kill(int(self.told(service, ".State.Pid")), signal.SIGKILL)
        start = time.monotonic()
        self.wait(lambda: self.told(service, ".State.StartedAt") != begun, 120, f"{service} is started again")
        self.wait(lambda: self.healthy(service) and recovered(), PATIENCE, f"{service} recovers")
        say(f"{self.file}: {service} killed; back after {time.monotonic() - start:.0f} s")

    def stop(self) -> None:
        "Each ends by itself within 15 s of its signal, at once with the others."
        def stop(service: str) -> tuple[str, float, str]:
            start = time.monotonic()
            self.podman("stop", "-t", "15", self.container(service))
            return service, time.monotonic() - start, self.told(service, ".State.ExitCode")
        with ThreadPoolExecutor() as pool:
            ended = list(pool.map(stop, self.services))
        say(f"{self.file}: stopped; " + ", ".join(f"{s} {t:.0f} s (exit {code})" for s, t, code in ended))
        assert all(t < 15 and code != "137" for _, t, code in ended), ended


@contextmanager
def running(podman: Podman, *words: str, **env: str) -> Iterator[Stack]:
    stack = Stack(podman, *words, **env)
    try:
        stack.up()
        yield stack
    finally:
        podman.clear()


def use(stack: Stack, api: httpx.Client, key: str) -> None:
    "The worker trains a first model; predict, upload, and be served the model that this gave."
    start = time.monotonic()
    stack.wait(lambda: api.get("/ready").status_code == 200, PATIENCE, "a first model is served")
    say(f"{stack.file}: a first model after {time.monotonic() - start:.0f} s")
    told = api.post("/predict", json={"data": PERSON}).raise_for_status().json()
    assert told["prediction"] in ("<=50K", ">50K") and 0 < told["probability"] < 1, told
    older = [f"{int(age) + 1},{rest}" for age, rest in (line.split(",", 1) for line in LINES[1:501])]
    new = {"file": ("new.csv", csv(older))}  # nobody like that is there yet
    assert api.post("/upload_data", files=new).status_code == 401, "without the key"
    start = time.monotonic()
    answer = api.post("/upload_data", files=new, headers={"X-API-Key": key})
    assert answer.status_code == 202, answer.text
    job = answer.json()["job_id"]
    over = ("succeeded", "failed", "cancelled")
    done = stack.wait(lambda: (j := api.get(f"/jobs/{job}").json())["state"] in over and j, PATIENCE, "the job ends")
    assert done["state"] == "succeeded" and done["result"]["models"], done
    say(f"{stack.file}: upload, analysis and training in {time.monotonic() - start:.0f} s: {done['result']['outcome']}")


def open_doors(stack: Stack, api: str, mlflow: str, dashboard: str, book: str, **context: Any) -> None:
    "In a browser: each page is there, does something, and asks nobody else for anything."
    with browser(PUBLIC) as chromium:
        def visit(url: str, **more: Any) -> Page:
            opened = Page(chromium, url.split("/", 3)[0] + "//" + url.split("/")[2], **more)
            opened.page.set_default_timeout(240_000)
            opened.page.goto(url)
            return opened
        seen = {"API": visit(f"{api}/docs"), "MLflow": visit(f"{mlflow}/#/experiments", **context),
                "dashboard": visit(f"{dashboard}/", viewport={"width": 1280, "height": 1800}),
                "book": visit(f"{book}/")}
        page = seen["API"].page
        page.locator("#operations-predictions-predict").wait_for()
        seen["MLflow"].page.get_by_role("link", name="adult-income").first.wait_for()
        page = seen["dashboard"].page
        page.get_by_text("probability of").first.wait_for()
        before = page.locator("body").inner_text()
        page.get_by_role("button", name="A random real row").click()
        page.wait_for_function("before => document.body.innerText !== before", arg=before)
        page = seen["book"].page
        page.locator("article h1").first.wait_for()
        for name, opened in seen.items():
            problems = [p for p in opened.problems if "users/current" not in p and "404" not in p]
            assert not problems, (name, problems)
    say(f"{stack.file}: four doors, in a browser")


def on_this_machine(podman: Podman) -> None:
    ports = {n: str(free_port()) for n in ("API_PORT", "MLFLOW_PORT", "FRONTEND_PORT", "DOCS_PORT")}
    api, mlflow, dashboard, book = (f"http://127.0.0.1:{port}" for port in ports.values())
    with running(podman, "docker-compose.yaml", "mlflow backend worker frontend docs", **ports) as stack, \
            httpx.Client(base_url=api, timeout=240, trust_env=False) as client:
        stack.check_rights()
        key = podman("exec", stack.container("backend"), "cat", "/state/api_key")
        use(stack, client, key)
        open_doors(stack, api, mlflow, dashboard, book)
        stack.memory()
        stack.kill("backend", lambda: client.get("/ready").status_code == 200)
        stack.stop()


def with_postgresql(podman: Podman) -> None:
    "The profile on this machine, with nothing set but the password."
    ports = {n: str(free_port()) for n in ("API_PORT", "MLFLOW_PORT", "FRONTEND_PORT", "DOCS_PORT")}
    with running(podman, "docker-compose.yaml", "postgres mlflow backend worker frontend docs", "postgres",
                 POSTGRES_PASSWORD=token_hex(16), **ports) as stack, \
            httpx.Client(base_url=f"http://127.0.0.1:{ports['API_PORT']}", timeout=240, trust_env=False) as client:
        stack.wait(lambda: client.get("/ready").status_code == 200, PATIENCE, "a first model is served")
        client.post("/predict", json={"data": PERSON}).raise_for_status()
        is_in_postgresql(stack)
        say("docker-compose.yaml with --profile postgres: trains and predicts")
        stack.stop()


def is_in_postgresql(stack: Stack) -> None:
    for database, table in (("mlflow", "runs"), ("jobs", "jobs"), ("studies", "trials")):
        rows = stack.podman("exec", stack.container("postgres"), "psql", "-At", "-U", "mlflow", "-d", database, "-c",
                            f"table {table}")
        assert rows, (database, table)
    files = stack.podman("exec", stack.container("backend"), "find", "/state", "-name", "*.db")
    assert [f for f in files.splitlines() if "auth" not in f] == [], "everything is in PostgreSQL"


def in_service(podman: Podman) -> dict[str, dict[str, Any]]:
    "Memory of each service."
    port = str(free_port())
    url, words, phrase = f"http://{PUBLIC}:{port}", token_hex(16), token_hex(16)
    here, named = f"http://127.0.0.1:{port}", {"Host": f"{PUBLIC}:{port}"}
    secrets = {"REGISTRY": "localhost", "TAG": "dev", "PUBLIC_HOSTS": PUBLIC, "HTTP_PORT": port,
               "API_KEY": token_hex(16), "MLFLOW_USERNAME": "me", "MLFLOW_PASSWORD": words, "MLFLOW_SECRET_KEY": words,
               "POSTGRES_PASSWORD": phrase, "DATABASE": f"mlflow:{phrase}@postgres:5432"}
    services = "postgres mlflow backend worker frontend docs nginx"
    refused = Stack(podman, "docker-compose.prod.yml", services, "postgres", **{**secrets, "API_KEY": ""})
    done = refused.compose("up", "-d", "--no-build")
    assert done.returncode and "API_KEY" in done.stderr and not podman("ps", "-a", "-q"), done.stderr
    with running(podman, "docker-compose.prod.yml", services, "postgres", **secrets) as stack, \
            httpx.Client(base_url=f"{here}/api", timeout=240, trust_env=False, headers=named) as client:
        stack.check_rights()
        assert httpx.get(f"{here}/api/health", trust_env=False).status_code == 421, "by an address, not its name"
        published = [s for s in stack.services if podman("port", stack.container(s))]
        assert published == ["nginx"], published
        use(stack, client, secrets["API_KEY"])
        runs = f"{here}/mlflow/api/2.0/mlflow/experiments/get-by-name?experiment_name=adult-income"
        assert [httpx.get(runs, auth=a, trust_env=False, headers=named).status_code
                for a in (None, ("me", words))] == [401, 200]
        open_doors(stack, f"{url}/api", f"{url}/mlflow", f"{url}/frontend", f"{url}/docs",
                   http_credentials={"username": "me", "password": words})
        is_in_postgresql(stack)
        memory = stack.memory()
        stack.kill("backend", lambda: client.get("/ready").status_code == 200)
        stack.kill("worker", lambda: True)
        stack.kill("nginx", lambda: client.get("/ready").status_code == 200)
        stack.stop()
    return memory


def test(podman: Podman, only: str | None) -> None:
    tested, sizes, memory = images_stamp.digest(), {}, {}
    if only in (None, "build"):
        sizes = {name: build(podman, name) for name in IMAGES}
    if only in (None, "alone"):
        for name in IMAGES:
            alone(podman, name)
    if only in (None, "machine"):
        on_this_machine(podman)
    if only in (None, "postgres"):
        with_postgresql(podman)
    if only in (None, "service"):
        memory = in_service(podman)
    if only:
        return say(f"{only}: passed")
    version = podman("version", "--format", "{{.Client.Version}}")
    images_stamp.write(tested, version, (podman.folder / "base").read_text(), sizes, memory)
    say("the images, each alone, and both Compose files work")
    print(f"── images: commit {images_stamp.STAMP} and {images_stamp.PAGE}, which say so")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the images and run them.")
    parser.add_argument("--storage", type=Path, default=ROOT / ".tools" / "images", help="where the images are kept")
    parser.add_argument("--only", choices=["build", "alone", "machine", "postgres", "service"],
                        help="one part, with images built before")
    chosen = parser.parse_args()
    try:
        podman = prepare(chosen.storage.resolve())
    except Lacking as e:
        required = os.environ.get("CI_IMAGES") == "required"
        print(f"── images: SKIPPED, {'but CI_IMAGES=required' if required else 'nothing was tested'}: {e}")
        return int(required)
    try:
        test(podman, chosen.only)
    finally:
        podman.clear()
    return 0


if __name__ == "__main__":
    sys.exit(main())
