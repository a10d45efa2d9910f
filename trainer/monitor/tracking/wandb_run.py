"""A run at Weights & Biases, in the run folder or online.

Nothing that it has been given can be taken back, so that a run whose lines are cut goes on as a new one, which is given
the lines that stay.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .tracker import Tracked, held_id, run_id

ONLINE_S = 30.0  # that the server has to answer at the start, and to take the rest at the end
_ID_FILE = "wandb_id.txt"


class WandbRun:
    """See Tracker."""

    def __init__(self, tracked: Tracked, step: int) -> None:
        import wandb

        wandb.teardown()  # its service takes the id of a run that could not begin for one in use
        os.environ.setdefault("WANDB_SILENT", "true")
        if tracked.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key: give one by `wandb login`, or in WANDB_API_KEY")
        if tracked.mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it posts telemetry, offline or not
        before, _ = held_id(tracked.folder / _ID_FILE)
        own_id = run_id(tracked.folder / _ID_FILE, tracked.project, tracked.name)
        self.held = step if own_id == before else -1
        self._image = wandb.Image
        self._run = wandb.init(
            project=tracked.project,
            name=tracked.name,
            config=dict(tracked.config),
            mode="online" if tracked.mode == "online" else "offline",
            id=own_id,
            resume="allow",
            dir=str(tracked.folder),
            settings=wandb.Settings(init_timeout=ONLINE_S, finish_timeout=ONLINE_S),
        )
        # wandb's own step only rises: lines after a rollback, or from a checkpoint on, would be dropped.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **figures})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({"step": step, name: self._image(str(path))})

    def finish(self) -> None:
        self._run.finish()


def withdraw(folder: Path) -> str | None:
    """Lines of the run folder are about to be cut: what is not sent yet goes, and the next run is a new one. Returns
    the id of the present one if any of it is sent."""
    identity, _ = held_id(folder / _ID_FILE)
    if identity is None:
        return None
    sent = False
    for written in _folders(folder / "wandb"):
        if not written.name.endswith(f"-{identity}"):
            continue
        # `wandb sync` leaves *.synced beside what it has sent.
        if written.name.startswith("run-") or any(written.glob("*.wandb.synced")):
            sent = True
        elif written.name.startswith("offline-run-"):
            shutil.rmtree(written, ignore_errors=True)
    (folder / _ID_FILE).unlink()
    return identity if sent else None


def _folders(folder: Path) -> list[Path]:
    """Those in a folder, none of them, nor the folder itself, a link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
