"""Which sample each slot of each step reads, as arithmetic: no state and no generator, so a resume seeks.

The order is a pure function of (seed, samples of each shard, weights of the sources, global batch size B).

One source, read by K slots (all B, where it is the only one):

1. A shard is cut into chunks of up to MAX_CHUNK neighbouring samples, so that a chunk is one range of bytes.
2. An epoch is a permutation of the source's C chunks by hash of (seed, epoch, chunk). The chunks of all its epochs, one
   epoch after the other, are numbered epoch * C + j.
3. Chunk g goes to slot g % K: slot b has the queue of chunks b, b + K, b + 2K, ... So K samples, one of each queue, mix
   K chunks. Slots whose chunks were shorter are further on in the list than others.
4. Inside a chunk the samples are read in an order by hash of (seed, epoch, chunk, sample).

Several sources (data.shares): a batch holds B times its share of the weights of each, rounded down or up.

5. A source whose part of a batch is K, or between K - 1 and K, has K queues as above. A step reads one sample of each,
   or of all but one, in turn. Each queue but the last belongs to a slot, which so reads nearly all of a chunk.

The sample of slot b at step s has the position s * B + b, and the hash of (seed, position) is its key: the source of
all its randomness (crop, flip, caption, noise). Rank r owns a contiguous range of slots (`slots_of`). That is all that
the world size decides.

In a run of several buckets each bucket has an order of its own, see data.buckets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from .errors import DataError
from .shares import Shares

MAX_CHUNK = 64  # samples; a larger chunk reads longer ranges, a smaller one mixes better
CHUNKS_PER_SLOT = 4  # at least, per epoch: the chunks of small sets are shorter, so that these are mixed too
SEEK_BLOCK = 1 << 18  # chunks that a seek looks at together: few enough for memory, enough for numpy to be fast
LIVE_EPOCHS = 3  # permutations kept per source: its slots lie less than two epochs apart
MIXED_ORDER = "2"  # version of the order of several sources: a run that was begun under another cannot go on
END_OF_DATA = -1  # shard and sample of a position past the last epoch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_PURPOSE_CHUNKS, _PURPOSE_INSIDE, _PURPOSE_KEY = 1, 2, 3  # data.buckets has 4 and 5


class Position(NamedTuple):
    """One sample of the global batch: position = step * B + slot; shard is END_OF_DATA past the last epoch."""

    step: int
    slot: int
    position: int
    shard: int
    sample: int


class Source(NamedTuple):
    """A source: its number of shards, which follow those of the sources before it, and its weight; one of weight 0 is
    not read."""

    shards: int
    weight: float | Fraction


class Chunk(NamedTuple):
    """A chunk, or what a seek left of it: its shard, and its samples (int64 numbers in the shard) in reading order.
    Both are END_OF_DATA past the last epoch."""

    shard: int
    samples: np.ndarray


class _Start(NamedTuple):
    """Where a queue is begun: the chunk of its sample `first`, and that sample's offset in the chunk."""

    chunk: int
    offset: int
    first: int


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Finaliser of the splitmix64 generator, a bijection on uint64 (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix(*parts: int | np.ndarray) -> np.ndarray:
    """Hash integers or integer arrays (broadcast together) to uint64; order of the arguments counts."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # wrapping is the arithmetic of the hash
        for part in parts:
            word = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.asarray(part & _MASK, np.uint64)
            state = np.asarray(_splitmix64((state + _GOLDEN) ^ _splitmix64(np.asarray(word + _GOLDEN))))
    return state


def position_keys(seed: int, positions: np.ndarray) -> np.ndarray:
    """int64 keys of positions: all randomness of a sample follows from its position's key."""
    return mix(seed, _PURPOSE_KEY, positions).view(np.int64)


def uniforms(keys: np.ndarray, purpose: str | int) -> np.ndarray:
    """float64 in [0, 1), one number per key; numbers for different purposes are independent."""
    if isinstance(purpose, str):
        purpose = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return (mix(keys, purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def share_of(rank: int, world: int, count: int) -> range:
    """Contiguous part of range(count) for a rank, as even as possible: the first count % world ranks get one more."""
    base, extra = divmod(count, world)
    first = rank * base + min(rank, extra)
    return range(first, first + base + (rank < extra))


def slots_of(rank: int, world: int, global_batch_size: int) -> range:
    """The slots of the global batch that rank reads; DataError where there are more ranks than slots."""
    if world > global_batch_size:
        raise DataError(
            f"train.global_batch_size = {global_batch_size} is smaller than the world size {world}: every rank "
            "needs at least one sample a step; use fewer processes or a larger batch"
        )
    return share_of(rank, world, global_batch_size)


class _SourceOrder:
    """One source, read by `slots` slots alone. first_shard: number of its first shard among those of all sources."""

    def __init__(self, seed: int, sizes: np.ndarray, first_shard: int, slots: int, epochs: int | None) -> None:
        self._seed, self._sizes, self._first_shard, self._epochs = seed, sizes, first_shard, epochs
        self.slots = slots
        self._chunk_length = int(np.clip(int(sizes.sum()) // (CHUNKS_PER_SLOT * slots), 1, MAX_CHUNK))
        chunks = -(-sizes // self._chunk_length)  # int64 [shards]
        self._ends = np.cumsum(chunks)
        self.chunks = int(self._ends[-1])
        # One byte per chunk: with 100 million samples this array and the live permutations are what stays in memory.
        self.lengths = np.full(self.chunks, self._chunk_length, np.uint8)
        filled = chunks > 0
        self.lengths[self._ends[filled] - 1] = sizes[filled] - (chunks[filled] - 1) * self._chunk_length
        self._permutations: dict[int, np.ndarray] = {}
        self._kept_permutations = LIVE_EPOCHS + 2 * slots // self.chunks  # one step may span several epochs

    def length(self, number: int) -> int:
        """Samples of chunk `number`."""
        return int(self.lengths[self._permuted(number)])

    def chunk(self, number: int) -> Chunk:
        """Chunk `number` of the source; past its last epoch one of END_OF_DATA."""
        epoch, chunk = number // self.chunks, self._permuted(number)
        if self._epochs is not None and epoch >= self._epochs:  # as long as it would be, so that nothing is shifted
            return Chunk(END_OF_DATA, np.full(self.lengths[chunk], END_OF_DATA))
        within = np.arange(self.lengths[chunk])
        order = np.argsort(mix(self._seed, _PURPOSE_INSIDE, epoch, chunk, within), kind="stable")
        shard = int(np.searchsorted(self._ends, chunk, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        return Chunk(self._first_shard + shard, (chunk - before) * self._chunk_length + order)

    def _permuted(self, number: int) -> int:
        """The chunk that has a number."""
        epoch, j = divmod(number, self.chunks)
        if epoch not in self._permutations:
            while len(self._permutations) >= self._kept_permutations:
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = self._permute(np.array([epoch]))[0].astype(np.uint32)
        return int(self._permutations[epoch][j])

    def lengths_of(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first]: samples of each of the chunks first ... last - 1, whatever the number of epochs."""
        epoch = first // self.chunks
        chunks = self._permute(np.arange(epoch, -(-last // self.chunks))).ravel()
        return self.lengths[chunks[first - epoch * self.chunks : last - epoch * self.chunks]].astype(np.int64)

    def _permute(self, epochs: np.ndarray) -> np.ndarray:
        """int64 [len(epochs), C]: the chunk permutation of each epoch."""
        hashes = mix(self._seed, _PURPOSE_CHUNKS, epochs[:, None], np.arange(self.chunks)[None, :])
        return np.argsort(hashes, axis=1, kind="stable")

    def seek(self, slots: np.ndarray, samples: np.ndarray) -> tuple[list[int], list[int]]:
        """For each of some slots, int64 [n], that have read `samples` samples, int64 [n]: the chunk in which the next
        one lies, and its offset there.

        That is where the lengths of the slot's chunks b, b + K, b + 2K, ... add up to more than it has read. Equal
        chunks need one division. Else the list is looked at in blocks of `rows` rows of K chunks, one chunk per slot in
        each row: column sums tell how many rows each slot has behind it, and a slot that a block does not suffice takes
        the rest of its samples to the next block. Only lengths are computed, no samples.
        """
        longest = int(self.lengths.max())
        if (self.lengths == longest).all():
            return (slots + self.slots * (samples // longest)).tolist(), (samples % longest).tolist()

        chunk, offset = np.full(len(slots), -1), np.zeros(len(slots), np.int64)  # -1: not found yet
        remaining = samples.astype(np.int64)  # samples that the slot has still to pass
        # A block covers at least an epoch, so that each epoch is permuted twice at most. More chunks than there are
        # samples to pass would be wasted: no chunk is empty.
        passed = int(samples.max(initial=0)) + 1
        rows = -(-max(min(SEEK_BLOCK, passed * self.slots), self.chunks) // self.slots)
        base = 0  # the block's first row
        while (chunk < 0).any():
            lengths = self.lengths_of(base * self.slots, (base + rows) * self.slots)
            lengths = lengths.reshape(rows, self.slots)[:, slots]
            ends = np.cumsum(lengths, axis=0)  # [rows, slots] samples
            row = (ends <= remaining).sum(axis=0)  # chunks of this block that end before the wanted sample
            for i in np.flatnonzero((chunk < 0) & (row < rows)):
                chunk[i] = (base + row[i]) * self.slots + slots[i]
                offset[i] = remaining[i] - (ends[row[i], i] - lengths[row[i], i])
            remaining -= ends[-1]
            base += rows
        return chunk.tolist(), offset.tolist()


class _Queue:
    """A slot's queue of a source's chunks, read forwards. chunk: that of sample number `first` of the queue, which is
    its sample `offset`."""

    def __init__(self, source: _SourceOrder, chunk: int, offset: int, first: int) -> None:
        self._source, self._chunk, self._start = source, chunk, first - offset

    def read(self, first: int, count: int) -> Iterator[Chunk]:
        """Samples first ... first + count - 1 of the queue, a chunk or a part of one at a time."""
        while count:
            while first >= self._start + (length := self._source.length(self._chunk)):
                self._start, self._chunk = self._start + length, self._chunk + self._source.slots
            found = self._source.chunk(self._chunk)
            samples = found.samples[first - self._start : first - self._start + count]
            yield Chunk(found.shard, samples)
            first, count = first + len(samples), count - len(samples)


class Order:
    """Which sample each slot of each step reads.

    seed: of the run. shard_sizes: samples of each shard. epochs: None repeats the sources for ever; with k, positions
    past the k-th epoch of a source have shard END_OF_DATA. sources: those that the shards belong to; None is one
    source. Raises DataError where a source that is read holds no samples.
    """

    def __init__(
        self,
        seed: int,
        shard_sizes: Sequence[int],
        global_batch_size: int,
        epochs: int | None,
        sources: Sequence[Source] | None = None,
    ) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        sources = sources or [Source(len(sizes), 1.0)]
        first_shards = np.cumsum([0, *(source.shards for source in sources)])
        read = [number for number, source in enumerate(sources) if source.weight]
        self.global_batch_size = global_batch_size
        self._shares = Shares([Fraction(sources[number].weight) for number in read], global_batch_size)
        self._sources: list[_SourceOrder] = []
        for number, slots in zip(read, self._shares.slots, strict=True):
            own = sizes[first_shards[number] : first_shards[number + 1]]
            if own.sum() == 0:
                raise DataError("data.shards holds no samples; build shards with launch/shard.py")
            own_seed = int(mix(seed, number)) if number else seed  # so that equal sources have different orders
            self._sources.append(_SourceOrder(own_seed, own, int(first_shards[number]), max(1, slots), epochs))

    def steps(self, first_step: int, slots: range) -> Iterator[tuple[int, list[Position]]]:
        """Endless (step, positions of `slots`) from first_step on, without replaying what comes before."""
        samples = [self._samples(queue) for queue in self.queues(first_step, slots)]
        step = first_step
        while True:
            first = step * self.global_batch_size
            yield step, [Position(step, b, first + b, *next(queue)) for b, queue in zip(slots, samples, strict=True)]
            step += 1

    @staticmethod
    def _samples(queue: Iterator[Chunk]) -> Iterator[tuple[int, int]]:
        for shard, samples in queue:
            for sample in samples.tolist():
                yield shard, sample

    def queues(self, first_step: int, slots: range) -> list[Iterator[Chunk]]:
        """For each slot the endless chunks that it reads from first_step on; of the first one only what is left."""
        starts = self._seek(first_step, slots)
        return [self._queue(first_step, slot, starts) for slot in slots]

    def _queue(self, first_step: int, slot: int, starts: Mapping[tuple[int, int], _Start]) -> Iterator[Chunk]:
        queues: dict[tuple[int, int], _Queue] = {}
        for read in self._shares.reads(slot, first_step):
            at = read.source, read.queue
            if at not in queues:
                queues[at] = _Queue(self._sources[read.source], *starts[at])
            yield from queues[at].read(read.first, read.steps)

    def _seek(self, step: int, slots: range) -> dict[tuple[int, int], _Start]:
        """Where all queues that `slots` may read stand at `step`: {(source, queue): its _Start}."""
        wanted = sorted({at for slot in slots for at in self._shares.queues(slot)})
        before = self._shares.before(np.array([step]))[:, 0]
        found = {}
        for i, source in enumerate(self._sources):
            queues = np.array([queue for number, queue in wanted if number == i], np.int64)
            samples = (before[i] - queues + source.slots - 1) // source.slots
            places = zip(*source.seek(queues, samples), samples.tolist(), strict=True)
            found |= {(i, int(queue)): _Start(*place) for queue, place in zip(queues, places, strict=True)}
        return found
