"""The dashboard in a real browser, over a real service with a worker, trained models and a real Voila."""
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from gateway_helpers import CHROMIUM
from helpers import wait_for
from intake_helpers import LINES
from intake_helpers import csv as as_csv
from job_helpers import INI, new_project

from income_mlops import promotion
from income_mlops.bundle import bundle, pieces
from income_mlops.canvas import percent
from income_mlops.settings import load_settings

OFFLINE = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
SLOW = 60_000

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (apt-get install chromium)")


def there(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


class Services:
    "`serve` with its worker, and `dashboard`, in a project of real rows."

    def __init__(self, folder: Path, free_port):
        self.free = free_port
        new_project(folder)
        text = INI.format(tracking_uri="", storage="", jobs="scheduling = normal", models="XGBoost, RandomForest",
                          trials=1, state="var")
        text = text.replace('missing = "?"', 'missing = "?"\ngroups = sex, race, age')
        self.ports = {"serving": free_port(), "dashboard": free_port()}
        self.api, self.page = (f"http://127.0.0.1:{self.ports[k]}" for k in ("serving", "dashboard"))
        text += (f"\n[serving]\nport = {self.ports['serving']}\nfollow_every = 0.5\nmax_upload_mb = 2\n"
                 f"[dashboard]\nport = {self.ports['dashboard']}\nbase_url = /frontend/\n")
        (folder / "settings.ini").write_text(f"backend_url = {self.api}/predict\n{text}")
        (folder / "nbs").symlink_to(Path(__file__).parent.parent / "nbs")
        self.folder, self.settings = folder, load_settings(folder / "settings.ini")
        self.running: dict[str, subprocess.Popen] = {}
        self.http = httpx.Client(base_url=self.api, timeout=30)

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "income_mlops.cli", name], cwd=self.folder, stdout=log, stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"})

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        for p in family:
            if p.poll() is None if isinstance(p, subprocess.Popen) else p.is_running():
                p.send_signal(signal.SIGKILL)
        process.wait()

    @property
    def key(self) -> str:
        return (self.settings.state / "api_key").read_text().strip()

    def predict(self, data):
        return self.http.post("/predict", json={"data": data}).json()["probability"]


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    def free() -> int:
        import socket
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]
    made = Services(tmp_path_factory.mktemp("dashboard") / "project", free)
    try:
        for name in ("serve", "dashboard"):
            made.start(name)
        wait_for(lambda: there(f"{made.page}/frontend/voila/static/voila.js"), 90, "the dashboard")
        yield made
    finally:
        for name in list(made.running):
            made.kill(name)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        yield browser
        browser.close()


@contextmanager
def opened(browser, services, **options):
    "The page, what it asked for and the errors in its console; a failure tells what was to be seen."
    page = browser.new_page(**options)
    page.set_default_timeout(SLOW)
    asked, errors = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("websocket", lambda s: asked.append(s.url))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    try:
        page.goto(services.page + "/frontend/")
        yield page, asked, errors
    except Exception as e:
        e.add_note(f"errors: {errors}\nhidden: {page.evaluate('document.hidden')}\nlast asked for: {asked[-5:]}\n"
                   f"the page: {page.locator('body').inner_text()[:3000]}")
        raise
    finally:
        page.close()


@contextmanager
def visit(browser, services, width: int = 1280, scheme: str = "light"):
    "A visitor's page. Whatever it asks of another machine, and every error in its console, fails the test."
    with opened(browser, services, viewport={"width": width, "height": 900}, color_scheme=scheme) as (
            page, asked, errors):
        page.wait_for_selector(".status span:nth-child(2)")
        yield page
        own = f"127.0.0.1:{services.ports['dashboard']}/"
        foreign = [u for u in asked if not u.startswith((f"http://{own}", f"ws://{own}", "data:", "about:", "blob:"))]
        assert len(asked) > 10 and foreign == [] and errors == []
        assert [u for u in asked if u.endswith(".voila.js")] == []  # they come in one file, and MathJax not at all


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    page.get_by_role("tab", name=name, exact=True, selected=True).wait_for()


def shown(page) -> float:
    return float(page.locator("[data-probability]").get_attribute("data-probability"))


def form(page) -> dict:
    "What stands in the form."
    values = {}
    for field in page.locator(".fields .widget-dropdown").all():
        # waited for: a list that is being filled anew has nothing chosen for a moment
        chosen = field.locator("select option:checked").text_content()
        values[field.locator("label").inner_text()] = None if chosen == "not known" else chosen
    for field in page.locator(".fields .widget-slider").all():
        values[field.locator("label").inner_text()] = float(field.locator(".widget-readout").inner_text())
    return values


def alert(page, text: str):
    page.locator(".notice:visible", has_text=text).first.wait_for()


# ── before there is a model ───────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.full
def test_a_page_waits_for_the_first_model(services, browser):
    "The worker trains the first models meanwhile; nobody has to reload the page."
    with visit(browser, services) as page:
        said = page.locator(".status").inner_text()
        assert "No model is served yet" in said or "serves as production" in said
        page.locator(".status", has_text="serves as production").wait_for(timeout=180_000)
        page.locator("[data-probability]").wait_for()
    wait_for(lambda: len(services.http.get("/models").json()) == 2, 60, "both families")


# ── predict ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_change_is_predicted_as_the_api_does(services, browser):
    with visit(browser, services) as page:
        page.locator("[data-probability]").wait_for()
        row = form(page)
        assert abs(shown(page) - services.predict(row)) < 1e-9
        before = shown(page)
        page.get_by_label("marital-status", exact=True).select_option(
            "Never-married" if row["marital-status"] != "Never-married" else "Married-civ-spouse")
        wait_for(lambda: shown(page) != before, 30, "another probability")
        age = page.get_by_role("slider", name="age")
        age.focus()
        before = shown(page)
        for _ in range(12):
            page.keyboard.press("ArrowRight")
        wait_for(lambda: form(page)["age"] == row["age"] + 12 and shown(page) != before, 30, "another probability")
        wait_for(lambda: abs(shown(page) - services.predict(form(page))) < 1e-9, 30, "the API's number")
        why = page.locator("svg[aria-label^='What drove']")
        told = services.http.post("/explain", json={"data": form(page)}).json()
        top = max(told["contributions"], key=lambda n: abs(told["contributions"][n]))
        wait_for(lambda: top in why.get_attribute("aria-label"), 30, "the explanation")

        page.get_by_label("Column to vary").select_option("education-num")
        curve = page.locator("svg[aria-label^='Probability as education-num']")
        curve.wait_for()
        grid = services.predict([{**form(page), "education-num": v} for v in range(1, 17)])
        assert f"from {100 * min(grid):.1f} % to {100 * max(grid):.1f} %" in curve.get_attribute("aria-label")
        page.get_by_label("Column to vary").select_option("occupation")
        page.locator("svg[aria-label^='Probability by occupation']").wait_for()

        page.get_by_role("button", name="A random real row").click()
        wait_for(lambda: abs(shown(page) - services.predict(form(page))) < 1e-9, 30, "the random row")
        examples = services.http.get("/schema").json()["examples"]
        assert form(page) in examples


def test_a_file_comes_back_with_predictions(services, browser, tmp_path):
    file = tmp_path / "people.csv"
    file.write_bytes(as_csv(LINES[20_000:20_050]))
    with visit(browser, services) as page:
        page.locator("[data-probability]").wait_for()
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Choose a CSV file").click()
        chooser.value.set_files(file)
        with page.expect_download() as download:
            page.get_by_role("link", name="Download with predictions").click()
        rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
        assert download.value.suggested_filename == "people.predicted.csv" and len(rows) == 50
        numbers = {c["name"] for c in services.http.get("/schema").json()["columns"] if c["kind"] == "number"}
        names = [n for n in rows[0] if n not in ("income", "fnlwgt", "prediction", "probability")]
        data = [{n: None if r[n] == "?" else float(r[n]) if n in numbers else r[n] for n in names} for r in rows]
        assert max(abs(float(r["probability"]) - p) for r, p in zip(rows, services.predict(data), strict=True)) < 1e-6

        file.write_bytes(as_csv(LINES[20_000:20_002]).replace(LINES[20_001].split(",")[0].encode(), b"old", 1))
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Choose a CSV file").click()
        chooser.value.set_files(file)
        alert(page, "age: expected a number")


# ── new data ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def press_again(page, name: str) -> None:
    "Once more, no faster than a person: at once it would be taken for the second half of a double click."
    page.wait_for_timeout(300)
    page.get_by_role("button", name=name, exact=True).click()


def upload(page, file: Path, key: str) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose a file").click()
    chooser.value.set_files(file)
    page.locator("span.soft:visible", has_text=file.name).wait_for()
    page.get_by_label("API key").filter(visible=True).fill(key)
    page.get_by_label("API key").filter(visible=True).press("Tab")
    press_again(page, "Upload")


def test_a_file_too_large_to_be_sent_is_said_where_it_was_chosen(services, browser, tmp_path):
    "The websocket would close, and nobody would say why."
    file = tmp_path / "large.csv"
    file.write_bytes(b"a\n" * 1_200_000)
    with visit(browser, services) as page:
        page.locator("[data-probability]").wait_for()
        for name, button in (("Predict", "Choose a CSV file"), ("Data", "Choose a file")):
            tab(page, name)
            with page.expect_file_chooser() as chooser:
                page.get_by_role("button", name=button).click()
            chooser.value.set_files(file)
            alert(page, "large.csv has 2.3 MB; at most 2 MB can be sent")
        assert page.get_by_text("no file chosen").is_visible()


def stored(page, text: str) -> str:
    "The job of an upload."
    alert(page, text)
    return re.search(r"job (\w+)", page.locator(".notice:visible", has_text="rows stored").inner_text())[1]


def test_upload_is_refused_in_words_or_ends_as_a_new_version(services, browser, tmp_path):
    file = tmp_path / "new.csv"
    file.write_bytes(as_csv(LINES[9000:9200]).replace(b",Male,", b",", 1))
    said = services.http.post("/upload_data", files={"file": (file.name, file.read_bytes())},
                              headers={"X-API-Key": services.key}).json()["detail"]
    with visit(browser, services) as page:
        page.locator("[data-probability]").wait_for()
        tab(page, "Data")
        assert page.locator(".widget-checkbox input:visible").bounding_box()["width"] < 30, "its text is beside it"
        upload(page, file, "not the key")
        alert(page, "This API key is wrong")
        upload(page, file, services.key)
        alert(page, said)  # the API's own words
        file.write_bytes(as_csv(LINES[9000:9400]))
        upload(page, file, services.key)
        job = stored(page, "400 rows stored")
        file.write_bytes(as_csv(LINES[9400:9700]))
        upload(page, file, services.key)
        waiting = stored(page, "300 rows stored")

        tab(page, "Retraining")
        second = page.locator(".job", has_text=waiting[:12])
        second.get_by_role("button", name="Cancel").click()
        second.get_by_text("cancelled", exact=True).wait_for()
        assert services.http.get(f"/jobs/{waiting}").json()["state"] == "cancelled"
        card = page.locator(".job", has_text=job[:12])
        card.get_by_text("cell ").first.wait_for()
        card.get_by_role("button", name="Show the notebook").click()
        card.frame_locator("iframe").locator("h1").first.wait_for()
        shown = card.locator("iframe").get_attribute("srcdoc")
        card.get_by_text("succeeded", exact=True).wait_for(timeout=400_000)
        assert card.locator("iframe").get_attribute("srcdoc") == shown, "the reader keeps the place"
        card.get_by_role("button", name="Show what has come since").click()
        wait_for(lambda: card.locator("iframe").get_attribute("srcdoc") != shown, 60, "the notebook as it is now")
        told = services.http.get(f"/jobs/{job}").json()
        assert told["state"] == "succeeded"

        tab(page, "Model")
        made = [v for v in services.http.get("/models").json() if v["version"] == 2]
        assert {v["family"] for v in made} == {"XGBoost", "RandomForest"}
        for version in made:
            page.get_by_role("rowheader", name=f"{version['family']} 2", exact=True).wait_for(timeout=30_000)
            link = page.get_by_role("link", name=version["run_id"][:8])
            assert link.first.get_attribute("href").endswith(f":5000/#/runs/{version['run_id']}")
        tab(page, "Data")
        found = services.http.get("/analysis").json()
        assert found["job"] == job
        page.locator("p.verdict", has_text=found["verdict"].capitalize()).wait_for(timeout=30_000)
        page.get_by_role("button", name="Show the full report").click()
        page.frame_locator("iframe[title='Report of the analysis']").locator(".verdict").first.wait_for()


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_switch_and_revert(services, browser):
    wait_for(lambda: not services.http.get("/jobs?state=running").json(), 300, "no training moves an alias meanwhile")
    with visit(browser, services) as page:
        page.locator("[data-probability]").wait_for()
        tab(page, "Model")
        first = services.http.get("/model_info").json()
        promotion.promote(services.settings, first["family"], first["model_version"], "production")  # newest as well
        wait_for(lambda: "production" in services.http.get("/model_info").json()["aliases"], 30, "the promotion")
        other = "RandomForest" if first["family"] == "XGBoost" else "XGBoost"
        auc = f"{first['metrics']['holdout_roc_auc']:.4f}"
        page.get_by_role("cell", name=auc).first.wait_for()
        choice = page.get_by_label("Serve from now on")
        choice.locator("option", has_text=other).first.wait_for(state="attached")
        label = next(t for t in choice.locator("option").all_inner_texts() if t.startswith(other))
        choice.select_option(label)
        page.get_by_role("button", name="Switch", exact=True).click()
        alert(page, "Please type the API key first")
        page.get_by_label("API key").filter(visible=True).fill(services.key)
        page.get_by_label("API key").filter(visible=True).press("Tab")
        press_again(page, "Switch")
        page.locator(".status strong", has_text=other).wait_for()
        assert services.http.get("/model_info").json()["family"] == other
        page.get_by_role("button", name="Revert").click()
        page.locator(".status strong", has_text=first["family"]).wait_for()
        again = services.http.get("/model_info").json()
        assert [again[k] for k in ("family", "model_version", "alias")] == [
            first["family"], first["model_version"], "production"]

        brier = first["evaluation"]["current"]["brier"]
        page.locator(f"svg[aria-label^='Calibration: Brier score {brier:.4f}']").wait_for()
        counts = page.locator("svg[aria-label*=' taken for ']")
        before = counts.get_attribute("aria-label")
        page.get_by_role("slider", name="Threshold of the decision").focus()
        page.keyboard.press("End")
        wait_for(lambda: counts.get_attribute("aria-label") != before, 30, "counts at another threshold")
        assert ": 0" in counts.get_attribute("aria-label"), "nobody is given the class at a threshold of 1"


def test_rates_by_group_are_those_of_the_hold_out(services, browser):
    "Counted by hand from the service's own predictions."
    info = services.http.get("/model_info").json()
    with (services.folder / "test.csv").open() as f:
        rows = list(csv.DictReader(f))
    numbers = {c["name"] for c in services.http.get("/schema").json()["columns"] if c["kind"] == "number"}
    names = [n for n in rows[0] if n not in ("income", "fnlwgt")]
    p = services.predict([{n: None if r[n] in ("?", "") else float(r[n]) if n in numbers else r[n] for n in names}
                          for r in rows])
    women = [(q >= 0.5, r["income"].startswith(">50K")) for r, q in zip(rows, p, strict=True) if r["sex"] == "Female"]
    given, found = sum(d for d, _ in women) / len(women), [t and d for d, t in women]
    stored = info["evaluation"]["fairness"]["columns"][0]["groups"]
    stored = next(g for g in stored if g["group"] == "Female")
    assert stored["rows"] == len(women) and abs(stored["selection_rate"]["value"] - given) < 1e-12
    assert abs(stored["tpr"]["value"] - sum(found) / sum(t for _, t in women)) < 1e-12
    assert abs(stored["precision"]["value"] - sum(found) / sum(d for d, _ in women)) < 1e-12
    with visit(browser, services) as page:
        page.locator("[data-probability]").wait_for()
        tab(page, "Fairness")
        page.get_by_role("heading", name="age", exact=True).wait_for()
        said = page.locator("svg[aria-label^='Selection rate by sex']").get_attribute("aria-label")
        assert f"Female {100 * given:.1f} %" in said
        columns = {c["column"]: c["groups"] for c in info["evaluation"]["fairness"]["columns"]}
        assert list(columns) == ["sex", "race", "age"]
        for name, groups in columns.items():
            card = page.locator(".card", has=page.get_by_role("heading", name=name, exact=True))
            card.get_by_text("The figures").click()
            for g in groups:  # every rate with its interval, as it was stored
                head = page.get_by_role("rowheader", name=g["group"], exact=True)
                cells = card.get_by_role("row").filter(has=head).get_by_role("cell").all_inner_texts()
                assert cells[-4:] == ["–" if (r := g[k])["value"] is None else
                                      f"{percent(r['value'])} ({100 * r['low']:.1f} – {100 * r['high']:.1f})"
                                      for k in ("selection_rate", "tpr", "fpr", "precision")]
        version = services.http.get(f"/models/{info['family']}/{info['model_version']}/evaluation").json()
        assert version["evaluation"] == info["evaluation"]


def test_contributions_add_up_to_what_is_predicted(services):
    "For both families, over HTTP."
    import math
    examples = services.http.get("/schema").json()["examples"][:20]
    first = services.http.get("/model_info").json()
    for family in ("XGBoost", "RandomForest"):
        services.http.post("/set_model", json={"alias": "newest", "model": family},
                           headers={"X-API-Key": services.key}).raise_for_status()
        told = services.http.post("/explain", json={"data": examples}).json()
        p = services.predict(examples)
        assert told["probability"] == p and told["scale"] == ("log-odds" if family == "XGBoost" else "probability")
        for parts, total, q in zip(told["contributions"], told["sum"], p, strict=True):
            assert set(parts) == set(examples[0]) and abs(told["base"] + math.fsum(parts.values()) - total) < 1e-12
            assert abs((1 / (1 + math.exp(-total)) if family == "XGBoost" else total) - q) < 1e-6
    services.http.post("/set_model", json={"alias": "newest", "model": first["family"]},
                       headers={"X-API-Key": services.key}).raise_for_status()
    assert services.http.post("/explain", json={"data": examples * 6}).status_code == 413
    answer = services.http.post("/explain", json={"data": {**examples[0], "age": "old"}})
    assert answer.status_code == 422 and "data.age" in answer.json()["detail"]
    answer = services.http.get("/models/XGBoost/99/evaluation")
    assert answer.status_code == 404 and "known versions" in answer.json()["detail"]


# ── for everybody ─────────────────────────────────────────────────────────────────────────────────────────────────────

UNNAMED = """() =>
[...document.querySelectorAll('.dash :is(button, input, select, [role=slider], [contenteditable], a)')]
.filter(e => e.offsetParent && !(e.labels && e.labels.length && e.labels[0].innerText) && !e.getAttribute('aria-label')
  && !e.innerText.trim() && !e.title).map(e => e.outerHTML.slice(0, 200))"""


DEAF = """() => [...document.querySelectorAll('.dash .live > .widget-html-content')]
.filter(e => e.getAttribute('role') !== 'status').map(e => e.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("width,scheme", [(390, "dark"), (1280, "light")])
def test_every_tab_fits_and_every_control_has_a_name(services, browser, width, scheme):
    with visit(browser, services, width, scheme) as page:
        page.locator("[data-probability]").wait_for()
        assert page.get_by_role("button", name="Refresh").count() == 0, "the script's own button is nobody else's"
        page.get_by_role("tab", name="Predict").focus()
        for name in ("Predict", "Model", "Data", "Retraining", "Fairness"):
            if name != "Predict":
                page.keyboard.press("ArrowRight")  # tabs are walked through by the keyboard alone
                page.keyboard.press("Enter")
            page.get_by_role("tab", name=name, exact=True, selected=True).wait_for()
            page.locator(".tabs .card:visible, .tabs .notice:visible").first.wait_for()
            assert page.evaluate(DEAF) == [], "a region that speaks stands there before it has something to say"
            assert page.evaluate(UNNAMED) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the screen"
        colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, "
                                "getComputedStyle(document.querySelector('.dash')).color]")
        assert colours == (["rgb(15, 21, 28)", "rgb(230, 235, 241)"] if scheme == "dark" else
                           ["rgb(245, 247, 249)", "rgb(23, 33, 46)"])


@pytest.mark.parametrize("mended", [True, False])
def test_a_model_that_comes_as_the_time_is_up_is_found(browser, mended):
    "The widgets' own script looks for two seconds; what comes in the last moment, from a busy browser, it misses."
    files = pieces()
    script = bundle(files) if mended else "".join(f.read_text() for f in files)
    look = re.search(r"async get_model\(\w+\)\{.{1,500}?\}(?=has_model\()", script)
    page = browser.new_page()
    found = page.evaluate("""source => {
        const manager = eval(`({_models: {}, ${source}})`);
        setTimeout(() => {
            for (const end = Date.now() + 400; Date.now() < end;);
            manager._models.late = "here";
        }, 1850);
        return manager.get_model("late").catch(String);
    }""", look[0])
    page.close()
    assert found == ("here" if mended else "Error: widget model not found")


# ── away and back ─────────────────────────────────────────────────────────────────────────────────────────────────────

def test_api_killed_and_back(services, browser):
    with visit(browser, services) as page:
        page.locator("[data-probability]").wait_for()
        services.kill("serve")
        page.locator(".status", has_text="does not answer").wait_for()
        page.get_by_role("button", name="A random real row").click()
        alert(page, "does not answer. Is it running?")
        assert "Traceback" not in page.locator("body").inner_text()
        services.start("serve")
        page.locator(".status", has_text="serves as").wait_for()
        wait_for(lambda: page.locator(".notice:visible", has_text="does not answer").count() == 0, 30, "no old message")
        page.get_by_role("button", name="Start again").click()
        wait_for(lambda: abs(shown(page) - services.predict(form(page))) < 1e-9, 30, "the API's number again")


def test_a_page_whose_kernel_died_says_so(services, browser):
    "It would stand there with a green light, and nothing on it would work."
    with opened(browser, services) as (page, asked, _):
        page.locator("[data-probability]").wait_for()
        assert page.locator("#lost").inner_text() == ""
        kernel = next(m[1] for url in asked if (m := re.match(r"ws:.*/api/kernels/([\w-]+)/", url)))
        for p in psutil.Process(services.running["dashboard"].pid).children(recursive=True):
            if f"kernel-{kernel}" in " ".join(p.cmdline()):
                p.kill()
        page.locator("#lost", has_text="The connection is lost").wait_for(timeout=30_000)
        assert not page.locator(".status").is_visible()
        assert page.get_by_role("link", name="Reload the page").is_visible()


@pytest.mark.full
def test_a_page_whose_service_died_says_so(services, browser):
    with opened(browser, services) as (page, _, _):
        page.locator("[data-probability]").wait_for()
        services.kill("dashboard")
        page.locator("#lost", has_text="The connection is lost").wait_for(timeout=30_000)
        services.start("dashboard")
        wait_for(lambda: there(f"{services.page}/frontend/voila/static/voila.js"), 90, "the dashboard")


@pytest.mark.full
def test_the_kernel_of_a_page_that_was_closed_ends(services, browser):
    "Those that are kept ready stay, and the next visitor gets one."
    ready = services.settings.dashboard.preheated_kernels
    services.ports["impatient"] = port = services.free()
    environment = {**os.environ, "DYNACONF_DASHBOARD__IDLE_TIMEOUT": "3", "DYNACONF_DASHBOARD__PORT": str(port)}
    with (services.folder / "impatient.log").open("w") as log:
        dashboard = subprocess.Popen([sys.executable, "-m", "income_mlops.cli", "dashboard"], cwd=services.folder,
                                     env=environment, stdout=log, stderr=log)

    def kernels() -> int:
        found = 0
        for p in psutil.Process(dashboard.pid).children():
            with suppress(psutil.Error):  # it is just ending
                found += "ipykernel" in " ".join(p.cmdline())
        return found

    try:
        wait_for(lambda: kernels() == ready, 90, "kernels kept ready")
        for _ in range(2):
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{port}/frontend/", timeout=SLOW)
            page.wait_for_selector("[data-probability]", timeout=SLOW)
            wait_for(lambda: kernels() == ready + 1, 60, "the visitor's kernel beside them")
            page.close()
            wait_for(lambda: kernels() == ready, 90, "the end of the kernel that nobody looks at")
    finally:
        dashboard.terminate()
        assert dashboard.wait(15) in (0, -signal.SIGTERM)


def test_command_in_words(services):
    "The port of the running one is taken: one line."
    done = subprocess.run([sys.executable, "-m", "income_mlops.cli", "dashboard"], cwd=services.folder,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "dashboard.port" in done.stderr and len(done.stderr.splitlines()) == 1
    assert json.loads((services.settings.state / "dashboard/voila/templates/dashboard/conf.json").read_text())
