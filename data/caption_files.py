"""Captions that come beside the shards: one file of (image, caption), joined to the samples by the image's name.

Read in one pass. What stays in memory while the join is made is 24 bytes a caption; the texts go to a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError

KEY_FIELDS = ("key", "image_id", "image", "__key__")
_TEXT_FIELDS = ("caption", "txt")  # the latter of what WebDataset's columns are called as parquet
_ROW = np.dtype([("hash", "<u8"), ("offset", "<i8"), ("size", "<i4"), ("length", "<i4")])
_ABSENT = (0, -1, 0, -1)
_BLOCK = 1 << 16  # captions read at once


def image_name(value: str | int) -> str:
    """What a caption's image and a sample's key are compared by: no folder, no extension; 17 is SA-1B's sa_17."""
    if isinstance(value, int):
        return f"sa_{value}"
    return re.sub(r"\.[^./]*$", "", value.rpartition("/")[2])


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _first(fields: Sequence[str], names: Container[str]) -> Any:
    return next((field for field in fields if field in names), None)


def _lines(path: Path) -> Iterator[tuple[object, object]]:
    """(image, caption) of a .jsonl or .parquet file."""
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


class Captions:
    """The captions of a file by image name; their texts are appended to `texts`."""

    def __init__(self, path: Path, texts: IO[bytes]) -> None:
        blocks, rows = [], []
        for image, caption in _lines(path):
            if not isinstance(image, str | int) or not isinstance(caption, str) or not caption.strip():
                continue  # no caption: its image is a hole
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
        """Row (offset and size in the texts, length in characters) of each sample: the first caption of its image in
        the file; offset -1, size 0, length -1 where it has none."""
        wanted = np.array([_hash(image_name(key)) for key in keys], np.uint64)
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        rows = self._table[at]
        rows[rows["hash"] != wanted] = _ABSENT
        return rows
