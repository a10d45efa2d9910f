"""A run in a local database of trackio, in a folder beside the run folder, so that runs stand side by side in it.

Written through trackio's storage, not by trackio.init, which asks the Hub for the name of whoever has a token, and
sends a run to the Space or the server that an environment variable names. `trackio sync` sends the database later.
"""

import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .tracker import Tracked, run_id

FINISH_S = 30.0  # that its database has to take the last lines
_ID_FILE = "trackio_id.txt"


class TrackioRun:
    """See Tracker. A thread writes, because a database that another process holds may take seconds to answer."""

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
        self._lines = queue.SimpleQueue[tuple[int, Mapping[str, Any]] | None]()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="trackio", daemon=True)
        self._thread.start()

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        if self._error is not None:
            raise self._error
        self._lines.put((step, figures))

    def picture(self, step: int, name: str, path: Path) -> None:
        image = self._image(str(path))
        image._save(self._project, self._name, step)
        self.log(step, {name: image._to_dict()})

    def finish(self) -> None:
        self._lines.put(None)
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            raise TimeoutError(f"its database has not taken the last lines in {FINISH_S:g} s")
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        config = self._config  # with the first line
        while (line := self._lines.get()) is not None:
            step, figures = line
            try:
                self._storage.bulk_log(
                    self._project, self._name, [dict(figures)], [step], config=config, run_id=self._id
                )
            except Exception as error:  # raised where the next line comes
                self._error = error
                return
            config = None

    def _cut(self, step: int) -> int:
        """Drop what is past a step, and the last step that is left, which may be there in part; returns the one before
        it. trackio itself deletes whole runs."""
        self._storage.init_db(self._project)
        with self._storage._get_connection(self._storage.get_project_db_path(self._project)) as database:
            database.execute("DELETE FROM metrics WHERE run_id = ? AND step > ?", (self._id, step))
            (last,) = database.execute("SELECT MAX(step) FROM metrics WHERE run_id = ?", (self._id,)).fetchone()
            database.execute("DELETE FROM metrics WHERE run_id = ? AND step = ?", (self._id, last))
        return -1 if last is None else last - 1
