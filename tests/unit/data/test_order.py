"""The order of samples: exact epochs, independent of the world size, seekable."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.order
from data.errors import DataError
from data.order import END_OF_DATA, Order, Source, mix, position_keys, slots_of, uniforms
from data.shares import MOST_ASTRAY
from tests.helpers.fuzz import FACTOR, fuzz

SIZES = [257, 3, 100, 64, 500]


def read(order: Order, first: int, count: int, slots: range) -> list[list[tuple[int, int]]]:
    return [[(p.shard, p.sample) for p in ps] for _, ps in islice(order.steps(first, slots), count)]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "batch"), [(SIZES, 8), ([64 * 40], 4), ([5], 16), ([1000, 7], 3)])
def test_seeking_equals_replaying(sizes: list[int], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(3, sizes, batch, None)
    whole = read(order, 0, 600, range(batch))
    for first in (1, 17, 63, 64, 65, 333, 599):
        again = read(Order(3, sizes, batch, None), first, 100, range(batch))
        assert again[: 600 - first] == whole[first : first + 100]
    with monkeypatch.context() as patch:
        patch.setattr(data.order, "SEEK_BLOCK", 1)  # an epoch at a time, as with sets that are larger than a block
        for first in (17, 333, 550):
            assert read(Order(3, sizes, batch, None), first, 50, range(batch)) == whole[first : first + 50]
    once = read(Order(3, sizes, batch, 1), 0, 600, range(batch))
    assert read(Order(3, sizes, batch, 1), 450, 150, range(batch)) == once[450:]


def test_a_batch_mixes_as_many_chunks_as_it_has_slots() -> None:
    order = Order(0, [6400], 16, None)
    assert {len(run.samples) for run in islice(order.queues(0, range(1))[0], 9)} == {64}
    for step in read(order, 0, 200, range(16)):
        assert len({(shard, sample // 64) for shard, sample in step}) == 16


def test_slots_stay_level_over_many_epochs() -> None:
    order = Order(0, [1000] * 3, 16, None)
    chunks = [start.chunk for start in order._seek(20_000, range(16)).values()]
    assert max(chunks) - min(chunks) < 2 * order._sources[0]._whole.count


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


# ------------------------------------------------------------------------------------------------- several sources
def test_one_source_keeps_the_order_of_older_runs() -> None:
    """A digest of the order as the first release made it: runs that were started then must go on."""
    digest = hashlib.sha256()
    for sizes, batch, epochs, first in (
        (SIZES, 8, None, 0),
        (SIZES, 8, 1, 90),
        ([64 * 40], 4, None, 333),
        ([5], 16, 2, 1),
    ):
        steps = read(Order(7, sizes, batch, epochs), first, 40, range(batch))
        digest.update(repr(steps).encode())
    assert digest.hexdigest() == "6b7faccc33cf2a295f1bdd8de43ced2f7b1b39fb401d8d3a0df151d7f1b80dd1"


@pytest.mark.parametrize(
    ("sizes", "weights", "batch"),
    [
        ((30, 2000), (0.5, 0.5), 16),
        ((100, 1_000_000), (0.1, 0.9), 16),
        ((30, 2000, 1_000_000), (0.1, 0.2, 0.7), 16),
        ((30, 2000, 1_000_000), (1, 1, 1), 7),
        ((500, 77, 900, 5), (5, 2, 1, 1e-3), 6),
    ],
)
@pytest.mark.slow
def test_every_batch_holds_the_share_of_each_source_at_any_world_size(
    sizes: tuple[int, ...], weights: tuple[float, ...], batch: int
) -> None:
    """Shares by step at 1, 3 and 4 processes, from the start and begun far on."""
    sources = [Source(1, weight) for weight in weights]
    share = batch * np.array(weights) / sum(weights)

    def counts(world: int, first: int, steps: int) -> np.ndarray:
        """int64 [steps, sources]: samples of each source in each batch, of all ranks."""
        found = np.zeros((steps, len(sizes)), np.int64)
        for rank in range(world):
            own = slots_of(rank, world, batch)
            for step, samples in enumerate(read(Order(1, sizes, batch, None, sources), first, steps, own)):
                np.add.at(found[step], [shard for shard, _ in samples], 1)
        return found

    one = counts(1, 0, 600)
    assert np.abs(one - share).max() < 1, "of each batch, to within one sample"
    assert np.abs(one.cumsum(axis=0) - np.arange(1, 601)[:, None] * share).max() < MOST_ASTRAY, "of the run"
    for world in (3, 4):
        assert (counts(world, 500, 60) == one[500:560]).all()
    assert np.abs(counts(1, 10**6, 60) - share).max() < 1


@pytest.mark.slow
def test_nearly_all_of_a_chunk_is_read_by_one_slot_and_each_rank_has_a_share_of_each_source() -> None:
    batch, weights = 256, (0.3, 0.33, 0.37)
    order = Order(1, [64 * 10_000] * 3, batch, None, [Source(1, weight) for weight in weights])
    slots: dict[tuple[int, int], Counter[int]] = {}
    for step in read(order, 0, 200, range(batch)):
        for slot, (shard, sample) in enumerate(step):
            slots.setdefault((shard, sample // 64), Counter())[slot] += 1
    share = [max(count.values()) / count.total() for count in slots.values()]
    assert np.mean(np.array(share) > 0.9) > 0.97
    for rank in range(8):
        ranks = Counter(shard for shard, _ in read(order, 0, 1, slots_of(rank, 8, batch))[0])
        assert all(abs(ranks[i] - 32 * weight) < 3 for i, weight in enumerate(weights))


def test_every_source_runs_its_own_epochs() -> None:
    """Also where a batch holds half a sample more of each than a whole number."""
    sizes, sources = [30, 31, 200], [Source(2, 1.0), Source(1, 1.0)]
    for batch, steps in ((4, 61 * 4), (5, 49 * 4), (1, 61 * 16)):
        seen = [s for step in read(Order(0, sizes, batch, None, sources), 0, steps, range(batch)) for s in step]
        small = Counter(s for s in seen if s[0] < 2)
        large = Counter(s for s in seen if s[0] == 2)
        assert len(small) == 61
        assert max(small.values()) - min(small.values()) <= 2
        assert len(large) == 200
        assert max(large.values()) - min(large.values()) <= 2

    once = Counter(s for step in read(Order(0, sizes, 5, 1, sources), 0, 900, range(5)) for s in step)
    del once[END_OF_DATA, END_OF_DATA]
    assert once == Counter(dict.fromkeys(((shard, i) for shard, n in enumerate(sizes) for i in range(n)), 1))


def test_equal_sources_are_not_in_step() -> None:
    order = Order(0, [640, 640], 2, None, [Source(1, 1.0), Source(1, 1.0)])
    steps = [sorted(step) for step in read(order, 0, 300, range(2))]
    assert all([shard for shard, _ in step] == [0, 1] for step in steps)
    assert sum(a[1] == b[1] for a, b in steps) < 20


@st.composite
def orders(draw: st.DrawFn) -> tuple[int, list[int], int, int | None, list[Source]]:
    sources, sizes = [], []
    for _ in range(draw(st.integers(1, 3))):
        own = draw(st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(any))
        sources.append(Source(len(own), draw(st.floats(0.3, 3))))
        sizes += own
    return draw(st.integers(0, 2**40)), sizes, draw(st.integers(1, 24)), draw(st.sampled_from([None, 1, 3])), sources


@fuzz(15)
@given(orders(), st.integers(1, 6), st.integers(0, 200))
def test_any_order_seeks_and_is_dealt_to_any_world(
    case: tuple[int, list[int], int, int | None, list[Source]], world: int, first: int
) -> None:
    batch = case[2]
    world = min(world, batch)
    whole = read(Order(*case), first, 30, range(batch))
    assert read(Order(*case), first + 11, 19, range(batch)) == whole[11:]
    parts = [read(Order(*case), first, 30, slots_of(r, world, batch)) for r in range(world)]
    assert [list(chain.from_iterable(step)) for step in zip(*parts, strict=True)] == whole
    # Replayed from the start, a slot's queue has at step `first` what the seek found.
    queue = Order(*case).steps(0, range(batch))
    replayed = next(islice(queue, first, None))[1]
    assert [(p.shard, p.sample) for p in replayed] == whole[0]


@fuzz(30)
@given(orders())
def test_any_epoch_reads_each_sample_once(case: tuple[int, list[int], int, int | None, list[Source]]) -> None:
    seed, sizes, batch, _, sources = case
    queues = Order(seed, sizes, batch, 1, sources).queues(0, range(batch))
    everything = {(shard, i) for shard, n in enumerate(sizes) for i in range(n)}
    seen: Counter[tuple[int, int]] = Counter()
    for _ in range(20_000 // batch):
        for run in map(next, queues):
            if run.shard != END_OF_DATA:
                seen.update((run.shard, int(i)) for i in run.samples)
        if len(seen) == len(everything):
            break
    assert seen == Counter(dict.fromkeys(everything, 1))


# -------------------------------------------------------------------------------------------------- a cluster's size
SA_1B = [11_186 - i % 7 for i in range(1000)]
SHARDS = 100 if FACTOR == 1 else 1000  # of an epoch that is read whole


@pytest.mark.slow
@pytest.mark.parametrize(("world", "batch"), [(256, 2048), (512, 5632)])
def test_ranks_of_a_cluster_read_the_global_order(world: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank, begun in mid-shard; at another number of ranks the same."""
    order = Order(0, SA_1B, batch, None)  # of all ranks: its arrays are the same on each
    monkeypatch.setattr(order._sources[0], "lengths_of", cache(order._sources[0].lengths_of))
    whole = read(order, 1_997, 6, range(batch))
    for size in (world, world - 1):
        ranks = [read(order, 2_000, 3, slots_of(rank, size, batch)) for rank in range(size)]
        assert [list(chain.from_iterable(step)) for step in zip(*ranks, strict=True)] == whole[3:]
    assert [len(slots_of(rank, world, batch)) for rank in range(world)] == [batch // world] * world


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2048, 5632])
def test_an_epoch_at_the_batch_of_a_cluster_reads_each_sample_once(batch: int) -> None:
    sizes = SA_1B[:SHARDS]
    order = Order(0, sizes, batch, 1)
    seen = [np.zeros(size, np.uint8) for size in sizes]
    for queue in order.queues(0, range(batch)):
        for run in queue:
            if run.shard == END_OF_DATA:
                break
            seen[run.shard][run.samples] += 1
    assert all((count == 1).all() for count in seen)
