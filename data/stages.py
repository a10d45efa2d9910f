"""Where the data of a stage begin: with what the stage before has left over of the epoch in progress.

A run may have stages of other batch sizes and buckets (see trainer.config.stages). Each has an order of its own
(data.buckets), a pure function of the seed, the index and the stages up to it. Its first epoch reads those samples that
the stage before had still to read. So no sample is read twice in an epoch; of the samples that queues which lag behind
have left of an older epoch, about a chunk of each, some are not read in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from .buckets import BucketOrder
from .config import Bucket
from .index import ImageTextIndex
from .order import mix

_PURPOSE_STAGE = 6  # data.order and data.buckets have 1 to 5


@dataclass(frozen=True)
class Part:
    """What the order of a stage's samples depends on, beside the seed and the stages before it."""

    index: ImageTextIndex
    buckets: Sequence[Bucket]
    global_batch_size: int
    characters_per_token: float

    def facts(self) -> tuple[object, ...]:
        """All but the samples."""
        weights = [str(source.weight) for source in self.index.sources]
        return list(self.buckets), self.global_batch_size, self.characters_per_token, weights


class Begin(NamedTuple):
    """Where the order of some data begins.

    step: of the data, that reads their first samples. position: of the first of these. number: of the stage. before:
    the stages before it that read the same samples, the first of which began with all of them, each with its first
    step.
    """

    step: int = 0
    position: int = 0
    number: int = 0
    before: Sequence[tuple[int, Part]] = ()

    def position_of(self, step: int, global_batch_size: int) -> int:
        """The position of the first sample of a step; all randomness of a sample follows from its position."""
        return self.position + (step - self.step) * global_batch_size

    def identity(self) -> str | None:
        """What the order of the stage depends on beside its own data; None of a run that began with them."""
        if not self.number and not self.before:
            return None
        before = [(step, each.index.fingerprint, *each.facts()) for step, each in self.before]
        return hashlib.sha256(repr((self.step, self.position, self.number, before)).encode()).hexdigest()

    def order(self, seed: int, part: Part, epochs: int | None) -> BucketOrder:
        """The order of the samples of the stage. epochs: None where there are stages before it."""
        identity, order = hashlib.sha256(), None
        for number, (step, each) in enumerate([*self.before, (self.step, part)], self.number - len(self.before)):
            left_over: np.ndarray | None = None
            own_seed = int(mix(seed, _PURPOSE_STAGE, number)) if number else seed
            if order is not None:
                name = f"left-over-{identity.hexdigest()[:16]}-{step}"
                left_over = each.index.stored_array(name, partial(order.left_over, step))
            order = BucketOrder(
                own_seed,
                each.index,
                each.buckets,
                each.global_batch_size,
                epochs,
                each.characters_per_token,
                step,
                left_over,
            )
            identity.update(repr((own_seed, step, *each.facts())).encode())
        assert order is not None
        return order
