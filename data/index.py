"""Index of WebDataset shards: where each sample's image and caption lie in its tar, and its class label.

A shard's index is stored beside it as NAME.tar.index.parquet, one row a sample. Member names are only ever
used as keys, never as paths.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .config import SYNTHETIC, DataError
from .files import temporary_beside
from .images import IMAGE_EXTENSIONS, SampleError, image_size

logger = logging.getLogger(__name__)

ABSENT = -1  # offset of a member that the sample lacks, its label, and length of a caption that cannot be read
UNREADABLE = -2  # label of a .cls member that holds no number
_VERSION = b"2"
_PROBE_BYTES = 1 << 14
_MAX_LABEL = 2**31 - 1
_MAX_MEMBER_BYTES = 1 << 30  # a header that claims more is damaged, and must not allocate
_SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("caption_offset", pa.int64()),
        ("caption_size", pa.int64()),
        ("caption_is_json", pa.bool_()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption_length", pa.int32()),
        ("label", pa.int32()),
    ]
)
# WebDataset's rule: the key ends at the first dot of the last path component.
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)


@dataclass(frozen=True)
class ShardIndex:
    """Index of one shard: path of the tar and a table with the columns of _SCHEMA.

    Offsets and sizes are bytes in the tar (ABSENT, 0 where the sample lacks the member); width and height are
    pixels (0 where the image is unreadable); caption_length is characters (ABSENT where unreadable). label is the
    number in the .cls member (ABSENT or UNREADABLE where there is none).
    """

    path: Path
    table: pa.Table


def caption_from_bytes(data: bytes, is_json: bool) -> str:
    """Caption of a .txt or .json member, stripped; SampleError where there is none."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError("caption: not utf-8") from error
    if is_json:
        try:
            text = json.loads(text)["caption"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SampleError("caption: not JSON with a caption") from error
        if not isinstance(text, str):
            raise SampleError("caption: not JSON with a caption")
    text = text.strip()
    if not text:
        raise SampleError("caption: empty")
    return text


def label_from_bytes(data: bytes) -> int:
    """Class number of a .cls member (ASCII digits, as webdataset writes it), UNREADABLE where it is none."""
    text = data.strip()
    if not text.isdigit() or len(text) > len(str(_MAX_LABEL)) or int(text) > _MAX_LABEL:
        return UNREADABLE
    return int(text)


def read_member(descriptor: int, offset: int, size: int) -> bytes:
    """Bytes of a tar member from an open file; SampleError where the file is shorter."""
    if size > _MAX_MEMBER_BYTES:
        raise SampleError("shard: member too large")
    try:
        data = os.pread(descriptor, size, offset)
    except OSError as error:
        raise SampleError("shard: read error") from error
    if len(data) != size:
        raise SampleError("shard: short read")
    return data


def build_index(tar_path: Path) -> ShardIndex:
    """Index a shard by reading its headers, image headers, captions and labels.

    A tar that ends early keeps its members up to there (the last one becomes a hole when it is read).
    Raises DataError where the file is no tar or holds no image with an extension of IMAGE_EXTENSIONS.
    """
    rows: list[dict[str, object]] = []
    try:
        with open(tar_path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                for member in tar:
                    _add_member(rows, member, file.fileno())
            except tarfile.TarError as error:
                logger.warning("%s ends early (%s): its last samples are missing", tar_path, error)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar_path} cannot be read as an uncompressed tar file: {error}") from error
    if not any(row["image_offset"] != ABSENT for row in rows):
        raise DataError(
            f"{tar_path} holds no image: expected members like KEY.jpg and KEY.txt with one of the extensions "
            f"{', '.join(IMAGE_EXTENSIONS)}; build shards with launch/shard.py"
        )
    return ShardIndex(tar_path, pa.Table.from_pylist(rows, schema=_SCHEMA))


def _add_member(rows: list[dict[str, object]], member: tarfile.TarInfo, descriptor: int) -> None:
    """Enter one tar member into the row of its key; members of a sample are neighbours in the tar."""
    match = _MEMBER.match(member.name)
    if not member.isfile() or match is None:
        return
    key = match[1].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    extension = match[2].lower()
    if extension not in (*IMAGE_EXTENSIONS, "txt", "json", "cls"):
        return
    if not rows or rows[-1]["key"] != key:
        row: dict[str, object] = dict.fromkeys(_SCHEMA.names, 0)
        row.update(key=key, caption_is_json=False, caption_length=ABSENT)
        row.update(image_offset=ABSENT, caption_offset=ABSENT, label=ABSENT)
        rows.append(row)
    row = rows[-1]
    if extension in IMAGE_EXTENSIONS:
        row.update(image_offset=member.offset_data, image_size=member.size)
        try:
            data = read_member(descriptor, member.offset_data, member.size)
            row["width"], row["height"] = image_size(data)
        except SampleError:
            row["width"], row["height"] = 0, 0
    elif extension == "cls":
        try:
            row["label"] = label_from_bytes(read_member(descriptor, member.offset_data, member.size))
        except SampleError:
            row["label"] = UNREADABLE
    elif extension == "txt" or row["caption_offset"] == ABSENT:  # .txt wins over .json
        is_json = extension == "json"
        row.update(caption_offset=member.offset_data, caption_size=member.size, caption_is_json=is_json)
        try:
            data = read_member(descriptor, member.offset_data, member.size)
            row["caption_length"] = len(caption_from_bytes(data, is_json))
        except SampleError:
            row["caption_length"] = ABSENT


def _stamp(tar_path: Path) -> bytes:
    """Identity of a tar's content without reading it all: size and a hash of its begin, middle and end.

    The size alone would not do (tars are padded to 10 KiB), nor the time (copies change it).
    """
    size = tar_path.stat().st_size
    digest = hashlib.sha256()
    with open(tar_path, "rb") as file:
        for offset in (0, size // 2, max(0, size - _PROBE_BYTES)):
            digest.update(os.pread(file.fileno(), _PROBE_BYTES, offset))
    return f"{size}:{digest.hexdigest()}".encode()


def index_path(tar_path: Path) -> Path:
    """Where the index of a shard is stored."""
    return tar_path.with_name(tar_path.name + ".index.parquet")


def load_index(tar_path: Path) -> ShardIndex:
    """The stored index of a shard; built (and stored where the folder is writable) when missing or stale."""
    path = index_path(tar_path)
    try:
        stamp = _stamp(tar_path)
    except OSError as error:
        raise DataError(f"shard {tar_path} cannot be read: {error.strerror}") from error
    try:
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        if metadata.get(b"version") == _VERSION and metadata.get(b"stamp") == stamp:
            return ShardIndex(tar_path, table)
    except (OSError, pa.ArrowException):
        pass  # missing or damaged: the tar itself is the truth
    index = build_index(tar_path)
    table = index.table.replace_schema_metadata({b"version": _VERSION, b"stamp": stamp})
    try:
        with temporary_beside(path) as temporary:
            pq.write_table(table, temporary)
    except OSError as error:
        logger.info("index of %s is kept in memory: %s", tar_path, error)
    return ShardIndex(tar_path, table)


def _expand(pattern: str) -> list[str]:
    """Expand `{a,b}` and `{000..012}` (zero-padded as written) of one pattern."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        items = [str(i).zfill(len(bounds[1])) for i in range(first, last + 1)]
    else:
        items = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for item in items for path in _expand(head + item + tail)]


def open_shards(spec: str, key: str = "data.shards") -> list[Path]:
    """Paths of the shards that a config key (or argument) names, in order.

    spec: a folder, a .tar path, or paths with commas, braces or wildcards. Raises DataError where nothing
    matches or a named shard is missing.
    """
    if spec == SYNTHETIC:
        raise DataError(f"{key} = 'synthetic' has no shards to open")
    paths: list[Path] = []
    for part in re.split(r",(?![^{]*\})", spec):
        for name in _expand(os.path.expanduser(part.strip())):
            path = Path(name)
            if path.is_dir():
                found = sorted(path.glob("*.tar"))
            elif any(sign in name for sign in "*?["):
                found = [Path(match) for match in sorted(glob.glob(name))]
            else:
                found = [path]
                if not path.is_file():
                    raise DataError(
                        f"shard {path} does not exist (from {key} = {spec!r}); check the path, or build "
                        "shards with launch/shard.py"
                    )
            if not found:
                raise DataError(f"{key}: no .tar file matches {name!r}; build shards with launch/shard.py")
            paths += found
    if not paths:
        raise DataError(f"{key} = {spec!r} names no shard")
    return paths


class ImageTextIndex:
    """Index over all samples of a list of shards, as flat arrays in shard order.

    shards: tar paths. Columns are numpy arrays with the names of the parquet file; `names` are the shards'
    names without .tar; `shard_sizes` counts samples; `fingerprint` identifies the data: names, keys and sizes,
    not the folder.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        tables = [load_index(path).table for path in shards]
        self.paths = [path.resolve() for path in shards]
        self.names = [path.name.removesuffix(".tar") for path in shards]
        self.shard_sizes = [table.num_rows for table in tables]
        self._first = np.cumsum([0, *self.shard_sizes])
        merged = pa.concat_tables(t.replace_schema_metadata(None) for t in tables).combine_chunks()
        self._keys = merged.column("key")
        columns = {name: merged.column(name).to_numpy() for name in _SCHEMA.names if name != "key"}
        self.image_offset, self.image_size = columns["image_offset"], columns["image_size"]
        self.caption_offset, self.caption_size = columns["caption_offset"], columns["caption_size"]
        self.caption_is_json = columns["caption_is_json"]
        self.width, self.height = columns["width"], columns["height"]
        self.caption_length, self.label = columns["caption_length"], columns["label"]
        self.fingerprint = self._fingerprint(tables)

    def __len__(self) -> int:
        """Samples in all shards."""
        return int(self._first[-1])

    def row(self, shard: int, sample: int) -> int:
        """Row of a shard's sample in the flat arrays."""
        return int(self._first[shard]) + sample

    def locate(self, row: int) -> tuple[int, int]:
        """(shard, sample) of a row."""
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        return shard, row - int(self._first[shard])

    def name(self, shard: int, sample: int) -> str:
        """ "shard/key" of a sample."""
        return f"{self.names[shard]}/{self._keys[self.row(shard, sample)].as_py()}"

    def _fingerprint(self, tables: Sequence[pa.Table]) -> str:
        digest = hashlib.sha256()
        for name, table in zip(self.names, tables, strict=True):
            digest.update(f"{name}\0{table.num_rows}\0".encode())
            digest.update("\0".join(table.column("key").to_pylist()).encode())
            for column in ("image_size", "caption_size"):
                digest.update(table.column(column).to_numpy().astype("<i8").tobytes())
            labels = table.column("label").to_numpy()
            if (labels != ABSENT).any():  # shards without labels keep the fingerprint that runs have stored
                digest.update(labels.astype("<i8").tobytes())
        return digest.hexdigest()
