"""Files that are complete or absent, and the lock between processes."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from data.files import folder_once, lock, open_plain, parse_json, temporary_beside


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


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_umask_is_honoured(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with temporary_beside(tmp_path / "file"):
            pass
        with folder_once(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_nothing_is_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    for mode in ("a", "w", "r"):
        with pytest.raises(DataError, match=f"{tmp_path}/link is a link"):
            open_plain(tmp_path / "link", mode)
    assert (tmp_path / "precious").read_text() == "precious"
    with open_plain(tmp_path / "precious", "r") as file:
        assert file.read() == "precious"


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


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, b"\xff", "9" * 5000, ""])
def test_json_from_elsewhere_raises_value_errors_alone(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
