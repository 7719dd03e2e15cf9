"""Pages that are written when the book is built, from the code itself: they cannot be out of date.

A line `<!-- generate: NAME -->` in a page becomes what the function NAME below says. One page per module for its
reference is put into `book/reference/api/` before the table of contents is read.
"""
import ast
import html
import importlib
import inspect
import json
import re
from typing import Any

import click
from notebooks import PACKAGE, ROOT, direct

API = ROOT / "book/reference/api"


# ── the house ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def rooms() -> list[tuple[str, str, str, str]]:
    "Of each numbered notebook: its name, module, title and one-line quote."
    found = []
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        first = "".join(json.loads(path.read_text())["cells"][0]["source"])
        title = first.split("\n", 1)[0].removeprefix("# ").strip()
        quote = m[1].strip() if (m := re.search(r"^> *(.+)$", first, re.MULTILINE)) else ""
        found.append((path.stem, re.sub(r"^\d+[a-z]?_", "", path.stem), title, quote))
    return found


def house() -> str:
    "A table of all rooms."
    rows = [f"| {stem.split('_')[0]} | [{title}](../nbs/{stem}.ipynb) | {quote} |" for stem, _, title, quote in rooms()]
    return "\n".join(["| | Notebook | What lives there |", "|---|---|---|", *rows])


def arrows() -> str:
    "An arc from each module to each one that it imports, drawn from the imports in the modules."
    listed = rooms()
    place = {module: i for i, (_, module, _, _) in enumerate(listed)}
    step, left, top = 19, 190, 14
    y = {m: top + i * step for m, i in place.items()}
    arcs, names = [], []
    for stem, module, title, quote in listed:
        uses = sorted((m for m in direct(module) if m in place), key=place.get)
        for other in uses:
            assert place[other] < place[module], f"{module} imports {other}: uphill"
            reach = min(26 + 6.5 * (place[module] - place[other]), 540)
            a, b, far = y[module], y[other], left + reach
            curve = f"M{left} {a} C{far} {a} {far} {b} {left + 7} {b}"
            arcs.append(f'<path class="arc from-{module} to-{other}" d="{curve}">'
                        f'<title>{module} → {other}</title></path>')
        about = html.escape(f"{title}: {quote} Imports: {', '.join(uses) or 'none of ours'}.")
        names.append(f'<a href="../../nbs/{stem}.html" data-module="{module}"><text x="{left - 8}" y="{y[module] + 4}">'
                     f'{module}</text><circle cx="{left}" cy="{y[module]}" r="2.5"/><title>{about}</title></a>')
    height = top + len(listed) * step
    count = len(arcs)
    return f"""```{{raw}} html
<figure class="house">
<svg viewBox="0 0 620 {height}" role="img" aria-label="{len(listed)} modules and the {count} imports between them">
<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">
<path d="M0 0L6 3L0 6z"/></marker></defs>
{chr(10).join(arcs)}
{chr(10).join(names)}
</svg>
<figcaption>{len(listed)} modules, {count} imports. Point at a name: what it uses is blue, what uses it is orange.
A click opens its notebook.</figcaption>
</figure>
<script>
document.querySelectorAll(".house a").forEach(a => {{
  const svg = a.ownerSVGElement, name = a.dataset.module;
  a.addEventListener("mouseenter", () => {{ svg.classList.add("pointed");
    svg.querySelectorAll(".from-" + name).forEach(p => p.classList.add("uses"));
    svg.querySelectorAll(".to-" + name).forEach(p => p.classList.add("used")); }});
  a.addEventListener("mouseleave", () => {{ svg.classList.remove("pointed");
    svg.querySelectorAll("path").forEach(p => p.classList.remove("uses", "used")); }});
}});
</script>
```"""


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def _fields_said() -> dict[str, dict[str, str]]:
    "Of each class of settings, what the text after each field says."
    said: dict[str, dict[str, str]] = {}
    for node in ast.parse((PACKAGE / "settings.py").read_text()).body:
        if isinstance(node, ast.ClassDef):
            texts = said.setdefault(node.name, {})
            for one, after in zip(node.body, node.body[1:], strict=False):
                if (isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr)
                        and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)):
                    texts[one.target.id] = " ".join(after.value.value.split())
    return said


def _default(field: Any) -> str:
    if field.is_required():
        return "*must be set*"
    value = field.get_default(call_default_factory=True)
    if value is None or value == () or value == "":
        return "*empty*"
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) \
        else str(value)
    return f"`{text}`"


def settings() -> str:
    "Every setting with its default and meaning, by section."
    from income_mlops.settings import Section, Settings
    said, parts = _fields_said(), []

    def section(cls: type[Section], path: str) -> None:
        rows, inner = [], []
        for name, field in cls.model_fields.items():
            kind = field.annotation
            if inspect.isclass(kind) and issubclass(kind, Section):
                inner.append((kind, f"{path}.{name}".lstrip(".")))
                continue
            if path == "" and name in ("root", "file"):  # found, not set
                continue
            key = f"{path}.{name}".lstrip(".")
            meaning = next((said[c.__name__][name] for c in cls.__mro__ if name in said.get(c.__name__, {})), "")
            rows.append(f"| `{key}` | {_default(field)} | {meaning} |")
        if rows:
            head = f"## {path}" if path else "## At the top"
            parts.append("\n".join([head, "", "| Setting | Default | Meaning |", "|---|---|---|", *rows, ""]))
        for kind, where in inner:
            section(kind, where)
    section(Settings, "")
    return "\n".join(parts)


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────

def _help(command: click.Command, path: str) -> str:
    context = click.Context(command, info_name=path, max_content_width=100, terminal_width=100)
    return f"```text\n{command.get_help(context)}\n```"


def commands() -> str:
    "The help of every command."
    from income_mlops.cli import main
    parts = [_help(main, "income-mlops")]

    def group(commands: dict[str, click.Command], path: str, level: str) -> None:
        for name, command in commands.items():
            parts.append(f"{level} {path} {name}\n\n{_help(command, f'{path} {name}')}"
                         .replace("income-mlops income-mlops", "income-mlops"))
            if isinstance(command, click.Group):
                group(command.commands, f"{path} {name}", level + "#")
    group(main.commands, "income-mlops", "##")
    return "\n\n".join(parts)


# ── functions and classes ─────────────────────────────────────────────────────────────────────────────────────────────

def modules() -> str:
    "A table of the modules with what they define."
    rows = []
    for _, module, _, quote in rooms():
        public = importlib.import_module(f"income_mlops.{module}").__all__
        rows.append(f"| [`{module}`](api/{module}.md) | {quote} | {', '.join(f'`{n}`' for n in public)} |")
    return "\n".join(["| Module | What it is for | Names |", "|---|---|---|", *rows])


def write_api_pages() -> None:
    "One page for each module; those of modules that are gone are removed."
    API.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for stem, module, title, _ in rooms():
        wanted[API / f"{module}.md"] = (
            f"# {module}\n\n[{title}](../../../nbs/{stem}.ipynb) is its notebook: the code, examples, tests.\n\n"
            f"```{{eval-rst}}\n.. automodule:: income_mlops.{module}\n   :members:\n   :undoc-members:\n```\n")
    for path in API.glob("*.md"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _rst(text: str) -> str:
    "A docstring's Markdown (`code`, plain signs) as reStructuredText."
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(f"``{p[1:-1]}``" if p.startswith("`") and p.endswith("`") and len(p) > 2
                   else re.sub(r"([*|\\])|(?<=\w)(_)(?=\W|$)", lambda m: "\\" + m[0], p) for p in parts)


def docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    "What stands beside the parameters in the source belongs to the documentation."
    lines[:] = [_rst(line) for line in lines]
    if what not in ("function", "method", "class"):
        return
    from fastcore.docments import docments
    try:
        comments = docments(thing.__init__ if what == "class" else thing, full=True)
    except (OSError, TypeError, ValueError, AttributeError, SyntaxError):
        return  # made by a library: there is no source
    fields = [f":param {p}: {_rst(' '.join(str(c.docment).split()))}" for p, c in comments.items()
              if getattr(c, "docment", None) and p not in ("return", "self")]
    if fields:
        lines += ["", *fields, ""]


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    "pydantic's own machinery is no part of a class's documentation."
    return True if name.startswith("model_") and not inspect.isfunction(thing) else None


# ── into the pages ────────────────────────────────────────────────────────────────────────────────────────────────────

WRITERS = {"house": house, "arrows": arrows, "settings": settings, "commands": commands, "modules": modules}


def read_source(app: Any, name: str, source: list[str]) -> None:
    source[0] = re.sub(r"^<!-- generate: (\w+) -->$", lambda m: WRITERS[m[1]](), source[0], flags=re.MULTILINE)


def outdated(app: Any, env: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    "Pages with generated parts are read at every build."
    marked = [p for p in (ROOT / "book").rglob("*.md") if "_build" not in p.parts and "<!-- generate:" in p.read_text()]
    names = {p.relative_to(ROOT).with_suffix("").as_posix() for p in [*marked, *API.glob("*.md")]}
    return sorted(names & set(env.found_docs))


def setup(app: Any) -> dict[str, Any]:
    write_api_pages()
    app.connect("source-read", read_source)
    app.connect("env-get-outdated", outdated)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
