"""A run folder as plain data for a page: curves, samples, events, holes, state, config. Nothing in it is trusted, and
what is missing, damaged or half-written is a word on the page."""

import hashlib
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from data.errors import DataError
from data.files import parse_json
from data.redaction import one_line, quote

from ..checkpoint.meta import NAME, read_meta
from ..errors import CheckpointError, ConfigError
from ..forecast.track import FORECAST, read_forecast
from ..monitor.records import METRICS, STATUS, read_status
from .curves import MOST_POINTS, Curve, Log, is_regular, read_bounded, when

SAMPLE = re.compile(r"step_(\d{8,12})\.png")
MOST_SAMPLE_BYTES = 1 << 25
_MOST_EVENTS = 300
_MOST_CHECKPOINTS = 40  # whose holes are read
_MOST_BYTES = 1 << 20  # of a small file
_MOST_KEYS = 2000  # of a config
_WATCHED = (METRICS, STATUS, "config.yaml", "jumps.json", FORECAST, "samples", "checkpoints", "ema", "stacks")
_MISTAKES = (
    OSError, ValueError, OverflowError, LookupError, TypeError, AttributeError, DataError, CheckpointError, ConfigError,
)  # fmt: skip


class RunFolder:
    """A run folder that is looked at again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = Log(folder)
        self._config: tuple[tuple[int, int], dict[str, str], list[str]] | None = None
        self._metas: dict[tuple[Path, int], Any] = {}  # by checkpoint and its time

    def stamp(self) -> str:
        """Another text whenever a file of the folder has changed."""
        found = [(name, *when(self.folder / name)) for name in _WATCHED]
        return hashlib.sha256(repr((str(self.folder), found)).encode()).hexdigest()[:16]

    def data(self) -> dict[str, Any]:
        """All that a page shows of the run, as JSON can hold it: no number in it is NaN."""
        notes: list[str] = []
        try:
            self._log.read()
        except (OSError, DataError) as error:
            notes.append(f"{METRICS} cannot be read: {_reason(error)}")
        log, config = self._log, self._read_config(notes)
        steps, status, band = samples_of(self.folder), self._status(), self._band(notes)
        events = sorted(self._events(notes), key=lambda event: event["step"], reverse=True)
        if len(events) > _MOST_EVENTS:
            notes.append(f"the newest {_MOST_EVENTS} of {len(events)} events are shown")
        return {
            "kind": "run",
            "name": _text(self.folder.resolve().name),
            "folder": _text(str(self.folder)),
            "problem": self._problem(),
            "notes": notes + self._log_notes(),
            "state": status[0] if status else None,
            "reason": _text(status[1]) if status else "",
            "step": log.step,
            "lines": log.lines,
            "steps": _steps(config),
            "age_s": self._age_s(),
            "newest": {_text(key): _number(figure) for key, figure in log.newest.items()},
            "curves": {_text(key): _curve(curves) for key, curves in log.curves.items()},
            "images": [list(point) for point in log.images],
            "stages": [{"step": step, "name": _text(name)} for step, name in log.stages],
            "band": band,
            "slowest": {_text(name): _most_common(counts) for name, counts in log.slowest.items() if counts},
            "holes": self._holes(),
            "events": events[:_MOST_EVENTS],
            "samples": steps,
            "prompts": read_prompts(self.folder) if steps else [],
            "config": config,
        }

    def _read_config(self, notes: list[str]) -> dict[str, str]:
        """Anew when its file has changed: YAML is slow to read."""
        if self._config is None or self._config[0] != when(self.folder / "config.yaml"):
            told: list[str] = []
            self._config = when(self.folder / "config.yaml"), _config(self.folder, told), told
        notes += self._config[2]
        return self._config[1]

    def _status(self) -> tuple[str, str] | None:
        return read_status(self.folder) if is_regular(self.folder / STATUS) else None

    def _problem(self) -> str:
        """Why there are no curves, "" where there are some."""
        if not self.folder.is_dir():
            return f"There is no folder {_text(str(self.folder))}."
        if self._log.lines:
            return ""
        if not any((self.folder / name).exists() for name in _WATCHED):
            return f"This folder holds no run: a run has {METRICS} and config.yaml."
        return "The run has logged nothing yet."

    def _log_notes(self) -> list[str]:
        log, notes = self._log, []
        if log.damaged:
            notes.append(f"{log.damaged} damaged lines of {METRICS} are left out")
        if log.dropped_keys:
            notes.append(f"{METRICS} has more than {len(log.curves)} keys, of which the later ones are left out")
        if log.every > 1:
            notes.append(f"of {METRICS}, a long file, one line in {log.every} was read, and all that have validations")
        counts = [curve.count for curves in log.curves.values() for curve in curves]
        if counts and max(counts) > MOST_POINTS:
            notes.append(
                f"curves of up to {max(counts):,} points are drawn by about {MOST_POINTS:,}: of neighbours the lowest "
                "and the highest"
            )
        return notes

    def _age_s(self) -> float | None:
        """Since the last line."""
        modified = when(self.folder / METRICS)[0]
        return max(0.0, round(time.time() - modified / 1e9, 1)) if modified else None

    def _band(self, notes: list[str]) -> list[list[float]]:
        """(step, loss, low, high) of the forecast: of the whole course where its file lies in the folder, else of the
        validations."""
        if (self.folder / FORECAST).is_file():
            try:
                found = parse_json(read_bounded(self.folder / FORECAST, _MOST_BYTES))
                if isinstance(found, dict) and found.get("refused") is False:
                    return [list(each) for each in read_forecast(self.folder / FORECAST)["course"]]
            except _MISTAKES as error:
                notes.append(_reason(error))
        parts = [self._log.curves.get(f"forecast/{name}", [Curve()])[0].points() for name in ("loss", "low", "high")]
        low, high = dict(parts[1]), dict(parts[2])
        rows = [[x, loss, low[x], high[x]] for x, loss in parts[0] if x in low and x in high]
        return [row for row in rows if all(map(math.isfinite, row))]

    def _events(self, notes: list[str]) -> Iterator[dict[str, Any]]:
        log = self._log
        status = self._status()
        if status and status[0] != "running" and log.lines:
            yield _event(log.step, status[0], status[1])
        yield from (_event(step, "stage", f"{name} begins") for step, name in log.stages)
        yield from (_event(step, "evaluation", error) for step, error in log.errors)
        for key, (step, count) in log.not_finite.items():
            yield _event(step, "not finite", f"{key}, in {count} log lines from here on")
        try:
            for jump in parse_json(read_bounded(self.folder / "jumps.json", _MOST_BYTES)):
                text = f"{jump['reason']}; back here, past {int(jump['steps'])} steps of the data"
                yield _event(int(jump["at_step"]), "rollback", text)
        except FileNotFoundError:
            pass
        except _MISTAKES as error:
            notes.append(f"jumps.json cannot be read: {_reason(error)}")
        for name in _names(self.folder / "checkpoints"):
            stem, _, rest = name.partition(".")
            if (found := NAME.fullmatch(stem)) and rest in ("", "corrupt", "diverged"):
                text = {"": "checkpoint", "corrupt": "a damaged checkpoint, set aside"}.get(rest, "set aside: no step "
                        "was taken after it")  # fmt: skip
                if rest or (self.folder / "checkpoints" / name / "meta.json").is_file():
                    yield _event(int(found[1]), "set aside" if rest else "save", text)
        for name in _names(self.folder / "ema"):
            if found := NAME.fullmatch(name):
                yield _event(int(found[1]), "save", "EMA weights alone")
        if stacks := [name for name in _names(self.folder / "stacks") if name.endswith(".txt")]:
            yield _event(log.step, "hang", f"stacks/ has the Python stacks of {len(stacks)} ranks")

    def _holes(self) -> list[dict[str, Any]]:
        """Samples that could not be read, by reason, as the checkpoints count them."""
        found = [name for name in _names(self.folder / "checkpoints") if NAME.fullmatch(name)]
        rows = []
        for name in sorted(found)[-_MOST_CHECKPOINTS:]:
            path = self.folder / "checkpoints" / name
            key = (path, when(path / "meta.json")[0])
            if key not in self._metas:
                try:
                    self._metas[key] = read_meta(path).get("reads", []) if is_regular(path / "meta.json") else []
                except _MISTAKES:  # a run that resumes says so
                    self._metas[key] = []
            holes: Counter[str] = Counter()
            for reasons, _ in self._metas[key]:
                holes.update({_text(reason): count for reason, count in reasons.items()})
            read = sum(read for _, read in self._metas[key])
            rows.append({"step": int(name.removeprefix("step_")), "read": read, "holes": dict(holes.most_common(20))})
        return rows


def samples_of(folder: Path) -> list[list[int]]:
    """[step, a number that changes with the picture] of the sample grids, by step."""
    if (folder / "samples").is_symlink():
        return []
    paths = [folder / "samples" / name for name in _names(folder / "samples") if SAMPLE.fullmatch(name)]
    return sorted([int(path.stem[5:]), when(path)[0] // 1000] for path in paths if is_regular(path))


def read_sample(folder: Path, step: int) -> bytes:
    """The picture of a step. Raises OSError and DataError: it is never read through a link."""
    if (folder / "samples").is_symlink():
        raise DataError(f"{folder / 'samples'} is a link, through which nothing is opened")
    content = read_bounded(folder / "samples" / f"step_{step:08d}.png", MOST_SAMPLE_BYTES)
    if not content.startswith(b"\x89PNG\r\n"):
        raise DataError(f"{folder / 'samples'}: the picture of step {step} is no PNG")
    return content


def read_prompts(folder: Path) -> list[str]:
    """Those of the grids, row by row, redacted; [] where they cannot be read, or through a link alone."""
    if (folder / "samples").is_symlink():
        return []
    try:
        lines = read_bounded(folder / "samples" / "prompts.txt", _MOST_BYTES).decode(errors="replace").splitlines()
    except (OSError, DataError):
        return []
    return [_text(line) for line in lines[:256]]


def _config(folder: Path, notes: list[str]) -> dict[str, str]:
    """{section.key: value as text}, without secrets."""
    try:
        found = yaml.safe_load(read_bounded(folder / "config.yaml", _MOST_BYTES))
        return dict(_leaves(found)) if isinstance(found, dict) else {}
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, RecursionError, *_MISTAKES) as error:
        notes.append(f"config.yaml cannot be read: {_reason(error)}")
        return {}


def _leaves(found: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    waiting: list[tuple[str, Any]] = [("", found)]
    for _ in range(_MOST_KEYS):
        if not waiting:
            return
        key, value = waiting.pop()
        if isinstance(value, dict) and value and key.count(".") < 6:
            waiting += [(f"{key}.{name}" if key else str(name), each) for name, each in reversed(value.items())]
        else:
            shown = value if isinstance(value, str) else quote(value)
            key = _text(key, 100)
            yield key, _text(f"{key}: {shown}", 400).removeprefix(f"{key}: ")  # a secret is known by its key


def _steps(config: Mapping[str, str]) -> int | None:
    steps = config.get("train.steps", "")
    return int(steps) if steps.isdecimal() and len(steps) < 16 else None


def _curve(curves: list[Curve]) -> dict[str, list[Any]]:
    """Of several a null parts one from the next."""
    x: list[int] = []
    y: list[float | None] = []
    for curve in curves:
        points = curve.points()
        if x and points:
            x.append(points[0][0])
            y.append(None)
        x += [step for step, _ in points]
        y += [_number(figure) for _, figure in points]
    return {"x": x, "y": y}


def _number(figure: float) -> float | None:
    """Six digits, which is more than is seen."""
    return float(f"{figure:.6g}") if math.isfinite(figure) else None


def _most_common(counts: Counter[int]) -> list[list[int]]:
    return [[rank, count] for rank, count in counts.most_common(8)]


def _event(step: int, kind: str, text: str) -> dict[str, Any]:
    return {"step": step, "kind": kind, "text": _text(text)}


def _text(text: str, longest: int = 1000) -> str:
    return one_line(text, longest)


def _reason(error: BaseException) -> str:
    return _text(str(error).partition("\n")[0], 300)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
