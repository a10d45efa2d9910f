"""The folders that a page shows: runs, and studies, whichever each is."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import ConfigError
from trainer.page.run_data import RunFolder

if TYPE_CHECKING:
    from trainer.page.study_data import StudyFolder

JOURNAL = "study.journal"
_RUN = ("metrics.jsonl", "config.yaml", "status.json")
_MOST = 24
"""Runs on one page."""


def open_sources(names: Sequence[str]) -> "list[RunFolder | StudyFolder]":
    """By folder, or by name under runs/. A folder of runs stands for the runs in it. Raises ConfigError where they are
    too many for a page."""
    folders = [folder for name in names for folder in _runs_in(_folder(name))]
    folders = list(dict.fromkeys(folder.absolute() for folder in folders))
    if len(folders) > _MOST:
        raise ConfigError(f"{len(folders)} runs are more than the {_MOST} of a page: name those to compare")
    return [_open(_short(folder)) for folder in folders]


def _folder(name: str) -> Path:
    return next((path for path in (Path(name), Path("runs") / name) if path.is_dir()), Path(name))


def _short(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _is_source(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*_RUN, JOURNAL))


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself, or the runs that lie in it or, as those of a trunk, one folder deeper."""
    if _is_source(folder) or not folder.is_dir():
        return [folder]
    for pattern in ("*", "*/*"):
        if found := sorted(path for path in folder.glob(pattern) if path.is_dir() and _is_source(path)):
            return found
    return [folder]


def _open(folder: Path) -> "RunFolder | StudyFolder":
    if not (folder / JOURNAL).is_file():
        return RunFolder(folder)
    from trainer.page.study_data import StudyFolder  # it imports torch, which pages of runs do without

    return StudyFolder(folder)
