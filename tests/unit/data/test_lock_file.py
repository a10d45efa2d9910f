"""The file that stands for a lock; that it holds a run's folder: tests/unit/trainer/test_files.py."""

import fcntl
import os
from errno import ENOSYS
from pathlib import Path
from typing import Any

import pytest

import data.lock_file
from data.errors import DataError
from data.lock_file import LockedError, _is_dead, _remove, locked
from data.precomputed_write import Precompute


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise OSError(ENOSYS, os.strerror(ENOSYS))

    if not request.param:
        monkeypatch.setattr(fcntl, "flock", missing)
        monkeypatch.setattr(data.lock_file, "_BEAT_S", 0.01)


@pytest.mark.usefixtures("file_system")
def test_a_lock_is_held_for_a_block_of_code(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open(path, "a") as first, open(path, "a") as second:
        with locked(first), pytest.raises(LockedError), locked(second, wait=False):
            pass
        with locked(second, wait=False):
            pass
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("file_system")
def test_precompute_writes_no_shard_that_another_process_writes(tmp_path: Path) -> None:
    task: Any = object.__new__(Precompute)
    refused = pytest.raises(DataError, match=r"a\.tar is being written by another process: start each set once")
    with open(tmp_path / ".a.tar.tmp", "ab") as file, locked(file), refused:
        task._write_shard(tmp_path / "a.tar", [], 0, 0)


def test_a_dead_owners_file_is_removed_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / ".lock.owner"
    path.write_text("the next one's")
    _remove(path, "the dead one's")
    assert path.read_text() == "the next one's"
    _remove(path, "the next one's")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[" * 10**5, '{"host": 0, "pid": ' + "9" * 99 + "}", '{"pid": 1}', "[]", "\0"])
def test_what_a_strangers_file_says_of_its_owner_is_no_proof_that_it_is_dead(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.lock_file, "_machine", lambda: 0)
    assert not _is_dead(text)
