"""The trackers of a run, beside metrics.jsonl. They are never the reason why a run waits or ends: one that cannot
begin, or fails, is given up with a warning, and the run goes on without it."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.redaction import redact

from ...errors import ConfigError
from .tensorboard_run import TensorboardRun
from .tracker import Tracked, Tracker, shown_name
from .trackio_run import TrackioRun
from .wandb_run import WandbRun

_KINDS: dict[str, Callable[[Tracked, int], Tracker]] = {
    "wandb": WandbRun,
    "tensorboard": TensorboardRun,
    "trackio": TrackioRun,
}


def check_installed(kinds: Sequence[str]) -> None:
    """Raise ConfigError where the package of a tracker is missing."""
    if missing := [kind for kind in kinds if importlib.util.find_spec(kind) is None]:
        what = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
        raise ConfigError(
            f"tracking.kind: {what} not installed: pip install -e '.[trackers]' in the checkout, or leave it out"
        )


class Trackers:
    """The trackers of a run folder, begun one after the other. say: takes their warnings."""

    def __init__(self, kinds: Sequence[str], tracked: Tracked, say: Callable[[str], None]) -> None:
        self._kinds, self._say = kinds, say
        self._tracked = tracked._replace(config=redacted(tracked.config))
        self._begun: dict[str, Tracker] = {}

    def begin(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """At the step from which the run goes on. lines: those of metrics.jsonl up to it; see Tracker."""
        for kind in self._kinds:
            modes = ("online", "offline") if kind == "wandb" and self._tracked.mode == "online" else ("offline",)
            for mode in modes:
                try:  # Whatever it is: not to be logged there is no reason not to train.
                    self._begun[kind] = _KINDS[kind](self._tracked._replace(mode=mode), step)
                    break
                except Exception as error:
                    folder = self._tracked.folder / "wandb"
                    then = f"{folder} is written instead, and `wandb sync` sends it" if mode == "online" else ""
                    self._warn(kind, f"cannot be used {mode}" if kind == "wandb" else "cannot be used", error, then)
        for kind, tracker in list(self._begun.items()):
            missed = [line for line in lines if line["step"] > tracker.held]
            self._try(kind, lambda tracker, missed=missed: _catch_up(tracker, missed, self._tracked.folder, step))

    def log(self, record: Mapping[str, Any]) -> None:
        """record: a line of metrics.jsonl."""
        for kind in list(self._begun):
            self._try(kind, lambda tracker: tracker.log(record["step"], _figures(record)))

    def picture(self, step: int, name: str, path: Path) -> None:
        for kind in list(self._begun):
            self._try(kind, lambda tracker: tracker.picture(step, name, path))

    def finish(self) -> None:
        for kind in list(self._begun):
            self._try(kind, lambda tracker: tracker.finish())
        self._begun = {}

    def _try(self, kind: str, action: Callable[[Tracker], None]) -> None:
        try:
            action(self._begun[kind])
        except Exception as error:  # as above
            del self._begun[kind]
            self._warn(kind, "has failed", error)

    def _warn(self, kind: str, what: str, error: Exception, then: str = "") -> None:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
        self._say(f"warning: {kind} {what} ({reason}); {then or 'the run goes on without it'}")


def redacted(value: Any) -> Any:
    """A config, or a part of one, without secrets."""
    if isinstance(value, Mapping):
        return {key: redacted(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(part) for part in value]
    return redact(value) if isinstance(value, str) else value


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    return {shown_name(key): value for key, value in record.items() if key != "step"}


def _catch_up(tracker: Tracker, lines: Sequence[Mapping[str, Any]], folder: Path, step: int) -> None:
    """Log what the tracker lacks of a run that has come to a step."""
    pictures = {f"step_{line['step']:08d}.png": line["step"] for line in lines}
    for line in lines:
        tracker.log(line["step"], _figures(line))
    for name, at in pictures.items():
        if at <= step and (folder / "samples" / name).is_file():
            tracker.picture(at, "samples", folder / "samples" / name)
