"""The order of samples as arithmetic: a pure function of (seed, shard sizes, global batch size).

An epoch is a seeded permutation of chunks (neighbouring samples of one shard). The chunks of all epochs, one
after the other, are numbered g = epoch * C + j and dealt to the B slots of the global batch: chunk g goes to
slot g % B. Slot b of step s takes the s-th sample of its queue. There is no state and no generator, so a
resume seeks, and the world size only decides which rank owns which slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .config import DataError

MAX_CHUNK = 64  # samples; a larger chunk reads longer ranges, a smaller one mixes better
CHUNKS_PER_SLOT = 4  # at least, in an epoch, so that small sets are mixed too
SEEK_BLOCK = 1 << 18  # chunks permuted at once while seeking: bounds memory, still vectorised
END_OF_DATA = -1  # shard and sample of a position past the last epoch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_PURPOSE_CHUNKS, _PURPOSE_INSIDE, _PURPOSE_KEY = 1, 2, 3


class Position(NamedTuple):
    """One sample of the global batch: position = step * B + slot; shard is END_OF_DATA past the end."""

    step: int
    slot: int
    position: int
    shard: int
    sample: int


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


def slots_of(rank: int, world: int, global_batch_size: int) -> range:
    """The slots of the global batch that rank reads; DataError where there are more ranks than slots."""
    if world > global_batch_size:
        raise DataError(
            f"train.global_batch_size = {global_batch_size} is smaller than the world size {world}: every rank "
            "needs at least one sample a step; use fewer processes or a larger batch"
        )
    return share_of(rank, world, global_batch_size)


class Order:
    """Which sample each slot of each step reads.

    seed: of the run. shard_sizes: samples of each shard. epochs: None repeats for ever; with k, positions
    past the k-th epoch have shard END_OF_DATA.
    """

    def __init__(self, seed: int, shard_sizes: Sequence[int], global_batch_size: int, epochs: int | None) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        if sizes.sum() == 0:
            raise DataError("data.shards holds no samples; build shards with launch/shard.py")
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.epochs = epochs
        self.chunk_length = int(np.clip(sizes.sum() // (CHUNKS_PER_SLOT * global_batch_size), 1, MAX_CHUNK))

        chunks_per_shard = -(-sizes // self.chunk_length)
        first_chunk = np.repeat(np.cumsum(chunks_per_shard) - chunks_per_shard, chunks_per_shard)
        self._shard = np.repeat(np.arange(len(sizes)), chunks_per_shard)
        self._start = (np.arange(len(self._shard)) - first_chunk) * self.chunk_length
        self._length = np.minimum(sizes[self._shard] - self._start, self.chunk_length)
        self._chunks = len(self._shard)
        self._permutations: dict[int, np.ndarray] = {}
        # Slots drift apart by some epochs at most, and more where one step spans several epochs.
        self._kept = 8 + 2 * global_batch_size // self._chunks

    def steps(self, first_step: int, slots: range) -> Iterator[tuple[int, list[Position]]]:
        """Endless (step, positions of `slots`) from first_step on; seeks without replaying samples."""
        chunk, offset = self._seek(first_step, slots)
        inside: list[np.ndarray | None] = [self._samples(g) for g in chunk]
        step = first_step
        while True:
            positions = []
            for i, slot in enumerate(slots):
                samples = inside[i]
                if samples is not None and offset[i] == len(samples):
                    chunk[i] += self.global_batch_size
                    offset[i] = 0
                    inside[i] = samples = self._samples(chunk[i])
                shard = sample = END_OF_DATA
                if samples is not None:
                    shard, sample = int(samples[offset[i], 0]), int(samples[offset[i], 1])
                    offset[i] += 1
                position = step * self.global_batch_size + slot
                positions.append(Position(step, slot, position, shard, sample))
            yield step, positions
            step += 1

    def _samples(self, g: int) -> np.ndarray | None:
        """int64 [length, 2] (shard, sample) of global chunk g in reading order; None past the last epoch."""
        epoch, j = divmod(g, self._chunks)
        if self.epochs is not None and epoch >= self.epochs:
            return None
        if epoch not in self._permutations:
            while len(self._permutations) >= self._kept:
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = self._permute(np.array([epoch]))[0]
        chunk = int(self._permutations[epoch][j])
        within = np.arange(self._length[chunk])
        order = np.argsort(mix(self.seed, _PURPOSE_INSIDE, epoch, chunk, within), kind="stable")
        return np.stack([np.full_like(order, self._shard[chunk]), self._start[chunk] + order], axis=1)

    def _permute(self, epochs: np.ndarray) -> np.ndarray:
        """int64 [len(epochs), C]: the chunk permutation of each epoch."""
        hashes = mix(self.seed, _PURPOSE_CHUNKS, epochs[:, None], np.arange(self._chunks)[None, :])
        return np.argsort(hashes, axis=1, kind="stable")

    def _seek(self, step: int, slots: range) -> tuple[list[int], list[int]]:
        """Global chunk number and offset in it of sample number `step` of each slot's queue.

        Walks over epochs in blocks, a bincount each, until every slot's queue is longer than `step`.
        """
        batch, first = self.global_batch_size, np.asarray(slots, np.int64)
        if (self._length == self.chunk_length).all():  # equal chunks need no walk
            chunk = first + batch * (step // self.chunk_length)
            return chunk.tolist(), [step % self.chunk_length] * len(slots)

        chunk, offset = np.full(len(slots), -1), np.zeros(len(slots), np.int64)
        remaining = np.full(len(slots), step, np.int64)
        block = max(1, SEEK_BLOCK // self._chunks)
        epoch = 0
        while (chunk < 0).any():
            lengths = self._length[self._permute(np.arange(epoch, epoch + block))].ravel()
            base = epoch * self._chunks
            slot_of = (base + np.arange(len(lengths))) % batch
            totals = np.bincount(slot_of, weights=lengths, minlength=batch)[first].astype(np.int64)
            for i in np.flatnonzero((chunk < 0) & (remaining < totals)):
                mine = np.arange((first[i] - base) % batch, len(lengths), batch)
                ends = np.cumsum(lengths[mine])
                k = int(np.searchsorted(ends, remaining[i], side="right"))
                chunk[i] = base + mine[k]
                offset[i] = remaining[i] - (ends[k] - lengths[mine[k]])
            remaining -= totals
            epoch += block
        return chunk.tolist(), offset.tolist()
