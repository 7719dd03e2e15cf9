"""The stamp that says which images were tested, and what CI does by it."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))
import images_stamp  # noqa: E402

MEMORY = {"backend": {"image": "backend", "used": 300, "limit": 2147}, "postgres": {"image": "postgres", "used": 50,
                                                                                 "limit": 1074}}


@pytest.fixture
def project(tmp_path):
    "What the images are made of, in a folder of its own."
    for name in (*images_stamp.MADE_OF, images_stamp.PAGE, ".ci/run", "tools/images_stamp.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docker", tmp_path / "docker", ignore=shutil.ignore_patterns("images-tested.json"))
    return tmp_path


def stamp(project: Path) -> None:
    images_stamp.write(images_stamp.digest(project), "4.3.1", "from docker.io", {"backend": 900}, MEMORY, project)


def test_the_stamp_has_its_form_and_the_book_quotes_it():
    told, page = images_stamp.read(), (ROOT / images_stamp.PAGE).read_text()
    if not told:  # never tested: nothing is claimed, and CI tests them
        assert f"{images_stamp.BEGIN}\n{images_stamp.END}" in page
        return
    assert set(told) == {"digest", "date", "podman", "base", "sizes", "memory"}
    assert re.fullmatch("[0-9a-f]{64}", told["digest"]) and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", told["date"])
    assert set(told["sizes"]) == {"nginx-custom", "backend", "mlflow", "frontend", "docs"}
    assert set(told["memory"]) == {"nginx", "mlflow", "backend", "worker", "frontend", "docs", "postgres"}
    assert all(0 < m["used"] < m["limit"] for m in told["memory"].values())
    assert images_stamp.paragraph(told) in page


def test_every_change_of_what_the_images_are_made_of_makes_the_stamp_old(project):
    stamp(project)
    fresh = images_stamp.digest(project)
    assert images_stamp.read(project)["digest"] == fresh
    assert "| backend | 900 MB | backend | 300 MB | 2147 MB |" in (project / images_stamp.PAGE).read_text()
    before = (project / images_stamp.PAGE).read_text()
    stamp(project)
    assert (project / images_stamp.PAGE).read_text() == before, "the second time nothing is added"
    for name in (*images_stamp.MADE_OF, "docker/nginx/start", "docker/nginx/site/page.css"):
        file = project / name
        kept = file.read_bytes()
        file.write_bytes(kept + b"\n")
        assert images_stamp.digest(project) != fresh, name
        file.write_bytes(kept)
    (project / "docker/nginx/new").touch()
    assert images_stamp.digest(project) != fresh
    with pytest.raises(RuntimeError, match="changed while"):
        images_stamp.write(fresh, "4.3.1", "", {}, {}, project)


@pytest.mark.parametrize(("old", "told", "made"), [
    (False, "", ["test-all"]), (True, "", ["images-test", "test-all"]), (True, "yes", ["images-test", "test-all"]),
    (True, "no", ["test-all"]), (True, "required", ["images-test"])])
def test_ci_tests_the_images_if_they_changed_and_the_tests_last(project, tmp_path, old, told, made):
    "With stand-ins for make and the package manager; images cannot be tested here, which is a failure if required."
    stamp(project)
    if old:
        (project / "uv.lock").write_text("another")
    programs = project / "bin"
    programs.mkdir()
    for name in ("nginx", "psql", "wrk", "google-chrome", "podman", "runc", "mmdebstrap", "iptables", "catatonit",
                 "apt-get"):
        (programs / name).write_text("#!/bin/sh\n")
    (programs / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (programs / "make").write_text(f'#!/bin/sh\necho "$1" >>{project}/made\n'
                                   '[ "$1 $CI_IMAGES" != "images-test required" ]\n')
    for file in programs.iterdir():
        file.chmod(0o755)
    done = subprocess.run(["bash", project / ".ci/run"], capture_output=True, text=True, env={
        "PATH": f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path), "CI_IMAGES": told})
    assert (project / "made").read_text().split() == made, done.stdout + done.stderr
    assert bool(done.returncode) == (told == "required")
    assert ("NOT TESTED" in done.stdout) == (told == "no")


def test_images_that_cannot_be_tested_fail_where_they_must_be(tmp_path):
    "Without the programs; nothing is written either way."
    before = images_stamp.read()
    for told, code in (("", 0), ("required", 1)):
        done = subprocess.run([sys.executable, ROOT / "tools/images_test.py", "--storage", tmp_path], text=True,
                              capture_output=True, env={**os.environ, "PATH": str(tmp_path), "CI_IMAGES": told})
        assert done.returncode == code and "SKIPPED" in done.stdout, done.stdout + done.stderr
    assert images_stamp.read() == before
