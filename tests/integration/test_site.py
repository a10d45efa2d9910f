"""The documents as a site, as `make docs` builds it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True,
                          text=True, timeout=120)  # fmt: skip


def test_the_site_has_every_page_and_needs_no_other_host(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"} | {"index", "404"}
    assert {path.stem for path in tmp_path.glob("*.html")} == pages
    assert not list(tmp_path.glob("*.py"))
    assert "excluded from the built site" not in done.stderr
    for page in tmp_path.glob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?([^\"' >]+)", page.read_text())
        assert any("stylesheets/main" in address for address in loaded)
        assert not [address for address in loaded if "//" in address], page.name
    # A file outside docs/ that a page links to is a page of the site.
    assert "files/models/registry.py.html" in (tmp_path / "extending.html").read_text()
    assert "## Is μP right" not in (notebook := (tmp_path / "files/examples/first_steps.ipynb.html").read_text())
    assert "Is μP right?" in notebook
    assert "BACKBONES" in (tmp_path / "files" / "models" / "registry.py.html").read_text()


def test_links_that_lead_nowhere_fail_the_build(tmp_path: Path) -> None:
    for path in ROOT.iterdir():
        if path.name not in ("docs", "site"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    planted = ("nowhere.md", "training.md#nowhere", "../models/nowhere.py", "nowhere.png")
    with (tmp_path / "docs" / "commands.md").open("a") as page:
        page.writelines(f"\n[a link]({link})\n" for link in planted)
    (tmp_path / "docs" / "unlisted.md").write_text("# A page that the navigation lacks\n")
    done = build(tmp_path, tmp_path / "built")
    assert done.returncode == 1
    for said in (*planted, "unlisted.md"):
        assert f"'{said}'" in done.stderr or f"- {said}" in done.stderr, done.stderr
