"""Steps are encoded ahead of their use, in order, and what is left over is waited for."""

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trainer.input.prefetch import prefetch
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
