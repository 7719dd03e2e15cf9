"""A book that needs no network: formulas as MathML, which browsers draw themselves, nothing loaded from elsewhere."""
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml, pick_math_environment


def _mathml(node: Any, block: bool) -> str:
    code = node.astext()
    if block:
        environment = pick_math_environment(code)
        code = f"\\begin{{{environment}}}{code}\\end{{{environment}}}" if "align" in environment else code
    tree = latex2mathml.tex2mathml(code, as_block=block)
    return str(tree)


def visit_math(self: Any, node: nodes.math) -> None:
    self.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def visit_displaymath(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math-block">{_mathml(node, block=True)}</div>')
    raise nodes.SkipNode


def no_remote_scripts(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    "Live code in pages (thebe) would be fetched from a CDN: its scripts go. So does any other that is not ours."
    def ours(script: Any) -> bool:
        text = str(getattr(script, "filename", script) or "") + str(getattr(script, "attributes", {}).get("body", ""))
        return "thebe" not in text.lower() and "://" not in text
    if "script_files" in context:
        context["script_files"] = [s for s in context["script_files"] if ours(s)]


def setup(app: Any) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.connect("html-page-context", no_remote_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
