"""A run at Weights & Biases, in the run folder or online.

Nothing that it has been given can be taken back, so that a run whose lines are cut goes on as a new one, which is given
the lines that stay.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .tracker import Tracked, run_id

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
        held_id = _held_id(tracked.folder)
        own_id = run_id(tracked.folder / _ID_FILE, tracked.project, tracked.name)
        self.held = step if own_id == held_id else -1
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
    if (identity := _held_id(folder)) is None:
        return None
    sent = any(folder.glob(f"wandb/run-*-{identity}"))
    for written in folder.glob(f"wandb/offline-run-*-{identity}"):
        if any(written.glob("*.wandb.synced")):  # `wandb sync` leaves that beside what it has sent
            sent = True
        else:
            shutil.rmtree(written, ignore_errors=True)
    (folder / _ID_FILE).unlink()
    return identity if sent else None


def _held_id(folder: Path) -> str | None:
    file = folder / _ID_FILE
    return file.read_text(errors="replace").partition("\n")[0].strip() if file.is_file() else None
