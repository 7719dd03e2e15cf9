import difflib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime

import pytest
from serving_helpers import Api, MlflowServer, Rows, copy_store, make_settings, train, wait_for
from starlette.testclient import TestClient

from income_mlops import audit, promotion, registry
from income_mlops.chosen import chosen, glance
from income_mlops.data import Column, Schema
from income_mlops.requests import BadRequest, RequestModel, body_schema, typical_row
from income_mlops.serving import ServingError, create_app, serve
from income_mlops.settings import load_settings


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """XGBoost 1 and RandomForest 1 of a first training, XGBoost 2 of a second, XGBoost 3 without `serving/`."""
    settings = make_settings(tmp_path_factory.mktemp("template"))
    settings.state.mkdir()
    rows = Rows(settings)
    train(settings, rows, {"XGBoost": 0.30, "RandomForest": 0.31}, settings.root / "artifacts")
    train(settings, rows, {"XGBoost": 0.005})
    train(settings, rows, {"XGBoost": 0.28}, serving=False)
    return settings


@pytest.fixture(scope="module")
def rows(template):
    return Rows(template)


@pytest.fixture(scope="module")
def expected(rows):
    """Probability of each row by family and version, from models fitted here, not loaded."""
    models = {("XGBoost", 1): 0.30, ("RandomForest", 1): 0.31, ("XGBoost", 2): 0.005}
    return {k: rows.fit(v).predict_proba(rows.frame)[:, 1].tolist() for k, v in models.items()}


class Served:
    """The application in this process, with a model in service."""

    def __init__(self, settings, client):
        self.settings, self.client, self.loader = settings, client, client.app.state.loader
        self.key = {"X-API-Key": client.app.state.api_key}

    def serving(self, family, version):
        s = self.loader.served
        return s is not None and (s.version.family, s.version.version) == (family, version)


def start(settings):
    return TestClient(create_app(settings), base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture
def app(template, tmp_path):
    settings = copy_store(template, tmp_path / "project")
    with start(settings) as client:
        served = Served(settings, client)
        wait_for(lambda: served.loader.served, what="a model")
        yield served


@pytest.fixture(scope="module")
def shared(template, tmp_path_factory):
    """One application for tests that do not change what is served."""
    settings = copy_store(template, tmp_path_factory.mktemp("shared") / "project", max_rows=50, max_request_mb=0.5)
    with start(settings) as client:
        served = Served(settings, client)
        wait_for(lambda: served.loader.served, what="a model")
        yield served


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """The service, and a real MLflow server that takes its time to start."""
    folder = tmp_path_factory.mktemp("life")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = make_settings(folder / "project", f"http://127.0.0.1:{port}")
    mlflow = MlflowServer(folder / "mlflow", port)
    try:
        with Api(settings) as api:
            yield settings, mlflow, api
    finally:
        mlflow.stop()


def test_it_answers_before_mlflow_does(life):
    _, _, api = life
    told = api.get("/health")
    assert told["status"] == "ok" and not told["ready"] and told["reason"]
    reply = api.predict({})
    assert reply.status_code == 503 and int(reply.headers["Retry-After"]) > 0 and "no model" in reply.json()["detail"]


# --- answers


def test_one_row_and_many_rows_get_the_pipelines_probabilities(shared, rows, expected):
    p = expected["XGBoost", 1]
    reply = shared.client.post("/predict", json={"data": rows.requests[0]}).json()
    assert reply == {"prediction": "<=50K", "probability": pytest.approx(p[0], abs=1e-12),
                     "model_name": "adult-income.XGBoost", "model_version": 1}
    for begin in range(0, 200, 50):
        reply = shared.client.post("/predict", json={"data": rows.requests[begin:begin + 50]}).json()
        assert reply["probability"] == pytest.approx(p[begin:begin + 50], abs=1e-12)
        assert reply["prediction"] == [">50K" if v >= 0.5 else "<=50K" for v in p[begin:begin + 50]]
    assert reply["model_version"] == 1
    assert any(None in r.values() for r in rows.requests[:200]), "missing values were among them"


def test_the_threshold_of_the_settings_decides(template, tmp_path, rows):
    with start(copy_store(template, tmp_path / "p", threshold=0.05)) as client:
        wait_for(lambda: client.app.state.loader.served)
        reply = client.post("/predict", json={"data": rows.requests[:50]}).json()
    assert reply["prediction"] == [">50K" if v >= 0.05 else "<=50K" for v in reply["probability"]]
    assert {">50K", "<=50K"} == set(reply["prediction"])


def test_missing_markers_unknown_levels_and_ignored_columns_are_accepted(shared, rows):
    def p(**changes):
        reply = shared.client.post("/predict", json={"data": {**rows.requests[0], **changes}})
        assert reply.status_code == 200, reply.text
        return reply.json()["probability"]
    missing = p(workclass=None)
    assert p(workclass="?") == p(workclass="") == missing != p()
    assert p(fnlwgt=77516) == p(fnlwgt=None) == p()
    assert p(age=39.5) != p(age=39) == p(age=39.0)
    p(**{"age": 10**30, "hours-per-week": -0.0})

    def counted(column):
        page = shared.client.get("/metrics").text
        found = [x for x in page.splitlines() if x.startswith(f'unknown_categories_total{{column="{column}"}}')]
        return float(found[0].split()[-1]) if found else 0
    before = counted("sex")
    p(sex="Unheard-of")
    p(sex=" Male")
    assert counted("sex") == before + 2 and counted("workclass") == 0


BAD = [
    ({"age": "39"}, "data.age: expected a number or null, got the text \"39\""),
    ({"age": True}, "data.age"), ({"age": [39]}, "data.age"), ({"age": {}}, "data.age"),
    ({"sex": 1}, "data.sex: expected a text or null, got the number 1"), ({"sex": False}, "data.sex"),
    ({"sex": ["Male"]}, "data.sex"), ({"marital-status": 1.5}, "data.marital-status"),
    ({"fnlwgt": "many"}, "data.fnlwgt"), ({"income": ">50K"}, "data.income: is what is predicted"),
    ({"marital_status": "Divorced"}, "did you mean 'marital-status'?"), ({"": 1}, "data.: no such field"),
    ({"age": math.nan}, "data.age"), ({"capital-gain": math.inf}, "data.capital-gain"),
    ({"capital-loss": -math.inf}, "data.capital-loss"), ({"age": "\ud800"}, "data.age: expected a number"),
    ({"native-country": "Pe\udc80ru"}, "data.native-country: expected a text or null, got the text"),
    ({"\ud800": 1}, "data.\\ud800: no such field"), ({"x" * 9000: 1}, "data." + "x" * 57 + "…: no such field"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_a_wrong_field_is_named(shared, rows, changes, words):
    reply = shared.client.post("/predict", content=json.dumps({"data": {**rows.requests[0], **changes}}))
    assert reply.status_code == 422 and words in reply.json()["detail"]
    many = [rows.requests[0], {**rows.requests[1], **changes}]
    reply = shared.client.post("/predict", content=json.dumps({"data": many}))
    assert reply.status_code == 422 and words.replace("data.", "data[1].") in reply.json()["detail"]


def test_a_body_full_of_misspelt_fields_is_not_read_to_its_end(shared, rows, monkeypatch):
    "Each comparison with all columns takes its time, and nobody else is answered meanwhile."
    compared = []
    real = difflib.get_close_matches
    monkeypatch.setattr(difflib, "get_close_matches", lambda word, *a: compared.append(word) or real(word, *a))
    many = {f"marital_status_{i}": i for i in range(5000)}
    for data in ({**rows.requests[0], **many}, [{**rows.requests[0], **many}]):
        detail = shared.client.post("/predict", json={"data": data}).json()["detail"]
        assert detail.count("no such field") == 10 and detail.endswith("; and more")
    assert len(compared) <= 22
    detail = shared.client.post("/predict", json={"data": rows.requests[0], **many}).json()["detail"]
    assert detail.count("no such field") == 10 and len(detail) < 2000
    long = shared.client.post("/predict", json={"data": {**rows.requests[0], "x" * 400_000: 1}}).json()["detail"]
    assert len(long) < 200 and len(max(compared, key=len)) <= 100


def test_every_missing_field_is_named(shared, rows):
    row = {k: v for k, v in rows.requests[0].items() if k not in ("age", "native-country")}
    detail = shared.client.post("/predict", json={"data": row}).json()["detail"]
    assert "data.age: missing" in detail and "data.native-country: missing" in detail
    detail = shared.client.post("/predict", json={"data": [{}] * 3}).json()["detail"]
    assert detail.endswith("and more") and "\n" not in detail and len(detail) < 2000


@pytest.mark.parametrize(("body", "status", "words"), [
    (b"", 422, "the body is empty"), (b"  ", 422, "the body is empty"), (b"{", 400, "not JSON"),
    (b'{"data": }', 400, "not JSON"), (b"data=1", 400, "not JSON"), (b'{"data": "\xff"}', 400, "not UTF-8"),
    (b"\xff\xfe{\x00", 400, "not UTF-8"), (b"null", 422, "the body must be"), (b"[]", 422, "the body must be"),
    (b"{}", 422, "data: missing"), (b'{"data": null}', 422, "data: expected an object"),
    (b'{"data": 3}', 422, "data: expected an object"), (b'{"data": []}', 422, "data: an empty list"),
    (b'{"data": [null]}', 422, "data[0]: expected an object"), (b'{"data": [[]]}', 422, "data[0]"),
    (b'{"data": {}, "rows": 1}', 422, "rows: no such field"), (b'{"data": ' + b"[" * 200_000, 400, "nested too deeply"),
    (b'{"data": {"age": ' + b"9" * 5000 + b"}}", 400, "not JSON"), (b'{"data": ROW}', 413, "51 rows"),
    (b"[" + b" " * 600_000 + b"]", 413, "serving.max_request_mb"), (b"\x1f\x8b\x08\x00", 400, "not UTF-8"),
    (b'{"data": AGE}', 422, "data.age"),
])
def test_a_wrong_body_is_told(shared, rows, body, status, words):
    body = body.replace(b"ROW", json.dumps(rows.requests[:51]).encode())
    body = body.replace(b"AGE", json.dumps(rows.requests[0]).replace('"age": 39.0', '"age": 1e999').encode())
    reply = shared.client.post("/predict", content=body)
    assert reply.status_code == status and words in reply.json()["detail"], reply.text
    assert "\n" not in reply.json()["detail"]


def test_a_body_is_not_read_past_the_limit(shared):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 5_000_000:
            sent += 100_000
            yield b" " * 100_000

    for path in ("/predict", "/set_model"):
        sent = 0
        assert shared.client.post(path, content=endless(), headers=shared.key).status_code == 413


def test_other_methods_and_addresses(shared):
    assert shared.client.get("/predict").status_code == 405
    assert shared.client.get("/predict").headers["Allow"] == "POST"
    assert shared.client.get("/nothing").json() == {"detail": "Not Found"}
    assert shared.client.get("/set_model").status_code == 405


def test_an_engine_that_fails_is_a_500_and_is_counted(app, rows):
    from dataclasses import replace

    class Broken:
        name, why, inline_rows = "broken", None, 0

        def predict(self, columns):
            return [math.nan]

    app.loader._stop.set()
    app.loader.served = replace(app.loader.served, engine=type("B", (Broken,), {})())
    reply = app.client.post("/predict", json={"data": rows.requests[0]})
    assert reply.status_code == 500 and reply.json()["detail"].startswith("internal error")
    assert 'api_requests_total{route="/predict",status="500"} 1.0' in app.client.get("/metrics").text


def test_fields_of_any_name_and_truth_values():
    names = ["class", "1 x", "a.b`c", "data", "f0", "ümlaut", "$.x[0]"]
    columns = (*(Column(name=n, kind="number") for n in names),
               Column(name="flag", kind="category", categories=("true", "false")))
    model = RequestModel(Schema(columns=columns, target="y", classes=("0", "1")))
    row = {**{n: i for i, n in enumerate(names)}, "flag": True}
    decoded, single = model.decode(json.dumps({"data": row}).encode())
    assert single and [decoded[n][0] for n in names] == list(range(len(names))) and decoded["flag"] == ["true"]
    many = [row, {**row, "flag": "false"}, {**row, "flag": None}]
    decoded, single = model.decode(json.dumps({"data": many}).encode())
    assert not single and decoded["flag"] == ["true", "false", None] and model.unknown(decoded) == {}
    for name in names:
        with pytest.raises(BadRequest) as e:
            model.decode(json.dumps({"data": {**row, name: "x"}}).encode())
        assert str(e.value) == f'data.{name}: expected a number or null, got the text "x"'
    assert model.decode(json.dumps({"data": typical_row(model.schema)}).encode())[1]
    assert body_schema(model.schema)["examples"][0]["data"]["flag"] == "true"


# --- what is told


def test_model_info_health_ready_and_schema(shared, rows):
    info = shared.client.get("/model_info").json()
    assert info == shared.client.get("/model-info").json()
    assert (info["family"], info["model_version"], info["alias"], info["pinned"]) == ("XGBoost", 1, "production", True)
    assert info["engine"] == "pipeline" and "compiled" in info["engine_reason"]
    assert info["metrics"]["cv_log_loss"] == 0.3
    assert info["dataset"] == "d1" and datetime.fromisoformat(info["since"]).tzinfo
    health = shared.client.get("/health").json()
    assert health["ready"] and health["mlflow"]["reachable"] and health["last_error"] is None
    assert shared.client.get("/ready").status_code == 200
    schema = shared.client.get("/schema").json()
    columns = {c["name"]: c for c in schema["columns"]}
    assert columns["age"]["minimum"] == 17 and "Private" in columns["workclass"]["categories"]
    assert columns["fnlwgt"]["ignored"] and not columns["age"]["ignored"]
    assert schema["examples"] == rows.requests[:2] and schema["positive"] == ">50K"
    assert shared.client.post("/predict", json={"data": schema["examples"]}).status_code == 200


def test_models_lists_every_version(shared):
    models = shared.client.get("/models").json()
    assert [(m["family"], m["version"], m["served"]) for m in models] == [
        ("XGBoost", 3, False), ("XGBoost", 2, False), ("RandomForest", 1, False), ("XGBoost", 1, True)]
    assert models[0]["aliases"] == ["newest"] and models[0]["metrics"] == {"cv_log_loss": 0.28}


def test_openapi_shows_the_real_fields_and_a_row_that_works(shared, rows):
    from jsonschema import Draft202012Validator
    document = shared.client.get("/openapi.json").json()
    post = document["paths"]["/predict"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    Draft202012Validator.check_schema(schema)
    row = schema["properties"]["data"]["anyOf"][0]
    assert set(row["required"]) == set(rows.schema.names()) and "fnlwgt" in row["properties"]
    assert "Divorced" in row["properties"]["marital-status"]["description"]
    for example in schema["examples"]:
        reply = shared.client.post("/predict", json=example)
        assert reply.status_code == 200
        Draft202012Validator(post["responses"]["200"]["content"]["application/json"]["schema"]).validate(reply.json())
    assert {"/health", "/ready", "/model_info", "/models", "/schema", "/metrics", "/set_model"} < {*document["paths"]}
    assert "APIKeyHeader" in document["components"]["securitySchemes"]


def test_every_problem_has_the_form_that_openapi_says(shared, rows, tmp_path):
    from jsonschema import Draft202012Validator
    document = shared.client.get("/openapi.json").json()
    assert "HTTPValidationError" not in json.dumps(document)
    seen = set()

    def check(method, path, status, client=shared.client, route=None, **request):
        reply = client.request(method, path, **request)
        assert reply.status_code == status, reply.text
        told = document["paths"][route or path][method]["responses"][str(status)]
        schema = {**told["content"]["application/json"]["schema"], "components": document["components"]}
        Draft202012Validator(schema).validate(reply.json())
        assert schema["$ref"].endswith("/Problem") and set(reply.json()) == {"detail"}
        seen.add(status)
    newest = {"alias": "newest", "model": "XGBoost"}
    for path in ("/predict", "/explain"):
        check("post", path, 400, content=b"{")
        check("post", path, 422, json={"data": {}})
        check("post", path, 413, json={"data": rows.requests[:51]})
        check("post", path, 403, json={}, headers={"Host": "evil.example"})
    check("post", "/explain", 409, json={"data": rows.requests[0]})
    check("post", "/set_model", 401, json=newest)
    check("post", "/set_model", 404, json={"alias": "nobody"}, headers=shared.key)
    check("post", "/set_model", 409, json=newest, headers=shared.key)
    check("post", "/set_model", 422, json={}, headers=shared.key)
    evaluation = "/models/{family}/{version}/evaluation"
    check("get", "/models/XGBoost/9/evaluation", 404, route=evaluation)
    check("get", "/models/XGBoost/nine/evaluation", 422, route=evaluation)
    with start(make_settings(tmp_path / "empty")) as empty:
        for method, path in (("post", "/predict"), ("post", "/explain"), ("get", "/ready"), ("get", "/schema")):
            check(method, path, 503, empty, json={"data": {}} if method == "post" else None)
    assert seen == {400, 401, 403, 404, 409, 413, 422, 503}
    body = document["paths"]["/explain"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert Draft202012Validator(body).is_valid({"data": rows.requests[0]})
    assert not Draft202012Validator(body).is_valid({"data": {}})


def test_the_documentation_page_needs_no_network(shared):
    page = shared.client.get("/docs").text
    assert "http://" not in page and "https://" not in page
    for word in page.split('"'):
        if word.startswith("/static"):
            assert shared.client.get(word).status_code == 200


def test_metrics_count_requests_and_predictions(app, rows):
    app.client.post("/predict", json={"data": rows.requests[:100]})
    app.client.post("/predict", json={"data": {}})
    app.client.get("/nothing")
    app.client.get("/health", headers={"Host": "evil.example"})
    lines = dict(x.rsplit(" ", 1) for x in app.client.get("/metrics").text.splitlines() if not x.startswith("#"))
    assert lines['api_requests_total{route="/predict",status="200"}'] == "1.0"
    assert lines['api_requests_total{route="/predict",status="422"}'] == "1.0"
    assert lines['api_requests_total{route="other",status="404"}'] == "1.0"
    assert lines['api_requests_total{route="other",status="403"}'] == "1.0"
    assert lines['api_request_seconds_count{route="/predict"}'] == "2.0"
    assert float(lines['predictions_total{class=">50K"}']) + float(lines['predictions_total{class="<=50K"}']) == 100
    served = 'served_model{alias="production",engine="pipeline",name="adult-income.XGBoost",version="1"}'
    assert lines[served] == "1.0"


# --- who may call


@pytest.mark.parametrize(("method", "path", "headers", "status"), [
    ("GET", "/health", {"Host": "evil.example"}, 403), ("POST", "/predict", {"Host": "127.0.0.1.evil.example"}, 403),
    ("POST", "/predict", {"Origin": "http://evil.example"}, 403), ("POST", "/predict", {"Origin": "null"}, 403),
    ("POST", "/set_model", {"Origin": "http://localhost:8501"}, 403),
    ("GET", "/health", {"Origin": "http://evil.example"}, 200), ("GET", "/health", {"Host": "127.0.0.1:8080"}, 200),
    ("POST", "/predict", {"Origin": "http://localhost"}, 422),
])
def test_host_and_origin(shared, method, path, headers, status):
    reply = shared.client.request(method, path, headers=headers, json={} if method == "POST" else None)
    assert reply.status_code == status
    assert not [h for h in reply.headers if h.lower().startswith("access-control")]


def test_writing_needs_the_key(shared):
    for headers in ({}, {"X-API-Key": ""}, {"X-API-Key": "wrong"}, {"X-API-Key": shared.key["X-API-Key"] + "x"}):
        reply = shared.client.post("/set_model", json={"alias": "newest"}, headers=headers)
        assert reply.status_code == 401 and "X-API-Key" in reply.json()["detail"]
    assert (shared.settings.state / "api_key").read_text().strip() == shared.key["X-API-Key"]
    assert (shared.settings.state / "api_key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("body", "status", "words"), [
    ({}, 422, "alias"), ({"alias": ""}, 422, "alias"), ({"alias": 3}, 422, "alias"), ([], 422, "body"),
    ({"alias": "production", "modle": "XGBoost"}, 422, "modle"), (b"{", 422, "JSON"), (b"", 422, "body"),
    ({"alias": "nobody"}, 404, "known aliases: newest"),
    ({"alias": "newest", "model": "Forest"}, 404, "known models: RandomForest, XGBoost"),
    ({"alias": "a" * 300}, 422, "alias"), (b'{"alias": "' + b"a" * 600_000 + b'"}', 413, "serving.max"),
    ({"alias": "newest", "model": "XGBoost"}, 409, "XGBoost version 3 cannot be served"),
])
def test_set_model_refuses_and_leaves_the_old_one(shared, body, status, words):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {**shared.key, "Content-Type": "application/json"}
    reply = shared.client.post("/set_model", content=content, headers=headers)
    assert reply.status_code == status and words in reply.json()["detail"], reply.text
    assert shared.serving("XGBoost", 1)


# --- which model is served


def test_the_alias_is_followed_and_taking_it_away_changes_nothing(app, rows, expected):
    def ask():
        reply = app.client.post("/predict", json={"data": rows.requests[7]}).json()
        return reply["model_name"].rpartition(".")[2], reply["model_version"], reply["probability"]
    promotion.promote(app.settings, "XGBoost", 2, "Production")
    wait_for(lambda: app.serving("XGBoost", 2))
    assert ask() == ("XGBoost", 2, pytest.approx(expected["XGBoost", 2][7], abs=1e-12))
    promotion.promote(app.settings, "RandomForest", 1, "production")
    wait_for(lambda: app.loader.served.others == ("adult-income.RandomForest version 1",))
    assert app.client.get("/model_info").json()["others"] == ["adult-income.RandomForest version 1"]
    promotion.withdraw(app.settings, "XGBoost", "production")
    wait_for(lambda: app.serving("RandomForest", 1))
    promotion.withdraw(app.settings, "RandomForest", "production")
    wait_for(lambda: app.loader.served.pinned)
    assert app.serving("RandomForest", 1), "nobody asked for another one"
    promotion.promote(app.settings, "XGBoost", 1, "production")
    wait_for(lambda: app.serving("XGBoost", 1))
    assert not app.loader.served.pinned and app.loader.last_error is None


def test_a_later_training_is_not_served_but_a_better_sibling_of_the_first_is(template, tmp_path):
    settings = make_settings(tmp_path / "p")
    with start(settings) as client:
        app = Served(settings, client)
        wait_for(lambda: "no model is registered" in app.loader.reason)
        assert client.get("/ready").status_code == 503
        shutil.copy(template.state / "mlflow.db", settings.state / "mlflow.db")
        from mlflow import MlflowClient
        registry_client = MlflowClient(settings.tracking_uri)
        wait_for(lambda: app.serving("XGBoost", 1))
        registry_client.set_registered_model_alias("adult-income.XGBoost", "newest", "2")
        seen = app.loader._seen
        wait_for(lambda: app.loader._seen != seen, what="a look at the moved alias")
        time.sleep(0.5)
        assert app.serving("XGBoost", 1)
        registry_client.delete_model_version("adult-income.XGBoost", "1")
        registry_client.set_registered_model_alias("adult-income.XGBoost", "other", "2")
        wait_for(lambda: app.serving("RandomForest", 1), what="the first training's other model")


def test_set_model_by_hand_is_followed_and_survives_a_restart_until_the_setting_changes(app, template):
    promotion.promote(app.settings, "RandomForest", 1, "staging")
    promotion.promote(app.settings, "XGBoost", 1, "staging")
    reply = app.client.post("/set_model", json={"alias": "STAGING", "model": "randomforest"}, headers=app.key)
    assert reply.status_code == 200 and reply.json()["family"] == "RandomForest"
    assert reply.json()["chosen_by"].startswith("api_key from")
    promotion.promote(app.settings, "XGBoost", 2, "production")
    time.sleep(0.6)
    assert app.serving("RandomForest", 1), "production is not followed now"
    app.client.post("/set_model", json={"alias": "staging"}, headers=app.key)
    assert app.serving("XGBoost", 1)
    promotion.promote(app.settings, "XGBoost", 2, "staging")
    wait_for(lambda: app.serving("XGBoost", 2), what="the alias that was set by hand")
    promotion.promote(app.settings, "XGBoost", 1, "staging")
    wait_for(lambda: app.serving("XGBoost", 1))
    app.loader.stop()
    with start(app.settings) as client:  # a restart
        again = Served(app.settings, client)
        wait_for(lambda: client.get("/health").json()["mlflow"]["reachable"])
        time.sleep(0.5)
        assert again.serving("XGBoost", 1) and again.loader.served.alias == "staging"
        assert again.loader.served.since == app.loader.served.since
        again.loader.stop()
    serving = app.settings.serving.model_copy(update={"alias": "Production"})
    with start(app.settings.model_copy(update={"serving": serving})) as client:
        third = Served(app.settings, client)
        wait_for(lambda: third.serving("XGBoost", 2), what="the alias of the changed setting")
        assert third.loader.served.by is None


def test_who_switched_is_kept(app):
    def switch(alias):
        before = app.loader.served.since
        reply = app.client.post("/set_model", json={"alias": alias}, headers=app.key).json()
        return reply["model_version"], reply["chosen_by"], datetime.fromisoformat(reply["since"]) > before
    promotion.promote(app.settings, "XGBoost", 1, "staging", by="ann")
    promotion.promote(app.settings, "XGBoost", 1, "calm", by="ann")
    by = "api_key from testclient"
    assert switch("staging") == (1, by, True)
    assert switch("calm") == (1, by, True), "the same version, but another decision"
    assert switch("calm") == (1, by, False)
    promotion.promote(app.settings, "XGBoost", 2, "calm", by="bob")
    wait_for(lambda: app.serving("XGBoost", 2))
    promotion.withdraw(app.settings, "XGBoost", "staging", by="eve")
    x = "adult-income.XGBoost version"
    told = [(e.who, e.act, e.what) for e in reversed(audit.entries(app.settings))]
    assert [t for t in told if t[1] != "promote"] == [
        told[0], *[(by, "set_model", f"{x} 1 serves as {a}, before it {x} 1") for a in ("staging", "calm", "calm")],
        ("the alias calm", "follow", f"{x} 2 serves as calm, before it {x} 1"),
        ("eve", "withdraw", f"{x} 1 is staging no longer")]
    assert [t for t in told if t[1] == "promote"] == [("ann", "promote", f"{x} 1 is staging"),
        ("ann", "promote", f"{x} 1 is calm"), ("bob", "promote", f"{x} 2 is calm, which was version 1")]


def test_newest_by_hand_is_pinned(app):
    from mlflow import MlflowClient
    c = MlflowClient(app.settings.tracking_uri)
    c.set_registered_model_alias("adult-income.XGBoost", "newest", "2")
    for alias in ("newest", "Newest"):
        reply = app.client.post("/set_model", json={"alias": alias}, headers=app.key).json()
        assert (reply["model_version"], reply["follows"]) == (2, False)
    c.set_registered_model_alias("adult-income.XGBoost", "newest", "1")
    time.sleep(0.6)
    assert app.serving("XGBoost", 2)


def test_without_following_the_alias_is_asked_once(template, tmp_path):
    settings = copy_store(template, tmp_path / "p", follow_alias="false")
    with start(settings) as client:
        app = Served(settings, client)
        wait_for(lambda: app.serving("XGBoost", 1))
        promotion.promote(settings, "XGBoost", 2, "production")
        time.sleep(0.6)
        assert app.serving("XGBoost", 1)
        app.loader.stop()
    with start(settings) as client:
        app = Served(settings, client)
        wait_for(lambda: app.serving("XGBoost", 2), what="the alias at the next start")


def test_a_version_that_cannot_be_loaded_is_refused(app, rows):
    promotion.promote(app.settings, "XGBoost", 3, "production")
    wait_for(lambda: app.loader.last_error)
    assert "XGBoost version 3 cannot be served" in app.loader.last_error
    assert "still serving adult-income.XGBoost version 1" in app.client.get("/health").json()["last_error"]
    assert app.client.post("/predict", json={"data": rows.requests[0]}).json()["model_version"] == 1
    assert "model_load_failures 1.0" in app.client.get("/metrics").text
    failures = app.loader.failures
    time.sleep(1)
    assert app.loader.failures == failures, "not tried again at every look"
    promotion.promote(app.settings, "XGBoost", 2, "production")
    wait_for(lambda: app.serving("XGBoost", 2))
    assert app.loader.last_error is None


def test_a_pipeline_is_not_unpickled_where_that_is_not_allowed(template, tmp_path):
    settings = copy_store(template, tmp_path / "p", allow_pipeline="false")
    with start(settings) as client:
        error = wait_for(lambda: client.get("/health").json()["last_error"])
        assert "serving.allow_pipeline = true" in error and client.get("/ready").status_code == 503
        assert not list(settings.state.glob("served/*/model"))


def test_a_damaged_copy_is_fetched_again_and_abandoned_pieces_go(app, rows):
    store = app.loader._store
    app.loader.stop()
    damaged = store.folder(app.loader.served.version) / "serving" / "schema.json"
    damaged.write_text("{")
    abandoned, going_on = store.root / ".partial-old", store.root / ".partial-new"
    abandoned.mkdir()
    going_on.mkdir()
    os.utime(abandoned, (0, 0))
    with start(app.settings) as client:
        again = Served(app.settings, client)
        wait_for(lambda: again.serving("XGBoost", 1))
        assert damaged.read_text() == rows.schema.model_dump_json()
        wait_for(lambda: not abandoned.exists())
        assert going_on.exists() and again.loader.last_error is None


def test_a_copy_of_another_experiment_or_of_a_vanished_registry_is_not_served(app):
    app.loader.stop()
    mlflow = app.settings.mlflow.model_copy(update={"experiment_name": "other"})
    with start(app.settings.model_copy(update={"mlflow": mlflow})) as client:
        wait_for(lambda: "'other'" in client.get("/health").json()["reason"])


# --- swaps


def test_every_answer_during_swaps_is_one_models(app, rows, expected):
    promotion.promote(app.settings, "XGBoost", 1, "production")
    promotion.promote(app.settings, "XGBoost", 2, "staging")
    sent, data = list(range(5)), rows.requests[:5]
    wrong, answers, done = [], {1: 0, 2: 0}, threading.Event()

    def predict():
        while not done.is_set():
            reply = app.client.post("/predict", json={"data": data})
            told = reply.json()
            known = expected["XGBoost", told["model_version"]]
            if reply.status_code != 200 or told["probability"] != pytest.approx([known[i] for i in sent], abs=1e-12):
                wrong.append(told)
            answers[told["model_version"]] += 1

    threads = [threading.Thread(target=predict) for _ in range(4)]
    for t in threads:
        t.start()
    try:
        for n in range(20):
            alias = ("staging", "production")[n % 2]
            assert app.client.post("/set_model", json={"alias": alias}, headers=app.key).status_code == 200
    finally:
        done.set()
        for t in threads:
            t.join()
    assert not wrong and min(answers.values()) > 5, answers


# --- the process


def test_starting_imports_nothing_heavy():
    code = "import sys, income_mlops.serving; heavy = ('mlflow', 'pandas', 'polars', 'sklearn', 'xgboost', 'scipy'); " \
           "print([m for m in (*heavy, 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_taken_port_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"port {port} on 127.0.0.1 is taken: set serving.port"):
            serve(make_settings(tmp_path), port)
    with pytest.raises(ServingError, match=r"serving\.host"):
        serve(make_settings(tmp_path, host="192.0.2.1"), 0)
    assert load_settings(tmp_path / "settings.ini").serving.host == "192.0.2.1"


def test_its_life_with_a_real_mlflow_server(life, rows, expected):
    settings, mlflow, api = life
    mlflow.wait()
    wait_for(lambda: "no model is registered" in (api.get("/health")["reason"] or ""), 60, "MLflow to be seen")
    train(settings, rows, {"XGBoost": 0.30, "RandomForest": 0.31})
    wait_for(lambda: api.serving("XGBoost", 1), 60, "the first model, without a restart")
    train(settings, rows, {"XGBoost": 0.005})
    promotion.promote(settings, "XGBoost", 2, "production")
    begin = time.monotonic()
    wait_for(lambda: api.serving("XGBoost", 2), what="the alias that a person moved")
    assert time.monotonic() - begin < 5
    first = pytest.approx(expected["XGBoost", 2][:9], abs=1e-12)
    assert api.predict(rows.requests[:9]).json()["probability"] == first
    seen = glance(settings)
    assert seen and seen.aliases == registry.aliases(settings)
    assert {seen.run_of(v.name, v.version) == v.run_id for v in registry.versions(settings)} == {True}
    assert chosen(settings).choice.version.version == 2
    mlflow.stop()
    assert glance(settings) is None
    wait_for(lambda: api.get("/health")["mlflow"]["reachable"] is False, 40, "MLflow's absence to be seen")
    assert api.predict(rows.requests[:9]).json()["probability"] == first
    assert api.get("/model_info")["aliases"] == ["newest", "production"]
    begin = time.monotonic()
    assert api.http.get("/health").status_code == 200 and time.monotonic() - begin < 0.5
    assert api.http.get("/models").status_code == 503
    assert api.stop() < 3
    with Api(settings) as again:
        wait_for(lambda: again.get("/health")["ready"], 60, "the copy of the last model")
        reply = again.predict(rows.requests[:9]).json()
        assert (reply["model_version"], reply["probability"]) == (2, first)
        assert again.get("/health")["mlflow"]["reachable"] is not True
        assert again.stop() < 3
