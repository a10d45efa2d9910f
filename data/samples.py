"""Samples of an index before they are decoded: their bytes, captions and labels.

Bytes of local files are read when the sample is used; bytes behind URLs are fetched ahead of that, a chunk at a time.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .cache import BlockCache
from .captions import CaptionChoice, captions_from_bytes
from .config import DataConfig
from .errors import SampleError, StoreError
from .index import ImageTextIndex
from .order import END_OF_DATA, Chunk
from .shard_index import ABSENT, MAX_MEMBER_BYTES, UNREADABLE
from .storage import Remote, RetryPolicy, read_remote

MAX_GAP = 512 << 10  # bytes between two members that are rather read for nothing than skipped by a request of their own
MAX_SPAN = 64 << 20  # bytes of one request
_MOST_BYTES = {"caption": 16 << 20}  # of a member; JSON takes ten times as much memory when it is parsed
_THREADS = 16  # reads at the same time in each process
_MAX_OPEN_FILES = 128  # far below the usual limit of 1024 descriptors per process


class RawSample(NamedTuple):
    """One sample before it is decoded: its shard's number, its row of the index, and functions that read from its
    shard.

    read: (offset, size) -> bytes. fill: reads from an offset into a whole buffer without a copy; None where the bytes
    do not come from a local file.
    """

    shard: int
    row: np.void
    read: Callable[[int, int], bytes]
    fill: Callable[[int, memoryview], None] | None = None

    def read_into(self, offset: int, target: np.ndarray) -> None:
        """Fill a contiguous array with the bytes at an offset. Raises SampleError where there are too few."""
        buffer = target.reshape(-1).view(np.uint8).data
        if self.fill is not None:
            self.fill(offset, buffer)
            return
        data = self.read(offset, len(buffer))
        if len(data) != len(buffer):
            raise SampleError("shard: short read")
        buffer[:] = data

    def member(self, kind: str) -> bytes:
        """The bytes of the sample's "image" or "caption". Raises SampleError where it has none."""
        offset, size = int(self.row[f"{kind}_offset"]), int(self.row[f"{kind}_size"])
        if offset == ABSENT:
            raise SampleError(f"{kind}: missing")
        if size > _MOST_BYTES.get(kind, MAX_MEMBER_BYTES):
            raise SampleError("shard: member too large")
        return self.read(offset, size)

    def label(self, classes: int | None) -> int:
        """The sample's class, ABSENT where it has none. Raises SampleError where a model of `classes` classes cannot
        use it; without classes nothing is checked."""
        label = int(self.row["label"])
        if classes is None:
            return max(label, ABSENT)
        if label == ABSENT:
            raise SampleError("label: missing")
        if label == UNREADABLE:
            raise SampleError("label: not a number")
        if label >= classes:
            raise SampleError(f"label: not below model.num_classes {classes}")
        return label


def captions_of(index: ImageTextIndex, sample: RawSample) -> CaptionChoice:
    """The captions of a sample, from its own member or from the file beside the shards. Raises SampleError where there
    are none."""
    if sample.row["caption_beside"] and sample.row["caption_offset"] != ABSENT:
        return captions_from_bytes(index.caption_beside(sample.row), bool(sample.row["caption_is_json"]))
    fields = index.caption_rules.fields
    return captions_from_bytes(sample.member("caption"), bool(sample.row["caption_is_json"]), fields)


class _Threads:
    """Daemon threads that work off a queue in order. They are daemons so that a server that hangs holds up no exit."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[bytes], Callable[[], bytes]]] = queue.SimpleQueue()
        for _ in range(_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            future, work = self._queue.get()
            try:
                future.set_result(work())
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)
            del future, work  # else this thread keeps the bytes until its next task

    def submit(self, work: Callable[[], bytes]) -> Future[bytes]:
        future: Future[bytes] = Future()
        self._queue.put((future, work))
        return future


@lru_cache(maxsize=1)
def _threads_of(process: int) -> _Threads:
    """The threads of this process; a fork has none of its parent's."""
    return _Threads()


class _LocalFiles:
    """Open shards of this process, least recently used closed first."""

    def __init__(self, paths: Sequence[Path | Remote]) -> None:
        self._paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def descriptor(self, shard: int) -> int:
        """The descriptor of a shard, opened if need be. Raises StoreError where it cannot be."""
        if shard not in self._open:
            try:
                self._open[shard] = os.open(str(self._paths[shard]), os.O_RDONLY)
            except OSError as error:
                raise StoreError("store: cannot be opened") from error
            if len(self._open) > _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return self._open[shard]

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard. Raises SampleError where the shard or the bytes are gone."""
        try:
            data = os.pread(self.descriptor(shard), size, offset)
        except OSError as error:
            raise StoreError("store: read error") from error
        if len(data) != size:
            raise SampleError("shard: short read")
        return data

    def fill(self, shard: int, offset: int, buffer: memoryview) -> None:
        """As `read`, into a buffer."""
        try:
            size = os.preadv(self.descriptor(shard), [buffer], offset)
        except OSError as error:
            raise StoreError("store: read error") from error
        if size != len(buffer):
            raise SampleError("shard: short read")

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class SampleFiles:
    """Reads samples of an index. Each process has one; it may be made before a fork and used after it.

    images_only: captions are not read. features: features of precomputed samples are read.
    """

    def __init__(self, index: ImageTextIndex, cfg: DataConfig, images_only: bool, features: bool = False) -> None:
        self._index, self._images_only = index, images_only
        self._members = ("image", "caption", "text", *(("features",) if features else ()))
        self._retry = RetryPolicy(cfg.timeout_s, cfg.retries)
        self._budget = cfg.prefetch_mib << 20
        self._local = _LocalFiles(index.paths)
        self._cache = BlockCache(Path(cfg.cache_dir), int(cfg.cache_gib * 2**30)) if cfg.cache_dir else None

    def sample(self, shard: int, sample: int) -> RawSample:
        """One sample, whose bytes are read when it is used."""
        row = self._index.rows(shard, np.array([sample]))[0]
        return RawSample(shard, row, lambda offset, size: self._read(shard, offset, size))

    def streams(self, queues: Sequence[Iterator[Chunk]], sets: int = 1) -> list[Iterator[RawSample | None]]:
        """For each slot's queue of chunks the stream of its samples, None for each one past the end of the data.

        Bytes behind URLs are read ahead, a part of the queue at a time. A part is a chunk, or as many of its samples as
        memory allows: each slot holds at most two parts, the one that is in use and the next one, and the parts of all
        slots together stay within data.prefetch_mib.
        sets: how many such lists of streams the process will have (one per bucket), which share that memory.
        """
        most = self._budget // (2 * len(queues) * sets) if queues else 0
        parts = [self._parts(queue, most) for queue in queues]
        # The first parts of all slots are requested before any is waited for. They are a single sample each, so that
        # training starts soon.
        ahead = [deque([next(part)]) for part in parts]
        return [self._stream(slot, part) for slot, part in zip(ahead, parts, strict=True)]

    @staticmethod
    def _stream(
        ahead: deque[list[RawSample | None]], parts: Iterator[list[RawSample | None]]
    ) -> Iterator[RawSample | None]:
        """The samples of a slot. ahead: its part that was requested already."""
        while True:
            ahead.append(next(parts))  # requested while the part before it is used
            samples = ahead.popleft()
            samples.reverse()
            while samples:
                yield samples.pop()  # so that no used sample keeps the bytes of its part in memory

    def _parts(self, chunks: Iterator[Chunk], most: int) -> Iterator[list[RawSample | None]]:
        """The samples of a queue in parts; bytes behind URLs are requested when a part is handed out. most: bytes of a
        part, which holds at least one sample."""
        first = True
        for shard, samples, _ in chunks:
            if shard == END_OF_DATA:
                yield [None] * len(samples)
                continue
            rows = self._index.rows(shard, samples)
            offsets, sizes, used = self._ranges(rows)
            if not isinstance(self._index.paths[shard], Remote):
                self._advise_kernel(shard, _spans(offsets[used], sizes[used]))
                # One pair of functions for the whole chunk: making them is most of what a small sample costs.
                read, fill = partial(self._local.read, shard), partial(self._local.fill, shard)
                yield [RawSample(shard, row, read, fill) for row in rows]
                continue
            ends = np.cumsum((sizes * used).sum(axis=1))  # bytes up to the end of each sample
            start = 0
            while start < len(rows):
                before = int(ends[start - 1]) if start else 0
                fitting = int(np.searchsorted(ends, before + most, side="right"))
                end = start + 1 if first else max(start + 1, fitting)
                first = False
                part = used[start:end]
                spans = _spans(offsets[start:end][part], sizes[start:end][part])
                yield self._remote_part(shard, rows[start:end], spans)
                start = end

    def _advise_kernel(self, shard: int, spans: Sequence[tuple[int, int]]) -> None:
        """Have the kernel read a local chunk into its page cache."""
        try:
            for start, end in spans:
                os.posix_fadvise(self._local.descriptor(shard), start, end - start, os.POSIX_FADV_WILLNEED)
        except (SampleError, OSError):
            pass  # the shard is gone: its samples become holes when they are read

    def _remote_part(self, shard: int, rows: np.ndarray, spans: Sequence[tuple[int, int]]) -> list[RawSample | None]:
        """Samples of a remote shard, whose bytes are requested here and waited for when they are read."""
        threads = _threads_of(os.getpid())
        starts = np.array([start for start, _ in spans])
        futures = [threads.submit(lambda s=s, e=e: self._fetch(shard, s, e)) for s, e in spans]

        def read(offset: int, size: int) -> bytes:
            at = int(np.searchsorted(starts, offset, side="right")) - 1
            begin = offset - spans[at][0]
            return futures[at].result()[begin : begin + size]

        return [RawSample(shard, row, read) for row in rows]

    def _ranges(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(offsets, sizes, used) of the members image, caption, text and, if they are read, features in the tar.

        rows: ROW [n]. offsets and sizes: int64 [n, members] bytes. used: bool [n, members], whether the member is read:
        not where the sample lacks it or does not need it, nor where it claims too many bytes.
        """
        offsets, sizes = (
            np.stack([rows[f"{member}_{column}"] for member in self._members], axis=1) for column in ("offset", "size")
        )
        used = (offsets != ABSENT) & (sizes <= [_MOST_BYTES.get(member, MAX_MEMBER_BYTES) for member in self._members])
        used[:, 1] &= rows["precomputed"] | ~(rows["caption_beside"] | self._images_only)
        return offsets, sizes, used

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if isinstance(self._index.paths[shard], Remote):
            return self._fetch(shard, offset, offset + size)
        return self._local.read(shard, offset, size)

    def _fetch(self, shard: int, start: int, end: int) -> bytes:
        """Bytes start ... end of a remote shard, through the cache where there is one."""
        remote = self._index.paths[shard]
        assert isinstance(remote, Remote)

        def fetch(first: int, last: int) -> bytes:
            return read_remote(remote.url, first, last, self._retry, first)

        if self._cache is None:
            return fetch(start, end)
        known = self._index.versions[shard]
        name = f"{remote.identity}\0{known.version}"
        return self._cache.read(name, start, end, known.size, fetch)


def _spans(offsets: np.ndarray, sizes: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of the reads that cover ranges of bytes: one for neighbours within MAX_GAP, of MAX_SPAN at most."""
    spans: list[tuple[int, int]] = []
    order = np.argsort(offsets)
    for start, end in zip(offsets[order].tolist(), (offsets + sizes)[order].tolist(), strict=True):
        if spans and start - spans[-1][1] <= MAX_GAP and end - spans[-1][0] <= MAX_SPAN:
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((start, end))
    return spans
