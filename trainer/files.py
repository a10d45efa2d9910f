"""Files that are whole or absent, and locks that end with the process that holds them."""

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
from pathlib import Path
from typing import IO, Any, Protocol, Self

from data.files import name_beside, naming, open_plain, refuse_links

from .errors import CheckpointError

# Of a run, a study and an evaluation: in these files are written by their names; in the others, whole folders are made.
_FOLDERS = ("jobs", "locks", "logs", "report", "samples", "stacks")
_MAY_LIE_ELSEWHERE = ("checkpoints", "ema")
_BEAT_S, _DEAD_S = 5.0, 60.0  # how often a lock file is touched, and for how long the dead do not touch theirs


class NoLocksError(OSError):
    """The file system has no locks."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """The whole content or nothing, also after a crash of the machine, and whoever else writes it at the same time."""
    beside = name_beside(path)
    try:
        with naming(path), open(beside, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def json_text(data: Any, indent: int | None = None) -> str:
    """Plain data as JSON. NaN and Infinity are no JSON, and other readers refuse a file with them: they become null."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def append_lines(path: Path, lines: str) -> None:
    """Append whole lines to a file or nothing, which survives a crash of the machine then.

    A line without an end, as a full disk or a kill leaves it, is cut off first. The caller sees to it that nobody else
    appends at the same time. Raises OSError with the path, DataError where the path is a link.
    """
    with naming(path), open_plain(path, "ab+", buffering=0) as file:
        end = _end_of_whole_lines(file)
        file.truncate(end)
        data = lines.encode()
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _end_of_whole_lines(file: IO[bytes], block: int = 1 << 16) -> int:
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - block)
        file.seek(start)
        if (newline := file.read(end - start).rfind(b"\n")) >= 0:
            return start + newline + 1
        end = start
    return 0


def try_lock(path: Path) -> IO[str] | None:
    """The file, locked as long as it is open; None where another process holds the lock.

    The system releases the lock when the process ends, however it ends. Raises NoLocksError where the file system
    has no locks, OSError where the file cannot be written.
    """
    # Not by the package filelock: where flock is missing (ENOSYS) it falls back to a marker file, which stays behind
    # after kill -9, so that a dead process would hold its folder for ever.
    file = open_plain(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        raise NoLocksError(*error.args) from None
    return file


def lock_folder(folder: Path, wait_s: float = 30.0, other: str = "another run.name or run.dir") -> "Lock":
    """Hold a folder until the lock is closed: two runs in one folder would mix their lines.

    other: what a user can choose in its place, as the error messages say it.

    Waits for a predecessor that is ending. Raises CheckpointError where the folder stays in use, or cannot be written,
    DataError where it holds links. On a file system without locks a file says who holds the folder; see LockFile.
    """
    path, deadline = folder / ".lock", time.monotonic() + wait_s
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder, _FOLDERS, _MAY_LIE_ELSEWHERE)
        while (file := try_lock(path)) is None:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{folder} is in use by another process that has not ended: stop it, or choose {other}"
                )
            time.sleep(0.2)
        return file
    except NoLocksError:
        return LockFile(folder / ".lock.owner", wait_s, other)
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be written ({error}): choose {other}") from None


class Lock(Protocol):
    """Held until it is closed, or its process ends."""

    def close(self) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...


class LockFile:
    """A lock for file systems without locks: a file that one process alone can make, with its host and process.

    A thread touches it every _BEAT_S seconds. Where it stays as it is for _DEAD_S, or where no such process is on this
    machine, its owner is dead, and another takes it over. Raises CheckpointError where its owner lives.
    """

    def __init__(self, path: Path, wait_s: float, other: str) -> None:
        self._path = path
        self._content = json.dumps({"host": _machine(), "pid": os.getpid(), "token": secrets.token_hex(8)})
        self._closed = threading.Event()
        self._take(wait_s, other)
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

    def _take(self, wait_s: float, other: str) -> None:
        began = unchanged_since = time.monotonic()
        seen, touched = _content_and_time(self._path), False
        while not self._made():
            now, found = time.monotonic(), _content_and_time(self._path)
            if found != seen:
                seen, unchanged_since, touched = found, now, True
            if found is not None and (_is_dead(found[0]) or now - unchanged_since > _DEAD_S):
                _remove(self._path, found[0])
            elif touched and now - began > wait_s:
                raise CheckpointError(
                    f"{self._path.parent} is in use by another process, {seen and seen[0]}: stop it, or choose {other}"
                )
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
        owner = json.loads(content)
        if owner["host"] == _machine():
            os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, LookupError, TypeError):
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


def sync_folder(folder: Path) -> None:
    """Make the names of a folder's files survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
