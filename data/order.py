"""Which sample each slot of each step reads, as arithmetic: no state and no generator, so a resume seeks.

The order is a pure function of (seed, samples of each shard, weights of the sources, global batch size B):

1. A shard is cut into chunks of up to MAX_CHUNK neighbouring samples, so that a chunk is one range of bytes.
2. An epoch of a source is a permutation of its C chunks by hash of (seed, epoch, chunk). The chunks of all its epochs,
   one epoch after the other, are numbered epoch * C + j.
3. The chunks of all sources are interleaved into one list by weight (`deal`); each source runs through epochs of its
   own.
4. Chunk g of that list goes to slot g % B of the global batch: slot b has the queue of chunks b, b + B, b + 2B, ...
5. Inside a chunk the samples are read in an order by hash of (seed, epoch, chunk, sample).
6. Step s takes the next sample of each slot's queue: its s-th, counted from the first step of the run. So a batch mixes
   B chunks. Slots whose chunks were shorter are further on in the list than others.
7. The sample of slot b at step s has the position s * B + b, and the hash of (seed, position) is its key: the source of
   all its randomness (crop, flip, caption, noise).
8. Rank r owns a contiguous range of slots (`slots_of`). That is all that the world size decides.

In a run of several buckets each bucket has an order of its own, see data.buckets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from .errors import DataError

MAX_CHUNK = 64  # samples; a larger chunk reads longer ranges, a smaller one mixes better
CHUNKS_PER_SLOT = 4  # at least, per epoch: the chunks of small sets are shorter, so that these are mixed too
SEEK_BLOCK = 1 << 18  # chunks that a seek looks at together: few enough for memory, enough for numpy to be fast
LIVE_EPOCHS = 3  # permutations kept per source: its slots lie less than two epochs apart
_RATE_BITS = 31  # binary digits of a rate: over 2^31 chunks a source's share is exact to less than one chunk
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


def rates_of(weights: Sequence[Fraction]) -> list[int]:
    """The rates that `deal` takes for several sources: each one's share of what those before it leave, times
    2^_RATE_BITS. The last one takes the rest and has none."""
    return [round(weights[i] / sum(weights[i:]) * 2**_RATE_BITS) for i in range(len(weights) - 1)]


def deal(rates: Sequence[int], g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deal the numbers 0, 1, 2, ... to several sources by their rates, without walking over them.

    g: int64 [n] numbers -> (the source that each goes to, its number within that source), both int64 [n].

    Let F(x) be x * rate rounded to a whole number. The first source takes x where F(x + 1) > F(x). A rate is at most 1,
    so F rises by 0 or 1: of the numbers below x exactly F(x) are taken, for any x. Hence F(x) is also the number of x
    within the source, the source's share of 0 ... x - 1 is exact to within one half, and its share of any range of
    numbers, such as a batch, to within one. What is not taken is numbered anew without gaps, as x - F(x), and the next
    source takes from that in the same way; each source before it adds at most one half to its error.
    """
    half = 1 << (_RATE_BITS - 1)
    source, number, rest = np.full_like(g, len(rates)), g, g
    for i, rate in enumerate(rates):
        before = (rest * rate + half) >> _RATE_BITS  # F(rest)
        left = source == len(rates)  # not taken by a source before this one
        taken = left & (((rest + 1) * rate + half) >> _RATE_BITS > before)
        number = np.where(taken, before, np.where(left, rest - before, number))
        source = np.where(taken, i, source)
        rest = np.where(left, rest - before, rest)
    return source, number


def slots_of(rank: int, world: int, global_batch_size: int) -> range:
    """The slots of the global batch that rank reads; DataError where there are more ranks than slots."""
    if world > global_batch_size:
        raise DataError(
            f"train.global_batch_size = {global_batch_size} is smaller than the world size {world}: every rank "
            "needs at least one sample a step; use fewer processes or a larger batch"
        )
    return share_of(rank, world, global_batch_size)


class _SourceChunks:
    """The chunks of one source in all epochs. first_shard: number of its first shard among those of all sources."""

    def __init__(self, seed: int, sizes: np.ndarray, first_shard: int, chunk_length: int) -> None:
        self._seed, self._sizes, self._first_shard, self._chunk_length = seed, sizes, first_shard, chunk_length
        chunks = -(-sizes // chunk_length)  # int64 [shards]
        self._ends = np.cumsum(chunks)
        self.chunks = int(self._ends[-1])
        self.samples = int(sizes.sum())
        # One byte per chunk: with 100 million samples this array and the live permutations are what stays in memory.
        self.lengths = np.full(self.chunks, chunk_length, np.uint8)
        filled = chunks > 0
        self.lengths[self._ends[filled] - 1] = sizes[filled] - (chunks[filled] - 1) * chunk_length
        self._permutations: dict[int, np.ndarray] = {}
        self.kept_permutations = LIVE_EPOCHS

    def chunk(self, number: int, epochs: int | None) -> Chunk:
        """Chunk `number` of the source; past the last of `epochs` one of END_OF_DATA."""
        epoch, j = divmod(number, self.chunks)
        if epoch not in self._permutations:
            while len(self._permutations) >= self.kept_permutations:
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = self._permute(np.array([epoch]))[0].astype(np.uint32)
        chunk = int(self._permutations[epoch][j])
        if epochs is not None and epoch >= epochs:  # as long as the chunk would be, so that no other source is shifted
            return Chunk(END_OF_DATA, np.full(self.lengths[chunk], END_OF_DATA))
        within = np.arange(self.lengths[chunk])
        order = np.argsort(mix(self._seed, _PURPOSE_INSIDE, epoch, chunk, within), kind="stable")
        shard = int(np.searchsorted(self._ends, chunk, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        return Chunk(self._first_shard + shard, (chunk - before) * self._chunk_length + order)

    def lengths_of(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first]: samples of each of the chunks first ... last - 1, whatever the number of epochs."""
        epoch = first // self.chunks
        chunks = self._permute(np.arange(epoch, -(-last // self.chunks))).ravel()
        return self.lengths[chunks[first - epoch * self.chunks : last - epoch * self.chunks]].astype(np.int64)

    def _permute(self, epochs: np.ndarray) -> np.ndarray:
        """int64 [len(epochs), C]: the chunk permutation of each epoch."""
        hashes = mix(self._seed, _PURPOSE_CHUNKS, epochs[:, None], np.arange(self.chunks)[None, :])
        return np.argsort(hashes, axis=1, kind="stable")


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
        self.global_batch_size = global_batch_size
        self.epochs = epochs
        self._sources: list[_SourceChunks] = []
        weights = [Fraction(source.weight) for source in sources]
        total = sum(weights)
        first = 0
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            own = sizes[first : first + source.shards]
            if weight == 0:
                first += source.shards
                continue
            if own.sum() == 0:
                raise DataError("data.shards holds no samples; build shards with launch/shard.py")
            in_batch = global_batch_size * weight / total  # samples of a step, on average
            length = int(np.clip(int(own.sum()) // (CHUNKS_PER_SLOT * in_batch), 1, MAX_CHUNK))
            own_seed = int(mix(seed, number)) if number else seed  # so that equal sources have different orders
            self._sources.append(_SourceChunks(own_seed, own, first, length))
            first += source.shards
        self._chunks = sum(source.chunks for source in self._sources)
        for source in self._sources:
            source.kept_permutations += 2 * global_batch_size // source.chunks  # one step may span several epochs
        # Weights are of samples and chunks are what is dealt: a source of shorter chunks gets more of them.
        read = filter(None, weights)
        self._rates = rates_of([w * s.chunks / s.samples for w, s in zip(read, self._sources, strict=True)])

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
        chunks, offsets = self._seek(first_step, slots)
        return [self._queue(chunk, offset) for chunk, offset in zip(chunks, offsets, strict=True)]

    def _queue(self, g: int, offset: int) -> Iterator[Chunk]:
        """Chunk g of the list and every B-th after it; the first one from its sample `offset` on."""
        while True:
            source, number = deal(self._rates, np.array([g]))
            chunk = self._sources[int(source[0])].chunk(int(number[0]), self.epochs)
            yield Chunk(chunk.shard, chunk.samples[offset:])
            g, offset = g + self.global_batch_size, 0

    def _lengths(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first]: samples of each of the chunks first ... last - 1 of the list of all sources."""
        source, number = deal(self._rates, np.arange(first, last))
        lengths = np.empty(last - first, np.int64)
        for i, chunks in enumerate(self._sources):
            own = number[source == i]
            if len(own):
                lengths[source == i] = chunks.lengths_of(int(own[0]), int(own[-1]) + 1)
        return lengths

    def _seek(self, step: int, slots: range) -> tuple[list[int], list[int]]:
        """For each slot the chunk of the list, and the offset in it, of the sample that it reads at `step`.

        Slot b has read `step` samples by then, so this is where the lengths of the chunks b, b + B, b + 2B, ... add up
        to more than `step`. Equal chunks need one division. Else the list is looked at in blocks of `rows` rows of B
        chunks, one chunk per slot in each row: column sums tell how many rows each slot has behind it, and a slot that
        a block does not suffice takes the rest of its samples to the next block. Only lengths are computed, no samples.
        """
        batch, first = self.global_batch_size, np.asarray(slots, np.int64)
        longest = max(int(source.lengths.max()) for source in self._sources)
        if all((source.lengths == longest).all() for source in self._sources):
            return (first + batch * (step // longest)).tolist(), [step % longest] * len(slots)

        chunk, offset = np.full(len(slots), -1), np.zeros(len(slots), np.int64)  # -1: not found yet
        remaining = np.full(len(slots), step, np.int64)  # samples that the slot has still to pass
        # A block covers at least an epoch, so that each epoch is permuted twice at most. More chunks than `step`
        # samples need would be wasted: no chunk is empty.
        rows = -(-max(min(SEEK_BLOCK, (step + 1) * batch), self._chunks) // batch)
        base = 0  # the block's first row
        while (chunk < 0).any():
            lengths = self._lengths(base * batch, (base + rows) * batch).reshape(rows, batch)[:, first]
            ends = np.cumsum(lengths, axis=0)  # [rows, slots] samples
            row = (ends <= remaining).sum(axis=0)  # chunks of this block that end before the wanted sample
            for i in np.flatnonzero((chunk < 0) & (row < rows)):
                chunk[i] = (base + row[i]) * batch + first[i]
                offset[i] = remaining[i] - (ends[row[i], i] - lengths[row[i], i])
            remaining -= ends[-1]
            base += rows
        return chunk.tolist(), offset.tolist()
