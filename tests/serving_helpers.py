"""Real models of real rows in a real MLflow store, and the real service in a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from helpers import wait_for

from income_mlops import registry
from income_mlops.data import Schema, conform, learn_schema, read_table
from income_mlops.settings import Settings, load_settings
from income_mlops.store import make_store

PROJECT = Path(__file__).parent.parent
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet",
         "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
os.environ.update(QUIET)


def make_settings(folder: Path, tracking_uri: str = "", **serving: Any) -> Settings:
    """Settings of a project in `folder` that uses the real data."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"{k} = {v}" for k, v in {"follow_every": 0.2, "allow_pipeline": "true", **serving}.items())
    (folder / "settings.ini").write_text(f"""
[dataset]
origin_path = {PROJECT / "data" / "adult.train.csv"}
[[columns]]
target = income
positive = ">50K"
ignored = fnlwgt
[mlflow]
tracking_uri = "{tracking_uri}"
experiment_name = adult-income
[serving]
{lines}
""")
    return load_settings(folder / "settings.ini")


class Rows:
    """Some real rows, as a frame for scikit-learn, as requests, with their schema."""

    def __init__(self, settings: Settings, n: int = 3000):
        columns = settings.dataset.columns
        table = read_table(settings.path(settings.dataset.origin_path), columns.missing).head(n)
        self.schema: Schema = learn_schema(table, columns)
        clean = conform(table, self.schema)
        self.frame = clean.select(self.schema.names()).to_pandas()
        self.labels = clean[self.schema.target].to_numpy()
        self.requests = clean.select(self.schema.names()).to_dicts()

    def fit(self, strength: float = 1.0) -> Any:
        from sklearn.compose import make_column_transformer
        from sklearn.impute import SimpleImputer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import OneHotEncoder, StandardScaler
        columns = make_column_transformer(
            (make_pipeline(SimpleImputer(), StandardScaler()), self.schema.names("number")),
            (OneHotEncoder(handle_unknown="ignore"), self.schema.names("category")))
        return make_pipeline(columns, LogisticRegression(C=strength, max_iter=300)).fit(self.frame, self.labels)


def train(settings: Settings, rows: Rows, families: dict[str, float], artifacts: Path | None = None,
          serving: bool = True, dataset: str = "d1") -> list[registry.Version]:
    """One training as the notebook makes it: a run, a nested run per family with a model, registered.

    `families`: name → strength of its regularisation, which is also its cv_log_loss (so the smallest is the best).
    """
    import mlflow
    before = mlflow.get_tracking_uri()
    make_store(settings)
    mlflow.set_tracking_uri(settings.tracking_uri)
    try:
        name = settings.mlflow.experiment_name
        if mlflow.get_experiment_by_name(name) is None:
            mlflow.create_experiment(name, artifacts.as_uri() if artifacts else None)
        mlflow.set_experiment(name)
        made = []
        with mlflow.start_run():
            for family, strength in families.items():
                with mlflow.start_run(nested=True, tags={"family": family}) as run:
                    mlflow.log_metric("cv_log_loss", strength)
                    logged = mlflow.sklearn.log_model(
                        rows.fit(strength), name="model", serialization_format="cloudpickle",
                        pyfunc_predict_fn="predict_proba", pip_requirements=["scikit-learn"])
                    if serving:
                        mlflow.log_text(rows.schema.model_dump_json(), "serving/schema.json")
                        mlflow.log_text(json.dumps(rows.requests[:2]), "serving/examples.json")
                made.append((run.info.run_id, logged.model_uri, family))
        return [registry.register(settings, *m, dataset) for m in made]
    finally:
        mlflow.set_tracking_uri(before)


def copy_store(template: Settings, folder: Path, **serving: Any) -> Settings:
    """A project of its own whose registry starts as a copy of the template's (its artifacts stay there)."""
    settings = make_settings(folder, **serving)
    settings.state.mkdir(parents=True)
    shutil.copy(template.state / "mlflow.db", settings.state / "mlflow.db")
    return settings


class Api:
    """The service in a process of its own, spoken to over HTTP."""

    def __init__(self, settings: Settings):
        code = "import sys; from income_mlops.serving import serve; from income_mlops.settings import load_settings; " \
               "serve(load_settings(sys.argv[1]), 0)"
        self.log = (settings.root / "api.log").open("a")
        self.process = subprocess.Popen([sys.executable, "-c", code, str(settings.root / "settings.ini")],
                                        stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=settings.root)
        line = self.process.stdout.readline()
        assert line.startswith("API: "), (settings.root / "api.log").read_text()
        self.url = line.removeprefix("API: ").strip()
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def get(self, path: str) -> Any:
        return self.http.get(path).json()

    def predict(self, data: Any) -> httpx.Response:
        return self.http.post("/predict", json={"data": data})

    def serving(self, model: str, version: int) -> bool:
        told = self.get("/health")
        return (told["model"], told["version"]) == (f"adult-income.{model}", version)

    def stop(self, how: int = signal.SIGTERM) -> float:
        """Seconds it took to end."""
        start = time.monotonic()
        self.process.send_signal(how)
        self.process.wait(15)
        self.http.close()
        self.process.stdout.close()
        self.log.close()
        return time.monotonic() - start

    def __enter__(self) -> "Api":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)


class MlflowServer:
    """A real tracking server in a process group of its own."""

    def __init__(self, folder: Path, port: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / "mlflow.log").open("a")
        self.uri = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port), "--host", "127.0.0.1",
             "--backend-store-uri", f"sqlite:///{folder / 'server.db'}",
             "--artifacts-destination", str(folder / "files")],
            stdout=self.log, stderr=self.log, start_new_session=True,
            env={**os.environ, **QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})

    def wait(self) -> None:
        wait_for(lambda: httpx.get(self.uri + "/health").status_code == 200, 90, "MLflow")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()
