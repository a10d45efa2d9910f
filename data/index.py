"""Index over all samples of all sources: the indexes of the shards, packed into files that all processes of a machine
read.

Only names and sizes of shards are held in memory: a row is read when its sample is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .captions import CaptionFile, CaptionRules, open_captions
from .config import DataConfig, FilterConfig
from .errors import DataError
from .files import file_digest, folder_once, json_digest, lock, open_plain, temporary_beside
from .filter import Filter, described, scores_of
from .images import IMAGE_RULES
from .order import Source
from .precomputed_format import Dataset, open_dataset
from .shard_index import ABSENT, ShardIndex, load_index
from .storage import FileVersion, Remote, RetryPolicy, Shard, file_version, open_shards
from .tar_samples import CONVERTED, TURNED, told

logger = logging.getLogger(__name__)

_PACKED_VERSION = 9  # of the packed files
_FILES = ("rows.bin", "keys.bin", "captions.bin")
_VERSION_THREADS = 32  # a store answers within tens of milliseconds, and a set has thousands of shards
COLUMNS = (
    "image_offset", "image_size", "caption_offset", "caption_size", "caption_is_json", "width", "height",
    "caption_length", "label", "text_offset", "text_size", "features_offset", "features_size",
    "precomputed",
)  # fmt: skip
ROW = np.dtype(
    [
        ("key_offset", "<i8"),
        ("key_size", "<i4"),
        ("image_offset", "<i8"),
        ("image_size", "<i4"),
        ("caption_offset", "<i8"),
        ("caption_size", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("caption_length", "<i4"),
        ("label", "<i4"),
        ("text_offset", "<i8"),
        ("text_size", "<i4"),
        ("features_offset", "<i8"),
        ("features_size", "<i4"),
        ("precomputed", "?"),
        ("caption_is_json", "?"),
        ("caption_beside", "?"),  # whether the caption's offset and size are those in captions.bin, not in the tar
    ]
)


class IndexSource:
    """One source: its shards, the files with their captions (none where the shards hold them), and its weight."""

    def __init__(self, shards: Sequence[Shard], captions: Path | Sequence[Path] = (), weight: float = 1.0) -> None:
        self.captions = [captions] if isinstance(captions, Path) else list(captions)
        self.shards, self.weight = list(shards), weight


class ImageTextIndex:
    """Index over all samples of a list of shards, in the order of the shards.

    shards: paths of tars or URLs, or several sources of them. cache: folder for the packed index; None uses an unnamed
    one that is gone with the process. versions: of the shards, where another process has asked for them; None asks.
    keep: which samples are left out. rules: where their captions are.
    Attributes: `names` of the shards without .tar; `shard_sizes`, samples of each; `sources`, for the order;
    `fingerprint`, the identity of the data by names, keys, sizes and weights, whatever the folder; `dataset`, what
    precomputed shards were made with, None where the shards hold images; `remarks` on the shards, for their user;
    `filtered`, what `keep` did to each source, in words; `image_rules`, IMAGE_RULES where there are images that they
    speak of, else None: a run cannot go on under others. Each of COLUMNS is an attribute too: a numpy
    array [samples], mapped from the file.
    Raises DataError where a shard cannot be read, or precomputed shards and shards of images are mixed.
    """

    image_offset: np.ndarray
    image_size: np.ndarray
    caption_offset: np.ndarray
    caption_size: np.ndarray
    caption_is_json: np.ndarray
    width: np.ndarray
    height: np.ndarray
    caption_length: np.ndarray
    label: np.ndarray
    text_offset: np.ndarray
    text_size: np.ndarray
    features_offset: np.ndarray
    features_size: np.ndarray
    precomputed: np.ndarray

    def __init__(
        self,
        shards: Sequence[Shard] | Sequence[IndexSource],
        cache: Path | None = None,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 (frozen)
        versions: Sequence[FileVersion] | None = None,
        keep: FilterConfig = FilterConfig(),  # noqa: B008 (frozen)
        rules: CaptionRules = CaptionRules(),  # noqa: B008 (a tuple)
    ) -> None:
        self._keep, self.caption_rules = keep, rules
        sources = [source for source in shards if isinstance(source, IndexSource)]
        sources = sources or [IndexSource([shard for shard in shards if not isinstance(shard, IndexSource)])]
        flat = [shard for source in sources for shard in source.shards]
        if first := versions is None:
            with ThreadPoolExecutor(_VERSION_THREADS) as threads:
                versions = list(threads.map(lambda shard: file_version(shard, retry), flat))
        if len(versions) != len(flat):
            raise DataError(
                f"data.shards: this process finds {len(flat)} shards and rank 0 {len(versions)}: give every process "
                "the same files"
            )
        self.paths = [shard if isinstance(shard, Remote) else shard.resolve() for shard in flat]
        self.names = [shard.name.removesuffix(".tar") for shard in flat]
        self.versions = list(versions)
        self.sources = [Source(len(source.shards), source.weight) for source in sources]

        with self._folder(sources, cache, retry) as folder:
            self._open(folder)
        for remark in self.remarks if first else ():
            logger.warning("data: %s", remark)
        self.dataset: Dataset | None = open_dataset(self.paths, retry) if self._precomputed else None

    def _open(self, folder: Path) -> None:
        self._packed = folder
        meta = json.loads((folder / "set.json").read_text())
        self.shard_sizes: list[int] = meta["shard_sizes"]
        self.fingerprint: str = meta["fingerprint"]
        self._precomputed: bool = meta["precomputed"]
        self.remarks: list[str] = meta["remarks"]
        self.filtered: list[str] = meta.get("filtered", [])
        self.image_rules: str | None = meta.get("image_rules")
        self._first = np.cumsum([0, *self.shard_sizes])
        self._files = {name: os.open(folder / f"{name}.bin", os.O_RDONLY) for name in ("rows", "keys", "captions")}
        weakref.finalize(self, _close, list(self._files.values()))

    @contextlib.contextmanager
    def _folder(self, sources: Sequence[IndexSource], cache: Path | None, retry: RetryPolicy) -> Iterator[Path]:
        """The folder of the packed index of these shards, made where it is missing."""
        identity = hashlib.sha256(f"{_PACKED_VERSION}\0".encode())
        for path, name, known in zip(self.paths, self.names, self.versions, strict=True):
            # Of a URL the version may be its size alone, which other files have as well.
            where = path.identity if isinstance(path, Remote) else name
            identity.update(f"{where}\0{known.version}\0".encode())
        for source in sources:
            captions = ", ".join(file_version(path).version for path in source.captions)
            identity.update(f"{len(source.shards)}\0{source.weight}\0{captions}\0".encode())
        if self.caption_rules != CaptionRules():
            identity.update(f"{self.caption_rules}".encode())
        if self._keep != FilterConfig():
            identity.update(f"{self._keep}".encode())
        packed = cache / identity.hexdigest()[:32] if cache else None
        if packed is not None and not _is_whole(packed):
            try:
                packed.parent.mkdir(parents=True, exist_ok=True)
                # A machine's processes come all at once.
                with open_plain(packed.with_suffix(".lock"), "a") as lock_file:
                    lock(lock_file)
                    if not _is_whole(packed):
                        if packed.is_dir():
                            logger.warning("the packed index %s is damaged: it is made anew", packed)
                            shutil.rmtree(packed)
                        with folder_once(packed) as temporary:
                            self._pack(sources, temporary, cache, retry)
            except OSError as error:
                logger.warning("the index is packed anew each time: data.index_cache %s: %s", cache, error.strerror)
        if packed is not None and packed.is_dir():
            yield packed
        else:
            # Files that are open outlive their names.
            with tempfile.TemporaryDirectory(prefix="mudit-index-") as unnamed:
                self._pack(sources, Path(unnamed), cache, retry)
                yield Path(unnamed)

    def _pack(self, sources: Sequence[IndexSource], folder: Path, cache: Path | None, retry: RetryPolicy) -> None:
        """Write rows.bin, keys.bin, captions.bin and set.json, with the index of one shard in memory at a time."""
        sizes: list[int] = []
        digests, remarks, filtered = [], [], []
        kinds: dict[bool, str] = {}  # {precomputed or not: the last such shard}
        with (
            open(folder / "rows.bin", "wb") as rows,
            open(folder / "keys.bin", "wb") as keys,
            open(folder / "captions.bin", "w+b") as texts,
        ):
            for source in sources:
                filter = Filter(self._keep, *_where(source))
                captions = None
                if source.captions:
                    captions = CaptionFile(source.captions, texts, filter.columns, self.caption_rules)
                digest = hashlib.sha256()
                for shard in source.shards:
                    number = len(sizes)
                    fields = self.caption_rules.fields
                    found = load_index(shard, cache, retry, known_version=self.versions[number], fields=fields)
                    packed, names = _pack_rows(found, keys.tell(), captions, filter)
                    remarks.append((found.path.name, found.remarks))
                    if len(packed):
                        kinds[bool(packed["precomputed"].any())] = self.names[number]
                    if len(kinds) > 1:
                        raise DataError(
                            f"shard {kinds[True]} holds precomputed latents and shard {kinds[False]} images: train on "
                            "one kind, name the other in another run"
                        )
                    sizes.append(len(packed))
                    rows.write(packed.tobytes())
                    keys.write("".join(names).encode())
                    _add_to_fingerprint(digest, self.names[number], names, packed)
                filter.check()
                if not sum(sizes[-len(source.shards) :]):
                    raise DataError(
                        f"no shard of {source.shards[0]}{', ...' * (len(source.shards) > 1)} holds a sample: "
                        f"{'; '.join(told(remarks[-len(source.shards) :]))}; build shards with launch/shard.py"
                    )
                digests.append(digest.hexdigest())
                filtered.append(described(filter.left_out, filter.read))
        fingerprint = digests[0]
        if len(sources) > 1:
            weighted = [f"{source.weight!r} {digest}" for source, digest in zip(sources, digests, strict=True)]
            fingerprint = hashlib.sha256("\n".join(weighted).encode()).hexdigest()
        files = {name: file_digest(folder / name) for name in _FILES}
        meta = {"shard_sizes": sizes, "fingerprint": fingerprint, "precomputed": True in kinds, "files": files}
        meta["remarks"] = told(remarks)
        if any(kind in found for _, found in remarks for kind in (CONVERTED, TURNED)):
            meta["image_rules"] = IMAGE_RULES
        if self._keep != FilterConfig():
            meta["filtered"] = filtered
        (folder / "set.json").write_text(json.dumps({**meta, "digest": json_digest(meta)}))

    def __len__(self) -> int:
        """Samples in all shards."""
        return int(self._first[-1])

    @cached_property
    def _rows(self) -> np.ndarray:
        """ROW [samples], mapped from the file."""
        if not len(self):
            return np.empty(0, ROW)
        with open(self._files["rows"], "rb", closefd=False) as file:
            return np.memmap(file, ROW, mode="r", shape=(len(self),))

    def __getattr__(self, name: str) -> Any:
        if name in COLUMNS:
            return self._rows[name]
        raise AttributeError(name)

    def stored_array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that follows from the index. It is made once and stored beside the packed index, from where all
        processes of a machine map it. Where the index is not stored, or the array cannot be, each process makes its
        own.
        """
        path = self._packed / f"{name}.npy"
        known = path.with_suffix(".sha256")
        with contextlib.suppress(OSError, ValueError):
            if path.is_file() and known.read_text() == file_digest(path):
                return np.load(path, mmap_mode="r")
        array = make()
        with contextlib.suppress(OSError):
            if self._packed.is_dir():
                with temporary_beside(path) as temporary:
                    with open(temporary, "wb") as file:
                        np.save(file, array)
                    digest = file_digest(temporary)
                with temporary_beside(known) as temporary:
                    temporary.write_text(digest)
                return np.load(path, mmap_mode="r")
        return array

    def samples_until_first_end(self) -> int:
        """How many samples of all sources, in the shares of their weights, a run reads before the first source has come
        to its end."""
        total, first, ends = sum(source.weight for source in self.sources), 0, []
        for source in self.sources:
            ends.append(int(sum(self.shard_sizes[first : first + source.shards]) * (total / source.weight)))
            first += source.shards
        return min(ends)

    def row(self, shard: int, sample: int) -> int:
        """The row of a shard's sample in the columns."""
        return int(self._first[shard]) + sample

    def locate(self, row: int) -> tuple[int, int]:
        """(shard, sample) of a row of the columns."""
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        return shard, row - int(self._first[shard])

    def rows(self, shard: int, samples: np.ndarray) -> np.ndarray:
        """ROW [n] of n neighbouring samples of a shard. They are read: mapped pages would count as memory."""
        first = int(samples.min())
        count = int(samples.max()) - first + 1
        data = os.pread(self._files["rows"], count * ROW.itemsize, self.row(shard, first) * ROW.itemsize)
        return np.frombuffer(data, ROW)[samples - first]

    def key(self, row: np.void) -> str:
        """The key of a sample, by its ROW."""
        return os.pread(self._files["keys"], int(row["key_size"]), int(row["key_offset"])).decode()

    def caption_beside(self, row: np.void) -> bytes:
        """The caption of a sample whose caption lies beside the shards, by its ROW."""
        return os.pread(self._files["captions"], int(row["caption_size"]), int(row["caption_offset"]))

    def name(self, shard: int, sample: int) -> str:
        """ "shard/key" of a sample."""
        return f"{self.names[shard]}/{self.key(self.rows(shard, np.array([sample]))[0])}"


def _is_whole(folder: Path) -> bool:
    """Whether a packed index is there and undamaged. Once its files were compared with their checksums they are not
    read again, as long as their sizes and times of change stay what they were."""
    seen = folder / "verified.json"
    try:
        meta = json.loads((folder / "set.json").read_bytes())
        if meta.pop("digest") != json_digest(meta):
            return False
        times = {name: [(stat := (folder / name).stat()).st_size, stat.st_mtime_ns] for name in _FILES}
        with contextlib.suppress(OSError, ValueError):
            if json.loads(seen.read_bytes()) == times:
                return True
        if any(file_digest(folder / name) != meta["files"][name] for name in _FILES):
            return False
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
    with contextlib.suppress(OSError), temporary_beside(seen) as temporary:
        temporary.write_text(json.dumps(times))
    return True


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _where(source: IndexSource) -> tuple[str, str]:
    """(a source, what holds the numbers of its samples), for messages."""
    shards = [str(shard) for shard in source.shards[:1]] + ["..."] * (len(source.shards) > 1)
    return ", ".join(shards), f"the captions {source.captions[0]}" if source.captions else "its .json member"


def _pack_rows(
    index: ShardIndex, keys_before: int, captions: CaptionFile | None, filter: Filter
) -> tuple[np.ndarray, list[str]]:
    """(ROW [n], n keys) of the samples of a shard that the filter keeps. keys_before: bytes of the keys of all shards
    before it."""
    table = index.table
    names: list[str] = table.column("key").to_pylist()
    packed = np.zeros(len(names), ROW)
    for column in COLUMNS:
        values = table.column(column).to_numpy()
        # A size that does not fit into 32 bits becomes the largest one, which is refused as well (MAX_MEMBER_BYTES).
        packed[column] = np.minimum(values, np.iinfo(np.int32).max) if column.endswith("_size") else values
    if captions is None:
        scores = scores_of(table.column("numbers").to_pylist() if filter.columns else [""] * len(names), filter.columns)
    else:
        found = captions.find(names)
        packed["caption_offset"], packed["caption_size"] = found["offset"], found["size"]
        packed["caption_length"], packed["caption_is_json"] = found["length"], found["is_json"]
        packed["caption_beside"], scores = True, found["scores"]
    kept = filter.keep(packed, scores)
    packed, names = packed[kept], [name for name, one in zip(names, kept, strict=True) if one]
    packed["key_size"] = [len(name.encode()) for name in names]
    packed["key_offset"] = keys_before + np.cumsum(packed["key_size"]) - packed["key_size"]
    return packed, names


def _add_to_fingerprint(digest: Any, name: str, keys: Sequence[str], packed: np.ndarray) -> None:
    if not keys:  # a shard without samples may come and go
        return
    digest.update(f"{name}\0{len(keys)}\0".encode())
    digest.update("\0".join(keys).encode())
    sizes = ["image_size", "caption_size", *(["text_size"] if packed["precomputed"].any() else [])]
    for column in sizes:
        digest.update(packed[column].astype("<i8").tobytes())
    labels = packed["label"].astype("<i8")
    if (labels != ABSENT).any():  # shards without labels keep the fingerprint that runs have stored
        digest.update(labels.tobytes())


def open_sources(cfg: DataConfig) -> list[IndexSource]:
    """The sources of a config's training data. Raises DataError where a file is missing."""
    key = "data.sources" if cfg.sources else "data.shards"
    return [
        IndexSource(open_shards(s.shards, key), open_captions(s.captions) if s.captions else (), s.weight)
        for s in cfg.all_sources()
    ]


def open_index(cfg: DataConfig, versions: Sequence[FileVersion] | None = None) -> ImageTextIndex:
    """The index of a config's training data. versions: as of ImageTextIndex. DataError where a shard is missing."""
    retry = RetryPolicy(cfg.timeout_s, cfg.retries)
    return ImageTextIndex(open_sources(cfg), Path(cfg.index_cache), retry, versions, cfg.filter, _rules(cfg))


def open_validation_index(cfg: DataConfig, versions: Sequence[FileVersion] | None = None) -> ImageTextIndex:
    """The index of data.val_shards. versions: as of ImageTextIndex. Raises DataError where a shard is missing."""
    assert cfg.val_shards is not None
    captions = open_captions(cfg.captions) if cfg.captions else ()
    source = IndexSource(open_shards(cfg.val_shards, "data.val_shards"), captions)
    retry = RetryPolicy(cfg.timeout_s, cfg.retries)
    return ImageTextIndex([source], Path(cfg.index_cache), retry, versions, cfg.filter, _rules(cfg))


def _rules(cfg: DataConfig) -> CaptionRules:
    return CaptionRules(cfg.caption_fields, cfg.caption_key)
