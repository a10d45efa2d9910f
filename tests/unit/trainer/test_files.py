"""Files that are whole or absent, and locks; that a run's folder is held by one run: checkpoint/test_find.py."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import CheckpointError
from trainer.files import NoLocksError, lock_folder, try_lock, write_atomically


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "ä old\n")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_text(encoding="utf-8") == "ä old\n"
    write_atomically(path, b"\x89new")
    assert path.read_bytes() == b"\x89new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on unprotected; whoever must know the dead from the living is told."""

    def missing(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(NoLocksError, match="not implemented"):
        try_lock(tmp_path / "lock")
    with lock_folder(tmp_path, wait_s=0), lock_folder(tmp_path, wait_s=0):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written .* choose another --output"):
        lock_folder(tmp_path / "file", other="another --output")
