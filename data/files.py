"""Files and folders that are complete or absent, and a lock between processes."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import DataError

_NEW_S, _OLD_S = 60.0, 86400.0  # a temporary folder that is newer may not be locked yet; an older one is nobody's


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """The path of a temporary file in the folder of `path`: renamed to `path` on success, removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = name_beside(path)
    temporary.touch(exist_ok=False)  # with the rights that umask leaves; tempfile's functions do not ask it
    try:
        with naming(path):
            yield temporary
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
    temporary = name_beside(folder)
    temporary.mkdir()
    with held(temporary):
        try:
            with naming(folder):
                yield temporary
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


def name_beside(path: Path) -> Path:
    """The name of a temporary file beside a path, which nobody can foresee and put a link at."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def open_plain(path: Path, mode: str, buffering: int = -1) -> Any:
    """As open(path, mode, buffering), but never through a link: in a folder from elsewhere it may lead to any file
    of the user's.

    Raises DataError where the path is a link.
    """
    try:
        return open(path, mode, buffering, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise DataError(f"{path} is a link, through which nothing is opened: remove it") from None


def refuse_links(folder: Path, inside: Collection[str] = (), may_be_links: Collection[str] = ()) -> None:
    """Raise DataError where a folder that is to be written holds a link, a pipe or a device: what is written there by
    its name would go elsewhere, or wait for ever.

    inside: folders in it that are looked into as well. may_be_links: folders in it that may lie elsewhere.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name in inside:
                    refuse_links(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False) and not (entry.name in may_be_links and entry.is_dir()):
                raise DataError(
                    f"{entry.path} is a link, a pipe or a device; expected files and folders alone: remove it, or put "
                    "what it leads to in its place"
                )


def parse_json(text: str | bytes) -> Any:
    """json.loads for text from elsewhere: it raises ValueError alone, of deep nesting too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_digest(data: Any) -> str:
    """SHA-256 of plain data, whatever the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


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
