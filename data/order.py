"""The order of samples as arithmetic: a pure function of (seed, shard sizes, weights, global batch size).

A stream is one source: an epoch is a seeded permutation of its chunks (neighbouring samples of one shard), and the
chunks of all epochs, one after the other, are numbered epoch * C + j. The chunks of several streams are interleaved
so that the share of samples follows the weights; each stream runs its own epochs. Chunk g of the whole goes to slot
g % B of the global batch, and slot b of step s takes the s-th sample of its queue. There is no state and no
generator, so a resume seeks, and the world size only decides which rank owns which slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from .errors import DataError

MAX_CHUNK = 64  # samples; a larger chunk reads longer ranges, a smaller one mixes better
CHUNKS_PER_SLOT = 4  # at least, in an epoch, so that small sets are mixed too
SEEK_BLOCK = 1 << 18  # chunks looked at together while seeking: bounds memory, still vectorised
LIVE_EPOCHS = 3  # slots lie less than two epochs apart
_RATE_BITS = 31  # of a stream's rate: exact to less than a chunk over 2^31 chunks
END_OF_DATA = -1  # shard and sample of a position past the last epoch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_PURPOSE_CHUNKS, _PURPOSE_INSIDE, _PURPOSE_KEY = 1, 2, 3  # data.buckets has 4 and 5


class Position(NamedTuple):
    """One sample of the global batch: position = step * B + slot; shard is END_OF_DATA past the end."""

    step: int
    slot: int
    position: int
    shard: int
    sample: int


class Part(NamedTuple):
    """A source: its number of shards (they follow those of the sources before it) and its weight; 0: not read."""

    shards: int
    weight: float | Fraction


class Run(NamedTuple):
    """What is left of a chunk: its shard, and its samples (int64) in reading order; END_OF_DATA past the last epoch."""

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
    """int64 keys of positions: the source of all randomness of a sample (decision 4)."""
    return mix(seed, _PURPOSE_KEY, positions).view(np.int64)


def uniforms(keys: np.ndarray, purpose: str | int) -> np.ndarray:
    """float64 in [0, 1), one a key; independent streams for different purposes."""
    if isinstance(purpose, str):
        purpose = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return (mix(keys, purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def share_of(rank: int, world: int, count: int) -> range:
    """Contiguous part of range(count) for rank, as even as possible: the first count % world get one more."""
    base, extra = divmod(count, world)
    first = rank * base + min(rank, extra)
    return range(first, first + base + (rank < extra))


def rates_of(weights: Sequence[Fraction]) -> list[int]:
    """Share of each of several streams in what those before it leave, times 2^_RATE_BITS; the last one has the rest."""
    return [round(weights[i] / sum(weights[i:]) * 2**_RATE_BITS) for i in range(len(weights) - 1)]


def deal(rates: Sequence[int], g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n] numbers of the whole -> (stream, number in that stream), both int64 [n].

    Stream 0 has every 1/rate-th; what it leaves is numbered anew and dealt the same way.
    """
    half = 1 << (_RATE_BITS - 1)
    source, number, rest = np.full_like(g, len(rates)), g, g
    for i, rate in enumerate(rates):
        before = (rest * rate + half) >> _RATE_BITS
        left = source == len(rates)  # not taken by a stream before this one
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


class _Stream:
    """The chunks of one source. first_shard: number of its first shard among those of all sources."""

    def __init__(self, seed: int, sizes: np.ndarray, first_shard: int, chunk_length: int) -> None:
        self._seed, self._sizes, self._first_shard, self._chunk_length = seed, sizes, first_shard, chunk_length
        chunks = -(-sizes // chunk_length)  # int64 [shards]
        self._ends = np.cumsum(chunks)
        self.chunks = int(self._ends[-1])
        self.samples = int(sizes.sum())
        # One byte a chunk: with 100 million samples this array and the live permutations are what is resident.
        self.lengths = np.full(self.chunks, chunk_length, np.uint8)
        filled = chunks > 0
        self.lengths[self._ends[filled] - 1] = sizes[filled] - (chunks[filled] - 1) * chunk_length
        self._permutations: dict[int, np.ndarray] = {}
        self.kept = LIVE_EPOCHS

    def run(self, number: int, epochs: int | None) -> Run:
        """Chunk `number` of the stream."""
        epoch, j = divmod(number, self.chunks)
        if epoch not in self._permutations:
            while len(self._permutations) >= self.kept:
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = self._permute(np.array([epoch]))[0].astype(np.uint32)
        chunk = int(self._permutations[epoch][j])
        if epochs is not None and epoch >= epochs:  # as long as the chunk would be: the other sources' are not shifted
            return Run(END_OF_DATA, np.full(self.lengths[chunk], END_OF_DATA))
        within = np.arange(self.lengths[chunk])
        order = np.argsort(mix(self._seed, _PURPOSE_INSIDE, epoch, chunk, within), kind="stable")
        shard = int(np.searchsorted(self._ends, chunk, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        return Run(self._first_shard + shard, (chunk - before) * self._chunk_length + order)

    def lengths_of(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first]: samples of chunks first ... last - 1, as if epochs had no end."""
        epoch = first // self.chunks
        chunks = self._permute(np.arange(epoch, -(-last // self.chunks))).ravel()
        return self.lengths[chunks[first - epoch * self.chunks : last - epoch * self.chunks]].astype(np.int64)

    def _permute(self, epochs: np.ndarray) -> np.ndarray:
        """int64 [len(epochs), C]: the chunk permutation of each epoch."""
        hashes = mix(self._seed, _PURPOSE_CHUNKS, epochs[:, None], np.arange(self.chunks)[None, :])
        return np.argsort(hashes, axis=1, kind="stable")


class Order:
    """Which sample each slot of each step reads.

    seed: of the run. shard_sizes: samples of each shard. epochs: None repeats for ever; with k, positions
    past the k-th epoch of a source have shard END_OF_DATA. parts: the sources among the shards; None is one source.
    """

    def __init__(
        self,
        seed: int,
        shard_sizes: Sequence[int],
        global_batch_size: int,
        epochs: int | None,
        parts: Sequence[Part] | None = None,
    ) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        parts = parts or [Part(len(sizes), 1.0)]
        self.global_batch_size = global_batch_size
        self.epochs = epochs
        self._streams: list[_Stream] = []
        weights = [Fraction(part.weight) for part in parts]
        total = sum(weights)
        first = 0
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            own = sizes[first : first + part.shards]
            if weight == 0:
                first += part.shards
                continue
            if own.sum() == 0:
                raise DataError("data.shards holds no samples; build shards with launch/shard.py")
            in_batch = global_batch_size * weight / total  # samples of a step, on average
            length = int(np.clip(int(own.sum()) // (CHUNKS_PER_SLOT * in_batch), 1, MAX_CHUNK))
            stream_seed = int(mix(seed, number)) if number else seed  # so that equal sources are not in step
            self._streams.append(_Stream(stream_seed, own, first, length))
            first += part.shards
        self._chunks = sum(stream.chunks for stream in self._streams)
        for stream in self._streams:
            stream.kept += 2 * global_batch_size // stream.chunks  # one step may span several epochs
        # By chunks, so that the shares of samples follow the weights.
        read = filter(None, weights)
        self._rates = rates_of([w * s.chunks / s.samples for w, s in zip(read, self._streams, strict=True)])

    def steps(self, first_step: int, slots: range) -> Iterator[tuple[int, list[Position]]]:
        """Endless (step, positions of `slots`) from first_step on; seeks without replaying samples."""
        samples = [self._samples(queue) for queue in self.queues(first_step, slots)]
        step = first_step
        while True:
            first = step * self.global_batch_size
            yield step, [Position(step, b, first + b, *next(queue)) for b, queue in zip(slots, samples, strict=True)]
            step += 1

    @staticmethod
    def _samples(queue: Iterator[Run]) -> Iterator[tuple[int, int]]:
        for shard, samples in queue:
            for sample in samples.tolist():
                yield shard, sample

    def queues(self, first_step: int, slots: range) -> list[Iterator[Run]]:
        """For each slot the endless chunks that it reads from first_step on; the first one may be begun."""
        chunks, offsets = self._seek(first_step, slots)
        return [self._queue(chunk, offset) for chunk, offset in zip(chunks, offsets, strict=True)]

    def _queue(self, g: int, offset: int) -> Iterator[Run]:
        while True:
            source, number = deal(self._rates, np.array([g]))
            run = self._streams[int(source[0])].run(int(number[0]), self.epochs)
            yield Run(run.shard, run.samples[offset:])
            g, offset = g + self.global_batch_size, 0

    def _lengths(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first]: samples of chunks first ... last - 1 of the whole."""
        source, number = deal(self._rates, np.arange(first, last))
        lengths = np.empty(last - first, np.int64)
        for i, stream in enumerate(self._streams):
            own = number[source == i]
            if len(own):
                lengths[source == i] = stream.lengths_of(int(own[0]), int(own[-1]) + 1)
        return lengths

    def _seek(self, step: int, slots: range) -> tuple[list[int], list[int]]:
        """Chunk of the whole and offset in it of sample number `step` of each slot's queue.

        Walks over blocks of chunks, rows of one for each slot, until every slot's queue is longer than `step`.
        """
        batch, first = self.global_batch_size, np.asarray(slots, np.int64)
        longest = max(int(stream.lengths.max()) for stream in self._streams)
        if all((stream.lengths == longest).all() for stream in self._streams):  # equal chunks need no walk
            return (first + batch * (step // longest)).tolist(), [step % longest] * len(slots)

        chunk, offset = np.full(len(slots), -1), np.zeros(len(slots), np.int64)
        remaining = np.full(len(slots), step, np.int64)
        # At least an epoch, so that each is permuted twice at most; more chunks than samples are asked for is too many.
        rows = -(-max(min(SEEK_BLOCK, (step + 1) * batch), self._chunks) // batch)
        base = 0
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
