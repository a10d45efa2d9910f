"""Files and folders that are complete or absent, and a lock between processes."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_NEW_S, _OLD_S = 60.0, 86400.0  # a temporary folder that is newer may not be locked yet; an older one is nobody's


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """The path of a temporary file in the folder of `path`: renamed to `path` on success, removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        with naming(path):
            yield temporary
            os.chmod(temporary, 0o644)  # mkstemp makes files that only the owner can read
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_once(folder: Path) -> Iterator[Path]:
    """The path of a temporary folder: renamed to `folder` on success, removed on failure.

    Where another process was quicker and `folder` exists by then, the temporary one is dropped. What killed processes
    left of the same folder is removed first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        with suppress(OSError):  # another process removes it as well
            if _is_dead(leftover):
                shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    with held(temporary):
        try:
            with naming(folder):
                yield temporary
            os.chmod(temporary, 0o755)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def held(folder: Path) -> Iterator[bool | None]:
    """Lock the folder itself for a block of code; False where another process holds it, None where there are no locks
    of folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:
            yield None
        else:
            yield True
    finally:
        os.close(descriptor)


def _is_dead(temporary: Path) -> bool:
    """Whether the process that made a temporary folder has ended. Where locks cannot tell, its age does."""
    age_s = time.time() - temporary.stat().st_mtime
    with held(temporary) as free:
        return free is not False and age_s > (_NEW_S if free else _OLD_S)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError within has the name of a file: `path`, where the system names none, as of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def lock(file: IO[Any], wait: bool = True) -> None:
    """Take the lock of an open file, which ends when the file is closed or the process dies, by kill -9 too.

    Raises BlockingIOError where another process holds it and `wait` is not set, and OSError on a file system without
    locks. The package filelock is no help here: it locks a file beside the one that is written and leaves it there,
    waits by asking twenty times a second, and where a file system has no locks falls back to a file that says who holds
    the lock. Such a file outlives a killed process, and on another node nobody can tell that it is dead.
    """
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
