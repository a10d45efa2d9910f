"""Buckets: steps whose samples share one image size and one length of text.

A sample's bucket follows from its row of the index, the bucket of a step from the seed: a block of BLOCK steps holds
each
bucket as often as its share of the samples says, in an order by hash. Each bucket is an order of its own
(data.order) over
its samples, so an epoch of a bucket reads each of them once, and a resume seeks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from .config import Bucket
from .order import END_OF_DATA, Order, Part, Run, deal, mix, rates_of

BLOCK = 64  # steps that are shuffled together: fewer keep closer to the shares, more hide the pattern
SPECIAL_TOKENS = 2  # at most, that a tokenizer adds to a caption
_ROWS = 1 << 20  # of the index that are looked at together
_PURPOSE_BUCKET, _PURPOSE_STEPS = 4, 5
_ASSIGN_VERSION = 1  # of what `assign` finds, which is kept in files


class Rows(Protocol):
    """What is read of an index: samples of each shard, the sources among these, and columns of all samples."""

    shard_sizes: list[int]
    parts: list[Part]

    def __len__(self) -> int: ...
    @property
    def width(self) -> np.ndarray: ...
    @property
    def height(self) -> np.ndarray: ...
    @property
    def caption_length(self) -> np.ndarray: ...
    def kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray: ...


class StepBucket(NamedTuple):
    """The bucket of a step, and how many earlier steps had the same one."""

    bucket: int
    number: int


def assign(
    width: np.ndarray,
    height: np.ndarray,
    characters: np.ndarray,
    buckets: Sequence[Bucket],
    characters_per_token: float,
) -> np.ndarray:
    """int64 [n]: number of the bucket of images of width x height pixels with captions of so many characters.

    The aspect ratio is the nearest one by its logarithm, the square's where the size is unknown (0); the length is the
    shortest that the caption fits in by estimate, the longest where it is unknown (negative).
    """
    sizes, lengths = (
        list(dict.fromkeys(bucket[:2] for bucket in buckets)),
        sorted({bucket.text_length for bucket in buckets}),
    )
    sizes.sort(key=lambda size: size[1] / size[0])
    ratios = np.array([w / h for h, w in sizes])
    known = (width > 0) & (height > 0)
    ratio = np.where(known, width, 1) / np.where(known, height, 1)
    shape = np.searchsorted(np.sqrt(ratios[1:] * ratios[:-1]), ratio)
    tokens = np.ceil(characters / characters_per_token) + SPECIAL_TOKENS
    text = np.minimum(np.searchsorted(lengths, tokens), len(lengths) - 1)
    text = np.where(characters < 0, len(lengths) - 1, text)
    numbers = {bucket: number for number, bucket in enumerate(buckets)}
    table = np.array([[numbers[Bucket(*size, length)] for length in lengths] for size in sizes])
    return table[shape, text]


def merged(counts: Sequence[int], buckets: Sequence[Bucket], at_least: int) -> list[int]:
    """For each bucket the one that its samples join, so that none has fewer than `at_least` (a global batch).

    The smallest bucket goes first, to the bucket with the nearest aspect ratio, of these to the one with the
    shortest text,
    among those whose text is no shorter. Where there is none it stays, and a batch holds its samples more than once.
    """
    counts, joins = list(counts), list(range(len(buckets)))
    stuck: set[int] = set()
    while small := [c for c, count in enumerate(counts) if 0 < count < at_least and c not in stuck]:
        one = min(small, key=lambda c: (counts[c], c))

        def distance(other: int, one: int = one) -> tuple[float, int, int]:
            a, b = buckets[one], buckets[other]
            return abs(float(np.log(a.width / a.height * b.height / b.width))), b.text_length, other

        others = [c for c in range(len(buckets)) if c != one and counts[c]]
        others = [c for c in others if buckets[c].text_length >= buckets[one].text_length]
        if not others:
            stuck.add(one)
            continue
        into = min(others, key=distance)
        counts[into], counts[one] = counts[into] + counts[one], 0
        joins = [into if bucket == one else bucket for bucket in joins]
    return joins


class Schedule:
    """Which bucket each step reads: arithmetic, the same on all ranks. shares: of the buckets, in any unit."""

    def __init__(self, seed: int, shares: Sequence[Fraction]) -> None:
        self._seed, self._rates = seed, rates_of(shares)
        self._block: tuple[int, list[StepBucket]] = -1, []  # the last one that was asked for

    def at(self, step: int) -> StepBucket:
        """The bucket of a step."""
        block, within = divmod(step, BLOCK)
        if self._block[0] != block:
            steps = np.arange(block * BLOCK, (block + 1) * BLOCK)
            buckets, numbers = deal(self._rates, steps)
            shuffled = buckets[np.argsort(mix(self._seed, _PURPOSE_STEPS, steps), kind="stable")]
            rising = np.empty_like(numbers)  # so that a bucket's steps come in their order
            rising[np.argsort(shuffled, kind="stable")] = numbers[np.argsort(buckets, kind="stable")]
            self._block = block, [StepBucket(*pair) for pair in zip(shuffled.tolist(), rising.tolist(), strict=True)]
        return self._block[1][within]


class BucketOrder:
    """Which bucket each step reads, and which samples its slots do.

    A pure function of (seed, index, buckets, global batch size). With one bucket it is the Order of the index.
    epochs: None repeats for ever; with k, a bucket's positions past its k-th epoch have shard END_OF_DATA.
    """

    def __init__(
        self,
        seed: int,
        index: Rows,
        buckets: Sequence[Bucket],
        global_batch_size: int,
        epochs: int | None,
        characters_per_token: float,
    ) -> None:
        self._ends = np.cumsum(index.shard_sizes)
        if len(buckets) == 1 or not len(index):  # an empty one is an error of Order
            self._bucket_of = None
            self._orders = {0: Order(seed, index.shard_sizes, global_batch_size, epochs, index.parts)}
            shares = [Fraction(1)]
        else:
            self._bucket_of = _buckets_of(index, buckets, characters_per_token)
            sizes = _sizes(self._bucket_of, index.shard_sizes, len(buckets))
            self._joins = np.array(merged(sizes.sum(axis=1).tolist(), buckets, global_batch_size))
            sizes = np.stack([sizes[self._joins == c].sum(axis=0) for c in range(len(buckets))])
            read = [c for c in range(len(buckets)) if sizes[c].any()]
            parts = {c: _parts(index, sizes[c]) for c in read}
            self._orders = {
                c: Order(int(mix(seed, _PURPOSE_BUCKET, c)), sizes[c].tolist(), global_batch_size, epochs, parts[c])
                for c in read
            }
            shares = [sum((Fraction(part.weight) for part in parts[c]), Fraction()) for c in read]
        self._read = list(self._orders)
        self._schedule = Schedule(seed, shares)

    def at(self, step: int) -> StepBucket:
        """The bucket of a step."""
        if len(self._read) == 1:
            return StepBucket(self._read[0], step)
        found = self._schedule.at(step)
        return StepBucket(self._read[found.bucket], found.number)

    @property
    def buckets(self) -> list[int]:
        """The buckets that hold samples."""
        return list(self._read)

    def queues(self, at: StepBucket, slots: range) -> list[Iterator[Run]]:
        """For each slot the endless chunks of at.bucket that it reads from the bucket's step at.number on."""
        queues = self._orders[at.bucket].queues(at.number, slots)
        return [self._located(at.bucket, queue) for queue in queues] if self._bucket_of is not None else queues

    def _located(self, bucket: int, queue: Iterator[Run]) -> Iterator[Run]:
        """Samples numbered within the bucket -> samples of their shard."""
        for run in queue:
            if run.shard == END_OF_DATA:
                yield run
            else:
                yield Run(run.shard, self._members(run.shard, bucket)[run.samples])

    def _members(self, shard: int, bucket: int) -> np.ndarray:
        """int64: the samples of a shard that are in a bucket."""
        assert self._bucket_of is not None
        first = int(self._ends[shard - 1]) if shard else 0
        return np.flatnonzero(self._joins[self._bucket_of[first : self._ends[shard]]] == bucket)


def _buckets_of(index: Rows, buckets: Sequence[Bucket], characters_per_token: float) -> np.ndarray:
    """uint8 [samples] (uint16 for many buckets): the bucket of every sample, before small buckets are merged."""

    def make() -> np.ndarray:
        bucket_of = np.empty(len(index), np.uint8 if len(buckets) <= 256 else np.uint16)
        for first in range(0, len(index), _ROWS):
            rows = slice(first, first + _ROWS)
            width, height, characters = (c[rows] for c in (index.width, index.height, index.caption_length))
            bucket_of[rows] = assign(width, height, characters, buckets, characters_per_token)
        return bucket_of

    asked = repr((_ASSIGN_VERSION, [tuple(bucket) for bucket in buckets], characters_per_token))
    return index.kept(f"buckets-{hashlib.sha256(asked.encode()).hexdigest()[:16]}", make)


def _sizes(bucket_of: np.ndarray, shard_sizes: Sequence[int], buckets: int) -> np.ndarray:
    """int64 [buckets, shards]: samples of each."""
    sizes, first = np.zeros((buckets, len(shard_sizes)), np.int64), 0
    for shard, count in enumerate(shard_sizes):
        sizes[:, shard] = np.bincount(bucket_of[first : first + count], minlength=buckets)
        first += count
    return sizes


def _parts(index: Rows, sizes: np.ndarray) -> list[Part]:
    """The sources as a bucket has them: weights by the share of each source's samples that lies in the bucket.

    sizes: int64 [shards], the bucket's samples.
    """
    parts, first = [], 0
    for part in index.parts:
        own = slice(first, first + part.shards)
        whole = int(sum(index.shard_sizes[own]))
        parts.append(Part(part.shards, Fraction(part.weight) * Fraction(int(sizes[own].sum()), max(1, whole))))
        first += part.shards
    return parts
