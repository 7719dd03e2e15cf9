"""What the images were made of when they were last built and run: docker/images-tested.json.

    python tools/images_stamp.py --fresh    exit code 0 if nothing of it has changed since

The stamp is written by `make images-test` when everything has passed, and with it the table in the book. Only Python's
own library is used, so that the question is answered before anything is installed.
"""
import argparse
import hashlib
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAMP = "docker/images-tested.json"
PAGE = "book/howto/docker.md"
MADE_OF = ("docker-compose.yaml", "docker-compose.prod.yml", ".dockerignore", "uv.lock", "pyproject.toml",
           "tools/images_test.py")
BEGIN, END = "<!-- images-tested -->", "<!-- end -->"


def digest(root: Path = ROOT) -> str:
    "One hash over the paths and contents of everything that decides what the images are and how they run."
    files = [root / name for name in MADE_OF]
    files += [p for p in (root / "docker").rglob("*") if p.is_file() and p != root / STAMP]
    told = hashlib.sha256()
    for name, file in sorted((f.relative_to(root).as_posix(), f) for f in files):
        told.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return told.hexdigest()


def read(root: Path = ROOT) -> "dict[str, Any]":
    "The stamp; empty if there is none."
    file = root / STAMP
    return json.loads(file.read_text()) if file.exists() else {}


def table(stamp: "dict[str, Any]") -> str:
    "Sizes and memory, for the book."
    lines = ["| image | size | service | memory in use | limit |", "|---|---|---|---|---|"]
    for service, told in stamp["memory"].items():
        size = stamp["sizes"].get(told["image"])
        lines.append(f"| {told['image'] if size else ''} | {f'{size} MB' if size else ''} | {service} | "
                     f"{told['used']} MB | {told['limit']} MB |")
    return "\n".join(lines)


def paragraph(stamp: "dict[str, Any]") -> str:
    "What the page of the book has between its marks."
    return (f"{BEGIN}\n\n{table(stamp)}\n\nMeasured on {stamp['date'][:10]} by `make images-test` with podman "
            f"{stamp['podman']}, on base images {stamp['base']}; memory after a training, an upload that was "
            f"trained on, and one open page of the dashboard.\n\n{END}")


def _replace(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def write(tested: str, podman: str, base: str, sizes: "dict[str, int]", memory: "dict[str, Any]",
          root: Path = ROOT) -> None:
    "The stamp, and the table in the book. `tested`: the digest of before the test; it must still be the same."
    if digest(root) != tested:
        raise RuntimeError("what the images are made of was changed while they were tested: test them once more")
    stamp = {"digest": tested, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017
             "podman": podman, "base": base, "sizes": sizes, "memory": memory}
    page = (root / PAGE).read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    _replace(root / PAGE, before + paragraph(stamp) + after)
    _replace(root / STAMP, json.dumps(stamp, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="What the images were tested with.")
    parser.add_argument("--fresh", action="store_true", required=True, help="has nothing changed since the test?")
    parser.parse_args()
    stamp = read()
    if stamp.get("digest") == digest():
        print(f"── images: tested as they are on {stamp['date'][:10]}")
        return 0
    print("── images: what they are made of has changed since they were tested")
    return 1


if __name__ == "__main__":
    sys.exit(main())
