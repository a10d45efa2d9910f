"""Files that are complete or absent, and the lock between processes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from data.files import folder_once, lock, temporary_beside


def test_a_file_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"

    def fail() -> None:
        with temporary_beside(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(path.parent.iterdir()) == []
    with temporary_beside(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    assert path.read_text() == "whole"


def test_of_two_folders_the_first_stays(tmp_path: Path) -> None:
    with folder_once(tmp_path / "folder") as slower:
        (slower / "who").write_text("the slower one")
        with folder_once(tmp_path / "folder") as quicker:
            (quicker / "who").write_text("the quicker one")
    assert (tmp_path / "folder" / "who").read_text() == "the quicker one"
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_left_of_a_folder_goes_and_what_a_living_one_fills_stays(tmp_path: Path) -> None:
    with folder_once(tmp_path / "folder") as living:
        (tmp_path / ".folder.dead.tmp").mkdir()
        (tmp_path / ".folder.new.tmp").mkdir()  # perhaps of a process that has yet to lock it
        for old in (living, tmp_path / ".folder.dead.tmp"):
            os.utime(old, (1, 1))
        with folder_once(tmp_path / "folder"):
            assert living.is_dir()
            assert not (tmp_path / ".folder.dead.tmp").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".folder.new.tmp", "folder"]


@pytest.mark.parametrize("make", [folder_once, temporary_beside])
def test_a_full_disk_is_told_with_the_path(make: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/it'"), make(tmp_path / "it"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with open(path, "w") as first, open(path, "w") as second:
        lock(first)
        with pytest.raises(BlockingIOError):
            lock(second, wait=False)
    with open(path, "w") as third:
        lock(third, wait=False)
