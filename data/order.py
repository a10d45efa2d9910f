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
    Both are END_OF_DATA past the last epoch. of_rest: the numbers are those among the samples that were left over (see
    Order)."""

    shard: int
    samples: np.ndarray
    of_rest: bool = False


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


class _Chunks:
    """Samples of a source, cut into chunks. sizes: int64 [shards], samples of each shard."""

    def __init__(self, sizes: np.ndarray, length: int) -> None:
        self._length = length
        chunks = -(-sizes // length)  # int64 [shards]
        self._ends = np.cumsum(chunks)
        self._first_samples = np.cumsum(sizes) - sizes  # of each shard
        self.count = int(self._ends[-1])
        # One byte per chunk: with 100 million samples this array and the live permutations are what stays in memory.
        self.lengths = np.full(self.count, length, np.uint8)
        filled = chunks > 0
        self.lengths[self._ends[filled] - 1] = sizes[filled] - (chunks[filled] - 1) * length

    def place(self, chunk: int) -> tuple[int, int]:
        """The shard of a chunk, and the number of its first sample there."""
        shard = int(np.searchsorted(self._ends, chunk, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        return shard, (chunk - before) * self._length

    def number_of(self, shard: int, samples: np.ndarray) -> np.ndarray:
        """The numbers of a shard's samples among all samples of the source."""
        return self._first_samples[shard] + samples


class _SourceOrder:
    """One source, read by `slots` slots alone. first_shard: number of its first shard among those of all sources.
    rest: int64 [shards], samples of each shard that the first epoch has, where it has not all of them."""

    def __init__(
        self,
        seed: int,
        sizes: np.ndarray,
        first_shard: int,
        slots: int,
        epochs: int | None,
        rest: np.ndarray | None = None,
    ) -> None:
        self._seed, self._first_shard, self._epochs = seed, first_shard, epochs
        self.slots = slots
        length = int(np.clip(int(sizes.sum()) // (CHUNKS_PER_SLOT * slots), 1, MAX_CHUNK))
        self._whole = _Chunks(sizes, length)
        self._has_rest = rest is not None and bool(rest.any())
        self._first = _Chunks(rest, length) if rest is not None and self._has_rest else self._whole
        self._permutations: dict[int, np.ndarray] = {}
        # One step may span several epochs.
        self._kept_permutations = LIVE_EPOCHS + self._has_rest + 2 * slots // self._whole.count

    def _epoch(self, number: int) -> tuple[int, int]:
        """(the epoch of chunk `number`, its place there)."""
        if number < self._first.count:
            return 0, number
        epoch, j = divmod(number - self._first.count, self._whole.count)
        return epoch + 1, j

    def _start(self, epoch: int) -> int:
        """The number of the first chunk of an epoch."""
        return self._first.count + (epoch - 1) * self._whole.count if epoch else 0

    def _chunks(self, epoch: int) -> _Chunks:
        return self._whole if epoch else self._first

    def length(self, number: int) -> int:
        """Samples of chunk `number`."""
        epoch, chunk = self._permuted(number)
        return int(self._chunks(epoch).lengths[chunk])

    def chunk(self, number: int) -> Chunk:
        """Chunk `number` of the source; past its last epoch one of END_OF_DATA."""
        epoch, chunk = self._permuted(number)
        chunks = self._chunks(epoch)
        if self._epochs is not None and epoch >= self._epochs:  # as long as it would be, so that nothing is shifted
            return Chunk(END_OF_DATA, np.full(chunks.lengths[chunk], END_OF_DATA))
        within = np.arange(chunks.lengths[chunk])
        order = np.argsort(mix(self._seed, _PURPOSE_INSIDE, epoch, chunk, within), kind="stable")
        shard, first = chunks.place(chunk)
        return Chunk(self._first_shard + shard, first + order, self._has_rest and epoch == 0)

    def _permuted(self, number: int) -> tuple[int, int]:
        """(the epoch of chunk `number`, which of the epoch's chunks it is)."""
        epoch, j = self._epoch(number)
        if epoch not in self._permutations:
            while len(self._permutations) >= self._kept_permutations:
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = self._permute(np.array([epoch]), self._chunks(epoch))[0].astype(np.uint32)
        return epoch, int(self._permutations[epoch][j])

    def lengths_of(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first]: samples of each of the chunks first ... last - 1, whatever the number of epochs."""
        epoch, end = self._epoch(first)[0], self._epoch(last - 1)[0] + 1
        of_first = self._first.lengths[self._permute(np.arange(epoch, 1), self._first)]
        of_others = self._whole.lengths[self._permute(np.arange(max(1, epoch), end), self._whole)]
        lengths = np.concatenate([of_first.ravel(), of_others.ravel()])
        return lengths[first - self._start(epoch) : last - self._start(epoch)].astype(np.int64)

    def _permute(self, epochs: np.ndarray, chunks: _Chunks) -> np.ndarray:
        """int64 [len(epochs), C]: the chunk permutation of each epoch. chunks: those that all these epochs have."""
        hashes = mix(self._seed, _PURPOSE_CHUNKS, epochs[:, None], np.arange(chunks.count)[None, :])
        return np.argsort(hashes, axis=1, kind="stable")

    def left_over(self, chunk: np.ndarray, offset: np.ndarray) -> tuple[bool, np.ndarray]:
        """What the epoch in progress has still to read, where queue b stands at sample offset[b] of chunk chunk[b],
        both int64 [slots]: (whether its samples are those of `rest`, bool [its samples]).

        The epoch in progress is the newest that any queue has read of. What slower queues have left of the one before
        is given up: about a chunk of each.
        """
        begun = np.where(offset > 0, chunk, chunk - self.slots)  # the last chunk that each queue has read of
        epoch = self._epoch(max(0, int(begun.max())))[0]
        chunks, numbers = self._chunks(epoch), self._start(epoch) + np.arange(self._chunks(epoch).count)
        read = np.zeros(chunks.count, bool)
        read[self._permute(np.array([epoch]), chunks)[0]] = numbers < chunk[numbers % self.slots]
        left = ~np.repeat(read, chunks.lengths)
        for number, count in zip(chunk.tolist(), offset.tolist(), strict=True):
            if count and self._epoch(number)[0] == epoch:
                found = self.chunk(number)
                left[chunks.number_of(found.shard - self._first_shard, found.samples[:count])] = False
        return self._has_rest and epoch == 0, left

    def seek(self, slots: np.ndarray, samples: np.ndarray) -> tuple[list[int], list[int]]:
        """For each of some slots, int64 [n], that have read `samples` samples, int64 [n]: the chunk in which the next
        one lies, and its offset there.

        That is where the lengths of the slot's chunks b, b + K, b + 2K, ... add up to more than it has read. Equal
        chunks need one division. Else the list is looked at in blocks of `rows` rows of K chunks, one chunk per slot in
        each row: column sums tell how many rows each slot has behind it, and a slot that a block does not suffice takes
        the rest of its samples to the next block. Only lengths are computed, no samples.
        """
        lengths = [self._first.lengths, self._whole.lengths]
        longest = int(self._whole.lengths.max())
        if all((each == longest).all() for each in lengths):
            return (slots + self.slots * (samples // longest)).tolist(), (samples % longest).tolist()

        chunk, offset = np.full(len(slots), -1), np.zeros(len(slots), np.int64)  # -1: not found yet
        remaining = samples.astype(np.int64)  # samples that the slot has still to pass
        # A block covers at least an epoch, so that each epoch is permuted twice at most. More chunks than there are
        # samples to pass would be wasted: no chunk is empty.
        passed = int(samples.max(initial=0)) + 1
        rows = -(-max(min(SEEK_BLOCK, passed * self.slots), self._whole.count) // self.slots)
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
            yield found._replace(samples=samples)
            first, count = first + len(samples), count - len(samples)


class Order:
    """Which sample each slot of each step reads.

    seed: of the run. shard_sizes: samples of each shard. epochs: None repeats the sources for ever; with k, positions
    past the k-th epoch of a source have shard END_OF_DATA. sources: those that the shards belong to; None is one
    source. rest: int64 [shards], how many samples of each shard the first epoch reads, where others of an epoch were
    read already; the numbers of its samples are those among these. Raises DataError where a source that is read holds
    no samples.
    """

    def __init__(
        self,
        seed: int,
        shard_sizes: Sequence[int],
        global_batch_size: int,
        epochs: int | None,
        sources: Sequence[Source] | None = None,
        rest: np.ndarray | None = None,
    ) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        sources = sources or [Source(len(sizes), 1.0)]
        first_shards = np.cumsum([0, *(source.shards for source in sources)])
        read = [number for number, source in enumerate(sources) if source.weight]
        self.global_batch_size = global_batch_size
        self._shares = Shares([Fraction(sources[number].weight) for number in read], global_batch_size)
        self._sources: list[_SourceOrder] = []
        for number, slots in zip(read, self._shares.slots, strict=True):
            shards = slice(first_shards[number], first_shards[number + 1])
            own, own_rest = sizes[shards], None if rest is None else rest[shards]
            if own.sum() == 0:
                raise DataError("data.shards holds no samples; build shards with launch/shard.py")
            own_seed = int(mix(seed, number)) if number else seed  # so that equal sources have different orders
            self._sources.append(_SourceOrder(own_seed, own, int(shards.start), max(1, slots), epochs, own_rest))
        self._read = read

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
        for chunk in queue:
            for sample in chunk.samples.tolist():
                yield chunk.shard, sample

    def queues(self, first_step: int, slots: range) -> list[Iterator[Chunk]]:
        """For each slot the endless chunks that it reads from first_step on; of the first one only what is left."""
        starts = self._seek(first_step, slots)
        return [self._queue(first_step, slot, starts) for slot in slots]

    def left_over(self, step: int) -> dict[int, tuple[bool, np.ndarray]]:
        """For each source that is read, by its number: what the epochs in progress have still to read before `step`
        (see _SourceOrder.left_over)."""
        starts = self._seek(step, range(self.global_batch_size))
        found = {}
        for i, source in enumerate(self._sources):
            queues = [starts[i, queue] for queue in range(source.slots)]
            chunk, offset = (np.array(each, np.int64) for each in zip(*(q[:2] for q in queues), strict=True))
            found[self._read[i]] = source.left_over(chunk, offset)
        return found

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
