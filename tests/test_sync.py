"""Notebooks and modules are one: the check of `make test` sees every way in which they can part."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def check(project: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "tools/check_sync.py", project], capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    "A project of the first two notebooks and their modules, to spoil."
    for folder, names in (("nbs", ("00_settings.ipynb", "01_data.ipynb")),
                          ("income_mlops", ("__init__.py", "settings.py", "data.py"))):
        (tmp_path / "p" / folder).mkdir(parents=True)
        for name in names:
            shutil.copy2(ROOT / folder / name, tmp_path / "p" / folder)
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy2(ROOT / name, tmp_path / "p")
    subprocess.run([Path(sys.executable).parent / "nbdev-export"], cwd=tmp_path / "p", check=True)  # their _modidx.py
    assert check(tmp_path / "p").returncode == 0
    return tmp_path / "p"


def edit(notebook: Path, change) -> None:
    content = json.loads(notebook.read_text())
    change(content)
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def exported_cell(content: dict) -> dict:
    return next(c for c in content["cells"] if "".join(c["source"]).startswith("#| export\n"))


def test_project_is_in_sync():
    done = check(ROOT)
    assert done.returncode == 0, done.stderr


def test_changed_cell_without_export_fails(copy):
    edit(copy / "nbs/01_data.ipynb", lambda c: exported_cell(c)["source"].append("\nAT_MOST = 5"))
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    done = check(copy)
    assert done.returncode == 1
    assert "income_mlops/data.py: differs from its notebook" in done.stderr
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}, "the check changed files"


def test_changed_test_cell_is_no_difference(copy):
    "Only exported cells matter: prose and tests change freely."
    edit(copy / "nbs/01_data.ipynb", lambda c: c["cells"].append(
        {"cell_type": "markdown", "id": "0a0a0a0a", "metadata": {}, "source": ["More prose."]}))
    done = check(copy)
    assert done.returncode == 0, done.stderr


def test_changed_module_fails(copy):
    module = copy / "income_mlops/settings.py"
    module.write_text(module.read_text() + "\nEDITED_BY_HAND = True\n")
    done = check(copy)
    assert done.returncode == 1
    assert done.stderr.startswith("income_mlops/settings.py: differs")
    assert len(done.stderr.splitlines()) == 1


def test_new_module_without_notebook_fails(copy):
    (copy / "income_mlops/helpers.py").write_text("x = 1\n")
    done = check(copy)
    assert done.returncode == 1
    assert "income_mlops/helpers.py: no notebook exports this file" in done.stderr


def test_notebook_that_was_never_exported_fails(copy):
    (copy / "income_mlops/data.py").unlink()
    done = check(copy)
    assert done.returncode == 1
    assert "income_mlops/data.py: exported by a notebook, but not in the package" in done.stderr


def test_outputs_and_metadata_fail(copy):
    def run(content):
        cell = next(c for c in content["cells"] if c["cell_type"] == "code")
        cell |= {"execution_count": 7, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["hello\n"]}]}
    edit(copy / "nbs/00_settings.ipynb", run)
    edit(copy / "nbs/01_data.ipynb", lambda c: c["cells"][0]["metadata"].update(scrolled=True))
    done = check(copy)
    assert done.returncode == 1
    assert "nbs/00_settings.ipynb: cell" in done.stderr and "has outputs" in done.stderr
    assert "nbs/01_data.ipynb: not clean" in done.stderr


def test_file_that_is_no_notebook_is_named(copy):
    (copy / "nbs/01_data.ipynb").write_text("{ not json")
    done = check(copy)
    assert done.returncode == 1
    assert done.stderr.startswith("nbs/01_data.ipynb: not a notebook")
    assert len(done.stderr.splitlines()) == 1
