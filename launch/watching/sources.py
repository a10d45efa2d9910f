"""The folders that a page shows: runs, and studies, whichever each is."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.redaction import one_line
from trainer.monitor.records import METRICS, STATUS
from trainer.page.run_data import RunFolder

if TYPE_CHECKING:
    from trainer.page.study_data import StudyFolder

JOURNAL = "study.journal"  # as in trainer/search/study.py, which imports torch
_FILES = (METRICS, "config.yaml", STATUS, JOURNAL)  # by which a run or a study is known
_RUNS = Path("runs")
_MOST = 24
"""Runs on one page."""


class Sources:
    """What names stand for: folders, or names under runs/; a folder of runs stands for the runs in it. They are looked
    up anew each time, since runs appear and a folder may become a study."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._numbers = itertools.count()
        self._known: dict[tuple[Path, bool], tuple[int, RunFolder | StudyFolder]] = {}
        self.notes: list[str] = []
        """What is to be said of the newest look."""

    def look(self) -> "dict[int, RunFolder | StudyFolder]":
        """{number: source}. One that stays keeps its number and what was read of it; no number is given twice."""
        notes: list[str] = []
        found: dict[Path, None] = {}
        for name in self._names:
            places = _places(name)
            runs = next((runs for place in places if (runs := _runs_in(place))), [])
            if not runs:
                notes.append(f"no run in {' or '.join(map(str, places))} yet: the page waits for one")
                runs = [next((place for place in places if os.path.isdir(place)), places[0])]
            found |= dict.fromkeys(run.absolute() for run in runs)
        if len(found) > _MOST:
            notes.append(f"the newest {_MOST} of {len(found)} runs are shown: name those to compare")
            newest = set(sorted(found, key=_changed)[-_MOST:])
            found = {folder: None for folder in found if folder in newest}
        keys = [(folder, os.path.isfile(folder / JOURNAL)) for folder in found]
        self._known = {key: self._known.get(key) or (next(self._numbers), _open(*key)) for key in keys}
        self.notes = [one_line(note) for note in notes]
        return dict(self._known.values())


def _places(name: str) -> list[Path]:
    path = Path(name)
    return [path] if path.is_absolute() or path.parts[:1] == _RUNS.parts else [path, _RUNS / path]


def _is_source(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in _FILES)


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself, or the runs that lie in it or, as those of a trunk, one folder deeper; [] where none is."""
    if _is_source(folder):
        return [folder]
    return next((runs for depth in ("*", "*/*") if (runs := sorted(filter(_is_source, folder.glob(depth))))), [])


def _changed(folder: Path) -> float:
    """When something was written last."""
    paths = (folder / name for name in _FILES)
    return max((path.stat().st_mtime for path in paths if os.path.isfile(path)), default=0.0)


def _open(folder: Path, is_study: bool) -> "RunFolder | StudyFolder":
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    if not is_study:
        return RunFolder(folder)
    from trainer.page.study_data import StudyFolder  # it imports torch, which pages of runs do without

    return StudyFolder(folder)
