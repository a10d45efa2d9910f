"""Captions: as the members of a shard hold them, and as a file beside the shards gives them by the image's name.

A file of (image, caption) is joined to the samples in one pass. Meanwhile 33 bytes per caption stay in memory; the
texts go to a file.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError, SampleError
from .redaction import quote
from .storage import expand_all

KEY_FIELDS = ("key", "image_id", "image", "__key__")
# The last where a WebDataset was turned into parquet, whose columns are extensions.
_TEXT_FIELDS = ("caption", "captions", "txt")
_SUFFIXES = (".jsonl", ".parquet")
_MAX_WEIGHT = 1e9
_MOST_CHARACTERS = 100_000  # of a caption: tokenizers are slow, and no encoder reads as much
_ROW = np.dtype(
    [("path", "<u8"), ("name", "<u8"), ("offset", "<i8"), ("size", "<i4"), ("length", "<i4"), ("is_json", "?")]
)  # path, name: hashes of an image's path, and of its last part
_ABSENT = (0, 0, -1, 0, -1, False)
_BLOCK = 1 << 16  # captions that are read together


class CaptionRules(NamedTuple):
    """data.caption_fields and data.caption_key."""

    fields: tuple[str, ...] = ()
    key: str | None = None


class NoCaption(SampleError):
    """The sample is whole but has no caption."""


class CaptionChoice(NamedTuple):
    """The captions of one image, without white space around them, and their weights: how often each is chosen, relative
    to the others."""

    texts: list[str]
    weights: list[float]

    def pick(self, chance: float) -> int:
        """The place of the caption that a random number in [0, 1) chooses."""
        left = chance * sum(self.weights)
        for number, weight in enumerate(self.weights):
            left -= weight
            if left < 0:
                return number
        return max(number for number, weight in enumerate(self.weights) if weight)  # by rounding


def _decoded(data: bytes) -> str:
    """Text as editors write it: UTF-8 with a byte order mark or without, or UTF-16 with one."""
    try:
        return data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("caption: not utf-8") from error


def _whole_characters(text: str) -> str:
    """Halves of characters, which JSON can hold: two that belong together are joined, and a single one is left out."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")


def json_member(data: bytes) -> dict[str, Any]:
    """The object in a .json member; SampleError where there is none."""
    try:
        entry = json.loads(_decoded(data))
    except (ValueError, RecursionError) as error:
        raise SampleError("caption: not JSON with a caption") from error
    if not isinstance(entry, dict):
        raise SampleError("caption: not JSON with a caption")
    return entry


def first_field(entry: dict[str, Any], fields: Sequence[str]) -> str | None:
    """The first field that holds a caption, or several; None where none does."""
    return next((field for field in fields if _is_filled(entry.get(field))), None)


def _is_filled(value: object) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def captions_of_entry(entry: dict[str, Any], fields: Sequence[str] = ()) -> CaptionChoice:
    """Captions of {"caption": text}, or of {"captions": [text, ...], "weights": [number, ...]} where weights may be
    left out; or, with `fields`, the text or texts of the first of them that is filled. SampleError where there are
    none."""
    if fields:
        value = entry.get(first_field(entry, fields) or "")
        entry = {"captions": value} if isinstance(value, list) else {"caption": value}
    texts = entry["captions"] if entry.get("captions") is not None else [entry.get("caption")]
    if texts in ([None], []):
        raise NoCaption("caption: missing")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise SampleError("caption: not JSON with a caption")
    weights = entry.get("weights", [1.0] * len(texts)) if entry.get("captions") is not None else [1.0]
    numbers = isinstance(weights, list) and all(isinstance(w, int | float) and 0 <= w <= _MAX_WEIGHT for w in weights)
    if not numbers or len(weights) != len(texts) or sum(weights) == 0:
        raise SampleError("caption: weights do not fit")
    texts = [_whole_characters(text).strip() for text in texts]
    if not all(texts):
        raise (SampleError if any(texts) else NoCaption)("caption: empty")
    if max(map(len, texts)) > _MOST_CHARACTERS:
        raise SampleError("caption: too long")
    return CaptionChoice(texts, weights)


def captions_from_bytes(data: bytes, is_json: bool, fields: Sequence[str] = ()) -> CaptionChoice:
    """Captions of a plain or a .json member; SampleError where there are none. fields: as of captions_of_entry."""
    return captions_of_entry(json_member(data), fields) if is_json else captions_of_entry({"caption": _decoded(data)})


# --------------------------------------------------------------------------------------------- files beside the shards


def image_path(value: str | int) -> str:
    """What a caption's image and a sample's key are compared by: the path without extension; the number 17 is SA-1B's
    sa_17."""
    if isinstance(value, int):
        return f"sa_{value}"
    return re.sub(r"\.[^./]*$", "", value.removeprefix("./"))


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _lines(
    path: Path, rules: CaptionRules, scores: Sequence[str] = ()
) -> Iterator[tuple[object, object, list[object]]]:
    """Each (image, caption, scores) of a .jsonl or .parquet file; what it lacks is None. Raises DataError where it
    cannot be read, or has no field for image or caption."""
    keys, texts = (rules.key,) if rules.key else KEY_FIELDS, rules.fields or _TEXT_FIELDS
    expected = (
        f'expected {{"{keys[0]}": image name or number, "{texts[0]}": text}}; '
        + (f"{', '.join(KEY_FIELDS[1:])} also name it" if rules.key is None else "data.caption_key names the image")
        + "; data.caption_key and data.caption_fields give other names"
    )
    try:
        for entry, place in _entries(path, [*keys, *texts, *scores]):
            key = next((key for key in keys if key in entry), None) if isinstance(entry, dict) else None
            if key is None or not any(text in entry for text in texts):
                raise DataError(f"captions {path}, {place}: {expected}, got {str(entry)[:100]!r}")
            yield entry[key], entry.get(first_field(entry, texts) or ""), [entry.get(score) for score in scores]
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"captions {path} cannot be read: {error}; {expected}") from None


def _entries(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """(each line or row of a file, where it is). columns: that are read of a .parquet."""
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        there = [name for name in dict.fromkeys(columns) if name in file.schema_arrow.names]
        if not there:
            yield dict.fromkeys(file.schema_arrow.names), "columns"
        for batch in file.iter_batches(_BLOCK, columns=there):
            yield from ((row, "columns") for row in batch.to_pylist())
        return
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                entry: Any = line.strip()
                with contextlib.suppress(ValueError, RecursionError):
                    entry = json.loads(line)
                yield entry, f"line {number}"


def open_captions(spec: str) -> tuple[Path, ...]:
    """The files that data.captions names: a path, a folder, or paths with commas, braces or wildcards. Raises DataError
    where one is missing."""
    if Path(spec).expanduser().is_file():
        return (Path(spec).expanduser(),)
    found: list[Path] = []
    for name in expand_all(spec):
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        else:
            files = [Path(match) for match in sorted(glob.glob(str(path)))] or [path] * path.is_file()
        if not files:
            raise DataError(
                f"captions {quote(name)}: there is no such file ({' or '.join(_SUFFIXES)}, on this machine)"
            )
        found += files
    return tuple(dict.fromkeys(found))


class CaptionFile:
    """The captions of one or several files by image; their texts are appended to `texts`, a file that is open for
    reading as well.

    Several captions of one image are all kept. rules: which fields hold image and caption. scores: names of numbers
    that are read as well. Raises DataError where a file is unreadable.
    """

    def __init__(
        self,
        paths: Path | Sequence[Path],
        texts: IO[bytes],
        scores: Sequence[str] = (),
        rules: CaptionRules = CaptionRules(),  # noqa: B008 (a tuple)
    ) -> None:
        self._paths, self._rules = [paths] if isinstance(paths, Path) else paths, rules
        self._path = ", ".join(map(str, self._paths[:3])) + ", ..." * (len(self._paths) > 3)  # for messages
        kind = np.dtype([*_ROW.descr, ("scores", "<f8", (len(scores),))])
        self._absent = np.array((*_ABSENT, [np.nan] * len(scores)), kind)
        blocks, rows = [], []
        for image, value, numbers in self._lines(scores):
            scored = [float(n) if isinstance(n, int | float | Decimal) else np.nan for n in numbers]
            captions = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
            for caption in filter(None, (_whole_characters(text).strip() for text in captions)):
                if isinstance(image, str | int):  # without a caption its image becomes a hole
                    name, data = image_path(image), caption.encode()
                    rows.append((_hash(name), _hash(_name(name)), texts.tell(), len(data), len(caption), False, scored))
                    texts.write(data)
            if len(rows) >= _BLOCK:
                blocks.append(np.array(rows, kind))
                rows = []
        table = np.concatenate([*blocks, np.array(rows, kind), self._absent[None]])
        self._table = _one_row_an_image(table[np.argsort(table["path"], kind="stable")], texts)
        self._by_name = np.argsort(self._table["name"], kind="stable")
        self._names = self._table["name"][self._by_name]
        self._taken = np.zeros(len(self._table), np.uint64)  # by which key's hash

    def _lines(self, scores: Sequence[str] = ()) -> Iterator[tuple[object, object, list[object]]]:
        for path in self._paths:
            yield from _lines(path, self._rules, scores)

    def __len__(self) -> int:
        """Images with a caption."""
        return len(self._table) - 1  # one row stands for those that have none

    def unreached(self, most: int) -> tuple[int, list[str]]:
        """(the number of images whose caption no sample has taken up to now, the first `most` of them)."""
        left = set(self._table["path"][(self._taken == 0) & (self._table["offset"] >= 0)].tolist())
        named = (image for image, *_ in self._lines() if isinstance(image, str | int))
        found = dict.fromkeys(str(image) for image in named if _hash(image_path(image)) in left)
        return len(left), list(itertools.islice(found, most))

    def find(self, keys: list[str]) -> np.ndarray:
        """For each sample, by its key, the captions of its image in the file: a row of their offset and size in the
        texts (bytes), the length of the longest in characters, and the scores; offset -1, size 0, length -1, scores NaN
        where there are none.

        Key and image have the same path, or, where no image has the key's path, the same last part of it. Raises
        DataError where several images have that last part, or several keys come to one image by it.
        """
        paths = [image_path(key) for key in keys]
        wanted = np.array([_hash(path) for path in paths], np.uint64)
        at = np.minimum(np.searchsorted(self._table["path"], wanted), len(self._table) - 1)
        found = self._table["path"][at] == wanted
        by_name = np.flatnonzero(~found)
        names = np.array([_hash(_name(paths[row])) for row in by_name], np.uint64)
        first, end = (np.searchsorted(self._names, names, side=side) for side in ("left", "right"))
        for row in by_name[end - first > 1][:1]:
            images = [
                str(i)
                for i, *_ in self._lines()
                if isinstance(i, str | int) and _name(image_path(i)) == _name(paths[row])
            ]
            raise DataError(
                f"captions {self._path}: sample {keys[row]!r} may be {' or '.join(map(repr, images[:2]))}: give the "
                "images of the file the path that the samples have in their shards"
            )
        at[by_name] = self._by_name[np.minimum(first, len(self._names) - 1)]
        found[by_name] = end > first
        self._take(at[found], wanted[found], [key for key, one in zip(keys, found, strict=True) if one])
        rows = self._table[at]
        rows[~found] = self._absent
        return rows

    def _take(self, at: np.ndarray, wanted: np.ndarray, keys: list[str]) -> None:
        """Note which key takes which row; DataError where it is another's."""
        before = self._taken[at]
        self._taken[at] = wanted
        for one in np.flatnonzero(((before != 0) & (before != wanted)) | (self._taken[at] != wanted))[:1]:
            others = [key for key, row in zip(keys, at, strict=True) if row == at[one] and key != keys[one]]
            other = repr(others[0]) if others else "one of another folder"
            raise DataError(
                f"captions {self._path}: samples {keys[one]!r} and {other} have the same last part, and the file has "
                "one image for both: give its images the path that the samples have in their shards"
            )


def _one_row_an_image(table: np.ndarray, texts: IO[bytes]) -> np.ndarray:
    """_ROW [captions], sorted by path -> _ROW [images]: where an image has several different captions, they are
    appended to the texts as a .json member holds them."""
    first = np.flatnonzero(np.concatenate([[True], table["path"][1:] != table["path"][:-1]]))
    counts = np.diff(np.append(first, len(table)))
    images = table[first]
    for image in np.flatnonzero(counts > 1):
        captions: dict[str, None] = {}
        for row in table[first[image] : first[image] + counts[image]]:
            texts.seek(row["offset"])
            captions[texts.read(row["size"]).decode()] = None
        if len(captions) > 1:
            data = json.dumps({"captions": list(captions)}).encode()
            offset, longest = texts.seek(0, os.SEEK_END), max(map(len, captions))
            for field, value in (("offset", offset), ("size", len(data)), ("length", longest), ("is_json", True)):
                images[field][image] = value
            texts.write(data)
    texts.seek(0, os.SEEK_END)
    return images
