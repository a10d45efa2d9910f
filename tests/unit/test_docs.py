"""Generated pages are what the code says today."""

import re
from pathlib import Path

import pytest

from docs import config_page, internals_page
from docs.mup_page import document
from tests.helpers.paths import ROOT
from trainer.config.yaml_files import CONFIG_DIR


@pytest.mark.slow
def test_mup_page_is_current() -> None:
    page = (ROOT / "docs" / "mup.md").read_text()
    assert page == document(), "run: python -m docs.mup_page > docs/mup.md"


def test_every_config_is_on_the_page() -> None:
    page = (ROOT / "docs" / "mup.md").read_text()
    missing = [path.stem for path in CONFIG_DIR.glob("*_mup.yaml") if path.stem not in page]
    assert not missing


def test_the_readme_is_short_and_the_index_has_every_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name})" not in index]
    assert missing == ["README.md"]


def test_config_page_is_current() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == config_page.document(), "run: make schema"


@pytest.mark.slow
def test_internals_page_is_current() -> None:
    page = (ROOT / "docs" / "internals.md").read_text()
    assert page == internals_page.document(), "run: make schema"


# The change log names files that are gone.
PAGES = [*(page for page in ROOT.glob("*.md") if page.name != "CHANGELOG.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    """Relative links, and files that are named in backticks with their folder."""
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    named = re.findall(
        r"`((?:models|data|trainer|export|launch|configs|examples|docs|tests|docker)/[\w./-]+\.\w+)`", text
    )
    missing = [link for link in links if link and not (page.parent / link).exists()]
    missing += [path for path in named if not (ROOT / path).exists() and "NAME" not in path and "KIND" not in path]
    assert not missing


def test_what_happens_if_is_held_by_tests() -> None:
    """Each row of the table in cluster.md names tests that exist."""
    table = (ROOT / "docs" / "cluster.md").read_text().partition("What happens if\n")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
