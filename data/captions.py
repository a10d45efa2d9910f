"""Captions: as the members of a shard hold them, and as a file beside the shards gives them by the image's name.

A file of (image, caption) is joined to the samples in one pass. Meanwhile 24 bytes per caption stay in memory; the
texts go to a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError, SampleError

KEY_FIELDS = ("key", "image_id", "image", "__key__")
_TEXT_FIELDS = ("caption", "txt")  # the latter where a WebDataset was turned into parquet, whose columns are extensions
_MAX_WEIGHT = 1e9
_MOST_CHARACTERS = 100_000  # of a caption: tokenizers are slow, and no encoder reads as much
_ROW = np.dtype([("hash", "<u8"), ("offset", "<i8"), ("size", "<i4"), ("length", "<i4")])
_ABSENT = (0, -1, 0, -1)
_BLOCK = 1 << 16  # captions that are read together


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


def json_member(data: bytes) -> dict[str, Any]:
    """The object in a .json member; SampleError where there is none."""
    try:
        entry = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SampleError("caption: not utf-8") from error
    except (ValueError, RecursionError) as error:
        raise SampleError("caption: not JSON with a caption") from error
    if not isinstance(entry, dict):
        raise SampleError("caption: not JSON with a caption")
    return entry


def captions_of_entry(entry: dict[str, Any]) -> CaptionChoice:
    """Captions of {"caption": text}, or of {"captions": [text, ...], "weights": [number, ...]} where weights may be
    left out; SampleError where there are none."""
    texts = entry["captions"] if "captions" in entry else [entry.get("caption")]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise SampleError("caption: not JSON with a caption")
    weights = entry.get("weights", [1.0] * len(texts)) if "captions" in entry else [1.0]
    numbers = isinstance(weights, list) and all(isinstance(w, int | float) and 0 <= w <= _MAX_WEIGHT for w in weights)
    if not numbers or len(weights) != len(texts) or sum(weights) == 0:
        raise SampleError("caption: weights do not fit")
    texts = [text.encode("utf-8", "replace").decode().strip() for text in texts]  # JSON can hold half a character
    if not all(texts):
        raise SampleError("caption: empty")
    if max(map(len, texts)) > _MOST_CHARACTERS:
        raise SampleError("caption: too long")
    return CaptionChoice(texts, weights)


def captions_from_bytes(data: bytes, is_json: bool) -> CaptionChoice:
    """Captions of a .txt or .json member; SampleError where there are none."""
    if is_json:
        return captions_of_entry(json_member(data))
    try:
        return captions_of_entry({"caption": data.decode("utf-8")})
    except UnicodeDecodeError as error:
        raise SampleError("caption: not utf-8") from error


# --------------------------------------------------------------------------------------------- files beside the shards


def image_name(value: str | int) -> str:
    """What a caption's image and a sample's key are compared by: the name without folder and extension; the number 17
    is SA-1B's sa_17."""
    if isinstance(value, int):
        return f"sa_{value}"
    return re.sub(r"\.[^./]*$", "", value.rpartition("/")[2])


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _first(fields: Sequence[str], names: Container[str]) -> Any:
    return next((field for field in fields if field in names), None)


def _lines(path: Path) -> Iterator[tuple[object, object]]:
    """Each (image, caption) of a .jsonl or .parquet file. Raises DataError where it cannot be read."""
    expected = f'expected {{"key": image name or number, "caption": text}}; {", ".join(KEY_FIELDS[1:])} also name it'
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            key, text = (_first(fields, file.schema_arrow.names) for fields in (KEY_FIELDS, _TEXT_FIELDS))
            if key is None or text is None:
                raise DataError(f"captions {path} has the columns {', '.join(file.schema_arrow.names)}: {expected}")
            for batch in file.iter_batches(_BLOCK, columns=[key, text]):
                yield from zip(batch.column(key).to_pylist(), batch.column(text).to_pylist(), strict=True)
            return
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    key, text = (_first(fields, entry) for fields in (KEY_FIELDS, _TEXT_FIELDS))
                    yield entry[key], entry[text]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise DataError(f"captions {path}, line {number}: {expected}, got {line[:100]!r}") from None
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"captions {path} cannot be read: {error}; {expected}") from None


class CaptionFile:
    """The captions of a file by image name; their texts are appended to `texts`. DataError where it is unreadable."""

    def __init__(self, path: Path, texts: IO[bytes]) -> None:
        blocks, rows = [], []
        for image, caption in _lines(path):
            if not isinstance(image, str | int) or not isinstance(caption, str) or not caption.strip():
                continue  # without a caption its image becomes a hole
            data = caption.strip().encode("utf-8", "replace")
            rows.append((_hash(image_name(image)), texts.tell(), len(data), len(caption.strip())))
            texts.write(data)
            if len(rows) == _BLOCK:
                blocks.append(np.array(rows, _ROW))
                rows = []
        table = np.concatenate([*blocks, np.array([*rows, _ABSENT], _ROW)])
        self._table = table[np.argsort(table["hash"], kind="stable")]
        self._hashes = np.ascontiguousarray(self._table["hash"])

    def find(self, keys: list[str]) -> np.ndarray:
        """For each sample, by its key, the first caption of its image in the file: a row of its offset and size in the
        texts (bytes) and its length in characters; offset -1, size 0, length -1 where there is none."""
        wanted = np.array([_hash(image_name(key)) for key in keys], np.uint64)
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        rows = self._table[at]
        rows[rows["hash"] != wanted] = _ABSENT
        return rows
