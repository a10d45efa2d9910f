"""What a tracker is asked for, and the one rule by which all of them are resumed."""

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...files import write_atomically
from ..plots import VALIDATION

_PREFIXED = ("mup/", "perf/")  # names that trackers get as they are
_SPEED = (
    "images_per_s", "model_tflops_per_s", "mfu", "step_time_s", "checkpoint_blocked_s", "checkpoint_write_s",
)  # fmt: skip


class Tracked(NamedTuple):
    """What a tracker is told of the run at its start. config: without secrets. mode: offline or online, of wandb."""

    folder: Path
    project: str
    name: str
    mode: str
    config: Mapping[str, Any]


class Tracker(Protocol):
    """A run at a tracker. Each call may raise whatever it likes: see trackers.Trackers.

    held: the last step of which it has all figures, or -1. The rule of a resume: a tracker that begins at step k holds
    nothing past k, whatever the run before it has logged there, and it is given the lines of metrics.jsonl past `held`.
    """

    held: int

    def log(self, step: int, figures: Mapping[str, Any]) -> None: ...
    def picture(self, step: int, name: str, path: Path) -> None: ...
    def finish(self) -> None: ...


def shown_name(key: str) -> str:
    """train/loss of loss, val/loss of val_loss, perf/mfu of mfu."""
    if key.startswith(_PREFIXED):
        return key
    if key.startswith(VALIDATION):
        return f"val/{key.removeprefix(VALIDATION)}"
    return f"perf/{key}" if key in _SPEED else f"train/{key}"


def run_id(file: Path, project: str, name: str) -> str:
    """The id under which a resumed run is continued, as the file holds it. It belongs to project, name and folder: a
    copied run folder, and a run under another name, get their own."""
    owner = json.dumps([project, name, str(file.parent.resolve())])
    held, rest = held_id(file)
    found = held if held and rest in ([], [owner]) else secrets.token_hex(4)  # []: of an older version
    if [held, *rest] != [found, owner]:
        write_atomically(file, f"{found}\n{owner}\n")
    return found


def held_id(file: Path) -> tuple[str | None, list[str]]:
    """(the id that a file holds, its other lines). None where it is none that run_id would have made: a file from
    elsewhere may hold anything, and ids become names of folders."""
    held = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return (held[0], held[1:]) if held and re.fullmatch(r"[0-9a-f]{8}", held[0]) else (None, held[1:])
