"""The lock of an open file, and what stands for it on file systems without locks: a file that says who holds it."""

import atexit
import contextlib
import fcntl
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

from .files import lock, naming, parse_json

_BEAT_S, _DEAD_S = 5.0, 60.0  # how often a lock file is touched, and for how long the dead do not touch theirs


class LockedError(Exception):
    """Another process holds the lock; the text says which."""


@contextlib.contextmanager
def locked(file: IO[Any], wait: bool = True) -> Iterator[None]:
    """Hold the lock of an open file for a block of code; on a file system without locks FILE.owner stands for it.

    Raises LockedError where another process holds it and `wait` is not set.
    """
    with contextlib.ExitStack() as held:
        try:
            lock(file, wait)
            held.callback(fcntl.flock, file, fcntl.LOCK_UN)
        except BlockingIOError:
            raise LockedError from None
        except OSError:
            held.enter_context(LockFile(Path(f"{file.name}.owner"), math.inf if wait else 0.0))
        yield


class LockFile:
    """A lock for file systems without locks: a file that one process alone can make, with its host and process.

    A thread touches it every _BEAT_S seconds. Where it stays as it is for _DEAD_S, or where no such process is on this
    machine, its owner is dead, and another takes it over. Raises LockedError with what the file says where its owner
    lives after `wait_s` too, OSError where it cannot be made.
    """

    def __init__(self, path: Path, wait_s: float) -> None:
        self._path = path
        self._content = json.dumps({"host": _machine(), "pid": os.getpid(), "token": secrets.token_hex(8)})
        self._closed = threading.Event()
        self._take(wait_s)
        self._thread = threading.Thread(target=self._beat, name="lock file", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        atexit.unregister(self.close)
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._path.read_text() == self._content:
                self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _take(self, wait_s: float) -> None:
        began = unchanged_since = time.monotonic()
        seen, touched = _content_and_time(self._path), False
        while not self._made():
            now, found = time.monotonic(), _content_and_time(self._path)
            if found != seen:
                seen, unchanged_since, touched = found, now, True
            if found is not None and (_is_dead(found[0]) or now - unchanged_since > _DEAD_S):
                _remove(self._path, found[0])
            elif touched and now - began > wait_s:
                raise LockedError(found[0] if found else "")
            else:
                time.sleep(min(0.5, _BEAT_S))

    def _made(self) -> bool:
        try:
            with naming(self._path), open(self._path, "x") as file:
                file.write(self._content)
        except FileExistsError:
            return False
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        return True


def _content_and_time(path: Path) -> tuple[str, int] | None:
    try:
        return path.read_text(errors="replace"), path.stat().st_mtime_ns
    except OSError:
        return None


def _machine() -> str:
    """The host and, within it, the container: whose process ids can be told from those of others."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_dead(content: str) -> bool:
    """Whether the owner is a process of this machine that has ended."""
    try:
        owner = parse_json(content)
        if owner["host"] == _machine():
            os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return False
    return False


def _remove(path: Path, content: str) -> None:
    """Remove a dead owner's file, and not the one that somebody has made meanwhile."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(OSError):
        os.rename(path, aside)
        if aside.read_text(errors="replace") != content:
            os.link(aside, path)
        aside.unlink()
