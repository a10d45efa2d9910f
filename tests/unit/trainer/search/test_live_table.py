"""The table of a search: a line per change where no one looks on, drawn anew on a terminal."""

import io
import sys
from pathlib import Path

import pytest

from tests.helpers.studies import fill, search
from trainer.search.live_table import Table
from trainer.search.study import Study


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_per_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study.open(search(tmp_path))
    with Table(study) as table:
        table.show()
        assert capsys.readouterr().out == ""
        fill(study, lambda point: 1.0)
        table.show()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(study.trials())
        assert all("complete" in line for line in lines)
        table.show()
        assert capsys.readouterr().out == ""
    assert "best: trial" in capsys.readouterr().out


def test_a_terminal_is_drawn_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, terminal = Study.open(search(tmp_path)), Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Table(study) as table:
        table.show()
        fill(study, lambda point: 1.0)
    drawn = terminal.getvalue()
    assert "\x1b[2K" in drawn, "what was drawn is drawn over"
    assert "best: trial" in drawn.replace("\n", " "), "the summary is whole, over several lines where it must be"
    assert drawn.endswith("\x1b[?25h"), "the cursor is shown again"
