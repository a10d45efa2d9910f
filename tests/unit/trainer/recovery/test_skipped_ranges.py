"""Rollback as arithmetic: where the data of a training step are, and what skipped ranges leave of data that end."""

import json
from pathlib import Path

import pytest

from tests.helpers.checkpoints import meta_of
from trainer.errors import CheckpointError
from trainer.recovery.skipped_ranges import (
    SkippedRange,
    data_step,
    last_step,
    read_skipped_ranges,
    skip_back,
    write_skipped_ranges,
)


def seen(skipped_ranges: tuple[SkippedRange, ...], steps: int) -> list[int]:
    return [data_step(step, skipped_ranges) for step in range(steps)]


def test_a_jump_passes_over_what_was_read_since() -> None:
    skipped_ranges = skip_back((), present=6, target=4, reason="")
    assert skipped_ranges == (SkippedRange(4, 2, ""),)
    assert seen(skipped_ranges, 7) == [0, 1, 2, 3, 6, 7, 8]


def test_twice_to_the_same_step() -> None:
    once = skip_back((), 6, 4, "")
    twice = skip_back(once, 7, 4, "")  # training steps 4 to 6 have read data 6 to 8
    assert seen(twice, 6) == [0, 1, 2, 3, 9, 10]
    assert [skipped_range.at_step for skipped_range in twice] == [4, 4]


def test_a_later_jump_comes_on_top() -> None:
    skipped_ranges = skip_back(skip_back((), 6, 4, ""), 9, 8, "")
    assert seen(skipped_ranges, 10) == [0, 1, 2, 3, 6, 7, 8, 9, 11, 12]


def test_back_over_an_earlier_jump() -> None:
    """Its checkpoint is gone: nothing that was read before is read again, and no range is skipped twice."""
    first = skip_back((), 9, 8, "")
    skipped_ranges = skip_back(first, 10, 4, "")  # training steps 8 and 9 have read data 9 and 10
    assert [skipped_range.at_step for skipped_range in skipped_ranges] == [4]
    assert seen(skipped_ranges, 6) == [0, 1, 2, 3, 11, 12]


@pytest.mark.parametrize("present", range(5, 12))
@pytest.mark.parametrize("target", range(1, 5))
def test_no_sample_of_the_window_comes_back(present: int, target: int) -> None:
    before = (SkippedRange(2, 3, ""), SkippedRange(3, 1, ""), SkippedRange(7, 2, ""))
    after = skip_back(before, present, target, "")
    undone = {data_step(step, before) for step in range(target, present)}
    assert seen(after, target) == seen(before, target), "the past stays"
    assert not undone & set(seen(after, 40))


@pytest.mark.parametrize("steps", [5, 12, 30])
@pytest.mark.parametrize("data", [None, 6, 12, 13, 14, 20])
@pytest.mark.parametrize(
    "skipped_ranges",
    [(), (SkippedRange(4, 2, ""),), (SkippedRange(4, 2, ""), SkippedRange(4, 1, ""), SkippedRange(9, 5, ""))],
)
def test_last_step(steps: int, data: int | None, skipped_ranges: tuple[SkippedRange, ...]) -> None:
    counted = sum(data is None or data_step(step, skipped_ranges) < data for step in range(steps))
    assert last_step(steps, data, skipped_ranges) == counted


def test_the_folder_says_which(tmp_path: Path) -> None:
    assert read_skipped_ranges(tmp_path) == ()
    checkpoint = tmp_path / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text(json.dumps(meta_of(4, jumps=[[4, 2, "NaN"]])))
    assert read_skipped_ranges(tmp_path) == (SkippedRange(4, 2, "NaN"),), "a copied checkpoint"
    damaged = tmp_path / "checkpoints" / "step_00000008"
    damaged.mkdir()
    (damaged / "meta.json").write_text("{")
    assert read_skipped_ranges(tmp_path) == (SkippedRange(4, 2, "NaN"),), "a damaged one is passed over"
    write_skipped_ranges(tmp_path, [SkippedRange(4, 2, "NaN"), SkippedRange(4, 3, "NaN")])
    assert read_skipped_ranges(tmp_path) == (SkippedRange(4, 2, "NaN"), SkippedRange(4, 3, "NaN"))


@pytest.mark.parametrize(
    "text", ["[{", '[{"at": 4}]', "4", "[4]", "[" * 10**5, '[{"at_step": "4", "steps": 1, "reason": ""}]', "\0"]
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "jumps.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"jumps\.json cannot be read"):
        read_skipped_ranges(tmp_path)
