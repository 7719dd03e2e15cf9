"""README.md from nbs/index.ipynb: its text, without the live cells. One source for the quick start.

    python tools/readme.py           writes README.md
    python tools/readme.py --check   says whether it is up to date (exit code 1: it is not)
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def text() -> str:
    "The notebook's Markdown cells but those tagged `book`; links are relative to the project folder."
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]
    parts = ["".join(c["source"]).strip() for c in cells
             if c["cell_type"] == "markdown" and "book" not in c["metadata"].get("tags", [])]
    return "\n\n".join(parts).replace("](../", "](") + "\n"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    if "--check" not in sys.argv:
        readme.write_text(text())
    elif readme.read_text() != text():
        sys.exit("README.md is not what nbs/index.ipynb says: change the notebook, then `make export`")
