"""Docker, Compose, workflow and nginx files, by their schemas and linters."""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from gateway_helpers import PATH, ROOT, START, WITHOUT_NGINX

from income_mlops import mlserver
from income_mlops.access import Guard
from income_mlops.settings import Serving, Settings, load_settings

BIN = Path(sys.executable).parent
DOCKERFILES = sorted((ROOT / "docker").glob("*/Dockerfile"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
COMPOSE = ["docker-compose.yaml", "docker-compose.prod.yml"]
SECRETS = {"REGISTRY": "example.azurecr.io", "TAG": "0" * 40, "PUBLIC_HOSTS": "income.example", "MLFLOW_USERNAME": "me",
           "DATABASE": "mlflow:" + "p%40ss@db.example:5432",
           **dict.fromkeys(("API_KEY", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY"), "long enough words")}


def run(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    "A program of the environment, in the project folder, without settings of the shell."
    return subprocess.run([str(w) for w in words], cwd=ROOT, capture_output=True, text=True,
                          env={"PATH": f"{BIN}{os.pathsep}{PATH}", "HOME": str(ROOT / ".tools"), **env})


def fine(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def config(file: str, *words: str, **env: str) -> dict:
    return yaml.safe_load(fine(run("docker-compose", "--env-file", "/dev/null", "-f", file, *words, "config", **env)))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda p: p.parent.name)
def test_dockerfiles(dockerfile):
    fine(run("hadolint", dockerfile))
    text = dockerfile.read_text()
    last = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER \d+:\d+$", last, re.M) and "HEALTHCHECK" in last and "STOPSIGNAL" in last
    if "uv export" in text:
        assert "--require-hashes" in text and "ARG INDEX_URL" in text and "ARG CA_FILE" in text


def test_five_images():
    assert [p.parent.name for p in DOCKERFILES] == ["backend", "docs", "frontend", "mlflow", "nginx"]


def test_images_get_what_they_copy():
    "What a Dockerfile copies is there, and .dockerignore lets it through."
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for dockerfile in DOCKERFILES:
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile.read_text(), re.M):
            for source in line.split():
                assert source.split("/")[0] in allowed, source
                assert (ROOT / source).exists() or source == "book", source


def test_the_image_of_the_book_gets_what_its_pages_link_to():
    "A link to a file that is not there stops the building of the book."
    text = (ROOT / "docker/docs/Dockerfile").read_text()
    copied = {s for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) for s in line.split()}
    for page in ("nbs/index.ipynb", "CONTRIBUTING.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\(((?!\w+:|#)[^)#\s]+)", (ROOT / page).read_text()):
            target = Path(os.path.normpath(Path(page).parent / link))
            assert copied & {p.as_posix() for p in (target, *target.parents)}, (page, link)


def test_compose_files_follow_their_schema():
    fine(run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *COMPOSE))


def test_compose_starts_everything_on_this_machine():
    services = config(COMPOSE[0])["services"]
    assert set(services) == {"mlflow", "backend", "worker", "frontend", "docs"}
    ports = {(p["host_ip"], p["published"], name) for name, s in services.items() for p in s.get("ports", [])}
    assert ports == {("127.0.0.1", port, name) for port, name in
                     (("5000", "mlflow"), ("8080", "backend"), ("8501", "frontend"), ("8000", "docs"))}
    assert services["backend"]["environment"]["DYNACONF_MLFLOW__TRACKING_URI"] == "http://mlflow:5000"
    assert services["backend"]["environment"]["DYNACONF_JOBS__STORAGE"] == ""
    assert "backend" in services["backend"]["environment"]["DYNACONF_SERVING__ALLOWED_HOSTS"].split(",")


@pytest.mark.parametrize(("given", "server"), [
    ({"POSTGRES_PASSWORD": "x"}, "mlflow:x@postgres:5432"),
    ({"POSTGRES_PASSWORD": "x", "DATABASE": "me:y@db:5432"}, "me:y@db:5432"),
    ({"DATABASE": "me:y@db:5432"}, "me:y@db:5432")])
def test_a_password_of_postgresql_is_enough_to_use_it(given, server):
    told = config(COMPOSE[0], "--profile", "postgres", **given)["services"]
    address = f"postgresql+psycopg://{server}/"
    for name in ("backend", "worker"):
        assert told[name]["environment"]["DYNACONF_JOBS__STORAGE"] == address + "jobs"
        assert told[name]["environment"]["DYNACONF_OPTIMIZATION__STORAGE"] == address + "studies"
    assert told["mlflow"]["environment"]["DYNACONF_MLFLOW__TRACKING_URI"] == address + "mlflow"


@pytest.mark.parametrize("missing", [None, *SECRETS])
def test_compose_for_service_refuses_to_start_without(missing):
    given = {k: v for k, v in SECRETS.items() if k != missing}
    if missing:
        done = run("docker-compose", "--env-file", "/dev/null", "-f", COMPOSE[1], "config", **given)
        assert done.returncode != 0 and f"required variable {missing} is missing" in done.stderr
        return
    services = config(COMPOSE[1], **given)["services"]
    assert set(services) == {"nginx", "mlflow", "backend", "worker", "frontend", "docs"}
    assert {name: [p["published"] for p in s["ports"]] for name, s in services.items() if "ports" in s} == {
        "nginx": ["80"]}
    assert {s["image"] for s in services.values()} == {
        f"example.azurecr.io/{n}:{'0' * 40}" for n in ("nginx-custom", "mlflow", "backend", "frontend", "docs")}
    assert services["mlflow"]["environment"]["DYNACONF_MLFLOW__AUTHENTICATION"] == "true"


@pytest.mark.parametrize("file", COMPOSE)
def test_containers_are_held_short(file):
    "Read-only, without rights, limited, started again; only the database is as its makers ship it."
    for name, s in config(file, **SECRETS)["services"].items():
        assert s["restart"] in ("always", "unless-stopped") and s["mem_limit"] and s["cpus"], name
        assert s["read_only"] and s["cap_drop"] == ["ALL"] and s["security_opt"] == ["no-new-privileges:true"], name


@pytest.mark.parametrize("file", COMPOSE)
def test_settings_in_compose_files_are_known(file, monkeypatch):
    "What each container is told, its settings understand."
    for name, s in config(file, **SECRETS)["services"].items():
        told = {k: str(v) for k, v in (s.get("environment") or {}).items() if k.startswith("DYNACONF_")}
        with monkeypatch.context() as patch:
            for key, value in told.items():
                patch.setenv(key, value)
            assert isinstance(load_settings(ROOT / "settings.ini"), Settings), name


@pytest.mark.parametrize("file", COMPOSE)
def test_each_service_answers_its_own_health_check(file, monkeypatch):
    "The address in the Dockerfile is one that the service goes by, with the names that the Compose file gives it."
    checked = set()
    for name, s in config(file, **SECRETS)["services"].items():
        folder = s["image"].split("/")[-1].split(":")[0].removesuffix("-custom")
        text = (ROOT / "docker" / folder / "Dockerfile").read_text()
        host = re.search(r"http://([\w.]+:\d+)", text)
        if s.get("healthcheck", {}).get("disable") or not host:
            continue
        with monkeypatch.context() as patch:
            for key, value in (*re.findall(r"\b(DYNACONF_(?!PATHS)\w+)=(\S+)", text), *s["environment"].items()):
                patch.setenv(key, str(value))
            settings = load_settings(ROOT / "settings.ini")
        if name == "backend":
            assert Guard(settings).refuse("GET", [(b"host", host[1].encode())]) is None
        if name == "mlflow":
            allowed = mlserver.command(settings.model_copy(update={"mlflow": settings.mlflow.model_copy(update={
                "tracking_uri": "sqlite://"})}))
            patterns = allowed[allowed.index("--allowed-hosts") + 1].split(",")
            assert any(fnmatch(host[1], p) for p in patterns), patterns
        checked.add(name)
    assert checked == {"backend", "mlflow", "frontend"}


@pytest.mark.parametrize("file", COMPOSE)
def test_what_a_container_keeps_in_memory_for_files_leaves_room(file):
    for name, s in config(file, **SECRETS)["services"].items():
        (tmp,) = s["tmpfs"]
        size = re.fullmatch(r"/tmp:size=(\d+)m", tmp)
        assert size and int(size[1]) * 2**20 < int(s["mem_limit"]) / 2, (name, tmp)


def test_limits_of_the_gateway_are_the_services():
    text = START.read_text()
    serving = Serving()
    for name, limit in (("REQUEST_MB", serving.max_request_mb), ("UPLOAD_MB", serving.max_upload_mb)):
        assert int(re.search(rf"\$\{{{name}:=(\d+)\}}", text)[1]) == limit, name
    told = config(COMPOSE[1], **SECRETS, UPLOAD_MB="7")["services"]
    assert {s["environment"][k] for s in told.values() for k in s.get("environment") or {} if "UPLOAD_MB" in k} == {"7"}
    mlflow = int(told["mlflow"]["mem_limit"]) / 2**20
    assert int(re.search(r"\$\{ARTIFACT_MB:=(\d+)\}", text)[1]) < mlflow / 4, "MLflow holds an artifact in memory"


def test_example_of_the_environment_names_every_variable():
    used = {n for f in COMPOSE for n in re.findall(r"\$\{(\w+)", (ROOT / f).read_text())}
    named = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.M))
    assert used - {"HTTP_PORT"} <= named and not named - used
    assert not run("git", "check-ignore", "-q", ".env").returncode


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows(workflow):
    fine(run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", workflow))
    fine(run("actionlint", "-shellcheck=", "-pyflakes=", workflow))
    fine(run("zizmor", "--offline", "--no-progress", "--quiet", "--persona", "regular", workflow))
    text = yaml.safe_load(workflow.read_text())
    assert text["permissions"] == {} and all("timeout-minutes" in job for job in text["jobs"].values())
    uses = re.findall(r"uses: (\S+)(.*)", workflow.read_text())
    assert uses and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", u) and re.match(r" # v\d", c) for u, c in uses)


def test_only_a_commit_that_passed_becomes_images_and_only_those_are_deployed():
    images, deploy = (yaml.safe_load((ROOT / f".github/workflows/{n}.yml").read_text()) for n in ("images", "deploy"))
    assert images[True] == {"workflow_dispatch": None, "workflow_run": {  # YAML reads "on" as true
        "workflows": ["ci"], "types": ["completed"], "branches": ["main"]}}
    job = images["jobs"]["image"]
    assert "conclusion == 'success'" in job["if"] and "event == 'push'" in job["if"]
    commit = "${{ github.event.workflow_run.head_sha || github.sha }}"
    assert images["run-name"] == job["env"]["COMMIT"] == job["steps"][0]["with"]["ref"] == commit
    azure = deploy["jobs"]["azure"]
    assert azure["env"]["TAG"] == "${{ inputs.tag || github.event.workflow_run.display_title }}"
    assert "REVISION=$COMMIT" in job["steps"][1]["run"]
    (answers,) = [s["run"] for s in azure["steps"] if s.get("name") == "It answers"]
    assert "x-revision: $TAG" in answers


@pytest.mark.skipif(WITHOUT_NGINX, reason="nginx is needed (apt-get install nginx)")
def test_nginx_files(tmp_path):
    file = fine(run(START, "--check", RUN=str(tmp_path), LISTEN="127.0.0.1:8099", API="127.0.0.1:1",
                    FRONTEND="127.0.0.1:2", MLFLOW="127.0.0.1:3", DOCS="127.0.0.1:4",
                    TRUSTED_PROXIES="10.0.0.0/8")).strip()
    # the dashboard's page comes in pieces while its notebook runs
    fine(run("gixy", "--skips", "proxy_buffering_off", file))
    fine(run("gixy", "docker/docs/nginx.conf"))
    fine(run("nginx", "-t", "-q", "-e", "stderr", "-c", ROOT / "docker/docs/nginx.conf"))


@pytest.mark.parametrize("script", [START, ROOT / "docker/azure/deploy"], ids=lambda p: p.name)
def test_scripts(script):
    fine(run("sh" if script == START else "bash", "-n", script))
    assert script.stat().st_mode & 0o111
    if shutil.which("shellcheck"):
        fine(run("shellcheck", script))


def test_deployment_names_what_is_missing():
    done = run(ROOT / "docker/azure/deploy", "sidecars", APP="a", GROUP="g", **SECRETS)
    assert done.returncode == 1 and done.stderr == "error: REGISTRY_USERNAME is not set\n"
