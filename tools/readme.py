"""README.md from nbs/index.ipynb: its text, without the live cells. One source for the quick start.

    python tools/readme.py           writes README.md
    python tools/readme.py --check   says whether it is up to date (exit code 1: it is not)
    python tools/readme.py --take    the other way, after a merge: takes the sections of README.md into the notebook
"""
import json
import re
import sys
import uuid
from pathlib import Path

ROOT = Path(__file__).parent.parent
README, NOTEBOOK = ROOT / "README.md", ROOT / "nbs/index.ipynb"


def is_text(cell: dict) -> bool:
    "Whether the cell is part of the README: Markdown that is not tagged `book`."
    return cell["cell_type"] == "markdown" and "book" not in cell["metadata"].get("tags", [])


def text() -> str:
    "What README.md should be; its links are relative to the project folder."
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return "\n\n".join("".join(c["source"]).strip() for c in cells if is_text(c)).replace("](../", "](") + "\n"


def take() -> None:
    "Sections, found by their heading, from README.md into the notebook; the live cells stay behind their section."
    notebook = json.loads(NOTEBOOK.read_text())
    behind: dict[str, list[dict]] = {}
    for cell in notebook["cells"]:
        if is_text(cell):
            behind[heading := cell["source"][0].strip()] = [cell]
        else:
            behind[heading].append(cell)
    cells = []
    for section in re.split(r"(?m)^(?=## )", README.read_text()):
        source = re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](../\1)", section.strip())
        empty = {"cell_type": "markdown", "id": uuid.uuid4().hex[:8], "metadata": {}}
        first, *live = behind.get(source.splitlines()[0].strip(), [empty])
        cells += [first | {"source": source.splitlines(keepends=True)}, *live]
    notebook["cells"] = cells
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    if "--take" in sys.argv:
        take()
    elif "--check" not in sys.argv:
        README.write_text(text())
    elif README.read_text() != text():
        sys.exit("README.md is not what nbs/index.ipynb says: change the notebook, then `make export`")
