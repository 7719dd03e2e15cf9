"""The book: built without a warning, read without a network, its tutorials followed to the letter."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from book_helpers import BLOCK, ROOT, Walk, steps, write

from income_mlops.docs import server

BOOK = ROOT / "book"
CHROMIUM = next((p for p in (shutil.which("chromium"), shutil.which("chromium-browser"), shutil.which("google-chrome"))
                 if p), None)


# ── the sources ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_page_is_in_the_table_of_contents():
    toc = (BOOK / "_toc.yml").read_text()
    pages = [p for p in BOOK.rglob("*") if p.suffix in {".md", ".ipynb"} and "_build" not in p.parts
             and p.parent != BOOK / "reference/api"]
    listed = set(re.findall(r"(?:file|root): (\S+)", toc))
    assert {p.relative_to(ROOT).with_suffix("").as_posix() for p in pages} <= listed
    assert {p.relative_to(ROOT).with_suffix("").as_posix() for p in (ROOT / "nbs/explore").glob("*.ipynb")} <= listed
    assert "glob: nbs/[0-9]*" in toc


@pytest.fixture
def extension(monkeypatch):
    "The book's own Sphinx extensions."
    monkeypatch.syspath_prepend(BOOK / "_ext")
    import generated
    import notebooks
    return notebooks, generated


def code(source, **tags):
    return {"cell_type": "code", "metadata": tags, "source": source, "outputs": [], "execution_count": None}


def test_directives_become_tags(extension):
    notebooks, _ = extension
    cells = [code("#| default_exp drift"), code("#| hide\nimport os"),
             code("#| export\ndef f(): ...\n\n\nclass _B: ...\nA = 1"), code("#| eval: false\nstop()"),
             code("assert f")]
    hidden, exported, skipped, test = notebooks.prepared(cells, "drift")
    assert hidden["metadata"]["tags"] == ["remove-cell"] and hidden["source"] == "import os"
    assert exported["metadata"]["tags"] == ["hide-input"]
    assert exported["metadata"]["mystnb"]["code_prompt_show"] == "drift: f(), A"
    assert skipped["metadata"]["tags"] == ["skip-execution"] and test["metadata"]["tags"] == []


def test_outputs_are_kept_as_long_as_what_they_stand_on(extension, monkeypatch, tmp_path):
    "A change in a module executes again what imports it, also through others, and nothing else."
    notebooks, _ = extension
    package = tmp_path / "income_mlops"
    shutil.copytree(ROOT / "income_mlops", package, ignore=shutil.ignore_patterns("__pycache__"))
    drift, data = [code("from income_mlops.drift import drift")], [code("from income_mlops import data")]

    def digests():
        notebooks.direct.cache_clear(), notebooks._digest.cache_clear()
        return [notebooks.depends_on(cells) for cells in (drift, data)]
    monkeypatch.setattr(notebooks, "PACKAGE", package)
    before = digests()
    assert digests() == before
    with (package / "comparison.py").open("a") as f:  # drift stands on it, data does not
        f.write("\n# changed\n")
    after = digests()
    assert after[0] != before[0] and after[1] == before[1]


def test_outputs_are_made_anew_when_a_setting_a_table_or_a_named_file_changes(extension, monkeypatch, tmp_path):
    notebooks, _ = extension
    for folder in ("data", "nbs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*checkpoints"))
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)

    def digests():
        notebooks._digest.cache_clear()
        return [notebooks.depends_on([code(source)]) for source in (
            "import income_mlops", "text = (settings.root / 'README.md').read_text()")]
    before = digests()
    monkeypatch.setenv("DYNACONF_PATHS__STATE", str(tmp_path / "var"))  # of the build itself
    assert digests() == before
    (tmp_path / "README.md").write_text("another")
    plain, reads = digests()
    assert plain == before[0] and reads != before[1]
    (tmp_path / "data/more.csv").write_text("a,b")
    assert digests()[0] not in (plain, before[0])
    before = digests()
    monkeypatch.setenv("DYNACONF_SERVING__THRESHOLD", "0.4")
    assert all(a != b for a, b in zip(digests(), before, strict=True))
    (tmp_path / "elsewhere.csv").write_text("a,b")
    monkeypatch.setenv("DYNACONF_DATASET__ORIGIN_PATH", "elsewhere.csv")
    before = digests()
    (tmp_path / "elsewhere.csv").write_text("a,c")
    assert all(a != b for a, b in zip(digests(), before, strict=True))


def test_a_widget_becomes_a_picture_of_itself(extension):
    "Its controls with their values as plain HTML: nothing in a page would draw it."
    import ipywidgets as w
    import widgets
    from ipywidgets.embed import dependency_state
    box = w.VBox([w.IntSlider(description="age", min=17, max=90, value=42), w.HTML("<b>said</b>"), w.HBox([
        w.Dropdown(description="work<class", options=[("not known", None), ("Private", "p")], value="p"),
        w.Checkbox(description="gone", indent=False, value=True), w.Button(description="Predict")])])
    page = widgets.drawn(dependency_state([box]), box.model_id)
    assert '<span>age</span><input type="range" min="17" max="90" step="any" value="42" disabled>' in page
    assert "<output>42</output>" in page and "<b>said</b>" in page and "work&lt;class" in page
    assert "<option selected>Private</option>" in page and "<option>not known</option>" in page
    assert '<input type="checkbox" checked disabled><span>gone</span>' in page and ">Predict</button>" in page
    with pytest.raises(KeyError, match="ColorPicker"):
        widgets.drawn({"a": {"model_name": "ColorPickerModel", "state": {}}}, "a")


def test_every_setting_is_in_the_reference(extension):
    from income_mlops.origins import effective
    from income_mlops.settings import load_settings
    page = extension[1].settings()
    for key, _, _ in effective(load_settings()):
        assert f"| `{key}` |" in page


def test_the_picture_has_every_import(extension):
    notebooks, generated = extension
    rooms = {module for _, module, _, _ in generated.rooms()}
    imports = {(m, other) for m in rooms for other in notebooks.direct(m)}
    assert set(re.findall(r"from-(\w+) to-(\w+)", generated.arrows())) == imports


# ── the quick start ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_readme_is_what_the_notebook_says():
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ── tutorials, to the letter ──────────────────────────────────────────────────────────────────────────────────────────

def cloned(folder):
    "The files of the project in a folder of their own, with the environment that is in use."
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    version = re.search(r"^UV_VERSION := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for made in (folder / f".tools/uv-{version}", folder / ".venv/.stamp"):  # as after `make setup`
        made.parent.mkdir()
        made.touch()
    (folder / ".venv/bin").symlink_to(Path(sys.executable).parent)
    return folder


@pytest.fixture
def clone(tmp_path):
    return cloned(tmp_path / "clone")


def start_build(*words, cwd=ROOT):
    "A build of the book as a process of its own."
    return subprocess.Popen(
        ["nice", *map(str, words)], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})


def finish(process):
    "Waits for a build; what it said."
    said, _ = process.communicate(timeout=3000)
    assert process.returncode == 0, said[-5000:]
    return said


@pytest.fixture(scope="module")
def building(tmp_path_factory):
    "`make book` on a fresh clone, without any cache, while tutorials are followed, which mostly wait."
    folder = cloned(tmp_path_factory.mktemp("book") / "clone")
    begun = time.monotonic()
    process = start_build("bash", "-c", "make book && echo built", cwd=folder)
    process.folder, process.begun = folder, begun
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("building")
def test_another_table_by_settings_alone(tmp_path):
    Walk(tmp_path).follow(BOOK / "tutorials/another_table.md")


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("building")
def test_retrain_on_new_data(tmp_path):
    Walk(tmp_path).follow(BOOK / "tutorials/retrain.md")


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("building")
def test_a_newcomers_first_hour(clone):
    "The first tutorial, every command of the README's quick start, and a model of one's own, in one clone."
    Walk(clone).follow(BOOK / "tutorials/first.md")
    walk = Walk(clone, {"DYNACONF_OPTIMIZATION__N_TRIALS": "1", "DYNACONF_OPTIMIZATION__N_FOLDS": "2"})
    shutil.copy(clone / "data/adult.test.csv", clone / "people.csv")
    with (clone / "people.csv").open() as people:
        (clone / "new.csv").write_text("".join(people.readlines()[:2_001]))
    readme = (clone / "README.md").read_text()
    done = []

    def run(words, codes=(0,)):
        done.append(subprocess.run(["bash", "-c", walk.said(words)], cwd=clone, env=walk.environment,
                                   capture_output=True, text=True, timeout=1800))
        assert done[-1].returncode in codes, f"{words}\n{done[-1].stdout}\n{done[-1].stderr}"
        return done[-1].stdout
    try:
        for block in BLOCK.finditer(readme):
            if block["kind"] == "json":
                walk.compare(block["text"].strip(), done[-1].stdout, "the README's prediction")
            commands = re.findall(r"(?m)^(?!#)((?:.+?'\{(?:.|\n)+?\}')|.+)$", block["text"])
            for line in commands if block["kind"] == "sh" else ():
                words = re.sub(r" +# .*", "", line).replace("/backups", f"{clone}/backups")
                if words == "make up":
                    walk.start(words, "…\nEverything runs; Ctrl-C stops it. Logs: …", 900)
                elif words == "income-mlops worker":  # stays
                    run(f"timeout --signal=INT 8 {words}", (124, 130))
                elif re.match(r"make |source |docker |cp .env", words):  # see the next two tests
                    continue
                else:
                    if words.startswith("mv var "):
                        walk.end()
                    run(words, {"analyze": (0, 10, 11), "diff": (0, 1)}.get(words.split()[1], (0,)))
                if instead := re.search(r" +# or: (curl .+)$", line):  # here already, with its upload and job
                    assert run(f"{instead[1]} -s -o said -w '%{{http_code}}'") == "200"
                    assert json.loads((clone / "said").read_text())["job_id"]
                if words.startswith("income-mlops upload"):  # what the ids on the page are here
                    job = json.loads(run("income-mlops jobs --json"))[0]["id"]
                    run(f"income-mlops jobs {job} --watch")
                    there = json.loads(run("income-mlops datasets list --json"))
                    walk.words |= {"rollback 3f2a81": f"rollback {there['versions'][0]['id']}",
                                   "delete 9c41d7": f"delete {there['uploads'][0]['id']}", "jobs 3f2a": f"jobs {job}"}
        said = " ".join(d.args[2] for d in done)
        assert all(f"income-mlops {c}" in said for c in (
            "train", "analyze", "models", "promote", "diff", "replay", "predict", "upload", "datasets rollback",
            "datasets delete", "jobs", "worker", "backup", "restore"))
        assert (clone / "new.html").exists() and (clone / "predictions.csv").read_text().count("\n") == 16282
    finally:
        walk.end()
    shutil.rmtree(clone / "var")  # its tables show the reader's model alone
    Walk(clone).follow(BOOK / "tutorials/add_model.md")


def shown(*programs):
    "Commands in blocks of the README and the pages that begin with one of these words: (page, command)."
    pages = [p for p in BOOK.rglob("*.md") if not {"_build", "api"} & set(p.parts)]
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages]:
        for block in BLOCK.finditer(page.read_text()):
            if block["kind"] in ("sh", "console"):
                for line in block["text"].replace("\\\n", " ").splitlines():
                    words = re.sub(r" +# .*", "", line.removeprefix("$ ")).strip()
                    if words.startswith(programs):
                        yield page, words


def test_targets_of_make_that_pages_show_exist():
    "What is not executed by the tests themselves, such as `make bench`: make knows how it would be done."
    targets = {words.split()[1] for _, words in shown("make ")}
    assert {"up", "test", "book", "bench"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip(), f"{target}: {done.stderr}"
        if target == "bench":
            assert "benchmarks/[a-z]*.py" in done.stdout and list((ROOT / "benchmarks").glob("[a-z]*.py"))


def test_commands_for_containers_that_pages_show_are_understood(tmp_path):
    "Compose itself reads the files they name, with the variables of `.env.example`, and knows their services."
    for name in ("docker-compose.yaml", "docker-compose.prod.yml"):
        shutil.copy(ROOT / name, tmp_path)
    example = re.sub(r"(?m)^([A-Z_]+)=$", r"\1=long-enough-words", (ROOT / ".env.example").read_text())
    (tmp_path / ".env").write_text(example)  # filled in, as the README tells to
    commands = list(shown("docker compose "))
    assert len(commands) >= 3

    def compose(*words):
        return subprocess.run([Path(sys.executable).parent / "docker-compose", *words], cwd=tmp_path,
                              capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    for page, words in commands:
        options = re.match(r"docker compose((?: +(?:-f|--profile|--env-file) +\S+)*)", words)
        verb, *rest = words[options.end():].split()
        there = compose(*options[1].split(), "config", "--services")
        assert there.returncode == 0, f"{page}: {words}\n{there.stderr}"
        help = compose(verb, "--help").stdout
        assert f"docker compose {verb}" in help, f"{page}: {words}"
        for option in [w for w in rest if w.startswith("-")] if verb != "exec" else []:
            assert re.search(rf"(?m)^ .*(?<!\S){re.escape(option)}\b", help), f"{page}: {words}"
        if verb == "exec":
            assert next(w for w in rest if not w.startswith("-")) in there.stdout.split(), f"{page}: {words}"


def test_settings_and_commands_that_pages_show_exist():
    "What is not executed is at least no invention: options, commands and settings on every page are real."
    from income_mlops.cli import main
    from income_mlops.origins import effective
    from income_mlops.settings import load_settings
    keys = {k for k, _, _ in effective(load_settings())}
    variables = {"DYNACONF_" + k.upper().replace(".", "__") for k in keys}
    pages = [p for p in BOOK.rglob("*.md") if "_build" not in p.parts and p.parent != BOOK / "reference/api"]
    for page in [*pages, ROOT / "README.md"]:
        text = page.read_text()
        for variable in re.findall(r"DYNACONF_[A-Z_]+(?==)", text):
            assert variable in variables or variable == "DYNACONF_SECTION__KEY", f"{page}: {variable}"
        blocks = "\n".join(b["text"] for b in BLOCK.finditer(text) if b["kind"] in ("sh", "console", "ini"))
        for words in re.findall(r"income-mlops ([a-z][^`\n|#;&>]*)", blocks):
            command = main
            for word in words.split():
                if hasattr(command, "commands") and word in command.commands:
                    command = command.commands[word]
                elif word.startswith("--"):
                    assert any(word in p.opts + p.secondary_opts for p in command.params), f"{page}: {words}"
            assert command is not main, f"{page}: {words}"


# ── the pages ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_three_pages(tmp_path):
    "A room with its code folded and its examples executed, formulas, and settings from the code."
    (tmp_path / "toc.yml").write_text("format: jb-book\nroot: book/reference/settings\nchapters:\n"
                                      "- file: nbs/00a_schema\n- file: book/explain/drift\n")
    finish(start_build("jupyter-book", "build", ".", "--config", "book/_config.yml", "--all", "--quiet",
                       "--toc", tmp_path / "toc.yml", "--path-output", tmp_path))
    page = {p.stem: p.read_text() for p in (tmp_path / "_build/html").rglob("*.html") if "_static" not in p.parts}
    assert "DYNACONF_" in page["settings"] and "serving.threshold" in page["settings"]
    assert page["drift"].count("<math") > 5 and "<mfrac>" in page["drift"]
    assert "<summary" in page["00a_schema"] and "schema: " in page["00a_schema"]
    assert "#| export" not in page["00a_schema"] and "cell_output" in page["00a_schema"]
    for name, text in page.items():
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]+', text), name


def test_links_between_sources_lead_somewhere():
    "Each relative link of a page, a notebook or the README names a file; a page links only to what is in the book."
    toc = (BOOK / "_toc.yml").read_text()
    pages = {(ROOT / name).resolve() for name in re.findall(r"(?:file|root): (\S+)", toc)}
    sources = {p: p.read_text() for p in BOOK.rglob("*.md") if not {"_build", "api"} & set(p.parts)}
    sources[ROOT / "README.md"] = (ROOT / "README.md").read_text()
    for notebook in [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs/explore").glob("*.ipynb"),
                     *(p for p in BOOK.rglob("*.ipynb") if "_build" not in p.parts)]:
        sources[notebook] = "\n".join("".join(c["source"]) for c in json.loads(notebook.read_text())["cells"]
                                      if c["cell_type"] == "markdown")
    wrong = []
    for source, text in sources.items():
        for link in re.findall(r"(?<!!)\[[^\]\n]*\]\((?!https?:|#|mailto:)([^)#\s]+)", re.sub(r"`[^`\n]*`", "", text)):
            target = (source.parent / link).resolve()
            in_book = target.with_suffix("") in pages or (target.parent == ROOT / "nbs" and target.name[0].isdigit())
            if not target.exists() or (target.suffix in (".md", ".ipynb") and source.name != "README.md"
                                       and not in_book):
                wrong.append(f"{source.relative_to(ROOT)} → {link}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def site(building):
    "The book, built: warnings, broken links and failing notebooks are errors. Its address and its folder."
    said = finish(building)
    print(f"make book on a fresh clone: {(time.monotonic() - building.begun) / 60:.1f} minutes at most")
    assert "WARNING" not in said and said.rstrip().endswith("built")
    folder = building.folder / "book/_build/html"
    with server(folder) as pages:
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{pages.server_port}", folder
        pages.shutdown()


# Outputs of cells in which a reader sees nothing. What was written to stderr is left out, without a trace.
EMPTY = """() => [...document.querySelectorAll("div.cell_output")].filter(e => {
  const folded = e.closest("details:not([open])");
  const seen = "img, svg, canvas, iframe, table, math, input, select, button, hr";
  const blank = e.getBoundingClientRect().height < 4 || !(e.innerText.trim() || e.querySelector(seen));
  return !folded && e.children.length && blank;
}).map(e => e.closest("div.cell").innerText.slice(-200))"""

# Tables that stayed Markdown.
UNRENDERED = r"""() => [...document.querySelectorAll("article p")].map(e => e.innerText)
  .filter(t => /\|\s*[-—–:]+\s*\|/.test(t)).map(t => t.slice(0, 100))"""


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_page_without_a_network(site):
    "No failed request, no request elsewhere, no error in the console; outputs are seen, search finds."
    if not CHROMIUM:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright
    site, folder = site
    pages = [p.relative_to(folder).as_posix() for p in folder.rglob("*.html")
             if "_static" not in p.parts and "_sources" not in p.parts]
    assert len(pages) > 100
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"])
        tab = browser.new_page()
        tab.on("console", lambda m: problems.append(f"{tab.url}: {m.text}") if m.type == "error" else None)
        tab.on("pageerror", lambda e: problems.append(f"{tab.url}: {e}"))
        tab.on("requestfailed", lambda r: None if r.failure == "net::ERR_ABORTED"  # we went on before it came
               else problems.append(f"{tab.url}: failed {r.url}: {r.failure}"))
        tab.on("request", lambda r: None if r.url.startswith((site, "data:", "blob:")) else problems.append(r.url))
        tab.on("response", lambda r: problems.append(f"{tab.url}: {r.status} {r.url}") if r.status >= 400 else None)
        for page in pages:
            tab.goto(f"{site}/{page}", wait_until="load")
            if 'http-equiv="refresh"' in (folder / page).read_text().lower():  # leads to the start page
                tab.wait_for_url(f"{site}/book/index.html", wait_until="load")
            problems += [f"{page}: an empty output after {cell!r}" for cell in tab.evaluate(EMPTY)]
            problems += [f"{page}: a table that is none: {text!r}" for text in tab.evaluate(UNRENDERED)]
        assert not problems, "\n".join(problems[:20])

        tab.goto(f"{site}/nbs/47e_form.html")
        assert tab.locator(".widget input[type=range]").count() > 3  # without a kernel: the picture of a form
        tab.goto(f"{site}/book/index.html")
        tab.keyboard.press("Control+k")
        tab.keyboard.type("Kolmogorov")
        tab.keyboard.press("Enter")
        tab.wait_for_url("**/search.html?q=Kolmogorov*")
        tab.wait_for_selector("ul.search li a")
        found = tab.locator("ul.search li a")
        assert any("comparison" in found.nth(i).get_attribute("href") for i in range(found.count()))
        found.first.click()
        tab.wait_for_url(lambda url: "/search.html" not in url)
        assert "Kolmogorov" in tab.locator("article").inner_text()
        tab.goto(f"{site}/book/explain/drift.html")
        boxes = [m.bounding_box() for m in tab.query_selector_all("math[display=block], .math-block math")]
        assert len(boxes) >= 5 and all(b["height"] > 20 for b in boxes)  # fractions and sums, not lines of text
        browser.close()
    assert not problems, "\n".join(problems[:20])


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_link_inside_leads_somewhere(site):
    "Also what Sphinx does not check: links in raw HTML and to anchors."
    folder = site[1]
    pages = {p: p.read_text() for p in folder.rglob("*.html") if "_static" not in p.parts}
    ids = {p: set(re.findall(r'\b(?:id|name)="([^"]+)"', text)) for p, text in pages.items()}
    broken = []
    for page, text in pages.items():
        for link in re.findall(r'<a [^>]*?href="([^"]+)"', text):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and target in ids and anchor not in ids[target]):
                broken.append(f"{page.relative_to(folder)} → {link}")
    assert not broken, "\n".join(sorted(set(broken))[:30])


def test_pages_say_nothing_of_this_machine():
    for page in [*BOOK.rglob("*.md"), *BOOK.rglob("*.ipynb"), *(ROOT / "nbs/explore").glob("*.ipynb")]:
        if "_build" not in page.parts:
            assert not re.search(r"/home/(?!state)|/root/|/tmp/", page.read_text()), page


def test_notebooks_of_the_book_hold_no_outputs():
    pages = [p for p in BOOK.rglob("*.ipynb") if "_build" not in p.parts]
    for notebook in [*pages, *(ROOT / "nbs/explore").glob("*.ipynb"), ROOT / "nbs/index.ipynb"]:
        for cell in json.loads(notebook.read_text())["cells"]:
            assert not cell.get("outputs") and not cell.get("execution_count"), notebook


def test_a_page_is_read_as_it_is_meant():
    text = ("```console\n$ a \\\n> b\nx…\n$ c\n```\n\nThe exit code is 11.\n\n"
            "```{code-block} python\n:caption: m.py\nz = 1\n```\n\n```sh\nno\n```\n\n```console\n$ d\n```\n")
    assert list(steps(text)) == [("command", "a \\\nb", "x…", 0), ("command", "c", "", 11),
                                 ("file", "m.py", "z = 1\n", 0), ("command", "d", "", 0)]


def test_an_exit_code_that_the_page_does_not_say_is_a_failure(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ echo one; exit 3\none\n```\n")
    with pytest.raises(AssertionError, match="exit code 3"):
        Walk(tmp_path).follow(page)
    page.write_text("```console\n$ echo one; exit 3\none\n```\n\nIts exit code is 3.\n")
    Walk(tmp_path).follow(page)


def test_files_of_a_page_are_written_appended_and_changed(tmp_path):
    write(tmp_path, "a.ini", "models = One\nport = 1\n")
    write(tmp_path, "change in a.ini", "models = One, Two\n")
    write(tmp_path, "append to a.ini", "[more]\n")
    assert (tmp_path / "a.ini").read_text() == "models = One, Two\nport = 1\n\n[more]\n"
    with pytest.raises(AssertionError, match="0 lines of absent"):
        write(tmp_path, "change in a.ini", "absent = 1\n")
