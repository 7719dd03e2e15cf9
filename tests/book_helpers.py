"""Pages that are followed to the letter, and a browser without a network."""
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^(?P<fence>`{3,}) *(?:\{code-block\} *)?(?P<kind>\w+)\n(?::caption: (?P<caption>[^\n]*)\n)?"
                   r"(?P<text>.*?)^(?P=fence) *$", re.MULTILINE | re.DOTALL)
STAYS = re.compile(r"(make|income-mlops) up$")


def free_ports(n):
    "Ports nobody listens on."
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def steps(text):
    """What a page tells to do: (file, name, content, 0), (command, words, answer, code), (then, '', answer, 0).

    A command ends with 0 unless the text after its block says that the "exit code is" another."""
    blocks = list(BLOCK.finditer(text))
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block["caption"]:
            yield "file", block["caption"], block["text"], 0
        elif block["kind"] == "console":
            lines = block["text"].splitlines()
            if not lines[0].startswith("$ "):
                yield "then", "", "\n".join(lines), 0
                continue
            prose = text[block.end():after.start() if after else None]
            code = int(said[1]) if (said := re.search(r"exit code is (\d+)", prose)) else 0
            commands = []
            for line in lines:
                if line.startswith("$ "):
                    commands.append([line[2:], []])
                elif line.startswith("> ") and not commands[-1][1]:
                    commands[-1][0] += "\n" + line[2:]
                else:
                    commands[-1][1].append(line)
            for i, (words, answer) in enumerate(commands, 1):
                yield "command", words, "\n".join(answer), code if i == len(commands) else 0


def write(folder, name, text):
    "What a captioned block does to a file: `FILE`, `append to FILE`, `change in FILE` (the lines of its keys)."
    how, _, file = name.rpartition(" ")
    path = folder / file
    if how == "change in":
        for line in text.splitlines():
            key = re.escape(line.partition("=")[0].strip())
            changed, n = re.subn(rf"(?m)^{key} *=.*$", line, path.read_text())
            assert n == 1, f"{file}: {n} lines of {key}"
            path.write_text(changed)
        return
    with path.open("a" if how == "append to" else "w") as out:
        out.write(("\n" if how == "append to" else "") + text)


class Walk:
    "Follows a page in a folder: writes its files, runs its commands, compares the answers. `…` stands for anything."

    def __init__(self, folder, environment=None):
        api, mlflow, dashboard, docs = free_ports(4)
        self.folder, self.log, self.process = folder, folder / "up.log", None
        self.words = {"127.0.0.1:8080": f"127.0.0.1:{api}", "127.0.0.1:5000": f"127.0.0.1:{mlflow}",
                      "127.0.0.1:8501": f"127.0.0.1:{dashboard}"}  # said on the page: said here
        local = {name: ",".join(filter(None, (os.environ.get(name), "127.0.0.1"))) for name in ("no_proxy", "NO_PROXY")}
        outer = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # as a newcomer's shell
        self.environment = {
            **outer, **local, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120",
            "DYNACONF_SERVING__PORT": str(api), "DYNACONF_MLFLOW__PORT": str(mlflow), "TERM": "dumb",
            "DYNACONF_DASHBOARD__PORT": str(dashboard), "DYNACONF_DOCS__PORT": str(docs),
            "DYNACONF_BACKEND_URL": f"http://127.0.0.1:{api}", "PYTHONWARNINGS": "ignore",
            "DYNACONF_JOBS__SCHEDULING": "normal", **(environment or {})}

    def said(self, text):
        for word, ours in self.words.items():
            text = text.replace(word, ours)
        return text

    def compare(self, expected, found, what):
        "Compare, and learn what a short name such as `3f2a…` on the page is here."
        pattern, names = "", []
        for line in self.said(expected).splitlines():
            if line.strip() == "…":
                pattern += r"(?:.*\n)*?"
                continue
            for part in re.split(r"(\b[0-9a-f]{4}…|…)", line):
                if part == "…":
                    pattern += ".*?"
                elif part.endswith("…") and len(part) == 5:
                    pattern += "([0-9a-f]{4}).*?"
                    names.append(part[:4])
                else:  # tables are as wide as their longest word
                    pattern += re.sub(r"(?:\\ ){2,}", r" {2,}", re.escape(part))
            pattern += r" *\n"
        match = re.fullmatch(pattern, found if found.endswith("\n") or not found else found + "\n")
        if os.environ.get("BOOK_RECORD"):
            print(f"$ {what}\n{found}", "" if match else "  <<< DIFFERS", flush=True)
        else:
            assert match, f"{what}\n── on the page:\n{expected}\n── here:\n{found}"
        if match:
            self.words |= {n: match[i + 1] for i, n in enumerate(names)}

    def follow(self, page, timeout=900):
        try:
            for kind, name, text, code in steps(page.read_text()):
                if kind == "file":
                    write(self.folder, name, text)
                elif kind == "then":
                    begun = self.log.stat().st_size
                    os.killpg(self.process.pid, signal.SIGINT)  # as a terminal does
                    assert self.process.wait(60) in (0, -signal.SIGINT)  # make ends itself as it was ended
                    with self.log.open() as log:
                        log.seek(begun)
                        self.compare(text, log.read(), "Ctrl-C")
                elif STAYS.fullmatch(name):
                    self.start(name, text, timeout)
                elif not re.match(r"source .*activate$", name):
                    done = subprocess.run(["bash", "-c", self.said(name)], cwd=self.folder, env=self.environment,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
                    self.compare(text, done.stdout, name)
                    assert done.returncode == code, f"{name}: exit code {done.returncode}\n{done.stdout}"
        finally:
            self.end()

    def start(self, words, expected, timeout):
        "A command that stays: wait until it has said the last line."
        with self.log.open("w") as out:
            self.process = subprocess.Popen(words.split(), cwd=self.folder, env=self.environment, stdout=out,
                                            stderr=subprocess.STDOUT, start_new_session=True)
        until = time.monotonic() + timeout
        last = expected.splitlines()[-1].split("…")[0]
        while last not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.3)
        self.compare(expected, self.log.read_text(), words)

    def end(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
