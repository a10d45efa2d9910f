"""Buckets: steps whose samples share one image size and one length of text.

A sample's bucket follows from its row of the index (`assign`), and the bucket of a step from the seed (`Schedule`): in
a block of BLOCK steps each bucket comes as often as its share of the samples says, in an order by hash. Each bucket has
an order of its own (data.order) over its samples, so an epoch of a bucket reads each of them once, and a resume seeks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from .config import Bucket
from .order import END_OF_DATA, Chunk, Order, Source, mix

BLOCK = 64  # steps that are shuffled together: fewer keep closer to the shares, more hide the pattern
SPECIAL_TOKENS = 2  # the most that a tokenizer adds to a caption
_RATE_BITS = 31  # binary digits of a rate: over 2^31 steps a bucket's share is exact to less than one step
_ROWS = 1 << 20  # rows of the index that are assigned to buckets together
_PURPOSE_BUCKET, _PURPOSE_STEPS = 4, 5
_ASSIGN_VERSION = 2  # of what `assign` finds, which is stored: a change of its results must change this


class IndexColumns(Protocol):
    """What is read of an index: samples of each shard, the sources that the shards belong to, and columns of all
    samples, each [samples]."""

    shard_sizes: list[int]
    sources: list[Source]

    def __len__(self) -> int: ...
    @property
    def width(self) -> np.ndarray: ...
    @property
    def height(self) -> np.ndarray: ...
    @property
    def caption_length(self) -> np.ndarray: ...
    def stored_array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray: ...


class StepBucket(NamedTuple):
    """The bucket of a step (its place in the list of buckets), and how many earlier steps had the same one."""

    bucket: int
    number: int


def assign(
    width: np.ndarray,
    height: np.ndarray,
    characters: np.ndarray,
    buckets: Sequence[Bucket],
    characters_per_token: float,
) -> np.ndarray:
    """The bucket of each sample: int64 [n], its place in `buckets`.

    width, height: of the images in pixels; characters: of their captions; all [n].
    The bucket has the aspect ratio that is nearest by its logarithm, the square's where the size is unknown (0), and
    the shortest length that the caption fits into by estimate, the longest where the caption's is unknown (0 or less).
    """
    sizes = sorted(dict.fromkeys(bucket[:2] for bucket in buckets), key=lambda size: size[1] / size[0])
    lengths = sorted({bucket.text_length for bucket in buckets})
    ratios = np.array([w / h for h, w in sizes])
    known = (width > 0) & (height > 0)
    ratio = np.where(known, width, 1) / np.where(known, height, 1)
    # The border of two ratios by their logarithms is their geometric mean.
    shape = np.searchsorted(np.sqrt(ratios[1:] * ratios[:-1]), ratio)
    tokens = np.ceil(characters / characters_per_token) + SPECIAL_TOKENS
    text = np.minimum(np.searchsorted(lengths, tokens), len(lengths) - 1)
    text = np.where(characters <= 0, len(lengths) - 1, text)
    numbers = {bucket: number for number, bucket in enumerate(buckets)}
    table = np.array([[numbers[Bucket(*size, length)] for length in lengths] for size in sizes])
    return table[shape, text]


def merged(counts: Sequence[int], buckets: Sequence[Bucket], at_least: int) -> list[int]:
    """For each bucket the one that its samples join, so that none has fewer than `at_least` (a global batch).

    counts: samples of each bucket. Of the buckets that are too small the smallest goes first: it joins one whose text
    is no shorter, so that no caption is cut; among these the one with the nearest aspect ratio; among these the one
    with the shortest text. What it joins may be too small itself, and then takes these samples along when its own turn
    comes. A bucket that can join none stays as it is: its batches hold a sample more than once.
    """
    counts, joins = list(counts), list(range(len(buckets)))
    stuck: set[int] = set()  # too small, but with no other to join
    # Each turn empties a bucket or adds one to `stuck`, so this ends.
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
        joins = [into if bucket == one else bucket for bucket in joins]  # also those that had joined `one` before
    return joins


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


class Schedule:
    """Which bucket each step reads: arithmetic, the same on all ranks. shares: of the buckets, in any unit."""

    def __init__(self, seed: int, shares: Sequence[Fraction]) -> None:
        self._seed, self._rates = seed, rates_of(shares)
        # The block that was asked for last: its number and its steps.
        self._block: tuple[int, list[StepBucket]] = -1, []

    def before(self, step: int) -> list[int]:
        """How many steps before `step` have each bucket."""
        first = step - step % BLOCK
        dealt, _ = deal(self._rates, np.arange(first))
        counts = np.bincount(dealt, minlength=len(self._rates) + 1)
        for each in range(first, step):
            counts[self.at(each).bucket] += 1
        return counts.tolist()

    def at(self, step: int) -> StepBucket:
        """The bucket of a step."""
        block, within = divmod(step, BLOCK)
        if self._block[0] != block:
            steps = np.arange(block * BLOCK, (block + 1) * BLOCK)
            buckets, numbers = deal(self._rates, steps)
            shuffled = buckets[np.argsort(mix(self._seed, _PURPOSE_STEPS, steps), kind="stable")]
            # The shuffle moves buckets between steps; a bucket's numbers are handed out anew, so that they rise.
            rising = np.empty_like(numbers)
            rising[np.argsort(shuffled, kind="stable")] = numbers[np.argsort(buckets, kind="stable")]
            self._block = block, [StepBucket(*pair) for pair in zip(shuffled.tolist(), rising.tolist(), strict=True)]
        return self._block[1][within]


class BucketOrder:
    """Which bucket each step reads, and which samples of it each slot reads.

    A pure function of (seed, index, buckets, global batch size). With one bucket it is the Order of the index.
    epochs: None repeats for ever; with k, a bucket's positions past its k-th epoch have shard END_OF_DATA.
    characters_per_token: data.characters_per_token, by which a caption's number of tokens is estimated. first_step: the
    step that reads the order's beginning. left_over: bool [samples], those that the first epochs read, where another
    order has read the others of an epoch.
    """

    def __init__(
        self,
        seed: int,
        index: IndexColumns,
        buckets: Sequence[Bucket],
        global_batch_size: int,
        epochs: int | None,
        characters_per_token: float,
        first_step: int = 0,
        left_over: np.ndarray | None = None,
    ) -> None:
        self._first_step, self._index, self._left_over = first_step, index, left_over
        self._ends = np.cumsum(index.shard_sizes)
        if len(buckets) == 1 or not len(index):  # an empty index is an error that Order raises
            self._bucket_of = None
            rest = None if left_over is None else _sizes(np.zeros(len(index), np.uint8), index, 1, left_over)[0]
            self._orders = {0: Order(seed, index.shard_sizes, global_batch_size, epochs, index.sources, rest)}
            shares = [Fraction(1)]
        else:
            self._bucket_of = _buckets_of(index, buckets, characters_per_token)
            sizes = _sizes(self._bucket_of, index, len(buckets))
            self._joins = np.array(merged(sizes.sum(axis=1).tolist(), buckets, global_batch_size))
            sizes = self._joined(sizes)
            rests = None if left_over is None else self._joined(_sizes(self._bucket_of, index, len(buckets), left_over))
            read = [c for c in range(len(buckets)) if sizes[c].any()]
            sources = {c: _sources_of_bucket(index, sizes[c]) for c in read}
            self._orders = {
                c: Order(
                    int(mix(seed, _PURPOSE_BUCKET, c)),
                    sizes[c].tolist(),
                    global_batch_size,
                    epochs,
                    sources[c],
                    None if rests is None else rests[c],
                )
                for c in read
            }
            shares = [sum((Fraction(source.weight) for source in sources[c]), Fraction()) for c in read]
        self._read = list(self._orders)
        self._schedule = Schedule(seed, shares)

    def at(self, step: int) -> StepBucket:
        """The bucket of a step."""
        step -= self._first_step
        if len(self._read) == 1:
            return StepBucket(self._read[0], step)
        found = self._schedule.at(step)
        return StepBucket(self._read[found.bucket], found.number)

    @property
    def buckets(self) -> list[int]:
        """The buckets that hold samples."""
        return list(self._read)

    def queues(self, at: StepBucket, slots: range) -> list[Iterator[Chunk]]:
        """For each slot the endless chunks of at.bucket that it reads, from the bucket's step at.number on."""
        return [self._located(at.bucket, queue) for queue in self._orders[at.bucket].queues(at.number, slots)]

    def left_over(self, step: int) -> np.ndarray:
        """bool [samples]: those that the epochs in progress have still to read before `step`. Each source has epochs of
        its own in each bucket. Of samples that are not read at all (of weight 0) it says what was said before."""
        left = np.ones(len(self._index), bool) if self._left_over is None else np.array(self._left_over)
        for place, bucket in enumerate(self._read):
            number = self._schedule.before(step - self._first_step)[place]
            for source, (of_rest, of_epoch) in self._orders[bucket].left_over(number).items():
                before = sum(each.shards for each in self._index.sources[:source])
                for shard in range(before, before + self._index.sources[source].shards):
                    first = int(self._ends[shard - 1]) if shard else 0
                    members = first + self._members(shard, bucket, of_rest)
                    left[members], of_epoch = of_epoch[: len(members)], of_epoch[len(members) :]
        return left

    def _joined(self, sizes: np.ndarray) -> np.ndarray:
        """int64 [buckets, shards]: samples of each bucket, those that have joined it among them."""
        return np.stack([sizes[self._joins == c].sum(axis=0) for c in range(len(sizes))])

    def _located(self, bucket: int, queue: Iterator[Chunk]) -> Iterator[Chunk]:
        """An order numbers samples within the bucket, and within what was left over; here they get their numbers in the
        shard."""
        for chunk in queue:
            if chunk.shard == END_OF_DATA or (self._bucket_of is None and not chunk.of_rest):
                yield chunk
            else:
                yield Chunk(chunk.shard, self._members(chunk.shard, bucket, chunk.of_rest)[chunk.samples])

    def _members(self, shard: int, bucket: int, of_rest: bool) -> np.ndarray:
        """int64: the samples of a shard that are in a bucket, in the order of the shard. of_rest: of those that were
        left over."""
        rows = slice(int(self._ends[shard - 1]) if shard else 0, int(self._ends[shard]))
        chosen = np.ones(rows.stop - rows.start, bool)
        if self._bucket_of is not None:
            chosen &= self._joins[self._bucket_of[rows]] == bucket
        if of_rest and self._left_over is not None:
            chosen &= self._left_over[rows]
        return np.flatnonzero(chosen)


def _buckets_of(index: IndexColumns, buckets: Sequence[Bucket], characters_per_token: float) -> np.ndarray:
    """uint8 [samples] (uint16 with over 256 buckets): the bucket of every sample, before small buckets are merged."""

    def make() -> np.ndarray:
        bucket_of = np.empty(len(index), np.uint8 if len(buckets) <= 256 else np.uint16)
        for first in range(0, len(index), _ROWS):
            rows = slice(first, first + _ROWS)
            width, height, characters = (c[rows] for c in (index.width, index.height, index.caption_length))
            bucket_of[rows] = assign(width, height, characters, buckets, characters_per_token)
        return bucket_of

    question = repr((_ASSIGN_VERSION, [tuple(bucket) for bucket in buckets], characters_per_token))
    return index.stored_array(f"buckets-{hashlib.sha256(question.encode()).hexdigest()[:16]}", make)


def _sizes(bucket_of: np.ndarray, index: IndexColumns, buckets: int, chosen: np.ndarray | None = None) -> np.ndarray:
    """int64 [buckets, shards]: samples of each bucket in each shard. chosen: bool [samples], which of them count."""
    sizes, first = np.zeros((buckets, len(index.shard_sizes)), np.int64), 0
    for shard, count in enumerate(index.shard_sizes):
        rows = slice(first, first + count)
        of_shard = bucket_of[rows] if chosen is None else bucket_of[rows][chosen[rows]]
        sizes[:, shard] = np.bincount(of_shard, minlength=buckets)
        first += count
    return sizes


def _sources_of_bucket(index: IndexColumns, sizes: np.ndarray) -> list[Source]:
    """The sources as a bucket sees them: the weight of each times the share of its samples that lies in the bucket.

    sizes: int64 [shards], the bucket's samples.
    """
    sources, first = [], 0
    for source in index.sources:
        own = slice(first, first + source.shards)
        whole = int(sum(index.shard_sizes[own]))
        weight = Fraction(source.weight) * Fraction(int(sizes[own].sum()), max(1, whole))
        sources.append(Source(source.shards, weight))
        first += source.shards
    return sources
