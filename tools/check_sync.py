"""Are the modules exactly what the notebooks export, and are the notebooks clean?

Works on a temporary copy, so neither a failed check nor an interrupted one touches a file of yours:

    python tools/check_sync.py [PROJECT]

Exit code 0: in sync; 1: not, with one line per file.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = Path(sys.executable).parent
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")


def exported(project: Path, copy: Path) -> None:
    "Fill `copy` with the project's notebooks, cleaned, and what they export; no module of the project gets there."
    copy.mkdir()
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy2(project / name, copy)
    shutil.copytree(project / "nbs", copy / "nbs", ignore=LEFT_OUT)
    for name, content in files(copy / "nbs", ".ipynb").items():
        try:
            json.loads(content)
        except ValueError as e:
            sys.exit(f"{name}: not a notebook: {e}")
    (copy / "income_mlops").mkdir()
    shutil.copy2(project / "income_mlops/__init__.py", copy / "income_mlops")
    for command in ("nbdev-export", "nbdev-clean"):
        done = subprocess.run([TOOLS / command], cwd=copy, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{command} failed:\n{done.stdout}")


def files(folder: Path, *suffixes: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder.parent)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)
            and (not suffixes or p.suffix in suffixes)}


def problems(project: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d).resolve() / "copy"
        exported(project, copy)
        here, there = files(project / "income_mlops"), files(copy / "income_mlops")
        lines = [f"{n}: differs from its notebook; run `make export` (and edit the notebook, not the module)"
                 for n in sorted(here.keys() & there.keys()) if here[n] != there[n]]
        lines += [f"{n}: no notebook exports this file" for n in sorted(here.keys() - there.keys())]
        lines += [f"{n}: exported by a notebook, but not in the package; run `make export`"
                  for n in sorted(there.keys() - here.keys())]
        mine, cleaned = files(project / "nbs", ".ipynb"), files(copy / "nbs", ".ipynb")
        lines += [f"{n}: not clean; run `make export`" for n in sorted(mine) if mine[n] != cleaned[n]]
        lines += [f"{n}: cell {i} has outputs; clear them before you commit" for n in sorted(mine)
                  for i, cell in enumerate(json.loads(mine[n])["cells"]) if cell.get("outputs")]
        return lines


if __name__ == "__main__":
    found = problems(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve())
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    sys.exit(bool(found))
