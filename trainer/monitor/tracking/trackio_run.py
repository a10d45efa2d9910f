"""A run in a local database of trackio, in a folder beside the run folder, so that runs stand side by side in it.

Written through trackio's storage, not by trackio.init, which asks the Hub for the name of whoever has a token, and
sends a run to the Space or the server that an environment variable names. `trackio sync` sends the database later.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .tracker import Tracked, run_id

_ID_FILE = "trackio_id.txt"


class TrackioRun:
    """See Tracker. Each line is in the database when `log` returns."""

    def __init__(self, tracked: Tracked, step: int) -> None:
        folder = Path(os.environ.setdefault("TRACKIO_DIR", str((tracked.folder.parent / "trackio").resolve())))
        import trackio
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.utils import TRACKIO_DIR

        if folder != TRACKIO_DIR:
            raise RuntimeError(f"this process has begun to log to {TRACKIO_DIR}, and trackio knows one folder")
        self._storage, self._image = SQLiteStorage, trackio.Image
        self._storage.validate_project_name(tracked.project)
        self._project, self._name, self._config = tracked.project, tracked.name, dict(tracked.config)
        self._id = run_id(tracked.folder / _ID_FILE, tracked.project, tracked.name)
        self.held = self._cut(step)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        self._storage.bulk_log(self._project, self._name, [dict(figures)], [step], config=self._config, run_id=self._id)
        self._config = {}  # with the first line

    def picture(self, step: int, name: str, path: Path) -> None:
        image = self._image(str(path))
        image._save(self._project, self._name, step)
        self.log(step, {name: image._to_dict()})

    def finish(self) -> None: ...

    def _cut(self, step: int) -> int:
        """Drop what is past a step; returns the last one that is left, or -1. trackio itself deletes whole runs."""
        self._storage.init_db(self._project)
        with self._storage._get_connection(self._storage.get_project_db_path(self._project)) as database:
            database.execute("DELETE FROM metrics WHERE run_id = ? AND step > ?", (self._id, step))
            (last,) = database.execute("SELECT MAX(step) FROM metrics WHERE run_id = ?", (self._id,)).fetchone()
        return -1 if last is None else last
