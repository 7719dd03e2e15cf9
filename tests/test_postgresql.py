"""PostgreSQL for everything: MLflow's server, the studies and the queue, with two workers, as in service."""
import subprocess

import httpx
import pytest
from gateway_helpers import ROOT, WITHOUT_NGINX, System, wait_for
from intake_helpers import fresh
from job_helpers import POSTGRES, postgres

pytestmark = [pytest.mark.full, pytest.mark.timeout(600), pytest.mark.skipif(
    WITHOUT_NGINX or not POSTGRES.is_dir(), reason="nginx and PostgreSQL 15 are needed (apt-get install)")]
PERSON = {"age": 52, "workclass": "Self-emp-not-inc", "education": "HS-grad", "education-num": 9,
          "marital-status": "Married-civ-spouse", "occupation": "Exec-managerial", "relationship": "Husband",
          "race": "White", "sex": "Male", "capital-gain": 0, "capital-loss": 0, "hours-per-week": 45,
          "native-country": "United-States"}


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    "A function that asks a database for rows; and its address, for SQLAlchemy. The databases are those we ship."
    folder = tmp_path_factory.mktemp("postgresql") / "server"
    with postgres(folder):
        def sql(database: str, *words: str) -> list[str]:
            done = subprocess.run([POSTGRES / "psql", "-At", "-v", "ON_ERROR_STOP=1", "-h", folder, "-U", "queue", "-d",
                                   database, *words], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()
        sql("postgres", "-c", "create database mlflow")
        sql("postgres", "-f", ROOT / "docker/postgres/databases.sql")
        yield sql, lambda name: f"postgresql+psycopg://queue@/{name}?host={folder}"


@pytest.fixture(scope="module")
def system(databases, tmp_path_factory):
    "The whole system behind its gateway, and two workers, which train a first model."
    _, address = databases
    system = System(tmp_path_factory.mktemp("system"), store=address("mlflow"), DYNACONF_JOBS__STORAGE=address("jobs"),
                    DYNACONF_OPTIMIZATION__STORAGE=address("studies"), DYNACONF_MODELS="RandomForest",
                    DYNACONF_OPTIMIZATION__N_TRIALS="2", DYNACONF_OPTIMIZATION__INITIAL_N_TRIALS="1",
                    DYNACONF_JOBS__SCHEDULING="normal")
    try:
        system.workers = [system.start(f"worker{n}", ["-m", "income_mlops.cli", "worker"]) for n in range(2)]
        wait_for(lambda: httpx.get(f"{system.url}/api/ready").status_code == 200, 180, "a first model is served")
        yield system
    finally:
        system.stop()


def test_train_upload_retrain_promote(system, databases):
    sql, _ = databases
    api = httpx.Client(base_url=f"{system.url}/api", timeout=60, headers={"X-API-Key": system.key})

    def predict() -> dict:
        return api.post("/predict", json={"data": PERSON}).raise_for_status().json()
    assert predict()["model_version"] == 1
    jobs = [api.post("/upload_data", files={"file": (f"{n}.csv", fresh(100 + n, 200))}).raise_for_status().json()
            for n in range(2)]

    def over() -> list[dict]:
        told = [api.get(f"/jobs/{j['job_id']}").json() for j in jobs]
        return told if all(t["state"] in ("succeeded", "failed", "cancelled") for t in told) else []
    done = wait_for(over, 240, "both jobs end")
    assert [(j["state"], j["attempts"]) for j in done] == [("succeeded", 1)] * 2, done
    assert all(j["result"]["models"] for j in done) and done[0]["ended"] <= done[1]["ended"], "in their order"
    system.command("promote", "RandomForest", "1")
    wait_for(lambda: predict()["model_version"] == 1, 20, "the promoted version is served")
    system.command("promote", "RandomForest", "3")
    wait_for(lambda: predict()["model_version"] == 3, 20, "the other one is")
    # all of it is there, once, and nothing beside it in a file
    assert sql("mlflow", "-c", "select version from model_versions order by 1") == ["1", "2", "3"]
    assert sql("mlflow", "-c", "select count(*) from runs where status = 'RUNNING'") == ["0"]
    assert sql("jobs", "-c", "select state, count(*) from jobs group by 1") == ["succeeded|3"]
    assert sql("studies", "-c", "select state, count(*) from trials group by 1") == ["COMPLETE|5"], "1 + 2 + 2"
    state = system.folder / "var"
    assert not [p for p in state.rglob("*") if p.suffix in (".db", ".journal")], "no store in the state folder"


def test_workers_end_at_once(system):
    for worker in system.workers:
        assert worker.stop() < 15 and worker.process.returncode == 0
