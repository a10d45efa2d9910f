"""Bytes of samples: local files are read when a sample is, URLs ahead of it, a chunk at a time."""

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
from .config import DataConfig
from .errors import SampleError, StoreError
from .index import ImageTextIndex
from .order import END_OF_DATA, Run
from .shard_index import ABSENT, MAX_MEMBER_BYTES
from .storage import Remote, RetryPolicy, read_remote

MAX_GAP = 512 << 10  # bytes that are read for nothing rather than in another request
MAX_SPAN = 64 << 20  # bytes of one request
_THREADS = 16  # reads at the same time in a process
_MAX_OPEN_FILES = 128  # far below the usual limit of 1024 descriptors a process


class Raw(NamedTuple):
    """One sample before it is decoded: its row of the index, and how to read bytes (offset, size) of its shard.

    fill: reads from an offset into a whole buffer, without a copy; None where the bytes come from elsewhere.
    """

    shard: int
    row: np.void
    read: Callable[[int, int], bytes]
    fill: Callable[[int, memoryview], None] | None = None

    def read_into(self, offset: int, target: np.ndarray) -> None:
        """Fill a contiguous array with the bytes at an offset; SampleError where there are too few."""
        buffer = target.reshape(-1).view(np.uint8).data
        if self.fill is not None:
            self.fill(offset, buffer)
            return
        data = self.read(offset, len(buffer))
        if len(data) != len(buffer):
            raise SampleError("shard: short read")
        buffer[:] = data


class _Threads:
    """Daemon threads that do what is put in a queue, in order: a server that hangs holds up no exit."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[bytes], Callable[[], bytes]]] = queue.SimpleQueue()
        for _ in range(_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            future, work = self._queue.get()
            try:
                future.set_result(work())
            except BaseException as error:  # it is raised where the result is asked for
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
        """An open shard; SampleError where it is gone."""
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
        """Bytes of a shard; SampleError where shard or bytes are gone."""
        try:
            data = os.pread(self.descriptor(shard), size, offset)
        except OSError as error:
            raise StoreError("store: read error") from error
        if len(data) != size:
            raise SampleError("shard: short read")
        return data

    def fill(self, shard: int, offset: int, buffer: memoryview) -> None:
        """As read, into a buffer."""
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
    """Reads samples of an index. One a process; made before a fork, used after it."""

    def __init__(self, index: ImageTextIndex, cfg: DataConfig, images_only: bool, features: bool = False) -> None:
        self._index, self._images_only = index, images_only
        self._members = ("image", "caption", "text", *(("features",) if features else ()))
        self._retry = RetryPolicy(cfg.timeout_s, cfg.retries)
        self._budget = cfg.prefetch_mib << 20
        self._local = _LocalFiles(index.paths)
        self._cache = BlockCache(Path(cfg.cache_dir), int(cfg.cache_gib * 2**30)) if cfg.cache_dir else None

    def sample(self, shard: int, sample: int) -> Raw:
        """One sample, read when it is used."""
        row = self._index.rows(shard, np.array([sample]))[0]
        return Raw(shard, row, lambda offset, size: self._read(shard, offset, size))

    def streams(self, queues: Sequence[Iterator[Run]], sets: int = 1) -> list[Iterator[Raw | None]]:
        """The samples of each slot's queue, None past the end of the data; bytes behind URLs are read ahead.

        A slot holds the bytes of two parts at most, the one that is used and the next; a part is a chunk, or as much
        of it as keeps all slots within data.prefetch_mib. sets: how many such lists of streams there will be.
        """
        most = self._budget // (2 * len(queues) * sets) if queues else 0
        parts = [self._parts(queue, most) for queue in queues]
        # All slots' first parts are on their way before one is waited for; they are short, so that training starts.
        ahead = [deque([next(part)]) for part in parts]
        return [self._stream(slot, part) for slot, part in zip(ahead, parts, strict=True)]

    @staticmethod
    def _stream(ahead: deque[list[Raw | None]], parts: Iterator[list[Raw | None]]) -> Iterator[Raw | None]:
        while True:
            ahead.append(next(parts))
            samples = ahead.popleft()
            samples.reverse()
            while samples:
                yield samples.pop()  # so that nothing here holds the bytes of a part that is used up

    def _parts(self, runs: Iterator[Run], most: int) -> Iterator[list[Raw | None]]:
        """The samples of a queue in parts, each asked for when it is handed out. most: bytes of a part."""
        first = True
        for shard, samples in runs:
            if shard == END_OF_DATA:
                yield [None] * len(samples)
                continue
            rows = self._index.rows(shard, samples)
            offsets, sizes, used = self._ranges(rows)
            if not isinstance(self._index.paths[shard], Remote):
                self._tell_kernel(shard, _spans(offsets[used], sizes[used]))
                # One pair of functions for all of them: this is most of what a small sample costs.
                read, fill = partial(self._local.read, shard), partial(self._local.fill, shard)
                yield [Raw(shard, row, read, fill) for row in rows]
                continue
            ends = np.cumsum((sizes * used).sum(axis=1))
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

    def _tell_kernel(self, shard: int, spans: Sequence[tuple[int, int]]) -> None:
        """Have the kernel read a local chunk ahead."""
        try:
            for start, end in spans:
                os.posix_fadvise(self._local.descriptor(shard), start, end - start, os.POSIX_FADV_WILLNEED)
        except (SampleError, OSError):
            pass  # the shard is gone: its samples will be holes

    def _remote_part(self, shard: int, rows: np.ndarray, spans: Sequence[tuple[int, int]]) -> list[Raw | None]:
        """Samples whose bytes are on their way."""
        threads = _threads_of(os.getpid())
        starts = np.array([start for start, _ in spans])
        futures = [threads.submit(lambda s=s, e=e: self._fetch(shard, s, e)) for s, e in spans]

        def read(offset: int, size: int) -> bytes:
            at = int(np.searchsorted(starts, offset, side="right")) - 1
            begin = offset - spans[at][0]
            return futures[at].result()[begin : begin + size]

        return [Raw(shard, row, read) for row in rows]

    def _ranges(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Offsets, sizes (int64 [n, members]) of image, caption, text (features) in the tar, and which of them (bool
        [n, members]) are read: not what a sample lacks, does not need, or what claims too much."""
        offsets, sizes = (
            np.stack([rows[f"{member}_{column}"] for member in self._members], axis=1) for column in ("offset", "size")
        )
        used = (offsets != ABSENT) & (sizes <= MAX_MEMBER_BYTES)
        used[:, 1] &= rows["precomputed"] | ~(rows["caption_beside"] | self._images_only)
        return offsets, sizes, used

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if isinstance(self._index.paths[shard], Remote):
            return self._fetch(shard, offset, offset + size)
        return self._local.read(shard, offset, size)

    def _fetch(self, shard: int, start: int, end: int) -> bytes:
        """A range of a remote shard, through the cache where there is one."""
        remote = self._index.paths[shard]
        assert isinstance(remote, Remote)

        def fetch(first: int, last: int) -> bytes:
            return read_remote(remote.url, first, last, self._retry, first)

        if self._cache is None:
            return fetch(start, end)
        known = self._index.versions[shard]
        name = f"{remote.url.partition('?')[0]}\0{known.version}"
        return self._cache.read(name, start, end, known.size, fetch)


def _spans(offsets: np.ndarray, sizes: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of the reads that cover ranges of bytes: neighbours together, bounded."""
    spans: list[tuple[int, int]] = []
    order = np.argsort(offsets)
    for start, end in zip(offsets[order].tolist(), (offsets + sizes)[order].tolist(), strict=True):
        if spans and start - spans[-1][1] <= MAX_GAP and end - spans[-1][0] <= MAX_SPAN:
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((start, end))
    return spans
