"""Blocks of remote files kept in a local folder: bounded, safe with several processes, least recently used go first."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from .files import temporary_beside

BLOCK_BYTES = 8 << 20
_FULL, _AFTER = 7 / 8, 3 / 4  # of the limit: where removal starts, and where it ends
_CHECKS = 256  # a process looks at the folder after writing this part of the limit


class BlockCache:
    """Reads of remote files through a folder of blocks.

    limit: bytes that the folder holds at most, whatever the number of processes (up to 32) that write to it.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._written = limit  # the first write looks at what is there already

    def read(self, name: str, start: int, end: int, size: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Bytes start ... end of a file of `size` bytes; blocks that are not there are fetched and kept.

        name: identifies the file and its version. fetch: (start, end) -> bytes.
        """
        parts = []
        for first in range(start // BLOCK_BYTES * BLOCK_BYTES, end, BLOCK_BYTES):
            block = self._block(name, first, min(first + BLOCK_BYTES, size), fetch)
            parts.append(block[max(0, start - first) : end - first])
        return b"".join(parts)

    def _block(self, name: str, first: int, last: int, fetch: Callable[[int, int], bytes]) -> bytes:
        digest = hashlib.sha256(f"{name}\0{first}".encode()).hexdigest()
        path = self._folder / digest[:2] / digest
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if len(data) == last - first:
                os.utime(path)
                return data
        data = fetch(first, last)
        if len(data) == last - first:  # else the server was at fault: nothing to keep
            with contextlib.suppress(OSError), temporary_beside(path) as temporary:  # a full disk only costs time
                temporary.write_bytes(data)
            self._written += len(data)
            if self._written > self._limit / _CHECKS:
                self._written = 0
                self._make_room()
        return data

    def _make_room(self) -> None:
        """Remove the blocks that were not read for longest; one process at a time."""
        with contextlib.suppress(OSError), open(self._folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            blocks = []
            for path in self._folder.glob("*/*"):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    blocks.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in blocks)
            if total <= _FULL * self._limit:
                return
            for _, size, path in sorted(blocks):
                if total <= _AFTER * self._limit:
                    break
                path.unlink(missing_ok=True)
                total -= size
