"""Rollback as arithmetic: where the data of a training step are, and what jumps leave of data that have an end."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.checkpoint import CheckpointError
from trainer.jumps import Jump, data_step, follow, jump_back, jumps_of, last_step, write_jumps


def seen(jumps: tuple[Jump, ...], steps: int) -> list[int]:
    return [data_step(step, jumps) for step in range(steps)]


def test_a_jump_passes_over_what_was_read_since() -> None:
    jumps = jump_back((), present=6, target=4, reason="")
    assert jumps == (Jump(4, 2, ""),)
    assert seen(jumps, 7) == [0, 1, 2, 3, 6, 7, 8]


def test_twice_to_the_same_step() -> None:
    once = jump_back((), 6, 4, "")
    twice = jump_back(once, 7, 4, "")  # training steps 4 to 6 have read data 6 to 8
    assert seen(twice, 6) == [0, 1, 2, 3, 9, 10]
    assert [jump.at_step for jump in twice] == [4, 4]


def test_a_later_jump_comes_on_top() -> None:
    jumps = jump_back(jump_back((), 6, 4, ""), 9, 8, "")
    assert seen(jumps, 10) == [0, 1, 2, 3, 6, 7, 8, 9, 11, 12]


def test_back_over_an_earlier_jump() -> None:
    """Its checkpoint is gone: nothing that was read before is read again, and the jump is not made twice."""
    first = jump_back((), 9, 8, "")
    jumps = jump_back(first, 10, 4, "")  # training steps 8 and 9 have read data 9 and 10
    assert [jump.at_step for jump in jumps] == [4]
    assert seen(jumps, 6) == [0, 1, 2, 3, 11, 12]


@pytest.mark.parametrize("present", range(5, 12))
@pytest.mark.parametrize("target", range(1, 5))
def test_no_sample_of_the_window_comes_back(present: int, target: int) -> None:
    before = (Jump(2, 3, ""), Jump(3, 1, ""), Jump(7, 2, ""))
    after = jump_back(before, present, target, "")
    undone = {data_step(step, before) for step in range(target, present)}
    assert seen(after, target) == seen(before, target), "the past stays"
    assert not undone & set(seen(after, 40))


@pytest.mark.parametrize("steps", [5, 12, 30])
@pytest.mark.parametrize("data", [None, 6, 12, 13, 14, 20])
@pytest.mark.parametrize("jumps", [(), (Jump(4, 2, ""),), (Jump(4, 2, ""), Jump(4, 1, ""), Jump(9, 5, ""))])
def test_last_step(steps: int, data: int | None, jumps: tuple[Jump, ...]) -> None:
    counted = sum(data is None or data_step(step, jumps) < data for step in range(steps))
    assert last_step(steps, data, jumps) == counted


def numbered(first: int) -> Iterator[tuple[int, str]]:
    while True:
        yield first, f"data {first}"
        first += 1


def test_follow_jumps_and_goes_back() -> None:
    jumps, step, read = (Jump(2, 3, ""),), 0, []
    stream = follow(numbered, lambda: data_step(step, jumps))
    while step < 4:
        read.append(next(stream))
        step += 1
    jumps, step = jump_back(jumps, 4, 3, ""), 3
    read.append(next(stream))
    assert read == ["data 0", "data 1", "data 5", "data 6", "data 7"]


def test_follow_reads_on_where_nothing_jumps() -> None:
    asked, step = [], 0

    def batches(first: int) -> Iterator[tuple[int, str]]:
        asked.append(first)
        return numbered(first)

    stream = follow(batches, lambda: data_step(step, ()))
    for step in range(5):  # noqa: B007 (read by the stream)
        next(stream)
    assert asked == [0]


def test_the_folder_says_which(tmp_path: Path) -> None:
    assert jumps_of(tmp_path) == ()
    checkpoint = tmp_path / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text(json.dumps({"jumps": [[4, 2, "NaN"]]}))
    assert jumps_of(tmp_path) == (Jump(4, 2, "NaN"),), "a copied checkpoint"
    write_jumps(tmp_path, [Jump(4, 2, "NaN"), Jump(4, 3, "NaN")])
    assert jumps_of(tmp_path) == (Jump(4, 2, "NaN"), Jump(4, 3, "NaN"))


@pytest.mark.parametrize("text", ["[{", '[{"at": 4}]', "4", "[4]"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "jumps.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"jumps\.json cannot be read"):
        jumps_of(tmp_path)
