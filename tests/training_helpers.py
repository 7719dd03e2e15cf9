"""A project folder like ours with its own state, and the command line in it."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def set_up(folder):
    "Our settings and data, in a folder of their own."
    (folder / "data").mkdir()
    for name in ("adult.train.csv", "adult.test.csv"):
        os.link(ROOT / "data" / name, folder / "data" / name) if _same_device(folder) else \
            shutil.copy(ROOT / "data" / name, folder / "data" / name)
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


def _same_device(folder):
    return folder.stat().st_dev == (ROOT / "data").stat().st_dev


def command(root, *words, env=None, code=0):
    "Run the command line in a project; its output."
    done = subprocess.run([sys.executable, "-m", "income_mlops.cli", *words], cwd=root, capture_output=True, text=True,
                          env={**os.environ, **(env or {})})
    assert done.returncode == code, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def children_of(pid):
    "Command lines of all descendants of a process, by process id."
    found, parents = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                line = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # ended meanwhile
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1]), line
    def below(parent):
        for child, (of, line) in parents.items():
            if of == parent and child not in found:
                found[child] = line
                below(child)
    below(pid)
    return found
