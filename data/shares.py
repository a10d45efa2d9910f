"""How several sources share the slots of each step, as arithmetic.

The sources lie side by side on a line of length B, the global batch size, each as long as its part of a batch: B times
its share of the weights. Step s reads what lies at the points u(s), 1 + u(s), ..., B - 1 + u(s) of the line, with
0 <= u(s) < 1. So a batch holds of each source its part, rounded down or up.

u(s) is the van der Corput sequence: the binary digits of s in reverse, behind the point. It meets each part of the line
as often as its length says, over any number of steps to within MOST_ASTRAY samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np

MOST_ASTRAY = 23  # samples: twice the discrepancy of 2^31 points of the sequence, 31 / 3 + 1
_BITS = 31  # binary digits of a place between two slots: over 2^31 steps a source's share is exact to one sample
_BLOCK = 256  # steps that are dealt to the sources together
_ENDLESS = 1 << 62  # steps
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio


class Read(NamedTuple):
    """`steps` steps one after the other in which a slot reads one queue of one source: its samples from `first` on."""

    source: int
    queue: int
    first: int
    steps: int


def points_below(steps: np.ndarray, border: int) -> np.ndarray:
    """How many of the steps before each of `steps` have u(s) below border / 2^_BITS: int64 [n].

    u(s) is the van der Corput sequence: the _BITS binary digits of s in reverse, as digits behind the point. The steps
    before n are as many blocks as n has digits 1. In a block of 2^m steps only the last m digits of s differ, and so
    the first m digits of u(s): its points are evenly spaced, by 2^-m, and are counted by a division.
    """
    found = (steps >> _BITS) * border  # each of the 2^_BITS points is met once in so many steps
    first = np.zeros_like(steps)  # of the block: the smallest of its points, times 2^_BITS
    for m in range(_BITS - 1, -1, -1):
        has_block = (steps >> m) & 1
        spacing = 1 << (_BITS - m)
        found = found + has_block * np.clip((border - first + spacing - 1) >> (_BITS - m), 0, 1 << m)
        first = first + (has_block << (_BITS - 1 - m))
    return found


class Shares:
    """How several sources share the slots of each step; the only one has them all.

    weights: of the sources. Attribute `slots`: K of each source, the most of its samples that a batch holds.
    """

    def __init__(self, weights: Sequence[Fraction], batch: int) -> None:
        total = sum(weights)
        line = [round(batch * sum(weights[:i]) / total * 2**_BITS) for i in range(len(weights) + 1)]
        self._borders = [int(border) for border in line]  # between the sources, times 2^_BITS
        lengths = [b - a for a, b in pairwise(self._borders)]
        self._whole = [length >> _BITS for length in lengths]  # samples that every batch holds
        self.slots = [-(-length >> _BITS) for length in lengths]
        # Each slot's source (one more for those that are left), and its number among the slots of that source. By the
        # golden ratio, so that each range of slots, which is a rank, has about the same share of each source.
        spread = np.argsort(np.argsort(np.arange(batch, dtype=np.uint64) * np.uint64(_GOLDEN)))
        owners = np.arange(len(weights) + 1)
        self._owner = np.repeat(owners, [*self._whole, batch - sum(self._whole)])[spread]
        self._place = np.zeros(batch, np.int64)
        for owner in owners:
            self._place[self._owner == owner] = np.arange((self._owner == owner).sum())
        self._block_of = lru_cache(maxsize=4)(self._block)

    def before(self, steps: np.ndarray) -> np.ndarray:
        """Samples of each source that are read before each of `steps`: int64 [sources, n]."""
        up_to = [(border >> _BITS) * steps + points_below(steps, border % 2**_BITS) for border in self._borders]
        return np.diff(np.stack(up_to), axis=0)

    def queues(self, slot: int) -> list[tuple[int, int]]:
        """(source, queue) of all that a slot may read."""
        owner, place = int(self._owner[slot]), int(self._place[slot])
        own = [(owner, place)] if owner < len(self.slots) else []
        mixed = [i for i in range(len(self.slots)) if self.slots[i] > self._whole[i] and owner in (i, len(self.slots))]
        return [*own, *((i, self._whole[i]) for i in mixed)]

    def reads(self, slot: int, first_step: int) -> Iterator[Read]:
        """What a slot reads from first_step on, without end.

        Where the part of a source is a whole number, each of its queues belongs to a slot. Of any other source the last
        queue is left over. In a step with K of its samples a slot that belongs to no source reads that one; in a step
        with K - 1, the slot of the queue that is left out reads it in place of its own. So the queues stay level.
        """
        owner, place = int(self._owner[slot]), int(self._place[slot])
        if owner < len(self.slots) and self.slots[owner] == self._whole[owner]:
            yield Read(owner, place, first_step, _ENDLESS)
            return
        for block in count(first_step // _BLOCK):
            before = self._block_of(block)  # [sources, _BLOCK + 1]
            taken = np.diff(before, axis=1)
            if owner < len(self.slots):
                slots, source = self.slots[owner], np.full(_BLOCK, owner)
                left_out = before[owner, 1:] % slots
                queue = np.where((taken[owner] < slots) & (left_out == place), slots - 1, place)
            else:
                extra = taken > np.array(self._whole)[:, None]
                source = (np.cumsum(extra, axis=0) > place).argmax(axis=0)
                queue = np.array(self._whole)[source]
            slots = np.array(self.slots)[source]
            number = (before[source, np.arange(_BLOCK)] - queue + slots - 1) // slots
            starts = [0, *(np.flatnonzero((np.diff(source) != 0) | (np.diff(queue) != 0)) + 1), _BLOCK]
            for start, end in pairwise(starts):
                start = max(start, first_step - block * _BLOCK)
                if start < end:
                    yield Read(int(source[start]), int(queue[start]), int(number[start]), int(end - start))

    def _block(self, block: int) -> np.ndarray:
        return self.before(np.arange(block * _BLOCK, (block + 1) * _BLOCK + 1))
