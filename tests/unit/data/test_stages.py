"""The data of a run of stages: each goes on with what the one before has left of the epoch."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from data.buckets import BucketOrder
from data.config import Bucket
from data.order import Source
from data.stages import Begin, Part
from tests.unit.data.test_buckets import BUCKETS, Index, random_index, steps

SQUARE = [Bucket(32, 32, 64)]


def read(order: BucketOrder, first: int, last: int, batch: int) -> list[tuple[int, int]]:
    """(shard, sample) of all steps from `first` to `last`."""
    return [sample for _, samples in islice(steps(order, first, range(batch)), last - first) for sample in samples]


def stage_orders(index: Index, stages: list[tuple[int, int, list[Bucket]]], seed: int = 3) -> list[BucketOrder]:
    """The order of each stage. stages: first step, batch and buckets of each."""
    parts = [(first, Part(index, buckets, batch, 1.0)) for first, batch, buckets in stages]  # pyright: ignore[reportArgumentType]
    return [Begin(step, 0, number, parts[:number]).order(seed, part, None) for number, (step, part) in enumerate(parts)]


def test_what_is_left_is_what_was_not_read() -> None:
    for sizes, buckets in (([60, 41, 0, 7], SQUARE), ([300, 241], BUCKETS)):
        for end in (1, 3, 7, 20):
            index = random_index(sizes)
            order = BucketOrder(3, index, buckets, 4, None, 1.0)
            got = Counter(read(order, 0, end, 4))
            first = np.cumsum([0, *sizes])
            left = order.left_over(end)
            read_rows = {int(first[shard]) + sample for shard, sample in got}
            assert set(np.flatnonzero(~left).tolist()) == read_rows, (sizes, end)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[469, 431], [2000, 3, 1700]])
@pytest.mark.parametrize("buckets", [[SQUARE] * 3, [BUCKETS] * 3, [SQUARE, BUCKETS, BUCKETS[:2]]])
def test_no_sample_comes_twice_while_the_epoch_lasts(sizes: list[int], buckets: list[list[Bucket]]) -> None:
    index = random_index(sizes)
    orders = stage_orders(index, [(0, 8, buckets[0]), (7, 4, buckets[1]), (21, 6, buckets[2])])
    got = [*read(orders[0], 0, 7, 8), *read(orders[1], 7, 21, 4), *read(orders[2], 21, 30, 6)]
    assert max(Counter(got).values()) == 1


def test_the_epoch_after_the_left_over_is_whole_again() -> None:
    index = random_index([90])
    stages = stage_orders(index, [(0, 1, SQUARE), (40, 1, SQUARE)])  # one slot: epochs do not overlap
    before, after = read(stages[0], 0, 40, 1), read(stages[1], 40, 180, 1)
    assert sorted(before + after[:50]) == sorted(after[50:140]) == [(0, sample) for sample in range(90)]
    assert after[50:140] != read(stages[0], 0, 90, 1)  # in another order than that of the first stage


def test_sources_keep_epochs_of_their_own() -> None:
    sources = [Source(1, 3.0), Source(1, 1.0)]
    index = random_index([40, 400], sources)
    stages = stage_orders(index, [(0, 4, SQUARE), (30, 4, SQUARE)])
    before, after = read(stages[0], 0, 30, 4), read(stages[1], 30, 35, 4)
    large = [sample for sample in before + after if sample[0] == 1]
    assert len(large) == len(set(large)) == 35
    small_before, small_after = ([sample for sample in part if sample[0] == 0] for part in (before, after))
    assert len(small_before) == 90  # two epochs and ten samples of the third
    assert not set(small_before[-8:]) & set(small_after)  # the queues overlap where epochs meet


@pytest.mark.parametrize(("sizes", "buckets"), [([469, 431], SQUARE), ([900, 300], BUCKETS)])
def test_a_seek_into_a_later_stage_gives_what_reading_gives(sizes: list[int], buckets: list[Bucket]) -> None:
    last = stage_orders(random_index(sizes), [(0, 8, buckets), (5, 4, buckets)])[-1]
    whole = read(last, 5, 400, 4)
    for step in (6, 90, 200, 399):
        assert read(last, step, 400, 4) == whole[4 * (step - 5) :]


def test_a_stage_that_ends_with_the_epoch_leaves_whole_epochs() -> None:
    index = random_index([64])
    last = stage_orders(index, [(0, 1, SQUARE), (64, 1, SQUARE)])[-1]
    assert sorted(read(last, 64, 128, 1)) == [(0, sample) for sample in range(64)]


def test_positions_go_on_where_the_stage_before_has_ended() -> None:
    begin = Begin(step=10, position=80, number=1)
    assert [begin.position_of(step, 4) for step in (10, 11)] == [80, 84]
