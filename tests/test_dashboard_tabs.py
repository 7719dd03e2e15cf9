"""The dashboard's tabs in this process, over the real service in a process of its own: what a browser need not show."""
import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from helpers import wait_for
from serving_helpers import Api as Service
from serving_helpers import Rows, make_settings, train

from income_mlops import promotion
from income_mlops.backend import Api, Backend, Problem
from income_mlops.dashboard import Dashboard
from income_mlops.data_tab import DataTab
from income_mlops.jobs_tab import JobsTab
from income_mlops.model_tab import ModelTab
from income_mlops.parts import AGAIN, Shared
from income_mlops.predict_tab import PredictTab
from income_mlops.settings import load_settings


class Project:
    "Two families with a version each, and the service."

    def __init__(self, folder):
        self.settings = make_settings(folder)
        self.settings.state.mkdir()
        self.rows = Rows(self.settings, 1000)
        train(self.settings, self.rows, {"XGBoost": 0.30, "RandomForest": 0.31}, folder / "artifacts")
        self.service = Service(self.settings)
        self.url = self.service.url

    def shared(self):
        shared = Shared(Api(self.url))
        shared.model, shared.key.value = shared.api.model(), (self.settings.state / "api_key").read_text().strip()
        return shared

    def serve(self, alias, family):
        return self.shared().api.set_model(alias, family, self.shared().secret)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = Project(tmp_path_factory.mktemp("tabs") / "project")
    with made.service as service:
        wait_for(lambda: service.get("/health")["ready"], 240)
        yield made


def versions(tab):
    return [value[1:] for _, value in tab.choice.options]


def again():
    time.sleep(AGAIN)


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_what_served_under_an_alias_is_served_under_it_again(project):
    "Version 1 is production and newest: to revert is to follow production again."
    promotion.promote(project.settings, "XGBoost", 1, "production")
    project.serve("production", "XGBoost")
    tab = ModelTab(project.shared())
    tab.show()
    tab.choice.value = ("newest", "RandomForest", 1)
    tab.switch.click()
    assert project.service.serving("RandomForest", 1) and "RandomForest version 1" in tab.switch_notice.value
    tab.revert.click()
    info = project.service.get("/model_info")
    assert (info["family"], info["model_version"], info["alias"]) == ("XGBoost", 1, "production")
    assert "as production" in tab.switch_notice.value and tab.revert.disabled


def test_a_new_version_is_listed_and_a_moved_alias_serves_nothing_else(project):
    "A retraining while somebody looks: the list follows, and what was chosen before it is not what newest is now."
    project.serve("production", "XGBoost")
    tab = ModelTab(project.shared())
    tab.show()
    tab.choice.value = ("newest", "RandomForest", 1)
    tab.threshold.value = 0.8
    train(project.settings, project.rows, {"RandomForest": 0.2})
    tab.switch.click()
    assert "has moved to version 2" in tab.switch_notice.value and project.service.serving("XGBoost", 1)
    assert tab.choice.value is None and ("RandomForest", 2) in versions(tab)
    again()
    tab.switch.click()
    assert "choose a version first" in tab.switch_notice.value

    tab.choice.value = ("newest", "RandomForest", 2)
    train(project.settings, project.rows, {"XGBoost": 0.25})
    wait_for(lambda: tab.show() or ("XGBoost", 2) in versions(tab), 20, "the list to be asked for again")
    assert "XGBoost 2" in tab.versions.value and tab.choice.value == ("newest", "RandomForest", 2)
    assert tab.threshold.value == 0.8, "the visitor's threshold stays while the same version serves"


def test_switching_when_there_was_no_model(project):
    "What the tab knew was that nothing serves; there is nothing to revert to."
    tab = ModelTab(project.shared())
    tab.shared.model = {}
    tab._list(tab.api.models())
    tab.choice.value = next(v for _, v in tab.choice.options if v[:2] == ("newest", "RandomForest"))
    tab.switch.click()
    assert "is in service" in tab.switch_notice.value and tab.before == []


def test_the_rest_of_the_tab_works_while_mlflow_is_away(project, monkeypatch):
    "The service serves its copy; the threshold stays where the visitor moved it."
    monkeypatch.setenv("DYNACONF_MLFLOW__TRACKING_URI", "http://127.0.0.1:9")
    with Service(project.settings) as service:
        wait_for(lambda: service.get("/health")["ready"], 240)
        shared = Shared(Api(service.url))
        shared.model = shared.api.model()
        tab = ModelTab(shared)
        tab.show()
        assert tab.body.layout.display == "" and not tab.notice.value
        assert "notice" in tab.versions_notice.value and "error of its own" not in tab.versions_notice.value
        tab.threshold.value, tab._seen = 0.7, None
        tab.show()
        assert tab.threshold.value == 0.7


# ── predictions ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_no_probability_stands_under_a_row_it_does_not_belong_to(project):
    "A service that is stopped hangs: a dozen changes wait for it once, not a dozen times."
    tab = PredictTab(project.shared())
    tab.show()
    assert "data-probability" in tab.answer.value and tab.curve.value
    age = tab.form.fields["age"].widget
    os.kill(project.service.process.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        for years in range(30, 42):
            age.value = years
        took = time.monotonic() - start
        said = tab.answer_notice.value
    finally:
        os.kill(project.service.process.pid, signal.SIGCONT)
    assert took < 9 and "did not answer within 5 seconds" in said
    assert [p.value for p in (tab.answer, tab.picture, tab.why, tab.curve)] == [""] * 4
    tab.show()
    assert tab.answer_notice.value == "" and tab.curve.value
    p = project.service.predict(tab.form.values()).json()["probability"]
    assert f'data-probability="{p}"' in tab.answer.value


def test_a_look_at_a_service_that_hangs_is_short(project):
    settings = load_settings(project.settings.root / "settings.ini").model_copy(update={"backend_url": project.url})
    dashboard = Dashboard(settings)
    dashboard.pulse()
    os.kill(project.service.process.pid, signal.SIGSTOP)
    try:
        time.sleep(1)
        start = time.monotonic()
        dashboard.pulse()
        assert time.monotonic() - start < 4 and "did not answer" in dashboard.status.value
    finally:
        os.kill(project.service.process.pid, signal.SIGCONT)


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "1_0"])
def test_what_is_no_number_to_a_person_is_named_by_its_line(project, value):
    tab = PredictTab(project.shared())
    row = project.rows.requests[0]
    content = "\r\n".join((",".join(row), "", *[",".join(str(v) for v in {**row, "age": a}.values())
                                                for a in (30, value)]))
    with tab.batch.notice.guard():
        tab.batch.predict("people.csv", content.encode())
    assert "Line 4, age: " in tab.batch.notice.value and "error of its own" not in tab.batch.notice.value


def test_a_key_that_no_header_can_carry_is_wrong(project):
    for key in ("schlüssel", "a\nb"):
        with pytest.raises(Problem, match="This API key is wrong"):
            Backend(project.url).send("POST", "/set_model", key, json={"alias": "newest"})


# ── a service made of answers ─────────────────────────────────────────────────────────────────────────────────────────

@contextmanager
def answering(**pages):
    "A server whose pages are given; an address for the dashboard, and what it was asked."
    asked = []

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = pages.get(self.path.split("?")[0].strip("/").replace("/", "_"))
            body = body if isinstance(body, str) else json.dumps(body)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_):
            pass
    server = HTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("health", [{"status": "ok"}, [1], "<html>", {"ready": True, "model": "m", "mlflow": {}}])
def test_somebody_else_at_the_address_is_said(tmp_path, health):
    with answering(health=health) as (url, _):
        dashboard = Dashboard(make_settings(tmp_path / "p").model_copy(update={"backend_url": url}))
        dashboard.pulse()
        assert "tone-error" in dashboard.status.value
        assert "not the API of this project" in dashboard.status.value or "ready" in health


def test_a_double_click_uploads_once():
    with answering(upload_data={"rows": 3, "job_id": "j"}) as (url, asked):
        tab = DataTab(Shared(Api(url)))
        tab.shared.key.value = "k"
        tab.file.value = ({"name": "a.csv", "size": 4, "content": b"a\n1\n", "type": "text/csv",
                           "last_modified": datetime.now(UTC)},)
        assert not tab.send.disabled
        tab.send.click()
        said = tab.sent.value
        assert "3 rows stored" in said
        again()
        tab.send.click()
        assert tab.sent.value == said and tab.send.disabled and len(asked) == 1


def test_a_page_that_is_read_is_renewed_when_its_reader_says_so():
    "A cell more in a running notebook, an analysis after the one whose report is open."
    job = {"id": "j", "kind": "train", "state": "running", "created": "2026-01-02T03:04:05Z", "started": "x",
           "ended": None, "by": "me", "cell": 3, "cells": 12, "step": "train", "heading": "h", "elapsed": 1,
           "attempts": 1, "run_id": None, "error": None, "result": {}, "links": {"notebook": "/jobs/j/notebook"}}
    analysis = {"links": {"report": "/report"}, "verdict": "use as is", "findings": [], "started": 0, "run_id": "r1"}
    pages = {"jobs": [job], "jobs_j_notebook": "<p>three cells", "analysis": analysis, "report": "<p>of r1"}
    with answering(**pages) as (url, _):
        tab, data = JobsTab(Shared(Api(url))), DataTab(Shared(Api(url)))
        tab.show()
        data.load()
        sheets = tab.rows["j"].sheet, data.report
        for sheet in sheets:
            sheet.open.click()
        before = [sheet.frame.value for sheet in sheets]
        job["cell"], analysis["run_id"] = 4, "r2"
        tab.show()
        data.load()
        assert [s.frame.value for s in sheets] == before and {s.renew.layout.display for s in sheets} == {""}
        assert "three cells" in before[0] and "of r1" in before[1]
        for sheet in sheets:
            sheet.renew.click()
            assert sheet.renew.layout.display == "none"
