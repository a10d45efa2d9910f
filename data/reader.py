"""Readers: positions of the order -> micro-batches, with or without worker processes."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .batch import Batch, concatenate, split
from .buckets import BucketOrder
from .config import Bucket, DataConfig
from .decode import Decoder, make_decoder
from .fetch import Raw
from .index import ImageTextIndex
from .order import mix, share_of, slots_of
from .precomputed_read import PrecomputedDecoder
from .synthetic import step_shapes

_FILL_UP = -1  # position of a row that fills up the micro-batch of a short rank
_BLOCK = 1 << 20  # samples of a set that are looked at together
_VALIDATION_SEED = 0x5EED  # fixed: the validation bank must not change with the run's seed


class _Rows(IterableDataset[Batch]):
    """A rank's rows of each step from first_step on, those of this worker; endless.

    Worker w owns a contiguous part of the rows, so that a chunk is read by one process. rows: those of a rank, in a
    step of each bucket.
    """

    def __init__(
        self,
        decoder: Decoder | PrecomputedDecoder,
        order: BucketOrder,
        buckets: Sequence[Bucket | None],
        rows: Sequence[int],
        global_batch_size: int,
        first_step: int,
        slots: range,
    ) -> None:
        self.decoder, self._order, self._buckets, self._rows = decoder, order, buckets, rows
        self._batch, self._first_step, self._slots = global_batch_size, first_step, slots

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        streams: dict[int, list[Iterator[Raw | None]]] = {}  # by bucket, begun at the first step that reads it
        for step in itertools.count(self._first_step):
            at = self._order.at(step)
            rows = share_of(info.id if info else 0, info.num_workers if info else 1, self._rows[at.bucket])
            slots = self._slots[rows.start : rows.stop]
            fill_up = len(rows) - len(slots)
            if at.bucket not in streams:
                queues = self._order.queues(at, slots)
                streams[at.bucket] = self.decoder.files.streams(queues, sets=len(self._order.buckets))
            positions = [*(step * self._batch + slot for slot in slots), *[_FILL_UP] * fill_up]
            samples = [*(next(stream) for stream in streams[at.bucket]), *[None] * fill_up]
            yield self.decoder.batch(positions, samples, self._buckets[at.bucket])


def _start_worker(_: int) -> None:
    """Make a reader process quiet: one thread, and stops only when the trainer says so.

    Its own process group keeps Ctrl-C and torchrun's signals to the trainer's group away: the trainer saves
    first and then ends its workers. A worker whose trainer was killed notices within seconds by itself.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()


def _same(batch: Any) -> Any:
    """Collate function: the dataset returns whole batches already."""
    return batch


class ImageTextReader:
    """One rank's training batches of images and captions, or class labels.

    index: of the shards. seed: of the run. caption_dropout: probability of the empty caption. classes: of a model
    that is conditioned on labels. The world size and num_workers change which process reads a sample, never what a
    position holds. buckets: those of the steps, each with the most rows of a micro-batch; None: one, the square of
    cfg.resolution, with micro_batch_size. features: batches of precomputed shards have the images' features.
    Raises DataError where there are more ranks than samples in the global batch.
    """

    def __init__(
        self,
        index: ImageTextIndex,
        cfg: DataConfig,
        seed: int,
        global_batch_size: int,
        caption_dropout: float,
        rank: int,
        world: int,
        micro_batch_size: int,
        classes: int | None = None,
        buckets: Mapping[Bucket, int] | None = None,
        features: bool = False,
    ) -> None:
        self._batch, self._slots = global_batch_size, slots_of(rank, world, global_batch_size)
        self._buckets, self._shapes = step_shapes(buckets, global_batch_size, world, micro_batch_size)
        known = [bucket or Bucket(cfg.resolution, cfg.resolution, 0) for bucket in self._buckets]
        self._order = BucketOrder(seed, index, known, global_batch_size, cfg.epochs, cfg.characters_per_token)
        dropout = caption_dropout if classes is None else cfg.label_dropout
        self.decoder = make_decoder(index, cfg, seed, cfg.flip, dropout, cfg.crop == "random", classes, features)
        self._workers = cfg.num_workers
        self.fingerprint = index.fingerprint

    def batches(self, first_step: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, micro-batches of this rank) from first_step on, endless.

        Rows past the end of the data (data.epochs) have weight 0 and are no holes.
        """
        workers = self._workers
        loader = DataLoader(
            _Rows(
                self.decoder,
                self._order,
                self._buckets,
                [count * rows for count, rows in self._shapes],
                self._batch,
                first_step,
                self._slots,
            ),
            batch_size=None,
            num_workers=workers,
            collate_fn=_same,
            prefetch_factor=2 if workers else None,
            worker_init_fn=_start_worker if workers else None,
            # They share the index's open files. From Python 3.14 on the default is another.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # else the loader draws its seed from the trainer's generator
        )
        iterator = iter(loader)  # hands out the workers' rows in turn
        for step in itertools.count(first_step):
            batch = concatenate([next(iterator) for _ in range(max(1, workers))])
            batch = batch.pin_memory() if torch.cuda.is_available() else batch
            _, rows = self._shapes[self._order.at(step).bucket]
            yield step, split(batch, rows)


def validation_batches(
    index: ImageTextIndex,
    cfg: DataConfig,
    count: int,
    rank: int,
    world: int,
    batch_rows: int,
    classes: int | None = None,
) -> Iterator[Batch]:
    """This rank's part of a fixed bank of `count` samples (all, where there are fewer) spread over the index.

    Centre crop, no flip, no dropout; a sample's key depends on its number in the bank alone. All ranks yield
    the same number of batches of batch_rows rows, filled up with weight 0.
    """
    bank = _bank(len(index), count)
    decoder = make_decoder(index, cfg, _VALIDATION_SEED, flip=0.0, dropout=0.0, crop=False, classes=classes)
    numbers = [*share_of(rank, world, len(bank))]
    largest = -(-len(bank) // world)
    numbers += [_FILL_UP] * (-(-largest // batch_rows) * batch_rows - len(numbers))
    for i in range(0, len(numbers), batch_rows):
        rows = numbers[i : i + batch_rows]
        located = [index.locate(int(bank[number])) if number != _FILL_UP else None for number in rows]
        yield decoder.batch(rows, [decoder.files.sample(*place) if place else None for place in located])


def _bank(samples: int, count: int) -> np.ndarray:
    """int64: the `count` samples with the smallest hashes, in the order of these."""
    best, hashes = np.empty(0, np.int64), np.empty(0, np.uint64)
    for first in range(0, samples, _BLOCK):
        block = np.arange(first, min(first + _BLOCK, samples))
        best, hashes = np.concatenate([best, block]), np.concatenate([hashes, mix(_VALIDATION_SEED, block)])
        smallest = np.argsort(hashes, kind="stable")[:count]
        best, hashes = best[smallest], hashes[smallest]
    return best
