"""Files that are whole or absent, and locks that end with the process that holds them."""

import fcntl
import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any, Protocol

from data.files import name_beside, naming, open_plain, refuse_links
from data.lock_file import LockedError, LockFile

from .errors import CheckpointError

# Of a run, a study and an evaluation: in these files are written by their names; in the others, whole folders are made.
_FOLDERS = ("jobs", "locks", "logs", "report", "samples", "stacks")
_MAY_LIE_ELSEWHERE = ("checkpoints", "ema")


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
        try:
            return LockFile(folder / ".lock.owner", wait_s)
        except LockedError as error:
            raise CheckpointError(
                f"{folder} is in use by another process, {error}: stop it, or choose {other}"
            ) from None
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be written ({error}): choose {other}") from None


class Lock(Protocol):
    """Held until it is closed, or its process ends."""

    def close(self) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...


def sync_folder(folder: Path) -> None:
    """Make the names of a folder's files survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
