"""The repository itself: what the lock names, what modules import, what is nowhere."""
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
MODULES = sorted(p for p in (ROOT / "income_mlops").glob("*.py") if not p.stem.startswith("_"))
PUBLIC = {"https://pypi.org", "https://files.pythonhosted.org"}
EXPORTED_EXTRAS = ("training", "serving", "tracking", "dashboard", "docs")


def lock() -> dict[str, list[dict]]:
    packages: dict[str, list[dict]] = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]:
        packages.setdefault(package["name"], []).append(package)
    return packages


def closure(packages: dict[str, list[dict]], extras: tuple[str, ...]) -> set[tuple[str, str]]:
    "Every (name, version) that the project with these extras can need, on any platform."
    project = packages["income-mlops"][0]
    todo = [*project["dependencies"], *(d for e in extras for d in project["optional-dependencies"][e])]
    seen: set[tuple[str, str, tuple[str, ...]]] = set()
    while todo:
        edge = todo.pop()
        for package in packages[edge["name"]]:
            key = (package["name"], package["version"], tuple(sorted(edge.get("extra", ()))))
            if edge.get("version", package["version"]) == package["version"] and key not in seen:
                seen.add(key)
                todo += package.get("dependencies", [])
                todo += [d for e in key[2] for d in package.get("optional-dependencies", {}).get(e, [])]
    return {(name, version) for name, version, _ in seen}


def requirements() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_whoever_starts_kernels_brings_one():
    "The image of the dashboard holds its extra alone."
    for extra in ("training", "dashboard", "docs"):
        assert "ipykernel" in {name for name, _ in closure(lock(), (extra,))}, extra


def test_requirements_are_the_lock():
    pinned = {(r.name, str(r.specifier).removeprefix("==")) for r in requirements()}
    assert pinned == closure(lock(), EXPORTED_EXTRAS), "run `make requirements`"


def test_requirements_name_no_place():
    text = (ROOT / "requirements.txt").read_text()
    assert not re.search(r"://|^-|file:|@ ", text, re.MULTILINE)
    assert all(r.url is None for r in requirements())


def test_lock_names_only_the_public_index():
    text = (ROOT / "uv.lock").read_text()
    assert set(re.findall(r'[a-z+]+://[^/"]+', text)) == PUBLIC
    sources = re.findall(r"source = (\{.*?\})", text)
    assert sources.count('{ editable = "." }') == 1
    assert set(sources) == {'{ editable = "." }', '{ registry = "https://pypi.org/simple" }'}


def test_lock_is_of_this_project():
    "What pyproject.toml asks for is what the lock was made for."
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = lock()["income-mlops"][0]["metadata"]["requires-dist"]
    groups = {"": asked["dependencies"], **asked["optional-dependencies"]}
    wanted = {(Requirement(r).name.replace("_", "-"), Requirement(r).specifier, name)
              for name, group in groups.items() for r in group}
    extra = re.compile("extra == '([^']+)'")
    known = {(d["name"], SpecifierSet(d.get("specifier", "")), "".join(extra.findall(d.get("marker", ""))))
             for d in locked}
    assert wanted == known, "run `uv lock`"


def house() -> list[str]:
    "The modules in the order of their notebooks."
    found = []
    for notebook in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        cells = json.loads(notebook.read_text())["cells"]
        found += re.findall(r"^#\| *default_exp +(\w+)", "\n".join("".join(c["source"]) for c in cells), re.MULTILINE)
    return found


def test_one_numbered_notebook_a_module():
    assert sorted(house()) == [m.stem for m in MODULES]


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_imports_run_downhill(module):
    "A module imports from those above it only, also inside its functions."
    above = house()[:house().index(module.stem)]
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level or name.split(".")[0] == "income_mlops":
                targets = [name.split(".")[-1]] if name not in ("", "income_mlops") else [a.name for a in node.names]
                assert set(targets) <= set(above), f"line {node.lineno}: {module.stem} imports {targets}"


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_modules_are_short(module):
    code = [line for line in module.read_text().splitlines() if line.strip() and not line.startswith("# %%")]
    assert len(code) <= 280, "split the notebook into two"


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_modules_do_not_know_the_shipped_table(module):
    "Column names and values live in settings.ini and data/ alone."
    words = ["fnlwgt", "marital-status", "native-country", "education-num", "hours-per-week", "capital-gain",
             "workclass", ">50K", "<=50K", "adult"]
    text = module.read_text()
    assert not [w for w in words if re.search(rf"(?<![\w-]){re.escape(w)}(?![\w-])", text, re.IGNORECASE)]


@pytest.mark.parametrize(("python3", "said"), [
    (None, "No python3 on the PATH"), ("case $2 in *exit*) exit 1;; *) echo 3.9.2;; esac", "3.9.2"),
    (f"case $2 in *ensurepip*) exit 1;; *) exec {sys.executable} \"$@\";; esac", "apt-get install python3-venv"),
])
def test_machine_without_a_usable_python_is_told(python3, said, tmp_path):
    if python3:
        (tmp_path / "python3").write_text(f"#!/bin/sh\n{python3}\n")
        (tmp_path / "python3").chmod(0o755)
    for words, expected in [([], ""), (["--explain"], said)]:
        done = subprocess.run(["/bin/sh", ROOT / "tools/find-python", *words], env={"PATH": str(tmp_path)},
                              capture_output=True, text=True)
        assert done.returncode == 0 and not done.stdout and expected in done.stderr
        assert len(done.stderr.splitlines()) == bool(words)


# ── hooks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def clone(tmp_path: Path) -> Path:
    "A git repository with the files of this one, to spoil."
    folder = tmp_path / "clone"
    for path in tracked():
        if path.suffix != ".csv":
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / path.relative_to(ROOT))
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def hook(folder: Path, name: str, *files: str) -> subprocess.CompletedProcess[str]:
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    which = ["--files", *files] if files else ["--all-files"]
    return subprocess.run([sys.executable, "-m", "pre_commit", "run", name, *which], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "PRE_COMMIT_HOME": str(folder.parent / "store")})


QUICK_HOOKS = ["large-files", "secrets", "private-key", "merge-conflict", "yaml", "toml", "end-of-file",
               "trailing-whitespace"]  # the others are `make check`


def test_hooks_pass_on_what_is_here(clone):
    for name in QUICK_HOOKS:
        done = hook(clone, name)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
def test_hooks_refuse(clone):
    "A cell that was not exported, an output, a large file, a key, a conflict."
    notebook = clone / "nbs/01_data.ipynb"
    content = json.loads(notebook.read_text())
    cell = next(c for c in content["cells"] if "".join(c["source"]).startswith("#| export\n"))
    cell["source"].append("\nAT_MOST = 5")
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    (clone / "large.bin").write_bytes(os.urandom(5_200_000))
    (clone / "key.txt").write_text("-----BEGIN RSA " + "PRIVATE KEY-----\nabc\n")
    (clone / "config.txt").write_text("aws_access_key_id = AKIA" + "Q3EGRIPSPMMK7HWX\n")
    for name, said in [("in-sync", "income_mlops/data.py: differs"), ("nbdev-export", "files were modified"),
                       ("large-files", "large.bin"), ("private-key", "key.txt"), ("secrets", "config.txt:1")]:
        done = hook(clone, name)
        assert done.returncode == 1 and said in done.stdout, name + done.stdout + done.stderr


def test_launches_start_in_the_project_folder():
    launch = json.loads((ROOT / ".vscode/launch.json").read_text())["configurations"]
    assert {"API", "MLflow", "Train"} <= {c["name"] for c in launch}
    for c in launch:
        assert c["cwd"] == "${workspaceFolder}"
        assert importlib.util.find_spec(c["module"]), c["module"]


def test_workflow_runs_the_same_and_pins_what_it_uses():
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    uses = re.findall(r"uses: (\S+)", text)
    assert uses and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", u) for u in uses)
    assert "run: bash .ci/run" in text and "make test-all" in (ROOT / ".ci/run").read_text()


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    return [p for n in done.stdout.split("\0") if n and (p := ROOT / n).is_file()]


def test_no_path_of_a_machine_and_no_large_file():
    private = re.compile(r"/(?:home/(?!state)|Users/|root/)\w|/work/")
    for path in tracked():
        assert path.stat().st_size < 6_000_000, f"{path} is large"
        if path.suffix in {".py", ".ipynb", ".toml", ".ini", ".md", ".txt", ".yml", ".yaml", ".json", ""}:
            found = [line for line in path.read_text().splitlines() if private.search(line)]
            assert path == Path(__file__) or not found, f"{path}: {found[:1]}"
