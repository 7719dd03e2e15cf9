"""The service with compiled models: from registry to answer without unpickling anything."""
import http.client
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers import free_port
from serving_helpers import Api, copy_store, make_settings, wait_for
from starlette.testclient import TestClient

from income_mlops import promotion, registry
from income_mlops.batch import AHEAD, predict_file, table_model
from income_mlops.chosen import chosen, glance
from income_mlops.datasets import original
from income_mlops.gate import store_compiled
from income_mlops.models import ModelFactory, RandomForest, XGBoost
from income_mlops.predictor import Predictor
from income_mlops.processing import to_frame, to_labels
from income_mlops.served import Store
from income_mlops.serving import create_app
from income_mlops.settings import Settings

TOLERANCE = 1e-6


class Project:
    "A project with both families trained on some rows and registered with their compiled forms."

    def __init__(self, folder: Path):
        import mlflow
        self.settings: Settings = make_settings(folder, allow_pipeline="false")
        dataset = original(self.settings)
        self.schema = dataset.schema
        X, y = to_frame(dataset.train, self.schema).head(6000), to_labels(dataset.train, self.schema)[:6000]
        self.frame = to_frame(dataset.holdout, self.schema).head(3000)
        self.rows = dataset.holdout.head(3000).select(self.schema.names()).to_dicts()
        factory, self.pipelines = ModelFactory(self.settings, self.schema), {}
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(self.settings.tracking_uri)
        self.settings.state.mkdir(parents=True, exist_ok=True)
        name = self.settings.mlflow.experiment_name
        mlflow.create_experiment(name, (folder / "artifacts").as_uri())
        mlflow.set_experiment(name)
        try:
            for family, kind in (("XGBoost", XGBoost), ("RandomForest", RandomForest)):
                default = {**kind.default, **({"max_depth": 9} if family == "RandomForest" else {})}
                self.pipelines[family] = factory.make(family).fit(X, y, default, 60)
                self.register(self.settings, family, self.pipelines[family])
            self.other = factory.make("XGBoost").fit(X, y, XGBoost.default, 20)
        finally:
            mlflow.set_tracking_uri(before)
        self.expected = {f"{name}.{f}": p.predict_proba(self.frame)[:, 1] for f, p in self.pipelines.items()}

    def add_version(self, settings: Settings) -> None:
        "A second version of XGBoost in a copy of the registry."
        import mlflow
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(settings.tracking_uri)
        mlflow.set_experiment(settings.mlflow.experiment_name)
        try:
            self.register(settings, "XGBoost", self.other)
        finally:
            mlflow.set_tracking_uri(before)

    def register(self, settings: Settings, family: str, pipeline: Any) -> None:
        import mlflow
        with mlflow.start_run(nested=True) as run, tempfile.TemporaryDirectory() as d:
            mlflow.log_metric("cv_log_loss", 0.28 if family == "XGBoost" else 0.29)
            stored = store_compiled(pipeline, self.schema, self.frame, Path(d) / "predictor")
            assert stored.reason is None, stored.reason
            (Path(d) / "schema.json").write_text(self.schema.model_dump_json())
            (Path(d) / "examples.json").write_text(json.dumps(self.rows[:2]))
            mlflow.log_artifacts(d, "serving")
            logged = mlflow.sklearn.log_model(pipeline, name="model", serialization_format="cloudpickle",
                                              pip_requirements=["scikit-learn"])
        registry.register(settings, run.info.run_id, logged.model_uri, family, "d1")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("compiled") / "project")


@pytest.fixture(scope="module")
def api(project: Project) -> Any:
    with Api(project.settings) as api:
        wait_for(lambda: api.get("/health")["ready"], what="a model")
        yield api


def test_the_compiled_form_is_served_and_nothing_was_unpickled(project: Project, api: Api) -> None:
    info = api.get("/model_info")
    assert (info["engine"], info["engine_reason"], info["family"]) == ("onnx", None, "XGBoost")
    assert 'engine="onnx"' in api.http.get("/metrics").text
    assert not list(project.settings.state.glob("served/*/model")), "the pipeline was not even fetched"
    expected = project.expected["adult-income.XGBoost"]
    for n in (1, 7, 300, 3000):
        reply = api.predict(project.rows[:n]).json()
        assert np.abs(np.array(reply["probability"]) - expected[:n]).max() < TOLERANCE
        assert reply["prediction"] == [">50K" if p >= 0.5 else "<=50K" for p in expected[:n]]
    one = api.predict(project.rows[5]).json()
    assert abs(one["probability"] - expected[5]) < TOLERANCE


def test_numbers_beyond_the_model_are_refused_with_their_name(project: Project, api: Api) -> None:
    key = {"X-API-Key": (project.settings.state / "api_key").read_text().strip()}

    def serve(family: str) -> None:
        asked = {"alias": "newest", "model": family}
        assert api.http.post("/set_model", json=asked, headers=key).json()["family"] == family
    row = {**project.rows[0], "age": 1e39}
    assert api.predict(row).status_code == 200, "XGBoost takes it for infinite"
    serve("RandomForest")
    try:
        for data, place in ((row, "data.age"), ([project.rows[1], row], "data[1].age"),
                            ([*project.rows[:300], row], "data[300].age")):
            reply = api.predict(data)
            assert reply.status_code == 422 and reply.json()["detail"].startswith(f"{place}: 1e+39 is larger")
        assert api.predict(project.rows[0]).status_code == 200
    finally:
        serve("XGBoost")


@pytest.mark.full
def test_200_changes_of_the_model_under_load(project: Project, tmp_path: Path) -> None:
    "Among three models, two of them versions of one family: every answer is exactly that of the version it names."
    settings = copy_store(project.settings, tmp_path / "own", allow_pipeline="false", follow_alias="false")
    project.add_version(settings)
    for alias, family, version in (("old", "XGBoost", 1), ("new", "XGBoost", 2), ("forest", "RandomForest", 1)):
        promotion.promote(settings, family, version, alias)
    own, rows = {}, project.rows[:200]
    for v in registry.versions(settings):
        registry.download(settings, v, tmp_path / f"{v.name}-{v.version}")
        predictor = Predictor.load(tmp_path / f"{v.name}-{v.version}" / "serving" / "predictor")
        own[v.name, v.version] = predictor.predict_rows(rows).tolist()
    assert len(own) == 3
    stop, wrong, done = threading.Event(), [], [0] * 16  # type: ignore[var-annotated]
    seen = Counter[tuple[str, int]]()

    def check(status: int, answer: Any, asked: slice) -> None:
        which = answer["model_name"], answer["model_version"]
        labels, p = ((answer[k] if isinstance(answer[k], list) else [answer[k]]) for k in ("prediction", "probability"))
        if status != 200 or p != own[which][asked] or labels != [">50K" if v >= 0.5 else "<=50K" for v in p]:
            wrong.append((status, answer))
        seen[which] += 1

    def client(address: str, n: int) -> None:
        connection, i, many = http.client.HTTPConnection(address, timeout=60), 12 * n, n % 4 == 0
        try:
            while not stop.is_set():
                i = (i + 1) % (100 if many else 200)
                asked = slice(i, i + 100) if many else slice(i, i + 1)
                connection.request("POST", "/predict", json.dumps({"data": rows[asked] if many else rows[i]}))
                reply = connection.getresponse()
                check(reply.status, json.loads(reply.read()), asked)
                done[n] += 1
        except Exception as e:  # whatever a client gets that is no answer is wrong
            wrong.append((n, repr(e)))
    with Api(settings) as api:
        wait_for(lambda: api.get("/health")["ready"], what="a model")
        threads = [threading.Thread(target=client, args=(api.url.removeprefix("http://"), n)) for n in range(16)]
        for thread in threads:
            thread.start()
        key = {"X-API-Key": (settings.state / "api_key").read_text().strip()}
        try:
            with httpx.Client(base_url=api.url, timeout=60, headers=key) as person:
                for n in range(200):
                    alias, version = (("old", 1), ("new", 2), ("forest", 1))[n % 3]
                    reply = person.post("/set_model", json={"alias": alias})
                    assert reply.status_code == 200 and reply.json()["model_version"] == version
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert not wrong, wrong[:2]
    assert {*seen} == {*own} and min(seen.values()) > 100 and min(done) > 20, (seen, done)


def test_nothing_heavy_is_imported_before_the_first_answer(project: Project, store: Settings) -> None:
    "The real command, which says what it imports and when: what it will need later is not waited for."
    assert chosen(store).choice.version.family == "XGBoost"
    (store.state / "predicted").rename(store.state / "served")
    body = json.dumps({"data": project.rows[0]}).encode()

    def imported(log: Path, port: int) -> str:
        "What was imported by the first prediction."
        with log.open("w") as err:
            process = subprocess.Popen(
                [sys.executable, "-X", "importtime", "-m", "income_mlops.cli", "--settings",
                 str(store.root / "settings.ini"), "serve", "--no-worker", "--port", str(port)], stderr=err)
        try:
            wait_for(lambda: httpx.post(f"http://127.0.0.1:{port}/predict", content=body).status_code == 200)
            return log.read_text()
        finally:
            process.kill()
            process.wait()
    for n in range(3):  # a second later the registry is asked: on a busy machine that may be before the log is read
        said = imported(store.root / f"imports{n}.txt", free_port())
        heavy = re.findall(r"\| +(mlflow|pandas|polars|sklearn|scipy|xgboost)$", said, re.MULTILINE)
        if not heavy:
            break
    assert re.search(r"\| +onnxruntime$", said, re.MULTILINE) and not heavy


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 7])
def test_a_file_is_predicted_on_every_core(project: Project, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    engine = chosen(project.settings).engine
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    model: Any = table_model(engine, project.schema)
    assert cores <= model.keywords["threads"] * AHEAD < cores + AHEAD


@pytest.mark.full
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_memory_does_not_grow_with_the_file(project: Project, tmp_path: Path, kind: str) -> None:
    import polars as pl
    rows = pl.DataFrame(project.rows)
    code = "import re, sys; from income_mlops.cli import main\n" \
           "try: main(sys.argv[1:])\n" \
           "finally: print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    highest = []
    for times in (150, 500) if kind == "csv" else (500, 1000):  # several groups of Parquet are on their way at once
        table = pl.concat([rows] * times)
        file = tmp_path / f"{times}.{kind}"
        if kind == "csv":
            table.write_csv(file)
        else:
            table.write_parquet(file, row_group_size=100_000)  # a group is what is read at once
        done = subprocess.run([sys.executable, "-c", code, "predict", str(file), "--out", str(tmp_path / "out.csv")],
                              capture_output=True, text=True, cwd=project.settings.root)
        assert done.returncode == 0 and f"{table.height:,} rows" in done.stderr, done.stderr
        highest.append(int(done.stdout) / 1024)
    assert highest[1] - highest[0] < 80, highest  # MB; a million rows more are some 130 MB of text


def test_the_last_model_answers_within_seconds_of_the_start_and_without_mlflow(project: Project, api: Api) -> None:
    "A restart reads the copy in the state folder; MLflow is not there at all."
    assert Store(project.settings).read() is not None
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        other = make_settings(project.settings.root.parent / "restarted", allow_pipeline="false",
                              follow_every=5).root
        (other / "var").symlink_to(project.settings.state)
        text = (other / "settings.ini").read_text()
        (other / "settings.ini").write_text(
            text.replace('tracking_uri = ""', f'tracking_uri = "http://127.0.0.1:{silent.getsockname()[1]}"'))
        from income_mlops.settings import load_settings
        start = time.perf_counter()
        with Api(load_settings(other / "settings.ini")) as again:
            def answered() -> bool:
                return again.predict(project.rows[0]).status_code == 200
            wait_for(answered, seconds=15)
            took = time.perf_counter() - start
            reply = again.predict(project.rows[0]).json()
    assert abs(reply["probability"] - project.expected["adult-income.XGBoost"][0]) < TOLERANCE
    assert took < 9, f"{took:.1f} s: three are promised, on a machine that does nothing else"


def test_a_file_is_predicted_with_the_compiled_form(project: Project, tmp_path: Path) -> None:
    import polars as pl
    pl.DataFrame(project.rows).write_csv(tmp_path / "t.csv")
    assert predict_file(project.settings, tmp_path / "t.csv", tmp_path / "out.parquet", chunk_rows=700) == 3000
    found = pl.read_parquet(tmp_path / "out.parquet")
    expected = project.expected["adult-income.XGBoost"]
    assert np.abs(found["probability"].to_numpy() - expected).max() < TOLERANCE
    assert found["prediction"].to_list() == [">50K" if p >= 0.5 else "<=50K" for p in expected]


# --- the model of a command


@pytest.fixture
def store(project: Project, tmp_path: Path) -> Settings:
    "A project of its own with the same registry, whose models nobody has used yet."
    return copy_store(project.settings, tmp_path / "own", allow_pipeline="false")


def predicted(settings: Settings, project: Project) -> tuple[str, bool, np.ndarray]:
    "What a process of its own says of its model, whether it imported MLflow, and its probabilities."
    import polars as pl
    pl.DataFrame(project.rows).write_parquet(settings.root / "t.parquet")
    code = ("import sys; from pathlib import Path; from income_mlops.batch import predict_file; "
            "from income_mlops.settings import load_settings; p = Path(sys.argv[1]); "
            "predict_file(load_settings(p / 'settings.ini'), p / 't.parquet', p / 'out.parquet', say=print); "
            "print('mlflow' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(settings.root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, imported = done.stdout.splitlines()[-2:]
    return said, imported == "True", pl.read_parquet(settings.root / "out.parquet")["probability"].to_numpy()


def test_a_command_waits_for_mlflow_only_when_something_has_changed(project: Project, store: Settings) -> None:
    first, again = predicted(store, project), predicted(store, project)
    assert first[0] == again[0] == "adult-income.XGBoost version 1 (nobody has set production)"
    assert (first[1], again[1]) == (True, False)
    for _, _, p in (first, again):
        assert np.abs(p - project.expected["adult-income.XGBoost"]).max() < TOLERANCE
    promotion.promote(store, "RandomForest", 1, "Production")
    for wanted in (True, False):
        said, imported, p = predicted(store, project)
        assert (said, imported) == ("adult-income.RandomForest version 1 (production)", wanted)
        assert np.abs(p - project.expected["adult-income.RandomForest"]).max() < TOLERANCE
    promotion.withdraw(store, "RandomForest", "production")
    assert str(chosen(store)) == first[0]


def test_a_command_uses_what_the_api_serves(project: Project, store: Settings) -> None:
    with TestClient(create_app(store), base_url="http://localhost") as client:
        wait_for(lambda: client.get("/health").json()["ready"], what="a model")
        headers = {"X-API-Key": client.app.state.api_key}  # type: ignore[attr-defined]
        asked = {"alias": "newest", "model": "RandomForest"}
        assert client.post("/set_model", json=asked, headers=headers).status_code == 200
    said, imported, p = predicted(store, project)
    assert said == "adult-income.RandomForest version 1 (newest, set by hand in the API)" and not imported
    assert np.abs(p - project.expected["adult-income.RandomForest"]).max() < TOLERANCE
    assert not (store.state / "predicted").exists()
    serving = store.serving.model_copy(update={"alias": "staging"})  # changing the setting overrules the hand
    assert str(chosen(store.model_copy(update={"serving": serving}))).startswith("adult-income.XGBoost version 1")


def test_a_copy_of_another_registry_or_a_damaged_one_is_not_used(project: Project, store: Settings) -> None:
    assert chosen(store).choice.version.family == "XGBoost"
    copies = Store(store, store.state / "predicted")
    model = copies.folder(chosen(store).choice.version) / "serving" / "predictor" / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-9])
    assert chosen(store).choice.version.family == "XGBoost" and model.read_bytes() == whole
    with sqlite3.connect(store.state / "mlflow.db") as db:  # a version of the same name and number from another run
        db.execute("UPDATE model_versions SET run_id = (SELECT run_id FROM model_versions WHERE name LIKE '%Forest')")
    now = chosen(store).engine.predict({c: [r[c] for r in project.rows] for c in project.schema.names()})
    assert np.abs(now - project.expected["adult-income.RandomForest"]).max() < TOLERANCE


def test_many_commands_at_once_bring_a_model_and_load_it(project: Project, store: Settings) -> None:
    "Each downloads, puts its copy in its place and loads it, again and again, while the others do."
    code = """
import sys
from datetime import UTC, datetime
from income_mlops.chosen import _load
from income_mlops.promotion import choose
from income_mlops.served import Record, Store
from income_mlops.settings import load_settings
settings = load_settings(sys.argv[1])
store, choice = Store(settings, settings.state / "predicted"), choose(settings)
for n in range(12):
    record = Record(choice=choice, since=datetime.now(UTC))
    _load(settings, record, store.fetch(choice.version, anew=True))
    store.write(record)
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(store.root / "settings.ini")], text=True,
                                stderr=subprocess.PIPE) for _ in range(4)]
    said = [p.communicate(timeout=300)[1] for p in running]
    assert [p.returncode for p in running] == [0] * 4, max(said)
    copies = Store(store, store.state / "predicted")
    assert {f.name for f in copies.root.iterdir()} == {"current.json", copies.folder(chosen(store).choice.version).name}


def test_two_models_explained_at_once_are_not_mixed(project: Project, store: Settings,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    "An explainer belongs to the model that was asked for, whatever others ask meanwhile."
    from types import SimpleNamespace

    from income_mlops.contributions import FILE, Explainer
    from income_mlops.explaining import Explainers
    explainers, models = Explainers(store), {}
    for v in registry.versions(store):
        folder = Store(store).folder(v) / "serving" / "predictor"
        folder.mkdir(parents=True)
        (folder / FILE).touch()
        models[str(folder)] = SimpleNamespace(version=v)
    monkeypatch.setattr(Explainer, "load", classmethod(lambda cls, folder: str(folder)))
    wrong, before = [], sys.getswitchinterval()

    def ask(folder: str) -> None:
        for _ in range(3000):
            if explainers.of(models[folder]) != folder:  # type: ignore[comparison-overlap, arg-type]
                wrong.append(folder)
    threads = [threading.Thread(target=ask, args=(f,)) for f in [*models] * 2]
    sys.setswitchinterval(1e-6)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(before)
    assert len(models) == 2 and not wrong


def test_a_glance_sees_what_mlflow_sees_or_nothing(project: Project, store: Settings) -> None:
    promotion.promote(store, "XGBoost", 1, "staging")
    seen = glance(store)
    assert seen and seen.aliases == registry.aliases(store)
    for v in registry.versions(store):
        assert seen.run_of(v.name, v.version) == v.run_id
    assert seen.run_of("adult-income.XGBoost", 7) is None
    with registry.asking(store) as client:
        client.delete_model_version("adult-income.XGBoost", "1")
    assert (gone := glance(store)) and gone.run_of("adult-income.XGBoost", 1) is None
    assert gone.aliases == registry.aliases(store)
    (store.state / "mlflow.db").write_text("no database" * 100)
    assert glance(store) is None
    (store.state / "mlflow.db").unlink()
    assert glance(store) is None and not (store.state / "mlflow.db").exists()
    with pytest.raises(registry.NoModel):
        chosen(store)


def test_of_several_errors_the_first_in_the_file_is_told(project: Project, tmp_path: Path) -> None:
    "Chunks are read and predicted ahead; what is wrong later in the file does not hide what comes first."
    import polars as pl

    from income_mlops.batch import predictions, table_model
    from income_mlops.data import DataError
    model = table_model(chosen(project.settings).engine, project.schema)
    pl.DataFrame(project.rows[:1000]).write_csv(tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    age = lines[0].split(",").index("age")
    for line in (151, 420):  # a word for a number; and the file ends in a line of one field
        fields = lines[line - 1].split(",")
        lines[line - 1] = ",".join([*fields[:age], "old", *fields[age + 1:]])
    (tmp_path / "t.csv").write_text("\n".join([*lines[:250], "x", *lines[250:]]) + "\n")
    parts = predictions(tmp_path / "t.csv", model, project.schema, chunk_rows=100)
    assert next(parts).height == 100
    with pytest.raises(DataError, match="line 151: "):
        list(parts)


def test_files_with_quotes_line_ends_and_gaps_are_read_alike(project: Project, tmp_path: Path) -> None:
    "The fast parser and the careful one give the same rows; errors name the line of the file."
    import polars as pl

    from income_mlops.batch import chunks
    from income_mlops.data import DataError
    lines = ["a,b", "1,x", "2,", ",", " 3 ,é", "4,z"]

    def rows(text: str, size: int = 2) -> tuple[list[Any], list[int]]:
        (tmp_path / "t.csv").write_bytes(text.encode())
        parts = list(chunks(tmp_path / "t.csv", size))
        return pl.concat([p for p, _ in parts]).rows(), [n for _, at in parts for n in at]
    plain = rows("\n".join(lines) + "\n")
    assert plain == ([("1", "x"), ("2", None), (None, None), (" 3 ", "é"), ("4", "z")], [2, 3, 4, 5, 6])
    assert rows("\n".join(lines)) == rows("\r\n".join(lines)) == rows("\ufeff" + "\n".join(lines)) == plain
    assert rows("\n".join([*lines[:4], '" 3 ","é"', "4,z"])) == plain, "from the middle on with quotes"
    assert rows("\n".join([*lines[:3], "", *lines[3:]]))[0] == plain[0]
    assert rows("\n".join([*lines, '"5\n6",7', "8,9"]))[1] == [2, 3, 4, 5, 6, 8, 9]
    for bad, line in (("5", 7), ("5,6,7", 7), ('"5', 7)):
        with pytest.raises(DataError, match=f"line {line}"):
            rows("\n".join([*lines, bad]) + "\n")
    (tmp_path / "t.csv").write_bytes(b"a,b\n1,2\n3,\xe4\n")
    with pytest.raises(DataError, match="line 3"):
        list(chunks(tmp_path / "t.csv"))


def test_head_and_body_of_an_answer_come_together(project: Project, api: Api) -> None:
    "One system call, so usually one segment: nothing waits between head and body."
    host, port = api.url.removeprefix("http://").split(":")
    body = json.dumps({"data": project.rows[0]}).encode()
    together = 0
    with socket.create_connection((host, int(port))) as s:
        for _ in range(20):
            s.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
                      + str(len(body)).encode() + b"\r\n\r\n" + body)
            got = s.recv(65536)
            together += got.startswith(b"HTTP/1.1 200") and got.endswith(b"}")
    assert together >= 18
