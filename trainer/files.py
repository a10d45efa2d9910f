"""Files that are whole or absent, and folders that one process holds."""

import fcntl
import os
import secrets
import time
from pathlib import Path
from typing import IO

from .errors import CheckpointError


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing, also after a crash of the machine, and whoever else writes it at the same time."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def lock_folder(folder: Path, wait_s: float = 30.0, other: str = "another run.name or run.dir") -> IO[str]:
    """Hold a folder as long as the returned file is open; two runs in one folder would mix their lines.

    other: what a user can choose in its place.

    Waits for a predecessor that is ending; raises CheckpointError where the folder stays in use. The system lets go
    of the lock when the process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 (open as long as the run)
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be written ({error}): choose {other}") from None
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise CheckpointError(
                    f"{folder} is in use by another process that has not ended: stop it, or choose {other}"
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return file


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
