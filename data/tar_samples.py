"""The members of a tar joined by their keys to samples, and what is worth telling about them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from .images import IMAGE_EXTENSIONS
from .redaction import quote

# WebDataset's rule: the key ends at the first dot of the last path component.
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)

_LONGEST = 200  # characters of an example
SKIPPED = "shards without a sample, which are skipped"
ENDS_EARLY = "shards that end early, where what comes after that is missing"
_STRAY = "members that belong to no sample and are not read"
_DOTTED = "members that are not read, because WebDataset ends a key at its first dot (rename them)"
_NO_IMAGE = "samples without an image"
_IMAGES = "samples with several images, of which the last one in the tar is read"
_AGAIN = "samples with the key of one before them, which are read as well"
_APART = "samples in several places of their tar, which take several reads (tar --sort=name joins them)"
CONVERTED = "images with an ICC profile, which are converted to sRGB"
UNUSABLE = "images with an ICC profile that is damaged or does not fit them, which are read as sRGB"
TURNED = "PNG images that their EXIF turns by a quarter, whose width and height are those of what is seen"
KINDS = (SKIPPED, ENDS_EARLY, _STRAY, _DOTTED, _NO_IMAGE, _IMAGES, _AGAIN, _APART, CONVERTED, UNUSABLE, TURNED)


class Remarks(dict[str, tuple[int, str]]):
    """What is worth telling about shards: {one of KINDS: (how often, an example)}."""

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count one more of a kind; the first example stays."""
        before, first = self.get(kind, (0, example[:_LONGEST]))
        self[kind] = before + count, first


class TarSamples:
    """Rows of the samples of one tar, in the order in which their keys first come.

    new: makes the row of a key. extensions: of the members that are read. Members of one key make one sample wherever
    they lie in the tar. Where a member comes a second time, apart from the first, it begins another sample of that key;
    beside the first it takes its place.
    """

    def __init__(self, new: Callable[[str], dict[str, Any]], extensions: Collection[str]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.remarks = Remarks()
        self._new, self._extensions = new, extensions
        self._latest: dict[str, int] = {}  # by key: its last row
        self._found: list[set[str]] = []  # extensions of each row's members
        self._last = -1  # the row that the last member belongs to
        self._apart: set[int] = set()  # rows whose members are not neighbours
        self._unread: list[tuple[str, str, str]] = []  # (key, name, remark) of members that are not read

    def row_of(self, name: str) -> tuple[dict[str, Any], str] | None:
        """The row that a member belongs to, by its name, and its extension; None where it is not read."""
        match = _MEMBER.match(name)
        if match is None or name.rpartition("/")[2].startswith("."):
            self.remarks.add(_STRAY, name)
            return None
        key = match[1].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        extension = match[2].lower()
        if extension not in self._extensions:
            dotted = extension.rpartition(".")[2] in self._extensions
            self._unread.append((key, name, _DOTTED if dotted else _STRAY))
            return None
        row = self._latest.get(key)
        if row is None or (extension in self._found[row] and row != self._last):
            if row is not None:
                self.remarks.add(_AGAIN, key)
            row = self._latest[key] = len(self.rows)
            self.rows.append(self._new(key))
            self._found.append(set())
        elif row != self._last:
            self._apart.add(row)
        self._last = row
        self._found[row].add(extension)
        return self.rows[row], extension

    def finish(self, is_sample: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """The rows, of which none is left where none is a sample. is_sample: whether a row has an image, or what stands
        for one."""
        samples = {row["key"] for row in self.rows if is_sample(row)}
        if not samples:
            return []
        for row, found in zip(self.rows, self._found, strict=True):
            if not is_sample(row):
                self.remarks.add(_NO_IMAGE, row["key"])
            if sum(extension in IMAGE_EXTENSIONS for extension in found) > 1:
                self.remarks.add(_IMAGES, row["key"])
        for row in sorted(self._apart):
            self.remarks.add(_APART, self.rows[row]["key"])
        for key, name, remark in self._unread:
            if key not in samples:
                self.remarks.add(remark, name)
        return self.rows


def remarks_from(data: Any) -> Remarks:
    """What JSON holds of Remarks. Raises ValueError where it holds anything else."""
    if not isinstance(data, dict) or not all(kind in KINDS and _is_counted(data[kind]) for kind in data):
        raise ValueError("no remarks")
    return Remarks({kind: (count, example) for kind, (count, example) in data.items()})


def _is_counted(value: Any) -> bool:
    return isinstance(value, list) and [type(part) for part in value] == [int, str] and value[0] > 0


def told(shards: Iterable[tuple[str, Remarks]]) -> list[str]:
    """A sentence for each kind of remark on some shards, by their names."""
    total: dict[str, tuple[int, str]] = {}
    for name, remarks in shards:
        for kind, (count, example) in remarks.items():
            before, first = total.get(kind, (0, f"{quote(name)}: {quote(example)}"))
            total[kind] = before + count, first
    return [f"{kind}: {count}, the first in {first}" for kind, (count, first) in total.items()]
