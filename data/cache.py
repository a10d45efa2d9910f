"""Blocks of remote files in a local folder: of bounded size, shared by processes, the least recently used go first.

fsspec's caches would not do: blockcache bounds no size and is not made for several processes, and filecache and
simplecache fetch whole files, of which a shuffled reader uses a few ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from .files import lock, open_plain, temporary_beside

BLOCK_BYTES = 8 << 20
_FULL, _AFTER = 7 / 8, 3 / 4  # shares of the limit at which removal begins and ends
_CHECKS = 256  # a process looks at the folder's size after it has written 1 / _CHECKS of the limit


class BlockCache:
    """Reads of remote files through a folder of blocks.

    limit: the most bytes that the folder holds while up to 32 processes write to it.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._written = limit  # so that the first write looks at what is there already

    def read(self, name: str, start: int, end: int, size: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Bytes start ... end of a file of `size` bytes. Blocks that are not in the folder are fetched and stored
        there.

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
        if len(data) == last - first:  # else the server was at fault, and nothing is stored
            with contextlib.suppress(OSError), temporary_beside(path) as temporary:  # a full disk costs time only
                temporary.write_bytes(data)
            self._written += len(data)
            if self._written > self._limit / _CHECKS:
                self._written = 0
                self._make_room()
        return data

    def _make_room(self) -> None:
        """Remove the blocks that were not read for longest. One process at a time does it; the others go on."""
        with contextlib.suppress(OSError), open_plain(self._folder / ".lock", "a") as lock_file:
            lock(lock_file, wait=False)
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
