"""Weights & Biases beside metrics.jsonl. It is never the reason why a run waits or ends: where it cannot be reached the
run is logged to its folder, and where it fails the run goes on without it, each with one warning."""

import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..files import write_atomically
from .plots import VALIDATION

ONLINE_S = 30.0  # that the server has to answer at the start, and to take the rest at the end
ID_FILE = "wandb_id.txt"
_PREFIXED = ("mup/", "perf/")  # names that wandb gets as they are
_SPEED = (
    "images_per_s", "model_tflops_per_s", "mfu", "step_time_s", "checkpoint_blocked_s", "checkpoint_write_s",
)  # fmt: skip


class WandbRun(Protocol):
    def log(self, data: dict[str, Any]) -> None: ...
    def define_metric(self, name: str, step_metric: str | None = None) -> Any: ...
    def finish(self) -> None: ...


class Wandb:
    """A run at Weights & Biases; say: takes its warnings."""

    def __init__(
        self,
        folder: Path,
        project: str,
        mode: str,
        name: str,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._say = folder, say
        self._run: WandbRun | None = None
        os.environ.setdefault("WANDB_SILENT", "true")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it posts telemetry, offline or not
        settings = {"project": project, "name": name, "config": dict(config)}
        for tried in ("online", "offline") if mode == "online" else ("offline",):
            # Whatever it is: not to be logged there is no reason not to train.
            try:
                self._run = _begin(folder, tried, settings)
                return
            except Exception as error:
                then = f"{folder / 'wandb'} is written instead, and `wandb sync` sends it" if tried == "online" else ""
                self._warn(f"cannot be used {tried}", error, then)

    def log(self, record: Mapping[str, Any]) -> None:
        """record: a line of metrics.jsonl."""
        self._try(lambda run: run.log({k if k == "step" else wandb_name(k): v for k, v in record.items()}))

    def finish(self) -> None:
        self._try(lambda run: run.finish())

    def _try(self, action: Callable[[WandbRun], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # as above
            self._run = None
            self._warn("has failed", error, "the run goes on without it")

    def _warn(self, what: str, error: Exception, then: str) -> None:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
        self._say(f"warning: wandb {what} ({reason}); {then or 'the run goes on without it'}")


def _begin(folder: Path, mode: str, settings: dict[str, Any]) -> WandbRun:
    import wandb

    wandb.teardown()  # its service takes the id of a run that could not begin for one in use
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise RuntimeError("no API key: give one by `wandb login`, or in WANDB_API_KEY")
    run = wandb.init(
        **settings,
        mode="online" if mode == "online" else "offline",
        id=_run_id(folder, settings["project"], settings["name"]),
        resume="allow",
        dir=str(folder),
        settings=wandb.Settings(init_timeout=ONLINE_S, finish_timeout=ONLINE_S),
    )
    # wandb's own step only rises: lines after a rollback, or from a checkpoint on, would be dropped.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _run_id(folder: Path, project: str, name: str) -> str:
    """The id under which a resumed run is continued. It belongs to project, name and folder: a copied run folder, and a
    run under another name, get their own."""
    file, owner = folder / ID_FILE, json.dumps([project, name, str(folder.resolve())])
    held = file.read_text(errors="replace").splitlines() if file.is_file() else []
    if held and re.fullmatch(r"[0-9a-f]{8}", held[0]) and held[1:] in ([], [owner]):  # []: of an older version
        run_id = held[0]
    else:
        run_id = secrets.token_hex(4)
    if held != [run_id, owner]:
        write_atomically(file, f"{run_id}\n{owner}\n")
    return run_id


def wandb_name(key: str) -> str:
    """train/loss of loss, val/loss of val_loss, perf/mfu of mfu."""
    if key.startswith(_PREFIXED):
        return key
    if key.startswith(VALIDATION):
        return f"val/{key.removeprefix(VALIDATION)}"
    return f"perf/{key}" if key in _SPEED else f"train/{key}"
