"""A project with a small trained model in its registry, as a training would leave it."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def income_mlops(project: Path, *words: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    "The command as a person runs it in that folder."
    return subprocess.run([sys.executable, "-m", "income_mlops.cli", *words], cwd=project, env={**os.environ, **env},
                          capture_output=True, text=True, timeout=timeout)


def register_small_model(project: Path, family: str = "RandomForest"):
    "Fit a logistic regression on real rows; log and register it under the name of a family. Schema and pipeline."
    import json

    import mlflow
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    from income_mlops.data import conform, learn_schema, read_table
    from income_mlops.registry import register
    from income_mlops.settings import load_settings
    from income_mlops.store import make_store

    with (project / "settings.ini").open("a") as f:  # this small pipeline has no compiled form
        f.write("\n[serving]\nallow_pipeline = true\n")
    settings = load_settings(project / "settings.ini")
    table = read_table(settings.path(settings.dataset.origin_path), settings.dataset.columns.missing).head(4000)
    schema = learn_schema(table, settings.dataset.columns)
    x = conform(table, schema, target=False).select(schema.names()).to_pandas().replace({None: float("nan")})
    x = x.astype(dict.fromkeys(schema.names("category"), "object"))
    columns = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), schema.names("number")),
        (make_pipeline(SimpleImputer(strategy="constant", fill_value="missing", missing_values=None),
                       OneHotEncoder(handle_unknown="ignore")), schema.names("category")))
    pipeline = make_pipeline(columns, LogisticRegression(max_iter=2000))
    pipeline.fit(x.where(x.notna(), None).astype(dict.fromkeys(schema.names("number"), "float64")),
                 (table[schema.target] == schema.positive).cast(int).to_numpy())
    settings.state.mkdir(parents=True, exist_ok=True)
    make_store(settings)
    mlflow.set_tracking_uri(settings.tracking_uri)
    name = settings.mlflow.experiment_name
    if not mlflow.get_experiment_by_name(name):
        mlflow.create_experiment(name, (settings.state / "artifacts").as_uri())
    mlflow.set_experiment(name)
    with mlflow.start_run(), mlflow.start_run(nested=True) as run:
        mlflow.log_metrics({"cv_log_loss": 0.35, "holdout_log_loss": 0.36, "holdout_roc_auc": 0.89})
        model = mlflow.sklearn.log_model(pipeline, name="model", serialization_format="cloudpickle",
                                         pip_requirements=["scikit-learn"])
        mlflow.log_dict(json.loads(schema.model_dump_json()), "serving/schema.json")
    register(settings, run.info.run_id, model.model_uri, family, "d1")
    mlflow.set_tracking_uri("")  # what is tested finds the store by the settings alone
    return settings, schema, pipeline
