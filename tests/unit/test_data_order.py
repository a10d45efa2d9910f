"""The order of samples: exact epochs, independent of the world size, seekable."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest

from data.config import DataError
from data.order import END_OF_DATA, Order, mix, position_keys, slots_of, uniforms

SIZES = [257, 3, 100, 64, 500]


def read(order: Order, first: int, count: int, slots: range) -> list[list[tuple[int, int]]]:
    return [[(p.shard, p.sample) for p in ps] for _, ps in islice(order.steps(first, slots), count)]


@pytest.mark.parametrize(("sizes", "batch"), [(SIZES, 8), ([5], 16), ([64 * 40], 4), ([1000, 7], 3)])
def test_every_epoch_holds_each_sample_once(sizes: list[int], batch: int) -> None:
    everything = Counter((shard, i) for shard, n in enumerate(sizes) for i in range(n))
    order = Order(0, sizes, batch, epochs=2)
    steps = 2 * sum(sizes) // batch + 64 * 4  # far enough for the slots that lag behind
    seen = Counter(s for step in read(order, 0, steps, range(batch)) for s in step if s[0] != END_OF_DATA)
    assert seen == Counter(dict.fromkeys(everything, 2))

    once = Order(0, sizes, batch, epochs=1)
    seen = Counter(s for step in read(once, 0, steps, range(batch)) for s in step if s[0] != END_OF_DATA)
    assert seen == everything


def test_one_epoch_ends_in_holes_and_an_endless_run_flows_on() -> None:
    once = read(Order(0, SIZES, 8, epochs=1), 0, 300, range(8))
    endless = read(Order(0, SIZES, 8, epochs=None), 0, 300, range(8))
    assert once[-1] == [(END_OF_DATA, END_OF_DATA)] * 8
    for a, b in zip(once, endless, strict=True):
        assert all(x == y or x[0] == END_OF_DATA for x, y in zip(a, b, strict=True))
    assert all(s[0] != END_OF_DATA for step in endless for s in step)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_the_world_size_only_deals_slots(world: int) -> None:
    whole = read(Order(7, SIZES, 8, None), 0, 50, range(8))
    parts = [read(Order(7, SIZES, 8, None), 0, 50, slots_of(r, world, 8)) for r in range(world)]
    joined = [list(chain.from_iterable(step)) for step in zip(*parts, strict=True)]
    assert joined == whole


@pytest.mark.parametrize(("sizes", "batch"), [(SIZES, 8), ([64 * 40], 4), ([5], 16), ([1000, 7], 3)])
def test_seeking_equals_replaying(sizes: list[int], batch: int) -> None:
    order = Order(3, sizes, batch, None)
    whole = read(order, 0, 600, range(batch))
    for first in (1, 17, 63, 64, 65, 333, 599):
        again = read(Order(3, sizes, batch, None), first, 600 - first, range(batch))
        assert again == whole[first:]
    once = read(Order(3, sizes, batch, 1), 0, 600, range(batch))
    assert read(Order(3, sizes, batch, 1), 450, 150, range(batch)) == once[450:]


def test_a_batch_mixes_as_many_chunks_as_it_has_slots() -> None:
    order = Order(0, [6400], 16, None)
    assert {len(run.samples) for run in islice(order.queues(0, range(1))[0], 9)} == {64}
    for step in read(order, 0, 200, range(16)):
        assert len({(shard, sample // 64) for shard, sample in step}) == 16


def test_slots_stay_level_over_many_epochs() -> None:
    order = Order(0, [1000] * 3, 16, None)
    chunk, _ = order._seek(20_000, range(16))
    assert max(chunk) - min(chunk) < 2 * order._chunks


def test_epochs_and_seeds_differ() -> None:
    assert read(Order(0, SIZES, 8, None), 0, 20, range(8)) != read(Order(1, SIZES, 8, None), 0, 20, range(8))
    order = Order(0, [32], 8, None)  # chunks of one sample: an epoch is exactly 4 steps
    steps = read(order, 0, 8, range(8))
    assert sorted(chain.from_iterable(steps[:4])) == sorted(chain.from_iterable(steps[4:]))
    assert steps[:4] != steps[4:]


def test_positions_are_numbered_through() -> None:
    step, positions = next(Order(0, SIZES, 8, None).steps(5, range(3, 6)))
    assert step == 5
    assert [p.position for p in positions] == [43, 44, 45]


def test_slots_are_contiguous_and_even() -> None:
    parts = [slots_of(r, 3, 8) for r in range(3)]
    assert parts == [range(3), range(3, 6), range(6, 8)]
    with pytest.raises(DataError, match="global_batch_size = 2 is smaller than the world size 3"):
        slots_of(0, 3, 2)
    with pytest.raises(DataError, match="no samples"):
        Order(0, [0], 2, None)


def test_hash_is_fixed_uniform_and_independent() -> None:
    # Fixed values: changing the hash would change every run.
    assert int(mix(1, 2)) == 8739154586042531541
    assert int(mix(2, 1)) != int(mix(1, 2))
    keys = position_keys(0, np.arange(20_000))
    assert keys.dtype == np.int64
    assert len(np.unique(keys)) == len(keys)
    a, b = uniforms(keys, "flip"), uniforms(keys, "crop x")
    assert a.min() >= 0.0
    assert a.max() < 1.0
    assert abs(a.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert (uniforms(keys[:5], "flip") == a[:5]).all()
