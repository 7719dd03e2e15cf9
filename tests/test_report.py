"""The report: what it says is what was found, nothing from data acts in it, and people can read it."""
import re
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import binomtest

from income_mlops.canvas import legible
from income_mlops.charts import ranking
from income_mlops.data import read_table
from income_mlops.report import plots, render, save_report
from income_mlops.settings import load_settings
from income_mlops.verdict import analyze

ROOT = Path(__file__).parent.parent
CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = ["<script>document.title='owned'</script>", "\"' onmouseover=alert(1) x='",
           "</style><img src=x onerror=alert(2)>", "=cmd|' /C calc'!A0", "abc\u202etxt.exe", "{{ 7 * 7 }}{% raw %}",
           "שלום עולם", "a\x00b\x1b[31m", " outer blanks ",
           "&lt;b&gt;&amp;", "]]>--><svg onload=alert(3)>", "x" * 5000]


@pytest.fixture(scope="module")
def settings():
    return load_settings(ROOT / "settings.ini")


def tables(settings):
    return [settings.path(p) for p in (settings.dataset.origin_path, settings.dataset.holdout_path)]


@pytest.fixture(scope="module")
def official(settings):
    "The official test data against the training data."
    train, test = tables(settings)
    return analyze(test, train, settings, test)


@pytest.fixture(scope="module")
def faulty(settings):
    "The test data with mistakes that give errors and warnings."
    train, test = tables(settings)
    table = read_table(test, ("?",)).with_columns(pl.col("hours-per-week") * 60, pl.lit("Robot").alias("workclass"))
    most = pl.int_range(pl.len()) % 4 > 0
    table = table.with_columns(pl.when(most).then("occupation").alias("occupation"),
                               (" " + pl.col("race")).alias("race"))
    return analyze(table.drop("relationship"), train, settings)


def table_settings(settings, target, positive):
    columns = settings.dataset.columns.model_copy(update={"target": target, "positive": positive, "ignored": ()})
    return settings.model_copy(update={"dataset": settings.dataset.model_copy(update={"columns": columns})})


@pytest.fixture(scope="module")
def hostile(settings):
    "A table whose columns and values try to break out of where they are shown."
    random = np.random.default_rng(0)
    rows, values = 600, HOSTILE
    old = {name: random.choice(values, rows) for name in HOSTILE}
    old |= {"n<b>": random.normal(size=rows), "target": random.choice([HOSTILE[0], HOSTILE[1]], rows)}
    new = {name: random.choice([v + "'new\"<i>" for v in values], rows) for name in HOSTILE[1:]}
    new |= {"n<b>": random.normal(size=rows) + 3, "<added onclick=x>": values[0], "target": random.choice(values, rows)}
    return analyze(pl.DataFrame(new), pl.DataFrame(old), table_settings(settings, "target", HOSTILE[1]))


class Page(HTMLParser):
    "Elements, attributes and texts of a page; every element must be closed."
    EMPTY = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


# ── what it says ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_verdict_is_in_words(official, faulty):
    assert Page(render(official)).text.split("Use as is", 1)[1].strip(" ")
    page = Page(render(faulty)).text
    assert "Do not retrain" in page and f"{faulty.counts()['error']} errors and" in page
    warnings = faulty.findings[faulty.counts()["error"]:]
    warned = faulty.model_copy(update={"verdict": "clean first", "findings": warnings})
    assert "Clean first No error, but" in Page(render(warned)).text


def test_every_finding_is_shown_with_advice_and_code(faulty):
    page = Page(render(faulty)).text
    for f in faulty.findings:
        assert f.message in page and f.advice in page
        assert " ".join(f.code.split()) in page
    assert min(page.index(f.message) for f in faulty.findings if f.severity == "warning") > \
        max(page.index(f.message) for f in faulty.findings if f.severity == "error")


def test_figures_are_those_of_the_analysis(official):
    page = Page(render(official)).text
    columns = [d.column for d in sorted(official.drift.values(), key=lambda d: -d.effect)]
    cards = page.split("All thresholds and statistics", 1)[1].split("How strongly columns go together", 1)[0]
    places = [cards.index(f"{c} {official.drift[c].kind}") for c in columns]
    assert places == sorted(places), "most moved first"
    for d in official.drift.values():
        card = cards[cards.index(f"{d.column} {d.kind}"):][:1500]
        assert f"PSI {d.psi:.3f}" in card and f"JS distance {d.jensen_shannon:.3f}" in card
        assert (f"KS distance {d.ks:.3f}" if d.kind == "number" else f"Total variation {d.total_variation:.3f}") in card


def test_intervals_of_the_target_are_wilsons(official):
    page = Page(render(official)).text
    for hits, n in ((7841, 32561), (3846, 16281)):  # >50K in the official files
        ci = binomtest(hits, n).proportion_ci(method="wilson")
        assert f"{100 * hits / n:.1f} % ({100 * ci.low:.1f} – {100 * ci.high:.1f})" in page


def test_thresholds_and_statistics_are_explained(official, settings):
    page = Page(render(official)).text
    assert all(name in page for name in type(settings.drift).model_fields)
    for word in ("Population stability index", "Jensen–Shannon", "Kolmogorov–Smirnov", "Wasserstein", "Cramér’s V"):
        assert word in page


def test_bars_are_as_long_as_their_values():
    picture = ranking([("a", 0.4, "info"), ("b", 0.1, "info"), ("c", 0.0, "info")], [("warning", 0.1)])
    widths = [float(m) for m in re.findall(r'<rect [^>]*width="([\d.]+)" height="11"', picture)]
    assert widths[0] == pytest.approx(4 * widths[1], rel=1e-2) and widths[2] == 0


def test_the_same_analysis_gives_the_same_bytes(official, tmp_path):
    page = render(official)
    assert page == render(official) and "2026" not in page
    created = datetime(2026, 2, 3, 4, 5, tzinfo=UTC)
    file = save_report(official, tmp_path / "deep" / "report.html", created, {"new data": "d" * 32})
    text = file.read_text(encoding="utf-8")
    assert "2026-02-03 04:05 UTC" in text and "d" * 32 in text


def test_it_takes_no_time(official):
    def once():
        start = time.perf_counter()
        render(official)
        return time.perf_counter() - start
    assert min(once() for _ in range(5)) < 0.3


# ── what is in the data does not act ──────────────────────────────────────────────────────────────────────────────────

def test_texts_from_data_are_texts(hostile, official, faulty):
    page, text = Page(render(hostile, digests={"new data": HOSTILE[0]})), render(hostile)
    plain = {tag for a in (official, faulty) for tag, _ in Page(render(a)).elements}
    assert {tag for tag, _ in page.elements} <= plain, "data adds no element"
    for tag, attributes in page.elements:
        assert not [a for a in attributes if a.startswith("on")], tag
        for name in ("href", "src", "xlink:href"):
            assert attributes.get(name, "#")[0] == "#" or attributes[name] == "data:,"
    for value in HOSTILE:
        assert legible(value, 40)[:12] in page.text
    assert not set("\u202e\x00\x1b") & set(text) and "x" * 1000 not in text
    assert "{{ 7 * 7 }}" in page.text


def test_pictures_are_well_formed(hostile):
    files = plots(hostile)
    assert all(re.fullmatch(r"(columns/)?[\w.-]+\.svg", name, re.ASCII) for name in files)
    for name, text in files.items():
        tags = {e.tag.split("}")[1] for e in ElementTree.fromstring(text).iter()}
        assert tags <= {"svg", "style", "path", "rect", "text", "circle"}, name


# ── how large it grows ────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_wide_table_stays_small(settings):
    random = np.random.default_rng(0)
    names = [f"column {i} {'long ' * 40}" for i in range(1500)]
    old = pl.DataFrame({n: random.normal(size=60) for n in names}).with_columns(pl.Series("y", ["a", "b"] * 30))
    new = pl.DataFrame({n: random.normal(size=60) + i for i, n in enumerate(names)}).with_columns(
        pl.Series("y", ["a", "b"] * 30))
    text = render(analyze(new, old, table_settings(settings, "y", "b")))
    page = Page(text).text
    assert len(text.encode()) < 2_000_000
    assert "Shown are 60 of 1,501 columns" in page and "Shown are 300 of 1,501 columns" in page
    assert "Shown are 50 of 1,501 columns" in page, "of the correlations"
    assert re.search(r"[\d,]+ more are in findings.json", page)


def test_long_texts_and_many_levels_stay_small(settings):
    random = np.random.default_rng(0)
    levels = [f"{i} {'word ' * 500}" for i in range(300)]
    columns = {f"text {i}": random.choice(levels, 1000) for i in range(20)}
    old, new = (pl.DataFrame(columns).with_columns(pl.Series("y", ["a", "b"] * 500)) for _ in range(2))
    text = render(analyze(new.with_columns(pl.col("text 1").str.slice(3)), old, table_settings(settings, "y", "b")))
    assert len(text.encode()) < 2_000_000


def test_little_data_gives_a_report(settings):
    "Whatever there is not: a target, a domain classifier, correlations, columns in common."
    old = pl.DataFrame({"a": [1, 2], "y": ["b", "a"]})
    for new in (pl.DataFrame({"a": [1]}), pl.DataFrame({"z": [1]}), pl.DataFrame({"a": [None], "y": ["a"]}),
                pl.DataFrame({"a": ["x"], "y": ["a"]}), pl.DataFrame({"a": [float("inf")], "y": ["a"]})):
        analysis = analyze(new, old, table_settings(settings, "y", "b"))
        assert Page(render(analysis)).text and isinstance(plots(analysis), dict)


# ── for everybody ─────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("which", ["official", "faulty", "hostile"])
def test_structure_for_readers_of_any_kind(which, request):
    page = Page(render(request.getfixturevalue(which)))
    tags = [t for t, _ in page.elements]
    levels = [int(t[1]) for t in tags if re.fullmatch(r"h\d", t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), "headings in order"
    assert ("html", {"lang": "en"}) in page.elements and tags.count("main") == 1
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for t, a in page.elements if t == "a"} <= set(ids), "every link leads somewhere"
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes.get("aria-hidden") or (attributes["role"] == "img" and attributes["aria-label"])
        assert tag not in ("script", "iframe", "object", "link") or attributes.get("href") == "data:,"


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.is_file():
        pytest.skip(f"no {CHROMIUM}")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=str(CHROMIUM), args=[
            "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"])
        yield started
        started.close()


@pytest.fixture
def visit(browser, tmp_path):
    "A function that opens an analysis' report in a window; what the page asked for or complained of is an error."
    heard, contexts = [], []

    def open_report(analysis, width=1280, **options):
        file = save_report(analysis, tmp_path / "report.html")
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: heard.append(r.url) if r.url not in (file.as_uri(), "data:,") else None)
        page.on("console", lambda m: heard.append(m.text))
        page.on("pageerror", lambda e: heard.append(str(e)))
        page.on("dialog", lambda d: heard.append(d.message))
        page.goto(file.as_uri())
        return page
    yield open_report
    for context in contexts:
        context.close()
    assert heard == []


@pytest.mark.parametrize("which", ["official", "faulty", "hostile"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_and_asks_for_nothing(visit, which, width, request):
    analysis = request.getfixturevalue(which)
    page = visit(analysis, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("h1 .verdict").inner_text().strip() == analysis.verdict.capitalize()
    assert page.locator("h1 .verdict").bounding_box()["y"] < 300, "verdict first"
    assert page.title().startswith(analysis.verdict.capitalize())
    if which != "hostile":  # names of 5,000 characters may be cut
        wide = page.eval_on_selector_all("svg.chart text", """all => all.filter(t => {
            const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();
            return a.width > 0 && (a.left < b.left - 3 || a.right > b.right + 3) }).map(t => t.textContent)""")
        assert wide == [], "labels stay inside their pictures"


def test_it_is_used_with_the_keyboard(visit, faulty):
    page = visit(faulty)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0, "seen once it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    seen = []
    for _ in range(200):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.tagName"))
        if seen[-1] == "SUMMARY":
            break
    assert seen[-1] == "SUMMARY" and {"A", "PRE"} <= set(seen)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    note = page.locator("details .finding").first
    assert not note.is_visible()
    page.keyboard.press("Enter")
    assert note.is_visible()


def test_dark_and_paper(visit, faulty):
    page = visit(faulty, color_scheme="dark")
    def luminance(selector):
        colour = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
    assert luminance("body") < 60 and luminance(".card") < 80
    page.emulate_media(media="print")
    assert luminance("body") == 255 and luminance(".card") == 255, "paper is light"
    assert page.locator("nav").is_hidden()
    assert page.locator("details .finding").first.is_visible(), "folded parts are printed"
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and 5 < len(re.findall(rb"/Type /Page\b(?!s)", pdf)) < 40
