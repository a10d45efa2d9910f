"""Index of one WebDataset shard: where the image and the caption of each sample lie in the tar, and its class label; or
its latents and text states, where they were precomputed.

It is stored beside the shard as NAME.tar.index.parquet, with one row per sample; that of a URL, or of a shard in a
folder that cannot be written, in a cache folder. Names of members are only ever used as keys, never as paths.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .captions import NoCaption, captions_from_bytes, captions_of_entry, first_field, json_member
from .errors import DataError, SampleError, StoreError
from .files import parse_json, temporary_beside
from .images import IMAGE_EXTENSIONS, TAIL_BYTES, UNREAD_EXTENSIONS, ImageHeader, read_header
from .storage import (
    FileVersion,
    LocalBytes,
    Remote,
    RemoteBytes,
    RetryPolicy,
    Shard,
    file_version,
    read_remote,
    unreadable,
)
from .tar import BLOCK, Bytes, Member, TarError, members
from .tar_samples import CONVERTED, ENDS_EARLY, SKIPPED, TURNED, UNUSABLE, Remarks, TarSamples, remarks_from, told

logger = logging.getLogger(__name__)

ABSENT = -1  # offset of a member that the sample lacks, its label, and length of a caption that cannot be read
UNREADABLE = -2  # label where the .cls member holds no number
MAX_MEMBER_BYTES = 1 << 30  # a header that claims more is damaged, and must not allocate
_FORMAT = b"8"  # version of what is stored
# Of the metadata: the format, the version of the shard, and the remarks on it.
_FORMAT_KEY, _SHARD_KEY, _REMARKS_KEY = b"version", b"stamp", b"remarks"
_HIDDEN = "._"  # begins the names of the files that macOS puts beside those that it copies
_LEAST_UNPACKED = 1 << 20  # bytes that a stored index may always have
_COMPRESSED = (
    "is compressed by {}, whatever its name says, and samples are read at their offsets: decompress it once, "
    "{} < FILE > plain/FILE"
)
# What begins files that people take for tars: what they are, and what to do.
_NO_TARS = (
    (rb"\x1f\x8b", _COMPRESSED.format("gzip", "gunzip")),
    (rb"BZh", _COMPRESSED.format("bzip2", "bunzip2")),
    (rb"\xfd7zXZ\0", _COMPRESSED.format("xz", "unxz")),
    (rb"\x28\xb5\x2f\xfd|\x50\x2a\x4d\x18", _COMPRESSED.format("zstd", "unzstd")),
    (rb"\x04\x22\x4d\x18", _COMPRESSED.format("lz4", "unlz4")),
    (rb"PK\x03\x04", "is a zip file, not a tar: unpack it, and pack its folder with launch/shard.py --images"),
    (rb"\s*<(!doctype html|html)", "is a web page, not a tar: download the file itself, with a login if it wants one"),
    (rb"version https://git-lfs", "is a git-lfs pointer, not the file: run git lfs pull where it was cloned"),
)
_PNG = b"\x89PNG"
_HEADER_BYTES = 1 << 16  # of an image: they nearly always tell its size
_MAX_JSON_BYTES = 1 << 20  # a larger one holds something else (SA-1B: masks), and its caption's length is not asked for
_MAX_LABEL = 2**31 - 1
_MAX_NUMBER, _MOST_NUMBERS = 1e300, 64  # of a .json member
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
        ("numbers", pa.large_string()),
    ]
)
# Extensions of the members that launch/precompute.py writes; a hole holds the reason why there is no sample.
LATENTS, TEXT, FEATURES, HOLE = "latents.npy", "text.npy", "features.npy", "hole"
_EXTENSIONS = (*IMAGE_EXTENSIONS, *UNREAD_EXTENSIONS, "json", "cls", LATENTS, TEXT, FEATURES, HOLE)


@dataclass(frozen=True)
class ShardIndex:
    """Index of one shard: where the tar is, and a table with the columns of SCHEMA and one row per sample.

    Offsets and sizes are bytes in the tar (ABSENT and 0 where the sample lacks the member); width and height are pixels
    (0 where the image is unreadable); caption_length is the number of characters of the longest caption (0 where the
    member holds none, ABSENT where it is unreadable). label is the number in the .cls member (ABSENT where there is no
    such member, UNREADABLE where it holds no number). numbers is JSON of the numbers in the .json member, by name (""
    where there are none). Of a precomputed sample "image" is the latents, width and height are those of the original,
    "text" is the text states and "features" the features of the image; of a hole "caption" is its reason.
    version: identity of the tar's content, as of FileVersion. remarks: what its user should know.
    """

    path: Shard
    table: pa.Table
    version: str
    remarks: Remarks = field(default_factory=Remarks)


def label_from_bytes(data: bytes) -> int:
    """The class number of a .cls member (ASCII digits, as webdataset writes it), UNREADABLE where it holds none."""
    text = data.strip()
    if not text.isdigit() or len(text) > len(str(_MAX_LABEL)) or int(text) > _MAX_LABEL:
        return UNREADABLE
    return int(text)


def _read_whole(file: Bytes, member: Member, at_most: int = MAX_MEMBER_BYTES) -> bytes:
    """A member's bytes. Raises SampleError where it claims more than `at_most` bytes or the file is shorter."""
    if member.size > at_most:
        raise SampleError("shard: member too large")
    data = file.read_at(member.offset, member.size)
    if len(data) != member.size:
        raise SampleError("shard: short read")
    return data


@contextlib.contextmanager
def _open(shard: Shard, retry: RetryPolicy) -> Iterator[Bytes]:
    if isinstance(shard, Remote):
        size = file_version(shard, retry).size
        if size > 1:  # a server without ranges gives a small file as a whole, and would give no sample
            read_remote(shard.url, size - 1, size, retry, 0)
        yield RemoteBytes(shard, size, retry)
    else:
        with open(shard, "rb") as file:
            yield LocalBytes(file.fileno())


def build_index(
    shard: Shard,
    retry: RetryPolicy = RetryPolicy(),  # noqa: B008 (frozen)
    fields: Sequence[str] = (),
) -> tuple[pa.Table, Remarks]:
    """Index a shard by reading the headers of its tar and its images, its captions and its labels. -> a table of SCHEMA
    with one row per sample, and remarks. fields: data.caption_fields.

    The table is empty where there is neither an image with an extension of IMAGE_EXTENSIONS nor a precomputed sample.
    Of a tar that ends early the members before its end are kept (the last one becomes a hole when it is read).
    Raises DataError where the file is no tar.
    """
    samples = TarSamples(_new_row, (*_EXTENSIONS, *_plain(fields)))
    if shard.name.startswith(_HIDDEN):
        samples.remarks.add(SKIPPED, "a file of macOS, no tar")
        return SCHEMA.empty_table(), samples.remarks
    try:
        with _open(shard, retry) as file:
            try:
                for member in members(file):
                    _add_member(samples, member, file, fields)
            except TarError as error:
                if not samples.rows:
                    _refuse_other_files(shard, file.read_at(0, BLOCK))
                    raise
                samples.remarks.add(ENDS_EARLY, str(error))
    except StoreError as error:
        raise unreadable(shard, error) from None
    except (TarError, SampleError, OSError) as error:
        raise DataError(f"{shard} cannot be read as an uncompressed tar file: {error}") from None
    rows = samples.finish(lambda row: row["image_offset"] != ABSENT or row["precomputed"])
    unread = Counter(row["unread"] for row in rows if row.get("unread"))
    if unread and unread.total() == sum(row["image_offset"] != ABSENT for row in rows):
        formats = ", ".join(f"{count} x {extension}" for extension, count in unread.items())
        raise DataError(
            f"{shard} holds images of formats that are not read ({formats}): convert them to one of "
            f"{', '.join(IMAGE_EXTENSIONS)}"
        )
    if not rows:
        expected = f"expected KEY.jpg and KEY.txt, with one of the extensions {', '.join(IMAGE_EXTENSIONS)}"
        samples.remarks.add(SKIPPED, f"it holds no image, {expected}")
    return pa.Table.from_pylist(rows, schema=SCHEMA), samples.remarks


def _refuse_other_files(shard: Shard, beginning: bytes) -> None:
    """Raise DataError with what to do where a file begins as another kind does."""
    for pattern, what in _NO_TARS:
        if re.match(pattern, beginning, re.IGNORECASE):
            raise DataError(f"{shard} {what}")


def _new_row(key: str) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names, 0)
    row.update(key=key, caption_is_json=False, caption_length=ABSENT, precomputed=False, numbers="")
    row.update(image_offset=ABSENT, caption_offset=ABSENT, label=ABSENT, text_offset=ABSENT)
    return row | {"features_offset": ABSENT}


def _image_header(file: Bytes, member: Member) -> ImageHeader | None:
    """The header of an image member; None where it is unreadable."""
    beginning, tail = file.read_at(member.offset, min(member.size, _HEADER_BYTES)), None
    if beginning.startswith(_PNG) and member.size > _HEADER_BYTES:
        tail = file.read_at(member.offset + member.size - TAIL_BYTES, TAIL_BYTES)
    with contextlib.suppress(SampleError):
        return read_header(beginning, tail)
    with contextlib.suppress(SampleError):  # the header is longer, or the format needs all (WebP)
        return read_header(_read_whole(file, member))
    return None


def _add_image(row: dict[str, Any], member: Member, file: Bytes, remarks: Remarks) -> None:
    """Enter an image into the row of its key."""
    row.update(image_offset=member.offset, image_size=member.size, unread=None, width=0, height=0)
    if (header := _image_header(file, member)) is None:
        return
    row.update(width=header.width, height=header.height)
    if header.is_turned_png:
        remarks.add(TURNED, row["key"])
    if header.profile:
        remarks.add(CONVERTED if header.profile == "converted" else UNUSABLE, row["key"])


def _add_member(samples: TarSamples, member: Member, file: Bytes, fields: Sequence[str]) -> None:
    """Enter one member of the tar into the row of its key."""
    if (found := samples.row_of(member.name)) is None:
        return
    row, extension = found
    if extension in IMAGE_EXTENSIONS:
        _add_image(row, member, file, samples.remarks)
    elif extension in UNREAD_EXTENSIONS:
        if row["image_offset"] == ABSENT:  # its reason is found when it is read
            row.update(image_offset=member.offset, image_size=member.size, unread=extension)
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
    else:
        _add_caption(row, member, file, None if extension == "json" else _plain(fields).index(extension), fields)


def _plain(fields: Sequence[str]) -> list[str]:
    """Extensions of the members that are a caption and nothing else."""
    return [field.lower() for field in fields] or ["txt"]


def _add_caption(row: dict[str, Any], member: Member, file: Bytes, place: int | None, fields: Sequence[str]) -> None:
    """Enter a .json member, or the plain one of fields[place], whose caption counts where no field before it is
    filled."""
    is_json = place is None
    data, entry = b"", dict[str, Any]()
    with contextlib.suppress(SampleError):
        data = _read_whole(file, member, _MAX_JSON_BYTES)
        entry = json_member(data) if is_json else {}
    if row["width"] == 0:  # an image that follows in the tar overwrites it
        row["width"], row["height"] = _size_of_entry(entry)
    if is_json:
        row["numbers"] = _numbers_of_entry(entry)
        fields = () if "tokens" in entry else fields  # a precomputed one
        found = first_field(entry, fields)
        place = fields.index(found) if found else len(fields)
    elif fields and not data.strip():
        place = len(fields)
    rank = 2 * place + is_json  # of one field the plain member wins
    # Of two equal ones the first .json and the last plain member are taken.
    if row["caption_offset"] != ABSENT and rank + is_json > row["caption_rank"]:
        return
    row["caption_rank"] = rank
    row.update(caption_offset=member.offset, caption_size=member.size, caption_is_json=is_json)
    try:
        choice = captions_of_entry(entry, fields) if entry else captions_from_bytes(data, is_json)
        row["caption_length"] = max(map(len, choice.texts))
    except NoCaption:
        row["caption_length"] = 0 if len(data) == member.size else ABSENT
    except SampleError:
        row["caption_length"] = ABSENT


def _numbers_of_entry(entry: dict[str, Any]) -> str:
    """The numbers of a .json member by which data.filter may choose, as JSON; "" where there are none."""
    numbers = {name: value for name, value in entry.items() if type(value) in (int, float) and abs(value) < _MAX_NUMBER}
    for name in ("width", "height"):  # they have columns
        numbers.pop(name, None)
    return json.dumps(dict(list(numbers.items())[:_MOST_NUMBERS])) if numbers else ""


def _size_of_entry(entry: dict[str, Any]) -> tuple[int, int]:
    """(width, height) in pixels that a .json member tells; (0, 0) where it does not."""
    sides = entry.get("width"), entry.get("height")
    width, height = (side if isinstance(side, int) and 0 < side <= _MAX_LABEL else 0 for side in sides)
    return width, height


def index_path(tar_path: Path, fields: Sequence[str] = ()) -> Path:
    """Where the index of a local shard is stored. fields: data.caption_fields."""
    choice = f".{hashlib.sha256(repr(tuple(fields)).encode()).hexdigest()[:8]}" if fields else ""
    return tar_path.with_name(f"{tar_path.name}{choice}.index.parquet")


def _cached_path(shard: Shard, cache: Path, fields: Sequence[str] = ()) -> Path:
    """Where the index of a shard is stored that cannot have one beside it."""
    where = shard.identity if isinstance(shard, Remote) else str(shard.resolve())
    where += f"\0{tuple(fields)}" if fields else ""
    return cache / f"{hashlib.sha256(where.encode()).hexdigest()[:32]}.index.parquet"


def load_index(
    shard: Shard,
    cache: Path | None = None,
    retry: RetryPolicy = RetryPolicy(),  # noqa: B008 (frozen)
    rebuild: bool = False,
    known_version: FileVersion | None = None,
    fields: Sequence[str] = (),
) -> ShardIndex:
    """The stored index of a shard. It is built, and stored in the first folder that can be written, where it is
    missing, is that of another version of the shard, or `rebuild` is set.

    cache: folder for an index that cannot be stored beside its shard; None keeps such an index in memory alone.
    known_version: of the shard, where it was asked for already, maybe by another process. fields: data.caption_fields,
    each choice of which has an index of its own. Raises DataError where the
    shard cannot be read, or the index must be built and the shard has another version by now, or in this process.
    """
    size, current = known_version or file_version(shard, retry)
    beside = [] if isinstance(shard, Remote) else [index_path(shard, fields)]
    places = [*beside, *([_cached_path(shard, cache, fields)] if cache else [])]
    for path in places if not rebuild else ():
        # Missing, of an older format or damaged, of which pyarrow says what it likes: the tar itself is the truth.
        with contextlib.suppress(OSError, pa.ArrowException, ValueError, KeyError):
            if (table := _read_stored(path, current, size)) is not None and _lies_within(table, size):
                remarks = remarks_from(parse_json(table.schema.metadata[_REMARKS_KEY]))
                return ShardIndex(shard, table, current, remarks)
    if known_version is not None and file_version(shard, retry) != known_version:
        raise DataError(
            f"shard {shard} has changed since the start, or is not the file that rank 0 sees: give every process "
            "the same files, and start again"
        )
    table, remarks = build_index(shard, retry, fields)
    stored = table.replace_schema_metadata(
        {_FORMAT_KEY: _FORMAT, _SHARD_KEY: current.encode(), _REMARKS_KEY: json.dumps(remarks).encode()}
    )
    for path in places:
        try:
            with temporary_beside(path) as temporary:
                pq.write_table(stored, temporary, write_page_checksum=True)
            break
        except OSError as error:
            logger.info("index of %s cannot be stored in %s: %s", shard, path.parent, error)
    return ShardIndex(shard, table, current, remarks)


def _lies_within(table: pa.Table, size: int) -> bool:
    """Whether the members of a stored index lie within a tar of `size` bytes. The last row may go beyond: that of a
    tar which ends early does."""
    for member in ("image", "caption", "text", "features"):
        offset, length = (table.column(f"{member}_{what}").to_numpy() for what in ("offset", "size"))
        if (offset < ABSENT).any() or (offset > size).any() or (length < 0).any() or (length[:-1] > size).any():
            return False
        if (offset + length)[:-1].max(initial=0) > size:
            return False
    numbers = {"width": 0, "height": 0, "caption_length": ABSENT, "label": UNREADABLE}
    return all((table.column(name).to_numpy() >= least).all() for name, least in numbers.items())


def _read_stored(path: Path, version: str, size: int) -> pa.Table | None:
    """A stored index, if it is that of a shard of this version and of `size` bytes, and unpacks to no more than such a
    shard can need: a few MB of parquet may stand for many GB."""
    # Dictionaries, so that a long text is not repeated in memory.
    with pq.ParquetFile(path, read_dictionary=["key", "numbers"], page_checksum_verification=True) as file:
        about, metadata = file.metadata, file.metadata.metadata or {}
        if metadata.get(_FORMAT_KEY) != _FORMAT or metadata.get(_SHARD_KEY) != version.encode():
            return None
        # Not by the columns of a group: pyarrow aborts the process where a damaged footer lacks one.
        unpacked = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
        # A sample has at least one member, which has a header, and its name lies in the tar.
        if about.num_rows > size // BLOCK or unpacked > 2 * size + _LEAST_UNPACKED:
            return None
        if sorted(file.schema_arrow.names) != sorted(SCHEMA.names):
            return None
        table = file.read()
        table.validate(full=True)  # that keys are text, and are there
    if any(table.column(name).null_count for name in SCHEMA.names):
        return None
    for name in ("key", "numbers"):
        characters = 0
        for chunk in table.column(name).chunks:
            lengths = np.array([len(text) for text in chunk.dictionary.to_pylist()], np.int64)
            characters += int(lengths[chunk.indices.to_numpy()].sum())
        if characters > size:
            return None
    return table.select(SCHEMA.names).cast(SCHEMA.with_metadata(table.schema.metadata))


def rebuild_indexes(shards: Sequence[Shard], cache: Path, workers: int) -> Iterator[tuple[str, bool]]:
    """Build the index of every shard anew, in `workers` processes. -> for each shard, in order, what its index holds,
    and True; or why it has none, and False: one bad shard does not keep the others from their indexes."""
    with contextlib.ExitStack() as stack:
        apply = map
        if workers > 1:  # forked from a server, not from here, where the listing of URLs may have left threads
            context = get_context("forkserver")
            context.set_forkserver_preload([__name__])  # imports once for all of them
            processes = ProcessPoolExecutor(min(workers, len(shards)), context)
            apply = stack.enter_context(processes).map
        yield from apply(_rebuild_index, shards, [cache] * len(shards))


def _rebuild_index(shard: Shard, cache: Path) -> tuple[str, bool]:
    try:
        index = load_index(shard, cache, rebuild=True)
    except DataError as error:
        return str(error), False
    table = index.table
    width, caption, label = (table.column(name).to_numpy() for name in ("width", "caption_length", "label"))
    has = {"a readable image": width > 0, "a caption": caption > 0, "a class label": label >= 0}
    counts = [f"{int(rows.sum())} with {what}" for what, rows in has.items()]
    lines = [f"{shard}: {table.num_rows} samples, {', '.join(counts)}", *told([(shard.name, index.remarks)])]
    return "\n  ".join(lines), True
