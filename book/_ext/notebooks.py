"""Module notebooks as pages: hidden cells hidden, exported code folded, tests visible, outputs true.

nbdev's directives are comments (`#| export`); Sphinx does not know them. Each notebook is changed on its way in:
nothing is written back.

Executed cells are cached by their source. What they *print* also depends on the modules they import, on the data, the
settings and the files that they name, so a digest of these goes into each notebook as a first, removed cell: change a
module, and exactly the notebooks that stand on it are executed anew.
"""
import ast
import hashlib
import json
import os
import re
import sys
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "income_mlops"


def imported(code: str) -> set[str]:
    "Modules of the package that some code imports, also inside functions."
    names = set()
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a cell with a magic
        return {m for line in code.splitlines() if not line.startswith(("%", "!")) for m in imported(line.strip())} \
            if "\n" in code else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module == "income_mlops":
                names |= {module.split(".")[-1]} if node.level and module else {a.name for a in node.names}
            elif module.startswith("income_mlops."):
                names.add(module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("income_mlops.")}
    return {n for n in names if (PACKAGE / f"{n}.py").exists()}


@cache
def direct(module: str) -> frozenset[str]:
    return frozenset(imported((PACKAGE / f"{module}.py").read_text()))


def closure(modules: set[str]) -> set[str]:
    "The modules and all they stand on."
    found: set[str] = set()
    todo = set(modules)
    while todo:
        found |= todo
        todo = {m for name in todo for m in direct(name)} - found
    return found


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _owners() -> dict[str, list[str]]:
    return {name: list(owners) for name, owners in metadata.packages_distributions().items()}


def libraries(code: str) -> set[str]:
    "Versions of the libraries that some code imports."
    names = {w.split(".")[0] for line in re.findall(r"^\s*(?:from|import) +([\w., ]+)", code, re.MULTILINE)
             for w in re.split(r"[, ]+", line) if w}
    return {f"{owner} {metadata.version(owner)}" for n in names if n != PACKAGE.name for owner in _owners().get(n, ())}


def named(code: str) -> set[Path]:
    "Files of the project that some code names, such as `README.md`."
    words = set(re.findall(r"[\w./-]*\w\.\w+", code))
    found = {(folder / word).resolve() for word in words for folder in (ROOT, ROOT / "nbs")}
    return {p for p in found if p.is_file() and p.is_relative_to(ROOT)}


def told() -> tuple[list[str], set[Path]]:
    "What the environment says of settings, and the tables that are in use after it."
    from income_mlops.settings import load_settings
    own = ("DYNACONF_PATHS__STATE", "DYNACONF_PATHS__REPORTS")  # another folder at each build
    said = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.upper().startswith("DYNACONF_") and k not in own]
    settings = load_settings()
    tables = [settings.path(p) for p in (settings.dataset.origin_path, settings.dataset.holdout_path) if p]
    return said, {p for p in [settings.file, *tables, *(ROOT / "data").iterdir()] if p.is_file()}


def depends_on(cells: list[dict[str, Any]]) -> str:
    "A digest of everything but the cells that decides what they print."
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    # A command line or a pipeline is the whole package.
    whole = re.search(r"income_mlops\.cli|\bpipelines\b|^\s*(!|%%(ba)?sh)", code, re.MULTILINE)
    names = {p.stem for p in PACKAGE.glob("*.py")} if whole else closure(
        {m for c in cells if c["cell_type"] == "code" for m in imported("".join(c["source"]))})
    modules = [PACKAGE / f"{n}.py" for n in sorted(names)]
    every = "\n".join([code, *(m.read_text() for m in modules)])
    said, tables = told()
    files = tables | named(every)
    if whole:
        files |= set((ROOT / "nbs/pipelines").glob("*.ipynb"))
    parts = [*map(_digest, [*modules, *sorted(files)]), *said, *sorted(libraries(every)), sys.version]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def defined(code: str) -> str:
    "What a cell of exported code defines, for the line that unfolds it."
    names = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(f"{node.name}()")
        elif isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inside = [n for t in targets for n in ast.walk(t)]
            names += [n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        elif isinstance(node, ast.Import | ast.ImportFrom) and "imports" not in names:
            names.append("imports")
    shown = list(dict.fromkeys(n for n in names if not n.startswith("_") or n == "_")) or list(dict.fromkeys(names))
    return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "") or "code"


def prepared(cells: list[dict[str, Any]], module: str) -> list[dict[str, Any]]:
    "The cells as the book shows them."
    made = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            made.append(cell)
            continue
        directives = [m[1] for m in re.finditer(r"^#\| *(.*)$", source, re.MULTILINE)]
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip("\n")
        if not code:
            continue
        about = cell.get("metadata", {})
        tags = [t for t in about.get("tags", []) if t != "nbval-skip"]
        words = {d.split()[0] for d in directives if d}
        if "hide" in words:
            tags.append("remove-cell")
        if "export" in words:
            tags.append("hide-input")
            prompt = f"{module}: {defined(code)}"
            about = about | {"mystnb": {"code_prompt_show": prompt, "code_prompt_hide": prompt}}
        if any(d.replace(" ", "") == "eval:false" for d in directives):
            tags.append("skip-execution")
        made.append(cell | {"source": code, "metadata": about | {"tags": tags}})
    return made


def read_source(app: Any, name: str, source: list[str]) -> None:
    if not (ROOT / f"{name}.ipynb").exists():
        return
    notebook = json.loads(source[0])
    stem = Path(name).name
    numbered = re.match(r"^\d+[a-z]?_", stem)
    module = stem[numbered.end():] if numbered else ""
    key = {"cell_type": "code", "id": "depends-on", "execution_count": None, "outputs": [],
           "metadata": {"tags": ["remove-cell"]}, "source": f"# {depends_on(notebook['cells'])}"}
    cells = prepared(notebook["cells"], module)
    if module:
        first = next(c for c in cells if c["cell_type"] == "markdown")
        head, quote, text = re.match(r"(# .*\n+)((?:>.*\n*)*)((?:.|\n)*)", "".join(first["source"]) + "\n").groups()
        line = (f":::{{div}} module-line\n`income_mlops.{module}` · from `{name}.ipynb` · "
                f"[reference](../book/reference/api/{module}.md)\n:::\n\n")
        first["source"] = f"{head}{quote}\n{line}{text}"
    notebook["cells"] = [key, *cells]
    source[0] = json.dumps(notebook)


def read_side_by_side(app: Any, config: Any) -> None:
    "A page is executed when it is read; jupyter-book itself reads one after another."
    if numbering := app.extensions.get("sphinx_multitoc_numbering"):
        numbering.parallel_read_safe = True  # it does not say so; it works when all are read
    app.parallel = max(app.parallel, min(4, len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1))


def use_own_state(app: Any, config: Any) -> None:
    "What the notebooks write while the book is built is thrown away with the process."
    state = tempfile.TemporaryDirectory(prefix="book-")
    app._state_of_the_book = state  # lives as long as the build
    kernel = Path(state.name, "ipython/profile_default/ipython_kernel_config.py")
    kernel.parent.mkdir(parents=True)
    # Else each kernel warns of its transport, and commands that are tried in a page write past their caller.
    kernel.write_text("c.IPKernelApp.log_level = 40\n"
                      "c.IPKernelApp.exec_lines = ['import rich.console as _r; _r._is_jupyter = lambda: False']\n")
    os.environ |= {"IPYTHONDIR": f"{state.name}/ipython", "DYNACONF_PATHS__STATE": f"{state.name}/var",
                   "DYNACONF_PATHS__REPORTS": f"{state.name}/reports", "MLFLOW_DISABLE_TELEMETRY": "true",
                   "GIT_PYTHON_REFRESH": "quiet", "COLUMNS": "100",
                   "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "YDATA_PROFILING_NO_ANALYTICS": "1"}


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", read_source)
    app.connect("config-inited", use_own_state)
    app.connect("config-inited", read_side_by_side)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
