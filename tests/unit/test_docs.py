"""Generated pages are what the code says today."""

from docs import config_page
from docs.mup_page import document
from tests.helpers.paths import ROOT
from trainer.config.yaml_files import CONFIG_DIR


def test_mup_page_is_current() -> None:
    page = (ROOT / "docs" / "mup.md").read_text()
    assert page == document(), "run: python -m docs.mup_page > docs/mup.md"


def test_every_config_is_on_the_page() -> None:
    page = (ROOT / "docs" / "mup.md").read_text()
    missing = [path.stem for path in CONFIG_DIR.glob("*_mup.yaml") if path.stem not in page]
    assert not missing


def test_config_page_is_current() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == config_page.document(), "run: make schema"
