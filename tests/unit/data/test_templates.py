"""Templates: what is escaped, and what is not given."""

from pathlib import Path

import jinja2
import pytest

from data.templates import render


def test_pages_escape_and_cards_do_not(tmp_path: Path) -> None:
    for name, expected in (("a.html", "&lt;b&gt;\n"), ("a.md", "<b>\n")):
        (tmp_path / name).write_text("{{ text }}\n")
        assert render(tmp_path / name, text="<b>") == expected
    with pytest.raises(jinja2.UndefinedError):
        render(tmp_path / "a.html", txet="<b>")
