"""Readers: the order's samples are read, decoded and cut into micro-batches, with or without worker processes."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .batch import Batch, concatenate, split, step_shapes
from .buckets import BucketOrder
from .config import Bucket, DataConfig
from .decode import Decoder, ImageRows
from .errors import DataError
from .index import ImageTextIndex
from .order import mix, share_of, slots_of
from .precomputed_read import LatentRows
from .samples import RawSample, SampleFiles
from .stages import Begin, Part

_AHEAD = 2  # batches that a worker reads before they are asked for
_OTHER_FILES, _FILES_OF_A_WORKER = 64, 8  # open beside the tensors: of this process, and the pipes of a worker
_SHARED = "/dev/shm"  # where workers leave their batches
_FILL_UP = -1  # the position of a row without a sample, which fills up a rank that has fewer samples than others
_BLOCK = 1 << 20  # samples of a set that are hashed together
_VALIDATION_SEED = 0x5EED  # fixed: the validation bank must not change with the run's seed


class _Rows(IterableDataset[Batch]):
    """A rank's rows of each step from first_step on, as far as they belong to this worker; endless.

    Worker w of n owns a contiguous part of the rank's rows, so that a chunk is read by one process. buckets: those of
    the run. rows: of a rank in a step of each bucket, fill-up rows included. slots: the rank's. first_position: of the
    whole batch of first_step.
    """

    def __init__(
        self,
        decoder: Decoder,
        order: BucketOrder,
        buckets: Sequence[Bucket | None],
        rows: Sequence[int],
        global_batch_size: int,
        first_step: int,
        first_position: int,
        slots: range,
    ) -> None:
        self.decoder, self._order, self._buckets, self._rows = decoder, order, buckets, rows
        self._batch, self._slots = global_batch_size, slots
        self._first_step, self._first_position = first_step, first_position

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # A bucket's streams begin at the first step that reads it, and from there on advance by one sample in each step
        # of that bucket. Where they begin is arithmetic (at.number), so it does not matter which step comes first.
        streams: dict[int, list[Iterator[RawSample | None]]] = {}
        for step in itertools.count(self._first_step):
            at = self._order.at(step)
            # The rank's samples fill its rows from the front, so a worker's rows at the end may have no slot: they are
            # filled up, with weight 0, so that all ranks have micro-batches of the same shape.
            rows = share_of(worker, workers, self._rows[at.bucket])
            slots = self._slots[rows.start : rows.stop]
            fill_up = len(rows) - len(slots)
            if at.bucket not in streams:
                queues = self._order.queues(at, slots)
                streams[at.bucket] = self.decoder.files.streams(queues, sets=len(self._order.buckets))
            position = self._first_position + (step - self._first_step) * self._batch
            positions = [*(position + slot for slot in slots), *[_FILL_UP] * fill_up]
            samples = [*(next(stream) for stream in streams[at.bucket]), *[None] * fill_up]
            yield self.decoder.batch(positions, samples, self._buckets[at.bucket])


def start_worker(_: int) -> None:
    """Make a reader process compute with one thread, and stop only when the trainer says so.

    Its own process group keeps Ctrl-C and torchrun's signals to the trainer's group away from it: the trainer saves
    first and ends its workers then. A worker whose trainer was killed notices that by itself within seconds.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()


def _same(batch: Any) -> Any:
    """The DataLoader's collate function: the dataset yields whole batches already."""
    return batch


def _copied_ahead(parts: Iterator[list[Batch]], pinned: bool) -> Iterator[Batch]:
    """Each step's batch, copied from its parts by a thread while the step before is trained on.

    The thread waits for no reader process, so it ends as soon as this stream is closed. It has to: whoever closes it to
    read elsewhere forks reader processes next, which must not happen while a thread computes.
    """
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(concatenate, next(parts), pinned)
        while True:
            # In this order: the parts of one step have left the shared memory before those of the next are fetched.
            batch, coming = coming.result(), thread.submit(concatenate, next(parts), pinned)
            yield batch


class ImageTextReader:
    """One rank's training batches of images, or latents, with captions or class labels.

    The world size and data.num_workers decide which process reads a sample, never which sample a position holds.

    index: of the shards. seed: of the run. caption_dropout: probability that a caption is dropped. micro_batch_size:
    the most rows of a micro-batch. classes: the number of classes of a model that is conditioned on labels, else None.
    buckets: those of the steps, each with the most rows of a micro-batch; None is a single one, the square of
    cfg.resolution with micro_batch_size. features: batches of precomputed shards hold the features of their images.
    begin: where the order of these data begins; None: at cfg.first_step.
    Raises DataError where there are more ranks than samples in the global batch; its batches do where the machine's
    limits are too small for them.
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
        begin: Begin | None = None,
    ) -> None:
        self._batch, self._slots = global_batch_size, slots_of(rank, world, global_batch_size)
        self._buckets, self._shapes = step_shapes(buckets, global_batch_size, world, micro_batch_size)
        known = [bucket or Bucket(cfg.resolution, cfg.resolution, 0) for bucket in self._buckets]
        begin = begin or Begin(cfg.first_step, cfg.first_step * global_batch_size)
        self._order = begin.order(seed, Part(index, known, global_batch_size, cfg.characters_per_token), cfg.epochs)
        self._begin = begin
        dropout = caption_dropout if classes is None else cfg.label_dropout
        self.decoder = _decoder(index, cfg, seed, cfg.flip, dropout, cfg.crop == "random", classes, features)
        self._workers = cfg.num_workers
        self.fingerprint = index.fingerprint

    def batches(self, first_step: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, this rank's micro-batches of it) from first_step on, endless.

        Rows past the end of the data (data.epochs) have weight 0 and are no holes.
        """
        workers = self._workers
        if workers:
            self._check_limits()
        loader = DataLoader(
            _Rows(
                self.decoder,
                self._order,
                self._buckets,
                [count * rows for count, rows in self._shapes],
                self._batch,
                first_step,
                self._begin.position_of(first_step, self._batch),
                self._slots,
            ),
            batch_size=None,
            num_workers=workers,
            collate_fn=_same,
            prefetch_factor=_AHEAD if workers else None,
            worker_init_fn=start_worker if workers else None,
            # Workers share the index's open files, so they are forked; from Python 3.14 on that is not the default.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # else the loader would draw its seed from the trainer's generator
        )
        iterator, pinned = iter(loader), torch.cuda.is_available()
        if workers:  # each yields a batch in turn
            parts = ([next(iterator) for _ in range(workers)] for _ in itertools.count())
            whole = _copied_ahead(parts, pinned)
        else:
            whole = (concatenate([batch], pinned) if pinned else batch for batch in iterator)
        for step, batch in zip(itertools.count(first_step), whole, strict=False):
            _, rows = self._shapes[self._order.at(step).bucket]
            yield step, split(batch, rows)

    def _check_limits(self) -> None:
        """Raise DataError where what workers leave to be fetched is too much for this node's shared memory, for which
        they would wait without a word, or for this process's open files, of which each tensor is one."""
        empty = [self.decoder.batch([_FILL_UP], [None], bucket).tensors() for bucket in self._buckets]
        rows = [count * rows for count, rows in self._shapes]
        step = max(count * sum(each.nbytes for each in row) for count, row in zip(rows, empty, strict=True))
        needed = (_AHEAD + 1) * step * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = shutil.disk_usage(_SHARED).free if os.path.isdir(_SHARED) else needed
        if free < needed:
            raise DataError(
                f"{_SHARED} has {free / 2**20:.3g} MiB free, and the readers need {needed / 2**20:.3g} MiB: give the "
                "container more (docker run --ipc host, or --shm-size), or set data.num_workers=0"
            )
        files = _OTHER_FILES + self._workers * (_FILES_OF_A_WORKER + (_AHEAD + 1) * max(map(len, empty)))
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if resource.RLIM_INFINITY != limit < files:
            raise DataError(
                f"a process may open {limit} files here, and {self._workers} workers of data.num_workers need {files}: "
                "raise it (ulimit -n 65536; docker run --ulimit nofile=65536), or lower data.num_workers"
            )


def _decoder(
    index: ImageTextIndex,
    cfg: DataConfig,
    seed: int,
    flip: float,
    dropout: float,
    crop: bool,
    classes: int | None,
    features: bool = False,
) -> Decoder:
    """The decoder of an index of images or of precomputed samples. crop: whether images are cropped at random."""
    if index.dataset is None:
        files = SampleFiles(index, cfg, images_only=classes is not None)
        make_rows = partial(ImageRows, index, cfg, crop, classes)
    else:
        files = SampleFiles(index, cfg, images_only=classes is not None, features=features)
        make_rows = partial(LatentRows, index.dataset, classes, features)
    return Decoder(index, files, make_rows, seed, flip, dropout, classes)


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

    The images are cropped at their centre, nothing is flipped or dropped, and a sample's key depends on its number in
    the bank alone. All ranks yield the same number of batches of batch_rows rows, filled up with rows of weight 0.
    """
    bank = _bank(len(index), count)
    decoder = _decoder(index, cfg, _VALIDATION_SEED, flip=0.0, dropout=0.0, crop=False, classes=classes)
    numbers = [*share_of(rank, world, len(bank))]
    largest = -(-len(bank) // world)
    numbers += [_FILL_UP] * (-(-largest // batch_rows) * batch_rows - len(numbers))
    for i in range(0, len(numbers), batch_rows):
        rows = numbers[i : i + batch_rows]
        located = [index.locate(int(bank[number])) if number != _FILL_UP else None for number in rows]
        yield decoder.batch(rows, [decoder.files.sample(*place) if place else None for place in located])


def _bank(samples: int, count: int) -> np.ndarray:
    """int64: the `count` samples with the smallest hashes, by rising hash."""
    best, hashes = np.empty(0, np.int64), np.empty(0, np.uint64)
    for first in range(0, samples, _BLOCK):
        block = np.arange(first, min(first + _BLOCK, samples))
        best, hashes = np.concatenate([best, block]), np.concatenate([hashes, mix(_VALIDATION_SEED, block)])
        smallest = np.argsort(hashes, kind="stable")[:count]
        best, hashes = best[smallest], hashes[smallest]
    return best
