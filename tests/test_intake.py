"""Uploads and jobs over HTTP: what is refused, with column and line, what is taken in, and that nothing else stays."""

import contextlib
import gzip
import io
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import psutil
import pytest
from helpers import wait_for
from intake_helpers import HEADER, LINES, IntakeApi, check_uploads, csv, fresh, make_project, remains, store
from starlette.testclient import TestClient

from income_mlops import datasets, uploads
from income_mlops.data import conform, read_table
from income_mlops.intake import part
from income_mlops.jobs import Queue
from income_mlops.serving import create_app
from income_mlops.store import make_store

ROWS = LINES[3001:3201]  # not in the project's original data
GOOD = csv(ROWS)


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    keys = "ann:eightplusone, night.ly:anotherone"
    settings = make_project(tmp_path_factory.mktemp("intake"), serving={"max_upload_mb": 4, "api_key": keys})
    with IntakeApi(settings) as api:
        yield api
        assert api.stop() < 10


@pytest.fixture(autouse=True)
def nothing_stays(request):
    """Every test begins without uploads and without open jobs."""
    yield
    if "api" in request.fixturenames:
        request.getfixturevalue("api").clear()


def traces(settings):
    """What a refused upload could have left."""
    return remains(settings), [u.id for u in uploads.listed(settings)], len(Queue(settings).list(limit=1000))


def with_row(row, at=5):
    """The good rows with one more, which is that line of the file."""
    return csv([*ROWS[:at - 2], row, *ROWS[at - 2:]])


def with_value(i, value, at=5):
    fields = ROWS[0].split(",")
    fields[i] = value
    return with_row(",".join(fields), at)


def parquet(change=lambda t: t, **options):
    out = io.BytesIO()
    change(pl.read_csv(GOOD, null_values="?")).write_parquet(out, **options)
    return out.getvalue()


def column(name, values):
    return lambda t: t.with_columns(values.alias(name))


# name: (file, column, line, words of the message)
REFUSED = {
    "empty": (b"", None, None, "the file is empty"),
    "blank": (b"\n\n  \n", None, None, "the file is empty"),
    "header only": (HEADER.encode() + b"\n", None, None, "has a header but no rows"),
    "header and empty lines": (HEADER.encode() + b"\n\n\n", None, None, "has a header but no rows"),
    "no header": ("\n".join(ROWS).encode(), "0", 1, "column"),
    "semicolons": (GOOD.replace(b",", b";"), None, None, "separated by semicolons"),
    "tabs": (GOOD.replace(b",", b"\t"), None, None, "separated by tabs"),
    "old Mac line ends": (GOOD.replace(b"\n", b"\r"), None, None, "carriage returns alone"),
    "wrong label": (with_value(14, "rich"), "income", 5, "'rich' is neither '<=50K' nor '>50K'"),
    "label of the official test file": (with_value(14, ">50K."), "income", 5, "'>50K.'"),
    "missing target": (with_value(14, ""), "income", 5, "income"),
    "NaN target": (with_value(14, "NaN"), "income", 5, "'NaN' is neither"),
    "unknown target": (with_value(14, "?"), "income", 5, "income"),
    "no target column": (csv([]).rpartition(b",")[0] + b"\n" + b"\n".join(
        r.rpartition(",")[0].encode() for r in ROWS), "income", None, "column missing: 'income'"),
    "a column missing": ("\n".join(line.partition(",")[2] for line in [HEADER, *ROWS]).encode(), "age", None,
                         "column missing: 'age'"),
    "two columns missing": ("\n".join(line.split(",", 2)[2] for line in [HEADER, *ROWS]).encode(), "age", None,
                            "columns missing: 'age', 'workclass'"),
    "other table": (b"a,b\n1,2\n", "age", None, "columns missing"),
    "numbers as words": (with_value(0, "forty"), "age", 5, "'forty' is not a number"),
    "a number with a unit": (with_value(12, "40 h"), "hours-per-week", 5, "'40 h' is not a number"),
    "decimal commas": (with_value(4, '"9,5"'), "education-num", 5, "'9,5' is not a number"),
    "infinite": (with_value(10, "inf"), "capital-gain", 5, "not a finite number"),
    "too large for a number": (with_value(10, "1e999"), "capital-gain", 5, "not a finite number"),
    "truth values for numbers": (csv(["true" + r[2:] for r in ROWS]), "age", 2, "expected numbers"),
    "a field too many": (with_row(ROWS[0] + ",x"), None, 5, "16 fields, the header has 15"),
    "a field too few": (with_row(ROWS[0].rpartition(",")[0]), None, 5, "14 fields, the header has 15"),
    "quotes unbalanced": (with_value(1, '"Private'), None, len(ROWS) + 2, "unexpected end of data"),
    "quote within": (with_value(1, 'Pri"vate'), None, 5, "a quote out of place"),
    "text after a quote": (with_value(1, '"Pri"vate'), None, 5, "expected after"),
    "fault below a field of two lines": (
        csv([ROWS[0].replace("Private", '"a\nb"', 1), *ROWS[1:], "x" + ROWS[1][2:]]), "age", 203, "not a number"),
    "duplicated header": (GOOD.replace(b"age,", b"sex,", 1), "sex", 1, "'sex' appears twice"),
    "a column without name": (GOOD.replace(b"age,", b",", 1), None, 1, "column 1 has no name"),
    "a header without end": (b"a" * 200_000 + b",b\n1,2\n", None, 1, "field larger than"),
    "UTF-16": (GOOD.decode().encode("utf-16"), None, None, "UTF-16"),
    "Latin-1": (with_value(1, "Büro").decode().encode("latin-1"), None, None, "line 5: byte 0xfc"),
    "zero bytes": (GOOD[:500] + b"\0" + GOOD[500:], None, None, "binary data"),
    "a zero byte far below": (csv([*LINES[3001:5000], *with_value(1, "a\0b", 2).decode().split("\n")[1:2]]),
                              "workclass", 2001, "zero byte"),
    "a very long field": (with_value(1, "x" * 200_000), "workclass", 5, "a text of 200,000 characters"),
    "gzip": (gzip.compress(GOOD), None, None, "gzip-compressed"),
    "zip": (b"PK\x03\x04" + GOOD, None, None, "zip or Excel"),
    "binary": (bytes(range(256)) * 50, None, None, "binary data"),
    "PDF": (b"%PDF-1.7\n" + GOOD, None, None, "a PDF"),
    "JSON": (json.dumps([{"age": 1}]).encode(), None, None, "this is JSON"),
    "JSON of columns": (json.dumps({"age": [1, 2]}, indent=1).encode(), None, None, "this is JSON"),
    "Parquet, truncated": (parquet()[:-200], None, None, "not a readable Parquet file"),
    "Parquet, its beginning": (b"PAR1", None, None, "not a readable Parquet file"),
    "Parquet, damaged within": (parquet()[:1000] + b"\xff" * 400 + parquet()[1400:], None, None,
                                "not a readable Parquet file"),
    "Parquet, nested": (parquet(lambda t: t.with_columns(pl.concat_list("age").alias("age"))), "age", None, "nested"),
    "Parquet, dates for numbers": (parquet(column("age", pl.lit("2026-01-01").str.to_date())), "age", 1,
                                   "row 1: Date values; expected numbers"),
    "Parquet, numbers for the label": (parquet(column("income", pl.lit(1))), "income", 1, "row 1: '1' is neither"),
    "Parquet, words for numbers": (parquet(column("age", pl.lit("old"))), "age", 1, "row 1: 'old' is not a number"),
    "Parquet, bytes for text": (parquet(column("race", pl.lit(b"\xff"))), "race", None, "binary values"),
    "Parquet, no rows": (parquet(lambda t: t.head(0)), None, None, "no rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_are_refused_where_they_are_bad(api, case):
    data, where, line, words = REFUSED[case]
    before = traces(api.settings)
    answer = api.send(data, "../../some name.csv")
    told = answer.json()
    print(told)
    assert answer.status_code == 422, told
    assert words in told["detail"] and "\n" not in told["detail"] and len(told["detail"]) < 600
    assert "/" not in told["detail"].replace("/rows", "") or case == "Parquet, damaged within"
    assert (told["column"], told["line"]) == (where, line)
    assert told["detail"].startswith("some name.csv: "), "it is named as its sender named it, without a path"
    assert traces(api.settings) == before == ([], [], before[2])


# name: (file, checks that remark on it)
ODD = {
    "extra columns": (("\n".join(f"{line},{i}" for i, line in enumerate([HEADER, *ROWS]))).encode(), {"extra column"}),
    "one row": (csv(ROWS[:1]), {"few rows", "one class"}),
    "one class only": (csv([r for r in LINES[3001:3401] if r.endswith("<=50K")]), {"one class"}),
    "formula cells": (with_value(1, '"=cmd|\'/c calc\'!A1"'), {"formula"}),
    "empty lines": (GOOD.replace(b"\n", b"\n\n", 5) + b"\n", {"empty lines"}),
    "byte-order mark": (b"\xef\xbb\xbf" + GOOD, set()),
    "Windows line ends": (GOOD.replace(b"\n", b"\r\n"), set()),
    "no line end at the end": (GOOD[:-1], set()),
    "quoted everywhere": (("\n".join(",".join(f'"{v}"' for v in line.split(",")) for line in [HEADER, *ROWS])).encode(),
                          set()),
    "other order of columns": (("\n".join(",".join(reversed(line.split(","))) for line in [HEADER, *ROWS])).encode(),
                               set()),
    "NaN for a missing number": (with_value(12, ""), set()),
    "Parquet": (parquet(), set()),
    "Parquet, categoricals": (parquet(lambda t: t.with_columns(pl.col(pl.String).cast(pl.Categorical))), set()),
    "Parquet, texts for numbers": (parquet(column("age", pl.col("age").cast(pl.String))), set()),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_files_are_taken_in_with_a_remark(api, case):
    data, checks = ODD[case]
    answer = api.send(data)
    told = answer.json()
    print(told)
    assert answer.status_code == 202 and {r["check"] for r in told["remarks"]} == checks
    (upload,) = uploads.listed(api.settings)
    assert upload.id == told["upload"] and pl.read_parquet(upload.path).height == told["rows"]
    assert check_uploads(api.settings) == {upload.id} and not remains(api.settings)
    api.clear()
    assert not remains(api.settings) and not uploads.listed(api.settings)


def test_one_content_is_one_upload_in_whichever_form(api):
    answers = [api.send(ODD[case][0]) for case in ("byte-order mark", "Windows line ends", "quoted everywhere",
                                                   "other order of columns", "Parquet", "Parquet, categoricals")]
    assert [a.status_code for a in answers] == [202] + [200] * 5
    assert len({a.json()["upload"] for a in answers}) == len({a.json()["job_id"] for a in answers}) == 1
    api.clear()


@pytest.mark.parametrize(("form", "status", "words"), [
    ({"files": {"data": ("x.csv", GOOD)}}, 422, "a field 'data'; expected one file in the field 'file'"),
    ({"files": [("file", ("a.csv", GOOD)), ("file", ("b.csv", GOOD))]}, 422, "two files"),
    ({"files": {"file": ("a.csv", GOOD)}, "data": {"comment": "x"}}, 422, "a field 'comment'"),
    ({"content": GOOD, "headers": {"Content-Type": "text/csv"}}, 415, "multipart/form-data"),
    ({"json": {"file": "x"}}, 415, "multipart/form-data"),
    ({}, 415, "multipart/form-data"),
    ({"content": GOOD, "headers": {"Content-Type": "multipart/form-data"}}, 400, "no boundary"),
    ({"content": GOOD, "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400, "malformed"),
    ({"content": b"--x--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 422, "no file"),
    ({"content": b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + GOOD,
      "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400, "ended early"),
    ({"files": {"file": GOOD}, "params": {"retrian": "true"}}, 422, "unknown parameter 'retrian'"),
    ({"files": {"file": GOOD}, "params": {"retrain": "perhaps"}}, 422, "retrain"),
    ({"files": {"file": GOOD}, "headers": {"X-API-Key": "wrong"}}, 401, "is wrong"),
    ({"files": {"file": GOOD}, "headers": {"X-API-Key": ""}}, 401, "is missing"),
    ({"files": {"file": GOOD}, "headers": {"Host": "evil.example"}}, 403, "allowed_hosts"),
    ({"files": {"file": GOOD}, "headers": {"Origin": "http://evil.example"}}, 403, "evil.example"),
    ({"files": {"file": b"1" * (4 * 2**20 + 1)}}, 413, "serving.max_upload_mb = 4"),
])
def test_bad_requests_are_refused(api, form, status, words):
    before = traces(api.settings)
    answer = api.http.post("/upload_data", **form)
    print(answer.text)
    assert answer.status_code == status and words in answer.json()["detail"]
    assert traces(api.settings) == before


@pytest.mark.parametrize("promised", [True, False], ids=["with its length", "chunked"])
def test_an_endless_stream_ends_at_the_limit(api, promised):
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + GOOD
    sent = 0

    def stream():
        nonlocal sent
        yield head
        while sent < 2 * 2**30:
            yield b"x" * 2**16
            sent += 2**16
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    if promised:
        headers["Content-Length"] = str(len(head) + 2 * 2**30)
    before = api.memory()
    answer = api.http.post("/upload_data", content=stream(), headers=headers)
    assert answer.status_code == 413 and "serving.max_upload_mb" in answer.json()["detail"]
    assert sent < 2 * 2**30 and api.memory() < before + 20
    wait_for(lambda: not remains(api.settings), 30)


def test_a_name_is_never_a_path(api):
    for i, name in enumerate(("../../evil", "/etc/cron.d/evil", "..\\..\\evil", "~/evil", "evil\r\nX: y", "<b>evil</b>",
                              "evil" * 500, ".", "")):
        before = sorted(str(p) for p in api.settings.root.rglob("*evil*"))
        answer = api.send(fresh(i), name)
        assert answer.status_code == 202, (name, answer.text)
        source = answer.json()["source"]
        assert not set("/\\<>\r\n~") & set(source) and 0 < len(source) <= 100
        assert sorted(str(p) for p in api.settings.root.rglob("*evil*")) == before
    api.clear()


def test_what_was_refused_is_in_the_log(api):
    api.send(with_value(0, "forty"), "a/<forty>.csv")
    assert "refused with 422: _forty_.csv: column 'age', line 5: 'forty' is not a number" in api.log.read_text()


def test_a_broken_connection_leaves_nothing(api):
    host, port = api.url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as s:
            s.sendall(b"POST /upload_data HTTP/1.1\r\nHost: localhost\r\nX-API-Key: " + api.key["X-API-Key"].encode()
                      + b"\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 3000000\r\n\r\n"
                      + b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + GOOD * 20)
            wait_for(lambda: remains(api.settings), 30)
    wait_for(lambda: not remains(api.settings), 30)
    assert not uploads.listed(api.settings)


def test_the_way_of_an_upload(api):
    settings = api.settings
    identity = [(r.split(",")[:2], r.split(",")[3:]) for r in LINES[1:2001]]
    new = [r for r in ROWS if (r.split(",")[:2], r.split(",")[3:]) not in identity][:50]
    known = csv([*LINES[1:51], *new, *new[:10]])  # 50 rows of the original, 10 of its own twice
    first = api.send(known, "march.csv").json()
    assert (first["rows"], first["duplicates"], first["repeated"]) == (110, 50, 10) and first["job"] == "retrain"
    job = api.get(first["links"]["job"])
    assert (job["kind"], job["state"], job["upload"]) == ("retrain", "queued", first["upload"])
    assert job["by"] == "ann from 127.0.0.1" and "notebook" not in job["links"]
    assert api.http.get(first["links"]["notebook"]).status_code == 404

    for query in ("?retrain=false", "", "?retrain=true"):  # it waits, and is not doubled
        same = api.send(known, query=query)
        assert same.status_code == 200 and same.json()["job_id"] == job["id"]
    api.http.delete(f"/jobs/{job['id']}").raise_for_status()
    again = api.send(known, query="?retrain=true")
    assert again.status_code == 202 and again.json()["job_id"] != job["id"]
    assert api.get(again.json()["links"]["job"])["parameters"] == {"again": True}
    assert api.send(known).json()["job_id"] == again.json()["job_id"], "the latest one"
    looked = api.send(fresh(1), query="?retrain=false")
    assert looked.status_code == 202 and looked.json()["job"] == "analyze"
    assert api.send(fresh(1), query="?retrain=false").json()["job_id"] == looked.json()["job_id"]

    here = api.get("/uploads")
    assert [len(u["jobs"]) for u in here] == [1, 2] and here[1]["source"] == "march.csv"
    assert api.get(f"/uploads/{first['upload'][:8]}")["rows"] == 110
    assert [j["id"] for j in api.get("/jobs?state=queued&limit=1")] == [looked.json()["job_id"]]
    refused = api.http.delete(f"/uploads/{first['upload']}")
    assert refused.status_code == 409 and "cancel it first" in refused.json()["detail"]
    for path in ("/jobs/nonsense", "/uploads/nonsense", "/jobs/nonsense/notebook"):
        assert api.http.get(path).status_code == 404, path
    assert api.http.delete("/jobs/nonsense").status_code == 404
    assert httpx.delete(api.url + first["links"]["job"]).status_code == 401, "without a key"

    # what a job would do with it
    upload = uploads.load(settings, first["upload"])
    assert datasets.current(settings).manifest.parent is None, "an upload alone changes no training data"
    rows = read_table(upload.path, settings.dataset.columns.missing)
    assert rows.equals(conform(rows, datasets.current(settings).schema))
    version = datasets.merge(settings, rows, f"upload {upload.id[:8]} ({upload.source})")
    base = datasets.current(settings).manifest
    assert version.manifest.rows + version.manifest.holdout_rows == base.rows + base.holdout_rows + 60
    datasets.make_current(settings, version)
    assert api.send(known, query="?retrain=false").json()["duplicates"] == 50, "as it was when it came"

    api.clear()
    (record,) = [d for d in api.get("/uploads?deleted=true") if d["id"] == upload.id]
    assert record["merged_into"] == [version.id] and record["deleted_by"] == "ann from 127.0.0.1"
    assert datasets.load(settings, version.id).train.height == version.manifest.rows, "what was merged stays"
    came = api.send(known)
    assert came.status_code == 202 and came.json()["duplicates"] == 110, "and it may come again"
    assert api.get(f"/uploads/{upload.id}")["jobs"] == [came.json()["job_id"]], "with a job of its own"
    api.clear()
    datasets.make_current(settings, datasets.original(settings))


def test_who_did_what_is_kept_and_shown(api):
    """Keys have names; the record needs one, is added to, and outlives what it tells of."""
    from income_mlops.audit import entries
    before = len(entries(api.settings, 10_000))
    assert httpx.get(f"{api.url}/audit").status_code == httpx.get(
        f"{api.url}/audit", headers={"X-API-Key": "night.ly:anotherone"}).status_code == 401
    sent = api.send(fresh(1), "a.csv", headers={"X-API-Key": "anotherone"})
    assert sent.status_code == 202 and api.send(fresh(1)).status_code == 200, "nothing is done the second time"
    told, id = sent.json(), sent.json()["upload"][:12]
    api.http.delete(f"/jobs/{told['job_id']}")
    api.http.delete(f"/uploads/{id}").raise_for_status()
    later, first = api.get("/audit?limit=2")
    assert (first["who"], first["act"]) == ("night.ly from 127.0.0.1", "upload")
    assert first["what"] == f"upload {id} (a.csv, 300 rows): job {told['job_id']} (retrain)"
    assert (later["who"], later["act"], later["what"]) == ("ann from 127.0.0.1", "delete", f"upload {id} (a.csv)")
    assert first["at"] < later["at"] and len(entries(api.settings, 10_000)) == before + 2
    shown = command(api.settings, "audit", "--json", "--limit", "2")
    assert json.loads(shown.stdout) == [later, first], shown.output
    assert "night.ly from 127.0.0.1" in command(api.settings, "audit").stdout
    assert "upload by night.ly from 127.0.0.1: upload" in api.log.read_text(), "and in the log"


def test_two_clocks_do_not_matter(api):
    """The queue's database and the API may be on machines that disagree about the time."""
    first = api.send(fresh(1)).json()
    manifest = store(api.settings) / first["upload"] / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "received": "2100-01-01T00:00:00Z"}))
    same = api.send(fresh(1))
    assert same.status_code == 200 and same.json()["job_id"] == first["job_id"]
    assert api.get(f"/uploads/{first['upload']}")["jobs"] == [first["job_id"]]
    assert api.http.delete(f"/uploads/{first['upload']}").status_code == 409, "its job waits"


def test_a_job_that_is_entered_while_its_upload_is_to_be_deleted_keeps_it(api):
    """Whether it is needed is asked when nobody can enter a job any more."""
    import fcntl

    from income_mlops.deposits import remove
    first = api.send(fresh(1)).json()
    api.http.delete(f"/jobs/{first['job_id']}").raise_for_status()
    queue = Queue(api.settings)
    with (store(api.settings) / ".lock").open("a") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # somebody brings the same content
        deleting = pool.submit(remove, api.settings, queue, first["upload"], "me")
        time.sleep(0.3)
        assert not deleting.done()
        queue.add("retrain", "you", first["upload"])
        fcntl.flock(lock, fcntl.LOCK_UN)
        with pytest.raises(uploads.InUse, match="cancel it first"):
            deleting.result(30)
    assert [u.id for u in uploads.listed(api.settings)] == [first["upload"]]


def test_pages_do_not_wait_for_files_that_take_long_to_be_looked_through(api):
    job = api.send(fresh(1)).json()["job_id"]
    notebook = api.settings.root / "any.ipynb"
    notebook.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}))
    from income_mlops.jobs import WorkerQueue, worker_name
    worker = WorkerQueue(api.settings, worker_name())
    mine = worker.claim()
    worker.beat(mine, progress={"step": "analyze", "notebook": str(notebook)})
    service = psutil.Process(api.process.pid)
    with ThreadPoolExecutor(2) as pool:
        sent = [pool.submit(api.send, fresh(n, 20_000)) for n in (2, 3)]
        helpers = wait_for(lambda: len(service.children()) >= 2 and service.children(), 30)
        for helper in helpers:
            helper.suspend()
        try:
            assert api.http.get(f"/jobs/{job}/notebook", timeout=60).status_code == 200
            assert not any(s.done() for s in sent)
        finally:
            for helper in helpers:
                helper.resume()
        assert [s.result().status_code for s in sent] == [202, 202]
    worker.finish(mine, "failed", error="for a test")


def test_ten_uploads_at_once(api):
    """Ten contents, each sent twice at the same time: each becomes one upload with one job."""
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda i: api.send(fresh(i // 2)), range(20)))
    assert sorted(a.status_code for a in answers) == [200] * 10 + [202] * 10
    assert len(api.get("/uploads")) == len({a.json()["upload"] for a in answers}) == 10
    assert len(api.get("/jobs?state=queued")) == len({a.json()["job_id"] for a in answers}) == 10
    assert len(check_uploads(api.settings)) == 10 and not remains(api.settings)
    api.clear()


def test_a_notebook_half_executed_is_shown_in_a_cage(api):
    """What an upload said is shown as text, and the page has no rights."""
    job_id = api.send(fresh(1)).json()["job_id"]
    notebook = api.settings.root / "half.ipynb"
    evil = "<script>alert(1)</script>"
    notebook.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Analysis"},
        {"cell_type": "code", "id": "b", "metadata": {}, "execution_count": 1, "source": "print(value)",
         "outputs": [{"output_type": "stream", "name": "stdout", "text": f"{evil}\n"}]},
        {"cell_type": "code", "id": "c", "metadata": {}, "execution_count": None, "source": "next", "outputs": []}]}))
    from income_mlops.jobs import WorkerQueue, worker_name
    worker = WorkerQueue(api.settings, worker_name())
    job = worker.claim()
    assert job.id == job_id
    worker.beat(job, progress={"step": "analyze", "cell": 2, "cells": 3, "heading": "Analysis",
                               "notebook": str(notebook)})
    told = api.get(f"/jobs/{job_id}")
    assert (told["state"], told["cell"], told["cells"], told["heading"]) == ("running", 2, 3, "Analysis")
    assert str(api.settings.root) not in json.dumps(told), "no path of this machine"
    page = api.http.get(told["links"]["notebook"])
    assert page.status_code == 200 and "print" in page.text and evil not in page.text and "&lt;script&gt;" in page.text
    assert page.headers["Content-Security-Policy"].startswith("sandbox")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    worker.finish(job, "failed", error="for a test")
    api.clear()


def test_the_latest_analysis(api):
    for path in ("/analysis", "/analysis/report"):
        answer = api.http.get(path)
        assert answer.status_code == 404 and answer.json() == {"detail": "nothing has been analysed yet"}
    assert api.http.get("/analysis?run=../../x").status_code == 422
    import mlflow

    from income_mlops import analysis
    settings = api.settings
    evil = '"<script>alert(1)</script>"'
    upload = uploads.load(settings, api.send(with_value(1, evil), query="?retrain=false").json()["upload"])
    new, old = analysis.Source(settings, str(upload.path)), analysis.Source(settings, "original")
    make_store(settings)  # the service looks whether there is one
    mlflow.set_tracking_uri(settings.tracking_uri)
    mlflow.create_experiment("adult-income", (settings.root / "artifacts").as_uri())
    mlflow.set_experiment("adult-income")
    with mlflow.start_run(tags={"job": "j1"}) as run:
        analysis.log(analysis.hold_against(settings, new, old), {"new data": new.digest, "old data": old.digest})
    mlflow.set_tracking_uri("")
    told = api.get("/analysis")
    assert told["run_id"] == run.info.run_id and told["job"] == "j1"
    assert told["rows"] == {"new": 201, "reference": datasets.original(settings).manifest.rows}
    assert told["verdict"] in ("use as is", "clean first", "do not retrain") and told["findings"]
    page = api.http.get(told["links"]["report"])
    assert page.status_code == 200 and evil.strip('"') not in page.text and "<h" in page.text
    assert page.headers["Content-Security-Policy"].startswith("sandbox")
    assert api.get(f"/analysis?run={run.info.run_id}") == told
    assert api.http.get(f"/analysis?run={'0' * 32}").status_code == 404


def test_an_analysis_while_mlflow_is_away(tmp_path):
    settings = make_project(tmp_path, mlflow={"tracking_uri": '"http://127.0.0.1:9"'})
    app = create_app(settings, part)
    key = {"X-API-Key": app.state.api_key}
    with TestClient(app, base_url="http://localhost", headers=key) as client:
        answer = client.get("/analysis/report")
        assert answer.status_code == 503 and answer.headers["Retry-After"] and "MLflow" in answer.json()["detail"]
        assert client.post("/upload_data", files={"file": fresh(1)}).status_code == 202, "uploads do not need it"


def test_the_interface_is_described(api):
    document = api.get("/openapi.json")
    paths = document["paths"]
    for path, methods in {"/upload_data": {"post"}, "/uploads": {"get"}, "/uploads/{id}": {"get", "delete"},
                          "/jobs": {"get"}, "/jobs/{id}": {"get", "delete"}, "/jobs/{id}/notebook": {"get"},
                          "/analysis": {"get"}, "/analysis/report": {"get"}}.items():
        assert set(paths[path]) == methods
    post = paths["/upload_data"]["post"]
    assert post["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]["file"]["format"] == "binary"
    assert {"200", "202", "401", "413", "422", "507"} <= set(post["responses"]) and post["security"]
    for path, method in (("/uploads/{id}", "delete"), ("/jobs/{id}", "delete")):
        assert paths[path][method]["security"]


def test_the_service_starts_without_what_it_may_never_need():
    code = "import sys; import income_mlops.intake; " \
           "print([m for m in ('pandas', 'mlflow', 'sklearn', 'sqlalchemy', 'nbconvert') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_old_uploads_go_when_a_service_starts(tmp_path):
    settings = make_project(tmp_path)
    file = tmp_path / "new.csv"
    file.write_bytes(fresh(1))
    old, _ = uploads.receive(settings, file, "new.csv", "me")
    file.write_bytes(fresh(2))
    needed, _ = uploads.receive(settings, file, "new.csv", "me")
    Queue(settings).add("retrain", "me", needed.id)
    for upload in (old, needed):
        manifest = upload.folder / "manifest.json"
        told = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**told, "received": "2020-01-01T00:00:00Z"}))
    settings = make_project(tmp_path, uploads={"keep_days": 30})
    with IntakeApi(settings) as api:
        (record,) = wait_for(lambda: api.get("/uploads?deleted=true"), 30)
        assert (record["id"], record["deleted_by"], record["why"]) == (old.id, "retention", "uploads.keep_days = 30")
        # the record is written first, then the folder goes
        wait_for(lambda: [u["id"] for u in api.get("/uploads")] == [needed.id], 30)


def command(settings, *words, **env):
    """The command line, in this process."""
    from click.testing import CliRunner

    from income_mlops.cli import main
    env = {"INCOME_MLOPS_SETTINGS": str(settings.root / "settings.ini"), **env}
    return CliRunner().invoke(main, [str(w) for w in words], env=env)


def test_the_command_speaks_to_the_api_or_stores_directly(api, tmp_path):
    file = tmp_path / "new.csv"
    file.write_bytes(fresh(5))
    there, before = {"DYNACONF_BACKEND_URL": api.url + "/predict"}, len(api.get("/jobs"))
    sent = command(api.settings, "upload", file, "--json", **there)
    assert sent.exit_code == 0, sent.stderr
    told = json.loads(sent.stdout)
    assert told["by"] == api.url and told["job"] == "retrain" and api.get("/jobs")[0]["id"] == told["job_id"]
    away = {"DYNACONF_BACKEND_URL": "http://127.0.0.1:9"}
    for jobs in (1, 2):
        direct = command(api.settings, "upload", file, "--retrain", **away)
        assert direct.exit_code == 0 and "stored directly" in direct.stderr and "(retrain) is queued" in direct.stdout
        assert len(api.get("/uploads")) == 1 and len(api.get("/jobs")) - before == jobs
        if jobs == 1:  # it was waiting
            api.http.delete(f"/jobs/{told['job_id']}").raise_for_status()
    bad = tmp_path / "bad.csv"
    bad.write_bytes(with_value(0, "forty"))
    for env in (there, away):
        refused = command(api.settings, "upload", bad, **env)
        assert refused.exit_code == 3 and "bad.csv: column 'age', line 5: 'forty'" in refused.stderr, refused.stderr
    nobody = command(api.settings, "upload", file, DYNACONF_BACKEND_URL="http://elsewhere.invalid:9")
    assert nobody.exit_code == 1 and "does not answer" in nobody.stderr, "and stores nothing here"
    listed = command(api.settings, "datasets", "list")
    assert "new.csv" in listed.stdout and "current" in listed.stdout
    kept = command(api.settings, "datasets", "delete", told["upload"])
    assert kept.exit_code == 1 and "cancel it first" in kept.stderr
    for job in api.get("/jobs?state=queued"):
        api.http.delete(f"/jobs/{job['id']}")
    gone = command(api.settings, "datasets", "delete", told["upload"][:8], "--json")
    assert json.loads(gone.stdout)["id"] == told["upload"] and not api.get("/uploads")


def test_the_key_goes_to_no_proxy(api, tmp_path):
    """What is sent to this machine is seen by nobody else, whatever the shell's variables say."""
    file, seen = tmp_path / "new.csv", []
    file.write_bytes(fresh(6))
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        def listen():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = proxy.accept()
                    seen.append(connection.recv(1000))
                    connection.close()
        threading.Thread(target=listen, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        sent = command(api.settings, "upload", file, DYNACONF_BACKEND_URL=api.url, HTTP_PROXY=address,
                       http_proxy=address, ALL_PROXY=address, NO_PROXY="", no_proxy="")
        proxy.shutdown(socket.SHUT_RDWR)
    assert sent.exit_code == 0 and not seen, (sent.stderr, seen)


def test_a_merge_and_a_way_back_wait_for_each_other(tmp_path):
    from income_mlops.retraining import Retraining
    settings = make_project(tmp_path)
    first = datasets.current(settings)
    upload, _ = uploads.receive(settings, _file(tmp_path, GOOD), "good.csv", "me")
    later = datasets.merge(settings, read_table(_file(tmp_path, fresh(7))), "upload x")
    datasets.make_current(settings, later)
    job = Queue(settings).add("retrain", "me", upload.id)
    merging = Retraining(settings, job, lambda **_: None, threading.Event(), {})
    with ThreadPoolExecutor(2) as pool:
        with datasets.changing(settings):
            merge = pool.submit(merging.merge)
            time.sleep(1)
            assert not merge.done()
            datasets.make_current(settings, first)
        assert merge.result(60)["before"] == first.id, "it builds on what was gone back to"
        with datasets.changing(settings):
            back = pool.submit(command, settings, "datasets", "rollback", first.id, "--json")
            time.sleep(1)
            assert not back.done()
            datasets.make_current(settings, later)
        assert json.loads(back.result(60).stdout)["before"] == later.id, "it says what it replaced"


def test_back_to_an_older_version(tmp_path):
    settings = make_project(tmp_path)
    first = datasets.current(settings)
    datasets.make_current(settings, datasets.merge(settings, read_table(_file(tmp_path, GOOD)), "upload x"))
    later = datasets.current(settings).id
    assert later != first.id
    back = command(settings, "datasets", "rollback", first.id[:6], "--json")
    assert json.loads(back.stdout) == {"current": first.id, "before": later, "rows": first.manifest.rows}
    assert datasets.current(settings).id == first.id
    entry, = json.loads(command(settings, "audit", "--json").stdout)
    assert entry["act"] == "rollback" and entry["who"].endswith("(command line)") and later in entry["what"]
    wrong = command(settings, "datasets", "rollback", "nonsense")
    assert wrong.exit_code == 3 and later in wrong.stderr
    told = json.loads(command(settings, "datasets", "list", "--json").stdout)
    assert [(v["id"], v["current"]) for v in told["versions"]] == [(first.id, True), (later, False)]


def _file(folder: Path, data: bytes) -> Path:
    (folder / "rows.csv").write_bytes(data)
    return folder / "rows.csv"


def test_duplicates_count_what_a_merge_leaves_out(tmp_path):
    """Against the merge itself, for uploads of known, new and repeated rows."""
    settings = make_project(tmp_path, rows=500)
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows = [LINES[1 + int(i)] for i in rng.integers(0, 1000, 200)]
        upload, _new = uploads.receive(settings, _file(tmp_path, csv(rows)), "rows.csv", "me")
        base = datasets.current(settings).manifest
        after = datasets.merge(settings, pl.read_parquet(upload.path), "x").manifest
        added = after.rows + after.holdout_rows - base.rows - base.holdout_rows
        assert upload.rows - upload.duplicates == added and upload.repeated > 0
    assert store(settings).is_dir()
