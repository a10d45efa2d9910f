"""Index over all samples of the sources, packed in files that every process of a machine reads.

Nothing of it but names and sizes of shards is held in memory: a row is read when its sample is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .caption_files import Captions
from .config import DataConfig
from .errors import DataError
from .files import folder_once, temporary_beside
from .order import Part
from .precomputed_format import Dataset, open_dataset
from .shard_index import ABSENT, ShardIndex, load_index
from .storage import FileVersion, Remote, RetryPolicy, Shard, open_shards, stamp

logger = logging.getLogger(__name__)

_PACKED_VERSION = 3
_STAMP_THREADS = 32  # a store answers in tens of milliseconds, a set has thousands of shards
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
        ("caption_beside", "?"),  # offset and size are those in captions.bin, not in the tar
    ]
)


class IndexSource:
    """Shards of one source, the file with their captions (None where the shards hold them), and the source's weight."""

    def __init__(self, shards: Sequence[Shard], captions: Path | None = None, weight: float = 1.0) -> None:
        self.shards, self.captions, self.weight = list(shards), captions, weight


class ImageTextIndex:
    """Index over all samples of a list of shards, in shard order.

    shards: tar paths or URLs, or several sources of them. cache: folder for the packed index; None uses an unnamed
    one that is gone with the process. stamps: the shards', where another process has asked for them; None asks.
    `names` are the shards' names without .tar; `shard_sizes` counts samples; `parts` tells the sources for the order;
    `fingerprint` identifies the data: names, keys, sizes and weights, not the folder. `dataset` tells what precomputed
    shards were made with, None of images. The columns of all samples are attributes, numpy arrays mapped from the file.
    Raises DataError where precomputed shards and others are mixed.
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
        patience: RetryPolicy = RetryPolicy(),  # noqa: B008 (frozen)
        stamps: Sequence[FileVersion] | None = None,
    ) -> None:
        sources = [source for source in shards if isinstance(source, IndexSource)]
        sources = sources or [IndexSource([shard for shard in shards if not isinstance(shard, IndexSource)])]
        flat = [shard for source in sources for shard in source.shards]
        if stamps is None:
            with ThreadPoolExecutor(_STAMP_THREADS) as threads:
                stamps = list(threads.map(lambda shard: stamp(shard, patience), flat))
        if len(stamps) != len(flat):
            raise DataError(
                f"data.shards: this process finds {len(flat)} shards and rank 0 {len(stamps)}: give every process "
                "the same files"
            )
        self.paths = [shard if isinstance(shard, Remote) else shard.resolve() for shard in flat]
        self.names = [shard.name.removesuffix(".tar") for shard in flat]
        self.stamps = list(stamps)
        self.parts = [Part(len(source.shards), source.weight) for source in sources]

        with self._folder(sources, cache, patience) as folder:
            self._open(folder)
        self.dataset: Dataset | None = open_dataset(self.paths, patience) if self._precomputed else None

    def _open(self, folder: Path) -> None:
        self._packed = folder
        meta = json.loads((folder / "set.json").read_text())
        self.shard_sizes: list[int] = meta["shard_sizes"]
        self.fingerprint: str = meta["fingerprint"]
        self._precomputed: bool = meta["precomputed"]
        self._first = np.cumsum([0, *self.shard_sizes])
        self._files = {name: os.open(folder / f"{name}.bin", os.O_RDONLY) for name in ("rows", "keys", "captions")}
        weakref.finalize(self, _close, list(self._files.values()))

    @contextlib.contextmanager
    def _folder(self, sources: Sequence[IndexSource], cache: Path | None, patience: RetryPolicy) -> Iterator[Path]:
        """The folder of the packed index of these shards, made where it is missing."""
        identity = hashlib.sha256(f"{_PACKED_VERSION}\0".encode())
        for name, known in zip(self.names, self.stamps, strict=True):
            identity.update(f"{name}\0{known.version}\0".encode())
        for source in sources:
            captions = stamp(source.captions).version if source.captions else ""
            identity.update(f"{len(source.shards)}\0{source.weight}\0{captions}\0".encode())
        packed = cache / identity.hexdigest()[:32] if cache else None
        if packed is not None and not packed.is_dir():
            try:
                packed.parent.mkdir(parents=True, exist_ok=True)
                with open(packed.with_suffix(".lock"), "w") as lock:  # the processes of a machine come all at once
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not packed.is_dir():
                        with folder_once(packed) as temporary:
                            self._pack(sources, temporary, cache, patience)
            except OSError as error:
                logger.warning("the index is packed anew each time: data.index_cache %s: %s", cache, error.strerror)
        if packed is not None and packed.is_dir():
            yield packed
        else:
            with tempfile.TemporaryDirectory(prefix="mudit-index-") as unnamed:  # open files outlive their names
                self._pack(sources, Path(unnamed), cache, patience)
                yield Path(unnamed)

    def _pack(self, sources: Sequence[IndexSource], folder: Path, cache: Path | None, patience: RetryPolicy) -> None:
        """Write rows.bin, keys.bin, captions.bin and set.json; one shard's index in memory at a time."""
        sizes: list[int] = []
        digests = []
        kinds: dict[bool, str] = {}  # the last shard of each
        with (
            open(folder / "rows.bin", "wb") as rows,
            open(folder / "keys.bin", "wb") as keys,
            open(folder / "captions.bin", "wb") as texts,
        ):
            for source in sources:
                captions = Captions(source.captions, texts) if source.captions else None
                digest = hashlib.sha256()
                for shard in source.shards:
                    number = len(sizes)
                    found = load_index(shard, cache, patience, known_stamp=self.stamps[number])
                    packed, names = _pack_rows(found, keys.tell(), captions)
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
                digests.append(digest.hexdigest())
        fingerprint = digests[0]
        if len(sources) > 1:
            weighted = [f"{source.weight!r} {digest}" for source, digest in zip(sources, digests, strict=True)]
            fingerprint = hashlib.sha256("\n".join(weighted).encode()).hexdigest()
        meta = {"shard_sizes": sizes, "fingerprint": fingerprint, "precomputed": True in kinds}
        (folder / "set.json").write_text(json.dumps(meta))

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

    def kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that follows from the index: made once, and mapped by all processes of a machine from a file beside
        the packed index. Where that is not kept, or cannot be written, each process holds its own."""
        path = self._packed / f"{name}.npy"
        with contextlib.suppress(OSError):
            if self._packed.is_dir() and not path.is_file():
                with temporary_beside(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, make())
            return np.load(path, mmap_mode="r")
        return make()

    def samples_until_first_end(self) -> int:
        """Samples that a run reads in the right shares until the first source has come to its end."""
        total, first, ends = sum(part.weight for part in self.parts), 0, []
        for part in self.parts:
            ends.append(int(sum(self.shard_sizes[first : first + part.shards]) * (total / part.weight)))
            first += part.shards
        return min(ends)

    def row(self, shard: int, sample: int) -> int:
        """Row of a shard's sample in the flat arrays."""
        return int(self._first[shard]) + sample

    def locate(self, row: int) -> tuple[int, int]:
        """(shard, sample) of a row."""
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        return shard, row - int(self._first[shard])

    def rows(self, shard: int, samples: np.ndarray) -> np.ndarray:
        """ROW [n] of n neighbouring samples of a shard, read from the file: mapped pages would count as memory."""
        first = int(samples.min())
        count = int(samples.max()) - first + 1
        data = os.pread(self._files["rows"], count * ROW.itemsize, self.row(shard, first) * ROW.itemsize)
        return np.frombuffer(data, ROW)[samples - first]

    def key(self, row: np.void) -> str:
        """Key of a row."""
        return os.pread(self._files["keys"], int(row["key_size"]), int(row["key_offset"])).decode()

    def caption_beside(self, row: np.void) -> bytes:
        """Text of a row whose caption lies beside the shards."""
        return os.pread(self._files["captions"], int(row["caption_size"]), int(row["caption_offset"]))

    def name(self, shard: int, sample: int) -> str:
        """ "shard/key" of a sample."""
        return f"{self.names[shard]}/{self.key(self.rows(shard, np.array([sample]))[0])}"


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _pack_rows(index: ShardIndex, keys_before: int, captions: Captions | None) -> tuple[np.ndarray, list[str]]:
    """ROW of each sample of a shard, and the keys. keys_before: bytes of keys of the shards before."""
    table = index.table
    names: list[str] = table.column("key").to_pylist()
    packed = np.zeros(len(names), ROW)
    for column in COLUMNS:
        values = table.column(column).to_numpy()
        # A size that does not fit is cut to one that is refused as well (MAX_MEMBER_BYTES).
        packed[column] = np.minimum(values, np.iinfo(np.int32).max) if column.endswith("_size") else values
    packed["key_size"] = [len(name.encode()) for name in names]
    packed["key_offset"] = keys_before + np.cumsum(packed["key_size"]) - packed["key_size"]
    if captions is not None:
        found = captions.find(names)
        packed["caption_offset"], packed["caption_size"] = found["offset"], found["size"]
        packed["caption_length"] = found["length"]
        packed["caption_is_json"], packed["caption_beside"] = False, True
    return packed, names


def _add_to_fingerprint(digest: Any, name: str, keys: Sequence[str], packed: np.ndarray) -> None:
    digest.update(f"{name}\0{len(keys)}\0".encode())
    digest.update("\0".join(keys).encode())
    sizes = ["image_size", "caption_size", *(["text_size"] if packed["precomputed"].any() else [])]
    for column in sizes:
        digest.update(packed[column].astype("<i8").tobytes())
    labels = packed["label"].astype("<i8")
    if (labels != ABSENT).any():  # shards without labels keep the fingerprint that runs have stored
        digest.update(labels.tobytes())


def open_index(cfg: DataConfig, stamps: Sequence[FileVersion] | None = None) -> ImageTextIndex:
    """The index of a config's training data; stamps as of ImageTextIndex. Raises DataError where a shard is missing."""
    key = "data.sources" if cfg.sources else "data.shards"
    sources = [IndexSource(open_shards(s.shards, key), _captions(s.captions), s.weight) for s in cfg.all_sources()]
    return ImageTextIndex(sources, Path(cfg.index_cache), RetryPolicy(cfg.timeout_s, cfg.retries), stamps)


def open_validation_index(cfg: DataConfig, stamps: Sequence[FileVersion] | None = None) -> ImageTextIndex:
    """The index of data.val_shards; stamps as of ImageTextIndex."""
    assert cfg.val_shards is not None
    source = IndexSource(open_shards(cfg.val_shards, "data.val_shards"), _captions(cfg.captions))
    return ImageTextIndex([source], Path(cfg.index_cache), RetryPolicy(cfg.timeout_s, cfg.retries), stamps)


def _captions(path: str | None) -> Path | None:
    if path is None:
        return None
    if not Path(path).expanduser().is_file():
        raise DataError(f"captions {path}: there is no such file")
    return Path(path).expanduser()
