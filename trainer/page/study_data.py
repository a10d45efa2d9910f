"""A study's folder as plain data for a page: its trials, and the report that launch/search.py has made of it."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.redaction import one_line

from ..errors import CheckpointError, ConfigError
from ..search.study import JOURNAL, Study, Trial
from .curves import is_regular, read_bounded, when

_MOST_CURVES, _MOST_TRIALS = 60, 500
_MOST_REPORT_BYTES = 1 << 25


class StudyFolder:
    """A study that is looked at again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def stamp(self) -> str:
        """Another text whenever the study has changed."""
        return str([when(path) for path in (self.folder / JOURNAL, report_path(self.folder))])

    def data(self) -> dict[str, Any]:
        """All that a page shows of the study, as JSON can hold it."""
        data: dict[str, Any] = {
            "kind": "study",
            "name": one_line(self.folder.resolve().name),
            "folder": one_line(str(self.folder)),
            "problem": "",
            "notes": [],
            "has_report": is_regular(report_path(self.folder)),
            "counts": {},
            "trials": [],
            "keys": [],
        }
        try:
            study = Study.load(str(self.folder))
            trials = study.trials()
        except (OSError, DataError, ConfigError, CheckpointError) as error:
            return data | {"problem": one_line(str(error))}
        ranked = sorted(trials, key=lambda t: (t.value is None, t.value or 0.0, t.state == "waiting", t.number))
        if len(ranked) > _MOST_TRIALS:
            data["notes"].append(f"the best {_MOST_TRIALS} of {len(ranked)} trials are shown")
        return data | {
            "config": one_line(str(study.search.config)),
            "steps": study.proxy.train.steps,
            "counts": dict(Counter(trial.state for trial in trials)),
            "keys": [{"key": d.key, "log": d.log, "numeric": d.numeric} for d in study.search.space],
            "trials": [_row(trial, rank < _MOST_CURVES) for rank, trial in enumerate(ranked[:_MOST_TRIALS])],
        }


def report_path(folder: Path) -> Path:
    return folder / "report" / "index.html"


def read_report(folder: Path) -> bytes:
    """The page of `mudit search report`. Raises OSError and DataError: it is never read through a link."""
    if (folder / "report").is_symlink():
        raise DataError(f"{folder / 'report'} is a link, through which nothing is opened")
    return read_bounded(report_path(folder), _MOST_REPORT_BYTES)


def _row(trial: Trial, with_curve: bool) -> dict[str, Any]:
    curve = trial.curve if with_curve else {}
    return {
        "number": trial.number,
        "state": trial.state,
        "value": _finite(trial.value),
        "point": {k: v if isinstance(v, int | float) else one_line(str(v)) for k, v in trial.point.items()},
        "reason": one_line(trial.reason),
        "curve": {"x": list(curve), "y": [_finite(loss) for loss in curve.values()]},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
