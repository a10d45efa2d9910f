"""Index of WebDataset shards: where each sample's image and caption lie in its tar, and its class label; or its latents
and text states, where they were precomputed.

A shard's index is stored beside it as NAME.tar.index.parquet, one row a sample; that of a URL, or of a folder that
cannot be written, in a cache folder. Member names are only ever used as keys, never as paths.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError, SampleError
from .files import temporary_beside
from .images import IMAGE_EXTENSIONS, image_size
from .storage import FileVersion, LocalBytes, Remote, RemoteBytes, RetryPolicy, Shard, stamp
from .tar import Bytes, Member, TarError, members

logger = logging.getLogger(__name__)

ABSENT = -1  # offset of a member that the sample lacks, its label, and length of a caption that cannot be read
UNREADABLE = -2  # label of a .cls member that holds no number
MAX_MEMBER_BYTES = 1 << 30  # a header that claims more is damaged, and must not allocate
_VERSION = b"4"
_GZIP = b"\x1f\x8b"
_HEADER_BYTES = 1 << 16  # of an image: nearly always enough to tell its size
_MAX_JSON_BYTES = 1 << 20  # a larger one holds something else (SA-1B: masks), and its caption's length is not asked for
_MAX_LABEL = 2**31 - 1
_MAX_WEIGHT = 1e9
SCHEMA = pa.schema(
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
        ("text_offset", pa.int64()),
        ("text_size", pa.int64()),
        ("features_offset", pa.int64()),
        ("features_size", pa.int64()),
        ("precomputed", pa.bool_()),
    ]
)
# Members that launch/precompute.py writes; a hole tells why there is no sample.
LATENTS, TEXT, FEATURES, HOLE = "latents.npy", "text.npy", "features.npy", "hole"
# WebDataset's rule: the key ends at the first dot of the last path component.
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)


@dataclass(frozen=True)
class ShardIndex:
    """Index of one shard: where the tar is and a table with the columns of SCHEMA.

    Offsets and sizes are bytes in the tar (ABSENT, 0 where the sample lacks the member); width and height are
    pixels (0 where the image is unreadable); caption_length is characters of the longest caption (ABSENT where
    unreadable). label is the number in the .cls member (ABSENT or UNREADABLE where there is none). Of a precomputed
    sample "image" is the latents, width and height are those of the original, "text" is the text states, "features" is
    the features of the image, and of a hole "caption" is its reason. stamp: identity of the tar's content.
    """

    path: Shard
    table: pa.Table
    stamp: str


class CaptionChoice(NamedTuple):
    """The captions of one image, stripped, and how often each is taken, relative to the others."""

    texts: list[str]
    weights: list[float]

    def pick(self, chance: float) -> int:
        """Number of the caption that a chance in [0, 1) falls on."""
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
    return CaptionChoice(texts, weights)


def captions_from_bytes(data: bytes, is_json: bool) -> CaptionChoice:
    """Captions of a .txt or .json member; SampleError where there are none."""
    if is_json:
        return captions_of_entry(json_member(data))
    try:
        return captions_of_entry({"caption": data.decode("utf-8")})
    except UnicodeDecodeError as error:
        raise SampleError("caption: not utf-8") from error


def label_from_bytes(data: bytes) -> int:
    """Class number of a .cls member (ASCII digits, as webdataset writes it), UNREADABLE where it is none."""
    text = data.strip()
    if not text.isdigit() or len(text) > len(str(_MAX_LABEL)) or int(text) > _MAX_LABEL:
        return UNREADABLE
    return int(text)


def _read_whole(file: Bytes, member: Member, at_most: int = MAX_MEMBER_BYTES) -> bytes:
    """A member's bytes; SampleError where it claims more than `at_most` or the file is shorter."""
    if member.size > at_most:
        raise SampleError("shard: member too large")
    data = file.read_at(member.offset, member.size)
    if len(data) != member.size:
        raise SampleError("shard: short read")
    return data


@contextlib.contextmanager
def _open(shard: Shard, patience: RetryPolicy) -> Iterator[Bytes]:
    if isinstance(shard, Remote):
        yield RemoteBytes(shard, stamp(shard, patience).size, patience)
    else:
        with open(shard, "rb") as file:
            yield LocalBytes(file.fileno())


def build_index(shard: Shard, patience: RetryPolicy = RetryPolicy()) -> pa.Table:  # noqa: B008 (frozen)
    """Index a shard by reading its headers, image headers, captions and labels: SCHEMA, a row a sample.

    A tar that ends early keeps its members up to there (the last one becomes a hole when it is read).
    Raises DataError where the file is no tar or holds no image with an extension of IMAGE_EXTENSIONS.
    """
    rows: list[dict[str, object]] = []
    try:
        with _open(shard, patience) as file:
            try:
                for member in members(file):
                    _add_member(rows, member, file)
            except TarError as error:
                if not rows:
                    if file.read_at(0, len(_GZIP)) == _GZIP:
                        raise DataError(
                            f"{shard} is compressed by gzip, whatever its name says, and samples are read at their "
                            "offsets: decompress it once, gunzip < FILE > plain/FILE"
                        ) from None
                    raise
                logger.warning("%s ends early (%s): its last samples are missing", shard, error)
    except (TarError, SampleError, OSError) as error:
        raise DataError(f"{shard} cannot be read as an uncompressed tar file: {error}") from None
    if not any(row["image_offset"] != ABSENT or row["precomputed"] for row in rows):
        raise DataError(
            f"{shard} holds no image: expected members like KEY.jpg and KEY.txt with one of the extensions "
            f"{', '.join(IMAGE_EXTENSIONS)}; build shards with launch/shard.py"
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _size(file: Bytes, member: Member) -> tuple[int, int]:
    """(width, height) of an image member; (0, 0) where its header is unreadable."""
    with contextlib.suppress(SampleError):
        return image_size(file.read_at(member.offset, min(member.size, _HEADER_BYTES)))
    with contextlib.suppress(SampleError):  # the header is longer, or the format needs all (WebP)
        return image_size(_read_whole(file, member))
    return 0, 0


def _add_member(rows: list[dict[str, object]], member: Member, file: Bytes) -> None:
    """Enter one tar member into the row of its key; members of a sample are neighbours in the tar."""
    match = _MEMBER.match(member.name)
    if match is None:
        return
    key = match[1].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    extension = match[2].lower()
    if extension not in (*IMAGE_EXTENSIONS, "txt", "json", "cls", LATENTS, TEXT, FEATURES, HOLE):
        return
    if not rows or rows[-1]["key"] != key:
        row: dict[str, object] = dict.fromkeys(SCHEMA.names, 0)
        row.update(key=key, caption_is_json=False, caption_length=ABSENT, precomputed=False)
        row.update(image_offset=ABSENT, caption_offset=ABSENT, label=ABSENT, text_offset=ABSENT)
        row.update(features_offset=ABSENT)
        rows.append(row)
    row = rows[-1]
    if extension in IMAGE_EXTENSIONS:
        row.update(image_offset=member.offset, image_size=member.size)
        row["width"], row["height"] = _size(file, member)
    elif extension == LATENTS:
        row.update(image_offset=member.offset, image_size=member.size, precomputed=True)
    elif extension == TEXT:
        row.update(text_offset=member.offset, text_size=member.size)
    elif extension == FEATURES:
        row.update(features_offset=member.offset, features_size=member.size)
    elif extension == HOLE:
        row.update(caption_offset=member.offset, caption_size=member.size, precomputed=True)
    elif extension == "cls":
        try:
            row["label"] = label_from_bytes(_read_whole(file, member, _MAX_JSON_BYTES))
        except SampleError:
            row["label"] = UNREADABLE
    elif extension == "txt" or row["caption_offset"] == ABSENT:  # .txt wins over .json
        is_json = extension == "json"
        row.update(caption_offset=member.offset, caption_size=member.size, caption_is_json=is_json)
        try:
            data = _read_whole(file, member, _MAX_JSON_BYTES)
            row["caption_length"] = max(len(text) for text in captions_from_bytes(data, is_json).texts)
            if is_json and row["width"] == 0:  # of an image that follows in this tar these are overwritten
                row["width"], row["height"] = _size_of_entry(json_member(data))
        except SampleError:
            row["caption_length"] = ABSENT


def _size_of_entry(entry: dict[str, Any]) -> tuple[int, int]:
    """(width, height) in pixels that a .json member tells; (0, 0) where it does not."""
    sides = entry.get("width"), entry.get("height")
    width, height = (side if isinstance(side, int) and 0 < side <= _MAX_LABEL else 0 for side in sides)
    return width, height


def index_path(tar_path: Path) -> Path:
    """Where the index of a local shard is stored."""
    return tar_path.with_name(tar_path.name + ".index.parquet")


def _cached_path(shard: Shard, cache: Path) -> Path:
    """Where the index of a shard is stored that cannot have one beside it."""
    where = shard.url.partition("?")[0] if isinstance(shard, Remote) else str(shard.resolve())
    return cache / f"{hashlib.sha256(where.encode()).hexdigest()[:32]}.index.parquet"


def load_index(
    shard: Shard,
    cache: Path | None = None,
    patience: RetryPolicy = RetryPolicy(),  # noqa: B008 (frozen)
    rebuild: bool = False,
    known_stamp: FileVersion | None = None,
) -> ShardIndex:
    """The stored index of a shard; built (and stored where a folder is writable) when missing, stale or to be rebuilt.

    cache: folder for indexes that cannot be stored beside their shard; None keeps those in memory.
    known_stamp: the shard's, where it was asked for already, maybe by another process. Raises DataError where the index
    must be built and the shard is another file by now, or here.
    """
    current = (known_stamp or stamp(shard, patience)).version
    beside = [] if isinstance(shard, Remote) else [index_path(shard)]
    places = [*beside, *([_cached_path(shard, cache)] if cache else [])]
    for path in places if not rebuild else ():
        with contextlib.suppress(OSError, pa.ArrowException):  # missing or damaged: the tar itself is the truth
            table = pq.read_table(path)
            metadata = table.schema.metadata or {}
            if metadata.get(b"version") == _VERSION and metadata.get(b"stamp") == current.encode():
                return ShardIndex(shard, table, current)
    if known_stamp is not None and stamp(shard, patience) != known_stamp:
        raise DataError(
            f"shard {shard} has changed since the start, or is not the file that rank 0 sees: give every process "
            "the same files, and start again"
        )
    table = build_index(shard, patience)
    stored = table.replace_schema_metadata({b"version": _VERSION, b"stamp": current.encode()})
    for path in places:
        try:
            with temporary_beside(path) as temporary:
                pq.write_table(stored, temporary)
            break
        except OSError as error:
            logger.info("index of %s cannot be stored in %s: %s", shard, path.parent, error)
    return ShardIndex(shard, table, current)
