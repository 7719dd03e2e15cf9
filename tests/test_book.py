"""The book: built without a warning, read without a network, its tutorials followed to the letter."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from book_helpers import BLOCK, ROOT, Walk, steps

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

@pytest.fixture
def clone(tmp_path):
    "The files of the project in a folder of their own, with the environment that is in use."
    folder = tmp_path / "clone"
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


def start_build(*options):
    "jupyter-book as a process of its own."
    return subprocess.Popen(
        ["nice", "jupyter-book", "build", ".", "--config", "book/_config.yml", *map(str, options), "--all", "--quiet"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})


def finish(process):
    "Waits for a build; what it said."
    said, _ = process.communicate(timeout=3000)
    assert process.returncode == 0, said[-5000:]
    return said


@pytest.fixture(scope="module")
def building():
    "The book is built, some ten minutes, while tutorials are followed, which mostly wait."
    process = start_build("--toc", "book/_toc.yml", "--path-output", "book", "--warningiserror", "--nitpick",
                          "--keep-going")
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
    readme = re.sub(r"(?ms)^## In containers$.*?(?=^## )", "", (clone / "README.md").read_text())  # they have own tests
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
                elif re.match(r"make (test|bench|book)|source ", words):  # the book is built below
                    continue
                else:
                    if words.startswith("mv var "):
                        walk.end()
                    run(words, {"analyze": (0, 10, 11), "diff": (0, 1)}.get(words.split()[1], (0,)))
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
        shown = "\n".join(b["text"] for b in BLOCK.finditer(text) if b["kind"] in ("sh", "console", "ini"))
        for words in re.findall(r"income-mlops ([a-z][^`\n|#;&>]*)", shown):
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
    finish(start_build("--toc", tmp_path / "toc.yml", "--path-output", tmp_path))
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
                     BOOK / "reference/http.ipynb"]:
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
    "The book, built: warnings, broken links and failing notebooks are errors."
    assert "WARNING" not in finish(building)
    with server(BOOK / "_build/html") as pages:
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{pages.server_port}"
        pages.shutdown()


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_page_without_a_network(site):
    "No failed request, no request elsewhere, no error in the console; search finds; formulas are drawn."
    if not CHROMIUM:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright
    folder = BOOK / "_build/html"
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
        assert not problems, "\n".join(problems[:20])

        tab.goto(f"{site}/search.html?q=Kolmogorov")
        tab.wait_for_selector("ul.search li a")
        assert any("comparison" in (a.get_attribute("href") or "") for a in tab.query_selector_all("ul.search li a"))
        tab.goto(f"{site}/book/explain/drift.html")
        boxes = [m.bounding_box() for m in tab.query_selector_all("math[display=block], .math-block math")]
        assert len(boxes) >= 5 and all(b["height"] > 20 for b in boxes)  # fractions and sums, not lines of text
        browser.close()
    assert not problems, "\n".join(problems[:20])


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_link_inside_leads_somewhere(site):
    "Also what Sphinx does not check: links in raw HTML and to anchors."
    folder = BOOK / "_build/html"
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
    for notebook in [*(BOOK / "reference").glob("*.ipynb"), *(ROOT / "nbs/explore").glob("*.ipynb"),
                     ROOT / "nbs/index.ipynb"]:
        for cell in json.loads(notebook.read_text())["cells"]:
            assert not cell.get("outputs") and not cell.get("execution_count"), notebook


def test_a_page_is_read_as_it_is_meant():
    text = ("```console\n$ a \\\n> b\nx…\n$ c\n```\n\n```{code-block} python\n:caption: m.py\nz = 1\n```\n\n"
            "```sh\nno\n```\n")
    assert list(steps(text)) == [("command", "a \\\nb", "x…"), ("command", "c", ""), ("file", "m.py", "z = 1\n")]
