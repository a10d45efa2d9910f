"""Files that are complete or absent, and the lock between processes."""

from __future__ import annotations

from pathlib import Path

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


def test_a_lock_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with open(path, "w") as first, open(path, "w") as second:
        lock(first)
        with pytest.raises(BlockingIOError):
            lock(second, wait=False)
    with open(path, "w") as third:
        lock(third, wait=False)
