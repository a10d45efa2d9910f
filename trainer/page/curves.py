"""Curves of metrics.jsonl for a page, read on as the file grows: bounded in memory, however long the run."""

import math
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from data.errors import DataError
from data.files import open_plain

from ..monitor.records import METRICS, record_of

MOST_POINTS = 1000
"""That a curve keeps, or a few more."""
MOST_KEYS = 400
_MOST_CHANGES = 200  # of the stage, of the batch, errors: what is told one by one
_MOST_AT_ONCE = 32 << 20
"""Bytes that are taken of a file when it is first read; of a longer one lines are passed over."""
_LONGEST_LINE = 1 << 20
_ALWAYS = (b'"val_', b'"not_finite"', b'"evaluation_error"')
_LARGEST = 1 << 53  # the integers below are exact in a browser
_TAIL = 256  # bytes before the place that was read up to, by which a file that was cut and grew again is known
_SLOW = 1.1  # times the median of the ranks
_SLOWEST, _MEDIAN, _MAX = "_slowest_rank", "_median_s", "_max_s"
Point = tuple[int, float]


class Curve:
    """(step, figure) in their order. Of a long one the lowest and the highest of neighbouring points stay, so that no
    spike is lost."""

    def __init__(self) -> None:
        self.count = 0
        self._points: list[Point] = []
        self._open: list[Point] = []  # of the group that is not full
        self._last: list[Point] = []  # the newest, which a group that closes need not keep
        self._size = 1  # points of a group

    def add(self, step: int, figure: float) -> None:
        self.count += 1
        self._last = [(step, figure)]
        self._open += self._last
        if len(self._open) >= self._size:
            self._points += _extremes(self._open)
            self._open = []
        if len(self._points) > MOST_POINTS:
            groups = (self._points[at : at + 4] for at in range(0, len(self._points), 4))
            self._points = [point for group in groups for point in _extremes(group)]
            self._size = 4 if self._size == 1 else 2 * self._size

    def points(self) -> list[Point]:
        """The newest one is always among them."""
        found = self._points + _extremes(self._open)
        return found if self._last == found[-1:] else found + self._last


def _extremes(points: Sequence[Point]) -> list[Point]:
    """The lowest and the highest of the finite ones, as they follow each other."""
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) < 2:
        return finite or list(points[:1])
    low, high = (choose(finite, key=lambda point: point[1]) for choose in (min, max))
    return [low] if low is high else sorted([low, high])


class Log:
    """What a run folder's metrics.jsonl has said so far. `read` takes what was added since; a file that was cut, as a
    resume does, is read from its beginning."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS
        self._forget()

    def _forget(self) -> None:
        self._offset, self._file, self._tail, self._in_long = 0, (0, 0), b"", False
        self._val_set: Any = None
        self.lines = self.damaged = self.dropped_keys = 0
        self.every = 1
        """Of lines with training figures alone one in so many was taken when the file was first read."""
        self.curves: dict[str, list[Curve]] = {}
        """By key: of a validation loss one after another, since on other samples (val_set) it compares with none
        before."""
        self.newest: dict[str, float] = {}
        self.step = 0
        self.images: list[Point] = []
        """(step, images seen) where the batch changes, and of the last line: between them lies a straight line."""
        self.stages: list[tuple[int, str]] = []
        self.errors: list[tuple[int, str]] = []
        self.not_finite: dict[str, list[int]] = {}
        """By key: first step at which it was not finite, and how often it was."""
        self.slowest: dict[str, Counter[int]] = {}
        """By what was timed: how often each rank was the slowest, by more than a tenth over the median."""

    def read(self) -> None:
        """Raises OSError and DataError where the file cannot be read."""
        try:
            file = open_regular(self._path)
        except FileNotFoundError:
            self._forget()
            return
        with file:
            if self._is_another(file):
                self._forget()
            found = os.fstat(file.fileno())
            self._file = (found.st_dev, found.st_ino)
            at_first = self._offset == 0
            if at_first:
                self.every = 1 + found.st_size // _MOST_AT_ONCE
            file.seek(self._offset)
            for number, raw in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b"")):
                whole = raw.endswith(b"\n")
                if not whole and len(raw) < _LONGEST_LINE:
                    break  # it is being written
                self._offset += len(raw)
                self._tail = (self._tail + raw)[-_TAIL:]
                passed_over = at_first and number % self.every and found.st_size - self._offset > _LONGEST_LINE
                if passed_over and whole and not any(key in raw for key in _ALWAYS):
                    continue
                record = record_of(raw) if whole and not self._in_long else None
                if record is not None and 0 <= record["step"] < _LARGEST:
                    self._take(record)
                else:
                    self.damaged += not self._in_long
                self._in_long = not whole

    def _is_another(self, file: IO[bytes]) -> bool:
        found = os.fstat(file.fileno())
        if self._offset == 0:
            return False
        if found.st_size < self._offset or (found.st_dev, found.st_ino) != self._file:
            return True
        file.seek(self._offset - len(self._tail))
        return file.read(len(self._tail)) != self._tail

    def _take(self, record: dict[str, Any]) -> None:
        step = record["step"]
        self.step, self.lines = step, self.lines + 1
        if isinstance(images := record.get("samples_seen"), int) and 0 <= images < _LARGEST:
            self._add_images(step, images)
        before = self.stages[-1][1] if self.stages else None
        if isinstance(stage := record.get("stage"), str) and stage != before and len(self.stages) < _MOST_CHANGES:
            self.stages.append((step, stage))
        if isinstance(error := record.get("evaluation_error"), str) and len(self.errors) < _MOST_CHANGES:
            self.errors.append((step, error))
        val_set = record.get("val_set")
        other = None not in (val_set, self._val_set) and val_set != self._val_set
        self._val_set = val_set or self._val_set
        for key, figure in record.items():
            if type(figure) not in (int, float) or key in ("step", "samples_seen"):
                continue
            if type(figure) is int and abs(figure) >= _LARGEST:
                continue
            if key.endswith(_SLOWEST):
                if math.isfinite(figure):
                    self._count_slowest(key.removesuffix(_SLOWEST), figure, record)
                continue
            if not math.isfinite(figure):
                self.not_finite.setdefault(key, [step, 0])[1] += 1
            self._add(key, step, float(figure), key.startswith("val_loss") and other)

    def _add(self, key: str, step: int, figure: float, anew: bool) -> None:
        if key not in self.curves and len(self.curves) >= MOST_KEYS:
            self.dropped_keys += 1
            return
        curves = self.curves.setdefault(key, [Curve()])
        if anew and len(curves) < _MOST_CHANGES:
            curves.append(Curve())
        curves[-1].add(step, figure)
        self.newest[key] = figure

    def _add_images(self, step: int, images: int) -> None:
        points = self.images
        if len(points) > 1:
            (a, seen_a), (b, seen_b) = points[-2:]
            if (b - a) * (images - seen_b) == (step - b) * (seen_b - seen_a) or len(points) >= _MOST_CHANGES:
                points.pop()
        points.append((step, images))

    def _count_slowest(self, name: str, rank: float, record: dict[str, Any]) -> None:
        longest, median = record.get(name + _MAX), record.get(name + _MEDIAN)
        counts = self.slowest.setdefault(name, Counter())
        if isinstance(longest, float) and isinstance(median, float) and longest > _SLOW * median:
            counts[int(rank)] += type(rank) is int


def is_regular(path: Path) -> bool:
    """Whether it is a file itself: no link, and no pipe, which would wait for ever."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def open_regular(path: Path) -> IO[bytes]:
    """A file that is opened to be read, where is_regular. Raises OSError and DataError."""
    path.lstat()
    if not is_regular(path):
        raise DataError(f"{path} is a link or no file: nothing is read from it")
    return open_plain(path, "rb")


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a file, where is_regular. Raises OSError and DataError, also where it is longer than `most`."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise DataError(f"{path} is longer than the {most} bytes that are shown")
    return content


def when(path: Path) -> tuple[int, int]:
    """(time of the last change in nanoseconds, size); zeros where there is nothing."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
