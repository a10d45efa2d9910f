"""Steps are encoded ahead of their use, in order; what is left over is waited for; the data that is wanted is read."""

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trainer.input.stream import follow, prefetch
from trainer.recovery.skipped_ranges import SkippedRange, data_step, skip_back
from trainer.step import Encoded


def batches(first_step: int) -> Iterator[tuple[int, list[Any]]]:
    """Two micro-batches per step: their names."""
    for step in itertools.count(first_step):
        yield step, [f"{step}a", f"{step}b"]


class Encoder:
    """Records what has been begun and what has been waited for."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.waited: list[str] = []

    def begin(self, batch: Any) -> Callable[[], Encoded]:
        self.begun.append(batch)

        def wait() -> Any:
            self.waited.append(batch)
            if batch == "9b":
                raise RuntimeError("cannot be encoded")
            return f"encoded {batch}"

        return wait


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_encoding_of_later_steps_begins_before_a_step_is_handed_out(ahead: int) -> None:
    encoder = Encoder()
    stream = prefetch(batches, encoder.begin, ahead)(5)
    step, micro_batches = next(stream)
    assert step == 5
    assert encoder.begun == [f"{step}{part}" for step in range(5, 6 + ahead) for part in "ab"]
    assert encoder.waited == [], "each micro-batch is waited for when it is needed"
    assert [(each.batch, each.encoded()) for each in micro_batches] == [("5a", "encoded 5a"), ("5b", "encoded 5b")]
    assert next(stream)[0] == 6


def test_a_stream_that_is_dropped_waits_for_what_was_begun() -> None:
    """Whatever becomes of it: 9b cannot be encoded."""
    encoder = Encoder()
    stream = prefetch(batches, encoder.begin, ahead=2)(7)
    next(stream)
    del stream
    gc.collect()
    assert encoder.waited == ["8a", "8b", "9a", "9b"]


def numbered(first: int) -> Iterator[tuple[int, str]]:
    while True:
        yield first, f"data {first}"
        first += 1


def test_follow_jumps_and_goes_back() -> None:
    skipped_ranges, step, read = (SkippedRange(2, 3, ""),), 0, []
    stream = follow(numbered, lambda: data_step(step, skipped_ranges))
    while step < 4:
        read.append(next(stream))
        step += 1
    skipped_ranges, step = skip_back(skipped_ranges, 4, 3, ""), 3
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
