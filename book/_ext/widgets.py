"""Widgets in pages as a picture of themselves.

What draws a widget in a browser is megabytes of script from a CDN, and without a kernel nothing would answer it anyway.
Here its controls become plain HTML with the values that they had; in the dashboard the same form is alive.
"""
import html
import json
import re
from typing import Any

from docutils import nodes
from sphinx.util import logging

VIEW = re.compile(r'<script type="application/vnd\.jupyter\.widget-view\+json">(.*?)</script>', re.DOTALL)
State = dict[str, Any]


def _options(of: State) -> str:
    return "".join(f"<option{' selected' * (i == of['index'])}>{html.escape(str(label))}</option>"
                   for i, label in enumerate(of["_options_labels"]))


def _figure(of: State) -> str:
    "A slider's value, as its readout says it."
    form = of.get("readout_format", "d")
    return html.escape(f"{of['value']:{form}}" if form in ("d", ".4g", ".2f", ".3f") else f"{of['value']}")


def _slider(of: State) -> str:
    return (f'<input type="range" min="{of["min"]}" max="{of["max"]}" step="any" value="{of["value"]}" disabled>'
            f"<output>{_figure(of)}</output>")


def _typed(of: State) -> str:
    return f'<input type="text" value="{html.escape(str("" if of["value"] is None else of["value"]))}" disabled>'


BUTTONS = ("Button", "FileUpload")
CONTROLS = {
    "Dropdown": lambda of: f"<select disabled>{_options(of)}</select>",
    "IntSlider": _slider, "FloatSlider": _slider,
    **dict.fromkeys(("Text", "Textarea", "Password", "IntText", "FloatText", "BoundedIntText", "BoundedFloatText"),
                    _typed),
    "Checkbox": lambda of: f'<input type="checkbox"{" checked" * of["value"]} disabled>',
    **dict.fromkeys(BUTTONS, lambda of: f'<button type="button" disabled>{html.escape(of["description"])}</button>'),
    **dict.fromkeys(("IntProgress", "FloatProgress"), lambda of: f'<progress max="{of["max"]}" value="{of["value"]}">'
                                                                 "</progress>"),
    "HTML": lambda of: of["value"], "Label": lambda of: html.escape(of["value"]),
}


def drawn(
    models: dict[str, State],  # every model of a page's kernel by its id
    name: str,  # the id of the one to be drawn
) -> str:
    "The HTML of a widget with all that is in it; KeyError for a kind that is not known here."
    kind, of = models[name]["model_name"].removesuffix("Model"), models[name]["state"]
    if "children" in of:
        inside = "".join(drawn(models, c.removeprefix("IPY_MODEL_")) for c in of["children"])
        return f'<div class="widget-box{" beside" * (kind == "HBox")}">{inside}</div>'
    control = CONTROLS[kind](of)
    said = html.escape(of.get("description") or "") if kind not in BUTTONS else ""
    if kind == "Checkbox":
        return f"<label>{control}<span>{said}</span></label>"
    return f"<label><span>{said}</span>{control}</label>" if said else f"<div>{control}</div>"


def draw(app: Any, tree: nodes.document) -> None:
    "In place of the scripts that MyST-NB writes for a widget."
    scripts = app.env.nb_metadata.get(app.env.docname, {}).get("js_files", {})
    for node in list(tree.findall(nodes.raw)):
        if not (view := VIEW.search(node.astext())):
            continue
        name = json.loads(view[1])["model_id"]
        try:
            inside = drawn(json.loads(scripts["ipywidgets_state"][1]["body"])["state"], name)
        except KeyError as e:
            logging.getLogger(__name__).warning("a widget cannot be drawn: %s is not known to widgets.py", e,
                                                location=node, type="widgets")
            continue
        node.rawsource = ""
        node[:] = [nodes.Text(f'<div class="widget" role="img" aria-label="a form of widgets">{inside}</div>')]
    for key in [k for k in scripts if k.startswith("ipywidgets_")]:
        del scripts[key]


def setup(app: Any) -> dict[str, Any]:
    app.connect("doctree-read", draw)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
