"""Files and folders that are complete or absent, and a lock between processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """The path of a temporary file in the folder of `path`: renamed to `path` on success, removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp makes files that only the owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_once(folder: Path) -> Iterator[Path]:
    """The path of a temporary folder: renamed to `folder` on success, removed on failure.

    Where another process was quicker and `folder` exists by then, the temporary one is dropped.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(file: IO[Any], wait: bool = True) -> None:
    """Take the lock of an open file, which ends when the file is closed or the process dies, by kill -9 too.

    Raises BlockingIOError where another process holds it and `wait` is not set, and OSError on a file system without
    locks. The package filelock is no help here: it locks a file beside the one that is written and leaves it there,
    waits by asking twenty times a second, and where a file system has no locks falls back to a file that says who holds
    the lock. Such a file outlives a killed process, and on another node nobody can tell that it is dead.
    """
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
