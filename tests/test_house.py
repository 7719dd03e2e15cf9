"""The house: imports run downhill, rooms stay small, and only settings and data know the shipped case."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def cells(notebook):
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(notebook.read_text())["cells"]]


def exported(notebook):
    "The notebook's exported code."
    return "\n".join(s for kind, s in cells(notebook) if kind == "code" and re.match(r"#\| ?export", s))


def module_of(notebook):
    return re.sub(r"^\d+[a-z]?_", "", notebook.stem)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_imports_run_downhill(notebook):
    "A module imports from modules with a smaller number only."
    order = [module_of(n) for n in NOTEBOOKS]
    here = order.index(module_of(notebook))
    for node in ast.walk(ast.parse(exported(notebook))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "income_mlops":
                names = [a.name for a in node.names]
            elif node.module.startswith("income_mlops."):
                names = [node.module.split(".")[1]]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("income_mlops.")]
        for name in names:
            assert name in order[:here], f"{notebook.name} imports {name}, which is not above it"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_a_notebook_exports_the_module_of_its_name(notebook):
    names = [m[1] for kind, s in cells(notebook) if (m := re.search(r"^#\| default_exp (\S+)", s, re.M))]
    assert names == [module_of(notebook)]
    assert cells(notebook)[0][0] == "markdown" and cells(notebook)[0][1].startswith("# ")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_rooms_stay_small(notebook):
    lines = [line for line in exported(notebook).splitlines() if line.strip()]
    assert len(lines) <= 290, f"{len(lines)} exported lines: this is two rooms"


def test_only_settings_and_data_know_the_case():
    header = (ROOT / "data" / "adult.train.csv").read_text().split("\n", 1)[0].split(",")
    words = {*header, "adult", "Adult", ">50K", "<=50K"} - {"age", "sex", "race"}  # words of plain English
    for notebook in NOTEBOOKS:
        nodes = ast.walk(ast.parse(exported(notebook)))
        for text in (n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)):
            known = {w for w in words if w == text or re.search(rf"(?<![\w-]){re.escape(w)}(?![\w-])", text)}
            assert not known, f"{notebook.name} knows of {known}: {text[:80]!r}"
