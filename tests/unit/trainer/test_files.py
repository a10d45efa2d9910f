"""Files that are whole or absent, and locks; that a run's folder is held by one run: checkpoint/test_find.py."""

import errno
import fcntl
import json
import os
import secrets
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data.lock_file
from data.errors import DataError
from data.files import temporary_beside
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


@pytest.mark.parametrize("write", [write_atomically, lambda path, text: temporary_beside(path).__enter__()])
def test_a_temporary_file_is_not_written_through_a_link_at_its_name(
    write: Callable[[Path, str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can foresee the name; here somebody has."""
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * 2 * count)
    (tmp_path / "precious").write_text("precious")
    for count in (4, 8):
        (tmp_path / f".file.{'0' * 2 * count}.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write(tmp_path / "file", "other")
    assert (tmp_path / "precious").read_text() == "precious"


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file holds a run's folder against the living, here and elsewhere, and the dead lose it."""

    def missing(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(NoLocksError, match="not implemented"):
        try_lock(tmp_path / "lock")
    monkeypatch.setattr(data.lock_file, "_BEAT_S", 0.01)
    owner = tmp_path / ".lock.owner"
    with lock_folder(tmp_path), pytest.raises(CheckpointError, match=r"in use by another process, .*\"pid\": "):
        lock_folder(tmp_path, wait_s=0)
    assert not owner.exists()
    dead = subprocess.Popen(["true"])
    dead.wait()
    owner.write_text(json.dumps({"host": data.lock_file._machine(), "pid": dead.pid}))
    lock_folder(tmp_path).close()
    monkeypatch.setattr(data.lock_file, "_DEAD_S", 0.1)
    for of_another_host in ('{"host": "elsewhere", "pid": 1}', "", "{"):
        owner.write_text(of_another_host)  # and nobody touches it
        with lock_folder(tmp_path):
            assert owner.read_text() != of_another_host
    assert {path.name for path in tmp_path.iterdir()} == {"lock", ".lock"}


@pytest.mark.parametrize(
    "name", [".lock", "metrics.jsonl", "wandb_id.txt", "samples", "samples/prompts.txt", "logs/0000_rank0.log", "pipe"]
)
def test_nothing_is_written_through_what_a_foreign_run_folder_holds(name: str, tmp_path: Path) -> None:
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_text("precious")
    (run / name).parent.mkdir(parents=True)
    if name == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(tmp_path if name == "samples" else precious)
    with pytest.raises(DataError, match=f"{run / name} is a link, a pipe or a device; expected"):
        lock_folder(run, wait_s=0)
    assert precious.read_text() == "precious"
    (run / "other").symlink_to(precious)
    with pytest.raises(DataError, match="is a link, through which nothing is opened"):
        try_lock(run / "other")


def test_checkpoints_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    lock_folder(tmp_path / "run", wait_s=0).close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written .* choose another --output"):
        lock_folder(tmp_path / "file", other="another --output")
